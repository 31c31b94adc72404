"""awac.py: both losses by hand, weights of each seed apart, draws at s', the policy's bounds, and a bandit in closed form."""
import math
from types import SimpleNamespace

import awac
import numpy as np
import pytest
import torch
from conftest import small

S, E, B, O, A = 3, 2, 5, 4, 6
ARGS = SimpleNamespace(gamma=0.9, lam=0.5, adv_clip=None)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    d = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0]).expand(S, B)
    return torch.randn(S, B, O), torch.rand(S, B, A) * 2 - 1, torch.randn(S, B), torch.randn(S, B, O), d


def toy(seed=1):
    torch.manual_seed(seed)
    critic, critic_target, actor = awac.Critic(S, O, A, 8), awac.Critic(S, O, A, 8), awac.Actor(S, O, A, 8)
    actor.raw_std.data += torch.linspace(-1, 3, S * A).view(S, 1, A)
    critic.net[-1].weight.data *= torch.tensor([1.0, 4, 16]).view(S, 1, 1, 1)  # advantages of other scales
    return critic, critic_target, actor


def forward(net, x, *lead):
    """One network of a module by plain matrix products."""
    for layer in net:
        x = x @ layer.weight[lead] + layer.bias[lead] if hasattr(layer, "weight") else layer(x)
    return x


def value(critic, k, e, s, a):
    return forward(critic.net, torch.cat([s, a]).unsqueeze(0), k, e).item()


def q_min(critic, k, s, a):
    return min(value(critic, k, e, s, a) for e in range(E))


def policy(actor, k, s):
    """Mean and deviation, in float64."""
    raw = actor.raw_std[k, 0].detach().double()
    return torch.tanh(forward(actor.net, s.unsqueeze(0), k))[0].detach().double(), (-6 + 6 / (1 + (-raw).exp())).exp()


def test_critic_by_hand(batch):
    s, a, r, s_next, d = batch
    critic, critic_target, actor = toy()
    torch.manual_seed(7)
    loss = awac.critic_loss(critic, critic_target, actor, batch, ARGS)
    torch.manual_seed(7)
    eps, expected = torch.randn(S, B, A), np.zeros(S)
    for k in range(S):
        for i in range(B):
            mean, std = policy(actor, k, s_next[k, i])  # at s', not at s
            q_next = q_min(critic_target, k, s_next[k, i], (mean + std * eps[k, i]).clamp(-1, 1).float())
            y = r[k, i] + 0.9 * (1 - d[k, i]) * q_next
            expected[k] += sum((value(critic, k, e, s[k, i], a[k, i]) - y.item()) ** 2 / B for e in range(E))
    assert loss.shape == (S,)
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-4)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_actor_by_hand(clip, batch):
    s, a, *_ = batch
    critic, _, actor = toy()
    torch.manual_seed(7)
    loss = awac.actor_loss(actor, critic, batch, SimpleNamespace(lam=0.5, adv_clip=clip))
    torch.manual_seed(7)
    eps, expected, clipped = torch.randn(S, B, A), np.zeros(S), 0
    for k in range(S):
        weights, log_probs = [], []
        for i in range(B):
            mean, std = policy(actor, k, s[k, i])
            adv = q_min(critic, k, s[k, i], a[k, i]) - q_min(critic, k, s[k, i], (mean + std * eps[k, i]).clamp(-1, 1).float())
            clipped += clip is not None and adv > clip  # else the test would be no test
            weights.append(math.exp((adv if clip is None else min(adv, clip)) / 0.5))
            log_probs.append(torch.distributions.Normal(mean, std).log_prob(a[k, i].double()).sum().item())
        for weight, log_prob in zip(weights, log_probs):
            expected[k] -= weight / np.mean(weights) * log_prob / B
    assert loss.shape == (S,) and (clip is None or clipped)
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-4)


def weights_of(adv, lam=0.5, clip=None):
    """Weights of the batch: the gradient of the loss in log pi(a|s)."""
    log_prob = torch.zeros(adv.shape, requires_grad=True)
    actor = SimpleNamespace(sample=lambda s: None, log_prob=lambda s, a: log_prob)
    critic = lambda s, a: torch.zeros(len(adv), E, adv.shape[1]) if a is None else adv.unsqueeze(1).expand(-1, E, -1)
    loss = awac.actor_loss(actor, critic, (None, 0), SimpleNamespace(lam=lam, adv_clip=clip))
    (grad,) = torch.autograd.grad(loss.sum(), log_prob)
    return -adv.shape[1] * grad


def test_weights_are_normalised_over_the_batch_of_each_seed():
    """They have mean 1, do not know a constant in A, and stay finite where exp(A / lambda) does not."""
    adv = torch.randn(S, 7)
    weight = weights_of(adv)
    torch.testing.assert_close(weight, (adv / 0.5).exp() / (adv / 0.5).exp().mean(-1, keepdim=True))
    torch.testing.assert_close(weight.mean(-1), torch.ones(S))
    torch.testing.assert_close(weights_of(adv + torch.tensor([[0.0], [5], [400]])), weight, rtol=1e-3, atol=1e-5)
    assert (weight.argmax(-1) == adv.argmax(-1)).all()  # A is divided by lambda, with a plus
    assert weights_of(1000 * adv).isfinite().all()
    changed = adv.clone()
    changed[1] *= 3
    assert torch.equal(weights_of(changed)[[0, 2]], weight[[0, 2]])


def test_a_bound_of_the_advantages_levels_the_best():
    adv = torch.tensor([[-1.0, 0.2, 0.6, 30.0]])
    weight = weights_of(adv, clip=0.5)
    assert weight[0, 2] == weight[0, 3] > weight[0, 1] > weight[0, 0]


def test_weights_have_no_gradient(batch):
    """Neither in the critic nor, by way of a~, in the policy."""
    s, a, *_ = batch
    critic, _, actor = toy()
    loss = awac.actor_loss(actor, critic, batch, ARGS)
    assert torch.autograd.grad(loss.sum(), list(critic.parameters()), allow_unused=True, retain_graph=True) == (None,) * 6
    torch.manual_seed(3)
    grad = torch.autograd.grad(awac.actor_loss(actor, critic, batch, ARGS).sum(), list(actor.parameters()))
    torch.manual_seed(3)
    with torch.no_grad():
        adv = critic(s, a).amin(1) - critic(s, actor.sample(s)).amin(1)
    weight = torch.tensor(weights_of(adv).tolist())
    fixed = torch.autograd.grad(-(weight * actor.log_prob(s, a)).mean(-1).sum(), list(actor.parameters()))
    for x, y in zip(grad, fixed):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


def test_policy_is_a_gaussian_that_is_not_squashed(batch):
    """Its density is finite at actions on the bounds, its mean within them, its deviation between exp(-6) and 1."""
    s, a, *_ = batch
    _, _, actor = toy()
    a = a.sign()
    log_prob = actor.log_prob(s, a)
    normal = torch.distributions.Normal(actor(s), actor.log_std().exp())
    torch.testing.assert_close(log_prob, normal.log_prob(a).sum(-1))
    assert log_prob.shape == (S, B) and log_prob.isfinite().all() and actor(s).abs().max() < 1
    for raw, log_std in (-1e3, -6.0), (1e3, 0.0), (0, -3.0):
        actor.raw_std.data.fill_(raw)
        assert actor.log_std().shape == (S, 1, A) and (actor.log_std() == log_std).all()
        draws = torch.cat([actor.sample(s) for _ in range(2000)], 1).unflatten(1, (2000, B))
        assert draws.abs().max() <= 1 and (draws.abs().max() == 1) == (log_std == 0)  # cut off at the box
    torch.testing.assert_close(draws.std(1), torch.full((S, B, A), math.exp(-3)), rtol=0.1, atol=0)
    torch.testing.assert_close(draws.mean(1), actor(s), rtol=0, atol=0.01)


@pytest.mark.parametrize("d, depends", [(0.0, True), (1.0, False)])
def test_target_stops_at_termination_only(d, depends, batch):
    s, a, r, s_next, _ = batch
    critic, critic_target, actor = toy()
    losses = []
    for other in s_next, s_next + 1:
        torch.manual_seed(0)
        losses.append(awac.critic_loss(critic, critic_target, actor, (s, a, r, other, torch.full((S, B), d)), ARGS))
    assert torch.equal(*losses) != depends


def agent_of(dataset, **flags):
    args = small("awac", dataset, "", num_seeds=S, eval_episodes=0, **flags)
    awac.setup(args)
    data = awac.load(args)
    awac.prepare(data, args)
    return awac.Agent(args, data.obs_dim, data.act_dim, data)


def test_advantages_are_those_of_the_critic_not_of_its_target(hopper, monkeypatch):
    agent, seen, loss = agent_of(hopper), [], awac.actor_loss
    monkeypatch.setattr(awac, "actor_loss", lambda actor, critic, *rest: seen.append(critic) or loss(actor, critic, *rest))
    agent.update()
    assert seen == [agent.critic]


def test_q_start_is_the_value_of_the_mode_where_episodes_begin(hopper):
    agent = agent_of(hopper)
    q_start, data = agent.update()["q_start"], agent.data
    first = [int((data.episode == i).nonzero()[0]) for i in range(int(data.episode.max()) + 1)]
    s = data.obs[first].expand(S, -1, -1)
    torch.testing.assert_close(q_start, agent.critic(s, agent.actor(s)).amin(1).mean(-1).detach())


def test_only_the_weights_of_the_actor_decay(hopper):
    agent = agent_of(hopper, weight_decay=0.1)
    assert [opt.param_groups[0]["weight_decay"] for opt in (agent.actor_opt, agent.critic_opt)] == [0.1, 0]


def test_a_bandit_in_closed_form():
    """Reward -(a - 0.5)^2 under uniform actions: the best policy is N(0.5, lambda / 2) on [-1, 1], its mean below 0.5."""
    n, lam, a = 2000, 0.5, np.linspace(-1, 1, 2000)
    action, zeros = torch.tensor(a).float().unsqueeze(-1), torch.zeros(n, 1)
    data = SimpleNamespace(obs=zeros, next_obs=zeros, action=action, reward=-(action[:, 0] - 0.5).square(),
                           terminated=torch.ones(n), episode=torch.arange(n))
    args = awac.Args(num_seeds=S, lam=lam, batch_size=128, hidden_dim=32, actor_lr=1e-2, critic_lr=1e-2, weight_decay=0,
                     device="cpu")
    torch.manual_seed(0)
    agent = awac.Agent(args, 1, 1, data)
    agent.actor.raw_std.data.fill_(1.0)
    for i in range(250):
        if i == 150:
            for opt in agent.actor_opt, agent.critic_opt:
                opt.param_groups[0]["lr"].fill_(1e-3)
        agent.update()
    weight = np.exp(-np.square(a - 0.5) / lam)
    mean = (weight * a).sum() / weight.sum()
    std = np.sqrt((weight * np.square(a - mean)).sum() / weight.sum())
    assert 0.2 < mean < 0.4  # neither the best action nor the mean of the data
    np.testing.assert_allclose(agent.actor(agent.data.obs[:1])[:, 0, 0].detach(), np.full(S, mean), atol=0.06)
    np.testing.assert_allclose(agent.actor.log_std().exp().detach().flatten(), np.full(S, std), rtol=0.15)


def test_a_temperature_of_0_is_refused(hopper, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        awac.main(small("awac", hopper, tmp_path / "out", lam=0.0))
    assert stopped.value.code == "awac: --lam has to be above 0" and not (tmp_path / "out").exists()
