"""BEAR's grid world: the three constraints against search, and what they reach against closed forms."""
import csv
import signal
from itertools import product
from math import exp, log

import bear_gridworld as bear
import numpy as np
import pytest
import torch
from conftest import checkpoint, resume, same, stop_at

LEFT, RIGHT = 0, 1


def args_for(**flags):
    return bear.Args(device="cpu", **flags)


def solve(sweeps=300, **flags):
    """The agents after their sweeps: chance of G, value, promise (S,), and probabilities (S, n, A)."""
    args = args_for(**flags)
    task = bear.Line(args)
    agent = bear.Agent(args, task)
    for _ in range(sweeps):
        losses = agent.update()
    policy = bear.RawPolicy(agent.policy, args.num_seeds, task)
    rows = bear.evaluate(policy, task.spec, args.gamma, task.reference)
    return rows[:, 0], rows[:, 2], losses["q_start"].numpy(), policy(torch.arange(len(task.mu))).numpy()


def ruin(p, n):
    """Chance of n steps up before one step down, if one is up with probability p."""
    return (1 - (1 - p) / p) / (1 - ((1 - p) / p) ** (n + 1)) if p != 0.5 else 1 / (n + 1)


# --- constraints ---
def tables(S=3, n=5, A=4):
    torch.manual_seed(0)
    mu = torch.rand(n, A, dtype=torch.float64) ** 2
    mu[0, 0] = 0
    return torch.randn(S, n, A, dtype=torch.float64), mu / mu.sum(-1, keepdim=True)


def test_support_is_the_best_action_that_mu_takes_often_enough():
    Q, mu = tables()
    Q[1, 2], third = torch.arange(4), mu[2].sort().values[2]
    mu[2] = mu[2].sort(descending=True).values  # the better the rarer
    eps = torch.stack([0 * third, third, 0 * third + 0.99]).unsqueeze(-1)  # (S, 1), one as large as a probability
    pi = bear.support(Q, mu, eps)
    assert pi.shape == Q.shape and (pi.sum(-1) == 1).all()
    for k, s in product(range(3), range(5)):
        allowed = [a for a in range(4) if mu[s, a] >= eps[k, 0]] or [int(mu[s].argmax())]
        assert int(pi[k, s].argmax()) == max(allowed, key=lambda a: Q[k, s, a])
    assert int(pi[1, 2].argmax()) == 1  # of the two likeliest the second is better
    assert torch.equal(pi[2].argmax(-1), mu.argmax(-1)) and torch.equal(pi[0].argmax(-1), Q[0].argmax(-1))


def plain_kl(p, m):
    return sum(x * log(x / y) for x, y in zip(p, m) if x > 0)


def test_penalty_is_where_its_objective_is_largest():
    Q, mu = tables()
    alpha = torch.tensor([[0.2], [1.0], [30.0]], dtype=torch.float64)
    pi, rng = bear.penalty(Q, mu, alpha), np.random.default_rng(0)
    divergence = bear.divergence(pi, mu)
    assert divergence.shape == (3, 5) and pi[:, 0, 0].tolist() == [0, 0, 0]
    for k, s in product(range(3), range(5)):
        p, m, q = pi[k, s].numpy(), mu[s].numpy(), Q[k, s].numpy()
        assert float(divergence[k, s]) == pytest.approx(plain_kl(p, m))
        best = p @ q - float(alpha[k, 0]) * plain_kl(p, m)
        for _ in range(200):
            other = p * np.exp(rng.normal(size=4) * rng.choice([0.01, 0.3]))
            other /= other.sum()
            assert other @ q - float(alpha[k, 0]) * plain_kl(other, m) <= best + 1e-12


def test_kl_is_the_best_policy_within_its_bound():
    """Against a fine grid of policies with two actions, and the greedy one where it is within the bound."""
    torch.manual_seed(1)
    Q, mu = torch.randn(3, 5, 2, dtype=torch.float64), torch.rand(5, 1, dtype=torch.float64) * 0.8 + 0.1
    mu, eps = torch.cat([mu, 1 - mu], -1), torch.tensor([[0.01], [0.5], [5.0]], dtype=torch.float64)
    pi = bear.kl(Q, mu, eps)
    assert (bear.divergence(pi, mu) <= eps + 1e-9).all()
    x = np.linspace(0, 1, 100_001)
    for k, s in product(range(3), range(5)):
        m, q = mu[s].numpy(), Q[k, s].numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            divergence = np.nan_to_num(x * np.log(x / m[0])) + np.nan_to_num((1 - x) * np.log((1 - x) / m[1]))
        value = np.where(divergence <= float(eps[k, 0]), x * q[0] + (1 - x) * q[1], -np.inf)
        assert float(pi[k, s, 0]) == pytest.approx(x[value.argmax()], abs=2e-5)
    torch.testing.assert_close(pi[2], bear.support(Q, mu, 0 * eps)[2], atol=1e-12, rtol=0)


# --- the grid world ---
def test_the_grid_world():
    task = bear.Line(args_for(distance=3))
    for s, a in product(range(7), range(2)):
        x = s if s in (0, 6) else s + 2 * a - 1
        assert task.spec.prob[s, a].nonzero().tolist() == [[x]] and task.spec.prob[s, a, x] == 1
        assert task.spec.reward[s, a].tolist() == [float((s, a, y) == (5, 1, 6)) for y in range(7)]
    assert task.spec.terminal.tolist() == [s in (0, 6) for s in range(7)]
    assert task.spec.start.tolist() == [0, 0, 0, 1, 0, 0, 0]
    assert task.mu[1:6].tolist() == [[1, 0], [1, 0], *[[pytest.approx(0.9), 0.1]] * 3]


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_to_copy_mu_is_to_reach_g_ever_less_often(n):
    flags = dict(distance=n, smoothing=0.0, num_seeds=1)
    reach, value, promise, pi = solve(constraint="penalty", tightest=1e9, **flags)
    assert reach[0] == pytest.approx(8 / (9 ** (n + 1) - 1), rel=1e-6)
    assert ruin(0.1, n) == pytest.approx(reach[0], rel=1e-6)
    assert promise == pytest.approx(value, rel=1e-6)
    table = bear.Line(args_for(distance=n))
    assert bear.returns(table.spec, table.mu.unsqueeze(0), 0.99)[0].item() == pytest.approx(reach[0], rel=1e-6)
    reach, *_ = solve(constraint="kl", tightest=1e-11, **flags)
    assert reach[0] == pytest.approx(8 / (9 ** (n + 1) - 1), rel=1e-3)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_support_constraint_reaches_g_for_sure(n):
    """Where it allows what mu does with a chance of 0.1, but not what the estimate of mu alone takes for possible."""
    reach, value, promise, pi = solve(constraint="support", tightest=0.1, loosest=0.006, num_seeds=4, distance=n)
    assert reach.tolist() == [1] * 4
    assert value == pytest.approx([0.99 ** (n - 1)] * 4) and promise == pytest.approx(value)
    assert (pi[:, n : 2 * n, RIGHT] == 1).all() and (pi[:, 1:n, LEFT] == 1).all()


def test_a_support_constraint_that_is_too_tight_or_too_loose():
    reach, value, promise, _ = solve(constraint="support", tightest=0.11, num_seeds=1)
    assert reach[0] == value[0] == promise[0] == 0
    reach, value, promise, pi = solve(constraint="support", tightest=0.004, num_seeds=1)
    assert reach[0] == 0 and pi[0, 5, LEFT] == 1 and pi[0, 4, RIGHT] == 1 and promise[0] == pytest.approx(2 * 0.99)
    reach, value, promise, _ = solve(constraint="support", tightest=0.004, num_seeds=1, ood_value=0.0)
    assert reach[0] == 1 and promise[0] == pytest.approx(value[0])  # the same without an error to go after


@pytest.mark.parametrize("eps", [0.01, 0.3, 0.7, 2.0, 2.4])
def test_a_bound_on_the_divergence_is_a_bound_on_the_chance(eps):
    """Without smoothing nothing leads right on the left, and pi(right) is the largest x with
    KL((1 - x, x), mu) <= eps."""
    low, high = 0.1, 1 - 1e-15
    for _ in range(200):
        x = (low + high) / 2
        low, high = (x, high) if plain_kl((1 - x, x), (0.9, 0.1)) <= eps else (low, x)
    reach, value, promise, pi = solve(constraint="kl", tightest=eps, smoothing=0.0, num_seeds=1, sweeps=150)
    assert pi[0, 5:10, RIGHT] == pytest.approx([low] * 5, abs=1e-6) and (pi[0, 1:5, RIGHT] == 0).all()
    assert reach[0] == pytest.approx(ruin(low, 5), rel=1e-5) and promise[0] == pytest.approx(value[0], rel=1e-5)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 3.0])
def test_penalty_one_step_from_g(alpha):
    reach, *_ = solve(constraint="penalty", tightest=alpha, smoothing=0.0, num_seeds=1, distance=1)
    assert reach[0] == pytest.approx(0.1 * exp(1 / alpha) / (0.1 * exp(1 / alpha) + 0.9), rel=1e-9)


def test_no_weight_and_no_bound_on_the_distribution_does_what_the_support_does():
    """An error of 2 left of S: what is tight goes left for want of freedom, what is loose because of the error."""
    for constraint, tightest, loosest in ("kl", 0.001, 10), ("penalty", 10, 0.001):
        flags = dict(constraint=constraint, tightest=tightest, loosest=loosest)
        reach, value, promise, pi = solve(**flags, num_seeds=13, sweeps=120)
        assert reach.max() < 0.01 and reach[0] < 1e-4 and reach[-1] < 1e-4
        assert pi[-1, 5, LEFT] > 0.99 and promise[-1] > 1.9 and (promise > value).all()
    reach, *_ = solve(constraint="support", tightest=0.1, num_seeds=1)
    assert reach[0] == 1


def test_a_small_world_or_no_error_leaves_room_for_the_distribution():
    reach, *_ = solve(constraint="kl", tightest=1.47, num_seeds=1, distance=2, sweeps=60)
    assert 0.85 < reach[0] < 0.9
    for constraint, loose in ("kl", 5.0), ("penalty", 0.003):
        reach, value, promise, _ = solve(constraint=constraint, tightest=loose, num_seeds=1, ood_value=0.0, sweeps=120)
        assert reach[0] > 0.999 and promise[0] == pytest.approx(value[0], abs=1e-3)


# --- updates ---
def test_a_sweep_equals_loops_and_leaves_what_the_data_lack():
    args = args_for(num_seeds=3, distance=2, constraint="penalty", tightest=1.0, loosest=0.1, smoothing=0.1, gamma=0.9)
    task = bear.Line(args)
    agent = bear.Agent(args, task)
    for _ in range(3):
        agent.update()
    before, strength = agent.Q.clone(), [1.0, 0.1**0.5, 0.1]
    losses = agent.update()
    assert {name: x.shape for name, x in losses.items()} == {"bellman_error": (3,), "q_start": (3,)}

    def v_of(Q, k, s):
        m = [0.9 * float(task.mu[s, a]) + 0.05 for a in range(2)]
        w = [m[a] * exp(float(Q[k, s, a]) / strength[k]) for a in range(2)]
        return sum(w[a] / sum(w) * float(Q[k, s, a]) for a in range(2))

    for k in range(3):
        errors = []
        for s, a in product(range(1, 4), range(2)):
            x = s + 2 * a - 1
            y = float(x == 4) + 0.9 * (v_of(before, k, x) if 0 < x < 4 else 0)
            if task.mu[s, a] > 0:
                errors.append(abs(y - float(before[k, s, a])))
                assert float(agent.Q[k, s, a]) == pytest.approx(y)
            else:
                assert (s, a) == (1, 1) and agent.Q[k, s, a] == 2
        assert float(losses["bellman_error"][k]) == pytest.approx(max(errors)) and max(errors) > 1e-3
        assert float(losses["q_start"][k]) == pytest.approx(v_of(agent.Q, k, 2))
    assert (agent.Q[:, [0, 4]] == 0).all()


@pytest.mark.parametrize("constraint", ["support", "kl", "penalty"])
def test_nan_in_agent_0_leaves_the_others_and_agents_together_equal_agents_apart(constraint):
    flags = dict(constraint=constraint, tightest=2.0, loosest=0.02)
    found = []
    for poison in False, True:
        args = args_for(num_seeds=3, **flags)
        agent = bear.Agent(args, bear.Line(args))
        agent.Q[0] = torch.nan if poison else agent.Q[0]
        losses = [agent.update() for _ in range(20)][-1]
        found.append((agent.Q, *losses.values()))
    assert all(torch.equal(x[1:], y[1:]) for x, y in zip(*found))
    for k, strength in enumerate([2.0, 0.2, 0.02]):
        args = args_for(constraint=constraint, num_seeds=1, tightest=strength)
        agent = bear.Agent(args, bear.Line(args))
        for _ in range(20):
            agent.update()
        torch.testing.assert_close(agent.Q[0], found[0][0][k])


# --- runs ---
def small(out, **flags):
    return args_for(out_dir=str(out), **{**dict(num_updates=40, eval_every=20, distance=3, num_seeds=3), **flags})


@pytest.mark.parametrize("constraint", ["support", "kl", "penalty"])
def test_a_run_writes_its_files_and_its_policy(constraint, tmp_path):
    folder = bear.main(small(tmp_path, constraint=constraint))
    assert {path.name for path in folder.iterdir()} == {
        "args.json", "run.json", "eval.csv", "losses.csv", "checkpoint.pt", "policy.pt2", "table.csv"}
    rows, table = (list(csv.DictReader((folder / name).open())) for name in ("eval.csv", "table.csv"))
    assert [(row["update"], row["seed"]) for row in rows] == [(u, str(k)) for u in ("20", "40") for k in range(3)]
    pi = torch.export.load(folder / "policy.pt2").module()(torch.arange(7))
    assert pi.shape == (3, 7, 2)
    names = [f"right_{x:+d}" for x in range(-2, 3)]
    assert list(table[0]) == ["agent", "strength", "reaches_g", "value", "q_start", *names]
    for k, (row, line) in enumerate(zip(rows[3:], table)):
        assert float(line["strength"]) == pytest.approx(0.5 * 0.002 ** (k / 2), rel=1e-5)
        assert float(line["reaches_g"]) == pytest.approx(float(row["return_mean"]), abs=1e-4)
        assert float(line["value"]) == pytest.approx(float(row["discounted_return_mean"]), abs=1e-4)
        assert float(row["score"]) == pytest.approx(100 * float(row["return_mean"]), abs=0.01)
        assert [float(line[name]) for name in names] == pytest.approx(pi[k, 1:6, 1].tolist(), rel=1e-5, abs=1e-12)
    assert all(x.shape[0] in (3, 7) for x in checkpoint(folder)["agent"].values())


def test_resume_equals_uninterrupted_to_the_bit(tmp_path, monkeypatch):
    whole = bear.main(small(tmp_path / "a", constraint="kl"))
    stop_at(bear, 26, monkeypatch, signal.SIGTERM)
    with pytest.raises(SystemExit):
        bear.main(small(tmp_path / "b", constraint="kl"))
    monkeypatch.undo()
    (folder,) = (tmp_path / "b").iterdir()
    assert checkpoint(folder)["update"] == 26
    resume(bear, folder)
    a, b = checkpoint(whole), checkpoint(folder)
    assert all(same(a[part], b[part]) for part in ("update", "agent", "moments", "rng"))
    for name in "eval.csv", "losses.csv", "table.csv":
        assert (whole / name).read_text() == (folder / name).read_text()


@pytest.mark.parametrize("flags, word", [
    ({"right": 1.5}, "--right"), ({"smoothing": -0.1}, "--smoothing"), ({"tightest": 0.0}, "--tightest"),
    ({"loosest": 0.0}, "--loosest"), ({"distance": 0}, "--distance"), ({"gamma": 2.0}, "--gamma")])
def test_bad_input_is_one_sentence(flags, word, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        bear.main(args_for(out_dir=str(tmp_path), **flags))
    message = stopped.value.code
    assert message.startswith("bear_gridworld: --") and word in message and "\n" not in message
    assert not list(tmp_path.iterdir())
