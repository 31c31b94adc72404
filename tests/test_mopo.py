"""MOPO: the model, its fit, what it imagines, and where imagined episodes end."""
import csv
import math
import os
import signal
from types import SimpleNamespace

import gymnasium as gym
import mopo
import numpy as np
import pytest
import torch
from conftest import checkpoint, flat, made, record, resume, same

S, E, OBS, ACT, B = 3, 2, 4, 5, 7


def args_for(**flags):
    return mopo.Args(**{**dict(device="cpu", num_seeds=S, num_models=E, num_elites=1, hidden_dim=16, model_hidden_dim=8,
                               batch_size=40, rollout_batch=11, horizon=6), **flags})


def toy(N=100, obs_dim=OBS, act_dim=ACT, name="HalfCheetah"):
    rng = torch.Generator().manual_seed(3)
    obs, next_obs = torch.randn(2, N, obs_dim, generator=rng)
    return SimpleNamespace(
        obs=obs, next_obs=next_obs, action=torch.rand(N, act_dim, generator=rng) * 2 - 1, reward=torch.ones(N),
        terminated=torch.zeros(N), episode=torch.arange(N) // 10, spec=SimpleNamespace(name=name, max_episode_steps=9))


def agent_for(args, data=None):
    torch.manual_seed(0)
    return mopo.Agent(args, OBS, ACT, data or toy())


def dynamics_for():
    torch.manual_seed(1)
    model = mopo.Dynamics(S, E, OBS, ACT, 8)
    with torch.no_grad():
        for x in [*model.parameters(), model.mean]:
            x += 0.3 * torch.randn_like(x)
        model.std.uniform_(0.5, 2)
    return model


def softplus(x):
    return np.logaddexp(0, x)


def network(model, k, i, s_a):
    """Network i of seed k on a vector: mean, logvar."""
    get = lambda x: x.detach().double().numpy()
    h = (s_a - get(model.mean)[k, 0, 0]) / get(model.std)[k, 0, 0]
    weights = [(get(layer.weight)[k, i], get(layer.bias)[k, i, 0]) for layer in model.layers]
    for w, b in weights[:4]:
        h = h @ w + b
        h = h / (1 + np.exp(-h))
    mean, logvar = (h @ w + b for w, b in weights[4:])
    high, low = get(model.max_logvar)[k, 0, 0], get(model.min_logvar)[k, 0, 0]
    logvar = high - softplus(high - logvar)
    return mean, low + softplus(logvar - low)


def test_dynamics_equals_single_networks():
    model, shared, own = dynamics_for(), torch.randn(S, 1, B, OBS + ACT), torch.randn(S, E, B, OBS + ACT)
    for s_a in shared, own:
        mean, logvar = model(s_a)
        assert mean.shape == logvar.shape == (S, E, B, 1 + OBS)
        for k, i, b in np.ndindex(S, E, B):
            expected = network(model, k, i, s_a.expand(S, E, B, -1)[k, i, b].double().numpy())
            np.testing.assert_allclose(mean[k, i, b].detach(), expected[0], atol=1e-5)
            np.testing.assert_allclose(logvar[k, i, b].detach(), expected[1], atol=1e-5)


def test_weights_begin_as_a_truncated_normal():
    model = mopo.Dynamics(S, E, OBS, ACT, 50)
    assert [tuple(layer.weight.shape[-2:]) for layer in model.layers] == [
        (OBS + ACT, 50), (50, 50), (50, 50), (50, 50), (50, 1 + OBS), (50, 1 + OBS)]
    for layer in model.layers:
        std = 1 / (2 * layer.weight.shape[-2] ** 0.5)
        assert 1.8 * std < layer.weight.abs().max() <= 2 * std and not layer.bias.any()
        assert layer.weight.std().item() == pytest.approx(0.88 * std, rel=0.06)  # of a normal cut off at two deviations


def test_log_variance_keeps_to_its_bounds():
    model = mopo.Dynamics(S, E, OBS, ACT, 8)
    for push in -1000.0, 1000.0:
        torch.nn.init.constant_(model.layers[-1].bias, push)
        _, logvar = model(torch.randn(S, 1, B, OBS + ACT))
        assert (-10 <= logvar).all() and (logvar <= 0.5 + 1e-4).all()
        torch.testing.assert_close(logvar, torch.full_like(logvar, 0.5 if push > 0 else -10), atol=1e-3, rtol=0)
    mopo.model_loss(model, torch.randn(S, E, B, OBS + ACT), torch.randn(S, E, B, 1 + OBS)).sum().backward()
    assert model.max_logvar.grad.shape == model.min_logvar.grad.shape == (S, 1, 1, 1 + OBS)


def test_model_loss_by_hand():
    model, s_a, x = dynamics_for(), torch.randn(S, E, B, OBS + ACT), torch.randn(S, E, B, 1 + OBS)
    decays = [0.000025, 0.00005, 0.000075, 0.000075, 0.0001, 0.0001]
    loss = mopo.model_loss(model, s_a, x)
    assert loss.shape == (S,)
    for k in range(S):
        total = 0.01 * (model.max_logvar[k].sum() - model.min_logvar[k].sum()).item()
        for i in range(E):
            rows = []
            for b in range(B):
                mean, logvar = network(model, k, i, s_a[k, i, b].double().numpy())
                rows.append(np.mean((mean - x[k, i, b].numpy()) ** 2 / np.exp(logvar) + logvar))
            total += np.mean(rows)
            total += sum(c * 0.5 * layer.weight[k, i].square().sum().item() for c, layer in zip(decays, model.layers))
        assert loss[k].item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("whole", [True, False])
def test_the_model_does_not_learn_a_next_state_that_the_data_lacks(whole, tmp_path, monkeypatch):
    """Without next_observations nobody knows where a terminated step led to: it is recorded as s' = s."""
    path = made(tmp_path / "x-v0", [20, 30, 9], ["terminal", "timeout", "terminal"], obs_dim=OBS, act_dim=ACT,
                next_observations=whole)
    args, seen = args_for(dataset_id=path, model_epochs=1), []
    data = mopo.load(args)
    monkeypatch.setattr(mopo, "split", lambda N, args: seen.append(N) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(mopo.Agent(args, OBS, ACT, data).fit())
    assert len(data.reward) == (59 if whole else 58) and seen == [59 if whole else 56]


class Fixed(torch.nn.Module):
    """Its hold-out error against zeros is `w` squared."""

    def __init__(self, *_):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(S, E, 1, 1))
        self.max_logvar = torch.nn.Parameter(torch.zeros(S, 1, 1, 1))
        self.register_buffer("mean", torch.zeros(S, 1, 1, 1))

    def forward(self, s_a):
        return self.w.expand(S, E, B, 1 + OBS), None


def test_networks_are_kept_by_seed_and_member_as_in_a_loop(monkeypatch):
    monkeypatch.setattr(mopo, "Dynamics", Fixed)
    agent, rng, epochs = agent_for(args_for()), np.random.default_rng(0), 40
    errors = np.exp(rng.normal(0, 0.5, (epochs, S, E)) - 0.1 * np.arange(epochs)[:, None, None])
    errors[6:, 0] = 100  # seed 0 finds nothing any more and stops ...
    errors[14:, 0] = 1e-6  # ... so that this comes too late
    errors[8, 2], errors[9, 2] = (x * errors[:8, 2].min(0) for x in (0.995, 0.985))  # too little, and enough
    errors[3, 2, 1] = np.nan
    best, stale, chosen, bounds = np.full((S, E), np.inf), np.zeros(S), np.full((S, E), -1), np.full(S, -1)
    for epoch in range(epochs):
        with torch.no_grad():
            agent.dynamics.w.copy_(torch.tensor(errors[epoch]).sqrt()[..., None, None])
            agent.dynamics.max_logvar.fill_(epoch)
        agent.keep(torch.zeros(S, 1, B, OBS + ACT), torch.zeros(S, 1, B, 1 + OBS))
        for k in range(S):
            if stale[k] > 5:
                continue
            found, bounds[k] = False, epoch
            for i in range(E):
                now = np.float32(np.sqrt(np.float32(errors[epoch, k, i]))) ** 2
                if now < np.float32(0.99) * best[k, i] if np.isfinite(best[k, i]) else np.isfinite(now):
                    best[k, i], chosen[k, i], found = now, epoch, True
            stale[k] = 0 if found else stale[k] + 1
        np.testing.assert_allclose(agent.fitted.error, best, rtol=1e-5)
        assert ((agent.fitted.stale <= 5).numpy() == (stale <= 5)).all()
    assert agent.fitted.epoch == epochs and stale[0] == 6 and (chosen[0] < 6).all() and bounds[0] == 11
    for k, i in np.ndindex(S, E):
        assert agent.dynamics_best.w[k, i].item() == pytest.approx(np.sqrt(errors[chosen[k, i], k, i]), rel=1e-5)
    assert agent.dynamics_best.max_logvar.flatten().tolist() == bounds.tolist()


def test_elites_have_the_least_error():
    agent = agent_for(args_for(num_models=4, num_elites=3))
    agent.fitted.error.copy_(torch.tensor([[4.0, 1, 3, 2], [1, 2, 3, torch.inf], [9, torch.inf, 7, 8]]))
    assert agent.elites().tolist() == [[1, 3, 2], [0, 1, 2], [2, 3, 0]]


def test_split_is_of_each_seed_and_holds_at_most_1000_rows():
    for N, H in (100, 20), (6000, 1000):
        holdout, train, rows = mopo.split(N, args_for())
        assert holdout.shape == (S, H) and train.shape == (S, N - H) and rows.shape == (S, E, N - H)
        assert not torch.equal(holdout[0], holdout[1]) and not torch.equal(rows[0, 0], rows[0, 1])
        for k in range(S):
            assert sorted([*holdout[k].tolist(), *train[k].tolist()]) == list(range(N))
            for i in range(E):
                assert set(rows[k, i].tolist()) <= set(train[k].tolist())
                assert len(rows[k, i].unique()) == pytest.approx((1 - 1 / math.e) * (N - H), rel=0.1)  # a bootstrap


def test_a_step_in_the_model_by_hand():
    model, n = dynamics_for(), 4000
    elites, s, a = torch.tensor([[1], [0], [1]]), torch.randn(S, 1, OBS), torch.randn(S, 1, ACT)
    r, s_next, u = mopo.imagine(model, elites, s.expand(S, n, OBS), a.expand(S, n, ACT))
    assert r.shape == u.shape == (S, n) and s_next.shape == (S, n, OBS)
    for k in range(S):
        out = [network(model, k, i, torch.cat([s, a], -1)[k, 0].double().numpy()) for i in range(E)]
        penalty = max(math.sqrt(sum(math.exp(v) for v in logvar)) for _, logvar in out)  # all networks, reward included
        assert u[k].detach().numpy() == pytest.approx(penalty, rel=1e-4)
        (mean, logvar), x = out[elites[k, 0]], torch.cat([r[k, :, None], s_next[k] - s[k]], -1).detach().numpy()
        np.testing.assert_allclose(x.mean(0), mean, atol=5 * np.exp(0.5 * logvar).max() / n**0.5)
        np.testing.assert_allclose(x.std(0), np.exp(0.5 * logvar), rtol=0.08)


def test_every_sample_draws_its_own_elite():
    model = mopo.Dynamics(S, 4, OBS, ACT, 8)
    with torch.no_grad():
        model.max_logvar.fill_(-40)
        model.min_logvar.fill_(-41)
        model.layers[-2].weight.zero_()
        model.layers[-2].bias.copy_(torch.arange(4.0)[:, None, None].expand(4, 1, 1 + OBS))
    elites, n = torch.tensor([[3, 1, 0], [2, 0, 1], [1, 2, 3]]), 3000
    r, s_next, _ = mopo.imagine(model, elites, torch.zeros(S, n, OBS), torch.zeros(S, n, ACT))
    torch.testing.assert_close(s_next, r.unsqueeze(-1).expand_as(s_next))  # reward and state come from the same network
    for k in range(S):
        drawn, count = r[k].round().unique(return_counts=True)
        assert drawn.tolist() == sorted(elites[k].tolist())
        assert (count / n).tolist() == pytest.approx([1 / 3] * 3, abs=0.05)


HEIGHT = {"Hopper-v5": (0.55, 1.5), "Walker2d-v5": (0.6, 2.4), "HalfCheetah-v5": (-0.5, 1)}
ANGLE = {"Hopper-v5": 0.25, "Walker2d-v5": 1.3, "HalfCheetah-v5": 3}


@pytest.mark.parametrize("env_id", HEIGHT)
def test_termination_is_the_environments_own_on_10000_states(env_id, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warnings there
    env, rng, seen, ends = gym.make(env_id).unwrapped, np.random.default_rng(0), [], []
    env.reset(seed=0)
    for _ in range(10_000):
        qpos, qvel = env.init_qpos + rng.normal(0, 0.3, env.model.nq), rng.normal(0, 2, env.model.nv)
        qpos[1], qpos[2] = rng.uniform(*HEIGHT[env_id]), rng.uniform(-1, 1) * ANGLE[env_id]
        env.set_state(qpos, qvel)
        obs, _, terminated, _, _ = env.step(rng.uniform(-1, 1, env.model.nu))
        seen.append(obs)
        ends.append(terminated)
    found = mopo.terminated(env_id[:-3], torch.tensor(np.array(seen), dtype=torch.float32).view(100, 100, -1))
    assert found.shape == (100, 100) and found.dtype == torch.bool
    assert found.flatten().tolist() == ends
    assert np.mean(ends) == (0 if env_id == "HalfCheetah-v5" else pytest.approx(0.5, abs=0.2))


def test_data_that_end_by_another_rule_are_refused(tmp_path):
    """Walker2d's data with HalfCheetah's name, whose episodes never end."""
    walker = record(tmp_path / "walker", "Walker2d-v5", 300)
    ours, other = (args_for(dataset_id=str(walker), env_id=env_id) for env_id in ("Walker2d-v5", "HalfCheetah-v5"))
    mopo.prepare(mopo.load(ours), ours)
    with pytest.raises(SystemExit) as stopped:
        mopo.prepare(mopo.load(other), other)
    assert stopped.value.code.startswith("mopo: by the rule of HalfCheetah-v5 ")


def test_termination_at_the_limits_of_the_state():
    """Public versions let values below -100 pass."""
    s = torch.tensor([1.2, *[0.0] * 10]).repeat(8, 1)
    s[1, 4], s[2, 4], s[3, 9], s[4, 0], s[5, 0], s[6, 4] = 101, -101, -101, torch.nan, torch.inf, torch.nan
    assert mopo.terminated("Hopper", s).tolist() == [False, *[True] * 6, False]
    env = gym.make("Hopper-v5").unwrapped
    env.reset(seed=0)
    for value in 99, 101, -99, -101:
        env.set_state(env.init_qpos + value * np.eye(6)[4], env.init_qvel)
        assert (not env.is_healthy) == (abs(value) > 100)
        assert mopo.terminated("Hopper", torch.tensor(env._get_obs())).item() == (abs(value) > 100)


def replay_of(*counts, N=8):
    """A buffer to which seed k was given the numbers 1 .. counts[k], a few at a time."""
    replay, added = mopo.Replay(len(counts), N, OBS, ACT), np.zeros(len(counts), int)
    while (added < counts).any():
        valid = torch.rand(len(counts), 5) < 0.5
        r = torch.zeros(valid.shape)
        for k in range(len(counts)):
            for j in valid[k].nonzero().flatten().tolist():
                if added[k] < counts[k]:
                    added[k] += 1
                    r[k, j] = added[k]
                else:
                    valid[k, j] = False
        wide = lambda n: r.unsqueeze(-1).expand(*r.shape, n)
        replay.add(valid, wide(OBS), wide(ACT), r, wide(OBS), r > 0)
    return replay


def test_buffer_keeps_the_last_steps_of_each_seed():
    counts, N = (3, 8, 21), 8
    replay = replay_of(*counts, N=N)
    assert replay.count.tolist() == list(counts)
    for k, n in enumerate(counts):
        assert sorted(replay.r[k].tolist()) == sorted([*range(max(n - N, 0) + 1, n + 1), *[0] * max(N - n, 0)])
    s, a, r, s_next, d = replay.sample(500)
    assert s.shape == s_next.shape == (S, 500, OBS) and a.shape == (S, 500, ACT) and r.shape == d.shape == (S, 500)
    assert (s == r.unsqueeze(-1)).all() and (a == r.unsqueeze(-1)).all() and (s_next == s).all() and (d == 1).all()
    assert [len(x.unique()) for x in r] == [3, 8, 8] and (r > 0).all()


def test_rollouts_stop_where_they_terminate(monkeypatch):
    """A model that counts: s' = s + 1, and rows end at 4, so that the starts 0, 1, 2, 3 give 4, 3, 2, 1 steps."""
    data, args = toy(name="count"), args_for(penalty=2.0)
    data.obs = torch.arange(4.0).repeat(25).unsqueeze(-1).expand(100, OBS).contiguous()
    agent = agent_for(args, data)
    monkeypatch.setattr(mopo, "imagine", lambda model, elites, s, a: (10 * s[..., 0], s + 1, s[..., 1]))
    monkeypatch.setattr(mopo, "terminated", lambda env, s: s[..., 0] >= 4)
    agent.rollout()
    replay = agent.replay
    for k in range(S):
        n = int(replay.count[k])
        s, s_next, r, d = replay.s[k, :n, 0], replay.s_next[k, :n, 0], replay.r[k, :n], replay.d[k, :n]
        assert (s <= 3).all() and torch.equal(s_next, s + 1) and torch.equal(d, (s_next == 4).float())
        assert torch.equal(r, 10 * s - 2.0 * s)  # the penalty
        starts = args.rollout_batch - d.sum()
        assert d.sum() == args.rollout_batch and starts == 0  # each ends once: horizon 6 is long enough
        count = [int((s == v).sum()) for v in range(4)]
        assert count == sorted(count) and count[3] == args.rollout_batch  # all come through 3, and none begins twice
    assert len(set(replay.count.tolist())) > 1  # the seeds begin elsewhere


def test_rollouts_end_at_the_horizon_and_start_in_the_data(monkeypatch):
    agent = agent_for(args_for(horizon=2))
    monkeypatch.setattr(mopo, "imagine", lambda model, elites, s, a: (s[..., 0], s + 100, s[..., 0]))
    agent.rollout()
    assert agent.replay.count.tolist() == [22] * S and agent.replay.r.shape == (S, 5 * 11 * 2)
    starts = {tuple(row) for row in agent.data.obs.tolist()}
    for k in range(S):
        assert all(tuple(row) in starts for row in agent.replay.s[k, :11].tolist())
        assert torch.equal(agent.replay.s[k, 11:22], agent.replay.s_next[k, :11])
    assert (agent.replay.a.abs() <= 1).all() and agent.replay.a[:, :22].std(1).min() > 0.1  # the policy's own noise


@pytest.mark.parametrize("batch_size, real", [(40, 2), (100, 5), (256, 12)])
def test_one_row_in_twenty_is_data(batch_size, real, monkeypatch):
    agent, seen, loss = agent_for(args_for(batch_size=batch_size)), [], mopo.critic_loss
    agent.replay.add(torch.ones(S, 9, dtype=torch.bool), torch.randn(S, 9, OBS), torch.randn(S, 9, ACT),
                     torch.full((S, 9), 5.0), torch.randn(S, 9, OBS), torch.zeros(S, 9))
    monkeypatch.setattr(mopo, "critic_loss", lambda *x: seen.append(x[4]) or loss(*x))
    losses = agent.update()
    s, a, r, s_next, d = seen[0]
    assert (r == 1).sum(1).tolist() == [real] * S and (r == 5).sum(1).tolist() == [batch_size - real] * S
    assert s.shape == s_next.shape == (S, batch_size, OBS) and a.shape == (S, batch_size, ACT) and d.shape == r.shape
    assert {name: tuple(x.shape) for name, x in losses.items()} == dict.fromkeys(
        ["critic_loss", "actor_loss", "alpha_loss", "q_start"], (S,))


def test_log_deviation_is_cut_off_at_2_and_the_entropy_is_the_flags():
    actor = mopo.Actor(S, OBS, ACT, 16)
    torch.nn.init.constant_(actor.net[-1].bias, 30.0)
    _, log_prob = actor.sample(torch.zeros(S, 20_000, OBS))
    assert log_prob.isfinite().all()
    torch.nn.init.constant_(actor.net[-1].bias, 0.0)
    with torch.no_grad():
        actor.net[-1].bias[..., ACT:] = -100
    a, _ = actor.sample(torch.zeros(S, B, OBS))
    torch.testing.assert_close(a, actor(torch.zeros(S, B, OBS)), atol=1e-6, rtol=0)  # a deviation of e^-20
    alpha, log_prob = mopo.Temperature(S), torch.randn(S, B)
    loss = mopo.alpha_loss(alpha, log_prob, args_for(target_entropy=-3.0))
    assert loss.tolist() == pytest.approx([-np.mean([x - 3 for x in row]) for row in log_prob.tolist()], rel=1e-5)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_seeds_fit_together_as_they_fit_apart(monkeypatch, double):
    rand, split, data, flags = torch.rand, mopo.split, toy(), dict(model_epochs=60, batch_size=20, model_lr=0.01)

    def fit(S, who):
        agent, calls = agent_for(args_for(num_seeds=S, **flags), data), []

        def draw(shape, device):  # of agent k, whether it is alone or not
            calls.append(0)
            torch.manual_seed(len(calls))
            return rand(3, *shape[1:])[who]

        monkeypatch.setattr(torch, "rand", draw)
        monkeypatch.setattr(mopo, "split", lambda N, args: [x[who] for x in split(N, args_for())])
        for model in agent.dynamics, agent.dynamics_best:
            model.load_state_dict({name: x[who] for name, x in start.items()})
        for _ in agent.fit():
            pass
        return agent

    start = {name: x.clone() for name, x in agent_for(args_for(), data).dynamics.state_dict().items()}
    together, apart = fit(S, slice(None)), [fit(1, slice(k, k + 1)) for k in range(S)]
    ended = [int(one.fitted.epoch) for one in apart]
    assert len(set(ended)) > 1 and together.fitted.epoch == max(ended) < 60  # some stop before others
    for k, one in enumerate(apart):
        for name, x in one.state_dict().items():
            if name.startswith(("fitted.error", "dynamics_best")):
                torch.testing.assert_close(x[0], together.state_dict()[name][k])


def test_nan_in_seed_0_leaves_the_others_bit_identical_in_fit_rollouts_and_updates():
    found = []
    for poison in False, True:
        agent = agent_for(args_for(model_epochs=3, batch_size=16))
        if poison:
            agent.dynamics.layers[2].weight.data[0, 1] = torch.nan
        for _ in agent.fit():
            pass
        if poison:
            assert agent.fitted.error.isinf().tolist() == [[True] * 2, [False] * 2, [False] * 2]  # they share bounds
            agent.dynamics_best.layers[2].weight.data[0] = torch.nan
        for _ in range(2):
            agent.rollout()
            losses = agent.update()
        found.append({name: x for name, x in flat(agent.state_dict()).items() if x.dim()})
    clean, poisoned = found
    assert all(torch.equal(x[1:], poisoned[name][1:]) for name, x in clean.items())
    assert losses["critic_loss"].isnan().tolist() == [True, False, False]


def test_a_linear_gaussian_system_is_learned():
    """s' = s + A s + C a + noise, r = -s_0 + noise: the means, and deviations of 0.2 (r) and 0.4 (s')."""
    torch.manual_seed(0)
    N, A, C = 4000, 0.3 * torch.randn(2, 2), torch.randn(1, 2)
    obs, action = torch.randn(N, 2), torch.rand(N, 1) * 2 - 1
    delta = lambda s, a: s @ A + a @ C
    data = SimpleNamespace(obs=obs, action=action, next_obs=obs + delta(obs, action) + 0.4 * torch.randn(N, 2),
                           reward=-obs[:, 0] + 0.2 * torch.randn(N), terminated=torch.zeros(N),
                           episode=torch.zeros(N, dtype=torch.long))
    agent = mopo.Agent(args_for(model_hidden_dim=32, batch_size=64, model_epochs=60, model_lr=3e-3), 2, 1, data)
    epochs = sum(1 for _ in agent.fit())
    assert 6 < epochs < 60  # it stops by itself
    s, a = torch.randn(1000, 2), torch.rand(1000, 1) * 2 - 1
    with torch.no_grad():
        mean, logvar = agent.dynamics_best(torch.cat([s, a], -1).expand(S, 1, 1000, 3))
    truth = torch.cat([-s[:, :1], delta(s, a)], -1)
    assert (mean - truth).square().mean(-2).sqrt().max() < 0.1
    std = (0.5 * logvar).exp().mean(-2)  # (S, E, 3)
    torch.testing.assert_close(std, torch.tensor([0.2, 0.4, 0.4]).expand_as(std), rtol=0.2, atol=0)
    torch.testing.assert_close(agent.fitted.error, torch.full((S, E), (0.04 + 2 * 0.16) / 3), rtol=0.15, atol=0)


def run(hopper, out, **flags):
    return mopo.main(mopo.Args(**{**dict(
        dataset_id=str(hopper), out_dir=str(out), device="cpu", num_seeds=2, num_updates=40, eval_every=20,
        eval_episodes=2, batch_size=40, hidden_dim=16, num_models=3, num_elites=2, model_hidden_dim=8,
        model_epochs=4, horizon=3, rollout_every=10, rollout_batch=50), **flags}))


@pytest.fixture(scope="module")
def whole(hopper, tmp_path_factory):
    return run(hopper, tmp_path_factory.mktemp("whole"))


def test_a_run_logs_its_losses_and_keeps_what_it_imagined(whole):
    rows = [(row["update"], row["seed"], row["name"]) for row in csv.DictReader((whole / "losses.csv").open())]
    names = "critic_loss", "actor_loss", "alpha_loss", "q_start"
    assert rows == [("40", seed, name) for seed in "01" for name in names]
    count = checkpoint(whole)["agent"]["replay.count"]
    assert (count > 4 * 50).all() and (count <= 4 * 50 * 3).all()  # rollouts before updates 1, 11, 21 and 31


def stop(monkeypatch, owner, name, at, number=signal.SIGTERM):
    """Lets a signal arrive in the given call of a method."""
    method, calls = getattr(owner, name), []

    def patched(*args):
        calls.append(0)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return method(*args)

    monkeypatch.setattr(owner, name, patched)


@pytest.mark.parametrize("name, at, update", [("keep", 2, 0), ("keep", 4, 0), ("update", 17, 17), ("update", 30, 30)])
def test_resume_equals_uninterrupted_to_the_bit_in_both_phases(
        name, at, update, whole, hopper, tmp_path, monkeypatch):
    stop(monkeypatch, mopo.Agent, name, at)
    with pytest.raises(SystemExit) as stopped:
        run(hopper, tmp_path)
    monkeypatch.undo()
    (folder,) = tmp_path.iterdir()
    state = checkpoint(folder)
    assert stopped.value.code == f"mopo: stopped at update {update}; go on with --resume {folder}"
    assert state["update"] == update and state["agent"]["fitted.epoch"] == (at if name == "keep" else 4)
    assert resume(mopo, folder) == folder
    a, b = checkpoint(whole), checkpoint(folder)
    for part in "update", "agent", "moments", "rng":
        assert same(a[part], b[part]), part
    for file in "eval.csv", "losses.csv":
        assert (whole / file).read_text() == (folder / file).read_text()


def test_the_fitted_model_is_saved_before_the_first_update(hopper, tmp_path, monkeypatch):
    monkeypatch.setattr(mopo.Agent, "rollout", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(hopper, tmp_path)
    monkeypatch.undo()
    (folder,) = tmp_path.iterdir()
    state = checkpoint(folder)
    assert state["update"] == 0 and state["agent"]["fitted.error"].isfinite().all()
    monkeypatch.setattr(mopo, "model_loss", lambda *args: 1 / 0)  # it is not fitted again
    resume(mopo, folder)


def test_a_seed_whose_fit_diverges_is_named_once_and_the_other_goes_on(whole, hopper, tmp_path, monkeypatch, capsys):
    loss = mopo.model_loss
    monkeypatch.setattr(mopo, "model_loss", lambda *x: loss(*x) * torch.tensor([1.0, torch.nan]))
    folder = run(hopper, tmp_path)
    assert capsys.readouterr().err.count("seed 1: ") == 1
    clean, spoilt = ([*csv.reader((path / "eval.csv").open())][1:] for path in (whole, folder))
    assert [row for row in spoilt if row[1] == "0"] == [row for row in clean if row[1] == "0"]
    assert [row[3:] for row in spoilt if row[1] == "1"] == [["nan"] * 4 + [""]] * 2


@pytest.mark.parametrize("flags, part", [
    ({"eval_episodes": 0}, "no rule ends imagined episodes of None: --env-id"),
    ({"env_id": "Swimmer-v5"}, "no rule ends imagined episodes of Swimmer: --env-id"),
    ({"horizon": 0}, "--horizon cannot be 0"), ({"real_ratio": 1.5}, "--real-ratio 1.5 of --batch-size 40"),
    ({"batch_size": 16}, "--real-ratio 0.05 of --batch-size 16")])
def test_bad_input_is_one_sentence_and_nothing_written(flags, part, hopper, tmp_path):
    if flags.get("env_id") == "Swimmer-v5":
        hopper = made(tmp_path / "swimmer-v0", [50], ["timeout"], obs_dim=8, act_dim=2)
    with pytest.raises(SystemExit) as stopped:
        run(hopper, tmp_path / "out", **flags)
    message = stopped.value.code
    assert message.startswith("mopo: ") and part in message and "\n" not in message and not (tmp_path / "out").exists()


def test_no_evaluation_but_a_rule_by_env_id(hopper, tmp_path):
    folder = run(hopper, tmp_path, eval_episodes=0, env_id="Hopper-v5", num_updates=5)
    assert len((folder / "eval.csv").read_text().splitlines()) == 1
