"""brac.py: densities, the three divergences, what p and v penalise, the discriminator, cloning that resumes to the bit."""
import math
import os
import signal
from types import SimpleNamespace

import brac
import numpy as np
import pytest
import torch
from conftest import checkpoint, resume, same, small
from torch.distributions import Normal, TransformedDistribution, kl_divergence, transforms

S, E, B, O, A, n = 3, 2, 5, 4, 6, 7
ARGS = SimpleNamespace(gamma=0.9, num_draws=n, warmup=10, value_penalty=False, divergence="kl")
V = SimpleNamespace(**{**vars(ARGS), "value_penalty": True})


@pytest.fixture
def batch():
    torch.manual_seed(0)
    d = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0]).expand(S, B)
    return torch.randn(S, B, O), torch.rand(S, B, A) * 1.8 - 0.9, torch.randn(S, B), torch.randn(S, B, O), d


def toy():
    """critic, critic_target, (pi, beta, c), alpha."""
    torch.manual_seed(1)
    nets = brac.Actor(S, O, A, 8), brac.Actor(S, O, A, 8), brac.Critic(S, O, A, 8, 1)
    critics = brac.Critic(S, O, A, 8), brac.Critic(S, O, A, 8)
    for net in (*nets, *critics):
        for p in net.parameters():
            p.data += 0.2 * torch.randn_like(p)
    alpha = brac.Multiplier(S, 1.0)
    alpha.value.data = torch.tensor([0.5, 1.0, 2.0])
    return *critics, nets, alpha


def forward(net, x, *lead):
    """One network of a module by plain matrix products."""
    for layer in net:
        x = x @ layer.weight[lead] + layer.bias[lead] if hasattr(layer, "weight") else layer(x)
    return x.detach()[0]


def normal(actor, s, k):
    mean, raw = forward(actor.net, s, k).split(A)
    return Normal(mean.double(), (-5 + 2.5 * (torch.tanh(raw) + 1)).exp().double())


def log_density(actor, s, a, k):
    squashed = TransformedDistribution(normal(actor, s, k), [transforms.TanhTransform()])
    return squashed.log_prob(a.double().clamp(-0.999, 0.999)).sum().item()


def drawn(actor, s, eps, k):  # a and its log density, taken before tanh rounds
    u = normal(actor, s, k).mean + normal(actor, s, k).stddev * eps.double()
    slope = 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))
    return torch.tanh(u).float(), (normal(actor, s, k).log_prob(u) - slope).sum().item()


def q_of(critic, s, a, k):
    return [forward(critic.net, torch.cat([s, a]), k, e).item() for e in range(critic.net[0].weight.shape[1])]


def close(tensor, expected, shape=(S,)):
    assert tensor.shape == shape
    np.testing.assert_allclose(tensor.detach().numpy(), expected, rtol=2e-4, atol=2e-5)


def test_widths_and_settings_are_the_authors():
    agent, args = brac.Agent(brac.Args(), 11, 3, SimpleNamespace()), brac.Args()
    sizes = lambda net: [layer.weight.shape[-1] for layer in net.net if hasattr(layer, "weight")]
    assert sizes(agent.critic) == sizes(agent.c) == [300, 300, 1]
    assert sizes(agent.actor) == sizes(agent.behaviour) == [200, 200, 6]
    assert (args.alpha, args.num_draws, args.warmup, args.value_penalty, agent.clone_updates) == (1, 4, 20_000, False, 10**6)


def test_densities_are_of_squashed_normals(batch):
    s, a, *_ = batch
    actor = toy()[2][0]
    torch.manual_seed(7)
    drawn_a, log_drawn = actor.sample(s)
    torch.manual_seed(7)
    eps = torch.randn(S, B, A)
    for k in range(S):
        for i in range(B):
            expected = drawn(actor, s[k, i], eps[k, i], k)
            torch.testing.assert_close(drawn_a[k, i].detach(), expected[0])
            assert log_drawn[k, i].item() == pytest.approx(expected[1], rel=1e-4, abs=1e-3)
            assert actor.log_prob(s, a)[k, i].item() == pytest.approx(log_density(actor, s[k, i], a[k, i], k), rel=1e-4, abs=1e-3)
    for at_bound in torch.ones_like(a), -torch.ones_like(a):  # log beta would be infinite
        assert torch.equal(actor.log_prob(s, at_bound), actor.log_prob(s, 0.999 * at_bound))
        assert actor.log_prob(s, at_bound).isfinite().all()


def test_the_deviation_is_at_most_1_and_at_least_exp_minus_5(batch):
    actor = toy()[2][0]
    for push, bound in (-100.0, -5.0), (100.0, 0.0):
        actor.net[-1].bias.data[..., A:] = push
        torch.testing.assert_close(actor.normal(batch[0])[1], torch.full((S, B, A), bound))


def by_hand(name, nets, s, k, i, noise):
    """D(s) of agent k's state i from the noise (S, n B, A) of each draw in turn."""
    actor, behaviour, c = nets
    at = lambda net, eps: [drawn(net, s[k, i], eps[k, j * B + i], k) for j in range(n)]
    draws = at(actor, noise[0])
    if name == "kl":
        return np.mean([log_pi - log_density(behaviour, s[k, i], a, k) for a, log_pi in draws])
    others = at(behaviour, noise[1])
    if name == "kl_dual":
        g = lambda a: math.log1p(math.exp(q_of(c, s[k, i], a, k)[0]))
        return np.mean([math.log(g(a)) for a, _ in draws]) - np.mean([g(b) for b, _ in others]) + 1
    kernel = lambda xs, ys: np.mean([math.exp(-(x - y).abs().sum().item() / 20) for x, _ in xs for y, _ in ys])
    return kernel(draws, draws) - 2 * kernel(draws, others) + kernel(others, others)


@pytest.mark.parametrize("name", ["kl", "kl_dual", "mmd"])
def test_divergences_by_hand(name, batch):
    s, *_ = batch
    _, _, nets, _ = toy()
    torch.manual_seed(7)
    found = brac.DIVERGENCES[name](s, n, *nets)
    torch.manual_seed(7)
    noise = [torch.randn(S, n * B, A) for _ in range(2)]
    close(found, [[by_hand(name, nets, s, k, i, noise) for i in range(B)] for k in range(S)], (S, B))


def gaussians(mean, log_std):
    """pi and beta of one agent, one dimension and any state: tanh(N(mean, exp(log_std)^2)) with two values each."""
    actors = brac.Actor(1, 1, 1, 4), brac.Actor(1, 1, 1, 4)
    for actor, m, x in zip(actors, mean, log_std):
        actor.net[-1].weight.data.zero_()
        actor.net[-1].bias.data = torch.tensor([[[m, math.atanh((x + 5) / 2.5 - 1)]]])
    return actors, kl_divergence(*(Normal(m, math.exp(x)) for m, x in zip(mean, log_std))).item()


def test_kl_is_that_of_the_normals_and_from_pi_to_beta():
    """tanh does not change it; the other direction is another number."""
    torch.manual_seed(0)
    (pi, beta), exact = gaussians((0.2, 0.0), (-1.5, -0.7))
    (_, _), other = gaussians((0.0, 0.2), (-0.7, -1.5))
    found = brac.kl(torch.zeros(1, 1, 1), 40_000, pi, beta, None).item()
    assert found == pytest.approx(exact, abs=0.01) and abs(exact - other) > 0.3
    assert brac.kl(torch.zeros(1, 1, 1), 1000, pi, pi, None).item() == pytest.approx(0, abs=1e-4)


def test_the_dual_form_reaches_kl_at_the_ratio_of_densities_and_stays_below_elsewhere():
    torch.manual_seed(0)
    (pi, beta), exact = gaussians((0.2, 0.0), (-1.0, -0.7))
    best = lambda s, a: (pi.log_prob(s, a) - beta.log_prob(s, a)).exp().expm1().log().unsqueeze(1)  # softplus of it is pi / beta
    s = torch.zeros(1, 1, 1)
    assert brac.kl_dual(s, 100_000, pi, beta, best).item() == pytest.approx(exact, abs=0.02)
    for worse in lambda s, a: best(s, a) + 0.5, lambda s, a: best(s, a) - 0.5, lambda s, a: torch.zeros(1, 1, s.shape[1]):
        assert brac.kl_dual(s, 100_000, pi, beta, worse).item() < exact - 0.03


def test_the_discriminator_learns_kl():
    """By descent on L_c, whose penalty rests while its slope in a is below 1."""
    torch.manual_seed(0)
    (pi, beta), exact = gaussians((0.15, 0.0), (-0.7, -0.7))
    c, s = brac.Critic(1, 1, 1, 32, 1), torch.zeros(1, 256, 1)
    opt, args = torch.optim.Adam(c.parameters(), 1e-2), SimpleNamespace(num_draws=4)
    for _ in range(150):
        brac.step(opt, brac.c_loss((pi, beta, c), s, args))
    assert exact > 0.04 and brac.kl_dual(s, 200, pi, beta, c).mean().item() == pytest.approx(exact, abs=0.02)


def test_mmd_of_two_points_and_the_sign_of_its_mixed_term():
    point = lambda x: SimpleNamespace(sample=lambda s: (torch.full((S, s.shape[1], A), x), None))
    s = torch.zeros(S, B, O)
    torch.testing.assert_close(brac.mmd(s, n, point(0.5), point(0.5), None), torch.zeros(S, B), atol=1e-6, rtol=0)
    expected = torch.full((S, B), 2 - 2 * math.exp(-A * 0.8 / 20))
    torch.testing.assert_close(brac.mmd(s, n, point(0.5), point(-0.3), None), expected)


def test_the_penalty_of_the_discriminator_is_on_slopes_above_1(batch, monkeypatch):
    s, *_ = batch
    _, _, nets, _ = toy()
    rate = torch.tensor([0.5, 1.0, 3.0]).view(S, 1, 1)
    line = lambda s, a: rate * a.sum(-1).unsqueeze(1) / A**0.5  # with a slope of 0.5, 1, 3
    monkeypatch.setattr(brac, "kl_dual", lambda s, *_: torch.zeros(S, B))
    close(brac.c_loss((*nets[:2], line), batch[0], ARGS), [0, 0, 20])


@pytest.mark.parametrize("divergence", ["kl", "mmd"])
@pytest.mark.parametrize("value_penalty", [False, True])
def test_critic_by_hand(value_penalty, divergence, batch):
    """BRAC-p has no divergence in its target, BRAC-v has; the lesser of the target critics at one draw."""
    s, a, r, s_next, d = batch
    critic, critic_target, nets, alpha = toy()
    args = SimpleNamespace(**{**vars(ARGS), "value_penalty": value_penalty, "divergence": divergence})
    torch.manual_seed(7)
    loss = brac.critic_loss(critic, critic_target, nets, alpha, batch, args)
    torch.manual_seed(7)
    eps, expected = torch.randn(S, B, A), np.zeros(S)
    noise = [torch.randn(S, n * B, A) for _ in range(2)]
    for k in range(S):
        for i in range(B):
            value = min(q_of(critic_target, s_next[k, i], drawn(nets[0], s_next[k, i], eps[k, i], k)[0], k))
            if value_penalty:
                value -= [0.5, 1.0, 2.0][k] * by_hand(divergence, nets, s_next, k, i, noise)
            y = r[k, i].item() + 0.9 * (1 - d[k, i].item()) * value
            expected[k] += sum((q - y) ** 2 for q in q_of(critic, s[k, i], a[k, i], k)) / B
    close(loss, expected)
    loss.sum().backward()
    assert all(p.grad is None for net in (critic_target, *nets, alpha) for p in net.parameters())


@pytest.mark.parametrize("args", [ARGS, V])
@pytest.mark.parametrize("count", [9.0, 10.0])
def test_actor_by_hand(count, args, batch):
    """alpha D - min Q in both, and D alone at first."""
    s, *_ = batch
    critic, _, nets, alpha = toy()
    torch.manual_seed(7)
    loss, distance = brac.actor_loss(critic, nets, alpha, torch.tensor(count), batch, args)
    torch.manual_seed(7)
    noise, eps, expected = torch.randn(1, S, n * B, A), torch.randn(S, B, A), np.zeros(S)
    away = np.array([[by_hand("kl", nets, s, k, i, noise) for i in range(B)] for k in range(S)])
    for k in range(S):
        for i in range(B):
            q = q_of(critic, s[k, i], drawn(nets[0], s[k, i], eps[k, i], k)[0], k)
            expected[k] += ([0.5, 1.0, 2.0][k] * away[k, i] - (count >= 10) * min(q)) / B
    close(distance, away, (S, B))
    close(loss, expected)
    grads = torch.autograd.grad(loss.sum(), [*nets[0].parameters(), *alpha.parameters()], allow_unused=True)
    assert all(grad[k].any() for grad in grads[:-1] for k in range(S)) and grads[-1] is None


def test_behaviour_loss_by_hand(batch):
    s, a, *_ = batch
    _, _, (_, behaviour, _), alpha = toy()
    torch.manual_seed(7)
    loss, log_prob = brac.behaviour_loss(behaviour, alpha, batch)
    torch.manual_seed(7)
    eps, expected = torch.randn(S, B, A), np.zeros(S)
    for k in range(S):
        for i in range(B):
            own = drawn(behaviour, s[k, i], eps[k, i], k)[1]
            assert log_prob[k, i].item() == pytest.approx(own, rel=1e-4, abs=1e-3)
            expected[k] += ([0.5, 1.0, 2.0][k] * own - log_density(behaviour, s[k, i], a[k, i], k)) / B
    close(loss, expected)


def test_weights_climb_while_what_they_weigh_is_above_its_target():
    alpha = brac.Multiplier(S, 1.0)
    loss = brac.alpha_loss(alpha, torch.tensor([[0.3, 0.1], [0.0, 0.0], [-0.4, -0.2]]))
    close(loss, [-0.2, 0, 0.3])
    (grad,) = torch.autograd.grad(loss.sum(), alpha.parameters())
    assert grad.sign().tolist() == [-1, 0, 1]


def problem():
    """One step; actions from -0.3 to 0.3, reward a: a critic that goes on in a line thinks best of 1."""
    rng = torch.Generator().manual_seed(0)
    obs, action = torch.rand(500, 3, generator=rng), torch.rand(500, 1, generator=rng) * 0.6 - 0.3
    return SimpleNamespace(obs=obs, action=action, reward=action[:, 0], next_obs=obs, terminated=torch.ones(500))


def agent_of(**flags):
    torch.manual_seed(0)
    shape = dict(num_seeds=S, device="cpu", hidden_dim=48, batch_size=64, clone_updates=10)
    return brac.Agent(brac.Args(**{**shape, **flags}), 3, 1, problem())


def weights(net):
    return [p.clone() for p in net.parameters()]


def equal(xs, ys):
    return all(torch.equal(x, y) for x, y in zip(xs, ys))


@pytest.mark.parametrize("flags, moves", [({}, ""), ({"divergence": "mmd"}, ""), ({"divergence": "kl_dual"}, "c"),
                                          ({"target_divergence": 1e6}, "alpha")])
def test_beta_rests_once_it_is_cloned_and_c_and_alpha_move_if_they_are_asked_for(flags, moves):
    agent = agent_of(value_penalty=True, alpha_lr=1.0, **flags)
    for _ in range(10):
        brac.clone(agent)
    assert agent.cloned == 10 and (agent.alpha_beta.value != 1).all()
    names = "behaviour", "alpha_beta", "c", "alpha", "actor", "critic"
    before = {name: weights(getattr(agent, name)) for name in names}
    for _ in range(3):
        losses = agent.update()
    changed = {name for name in names if not equal(before[name], weights(getattr(agent, name)))}
    assert changed == {"actor", "critic"} | ({moves} - {""}) and agent.count == 3
    assert all(x.shape == (S,) and x.isfinite().all() for x in losses.values())
    if moves == "alpha":
        assert (agent.alpha.value == 0).all()  # far below its target it ends at 0


def test_the_clone_has_the_data_s_actions_and_what_entropy_is_asked_of_it():
    agent = agent_of(clone_lr=5e-3)
    for _ in range(400):
        brac.clone(agent)
    s = torch.rand(S, 500, 3)
    a, _ = agent.behaviour.sample(s)
    assert a.mean((1, 2)).abs().max() < 0.05 and (a.std((1, 2)) - 0.35).abs().max() < 0.2
    assert (agent.alpha_beta.value >= 0).all()


@pytest.mark.parametrize("divergence, alpha, low, high", [("kl", 3.0, -0.1, 0.6), ("kl", 0.0, 0.9, 1.0), ("mmd", 100.0, -0.1, 0.6),
                                                          ("kl_dual", 10.0, -0.3, 0.7)])
def test_it_keeps_to_the_actions_of_the_data_and_without_the_penalty_leaves_them(divergence, alpha, low, high):
    agent = agent_of(divergence=divergence, alpha=alpha, actor_lr=3e-3, critic_lr=3e-3, clone_lr=5e-3, warmup=20)
    for _ in range(100):
        brac.clone(agent)
    for _ in range(200):
        losses = agent.update()
    a = agent.policy(torch.rand(S, 50, 3))
    assert low <= a.min() and a.max() <= high, (a.min(), a.max(), losses)


@pytest.mark.parametrize("call", [7, 20])
def test_interrupted_cloning_resumes_to_the_bit(call, hopper, tmp_path, monkeypatch):
    """A signal in the seventh of 12 updates of beta, and in the eighth of the policy's."""
    flags = dict(num_seeds=2, clone_updates=12, target_divergence=1.0)
    whole = brac.main(small("brac", hopper, tmp_path / "a", **flags))
    count, sample = [], brac.sample

    def patched(data, args):
        count.append(0)
        if len(count) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(data, args)

    monkeypatch.setattr(brac, "sample", patched)
    with pytest.raises(SystemExit) as stopped:
        brac.main(small("brac", hopper, tmp_path / "b", **flags))
    monkeypatch.undo()
    (folder,) = (tmp_path / "b").iterdir()
    assert f"stopped at update {max(call - 12, 0)};" in stopped.value.code
    resume(brac, folder)
    a, b = checkpoint(whole), checkpoint(folder)
    assert all(same(a[part], b[part]) for part in ("update", "agent", "moments", "rng"))
    for name in "eval.csv", "losses.csv":
        assert (whole / name).read_text() == (folder / name).read_text()
