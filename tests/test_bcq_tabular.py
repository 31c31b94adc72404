"""BCQ on finite MDPs: the update against loops, the deterministic case exactly, the stochastic case by enumeration."""
import csv
from itertools import product

import bcq_tabular as bcq
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import checkpoint, resume, same, stop_at


def args_for(**flags):
    return bcq.Args(device="cpu", **flags)


def learn(sweeps=300, **flags):
    """task, agent and the last losses."""
    args = args_for(**flags)
    task = bcq.MDP(args)
    agent = bcq.Agent(args, bcq.draw(task, args))
    for _ in range(sweeps):
        losses = agent.update()
    return task, agent, losses


def policy_of(task, agent):
    return bcq.greedy(bcq.RawPolicy(agent.policy, agent.args.num_seeds, task), task.spec)


def random_batch(S=3, n=5, A=2):
    torch.manual_seed(1)
    count = torch.randint(0, 3, (S, n, A, n), dtype=torch.float64) * (torch.rand(S, n, A, 1) < 0.6)
    count[:, 4] = 0  # no data in state 4
    start = torch.zeros(S, n, dtype=torch.float64)
    start[:, 0], start[:, 1] = 1, 3
    return count, torch.randn(n, A, n, dtype=torch.float64) - 1, start


def restricted_value_iteration(count, reward, gamma, sweeps):
    """Value iteration in M_B, in dictionaries of what the batch holds, for one seed."""
    outcomes = {}
    for s, a, x in count.nonzero().tolist():
        outcomes.setdefault((s, a), []).append((x, float(count[s, a, x] / count[s, a].sum()), float(reward[s, a, x])))
    Q = dict.fromkeys(outcomes, 0.0)
    for _ in range(sweeps):
        v = {}
        for (s, _), q in Q.items():
            v[s] = max(q, v.get(s, q))
        Q = {key: sum(p * (r + gamma * v.get(x, 0.0)) for x, p, r in found) for key, found in outcomes.items()}
    return Q


def test_batch_mdp_is_counted():
    count, reward, start = random_batch()
    batch = bcq.Batch(count, reward, start)
    for k, s, a in np.ndindex(3, 5, 2):
        total = count[k, s, a].sum()
        assert bool(batch.mask[k, s, a]) == bool(total > 0)
        expected = sum(count[k, s, a, x] / total * reward[s, a, x] for x in range(5)) if total else 0
        assert float(batch.reward[k, s, a]) == pytest.approx(float(expected), abs=1e-12)
        assert float(batch.prob[k, s, a].sum()) == pytest.approx(float(total > 0))
    assert batch.start[0].tolist() == [0.25, 0.75, 0, 0, 0]


def test_update_equals_loops_and_leaves_what_the_batch_lacks():
    count, reward, start = random_batch()
    args = args_for(num_seeds=3, learning_rate=0.3, gamma=0.9)
    agent = bcq.Agent(args, bcq.Batch(count, reward, start))
    agent.policy.Q.copy_(torch.randn(3, 5, 2, dtype=torch.float64))
    agent.policy.Q[~agent.batch.mask] = 1e6  # nothing may bootstrap from here
    before, mask = agent.policy.Q.clone(), agent.batch.mask
    losses = agent.update()
    assert {name: x.shape for name, x in losses.items()} == {"bellman_error": (3,), "q_start": (3,)}
    for k in range(3):
        v = [max((float(before[k, x, b]) for b in range(2) if mask[k, x, b]), default=0.0) for x in range(5)]
        errors = []
        for s, a in np.ndindex(5, 2):
            if mask[k, s, a]:
                y = sum(float(batch_p) * (float(reward[s, a, x]) + 0.9 * v[x])
                        for x, batch_p in enumerate(count[k, s, a] / count[k, s, a].sum()))
                errors.append(abs(y - float(before[k, s, a])))
                assert float(agent.policy.Q[k, s, a]) == pytest.approx(0.7 * float(before[k, s, a]) + 0.3 * y)
            else:
                assert agent.policy.Q[k, s, a] == 1e6
        assert float(losses["bellman_error"][k]) == pytest.approx(max(errors))
    assert bcq.value(agent.policy.Q, mask)[:, 4].tolist() == [0, 0, 0]


def test_policy_stays_in_the_batch_and_falls_back_on_action_0():
    count, reward, start = random_batch()
    agent = bcq.Agent(args_for(num_seeds=3), bcq.Batch(count, reward, start))  # rewards are negative: 0 would be best
    for _ in range(30):
        agent.update()
    pi = agent.policy(torch.arange(5).expand(3, 5))
    assert pi.shape == (3, 5) and pi.dtype == torch.long
    known = agent.batch.mask.any(-1)
    assert agent.batch.mask.gather(2, pi.unsqueeze(-1)).squeeze(-1)[known].all() and (pi[~known] == 0).all()
    assert (agent.policy.Q[agent.batch.mask] < 0).any() and not known[:, 4].any()


@pytest.mark.parametrize("learning_rate", [1.0, 0.5])
@pytest.mark.parametrize("env_id", ["lattice", "FrozenLake-v1", "FrozenLake8x8-v1"])
def test_deterministic_case_equals_value_iteration_in_the_restricted_mdp(env_id, learning_rate):
    task, agent, losses = learn(150, env_id=env_id, num_seeds=3, num_episodes=8, learning_rate=learning_rate)
    for k in range(3):
        expected = restricted_value_iteration(agent.batch.count[k], task.spec.reward, 0.99, 60)
        for s, a in np.ndindex(agent.batch.mask.shape[1:]):
            if agent.batch.mask[k, s, a]:
                assert abs(float(agent.policy.Q[k, s, a]) - expected[s, a]) < 1e-6
            else:
                assert agent.policy.Q[k, s, a] == 0 and (s, a) not in expected
    pi = policy_of(task, agent)
    torch.testing.assert_close(bcq.returns(task.spec, pi, 0.99)[2], losses["q_start"], rtol=0, atol=1e-6)
    assert bcq.visits(task.spec, pi, agent.batch.mask)[1].tolist() == [0, 0, 0]


def test_stochastic_case_equals_value_iteration_in_the_estimated_mdp():
    task, agent, _ = learn(1000, env_id="FrozenLake-v1", slip=2 / 3, num_episodes=30)
    expected = restricted_value_iteration(agent.batch.count[0], task.spec.reward, 0.99, 700)
    assert all(abs(float(agent.policy.Q[0, s, a]) - q) < 1e-6 for (s, a), q in expected.items())


def test_deterministic_policy_is_the_best_of_all_paths_in_the_batch():
    for seed in range(5):
        task, agent, _ = learn(10, epsilon=1.0, num_episodes=4, seed=seed)
        best = -1
        for actions in product((0, 1), repeat=5):
            s = 0
            for t, a in enumerate(actions):
                if not agent.batch.mask[0, s, a]:
                    break
                s = s + t + 1 + a
            else:
                best = max(best, bcq.ENDS[sum(actions)])
        mean, std, discounted, length = bcq.returns(task.spec, policy_of(task, agent), 0.99)
        assert float(mean) == best and float(discounted) == pytest.approx(0.99**4 * best)
        assert (float(std), float(length)) == (0, 5)


def test_stochastic_policy_is_carried_away_as_often_as_enumeration_says():
    some = []
    for seed in range(4):
        task, agent, _ = learn(10, slip=0.2, epsilon=1.0, num_episodes=5, seed=seed)
        pi, known = agent.policy(torch.arange(21)[None])[0], agent.batch.mask[0].any(-1)
        carried, mean, square, visits = 0.0, 0.0, 0.0, np.zeros(21)
        for slips in product((0, 1), repeat=5):
            p, s, lost = 1.0, 0, False
            path = []
            for t, slip in enumerate(slips):
                path.append(s)
                lost |= not known[s]
                p *= 0.2 if slip else 0.8
                s = s + t + 1 + (int(pi[s]) ^ slip)
            visits[path] += p
            carried, mean, square = carried + p * lost, mean + p * bcq.ENDS[s - 15], square + p * bcq.ENDS[s - 15] ** 2
        found, share = bcq.visits(task.spec, policy_of(task, agent), agent.batch.mask)
        returns = bcq.returns(task.spec, policy_of(task, agent), 0.99)[:, 0].tolist()
        assert float(share) == pytest.approx(carried) and found[0].numpy() == pytest.approx(visits)
        assert returns == pytest.approx([mean, (square - mean**2) ** 0.5, 0.99**4 * mean, 5])
        some.append(carried)
    assert min(some) >= 0 and max(some) > 0.05


def test_returns_equal_the_sum_over_all_paths():
    """Random policies in a random MDP whose state 3 is terminal."""
    torch.manual_seed(2)
    prob, reward = torch.rand(4, 2, 4, dtype=torch.float64), torch.randn(4, 2, 4, dtype=torch.float64)
    prob[3], reward[3] = torch.eye(4, dtype=torch.float64)[3], 0
    terminal, start = torch.arange(4) == 3, torch.tensor([0.5, 0.3, 0.2, 0], dtype=torch.float64)
    table = bcq.Table(prob / prob.sum(-1, keepdim=True), reward, reward**2, terminal, start, 3)
    pi = torch.rand(3, 4, 2, dtype=torch.float64)
    pi /= pi.sum(-1, keepdim=True)
    returns = bcq.returns(table, pi, 0.9)
    assert returns.shape == (4, 3)
    for k in range(3):
        total = np.zeros(4)
        for states in product(range(4), repeat=4):
            for actions in product(range(2), repeat=3):
                p, rewards = float(start[states[0]]), []
                for s, a, x in zip(states, actions, states[1:]):
                    p *= float(pi[k, s, a] * table.prob[s, a, x])
                    rewards.append(float(reward[s, a, x]))
                discounted = sum(0.9**t * r for t, r in enumerate(rewards))
                total += p * np.array([sum(rewards), sum(rewards) ** 2, discounted, sum(s != 3 for s in states[:3])])
        mean, square, discounted, length = total
        assert returns[:, k].tolist() == pytest.approx([mean, (square - mean**2) ** 0.5, discounted, length])


def test_returns_where_a_step_has_several_rewards():
    """In Gymnasium's CliffWalkingSlippery a step into the cliff leads back to the start at -100, a slip there at -1."""
    env = gym.make("CliffWalkingSlippery-v1").unwrapped
    assert any(len({(x, r) for _, x, r, _ in steps}) > len({x for _, x, _, _ in steps})
               for actions in env.P.values() for steps in actions.values())
    task = bcq.MDP(args_for(env_id="CliffWalkingSlippery-v1"))
    paths = [(float(p), s, 0.0) for s, p in enumerate(env.initial_state_distrib) if p]
    for _ in range(3):
        paths = [(p * q / 4, x, total + r) for p, s, total in paths for a in range(4) for q, x, r, _ in env.P[s][a]]
    mean, square = (sum(p * total**i for p, _, total in paths) for i in (1, 2))
    uniform = torch.full((1, env.observation_space.n, 4), 0.25, dtype=torch.float64)
    found = bcq.returns(task.spec._replace(horizon=3), uniform, 0.99)[:, 0]
    assert found[:2].tolist() == pytest.approx([mean, (square - mean**2) ** 0.5])


def test_the_more_data_the_less_is_the_policy_carried_away_and_the_less_is_promised_in_vain():
    found = []
    for episodes in 4, 400:
        task, agent, losses = learn(10, slip=0.2, epsilon=1.0, num_episodes=episodes, num_seeds=20)
        pi = policy_of(task, agent)
        carried = bcq.visits(task.spec, pi, agent.batch.mask)[1].mean()
        vain = (losses["q_start"] - bcq.returns(task.spec, pi, 0.99)[2]).mean()
        found.append((float(carried), float(vain)))
    (few, vain), (none, less) = found
    assert few > 0.2 and none < 0.01 and vain > 1 > 0.5 > abs(less)


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "FrozenLake8x8-v1"])
@pytest.mark.parametrize("slippery", [False, True])
def test_table_is_gymnasiums(env_id, slippery):
    spec = bcq.MDP(args_for(env_id=env_id, slip=2 / 3 if slippery else 0.0)).spec
    env = gym.make(env_id, is_slippery=slippery)
    for s, actions in env.unwrapped.P.items():
        for a, outcomes in actions.items():
            prob, reward = np.zeros(len(spec.start)), np.zeros(len(spec.start))
            for p, x, r, ended in outcomes:
                prob[x] += p
                reward[x] = r
                assert ended == bool(spec.terminal[x])
            assert spec.prob[s, a].numpy() == pytest.approx(prob, abs=1e-12)
            assert spec.reward[s, a].numpy() == pytest.approx(reward, abs=1e-12)
    assert spec.horizon == env.spec.max_episode_steps and spec.start[0] == 1


def test_other_environments_with_a_table_work():
    task, agent, losses = learn(50, env_id="CliffWalking-v1", num_episodes=5, epsilon=0.1)
    assert task.reference[1] == pytest.approx(-13) and task.spec.horizon == 1000
    assert float(bcq.returns(task.spec, policy_of(task, agent), 0.99)[0]) <= -13 and losses["q_start"] < 0


def test_evaluation_by_expectation_is_what_episodes_give():
    task, agent, _ = learn(300, env_id="FrozenLake-v1", slip=2 / 3, num_episodes=300)
    mean, std, discounted, length = bcq.returns(task.spec, policy_of(task, agent), 0.99)[:, 0].tolist()
    pi, env, played = agent.policy(torch.arange(16)[None])[0].tolist(), gym.make("FrozenLake-v1", is_slippery=True), []
    for episode in range(400):
        s, _ = env.reset(seed=episode)
        t, total, ended = 0, 0.0, False
        while not ended:
            s, r, terminated, truncated, _ = env.step(pi[s])
            t, total, ended = t + 1, total + r, terminated or truncated
        played.append((total, total * 0.99 ** (t - 1), t))
    played = np.array(played)
    error = 4 * played.std(0) / 20
    assert (np.abs(played.mean(0) - [mean, discounted, length]) < error).all()
    assert std == pytest.approx((mean * (1 - mean)) ** 0.5)


def test_reference_is_the_uniform_and_the_optimal_policy():
    assert bcq.MDP(args_for()).reference == pytest.approx((np.dot([1, 5, 10, 10, 5, 1], bcq.ENDS) / 32, max(bcq.ENDS)))
    assert all(np.isnan(bcq.MDP(args_for(slip=0.5)).reference))  # no action matters
    assert bcq.MDP(args_for(env_id="FrozenLake-v1", slip=2 / 3)).reference[1] == pytest.approx(0.74, abs=0.01)


def test_each_seed_has_a_batch_of_its_own_that_does_not_depend_on_the_others():
    flags = dict(env_id="FrozenLake-v1", slip=0.3, num_episodes=5)
    three, one = learn(40, num_seeds=3, **flags), learn(40, num_seeds=1, **flags)
    assert torch.equal(three[1].batch.count[:1], one[1].batch.count)
    torch.testing.assert_close(three[1].policy.Q[:1], one[1].policy.Q)
    assert not torch.equal(three[1].batch.count[0], three[1].batch.count[1])
    assert not torch.equal(learn(1, seed=1, **flags)[1].batch.count[0], three[1].batch.count[1])
    count = three[1].batch.count
    assert (count[:, 0].sum((-2, -1)) >= 5).all() and count[:, three[0].spec.terminal].sum() == 0


def test_nan_in_seed_0_leaves_the_others_bit_identical():
    found = []
    for poison in False, True:
        agent = bcq.Agent(args_for(num_seeds=3), bcq.Batch(*random_batch()))
        agent.policy.Q[0] = torch.nan if poison else 0
        for _ in range(6):
            losses = agent.update()
        found.append((agent.policy.Q, *losses.values()))
    assert all(torch.equal(x[1:], y[1:]) for x, y in zip(*found)) and found[1][0][0].isnan().any()


def small(out, **flags):
    return args_for(**{**dict(num_updates=40, eval_every=20, out_dir=str(out), slip=0.2, num_episodes=5), **flags})


def test_a_run_writes_its_files_and_its_policy(tmp_path):
    folder = bcq.main(small(tmp_path, num_seeds=3, num_updates=1020, eval_every=510))
    assert {path.name for path in folder.iterdir()} == {
        "args.json", "run.json", "eval.csv", "losses.csv", "checkpoint.pt", "policy.pt2", "table.csv"}
    rows = list(csv.DictReader((folder / "eval.csv").open()))
    assert [(row["update"], row["seed"]) for row in rows] == [(u, str(k)) for u in ("510", "1020") for k in range(3)]
    low, high = bcq.MDP(args_for(slip=0.2)).reference
    for row in rows:
        assert float(row["score"]) == pytest.approx(100 * (float(row["return_mean"]) - low) / (high - low), abs=1e-2)
    names = [(row["update"], row["seed"], row["name"]) for row in csv.DictReader((folder / "losses.csv").open())]
    assert names == [(u, str(k), name) for u in ("1000", "1020") for k in range(3)
                     for name in ("bellman_error", "q_start", "carried")]
    state, policy = checkpoint(folder)["agent"], torch.export.load(folder / "policy.pt2").module()
    assert all(x.shape[0] == 3 for x in state.values()) and policy(torch.arange(7)).shape == (3, 7)
    Q, mask = state["policy.Q"], state["policy.mask"]
    pi = policy(torch.arange(21))
    table = list(csv.DictReader((folder / "table.csv").open()))
    assert [(int(row["state"]), int(row["action"])) for row in table] == list(np.ndindex(21, 2))
    for row in table:
        s, a = int(row["state"]), int(row["action"])
        assert float(row["q"]) == pytest.approx(float(Q[0, s, a]), abs=1e-5) and (row["count"] != "0") == mask[0, s, a]
        assert (row["greedy"] == "1") == (pi[0, s] == a) and (float(row["visits"]) == 1) == (s == 0)


def test_resume_equals_uninterrupted_to_the_bit(tmp_path, monkeypatch):
    whole = bcq.main(small(tmp_path / "a", num_seeds=2, learning_rate=0.1))
    stop_at(bcq, 26, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        bcq.main(small(tmp_path / "b", num_seeds=2, learning_rate=0.1))
    monkeypatch.undo()
    (folder,) = (tmp_path / "b").iterdir()
    assert stopped.value.code == f"bcq_tabular: stopped at update 26; go on with --resume {folder}"
    assert checkpoint(folder)["update"] == 26 and not (folder / "table.csv").exists()
    resume(bcq, folder)
    a, b = checkpoint(whole), checkpoint(folder)
    assert all(same(a[part], b[part]) for part in ("update", "agent", "moments", "rng"))
    for name in "eval.csv", "losses.csv", "table.csv":
        assert (whole / name).read_text() == (folder / name).read_text()


@pytest.mark.parametrize("flags, word", [
    ({"env_id": "Hopper-v5"}, "transition table"), ({"env_id": "nonsense"}, "FrozenLake-v1"), ({"slip": 1.5}, "--slip"),
    ({"epsilon": -0.1}, "--epsilon"), ({"learning_rate": 2.0}, "--learning-rate"),
    ({"num_episodes": 0}, "--num-episodes")])
def test_bad_input_is_one_sentence(flags, word, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        bcq.main(args_for(out_dir=str(tmp_path), **flags))
    message = stopped.value.code
    assert message.startswith("bcq_tabular: --") and word in message and "\n" not in message
    assert not list(tmp_path.iterdir())
