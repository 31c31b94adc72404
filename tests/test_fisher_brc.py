"""fisher_brc.py: the mixture's density, losses by hand, the penalty by finite differences, cloning that resumes."""
import math
from types import SimpleNamespace

import fisher_brc as m
import numpy as np
import pytest
import torch
from conftest import checkpoint, resume, same, small
from torch.distributions import Categorical, MixtureSameFamily, Normal, TransformedDistribution, transforms

S, E, B, O, A, K = 3, 2, 5, 4, 6, 7
ARGS = SimpleNamespace(gamma=0.9, penalty=0.3)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    d = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0]).expand(S, B)
    return torch.randn(S, B, O), torch.rand(S, B, A) * 1.8 - 0.9, torch.randn(S, B), torch.randn(S, B, O), d


def toy():
    torch.manual_seed(1)
    behaviour = m.Behaviour(S, O, A, 8, K)
    behaviour.net[-1].bias.data += torch.linspace(-1, 1, S * 3 * A * K).view(S, 1, -1)
    return m.Critic(S, O, A, 8), m.Critic(S, O, A, 8), m.Actor(S, O, A, 8), behaviour, m.Temperature(S)


def test_log_mu_is_a_mixture_of_squashed_normals_for_each_dimension(batch):
    s, a, *_ = batch
    behaviour = toy()[3].double()
    log_w, mean, log_std = behaviour(s.double())
    assert log_w.shape == mean.shape == log_std.shape == (S, B, A, K)
    torch.testing.assert_close(log_w.exp().sum(-1), torch.ones(S, B, A).double())
    mixture = MixtureSameFamily(Categorical(logits=log_w), Normal(mean, log_std.exp()))
    squashed = TransformedDistribution(mixture, [transforms.TanhTransform()])
    log_prob = behaviour.log_prob(s.double(), a.double())
    assert log_prob.shape == (S, B)
    torch.testing.assert_close(log_prob, squashed.log_prob(a.double()).sum(-1))
    assert behaviour.log_prob(s.double(), a.double().sign()).isfinite().all()  # on the bounds


def test_draws_of_mu_have_its_weights():
    behaviour = m.Behaviour(1, O, 1, 8, 2)
    layer = behaviour.net[-1]
    layer.weight.data.zero_()
    layer.bias.data[0, 0] = torch.tensor([math.log(0.8), math.log(0.2), -1.0, 1.0, -5.0, -5.0])
    drawn = behaviour.sample(torch.randn(1, 4000, O))
    assert drawn.shape == (1, 4000, 1) and (drawn > 0).float().mean().item() == pytest.approx(0.2, abs=0.03)
    torch.testing.assert_close(drawn.abs(), torch.full_like(drawn, math.tanh(1)), atol=0.03, rtol=0)


def q_of(net, k, e, s, a):
    x = torch.cat([s, a])
    for layer in net:
        x = x @ layer.weight[k, e] + layer.bias[k, e, 0] if hasattr(layer, "weight") else layer(x)
    return x.item()


def test_critic_by_hand(batch):
    """y without entropy, by the offset and log mu of s'; the penalty's gradient by finite differences at a ~ pi(s)."""
    s, a, r, s_next, d = batch
    critic, critic_target, actor, behaviour, _ = toy()
    torch.manual_seed(7)
    loss, slope = m.critic_loss(critic, critic_target, actor, behaviour, batch, ARGS)
    torch.manual_seed(7)
    with torch.no_grad():
        (a_next, _), (pi, _) = actor.sample(s_next), actor.sample(s)
        log_next, log_mu = behaviour.log_prob(s_next, a_next), behaviour.log_prob(s, a)
    fine, expected, slopes, h = critic.double(), np.zeros(S), np.zeros(S), 1e-5
    for k in range(S):
        for i in range(B):
            offset = min(q_of(critic_target.net, k, e, s_next[k, i], a_next[k, i]) for e in range(E))
            y = r[k, i].item() + 0.9 * (1 - d[k, i].item()) * (offset + log_next[k, i].item())
            for e in range(E):
                x, at = s[k, i].double(), pi[k, i].double()
                q = q_of(fine.net, k, e, x, a[k, i].double()) + log_mu[k, i].item()
                expected[k] += (q - y) ** 2 / B
                for j in range(A):
                    step = h * torch.eye(A).double()[j]
                    rise = q_of(fine.net, k, e, x, at + step) - q_of(fine.net, k, e, x, at - step)
                    slopes[k] += (rise / (2 * h)) ** 2 / B
    assert loss.shape == slope.shape == (S,)
    np.testing.assert_allclose(slope, slopes, rtol=1e-3)
    np.testing.assert_allclose(loss.detach(), expected + 0.3 * slopes, rtol=1e-3)


def test_the_penalty_reaches_the_weights_as_through_relu(batch):
    """A double backward by torch's own ReLU, in float64."""
    s, a, *_ = (x.double() for x in batch)
    critic = toy()[0].double()
    found = torch.autograd.grad(critic.slope(s, a).sum(), critic.parameters(), allow_unused=True)
    at = a.unsqueeze(1).repeat(1, E, 1, 1).requires_grad_()
    q = critic.net(torch.cat([s.unsqueeze(1).expand(S, E, B, O), at], -1))
    (grad,) = torch.autograd.grad(q.sum(), at, create_graph=True)
    expected = torch.autograd.grad(grad.square().sum(), critic.parameters(), allow_unused=True)
    for x, y in zip(found, expected):
        if x is not None and y is not None:
            torch.testing.assert_close(x, y)
    assert any(x is not None and x.abs().sum() > 0 for x in found)


def test_actor_climbs_offset_and_log_mu(batch):
    s, *_ = batch
    critic, _, actor, behaviour, alpha = toy()
    alpha.log_alpha.data = torch.tensor([-1.0, 0.0, 1.0])
    torch.manual_seed(7)
    loss, log_prob = m.actor_loss(actor, critic, behaviour, alpha, batch)
    torch.manual_seed(7)
    pi, log_pi = (x.detach() for x in actor.sample(s))
    log_mu = behaviour.log_prob(s, pi).detach()
    for k in range(S):
        terms = [math.exp(k - 1) * log_pi[k, i].item() - log_mu[k, i].item()
                 - min(q_of(critic.net, k, e, s[k, i], pi[k, i]) for e in range(E)) for i in range(B)]
        assert loss.shape == (S,) and loss[k].item() == pytest.approx(np.mean(terms), rel=1e-4)
    torch.testing.assert_close(log_prob, log_pi)
    through_mu = torch.autograd.grad(-behaviour.log_prob(s, actor.sample(s)[0]).sum(), list(actor.parameters()))
    assert all(x.abs().sum() > 0 for x in through_mu)


def test_behaviour_loss_by_hand(batch):
    s, a, *_ = batch
    behaviour, alpha = toy()[3:]
    alpha.log_alpha.data = torch.tensor([-1.0, 0.0, 1.0])
    torch.manual_seed(7)
    loss, log_prob = m.behaviour_loss(behaviour, alpha, batch)
    torch.manual_seed(7)
    drawn = behaviour.sample(s)
    own, data = behaviour.log_prob(s, drawn), behaviour.log_prob(s, a)
    expected = [(math.exp(k - 1) * own[k] - data[k]).mean().item() for k in range(S)]
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-5)
    assert log_prob.shape == (S, B) and not log_prob.requires_grad


def test_the_bonus_is_added_to_every_reward(hopper, tmp_path):
    args = small("fisher_brc", hopper, tmp_path, reward_bonus=-2.0)
    data = m.load(args)
    before = data.reward.clone()
    m.prepare(data, args)
    torch.testing.assert_close(data.reward, before - 2)


def test_mu_is_cloned_first_and_rests_then_and_its_rate_falls(hopper, tmp_path):
    args = small("fisher_brc", hopper, tmp_path, num_seeds=2, clone_updates=10)
    m.setup(args)
    data = m.load(args)
    m.prepare(data, args)
    agent, rates = m.Agent(args, data.obs_dim, data.act_dim, data), []
    for _ in range(10):
        m.clone(agent)
        rates.append(agent.mu_opt.param_groups[0]["lr"].item())
    np.testing.assert_allclose(rates, [1e-3] * 8 + [1e-4, 1e-5], rtol=1e-5)
    before = [p.clone() for p in agent.behaviour.parameters()]
    for _ in range(3):
        agent.update()
    assert all(torch.equal(x, y) for x, y in zip(before, agent.behaviour.parameters()))


@pytest.mark.parametrize("call", [7, 20])
def test_interrupted_cloning_resumes_to_the_bit(call, hopper, tmp_path, monkeypatch):
    """A signal in the seventh of 12 updates of mu, and in the eighth of the policy's."""
    flags = dict(num_seeds=2, clone_updates=12)
    whole = m.main(small("fisher_brc", hopper, tmp_path / "a", **flags))
    count, sample = [], m.sample

    def patched(data, args):
        count.append(0)
        if len(count) == call:
            import os
            import signal
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(data, args)

    monkeypatch.setattr(m, "sample", patched)
    with pytest.raises(SystemExit) as stopped:
        m.main(small("fisher_brc", hopper, tmp_path / "b", **flags))
    monkeypatch.undo()
    (folder,) = (tmp_path / "b").iterdir()
    assert f"stopped at update {max(call - 12, 0)};" in stopped.value.code
    resume(m, folder)
    a, b = checkpoint(whole), checkpoint(folder)
    assert all(same(a[part], b[part]) for part in ("update", "agent", "moments", "rng"))
    for name in "eval.csv", "losses.csv":
        assert (whole / name).read_text() == (folder / name).read_text()
