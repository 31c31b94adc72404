"""bail.py: returns beyond a cut, the envelope, its early stopping and its closed form, the selection, both phases of a run."""
import csv
import math
import os
import signal
from types import SimpleNamespace

import bail
import numpy as np
import pytest
import torch
from conftest import checkpoint, flat, resume, same, small, stop_at

S, B, O, A = 3, 5, 4, 2


def forward(net, k, x):
    """One network of a module by plain matrix products, on one vector."""
    x = x.unsqueeze(0)
    for layer in net:
        x = x @ layer.weight[k] + layer.bias[k] if hasattr(layer, "weight") else layer(x)
    return x[0].detach()


def close(tensor, expected):
    assert tensor.shape == (S,)
    np.testing.assert_allclose(tensor.detach(), expected, rtol=2e-5, atol=1e-6)


def test_losses_by_hand():
    torch.manual_seed(0)
    envelope, actor, s = bail.Envelope(S, O), bail.Actor(S, O, A, 8), torch.randn(S, B, O)
    ret, a = 0.3 * torch.randn(S, B), torch.rand(S, B, A)
    loss, clone, below = np.zeros(S), np.zeros(S), 0
    for k in range(S):
        for i in range(B):
            u = (forward(envelope.net, k, s[k, i]) - ret[k, i]).item()
            loss[k] += (1 if u >= 0 else 1000) * u**2 / B
            below += u < 0
            clone[k] += (torch.tanh(forward(actor.net, k, s[k, i])) - a[k, i]).square().sum().item() / B / A
    assert 0 < below < S * B and envelope(s).shape == (S, B) and actor(s).shape == (S, B, A)
    close(bail.envelope_loss(envelope, s, ret, SimpleNamespace(penalty=1000.0)), loss)
    close(bail.actor_loss(actor, (s, a)), clone)


def steps(lengths, ends, rewards=None, seed=0):
    rng, N = np.random.default_rng(seed), sum(lengths)
    draw = lambda *size: torch.tensor(rng.normal(size=size)).float()
    data = SimpleNamespace(obs=draw(N, O), next_obs=draw(N, O), action=draw(N, A).tanh(), reward=draw(N))
    data.reward = data.reward if rewards is None else torch.tensor(rewards).float()
    data.episode = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    data.terminated = torch.zeros(N)
    for end, kind in zip(np.cumsum(lengths) - 1, ends):
        data.terminated[end] = float(kind == "terminal")
    return data


def returns_by_hand(data, gamma):
    found = []
    for e in range(int(data.episode.max()) + 1):
        rows = (data.episode == e).nonzero().flatten()
        reward, s, T = data.reward[rows].double().numpy(), data.obs[rows].double().numpy(), len(rows)
        g = [sum(gamma ** (i - t) * reward[i] for i in range(t, T)) for t in range(T)]
        longer = list(g)
        for t in range(1, T):
            if not data.terminated[rows[-1]]:
                like = min(range(T - t + 1), key=lambda i: np.linalg.norm(s[i] - s[-1]))
                longer[t] += gamma ** (T - t) * g[like]
        found += longer
    return np.array(found) - min(0, min(found))


@pytest.mark.parametrize("lengths, ends", [
    ([5, 1, 9, 1, 2, 6, 17], ["terminal", "timeout", "timeout", "terminal", "", "terminal", "timeout"]),
    ([16], ["timeout"]), ([1, 1], ["timeout", "terminal"])])
def test_returns_by_hand(lengths, ends):
    data, reward = steps(lengths, ends), steps(lengths, ends).reward
    ret = bail.returns(data, SimpleNamespace(gamma=0.9))
    assert ret.shape == (sum(lengths),) and ret.min() >= 0 and torch.equal(data.reward, reward)
    np.testing.assert_allclose(ret, returns_by_hand(data, 0.9), rtol=1e-4, atol=1e-5)


def test_a_cut_is_no_end_without_return():
    """Reward 1 for ever: without what is added the return falls to 1 at a cut, and to 1 it falls where it terminates."""
    data = steps([400, 400], ["timeout", "terminal"], np.ones(800))
    ret = bail.returns(data, SimpleNamespace(gamma=0.9))
    assert ret[:400].min() > 9.5 and ret[799] == 1 and ret[399] == pytest.approx(1 + 0.9 * 10, rel=1e-3)


def agent_for(S=S, data=None, **flags):
    args = bail.Args(**{**dict(num_seeds=S, hidden_dim=16, batch_size=8, envelope_batch=16, device="cpu"), **flags})
    data = data or steps([5, 1, 9, 1, 2, 6, 17], ["terminal", "timeout", "timeout", "terminal", "", "terminal", "timeout"])
    bail.prepare(data, args)
    torch.manual_seed(0)
    return bail.Agent(args, data.obs.shape[1], data.action.shape[1], data)


def test_the_split_is_of_each_seed_and_trains_on_the_highest_return():
    ret, args = torch.randn(103), bail.Args(num_seeds=4, seed=7, device="cpu")
    train, holdout = bail.split(ret, args)
    assert train.shape == (4, 83) and holdout.shape == (4, 20)
    for k in range(4):
        assert sorted([*train[k].tolist(), *holdout[k].tolist()]) == list(range(103))
        assert int(ret.argmax()) in train[k]
    assert not torch.equal(train[0], train[1])
    again = bail.split(ret, bail.Args(num_seeds=2, seed=7, device="cpu"))
    assert torch.equal(again[0], train[:2]) and not torch.equal(bail.split(ret, bail.Args(num_seeds=2, device="cpu"))[0], train[:2])


def weights(module, k):
    return [p[k].clone() for p in module.parameters()]


def test_early_stopping_keeps_the_best_network_of_each_seed(monkeypatch):
    """A copy, not the same weights under another name; a seed that is through keeps what it has."""
    agent = agent_for(patience=2)
    losses = [[3, 3, 3], [2, 4, 2], [5, 5, 1], [6, 1, 3], [1, 0, 0]]  # of each epoch: seeds 0, 1 and 2
    best, stale, kept = [1, 0, 4], [3, 4, 0], []
    for loss in losses:
        for p in agent.envelope.parameters():
            p.data += 1.0
        kept.append([weights(agent.envelope, k) for k in range(S)])
        monkeypatch.setattr(bail, "envelope_loss", lambda *_, loss=loss: torch.tensor(loss).float())
        agent.keep(torch.zeros(S, 7, dtype=torch.long))
    assert agent.epoch == 5 and agent.stale.tolist() == stale and agent.holdout_loss.tolist() == [2, 3, 0]
    for p in agent.envelope.parameters():
        p.data += 1.0
    for k in range(S):
        assert all(map(torch.equal, weights(agent.envelope_best, k), kept[best[k]][k]))
        assert not any(map(torch.equal, weights(agent.envelope_best, k), weights(agent.envelope, k)))


def test_the_hold_out_loss_is_that_of_its_rows():
    agent = agent_for()
    holdout = torch.randint(41, (S, 25_000))
    agent.keep(holdout)
    data, args = agent.data, agent.args
    torch.testing.assert_close(agent.holdout_loss,
                               bail.envelope_loss(agent.envelope, data.obs[holdout], data.ret[holdout], args).detach())


@pytest.mark.parametrize("losses, epochs", [
    ([1.0] * 9, 5), ([9, 8, 7, 6, 5, 4, 3, 2, 1.0], 6), ([9, 9, 9, 9, 8, 9], 6), ([[1, 9 - i, 1] for i in range(9)], 6)])
def test_the_fit_ends_after_epochs_without_gain_in_any_seed_or_at_the_last(losses, epochs, monkeypatch):
    agent, feed = agent_for(patience=4, envelope_epochs=6), iter(losses)
    keep = agent.keep

    def scripted(holdout):
        monkeypatch.setattr(bail, "envelope_loss", lambda *_, x=next(feed): torch.tensor(x).float().expand(S))
        keep(holdout)
        monkeypatch.undo()

    agent.keep = scripted
    assert len(list(agent.fit())) == epochs == agent.epoch


def test_an_epoch_goes_over_the_training_rows_of_each_seed_once(monkeypatch):
    agent, seen = agent_for(envelope_epochs=2), []
    monkeypatch.setattr(bail, "envelope_loss", lambda envelope, s, ret, args, f=bail.envelope_loss: (
        seen.append(ret) or f(envelope, s, ret, args)))
    list(agent.fit())
    (train, holdout), ret = bail.split(agent.data.ret, agent.args), agent.data.ret
    for epoch in seen[:4], seen[4:]:  # three steps and the hold-out rows
        rows, held = torch.cat(epoch[:3], 1), epoch[3]
        for k in range(S):
            assert sorted(rows[k].tolist()) == sorted(ret[train[k]].tolist()) and not torch.equal(rows[k], ret[train[k]])
            assert held[k].tolist() == ret[holdout[k]].tolist()


@pytest.mark.parametrize("K", [1.0, 9.0, 1000.0])
def test_the_envelope_in_closed_form(K):
    """Of returns that are uniform on [0, 1] the minimiser is sqrt(K) / (1 + sqrt(K)): 1/2, 3/4, 0.97."""
    n = 2000
    zeros, ones = torch.zeros(n, 1), torch.ones(n)
    data = SimpleNamespace(obs=zeros, next_obs=zeros, action=zeros, reward=torch.linspace(0, 1, n), terminated=ones,
                           episode=torch.arange(n))
    agent = agent_for(data=data, penalty=K, envelope_batch=400, envelope_epochs=60, envelope_decay=0.0, patience=60)
    for _ in agent.fit():
        if agent.epoch == 40:
            agent.envelope_opt.param_groups[0]["lr"].fill_(3e-4)
    v = agent.envelope_best(data.obs[:1])[:, 0].detach()
    np.testing.assert_allclose(v, np.full(S, K**0.5 / (1 + K**0.5)), atol=0.02)
    above = (data.ret > v.unsqueeze(-1)).float().mean(-1)
    assert K < 1000 or (above < 0.05).all()  # it bounds the returns, but for a few


def test_the_best_steps_are_chosen_by_ratio_for_each_seed():
    agent = agent_for(select=0.3)
    for k in range(S):
        agent.envelope_best.net[-1].bias.data[k] += k
    agent.choose()
    n, ret = 12, agent.data.ret
    assert agent.selected.shape == (S, n)
    for k in range(S):
        v = [max(forward(agent.envelope_best.net, k, s).item(), 1e-6) for s in agent.data.obs]
        ratio = np.array([ret[i].item() / v[i] for i in range(41)])
        assert set(agent.selected[k].tolist()) == set(np.argsort(-ratio)[:n].tolist())
    assert len({frozenset(x.tolist()) for x in agent.selected}) > 1


def test_only_chosen_steps_are_cloned(monkeypatch):
    agent, seen = agent_for(batch_size=200), []
    agent.selected.copy_(torch.stack([torch.arange(10) + 10 * k for k in range(S)]))
    monkeypatch.setattr(bail, "actor_loss", lambda actor, batch, f=bail.actor_loss: seen.append(batch) or f(actor, batch))
    agent.update()
    s, a = seen[0]
    for k in range(S):
        rows = [int((agent.data.obs == x).all(-1).nonzero()) for x in s[k]]
        assert set(rows) == set(range(10 * k, 10 * k + 10)) and torch.equal(a[k], agent.data.action[rows])


def test_only_the_weights_of_the_envelope_decay():
    agent = agent_for(envelope_decay=0.1)
    assert [opt.param_groups[0]["weight_decay"] for opt in (agent.envelope_opt, agent.actor_opt)] == [0.1, 0]


def test_it_finds_what_is_best_in_each_state_where_a_clone_finds_the_mean():
    """Two states, one ten times as rich: reward c (1 - |a - best|). The best quarter of either is around its best action."""
    n = 2000
    rng = torch.Generator().manual_seed(0)
    rich = torch.arange(n) % 2
    best, c = torch.tensor([-0.5, 0.5])[rich], torch.tensor([1.0, 10.0])[rich]
    action = torch.rand(n, 1, generator=rng) * 2 - 1
    obs = torch.stack([rich, 1 - rich], 1).float()
    data = SimpleNamespace(obs=obs, next_obs=obs, action=action, reward=c * (1 - (action[:, 0] - best).abs()).clamp(min=0),
                           terminated=torch.ones(n), episode=torch.arange(n))
    agent = agent_for(data=data, envelope_batch=200, envelope_epochs=80, patience=80, batch_size=128)
    list(agent.fit())
    agent.choose()
    share = rich[agent.selected].float().mean(-1)
    assert ((share > 0.3) & (share < 0.7)).all()  # the poor state has its share too
    for _ in range(300):
        agent.update()
    found = agent.policy(agent.data.obs[:2])[..., 0].detach()
    np.testing.assert_allclose(found, np.tile([-0.5, 0.5], (S, 1)), atol=0.1)


# --- as tests/test_runs.py does, in both phases ---
def tensors_of(agent):
    opts = {name: x.state_dict()["state"] for name, x in vars(agent).items() if isinstance(x, torch.optim.Optimizer)}
    return {name: x for name, x in flat({"agent": agent.state_dict(), **opts}).items() if x.dim()}


def trained(agent, monkeypatch, who=slice(None)):
    """Three epochs, the choice and six updates with prepared draws, those of the seeds `who` of S."""
    rng, rand, randint, split = torch.Generator().manual_seed(5), torch.rand, torch.randint, bail.split
    monkeypatch.setattr(torch, "rand", lambda shape, **_: rand(S, *shape[1:], generator=rng)[who])
    monkeypatch.setattr(torch, "randint", lambda high, shape, **_: randint(high, (S, *shape[1:]), generator=rng)[who])
    monkeypatch.setattr(bail, "split", lambda ret, args: [x[who] for x in split(ret, bail.Args(num_seeds=S, device="cpu"))])
    list(agent.fit())
    agent.choose()
    for _ in range(6):
        agent.update()
    monkeypatch.undo()
    return tensors_of(agent)


def test_nan_in_seed_0_leaves_the_others_bit_identical(monkeypatch):
    found = []
    for poison in False, True:
        agent = agent_for(envelope_epochs=3)
        if poison:
            agent.envelope.net[0].weight.data[0] = agent.actor.net[0].weight.data[0] = torch.nan
        found.append(trained(agent, monkeypatch))
    clean, poisoned = found
    assert all(torch.equal(x[1:], poisoned[name][1:]) for name, x in clean.items())
    assert poisoned["/agent/holdout_loss"][0] == math.inf and poisoned["/agent/actor.net.0.weight"][0].isnan().all()


def test_seeds_together_equal_seeds_apart(monkeypatch):
    together = agent_for(envelope_epochs=3)
    start = {name: x.clone() for name, x in tensors_of(together).items()}
    together = trained(together, monkeypatch)
    for k in range(S):
        apart = agent_for(1, envelope_epochs=3)
        for name, x in tensors_of(apart).items():
            x.copy_(start[name][k : k + 1])
        for name, x in trained(apart, monkeypatch, slice(k, k + 1)).items():
            torch.testing.assert_close(x[0], together[name][k], rtol=1e-3, atol=1e-5, msg=name)


FLAGS = dict(num_seeds=2, envelope_batch=100, envelope_epochs=5, patience=9)


@pytest.fixture(scope="module")
def whole(hopper, tmp_path_factory):
    return bail.main(small("bail", hopper, tmp_path_factory.mktemp("whole"), **FLAGS))


@pytest.mark.parametrize("phase, at", [("fit", 2), ("fit", 5), ("train", 16)])
def test_resume_equals_uninterrupted_to_the_bit_in_both_phases(phase, at, whole, hopper, tmp_path, monkeypatch):
    keep = bail.Agent.keep

    def stopped_keep(self, holdout):
        keep(self, holdout)
        if self.epoch == at:
            os.kill(os.getpid(), signal.SIGTERM)

    if phase == "fit":
        monkeypatch.setattr(bail.Agent, "keep", stopped_keep)
    else:
        stop_at(bail, at, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        bail.main(small("bail", hopper, tmp_path, **FLAGS))
    monkeypatch.undo()
    (folder,) = tmp_path.iterdir()
    update = at if phase == "train" else 0
    assert stopped.value.code == f"bail: stopped at update {update}; go on with --resume {folder}"
    state = checkpoint(folder)
    assert state["update"] == update and state["agent"]["epoch"] == (5 if phase == "train" else at)
    resume(bail, folder)
    a, b = checkpoint(whole), checkpoint(folder)
    assert a["update"] == 40 and all(same(a[part], b[part]) for part in ("update", "agent", "moments", "rng"))
    for name in "eval.csv", "losses.csv":
        assert (whole / name).read_text() == (folder / name).read_text()


def test_a_run_leaves_its_files(whole):
    rows = list(csv.DictReader((whole / "losses.csv").open()))
    assert {row["name"] for row in rows} == {"holdout_loss", "actor_loss"} and all(math.isfinite(float(x["value"])) for x in rows)
    rows = list(csv.DictReader((whole / "eval.csv").open()))
    assert [(row["update"], row["seed"]) for row in rows] == [("20", "0"), ("20", "1"), ("40", "0"), ("40", "1")]
    policy = torch.export.load(whole / "policy.pt2").module()
    assert policy(torch.zeros(7, 11)).shape == (2, 7, 3)
    assert all(x.dim() == 0 or x.shape[0] == 2 for x in flat(checkpoint(whole)["agent"]).values())


def test_a_seed_whose_fit_diverges_is_named(hopper, tmp_path, monkeypatch, capsys):
    loss = bail.envelope_loss
    monkeypatch.setattr(bail, "envelope_loss", lambda *x: loss(*x) * torch.tensor([1.0, torch.nan]))
    bail.main(small("bail", hopper, tmp_path, **FLAGS))
    assert "seed 1: holdout_loss is inf at update 40" in capsys.readouterr().err


@pytest.mark.parametrize("select", [0.0, 1e-4, 1.5])
def test_a_share_that_is_none_is_one_sentence(select, hopper, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        bail.main(small("bail", hopper, tmp_path / "out", select=select))
    assert f"--select {select} of them is no number of steps" in stopped.value.code and "\n" not in stopped.value.code
    assert not (tmp_path / "out").exists()
