"""bear.py: the MMD and its sign, dual ascent, the warm-up, the soft clipped target over the actor's own draws."""
from types import SimpleNamespace

import bear
import numpy as np
import pytest
import torch
from conftest import small

S, E, B, O, A, n, m = 3, 2, 5, 4, 6, 7, 8
ARGS = SimpleNamespace(gamma=0.9, lam=0.75, num_draws=n, num_match=m, gaussian=False, width=3.0, threshold=0.05, warmup=10)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    d = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0]).expand(S, B)
    return torch.randn(S, B, O), torch.rand(S, B, A) * 2 - 1, torch.randn(S, B), torch.randn(S, B, O), d


def toy():
    """critic, critic_target, actor, vae, whose critics disagree and whose seeds differ."""
    torch.manual_seed(1)
    nets = bear.Critic(S, O, A, 8), bear.Critic(S, O, A, 8), bear.Actor(S, O, A, 8), bear.VAE(S, O, A, 9)
    for net in nets:
        for p in net.parameters():
            p.data += 0.3 * torch.randn_like(p)
    return nets


def forward(net, x, *lead):
    """One network of a module by plain matrix products."""
    for layer in net:
        x = x @ layer.weight[lead] + layer.bias[lead] if hasattr(layer, "weight") else layer(x)
    return x.detach()


def drawn(actor, s, eps, k):  # before tanh
    mean, log_std = forward(actor.net, s, k)[0].split(A)
    return mean + log_std.clamp(-5, 2).exp() * eps


def decoded(vae, s, z, k):  # before tanh
    return forward(vae.decoder, torch.cat([s, z]), k)[0]


def q_of(critic, s, a, k):
    return [forward(critic.net, torch.cat([s, a]), k, e).item() for e in range(E)]


def close(tensor, expected):
    assert tensor.shape == (S,)
    np.testing.assert_allclose(tensor.detach().numpy(), expected, rtol=5e-5, atol=1e-6)


def mmd_by_hand(us, vs, args):
    """Of two lists of vectors, over all pairs, a vector with itself included."""
    def mean(xs, ys):
        total = 0
        for x in xs:
            for y in ys:
                distance = ((x - y) ** 2).sum() if args.gaussian else (x - y).abs().sum()
                total += np.exp(-distance.item() / (2 * args.width))  # the width is not squared
        return total / len(xs) / len(ys)
    return np.sqrt(mean(us, us) + mean(vs, vs) - 2 * mean(us, vs) + 1e-6)


@pytest.mark.parametrize("gaussian", [False, True])
def test_mmd_against_loops(gaussian):
    torch.manual_seed(2)
    u, v, args = torch.randn(S, m, B, A), 1 + torch.randn(S, m, B, A), SimpleNamespace(gaussian=gaussian, width=3.0)
    found = bear.mmd(u, v, args)
    assert found.shape == (S, B)
    for k in range(S):
        for i in range(B):
            assert found[k, i].item() == pytest.approx(mmd_by_hand(u[k, :, i], v[k, :, i], args), rel=1e-4)


@pytest.mark.parametrize("gaussian", [False, True])
def test_mmd_of_two_points_and_of_a_set_with_itself(gaussian):
    """k(x, x) = 1: two points have MMD^2 = 2 - 2 k(x, y), which a plus at the mixed term would make 2 + 2 k."""
    torch.manual_seed(2)
    args = SimpleNamespace(gaussian=gaussian, width=3.0)
    x, y = torch.randn(2, S, 1, B, A)
    distance = ((x - y) ** 2 if gaussian else (x - y).abs()).sum(-1)
    expected = (2 - 2 * (-distance / 6).exp() + 1e-6).sqrt()
    torch.testing.assert_close(bear.mmd(x.expand(-1, m, -1, -1), y.expand(-1, m, -1, -1), args), expected[:, 0])
    u = torch.randn(S, m, B, A)
    torch.testing.assert_close(bear.mmd(u, u.flip(1), args), torch.full((S, B), 1e-3), atol=5e-4, rtol=0)
    assert (bear.mmd(u, u + 5, args) > 0.3).all()


def test_mmd_has_a_finite_slope_where_both_sets_coincide():
    u = torch.zeros(S, m, B, A, requires_grad=True)
    bear.mmd(u, torch.zeros(S, m, B, A), ARGS).sum().backward()
    assert u.grad.isfinite().all()


def test_critic_by_hand(batch):
    """The mixture of least and greatest first, then the maximum over n draws of the target actor in the same state."""
    s, a, r, s_next, d = batch
    critic, critic_target, actor, _ = toy()
    torch.manual_seed(7)
    loss = bear.critic_loss(critic, critic_target, actor, batch, ARGS)
    torch.manual_seed(7)
    eps, expected = torch.randn(S, n * B, A), np.zeros(S)
    for k in range(S):
        for i in range(B):
            found = []
            for j in range(n):
                q = q_of(critic_target, s_next[k, i], torch.tanh(drawn(actor, s_next[k, i], eps[k, j * B + i], k)), k)
                found.append(0.75 * min(q) + 0.25 * max(q))
            y = (r[k, i] + 0.9 * (1 - d[k, i]) * max(found)).item()
            expected[k] += sum((q - y) ** 2 for q in q_of(critic, s[k, i], a[k, i], k)) / B
    close(loss, expected)


def test_target_stops_at_termination_only_and_has_no_gradient(batch):
    s, a, r, s_next, _ = batch
    critic, critic_target, actor, _ = toy()
    for d, depends in (torch.zeros(S, B), True), (torch.ones(S, B), False):
        losses = []
        for other in s_next, s_next + 1:
            torch.manual_seed(0)
            losses.append(bear.critic_loss(critic, critic_target, actor, (s, a, r, other, d), ARGS))
        assert torch.equal(*losses) != depends
    bear.critic_loss(critic, critic_target, actor, batch, ARGS).sum().backward()
    assert all(p.grad is None for net in (critic_target, actor) for p in net.parameters())


@pytest.mark.parametrize("count", [9.0, 10.0])
def test_actor_by_hand(count, batch):
    """The lesser Q of each draw, then their mean; the MMD of what tanh has not squashed yet. At first the MMD alone."""
    s, *_ = batch
    critic, _, actor, vae = toy()
    alpha = bear.Multiplier(S)
    alpha.log_alpha.data = torch.tensor([-1.0, 0.0, 1.0])
    torch.manual_seed(7)
    loss, distance = bear.actor_loss(actor, critic, vae, alpha, torch.tensor(count), batch, ARGS)
    torch.manual_seed(7)
    z, eps = torch.randn(S, m * B, 2 * A).clamp(-0.5, 0.5), torch.randn(S, m * B, A)
    expected, away, squashed = np.zeros((3, S))
    for k in range(S):
        for i in range(B):
            u = [drawn(actor, s[k, i], eps[k, j * B + i], k) for j in range(m)]
            v = [decoded(vae, s[k, i], z[k, j * B + i], k) for j in range(m)]
            away[k] += mmd_by_hand(u, v, ARGS) / B
            squashed[k] += mmd_by_hand([torch.tanh(x) for x in u], [torch.tanh(x) for x in v], ARGS) / B
            expected[k] -= (count >= 10) * np.mean([min(q_of(critic, s[k, i], torch.tanh(x), k)) for x in u]) / B
    close(distance, away)
    close(loss, expected + np.exp([-1.0, 0.0, 1.0]) * (away - 0.05))
    assert not np.isclose(away, squashed, rtol=0.05).any()  # this test sees where the MMD is taken


def test_only_the_actor_learns_from_its_loss_and_in_the_warm_up_not_from_q(batch):
    critic, _, actor, vae = toy()
    alpha, grads = bear.Multiplier(S), {}
    for count in 9.0, 10.0:
        for scale in 1, 2:
            critic.net[-1].weight.data *= scale
            torch.manual_seed(7)
            loss, _ = bear.actor_loss(actor, critic, vae, alpha, torch.tensor(count), batch, ARGS)
            others = torch.autograd.grad(loss.sum(), [*vae.parameters(), alpha.log_alpha], allow_unused=True, retain_graph=True)
            assert all(grad is None for grad in others)
            grads[count, scale] = torch.autograd.grad(loss.sum(), actor.parameters())
    same = lambda x, y: all(torch.equal(a, b) for a, b in zip(x, y))
    assert same(grads[9.0, 1], grads[9.0, 2]) and not same(grads[10.0, 1], grads[10.0, 2])


def test_the_multiplier_climbs_while_the_mmd_is_above_its_threshold():
    alpha = bear.Multiplier(S)
    alpha.log_alpha.data = torch.tensor([0.0, 1.0, 2.0])
    loss = bear.alpha_loss(alpha, torch.tensor([0.25, 0.05, 0.01]), ARGS)
    close(loss, [-0.2, 0.0, 0.04 * np.exp(2.0)])
    (grad,) = torch.autograd.grad(loss.sum(), alpha.parameters())
    assert grad.sign().tolist() == [-1, 0, 1]  # descent on it is ascent on the Lagrangian


def test_latents_are_cut_off_at_a_half_and_the_deviation_is_bounded(batch, monkeypatch):
    s, *_ = batch
    _, _, actor, vae = toy()
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 9.0))
    torch.testing.assert_close(vae.sample(s), vae.decoder(torch.cat([s, torch.full((S, B, 2 * A), 0.5)], -1)))
    mean = actor.net(s).chunk(2, -1)[0]
    for push, bound in (-100, -5), (100, 2):
        actor.net[-1].bias.data[..., A:] = push
        torch.testing.assert_close(actor.sample(s), mean + 9 * np.exp(bound))


def test_the_policy_takes_the_best_of_its_draws_for_each_state(batch):
    s, *_ = batch
    critic, _, actor, _ = toy()
    policy = bear.Policy(actor, critic, n)
    torch.manual_seed(7)
    found = policy(s)
    torch.manual_seed(7)
    eps = torch.randn(S, n * B, A)
    for k in range(S):
        for i in range(B):
            draws = [torch.tanh(drawn(actor, s[k, i], eps[k, j * B + i], k)) for j in range(n)]
            q = [q_of(critic, s[k, i], a, k)[0] for a in draws]
            torch.testing.assert_close(found[k, i].detach(), draws[int(np.argmax(q))])


def agent_of(data, **flags):
    torch.manual_seed(0)
    args = bear.Args(num_seeds=S, device="cpu", vae_dim=16, **{"hidden_dim": 16, "batch_size": 16, **flags})
    return bear.Agent(args, data.obs.shape[1], data.action.shape[1], data)


@pytest.fixture
def middle():
    """One step; actions from -0.3 to 0.3, reward a: a critic that goes on in a line thinks best of 1."""
    rng = torch.Generator().manual_seed(0)
    obs, action = torch.rand(500, 3, generator=rng), torch.rand(500, 1, generator=rng) * 0.6 - 0.3
    return SimpleNamespace(obs=obs, action=action, reward=action[:, 0], next_obs=obs, terminated=torch.ones(500))


def test_an_update_draws_ten_and_four_and_moves_both_targets_and_the_multiplier(middle, monkeypatch):
    agent, rows = agent_of(middle, warmup=2), []

    def counted(sample):
        def drawn(net, *x):
            u = sample(net, *x)
            rows.append((net, u.shape[1]))
            return u
        return drawn

    for net in bear.Actor, bear.VAE:
        monkeypatch.setattr(net, "sample", counted(net.sample))
    nets = [(agent.critic, agent.critic_target), (agent.actor, agent.actor_target)]
    before = [[p.clone() for p in target.parameters()] for _, target in nets]
    losses = agent.update()
    assert rows == [(agent.actor_target, 10 * 16), (agent.vae, 4 * 16), (agent.actor, 4 * 16)] and all(x.shape == (S,) for x in losses.values())
    for (online, target), was in zip(nets, before):
        for p, p_target, p_was in zip(online.parameters(), target.parameters(), was):
            torch.testing.assert_close(p_target - p_was, 0.005 * (p - p_was), rtol=0.1, atol=1e-7)
            assert not torch.equal(p_target, p_was)
    assert agent.count == 1 and (agent.alpha.log_alpha.abs() > 5e-4).all()  # Adam's first step, in the warm-up too
    agent.policy(torch.zeros(S, 2, 3))
    assert rows[-1] == (agent.actor, 100 * 2)


@pytest.mark.parametrize("start, threshold, end", [(9.9995, 0.0, 10.0), (-4.9995, 10.0, -5.0)])
def test_the_multiplier_keeps_to_its_bounds_and_can_leave_them(start, threshold, end, middle):
    agent = agent_of(middle, threshold=threshold)
    agent.alpha.log_alpha.data.fill_(start)
    for _ in range(3):
        agent.update()
    assert (agent.alpha.log_alpha == end).all()
    agent.args.threshold = 10.0 if start > 0 else -10.0
    for _ in range(30):
        agent.update()
    assert (agent.alpha.log_alpha.abs() < abs(end)).all()


@pytest.mark.parametrize("threshold, low, high", [(0.05, -0.3, 0.3), (9.0, 0.9, 1.0)])
def test_it_keeps_to_the_actions_of_the_data_and_with_a_loose_constraint_leaves_them(threshold, low, high, middle):
    agent = agent_of(middle, batch_size=64, hidden_dim=32, actor_lr=3e-3, critic_lr=3e-3, alpha_lr=0.05, width=1.0, warmup=50,
                     threshold=threshold)
    for _ in range(400):
        losses = agent.update()
    a = agent.policy(torch.rand(S, 20, 3))
    assert low <= a.min() and a.max() <= high, (a.min(), a.max(), losses)


@pytest.mark.parametrize("flags, words", [(dict(lam=1.5), "--lam cannot be 1.5"), (dict(width=0.0), "--width cannot be 0")])
def test_bad_flags_are_refused(flags, words, hopper, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        bear.main(small("bear", hopper, tmp_path / "out", **flags))
    assert stopped.value.code.startswith(f"bear: {words}") and not (tmp_path / "out").exists()
