"""Each loss against a loop written by hand, on toy networks, for S = 3 seeds and E = 2 critics."""
import math
from types import SimpleNamespace

import bc
import iql
import numpy as np
import pytest
import sac
import td3_bc
import torch

S, E, B, O, A = 3, 2, 5, 4, 6
ARGS = SimpleNamespace(gamma=0.9, alpha=2.5, policy_noise=0.2, noise_clip=0.1, expectile=0.7, beta=3.0)


def close(tensor, expected):
    assert tensor.shape == (S,)
    np.testing.assert_allclose(tensor.detach().numpy(), expected, rtol=2e-5, atol=1e-6)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    d = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0]).expand(S, B)
    return torch.randn(S, B, O), torch.rand(S, B, A) * 2 - 1, torch.randn(S, B), torch.randn(S, B, O), d


def toy(module, seed):
    torch.manual_seed(seed)
    return (module.Critic(S, O, A, 8), module.Critic(S, O, A, 8),
            module.Actor(S, O, A, 8, *([0.0] if module is iql else [])))


def each():
    return [(k, i) for k in range(S) for i in range(B)]


@pytest.mark.parametrize("module", [td3_bc, iql, sac])
def test_networks_are_independent_and_shaped(module, batch):
    s, a, *_ = batch
    critic, _, actor = toy(module, 1)
    q, pi = critic(s, a), actor(s)
    assert q.shape == (S, E, B) and pi.shape == (S, B, A)
    for k in range(S):
        for e in range(E):
            x = torch.cat([s[k], a[k]], -1)
            for layer in critic.net:
                x = x @ layer.weight[k, e] + layer.bias[k, e] if hasattr(layer, "weight") else layer(x)
            torch.testing.assert_close(q[k, e], x[:, 0])


def test_bc(batch):
    s, a, *_ = batch
    actor = bc.Actor(S, O, A, 8)
    pi = actor(s).detach()
    expected = [np.mean([(pi[k, i, j] - a[k, i, j]) ** 2 for i in range(B) for j in range(A)]) for k in range(S)]
    close(bc.actor_loss(actor, batch), expected)


def test_td3_bc_critic(batch):
    s, a, r, s_next, d = batch
    critic, critic_target, actor_target = toy(td3_bc, 2)
    torch.manual_seed(7)
    loss = td3_bc.critic_loss(critic, critic_target, actor_target, batch, ARGS)
    torch.manual_seed(7)
    a_next = (actor_target(s_next) + (0.2 * torch.randn(S, B, A)).clamp(-0.1, 0.1)).clamp(-1, 1)
    q, q_next, total = critic(s, a).detach(), critic_target(s_next, a_next).detach(), np.zeros(S)
    for k, i in each():
        y = r[k, i] + 0.9 * (1 - d[k, i]) * min(q_next[k, 0, i], q_next[k, 1, i])
        total[k] += ((q[k, 0, i] - y) ** 2 + (q[k, 1, i] - y) ** 2) / B
    close(loss, total)


def test_td3_bc_actor_has_a_lambda_for_each_seed(batch):
    s, a, *_ = batch
    critic, _, actor = toy(td3_bc, 3)
    critic.net[-1].bias.data[:, 0] += torch.tensor([1.0, 10.0, 100.0]).view(S, 1, 1)  # a shared lambda mixes them
    pi = actor(s).detach()
    q, expected = critic(s, pi).detach()[:, 0], []
    for k in range(S):
        lam = 2.5 / np.mean([abs(q[k, i]) for i in range(B)])
        expected.append(np.mean([-lam * q[k, i] + np.mean([(x - y) ** 2 for x, y in zip(pi[k, i], a[k, i])])
                                 for i in range(B)]))
    close(td3_bc.actor_loss(actor, critic, batch, ARGS), expected)


def test_td3_bc_lambda_has_no_gradient(batch):
    s, a, *_ = batch
    critic, _, actor = toy(td3_bc, 3)
    grad = torch.autograd.grad(td3_bc.actor_loss(actor, critic, batch, ARGS).sum(), actor.parameters())
    pi = actor(s)
    q = critic(s, pi)[:, 0]
    lam = torch.tensor((2.5 / q.abs().mean(-1)).tolist())
    fixed = torch.autograd.grad((-lam * q.mean(-1) + (pi - a).square().mean((1, 2))).sum(), actor.parameters())
    for x, y in zip(grad, fixed):
        torch.testing.assert_close(x, y)


def test_td3_bc_first_is_q_1_and_has_no_gradient_in_the_other_critic(batch):
    s, a, *_ = batch
    critic, *_ = toy(td3_bc, 3)
    q, weights = critic.first(s, a), list(critic.parameters())
    torch.testing.assert_close(q, critic(s, a)[:, 0])
    for x, y in zip(torch.autograd.grad(q.sum(), weights), torch.autograd.grad(critic(s, a)[:, 0].sum(), weights)):
        torch.testing.assert_close(x, y)
        assert x[:, 0].any() and not x[:, 1].any()


def test_iql_value(batch):
    s, a, *_ = batch
    critic_target, value = toy(iql, 4)[1], iql.Value(S, O, 8)
    q, v, total = critic_target(s, a).detach(), value(s).detach(), np.zeros(S)
    assert v.shape == (S, B)
    for k, i in each():
        u = min(q[k, 0, i], q[k, 1, i]) - v[k, i]
        total[k] += (0.7 if u > 0 else 0.3) * u**2 / B
    close(iql.value_loss(value, critic_target, batch, ARGS), total)


def test_iql_expectile_against_its_closed_form():
    """The minimiser m satisfies tau E(Q - m)+ = (1 - tau) E(m - Q)+; tau 0.5 is the mean, 0.9 lies above it."""
    q = torch.distributions.Exponential(1.0).sample((4000,)).double()
    batch, found = (q.view(1, -1, 1), torch.zeros(1, 4000, 1)), {}
    for tau in (0.5, 0.7, 0.9):
        v = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
        for _ in range(400):
            loss = iql.value_loss(lambda s: v.expand(1, 4000), lambda s, a: s.view(1, 1, -1), batch,
                                  SimpleNamespace(expectile=tau))
            v.data -= torch.autograd.grad(loss.sum(), v)[0]
        m = found[tau] = v.item()
        above, below = (q - m).clamp(min=0).mean().item(), (m - q).clamp(min=0).mean().item()
        assert tau * above == pytest.approx((1 - tau) * below, rel=1e-6)
    assert found[0.5] == pytest.approx(q.mean().item()) and found[0.5] < found[0.7] < found[0.9]


def test_iql_critic(batch):
    s, a, r, s_next, d = batch
    critic, value = toy(iql, 5)[0], iql.Value(S, O, 8)
    q, v, total = critic(s, a).detach(), value(s_next).detach(), np.zeros(S)
    for k, i in each():
        y = r[k, i] + 0.9 * (1 - d[k, i]) * v[k, i]
        total[k] += ((q[k, 0, i] - y) ** 2 + (q[k, 1, i] - y) ** 2) / B
    close(iql.critic_loss(critic, value, batch, ARGS), total)


def test_iql_actor_weights_are_clipped_after_exp(batch):
    s, a, *_ = batch
    _, critic_target, actor = toy(iql, 6)
    actor.log_std.data += torch.linspace(-1, 1, S * A).view(S, 1, A)
    value = iql.Value(S, O, 8)
    critic_target.net[-1].bias.data[0] += 1000  # exp overflows: the weight is 100, not inf
    q, v, pi, total = critic_target(s, a).detach(), value(s).detach(), actor(s).detach(), np.zeros(S)
    for k, i in each():
        w = math.exp(min(3 * (min(q[k, 0, i], q[k, 1, i]) - v[k, i]), math.log(100)))
        for j in range(A):
            log_std = actor.log_std[k, 0, j].item()
            total[k] += w * (0.5 * ((a[k, i, j] - pi[k, i, j]) / math.exp(log_std)) ** 2 + log_std
                             + 0.5 * math.log(2 * math.pi)) / B
    close(iql.actor_loss(actor, value, critic_target, batch, ARGS), total)


def test_sac_critic_and_actor(batch):
    s, a, r, s_next, d = batch
    critic, critic_target, actor = toy(sac, 8)
    alpha = sac.Temperature(S)
    alpha.log_alpha.data = torch.tensor([-1.0, 0.0, 1.0])
    torch.manual_seed(9)
    l_q = sac.critic_loss(critic, critic_target, actor, alpha, batch, ARGS)
    l_pi, log_prob = sac.actor_loss(actor, critic, alpha, batch)
    l_alpha = sac.alpha_loss(alpha, log_prob, A)
    torch.manual_seed(9)
    a_next, log_next = (x.detach() for x in actor.sample(s_next))
    pi, log_pi = (x.detach() for x in actor.sample(s))
    q, q_next, q_pi = (x.detach() for x in (critic(s, a), critic_target(s_next, a_next), critic(s, pi)))
    total, policy, temperature = np.zeros((3, S))
    for k, i in each():
        t = math.exp(k - 1)
        y = r[k, i] + 0.9 * (1 - d[k, i]) * (min(q_next[k, :, i]) - t * log_next[k, i])
        total[k] += ((q[k, 0, i] - y) ** 2 + (q[k, 1, i] - y) ** 2) / B
        policy[k] += (t * log_pi[k, i] - min(q_pi[k, :, i])) / B
        temperature[k] += -t * (log_pi[k, i] - A) / B
    close(l_q, total)
    close(l_pi, policy)
    close(l_alpha, temperature)


def test_sac_log_probability_against_float64():
    """log pi(a) = log N(u) - sum log(1 - tanh(u)^2), also where tanh(u) rounds to 1 in float32."""
    actor = sac.Actor(1, O, A, 8)
    actor.net[-1].bias.data[..., :A] = torch.linspace(-6, 6, A)
    s = torch.randn(1, 200, O)
    torch.manual_seed(3)
    a, log_prob = actor.sample(s)
    torch.manual_seed(3)
    mean, raw = actor.net(s).chunk(2, -1)
    log_std = (-5 + 3.5 * (torch.tanh(raw) + 1)).double()
    eps = torch.randn_like(mean).double()
    u = mean.double() + log_std.exp() * eps
    normal = torch.distributions.Normal(mean.double(), log_std.exp()).log_prob(u)
    slope = 2 * (math.log(2) - u.abs() - torch.log1p(torch.exp(-2 * u.abs())))  # log(1 - tanh^2), stable in float64
    torch.testing.assert_close(log_prob.double(), (normal - slope).sum(-1), rtol=1e-4, atol=2e-3)
    assert a.abs().max() <= 1 and log_prob.isfinite().all()


@pytest.mark.parametrize("module", [td3_bc, iql, sac])
def test_target_stops_at_termination_only(module, batch):
    s, a, r, s_next, _ = batch
    critic, critic_target, actor = toy(module, 11)
    rest = {td3_bc: (critic_target, actor), iql: (lambda s: critic_target(s, a)[:, 0],),
            sac: (critic_target, actor, sac.Temperature(S))}[module]
    for d, depends in (torch.zeros(S, B), True), (torch.ones(S, B), False):
        losses = []
        for other in s_next, s_next + 1:
            torch.manual_seed(0)
            losses.append(module.critic_loss(critic, *rest, (s, a, r, other, d), ARGS))
        assert torch.equal(*losses) != depends
