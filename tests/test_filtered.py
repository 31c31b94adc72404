"""What filtered BC keeps, chosen by hand."""
from types import SimpleNamespace

import filtered_bc
import numpy as np
import pytest
import torch
from conftest import made, small


def kept(folder, lengths, ends, rewards, **flags):
    """(episode, step) of the transitions that `prepare` keeps, and the prepared data."""
    folder = made(folder, lengths, ends, rewards=np.array(rewards, np.float32))
    args = filtered_bc.Args(dataset_id=folder, eval_episodes=0, batch_size=1, device="cpu", **flags)
    data = filtered_bc.load(args)
    every = data.obs.clone()
    filtered_bc.prepare(data, args)
    torch.testing.assert_close(data.mean, every.mean(0))  # of all the data, as it was before
    rows = (data.obs * data.std + data.mean)[:, :2].round().long()
    assert len({len(x) for x in (data.obs, data.next_obs, data.action, data.reward, data.terminated, data.episode)}) == 1
    assert torch.equal(data.episode, rows[:, 0])
    following = (data.next_obs * data.std + data.mean)[:, :2].round().long()
    assert torch.equal(following, rows + torch.tensor([0, 1]))  # a transition is kept or left as a whole
    return list(map(tuple, rows.tolist())), data


def episodes(rows):
    return sorted({episode for episode, _ in rows})


LENGTHS, ENDS = [2, 3, 1, 2, 2], ["terminal", "timeout", "terminal", "terminal", ""]
REWARDS = [1, 1, 0, 0, 2, 5, 3, -1, 4, 0]  # returns 2, 2, 5, 2, 4


@pytest.mark.parametrize("top, expected", [
    (1, [2]), (20, [2]), (39, [2]), (40, [2, 4]), (60, [0, 2, 4]), (80, [0, 1, 2, 4]), (99, [0, 1, 2, 4]), (100, [0, 1, 2, 3, 4])])
def test_episodes_by_return_ties_to_the_earlier(top, expected, tmp_path):
    rows, data = kept(tmp_path / "x", LENGTHS, ENDS, REWARDS, top=top)
    assert rows == [(e, t) for e, n in enumerate(LENGTHS) for t in range(n) if e in expected]
    assert data.reward.tolist() == [r for (e, _), r in zip(
        [(e, t) for e, n in enumerate(LENGTHS) for t in range(n)], REWARDS) if e in expected]


def test_episodes_compete_by_their_undiscounted_return(tmp_path):
    rewards = [3, 0, 0, 0, 0, 4]  # discounted by 0.5 the first would win
    rows, _ = kept(tmp_path / "x", [3, 3], ["timeout", "terminal"], rewards, top=50, gamma=0.5)
    assert episodes(rows) == [1]


def test_the_share_is_one_of_episodes_not_of_steps(tmp_path):
    """The longest of ten episodes, which has half of all steps, is the best tenth."""
    lengths = [1] * 4 + [9] + [1] * 5
    rows, _ = kept(tmp_path / "x", lengths, ["terminal"] * 10, [1] * 18, top=10)
    assert rows == [(4, t) for t in range(9)]


def test_steps_by_discounted_return_to_go_within_their_episode(tmp_path):
    gamma, rows, to_go = 0.5, [(e, t) for e, n in enumerate(LENGTHS) for t in range(n)], {}
    for i, (e, t) in enumerate(rows):  # a sum that ends with the episode, cut off or not
        to_go[e, t] = sum(gamma ** (u - t) * REWARDS[i + u - t] for u in range(t, LENGTHS[e]))
    assert to_go[1, 0] == 0.5 and to_go[1, 2] == 2 and to_go[0, 1] == 1 and to_go[3, 0] == 2.5  # nothing leaks across
    order = sorted(rows, key=lambda row: -to_go[row])  # stable: a tie goes to the earlier
    assert to_go[1, 1] == to_go[0, 1] == 1
    for top in 10, 50, 60, 70, 75, 100:
        found, data = kept(tmp_path / f"x{top}", LENGTHS, ENDS, REWARDS, top=top, gamma=gamma, sliding=True)
        assert found == sorted(order[: max(1, 10 * top // 100)])
        assert data.reward.tolist() == [REWARDS[rows.index(row)] for row in found]


def test_less_than_a_batch_is_enough(tmp_path):
    """What is left is drawn from with replacement."""
    folder = made(tmp_path / "x", [20, 20], ["terminal", "timeout"])
    filtered_bc.main(small("filtered_bc", folder, tmp_path, top=50, batch_size=40))


@pytest.mark.parametrize("sliding", [False, True])
def test_the_best_tenth_is_near_the_best_action(sliding):
    """One step, reward -|a - best|^2, actions uniform: the mean of the best is what BC misses."""
    torch.manual_seed(0)
    n, best = 1000, torch.tensor([0.5, -0.4])
    obs, action = torch.rand(2, n, 2) * 2 - 1
    data = SimpleNamespace(obs=obs, action=action, reward=-(action - best).square().sum(-1), next_obs=obs,
                           terminated=torch.ones(n), episode=torch.arange(n))
    args = filtered_bc.Args(num_seeds=2, hidden_dim=32, batch_size=128, learning_rate=1e-3, device="cpu", sliding=sliding)
    filtered_bc.prepare(data, args)
    agent = filtered_bc.Agent(args, 2, 2, data)
    for _ in range(400):
        agent.update()
    found = agent.policy(torch.rand(2, 500, 2) * 2 - 1).mean(1).detach()
    torch.testing.assert_close(found, best.expand(2, 2), rtol=0, atol=0.1)
