"""What filtered BC keeps and what RvS is told, chosen by hand; and the tests that every file has to pass."""
import csv
import math
from types import SimpleNamespace

import filtered_bc
import gymnasium as gym
import numpy as np
import pytest
import rvs
import test_runs
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


# --- rvs ---
def prepared(folder, lengths, ends, rewards, **flags):
    made(folder, lengths, ends, rewards=np.array(rewards, np.float32), obs_dim=5)
    args = rvs.Args(dataset_id=str(folder), eval_episodes=0, batch_size=4, num_seeds=3, device="cpu", **flags)
    data = rvs.load(args)
    before = data.obs.clone()
    rvs.prepare(data, args)
    assert torch.equal(data.obs, before) and not data.mean.any() and (data.std == 1).all()
    return data, args


def test_average_reward_to_go_by_hand(tmp_path):
    """Over what the longest episode has left, also where an episode ended early; r_t is in it, the next episode's is not."""
    data, _ = prepared(tmp_path / "x", LENGTHS, ENDS, REWARDS)
    expected = [2 / 3, 1 / 2, 2 / 3, 2 / 2, 2 / 1, 5 / 3, 2 / 3, -1 / 2, 4 / 3, 0]
    np.testing.assert_allclose(data.rtg, expected, rtol=1e-6)
    assert data.last.tolist() == [1, 1, 4, 4, 4, 5, 7, 7, 9, 9]
    assert data.target.tolist() == pytest.approx([5 / 3])  # the best return over the steps of the longest episode


@pytest.mark.parametrize("asked", [6.0, 0.0, -3.0])
def test_the_return_asked_for_is_spread_over_the_longest_episode(asked, tmp_path):
    data, args = prepared(tmp_path / "x", LENGTHS, ENDS, REWARDS, target_return=asked)
    assert data.target.tolist() == [asked / 3]
    agent = rvs.Agent(args, 5, 2, data)
    assert agent.policy.target.shape == (3, 1, 1) and (agent.policy.target == asked / 3).all()
    rvs.setup(args)


def test_sums_over_much_data_do_not_lose_digits():
    """A sum to go is a difference of sums over all the data, which float32 would blur."""
    n, reward = 3000, 1e3 + torch.arange(3000.0) % 7 / 9
    data = SimpleNamespace(reward=reward, episode=(torch.arange(n) >= n - 2).long(), obs_dim=3)
    rvs.prepare(data, rvs.Args(device="cpu"))
    expected = [(reward[-2] + reward[-1]).item() / (n - 2), reward[-1].item() / (n - 3)]
    np.testing.assert_allclose(data.rtg[-2:], expected, rtol=1e-6)


def test_outcome_of_a_step_is_its_own_reward_to_go(tmp_path, monkeypatch):
    data, args = prepared(tmp_path / "x", LENGTHS, ENDS, REWARDS)
    i = torch.arange(12).view(3, 4) % 10
    monkeypatch.setattr(torch, "randint", lambda high, size, **_: i if (high, tuple(size)) == (10, (3, 4)) else None)
    x, a = rvs.outcomes(data, args)
    assert torch.equal(x, torch.cat([data.obs[i], data.rtg[i].unsqueeze(-1)], -1)) and torch.equal(a, data.action[i])


def test_goals_are_states_that_follow_in_the_same_episode(tmp_path, monkeypatch):
    """Observations hold (episode, step) as the achieved goal, then the desired one, which is replaced."""
    data, args = prepared(tmp_path / "x", LENGTHS, ENDS, REWARDS, condition="goal")
    assert data.target.shape == (0,)
    args.batch_size = 9000
    torch.manual_seed(0)
    x, a = rvs.outcomes(data, args)
    assert x.shape == (3, 9000, 5) and a.shape == (3, 9000, 2)
    (e, t), (goal_e, goal_t), rest = x[..., :2].long().unbind(-1), x[..., 2:4].long().unbind(-1), x[..., 4:]
    assert (goal_e == e).all() and (goal_t > t).all() and (rest == 0.1).all()
    assert torch.equal(a[..., 0], (t / 100).float())
    length = torch.tensor(LENGTHS)[e]
    assert (goal_t <= length).all()  # the last observation of an episode, after its last step, is one of them
    for step, choices in (0, {1, 2, 3}), (1, {2, 3}), (2, {3}):
        share = (goal_t[(e == 1) & (t == step)]).bincount(minlength=4) / ((e == 1) & (t == step)).sum()
        np.testing.assert_allclose(share, [(h in choices) / len(choices) for h in range(4)], atol=0.03)
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 1 - 2**-24))  # the largest that there is
    x, _ = rvs.outcomes(data, args)
    assert torch.equal(x[..., 3].long(), torch.tensor(LENGTHS)[x[..., 0].long()])


def test_rvs_loss_by_hand_and_against_torch():
    torch.manual_seed(0)
    S, B, D, A = 3, 5, 4, 2
    one = rvs.Actor(S, D - 1, A, 6, torch.zeros(1)).double()
    one.log_std.data = torch.linspace(-1, 1, S * A).view(S, 1, A).double()
    x, a = torch.randn(S, B, D).double(), 2 * torch.randn(S, B, A).double()
    mean, total = one.net(x).detach(), np.zeros(S)
    reference = torch.distributions.Normal(one.net(x), one.log_std.exp()).log_prob(a).sum(-1)
    torch.testing.assert_close(one.log_prob(x, a), reference)
    for k in range(S):
        for i in range(B):
            for j in range(A):
                std = math.exp(one.log_std[k, 0, j].item())
                total[k] += (0.5 * ((a[k, i, j] - mean[k, i, j]) / std) ** 2 + math.log(std * math.sqrt(2 * math.pi))) / B
    loss = rvs.actor_loss(one, (x, a))
    assert loss.shape == (S,)
    np.testing.assert_allclose(loss.detach(), total)


@torch.no_grad()
def test_rvs_acts_by_the_mean_for_its_target_in_the_box():
    one, s = rvs.Actor(3, 4, 2, 6, torch.tensor([0.7])), 3 * torch.randn(3, 50, 4)
    one.net[-1].weight.data *= 4
    expected = one.net(torch.cat([s, torch.full((3, 50, 1), 0.7)], -1))
    assert expected.abs().max() > 1 and torch.equal(one(s), expected.clamp(-1, 1))
    goal = rvs.Actor(3, 4, 2, 6, torch.zeros(0))
    assert torch.equal(goal(s), goal.net(s).clamp(-1, 1))


@pytest.mark.parametrize("asked", [0.6, -0.4])
def test_rvs_does_what_is_asked_for(asked):
    """One step, whose reward is the first entry of the action: that is what a return asks for."""
    torch.manual_seed(0)
    n, (obs, action) = 1000, torch.rand(2, 1000, 2) * 2 - 1
    data = SimpleNamespace(obs=obs, action=action, reward=action[:, 0], next_obs=obs, episode=torch.arange(n), obs_dim=2)
    args = rvs.Args(num_seeds=2, hidden_dim=64, batch_size=128, learning_rate=5e-3, device="cpu", target_return=asked)
    rvs.prepare(data, args)
    agent = rvs.Agent(args, 2, 2, data)
    for _ in range(400):
        agent.update()
    found = agent.policy(torch.rand(2, 500, 2) * 2 - 1).mean(1).detach()
    torch.testing.assert_close(found, torch.tensor([asked, 0.0]).expand(2, 2), rtol=0, atol=0.12)
    std = agent.actor.log_std.exp().squeeze(1)  # what the return says of the first entry, and not of the second
    assert std[:, 0].max() < 0.3 and (std[:, 1] - 3**-0.5).abs().max() < 0.1


class Reach(gym.Env):
    """A point moves by a tenth of the action; the reward is minus the distance to the goal."""
    place = gym.spaces.Box(-9, 9, (2,), np.float32)
    observation_space = gym.spaces.Dict({"observation": gym.spaces.Box(-9, 9, (1,), np.float32), "desired_goal": place,
                                         "achieved_goal": place})
    action_space = gym.spaces.Box(-1, 1, (2,))

    def look(self):
        return {"observation": np.ones(1, np.float32), "desired_goal": self.goal, "achieved_goal": self.at}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = np.zeros(2, np.float32)
        self.goal = self.np_random.choice([-1, 1], 2).astype(np.float32)
        return self.look(), {}

    def step(self, action):
        self.at = np.float32(self.at + 0.1 * np.clip(action, -1, 1))
        return self.look(), -float(np.linalg.norm(self.at - self.goal)), False, False, {}


gym.register("Reach-v0", Reach, max_episode_steps=12)


def test_rvs_reaches_goals_that_nobody_was_sent_to(tmp_path):
    """Straight walks in all directions, whose own desired goal means nothing; then four goals in the corners."""
    rng, n, T = np.random.default_rng(0), 120, 12
    action = np.repeat(rng.uniform(-1, 1, (n, 1, 2)), T, 1).astype(np.float32)
    at = np.concatenate([np.zeros((n, 1, 2)), 0.1 * action.cumsum(1)], 1).astype(np.float32)  # (n, T + 1, 2)
    obs = np.concatenate([at, np.full_like(at, 7), np.ones_like(at[..., :1])], -1)
    data = made(tmp_path / "x", [T] * n, ["timeout"] * n, observations=obs[:, :-1].reshape(-1, 5), actions=action.reshape(-1, 2),
                next_observations=obs[:, 1:].reshape(-1, 5), rewards=np.zeros(n * T, np.float32))
    flags = dict(env_id="Reach-v0", num_seeds=2, hidden_dim=64, batch_size=128, num_updates=600, eval_every=600, eval_episodes=8)
    returns = {}
    for condition in "goal", "reward":
        folder = rvs.main(small("rvs", data, tmp_path / condition, condition=condition, **flags))
        rows = list(csv.DictReader((folder / "eval.csv").open()))
        returns[condition] = [float(row["return_mean"]) for row in rows]
    still, straight = -12 * 2**0.5, -sum(2**0.5 * max(1 - 0.1 * t, 0) for t in range(1, 13))
    assert min(returns["goal"]) > 0.8 * straight + 0.2 * still > max(returns["reward"])


def test_observations_without_goals_are_refused_with_a_sentence(tmp_path):
    folder = made(tmp_path / "x", [30], ["timeout"])
    with pytest.raises(SystemExit) as stopped:
        rvs.main(small("rvs", folder, tmp_path, condition="goal"))
    assert stopped.value.code == "rvs: --condition goal: observations of 3 hold no two of --goal-dim 2"


@pytest.fixture
def as_others(monkeypatch):
    """The generic tests, with RvS's own batches: s with r as its outcome, a."""
    data_for = test_runs.data_for

    def fixed_batches(method, module, patch, batches):
        feed = iter([(torch.cat([s, r.unsqueeze(-1)], -1), a) for s, a, r, *_ in batches])
        patch.setattr(module, "outcomes", lambda data, args: next(feed))

    def with_target(module, S):
        data = data_for(module, S)
        data.target = torch.tensor([0.5])
        return data

    monkeypatch.setattr(test_runs, "OFFLINE", [*test_runs.OFFLINE, "rvs"])
    monkeypatch.setattr(test_runs, "fixed_batches", fixed_batches)
    monkeypatch.setattr(test_runs, "data_for", with_target)


def test_rvs_runs_like_the_others(hopper, whole, tmp_path, monkeypatch, capsys, as_others):
    test_runs.test_a_run_trains_and_writes_its_files("rvs", hopper, whole, tmp_path / "files", capsys)
    test_runs.test_shapes_are_what_their_comments_say("rvs", whole)
    test_runs.test_agent_k_is_not_agent_0_nor_seed_k("rvs", hopper, whole, tmp_path / "seeds", monkeypatch)
    test_runs.test_resume_equals_uninterrupted_to_the_bit("rvs", hopper, whole, tmp_path / "resume", monkeypatch)


@pytest.mark.parametrize("test", [test_runs.test_nan_in_seed_0_leaves_the_others_bit_identical,
                                  test_runs.test_seeds_together_equal_seeds_apart], ids=lambda test: test.__name__)
def test_rvs_seeds_are_apart(test, monkeypatch, as_others):
    test("rvs", monkeypatch)
