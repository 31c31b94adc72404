"""marwil.py: both heads and their losses by hand, the moving norm of the advantages, returns, and a bandit in closed form."""
import csv
import math
from pathlib import Path
from types import SimpleNamespace

import awr
import marwil
import numpy as np
import pytest
import torch
from conftest import checkpoint, flat, resume, same, small, stop_at

S, B, O, A = 3, 5, 4, 6


def head(net, k, x):
    """The last layer of one network by plain matrix products, on one vector."""
    x = x.unsqueeze(0)
    for layer in net:
        x = x @ layer.weight[k] + layer.bias[k] if hasattr(layer, "weight") else layer(x)
    return x[0].detach()


def toy():
    torch.manual_seed(1)
    actor = marwil.Actor(S, O, A, 8)
    actor.log_std.data += torch.linspace(-1, 1, S * A).view(S, 1, A)
    return actor, (torch.randn(S, B, O), torch.rand(S, B, A) * 2 - 1, torch.randn(S, B))


def close(tensor, expected):
    assert tensor.shape == (S,)
    np.testing.assert_allclose(tensor.detach(), expected, rtol=2e-5, atol=1e-6)


def test_losses_of_two_heads_by_hand():
    """The last output of the network is V, the others are the mean. The third of a batch is R to V and w to pi."""
    actor, (s, a, x) = toy()
    errors, policy = np.zeros((2, S))
    for k in range(S):
        for i in range(B):
            *mean, v = head(actor.net, k, s[k, i])
            errors[k] += (x[k, i] - v).item() ** 2 / B
            normal = torch.distributions.Normal(torch.stack(mean).tanh(), actor.log_std[k, 0].detach().exp())
            policy[k] -= x[k, i].item() * normal.log_prob(a[k, i]).sum().item() / B
    assert actor(s).shape == (S, B, A) and actor.value(s).shape == (S, B)
    close(marwil.value_loss(actor.value, (s, a, x)), errors)
    close(marwil.actor_loss(actor, (s, a, x)), policy)


def test_weights_by_hand():
    """beta multiplies, c of the own seed divides; 20 at most, after exp, which overflows here; 1 for a clone."""
    adv, square = torch.randn(S, B) * 10, torch.tensor([1.0, 100.0, 1e4])
    adv[1, 2] = 1e4
    w = marwil.weights(adv, square, SimpleNamespace(beta=0.7))
    for k in range(S):
        for i in range(B):
            x = 0.7 * adv[k, i].item() / math.sqrt(square[k])
            assert w[k, i].item() == pytest.approx(min(math.exp(min(x, 50)), 20), rel=1e-4)
    assert w[1, 2] == 20 and (marwil.weights(adv, square, SimpleNamespace(beta=0.0)) == 1).all()


LENGTHS, ENDS = [5, 1, 9, 1, 2, 6], ["terminal", "timeout", "timeout", "terminal", "", "terminal"]


def steps(lengths=LENGTHS, ends=ENDS):
    rng, N = np.random.default_rng(0), sum(lengths)
    draw = lambda *size: torch.tensor(rng.normal(size=size)).float()
    data = SimpleNamespace(obs=draw(N, O), next_obs=draw(N, O), action=draw(N, A).tanh(), reward=draw(N))
    data.episode = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    data.terminated = torch.zeros(N)
    for end, kind in zip(np.cumsum(lengths) - 1, ends):
        data.terminated[end] = float(kind == "terminal")
    inner = data.episode[1:] == data.episode[:-1]
    data.next_obs[:-1][inner] = data.obs[1:][inner]
    return data


def agent_for(S=S, data=None, **flags):
    args = marwil.Args(**{**dict(num_seeds=S, hidden_dim=16, batch_size=8, turn_steps=3, device="cpu"), **flags})
    data = data or steps()
    marwil.prepare(data, args)
    torch.manual_seed(0)
    return marwil.Agent(args, data.obs.shape[1], data.action.shape[1], data)


@pytest.mark.parametrize("lam", [1.0, 0.6])
def test_returns_by_hand(lam):
    """Monte-Carlo returns, which go on with V where an episode is cut off and not where it terminates; or TD(lambda)."""
    agent = agent_for(td_lambda=lam, gamma=0.9)
    agent.actor.net[-1].bias.data[..., -1] += torch.tensor([1.0, 5, 25]).view(S, 1)
    agent.turn()
    data, n = agent.data, 24
    for k in range(S):
        v_next = [head(agent.actor.net, k, x)[-1].item() for x in data.next_obs]
        ret = [0.0] * n
        for t in reversed(range(n)):
            if t + 1 == n or data.episode[t + 1] != data.episode[t]:
                ret[t] = data.reward[t].item() + 0.9 * (1 - data.terminated[t].item()) * v_next[t]
            else:
                ret[t] = data.reward[t].item() + 0.9 * ((1 - lam) * v_next[t] + lam * ret[t + 1])
        np.testing.assert_allclose(agent.ret[k], ret, rtol=1e-4, atol=1e-4)


def test_norm_moves_with_the_advantages_of_each_seed_and_is_used_as_it_is_then(monkeypatch):
    """c^2 <- c^2 + rate (E[A^2] - c^2), from 100, by the V before the step."""
    agent, used = agent_for(norm_rate=0.1), []
    agent.actor.net[-1].bias.data[..., -1] += torch.tensor([1.0, 30, 900]).view(S, 1)
    monkeypatch.setattr(marwil, "weights", lambda adv, square, args, f=marwil.weights: (
        used.append((adv.clone(), square.clone())) or f(adv, square, args)))
    agent.turn()
    square = np.full(S, 100.0)
    for _ in range(4):
        agent.update()
        adv, now = used[-1]
        square += 0.1 * (adv.double().square().mean(-1).numpy() - square)
        np.testing.assert_allclose(now, square, rtol=1e-4)
        assert adv.shape == (S, 8) and not adv.requires_grad and not agent.square.requires_grad
    torch.testing.assert_close(agent.square, now)
    assert agent.square[0] < agent.square[1] < agent.square[2]


def test_at_the_papers_rate_the_norm_does_not_move():
    agent = agent_for(norm_rate=1e-8)
    agent.data.reward *= 50
    agent.turn()
    for _ in range(20):
        agent.update()
    assert (agent.square - 100).abs().max() < 0.01


def test_the_step_is_down_the_sum_and_weights_have_no_gradient(monkeypatch):
    """The head of V learns from L_V alone, that of pi from L_pi alone, the trunk from L_pi + value_weight L_V / c^2."""
    agent, seen = agent_for(value_weight=0.3), []
    monkeypatch.setattr(marwil, "step", lambda opt, loss: seen.append(loss))
    monkeypatch.setattr(marwil, "draw", lambda data, x, args: batch)
    batch = torch.randn(S, 8, O), torch.rand(S, 8, A) * 2 - 1, 10 * torch.randn(S, 8)
    agent.update()
    params = list(agent.actor.parameters())
    found = torch.autograd.grad(seen[0].sum(), params)
    s, a, ret = batch
    adv = ret - agent.actor.value(s)
    c2 = torch.tensor((99 + 0.01 * adv.square().mean(-1)).tolist())
    w = torch.tensor((adv / c2.sqrt().unsqueeze(-1)).exp().clamp(max=20).tolist())
    loss = -(w * agent.actor.log_prob(s, a)).mean(-1) + 0.3 * adv.square().mean(-1) / c2
    for x, y in zip(found, torch.autograd.grad(loss.sum(), params)):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_a_bandit_in_closed_form():
    """Reward -(a - 0.5)^2 under uniform actions: pi is the Gaussian nearest to exp(beta A / c), c the deviation of A."""
    n, beta, a = 2000, 2.5, np.linspace(-1, 1, 2000)
    zeros, action = torch.zeros(n, 1), torch.tensor(a).float().unsqueeze(-1)
    data = SimpleNamespace(obs=zeros, next_obs=zeros, action=action, reward=-(action[:, 0] - 0.5).square(),
                           terminated=torch.ones(n), episode=torch.arange(n))
    agent = agent_for(data=data, beta=beta, batch_size=128, learning_rate=1e-2, norm_rate=0.05)
    agent.turn()
    for i in range(400):
        if i == 300:
            agent.actor_opt.param_groups[0]["lr"].fill_(1e-3)
        agent.update()
    adv = -np.square(a - 0.5)
    adv -= adv.mean()
    weight = np.minimum(np.exp(beta * adv / adv.std()), 20)
    mean = (weight * a).sum() / weight.sum()
    assert 0.3 < mean < 0.48
    np.testing.assert_allclose(agent.square.sqrt(), np.full(S, adv.std()), rtol=0.1)
    np.testing.assert_allclose(agent.policy(agent.data.obs[:1])[:, 0, 0].detach(), np.full(S, mean), atol=0.05)


def test_without_beta_it_clones():
    n = 500
    torch.manual_seed(0)
    data = SimpleNamespace(obs=torch.zeros(n, 1), next_obs=torch.zeros(n, 1), action=torch.rand(n, 1) * 0.5, reward=torch.rand(n),
                           terminated=torch.ones(n), episode=torch.arange(n))
    agent = agent_for(data=data, beta=0.0, batch_size=64, learning_rate=1e-2)
    agent.turn()
    for _ in range(200):
        agent.update()
    np.testing.assert_allclose(agent.policy(agent.data.obs[:1])[:, 0, 0].detach(), np.full(S, 0.25), atol=0.05)
    *_, last = agent.actor.net
    assert not last.weight.grad[..., -1].any() and last.weight.grad[..., 0].any()  # V has no part in a clone


# --- as tests/test_runs.py does, on labels of all steps ---
def tensors_of(agent):
    opts = {name: x.state_dict()["state"] for name, x in vars(agent).items() if isinstance(x, torch.optim.Optimizer)}
    return {name: x for name, x in flat({"agent": agent.state_dict(), **opts}).items() if x.dim()}


def trained(agent, monkeypatch, who=slice(None)):
    """Two turns with prepared draws, those of the seeds `who` of S."""
    rng, randint = torch.Generator().manual_seed(5), torch.randint
    monkeypatch.setattr(torch, "randint", lambda high, shape, **_: randint(high, (S, *shape[1:]), generator=rng)[who])
    for _ in range(2):
        agent.turn()
        for _ in range(3):
            agent.update()
    monkeypatch.undo()
    return tensors_of(agent)


def test_nan_in_seed_0_leaves_the_others_bit_identical(monkeypatch):
    found = []
    for poison in False, True:
        agent = agent_for()
        if poison:
            agent.actor.net[0].weight.data[0] = torch.nan
        found.append(trained(agent, monkeypatch))
    clean, poisoned = found
    assert all(torch.equal(x[1:], poisoned[name][1:]) for name, x in clean.items())
    assert poisoned["/agent/square"][0].isnan() and poisoned["/agent/ret"][0].isnan().any()


def test_seeds_together_equal_seeds_apart(monkeypatch):
    together = agent_for()
    start = {name: x.clone() for name, x in tensors_of(together).items()}
    together = trained(together, monkeypatch)
    for k in range(S):
        apart = agent_for(1)
        for name, x in tensors_of(apart).items():
            x.copy_(start[name][k : k + 1])
        for name, x in trained(apart, monkeypatch, slice(k, k + 1)).items():
            torch.testing.assert_close(x[0], together[name][k], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("stop", [16, 26])
def test_resume_equals_uninterrupted_to_the_bit(stop, hopper, tmp_path, monkeypatch):
    """At the end of a turn and within one."""
    flags = dict(num_seeds=2, turn_steps=8)
    whole = marwil.main(small("marwil", hopper, tmp_path / "a", **flags))
    stop_at(marwil, stop, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        marwil.main(small("marwil", hopper, tmp_path / "b", **flags))
    monkeypatch.undo()
    (folder,) = (tmp_path / "b").iterdir()
    assert stopped.value.code == f"marwil: stopped at update {stop}; go on with --resume {folder}"
    resume(marwil, folder)
    a, b = checkpoint(whole), checkpoint(folder)
    assert a["update"] == 40 and all(same(a[part], b[part]) for part in ("update", "agent", "moments", "rng"))
    for name in "eval.csv", "losses.csv":
        assert (whole / name).read_text() == (folder / name).read_text()
    rows = list(csv.DictReader((whole / "losses.csv").open()))
    assert {row["name"] for row in rows} == {"value_loss", "actor_loss"} and all(math.isfinite(float(x["value"])) for x in rows)
    policy = torch.export.load(whole / "policy.pt2").module()
    assert policy(torch.zeros(7, 11)).shape == (2, 7, 3)
    assert all(x.shape[0] == 2 for x in flat(a["agent"]).values())


@pytest.mark.parametrize("flags", [{"norm_rate": 1.5}, {"td_lambda": 1.1}])
def test_bad_flags_are_one_sentence(flags, hopper, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        marwil.main(small("marwil", hopper, tmp_path / "out", **flags))
    assert stopped.value.code == "marwil: --td-lambda and --norm-rate have to be at most 1" and not (tmp_path / "out").exists()


# --- discrete actions, as in awr.py ---
@pytest.mark.parametrize("module", [awr, marwil])
def test_discrete_actions_by_hand(module, monkeypatch):
    monkeypatch.setattr(module, "DISCRETE", True)
    torch.manual_seed(0)
    actor, s = module.Actor(S, O, A, 8), torch.randn(S, B, O)
    a, w, expected = torch.randint(A, (S, B)), torch.rand(S, B), np.zeros(S)
    for k in range(S):
        for i in range(B):
            logits = head(actor.net, k, s[k, i])[:A]
            expected[k] -= w[k, i].item() * (logits[a[k, i]] - logits.logsumexp(0)).item() / B
            assert actor(s)[k, i] == logits.argmax()
    close(module.actor_loss(actor, (s, a, w)), expected)
    assert len(list(actor.parameters())) == 6  # no deviation, which no gradient would reach


@pytest.mark.parametrize("module", [awr, marwil])
def test_a_run_on_discrete_actions(module, hopper, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "DISCRETE", False)  # main sees what the data are
    cartpole = Path(hopper).parents[1] / "cartpole" / "tiny-v0"
    folder = module.main(small(module.__name__, cartpole, tmp_path, num_seeds=2, turn_steps=20))
    policy = torch.export.load(folder / "policy.pt2").module()
    assert policy(torch.zeros(7, 4)).shape == (2, 7) and policy(torch.zeros(7, 4)).dtype == torch.long
    assert len((folder / "eval.csv").read_text().splitlines()) == 5
