"""Off-policy evaluation: estimators against loops and against the sum over all episodes, the cases that have gone wrong
elsewhere, finite MDPs, recorded sets, and runs."""
import csv
import signal
from dataclasses import replace
from itertools import product

import gymnasium as gym
import minari
import numpy as np
import ope
import pytest
import torch
from conftest import checkpoint, resume, same, stop_at
from minari.data_collector import EpisodeBuffer

S, T, E, N, A = 3, 4, 5, 6, 2
NAMES = "is", "wis", "pdis", "wpdis", "dr", "dm"
double = dict(dtype=torch.float64)


def args_for(**flags):
    return ope.Args(device="cpu", **flags)


def policy_for(*shape):
    p = torch.rand(*shape, **double) + 0.2
    return p / p.sum(-1, keepdim=True)


def random_log():
    """Episodes of 1 to T steps in tables of their own; mu is not pi, and pi never takes action 0 in state 1."""
    torch.manual_seed(0)
    length = torch.randint(1, T + 1, (S, 1, E))
    alive = torch.arange(T).view(-1, 1) < length
    states, a = torch.randint(N, (S, T + 1, E)), torch.randint(A, (S, T, E))
    s, s_next = states[:, :-1], states[:, 1:]
    pi, mu = policy_for(N, A), policy_for(N, A)
    pi[1] = torch.tensor([0, 1])
    r, d = alive * torch.randn(S, T, E, **double), (torch.rand(S, T, E) < 0.3).double()
    return ope.Logged(alive, s, a, r, s_next, d, mu[s, a].log(), pi[s], pi[s_next]), pi, mu


def agent_for(logged, Q=None, n=N, **flags):
    args = args_for(**{"gamma": 0.9, "num_seeds": len(logged.s), **flags})
    agent = ope.Agent(args, None, logged, (len(logged.s), n, logged.pi.shape[-1]))
    if Q is not None:
        agent.Q.copy_(Q)
    return agent


# --- estimators ---
def loops(logged, Q, k, gamma=0.9):
    """The estimators of seed k, episode by episode, in plain numbers."""
    rho, r, dr, v_start = [], [], [], []
    for i in range(logged.s.shape[2]):
        now, ratios, rewards, total = 1.0, [], [], 0.0
        steps = [t for t in range(logged.s.shape[1]) if logged.alive[k, t, i]]
        v = [sum(float(logged.pi[k, t, i, b] * Q[k, logged.s[k, t, i], b]) for b in range(A)) for t in steps] + [0.0]
        for t in range(logged.s.shape[1]):
            if t in steps:
                a = int(logged.a[k, t, i])
                now *= float(logged.pi[k, t, i, a]) / np.exp(float(logged.log_mu[k, t, i]))
                q, reward = float(Q[k, logged.s[k, t, i], a]), float(logged.r[k, t, i])
                total += gamma**t * now * (reward + gamma * v[t + 1] - q)
            ratios.append(now)  # stays what it is after the end
            rewards.append(gamma**t * float(logged.r[k, t, i]) if t in steps else 0.0)
        rho, r, dr, v_start = [*rho, ratios], [*r, rewards], [*dr, v[0] + total], [*v_start, v[0]]
    rho, r = np.array(rho), np.array(r)  # (E, T)
    last, G = rho[:, -1], r.sum(1)
    ess = [w.sum() ** 2 / (w**2).sum() for w in rho.T]
    values = {"is": (last * G).mean(), "wis": (last * G).sum() / last.sum(), "pdis": (rho * r).sum(1).mean(),
              "wpdis": sum((rho[:, t] * r[:, t]).sum() / rho[:, t].sum() for t in range(len(rho[0]))),
              "dr": np.mean(dr), "dm": np.mean(v_start)}
    sizes = dict(zip(NAMES, [ess[-1]] * 2 + [np.mean(ess)] * 3 + [len(rho)]))
    return values, sizes


def test_estimators_equal_loops():
    logged, _, _ = random_log()
    Q = torch.randn(S, N, A, **double)
    values, sizes = agent_for(logged, Q).estimates()
    assert tuple(values) == tuple(sizes) == NAMES and all(x.shape == (S,) for x in (*values.values(), *sizes.values()))
    assert 1 < logged.alive.sum(1).float().mean() < T and (ope.log_ratios(logged) == -torch.inf).any()
    for k in range(S):
        expected = loops(logged, Q, k)
        assert {name: float(x[k]) for name, x in values.items()} == pytest.approx(expected[0], abs=1e-12)
        assert {name: float(x[k]) for name, x in sizes.items()} == pytest.approx(expected[1], abs=1e-12)


def all_episodes(seed=1):
    """A random MDP whose state 2 is terminal; of each possible episode of 3 steps a data set (S) of its own (E = 1),
    with its probability under mu."""
    torch.manual_seed(seed)
    prob, reward = policy_for(3, 2, 3), torch.randn(3, 2, 3, **double)
    prob[2], reward[2] = torch.eye(3, **double)[2], 0
    terminal, start = torch.arange(3) == 2, torch.tensor([0.6, 0.4, 0], **double)
    table = ope.Table(prob, reward, reward**2, terminal, start, 3)
    pi, mu = policy_for(3, 2), policy_for(3, 2)
    s, a, p = [], [], []
    for states in product(range(3), repeat=4):
        for actions in product(range(2), repeat=3):
            chance = float(start[states[0]])
            for x, b, y in zip(states, actions, states[1:]):
                chance *= float(mu[x, b] * prob[x, b, y])
            if chance:
                s, a, p = [*s, states], [*a, actions], [*p, chance]
    s, a = torch.tensor(s).unsqueeze(-1), torch.tensor(a).unsqueeze(-1)  # (S, 4, 1), (S, 3, 1)
    s, s_next = s[:, :-1], s[:, 1:]
    logged = ope.Logged(~terminal[s], s, a, reward[s, a, s_next], s_next, terminal[s_next].double(), mu[s, a].log(),
                        pi[s], pi[s_next])
    return table, pi, logged, torch.tensor(p, **double)


@pytest.mark.parametrize("seed", [1, 2])
def test_is_pdis_and_dr_are_unbiased(seed):
    """The sum over all episodes, whatever Q is; what weighs is biased with one episode: it is the return itself."""
    table, pi, logged, p = all_episodes(seed)
    truth = float(ope.returns(table, pi.unsqueeze(0), 0.9)[2])
    Q = torch.randn(3, 2, **double).expand(len(p), -1, -1)
    values, _ = agent_for(logged, Q, n=3).estimates()
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    for name in "is", "pdis", "dr":
        assert float((p * values[name]).sum()) == pytest.approx(truth, abs=1e-10)
    for name in "wis", "wpdis", "dm":
        assert abs(float((p * values[name]).sum()) - truth) > 1e-3
    variance = {name: float((p * values[name] ** 2).sum()) - truth**2 for name in ("is", "pdis")}
    assert variance["pdis"] < variance["is"]


def test_weighted_ones_are_right_where_the_data_are_as_mu_says():
    """A population: each episode as often as mu makes it, for which a consistent estimator is exact."""
    prob = torch.zeros(4, 2, 4, **double)
    prob[[0, 0, 1, 1], [0, 1, 0, 1], [1, 3, 0, 1]] = 1  # deterministic; state 3 is terminal, 2 is not reached
    prob[2:] = torch.eye(4, **double)[2:].unsqueeze(1)
    torch.manual_seed(3)
    reward, terminal = torch.randn(4, 2, 4, **double), torch.arange(4) == 3
    reward[3] = 0
    table = ope.Table(prob, reward, reward**2, terminal, torch.eye(4, **double)[0], 3)
    pi, mu = policy_for(4, 2), torch.full((4, 2), 0.5, **double)
    rows = []
    for actions in product(range(2), repeat=3):
        s = [0]
        for a in actions:
            s.append(int(prob[s[-1], a].argmax()))
        rows.append((s, actions))
    s, a = (torch.tensor(x).T.unsqueeze(0) for x in zip(*rows))  # (1, 4, 8), (1, 3, 8)
    s, s_next = s[:, :-1], s[:, 1:]
    logged = ope.Logged(~terminal[s], s, a, reward[s, a, s_next], s_next, terminal[s_next].double(), mu[s, a].log(),
                        pi[s], pi[s_next])
    truth = float(ope.returns(table, pi.unsqueeze(0), 0.9)[2])
    values, _ = agent_for(logged, n=4).estimates()
    assert [float(values[name]) for name in NAMES[:5]] == pytest.approx([truth] * 5, abs=1e-12)


@pytest.mark.parametrize("flags", [
    dict(dataset_id="chain", slip=0.2, epsilon=0.6, target_epsilon=0.3, horizon=12),
    dict(dataset_id="FrozenLake-v1", slip=0.2, epsilon=0.7, target_epsilon=0.5, horizon=15),
    dict(dataset_id="CliffWalking-v1", epsilon=0.4, target_epsilon=0.2, horizon=15)],
    ids=lambda flags: flags["dataset_id"])
def test_the_mean_over_many_resamplings_is_the_truth(flags):
    """Of IS, PDIS and DR with any Q, to four standard errors; of WIS and WPDIS the bias goes as the sets grow."""
    torch.manual_seed(0)
    args, bias, spread = args_for(num_episodes=16_000, **flags), {}, {}
    task, whole, n, _ = ope.drawn(args)
    truth, Q = task.truth(args, []), 0.3 * torch.randn(n, whole.pi.shape[-1], **double)
    for size in 2, 100:
        logged = ope.Logged(*(x[0].unflatten(1, (-1, size)).transpose(0, 1) for x in whole))  # as many seeds as sets
        values, _ = agent_for(logged, Q.expand(len(logged.s), -1, -1), n=n, gamma=0.99).estimates()
        for name in "is", "pdis", "dr":
            deviation = float(values[name].std()) / len(logged.s) ** 0.5
            assert deviation < 0.05 * max(abs(truth), 0.5), name
            assert float(values[name].mean()) == pytest.approx(truth, abs=4 * deviation), name
        bias[size] = {name: abs(float(values[name].mean()) - truth) for name in ("wis", "wpdis")}
        spread[size] = {name: float(x.std()) for name, x in values.items()}
    assert spread[2]["wis"] < 0.9 * spread[2]["is"] and spread[100]["is"] < 0.3 * spread[2]["is"]
    assert all(bias[100][name] < 0.5 * bias[2][name] for name in ("wis", "wpdis")), bias


def test_with_many_episodes_dr_spreads_least():
    """Its Q learnt from the same episodes."""
    args = args_for(horizon=20, num_episodes=4000, num_seeds=4, slip=0.2, epsilon=0.6)
    task, logged, n, _ = ope.drawn(args)
    agent = ope.Agent(args, None, logged, (4, n, 2))
    for _ in range(20):
        agent.update()
    values, _ = agent.estimates()
    for name, x in values.items():
        assert float(x.mean()) == pytest.approx(task.truth(args, []), rel=0.05), name
    assert values["dr"].std() < values["wis"].std() < values["is"].std()


def test_dr_is_the_truth_with_a_perfect_model_where_nothing_is_left_to_chance():
    """Whatever the data, of five episodes; IS is not."""
    args = args_for(horizon=300, num_episodes=5, num_seeds=4, epsilon=0.9)
    task, logged, n, _ = ope.drawn(args)
    assert not logged.alive[:, -1].any()
    Q, table = torch.zeros(n, 2, **double), task.spec
    for _ in range(2000):
        Q = (table.prob * (table.reward + 0.99 * (task.pi * Q).sum(-1))).sum(-1)
    values, _ = agent_for(logged, Q, n=n, gamma=0.99).estimates()
    truth = task.truth(args, [])
    assert values["dr"].tolist() == pytest.approx([truth] * 4, abs=1e-10)
    assert (values["is"] - truth).abs().max() > 0.01


def test_a_thousand_steps_are_no_trouble():
    """Ratios from 1e-750 to 1e+255, of which neither a product nor float32 would leave anything."""
    args = args_for(horizon=1000, num_episodes=20, num_seeds=2, slip=1.0, epsilon=1.0)  # no one gets to an end often
    task, logged, _, _ = ope.drawn(args)
    stay = torch.zeros_like(logged.s)
    logged = logged._replace(alive=torch.ones_like(logged.alive), s=stay, s_next=stay, r=torch.ones_like(logged.r),
                             d=torch.zeros_like(logged.r), pi=logged.pi.new_tensor([0.05, 0.95]).expand_as(logged.pi))
    agent = agent_for(logged, n=1, gamma=0.99)
    for _ in range(100):
        agent.update()
    log_rho = ope.log_ratios(logged)[:, -1]
    values, sizes = agent.estimates()
    assert log_rho.max() < -100 and (log_rho.amax() - log_rho.amin()) > 50
    assert all(x.isfinite().all() for x in (*values.values(), *sizes.values()))
    G = (1 - 0.99**1000) / 0.01
    torch.testing.assert_close(values["wis"], torch.full((2,), G, **double))
    torch.testing.assert_close(values["wpdis"], torch.full((2,), G, **double))
    assert (sizes["wis"] >= 1).all()


def test_no_ratio_is_too_large_or_too_small():
    huge = torch.tensor([[800.0, -800.0, 3.0]], **double)
    x = torch.tensor([[1e-200, -1.0, -2.0]], **double)
    assert float(ope.ordinary(huge, x)) == pytest.approx(np.exp(800 - 200 * np.log(10)) / 3)
    assert float(ope.ordinary(huge - 1000, 0 * x)) == 0
    tiny = torch.tensor([[-2000.0, -2000.0, -2000 - np.log(2)]], **double)
    assert float(ope.weighted(tiny, torch.tensor([[1.0, 2.0, 4.0]], **double))) == pytest.approx(5 / 2.5)
    assert float(ope.sample_size(tiny)) == pytest.approx(2.5**2 / 2.25)


def test_effective_sample_size_and_no_episode_that_pi_could_have_made():
    none = torch.full((1, 4), -torch.inf, **double)
    assert float(ope.sample_size(torch.full((1, 4), -7.0, **double))) == pytest.approx(4)
    assert float(ope.sample_size(torch.tensor([[0.0, -800, -900, -torch.inf]], **double))) == pytest.approx(1)
    for x in ope.sample_size(none), ope.weighted(none, none.exp() + 1), ope.ordinary(none, none.exp() + 1):
        assert x.tolist() == [0]


def test_an_episode_that_is_over_keeps_its_ratio():
    """Two episodes of ratios 2 and 1/2 a step; the second is over after a step. At t = 1 it still counts: 4 of 4.5."""
    alive = torch.tensor([[[True, True], [True, False]]])
    zero = torch.zeros(1, 2, 2, dtype=torch.long)
    ratio = torch.tensor([2.0, 0.5], **double)
    logged = ope.Logged(alive, zero, zero, torch.tensor([[[0.0, 0], [1, 0]]], **double), zero, zero.double(),
                        (0.4 / ratio).log().expand(1, 2, 2), torch.tensor([0.4, 0.6], **double).expand(1, 2, 2, 2),
                        None)
    values, _ = agent_for(logged, n=1, gamma=1.0).estimates()
    assert float(values["wpdis"]) == pytest.approx(4 / 4.5)
    assert float(values["pdis"]) == pytest.approx(4 / 2)


# --- Q and mu of the data ---
def test_backup_and_clone_equal_loops():
    logged, pi, _ = random_log()
    Q = torch.randn(S, N, A, **double)
    new, log_mu = ope.backup(Q, logged, 0.9), ope.clone(logged, Q.shape)
    for k in range(S):
        targets, visits = {}, {}
        for t, i in product(range(T), range(E)):
            if logged.alive[k, t, i]:
                s, a, x = (int(y[k, t, i]) for y in (logged.s, logged.a, logged.s_next))
                v = sum(float(pi[x, b] * Q[k, x, b]) for b in range(A))
                y = float(logged.r[k, t, i]) + 0.9 * (1 - float(logged.d[k, t, i])) * v
                targets.setdefault((s, a), []).append(y)
                visits[s] = visits.get(s, 0) + 1
        for s, a in product(range(N), range(A)):
            assert float(new[k, s, a]) == pytest.approx(np.mean(targets.get((s, a), [0.0])), abs=1e-12)
        for t, i in product(range(T), range(E)):
            if logged.alive[k, t, i]:
                s, a = int(logged.s[k, t, i]), int(logged.a[k, t, i])
                assert float(log_mu[k, t, i].exp()) == pytest.approx(len(targets[s, a]) / visits[s])


def test_with_clone_the_counts_take_the_place_of_the_logged_probabilities():
    args = args_for(num_episodes=3000, num_seeds=2, horizon=20, epsilon=0.6, slip=0.1)
    task, logged, n, _ = ope.drawn(args)
    wrong = logged._replace(log_mu=0 * logged.log_mu)
    agent = agent_for(wrong, n=n, behaviour="clone", gamma=0.99)
    torch.testing.assert_close(agent.logged.log_mu[logged.alive], logged.log_mu[logged.alive], atol=0.15, rtol=0)
    assert not torch.equal(agent.logged.log_mu, logged.log_mu)
    assert float(agent.estimates()[0]["wis"].mean()) == pytest.approx(task.truth(args, []), rel=0.05)


def test_q_converges_to_the_value_of_pi_in_the_mdp_that_is_counted():
    args = args_for(num_episodes=50, num_seeds=2, horizon=30, slip=0.2, epsilon=0.8)
    task, logged, n, _ = ope.drawn(args)
    agent = agent_for(logged, n=n, gamma=0.9)
    for _ in range(400):
        losses = agent.update()
    assert losses["bellman_error"].shape == (2,) and losses["bellman_error"].max() < 1e-10
    for k in range(2):
        count = torch.zeros(n, 2, n, **double)
        for t, i in logged.alive[k].nonzero().tolist():
            count[logged.s[k, t, i], logged.a[k, t, i], logged.s_next[k, t, i]] += 1
        prob = count / count.sum(-1, keepdim=True).clamp(min=1)
        reward = (prob * task.spec.reward).sum(-1).flatten()
        P = torch.einsum("sax,xb->saxb", prob, task.pi).reshape(2 * n, 2 * n)
        Q = torch.linalg.solve(torch.eye(2 * n, **double) - 0.9 * P, reward)
        torch.testing.assert_close(agent.Q[k].flatten().data, Q)


# --- finite MDPs ---
@pytest.mark.parametrize("slip", [0.0, 0.3])
def test_the_chain_is_a_gamblers_ruin(slip):
    """Three steps from either end, each to the right with probability p: 1 / (1 + x^3) of the episodes end there,
    x = (1 - p) / p."""
    args = args_for(slip=slip, horizon=3000)
    task = ope.MDP(args)
    p = 0.95 * (1 - slip) + 0.05 * slip
    right = 1 / (1 + ((1 - p) / p) ** 3)
    assert task.truth(replace(args, gamma=1.0), []) == pytest.approx(right + 0.3 * (1 - right), abs=1e-12)
    assert task.pi[1:6].tolist() == pytest.approx(np.array([[0.05, 0.95]] * 5))
    assert task.mu[1:6].tolist() == pytest.approx(np.array([[0.25, 0.75]] * 5))


def test_drawn_episodes_are_the_mdps_and_mus():
    args = args_for(num_episodes=5000, horizon=10, slip=0.2, epsilon=0.8)
    task, logged, _, _ = ope.drawn(args)
    assert logged.s.shape == (1, 10, 5000) and (logged.s[:, 0] == 3).all()
    assert torch.equal(logged.s[:, 1:], logged.s_next[:, :-1])
    assert logged.alive[:, 0].all() and not logged.alive[torch.isin(logged.s, torch.tensor([0, 6]))].any()
    assert torch.equal(logged.d.bool(), torch.isin(logged.s_next, torch.tensor([0, 6])))
    assert (logged.r[~logged.alive] == 0).all() and set(logged.r.unique().tolist()) == {0.0, 0.3, 1.0}
    here = logged.s == 2
    assert float((logged.a[here] == 1).double().mean()) == pytest.approx(0.6, abs=0.02)
    went = logged.s_next[here & (logged.a == 1)]
    assert float((went == 3).double().mean()) == pytest.approx(0.8, abs=0.02) and set(went.tolist()) == {1, 3}
    torch.testing.assert_close(logged.log_mu[here], torch.tensor([0.4, 0.6], **double)[logged.a[here]].log())


def test_each_seed_has_episodes_of_its_own_that_do_not_depend_on_the_others():
    three, one = (ope.drawn(args_for(num_seeds=n, num_episodes=7, slip=0.3))[1] for n in (3, 1))
    assert all(torch.equal(x[:1], y) for x, y in zip(three, one)) and not torch.equal(three.s[0], three.s[1])
    assert not torch.equal(ope.drawn(args_for(num_episodes=7, slip=0.3, seed=1))[1].s, one.s)


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "CliffWalking-v1"])
def test_environments_with_a_table(env_id):
    args = args_for(dataset_id=env_id, num_episodes=30, num_seeds=2, slip=0.1)
    task, logged, n, best = ope.drawn(args)
    agent = ope.Agent(args, best, logged, (2, n, 4))
    for _ in range(100):
        agent.update()
    values, _ = agent.estimates()
    assert all(x.isfinite().all() for x in values.values()) and best.shape == (n,)
    assert n == gym.make(env_id).observation_space.n and np.isfinite(task.truth(args, []))


# --- independent seeds ---
def test_nan_in_seed_0_leaves_the_others_bit_identical_and_seeds_together_equal_seeds_apart():
    args = args_for(num_seeds=3, num_episodes=6, slip=0.3, behaviour="clone")
    _, logged, n, _ = ope.drawn(args)

    def after(logged):
        agent = agent_for(logged, n=n, behaviour="clone")
        losses = [agent.update() for _ in range(5)][-1]
        return {"Q": agent.Q.data, **losses, **agent.estimates()[0]}

    clean, poison = after(logged), logged.r.clone()
    poison[0, 0] = torch.nan
    poisoned = after(logged._replace(r=poison))
    assert all(torch.equal(x[1:], poisoned[name][1:]) for name, x in clean.items()) and poisoned["is"][0].isnan()
    for k in range(3):
        for name, x in after(ope.Logged(*(y[k : k + 1] for y in logged))).items():
            torch.testing.assert_close(x[0], clean[name][k], msg=name)


# --- recorded sets ---
def recording(folder, monkeypatch, lengths=(4, 2, 5, 3), prob=True, env_id="CartPole-v1", extra=0):
    """A set whose observations hold (episode, step, 0, 0), whose actions alternate and whose rewards are row numbers;
    its probabilities are 0.5 + the row's hundredth. `extra` entries of infos belong to the reset."""
    episodes, row = [], 0
    for e, n in enumerate(lengths):
        obs = np.array([[e, t, 0, 0] for t in range(n + 1)], np.float32)
        p = 0.5 + 0.01 * np.arange(row, row + n)
        infos = {"action_prob": np.concatenate([np.zeros(extra), p])} if prob else None
        ends = np.arange(n) == n - 1
        index = np.arange(row, row + n)
        episodes.append(EpisodeBuffer(e, e, None, obs, index % 2, index.astype(float),
                                      ends & (e % 2 == 0), ends & (e % 2 == 1), infos))
        row += n
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    minari.create_dataset_from_buffers("set-v0", episodes, env=gym.make(env_id))
    return str(folder / "set-v0")


class Always(torch.nn.Module):
    """The same action of two agents: k for agent k."""

    def __init__(self, obs_dim):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, obs_dim, 1))

    def forward(self, s):
        return (s @ self.weight).squeeze(-1).long() + torch.arange(2).unsqueeze(-1)


@pytest.fixture(scope="module")
def always(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    for obs_dim in 4, 8:
        program = torch.export.export(Always(obs_dim), (torch.zeros(2, obs_dim),),
                                      dynamic_shapes=({0: torch.export.Dim("B")},))
        torch.export.save(program, path / f"{obs_dim}.pt2")
    return path


@pytest.mark.parametrize("extra", [0, 1])
def test_a_recorded_set_is_logged_as_it_is(extra, always, tmp_path, monkeypatch):
    """Episodes drawn with replacement and cut at the horizon."""
    data = recording(tmp_path, monkeypatch, extra=extra)
    args = args_for(dataset_id=data, policy=str(always / "4.pt2"), agent=1, num_seeds=S, num_episodes=40, horizon=4,
                    target_epsilon=0.2, cells=100)
    task, logged, n, path = ope.recorded(args)
    lengths, first = [4, 2, 5, 3], [0, 4, 6, 11]
    assert logged.s.shape == (S, 4, 40) and path == args.policy
    cells, drawn = {}, set()
    for k, i in product(range(S), range(40)):
        begin = next(j for j in range(14) if logged.alive[k, 0, i] and float(logged.r[k, 0, i]) == j)
        e = first.index(begin)
        drawn.add((k, e))
        for t in range(4):
            assert bool(logged.alive[k, t, i]) == (t < lengths[e])
            if t < lengths[e]:
                row, last = begin + t, t == lengths[e] - 1
                assert float(logged.r[k, t, i]) == row and int(logged.a[k, t, i]) == row % 2
                assert float(logged.log_mu[k, t, i].exp()) == pytest.approx(0.5 + 0.01 * row)
                assert float(logged.d[k, t, i]) == (last and e % 2 == 0)
                assert logged.pi[k, t, i].tolist() == pytest.approx([0.1, 0.9])
                cells.setdefault((e, t), set()).add(int(logged.s[k, t, i]))
                cells.setdefault((e, t + 1), set()).add(int(logged.s_next[k, t, i]))
            else:
                assert logged.r[k, t, i] == 0
    assert all(len(found) == 1 for found in cells.values()) and len(drawn) == 4 * S
    assert n <= 18 and max(map(max, cells.values())) < n
    again = ope.recorded(replace(args, num_seeds=1))[1]
    assert torch.equal(again.a, logged.a[:1])


def test_of_one_cell_the_clone_is_the_share_of_the_actions(always, tmp_path, monkeypatch):
    data = recording(tmp_path, monkeypatch, lengths=(3,), prob=False)
    args = args_for(dataset_id=data, policy=str(always / "4.pt2"), behaviour="clone", cells=1, num_episodes=2)
    _, logged, n, _ = ope.recorded(args)
    agent = ope.Agent(args, None, logged, (1, n, 2))
    assert n == 1 and agent.logged.log_mu.exp()[0, :, 0].tolist() == pytest.approx([2 / 3, 1 / 3, 2 / 3])


def test_observations_are_cut_at_their_quantiles(always, tmp_path, monkeypatch):
    data = recording(tmp_path, monkeypatch, lengths=(9,))
    args = args_for(dataset_id=data, policy=str(always / "4.pt2"), cells=3, num_episodes=1)
    _, logged, n, _ = ope.recorded(args)
    assert n == 3 and [len(set(logged.s[0, i : i + 3, 0].tolist())) for i in (0, 3, 6)] == [1, 1, 1]


def test_the_truth_of_a_recorded_set_is_played(always, tmp_path, monkeypatch):
    """CartPole under one action falls within a dozen steps; with --horizon 5 every reward of 1 is earned."""
    data = recording(tmp_path, monkeypatch)
    flags = dict(dataset_id=data, policy=str(always / "4.pt2"), num_seeds=2, eval_episodes=3, gamma=0.9)
    for horizon, epsilon in (5, 1.0), (50, 0.0):
        args = args_for(horizon=horizon, target_epsilon=epsilon, **flags)
        rows = ope.recorded(args)[0].evaluate(args, 0)
        assert rows.shape == (2, 5) and np.array_equal(rows, ope.recorded(args)[0].evaluate(args, 0), equal_nan=True)
        length = rows[:, 3]
        if horizon == 5:
            assert rows[0, :4].tolist() == pytest.approx([5, 0, (1 - 0.9**5) / 0.1, 5])
        else:
            assert (7 < length).all() and (length < 12).all() and rows[:, 0] == pytest.approx(length)


# --- runs ---
def small(out, **flags):
    return args_for(out_dir=str(out), **{**dict(num_updates=20, num_episodes=10, slip=0.2), **flags})


def test_a_run_writes_its_files(tmp_path, capsys):
    args = small(tmp_path, num_seeds=3, eval_every=10)
    folder = ope.main(args)
    assert {path.name for path in folder.iterdir()} == {
        "args.json", "run.json", "eval.csv", "losses.csv", "checkpoint.pt", "policy.pt2", "estimates.csv"}
    last, rows = capsys.readouterr().out.splitlines()[-1], list(csv.DictReader((folder / "estimates.csv").open()))
    assert [(row["estimator"], row["seed"]) for row in rows] == [(name, str(k)) for name in NAMES for k in range(3)]
    task, logged, n, best = ope.drawn(args)
    agent = ope.Agent(args, best, logged, (3, n, 2))
    for _ in range(20):
        agent.update()
    values, sizes = agent.estimates()
    for row in rows:
        name, k = row["estimator"], int(row["seed"])
        assert float(row["value"]) == pytest.approx(float(values[name][k]), rel=1e-6)
        assert float(row["effective_sample_size"]) == pytest.approx(float(sizes[name][k]), rel=1e-4)
        assert float(row["truth"]) == pytest.approx(task.truth(args, []), rel=1e-6)
    assert all(f"{name} {float(x.mean()):.4g} ± " in last for name, x in values.items()) and "truth 0." in last
    evals = list(csv.DictReader((folder / "eval.csv").open()))
    assert [(row["update"], row["seed"]) for row in evals] == [(u, str(k)) for u in ("10", "20") for k in range(3)]
    assert {row["discounted_return_mean"] for row in evals} == {f"{task.truth(args, []):.4f}"}
    policy = torch.export.load(folder / "policy.pt2").module()
    assert torch.equal(policy(torch.arange(n)), best.expand(3, -1))
    assert [row["name"] for row in csv.DictReader((folder / "losses.csv").open()) if row["seed"] == "0"] == [
        "bellman_error", *NAMES]
    assert all(x.shape[0] == 3 for x in checkpoint(folder)["agent"].values())


def test_a_run_on_a_recorded_set(always, tmp_path, monkeypatch):
    data = recording(tmp_path / "sets", monkeypatch)
    policy = always / "4.pt2"
    flags = dict(dataset_id=data, policy=str(policy))
    folder = ope.main(small(tmp_path / "out", **flags, num_seeds=2, eval_episodes=2, horizon=8))
    rows = list(csv.DictReader((folder / "estimates.csv").open()))
    played = [float(row["discounted_return_mean"]) for row in csv.DictReader((folder / "eval.csv").open())]
    assert len(rows) == 12 and [float(row["truth"]) for row in rows] == pytest.approx([np.mean(played)] * 12, rel=1e-6)
    assert (folder / "policy.pt2").read_bytes() == policy.read_bytes()
    folder = ope.main(small(tmp_path / "out", **flags, eval_episodes=0))
    assert {row["truth"] for row in csv.DictReader((folder / "estimates.csv").open())} == {""}


def test_resume_equals_uninterrupted_to_the_bit(tmp_path, monkeypatch):
    whole = ope.main(small(tmp_path / "a", num_seeds=2))
    stop_at(ope, 13, monkeypatch, signal.SIGTERM)
    with pytest.raises(SystemExit):
        ope.main(small(tmp_path / "b", num_seeds=2))
    monkeypatch.undo()
    (folder,) = (tmp_path / "b").iterdir()
    assert checkpoint(folder)["update"] == 13 and not (folder / "estimates.csv").exists()
    for _ in range(2):  # the second time nothing is left to do
        resume(ope, folder)
        a, b = checkpoint(whole), checkpoint(folder)
        assert all(same(a[part], b[part]) for part in ("update", "agent", "moments", "rng"))
        for name in "eval.csv", "losses.csv", "estimates.csv":
            assert (whole / name).read_text() == (folder / name).read_text()


@pytest.mark.parametrize("flags, words", [
    ({"slip": 1.5}, ["--slip"]), ({"epsilon": -0.1}, ["--epsilon"]), ({"target_epsilon": 2.0}, ["--target-epsilon"]),
    ({"dataset_id": "Hopper-v5"}, ["transition table"]),
    ({"dataset_id": "nowhere/none-v0", "policy": "4"}, ["none-v0"]),
    ({"dataset_id": "set"}, ["--policy is no file"]),
    ({"dataset_id": "set", "policy": "4"}, ["lacks the probabilities", "--behaviour clone", "action_prob"]),
    ({"dataset_id": "set", "policy": "8"}, ["size()[1] == 8"]), ({"dataset_id": "set", "policy": "none"}, ["none"]),
    ({"dataset_id": "set", "policy": "4", "agent": 2}, ["agent 2", "size 2"])])
def test_bad_input_is_one_sentence(flags, words, always, tmp_path, monkeypatch):
    monkeypatch.setattr(ope.minari, "load_dataset", lambda *_, **__: 1 / 0)
    if flags.get("dataset_id") == "set":
        flags = {**flags, "dataset_id": recording(tmp_path / "sets", monkeypatch, prob=False)}
    if "policy" in flags:
        flags = {**flags, "policy": str(always / f"{flags['policy']}.pt2")}
    with pytest.raises(SystemExit) as stopped:
        ope.main(small(tmp_path / "out", **flags))
    message = stopped.value.code
    assert message.startswith("ope: ") and "\n" not in message and all(word in message for word in words), message
    assert not (tmp_path / "out").exists()
