"""The noise schedule, the chain and the loss against hand computations, and what a sampler is for: two modes."""
import math
from types import SimpleNamespace

import bc
import bc_diffusion as m
import numpy as np
import pytest
import torch
from conftest import flat, small

S, B, OBS, ACT, H, T = 3, 5, 4, 2, 6, 5
BETA = [1 - math.exp(-0.1 / T - 0.5 * 9.9 * (2 * t - 1) / T**2) for t in range(1, T + 1)]  # as the authors' code
ABAR = [math.prod(1 - beta for beta in BETA[:t]) for t in range(T + 1)]  # ABAR[0] = 1


def actor(scale=1.0):
    torch.manual_seed(0)
    one = m.Actor(S, OBS, ACT, H, T)
    for p in one.parameters():
        p.data *= scale
    return one


def hand_eps(one, k, a_t, s, t):
    """Agent k's eps_theta for one state, layer by layer."""
    angle = [t * math.exp(-math.log(10_000) * i / 7) for i in range(8)]
    x = torch.tensor([*map(math.sin, angle), *map(math.cos, angle)])
    for net, before in (one.time, []), (one.net, [a_t]):
        x = torch.cat([*before, x, *[s] * len(before)])
        layers = list(net)[::2]
        for i, layer in enumerate(layers):
            x = x @ layer.weight[k] + layer.bias[k, 0]
            x = x * torch.tanh(torch.log(1 + torch.exp(x))) if i < len(layers) - 1 else x  # Mish
    return x


def test_noising_in_one_leap_is_noising_step_by_step():
    """a_t = sqrt(1 - beta_t) a_{t-1} + sqrt(beta_t) eps: the factor of a and the variance, by recursion."""
    factor, variance = 1.0, 0.0
    for t in range(1, T + 1):
        factor, variance = math.sqrt(1 - BETA[t - 1]) * factor, (1 - BETA[t - 1]) * variance + BETA[t - 1]
        assert m.alpha_bar(t, T) == pytest.approx(factor**2) == pytest.approx(1 - variance)
    torch.testing.assert_close(m.alpha_bar(torch.arange(T + 1), T), torch.tensor(ABAR))
    assert ABAR[T] < 0.01  # the chain can begin with pure noise


@pytest.mark.parametrize("t", range(1, T + 1))
def test_posterior_is_the_product_of_two_gaussians(t):
    """p(a_{t-1} | a_0, a_t) ~ N(a_{t-1}; sqrt(abar_{t-1}) a_0, 1 - abar_{t-1}) N(a_t; sqrt(alpha_t) a_{t-1}, beta_t)"""
    c_0, c_t, sigma = m.posterior(t, T)
    alpha, beta, before = 1 - BETA[t - 1], BETA[t - 1], ABAR[t - 1]
    if t == 1:
        assert (c_0, c_t, sigma) == (1, 0, 0)
    else:
        precision = 1 / (1 - before) + alpha / beta
        assert sigma**2 == pytest.approx(1 / precision)
        assert c_0 == pytest.approx(math.sqrt(before) / (1 - before) / precision)
        assert c_t == pytest.approx(math.sqrt(alpha) / beta / precision)


def test_denoising_undoes_noising():
    a, eps = torch.rand(S, B, ACT) * 2 - 1, torch.randn(S, B, ACT)
    for t in range(1, T + 1):
        torch.testing.assert_close(m.denoised(ABAR[t] ** 0.5 * a + (1 - ABAR[t]) ** 0.5 * eps, eps, t, T), a)


def test_loss_by_hand(monkeypatch):
    one = actor()
    s, a, eps = torch.randn(S, B, OBS), torch.rand(S, B, ACT) * 2 - 1, torch.randn(S, B, ACT)
    t = torch.arange(S * B).view(S, B) % T + 1
    asked = []
    monkeypatch.setattr(torch, "randint", lambda low, high, size, **_: asked.append((low, high, tuple(size))) or t)
    monkeypatch.setattr(torch, "randn_like", lambda x: eps)
    loss = m.actor_loss(one, (s, a))
    assert asked == [(1, T + 1, (S, B))] and loss.shape == (S,)
    for k in range(S):
        errors = []
        for i in range(B):
            abar = ABAR[int(t[k, i])]
            a_t = abar**0.5 * a[k, i] + (1 - abar) ** 0.5 * eps[k, i]
            errors += ((eps[k, i] - hand_eps(one, k, a_t, s[k, i], int(t[k, i]))) ** 2).tolist()
        assert loss[k].item() == pytest.approx(np.mean(errors), rel=1e-4)


@torch.no_grad()
def test_chain_by_hand():
    one, s = actor(3.0), torch.randn(S, B, OBS)
    torch.manual_seed(1)
    drawn = one(s)
    torch.manual_seed(1)
    a_t = torch.randn(S, B, ACT)
    for t in range(T, 0, -1):
        noise = torch.randn(S, B, ACT)
        eps = torch.stack([torch.stack([hand_eps(one, k, a_t[k, i], s[k, i], t) for i in range(B)]) for k in range(S)])
        alpha, beta, abar, before = 1 - BETA[t - 1], BETA[t - 1], ABAR[t], ABAR[t - 1]
        a_0 = torch.clamp(a_t / abar**0.5 - (1 / abar - 1) ** 0.5 * eps, -1, 1)
        mean = before**0.5 * beta / (1 - abar) * a_0 + alpha**0.5 * (1 - before) / (1 - abar) * a_t
        a_t = mean + (t > 1) * (beta * (1 - before) / (1 - abar)) ** 0.5 * noise
    torch.testing.assert_close(drawn, a_t, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_samples_stay_in_the_box_and_differ():
    drawn = actor(2.0)(torch.zeros(S, 500, OBS))
    assert drawn.shape == (S, 500, ACT) and drawn.abs().max() <= 1 and drawn.std(1).min() > 0.1


def updates(S, who, start=None, poison=False):
    """Six updates on fixed batches; the noise of an agent is the same whether it is alone or not."""
    with pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(5)
        batches = [(torch.randn(3, 8, OBS), torch.rand(3, 8, ACT) * 2 - 1) for _ in range(6)]
        eps = iter([torch.randn(3, 8, ACT) for _ in range(6)])
        t = iter([torch.randint(1, T + 1, (3, 8)) for _ in range(6)])
        batches[2][1][0] *= torch.nan if poison else 1
        feed = iter(batches)
        patch.setattr(m, "sample", lambda data, args: [x[who] for x in next(feed)])
        patch.setattr(torch, "randn_like", lambda x: next(eps)[who])
        patch.setattr(torch, "randint", lambda *a, **_: next(t)[who])
        agent = m.Agent(m.Args(num_seeds=S, hidden_dim=16, device="cpu"), OBS, ACT, None)
        for name, p in agent.actor.named_parameters():
            p.data.copy_(start[name][who])
        for _ in range(6):
            agent.update()
    return flat({"actor": agent.actor.state_dict(), "opt": agent.actor_opt.state_dict()["state"]})


def test_seeds_together_equal_seeds_apart_and_nan_stays_in_its_seed():
    torch.manual_seed(0)
    start = {name: p.detach().clone() for name, p in m.Actor(3, OBS, ACT, 16, T).named_parameters()}
    together, poisoned = (updates(3, slice(None), start, poison) for poison in (False, True))
    for k in range(3):
        for name, x in updates(1, slice(k, k + 1), start).items():
            if x.dim():
                torch.testing.assert_close(x[0], together[name][k], rtol=1e-4, atol=1e-6, msg=name)
    for name, x in together.items():
        assert x.dim() == 0 or torch.equal(x[1:], poisoned[name][1:]) and poisoned[name][0].isnan().all()


def exact_chain(T, mode, deviation, n=20_000):
    """Samples of the chain with the exact denoiser for half N(-mode, deviation^2), half N(mode, deviation^2)."""
    a_t, modes = torch.randn(n), torch.tensor([-mode, mode])
    for t in range(T, 0, -1):
        abar = m.alpha_bar(t, T)
        gap, variance = a_t.unsqueeze(-1) - abar**0.5 * modes, abar * deviation**2 + 1 - abar
        a_0 = (torch.softmax(-gap.square() / (2 * variance), -1)
               * (modes + abar**0.5 * deviation**2 / variance * gap)).sum(-1).clamp(-1, 1)
        c_0, c_t, sigma = m.posterior(t, T)
        a_t = c_0 * a_0 + c_t * a_t + sigma * torch.randn(n)
    return a_t


def learned(module, updates, **flags):
    """Actions (2, 1000, 2) of two agents in random states, where half the demonstrations go to (0.7, -0.5) and half to
    (-0.7, -0.5) whatever the state is."""
    torch.manual_seed(0)
    n = 2000
    action = torch.tensor([0.7, -0.5]) * torch.stack([torch.randint(2, (n,)) * 2.0 - 1, torch.ones(n)], -1)
    obs, rest = torch.rand(n, 3) * 2 - 1, torch.zeros(n)
    action += 0.03 * torch.randn(n, 2)
    data = SimpleNamespace(obs=obs, action=action, reward=rest, next_obs=obs, terminated=rest)
    args = module.Args(num_seeds=2, hidden_dim=64, batch_size=128, learning_rate=3e-3, device="cpu", **flags)
    agent = module.Agent(args, 3, 2, data)
    for _ in range(updates):
        agent.update()
    with torch.no_grad():
        return agent.policy(torch.rand(2, 1000, 3) * 2 - 1)


def test_the_mean_falls_between_two_modes():
    assert learned(bc, 300)[..., 0].abs().mean() < 0.25


@pytest.mark.parametrize("steps, between", [(5, 0.21), (20, 0.0)])
def test_two_modes_are_kept_as_well_as_the_chain_can(steps, between):
    """With T = 5 even the exact denoiser leaves a fifth of the samples between the modes."""
    share = lambda x: (x.abs() < 0.35).float().mean(-1)
    assert share(exact_chain(steps, 0.7, 0.03)).item() == pytest.approx(between, abs=0.02)
    drawn = learned(m, 1000, diffusion_steps=steps)
    assert (share(drawn[..., 0]) - between).abs().max() < 0.1
    assert ((drawn[..., 0] > 0).float().mean(-1) - 0.5).abs().max() < 0.15
    assert (drawn[..., 1].mean(-1) + 0.5).abs().max() < 0.1


def test_exported_policy_draws_anew_and_evaluation_does_not(hopper, tmp_path):
    a, b = (m.main(small("bc_diffusion", hopper, tmp_path / str(i), num_seeds=3)) for i in range(2))
    assert (a / "eval.csv").read_text() == (b / "eval.csv").read_text()
    policy = torch.export.load(a / "policy.pt2").module()
    for n in 1, 7, 40:
        drawn = policy(torch.zeros(n, 11))
        assert drawn.shape == (3, n, 3) and drawn.abs().max() <= 1
    assert not torch.equal(policy(torch.zeros(40, 11)), drawn)
    torch.manual_seed(3)
    first = policy(torch.zeros(4, 11))
    torch.manual_seed(3)
    assert torch.equal(policy(torch.zeros(4, 11)), first)
