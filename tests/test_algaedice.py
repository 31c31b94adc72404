"""algaedice.py: losses by hand, who gets a gradient of which sign, a finite MDP's density ratio and policy gradient."""
import math
from types import SimpleNamespace

import algaedice as m
import numpy as np
import pytest
import torch
from conftest import made, small

S, E, B, B0, O, A = 3, 2, 5, 7, 4, 6
ARGS = SimpleNamespace(gamma=0.9, algae_alpha=0.4, exponent=1.5, online_share=0.3)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    d = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0]).expand(S, B)
    return torch.randn(S, B, O), torch.rand(S, B, A) * 2 - 1, torch.randn(S, B), torch.randn(S, B, O), d


def toy():
    torch.manual_seed(1)
    critic, target, actor, alpha = m.Critic(S, O, A, 8), m.Critic(S, O, A, 8), m.Actor(S, O, A, 8), m.Temperature(S)
    actor.net[-1].bias.data += torch.linspace(-1, 1, S * 2 * A).view(S, 1, -1)
    alpha.log_alpha.data = torch.tensor([-3.0, -2.0, -1.0])
    return critic, target.requires_grad_(False), actor, alpha, torch.randn(S, B0, O)


def q_of(critic, k, e, s, a):
    x = torch.cat([s, a])
    for layer in critic.net:
        x = x @ layer.weight[k, e] + layer.bias[k, e, 0] if hasattr(layer, "weight") else layer(x)
    return x.item()


def power(x, p):
    return abs(x) ** p / p


def test_losses_by_hand(batch):
    s, a, r, s_next, d = batch
    critic, target, actor, alpha, s_0 = toy()
    torch.manual_seed(7)
    l_q = m.critic_loss(critic, target, actor, alpha, s_0, batch, ARGS)
    torch.manual_seed(7)
    l_pi, log_pi, zeta = m.actor_loss(actor, critic, target, alpha, s_0, batch, ARGS)
    torch.manual_seed(7)
    with torch.no_grad():
        pi, log_prob = actor.sample(torch.cat([s_0, s_next], 1))
    expected_q, expected_pi, zetas = np.zeros(S), np.zeros(S), np.zeros((S, E, B))
    for k in range(S):
        for e in range(E):
            start = np.mean([q_of(critic, k, e, s_0[k, i], pi[k, i]) for i in range(B0)])
            expected_q[k] += 0.1 * 0.4 * start
            expected_pi[k] -= 0.1 * 0.4 * start / E
            for i in range(B):
                x = s_next[k, i], pi[k, B0 + i]
                mixed = 0.3 * q_of(critic, k, e, *x) + 0.7 * min(q_of(target, k, j, *x) for j in range(E))
                soft = mixed - math.exp(-3 + k) * log_prob[k, B0 + i].item()
                delta = r[k, i].item() + 0.9 * (1 - d[k, i].item()) * soft - q_of(critic, k, e, s[k, i], a[k, i])
                zetas[k, e, i] = max(delta, 0) ** 0.5
                expected_q[k] += power(delta, 1.5) / B
                expected_pi[k] -= zetas[k, e, i] * delta / B / E
        for layer in actor.net[0], actor.net[2], actor.net[4]:
            w = layer.weight[k].detach().numpy()
            columns = [(i, j) for i, j in np.ndindex(w.shape[1], w.shape[1]) if i != j]
            expected_pi[k] += 1e-4 * sum((w[:, i] @ w[:, j]) ** 2 for i, j in columns)
    assert (zetas == 0).any() and (zetas > 0).any() and l_q.shape == l_pi.shape == (S,)
    np.testing.assert_allclose(l_q.detach(), expected_q, rtol=1e-4)
    np.testing.assert_allclose(l_pi.detach(), expected_pi, rtol=1e-4)
    np.testing.assert_allclose(zeta, zetas, rtol=1e-3, atol=1e-4)
    assert torch.equal(log_pi, log_prob[:, B0:]) and not log_pi.requires_grad and not zeta.requires_grad


def grads(loss, *modules):
    params = [p for module in modules for p in module.parameters()]
    return torch.autograd.grad(loss.sum(), params, allow_unused=True)


def test_the_critic_goes_down_what_the_actor_goes_up(batch):
    """In pi both losses have the gradient of J, with opposite signs; neither has one in alpha."""
    s, a, r, s_next, d = batch
    critic, target, actor, alpha, s_0 = toy()
    actor.net[-1].weight.data.mul_(3)
    both = []
    for loss in (lambda x: m.critic_loss(critic, target, actor, alpha, s_0, x, ARGS) / E,
                 lambda x: m.actor_loss(actor, critic, target, alpha, s_0, x, ARGS)[0]):
        torch.manual_seed(7)
        both.append(grads(loss((s, a, r + 20, s_next, d)), actor, alpha))  # every delta is above 0
    gram = [layer.weight.mT @ layer.weight for layer in actor.net[::2]]
    apart = grads(sum(1e-4 * (x * (1 - torch.eye(x.shape[-1]))).square().sum((-2, -1)) for x in gram), actor)
    assert both[0][-1] is None and both[1][-1] is None
    for x, y, z in zip(both[0], both[1], apart):
        torch.testing.assert_close(-x + (0 if z is None else z), y)
        assert x.abs().max() > 0


def test_residuals_below_zero_pull_the_critic_and_not_the_actor(batch):
    s, a, r, s_next, d = batch
    critic, target, actor, alpha, s_0 = toy()
    torch.manual_seed(7)
    l_q = m.critic_loss(critic, target, actor, alpha, s_0, (s, a, r - 20, s_next, d), ARGS)
    delta, _, _ = m.residual(critic, target, actor, alpha, s_0, (s, a, r - 20, s_next, d), ARGS)
    assert (delta < -1).all()
    grad = grads(l_q, critic)[-1].view(S, E)
    assert (grad > 0.5).all()  # Q falls
    found = []
    for shift in -20, -40:
        torch.manual_seed(7)
        l_pi, _, zeta = m.actor_loss(actor, critic, target, alpha, s_0, (s, a, r + shift, s_next, d), ARGS)
        found.append(grads(l_pi, actor))
        assert not zeta.any()
    assert all(torch.equal(x, y) for x, y in zip(*found))


def test_the_critics_gradient_in_a_constant_by_hand(batch):
    """dJ_j / dc for Q_j + c is E[ f'(delta_j) (m gamma (1 - d) - 1) ] + (1 - gamma) w: the target gives nothing."""
    *_, d = batch
    critic, target, actor, alpha, s_0 = toy()
    torch.manual_seed(7)
    grad = grads(m.critic_loss(critic, target, actor, alpha, s_0, batch, ARGS), critic)[-1].view(S, E)
    torch.manual_seed(7)
    delta = m.residual(critic, target, actor, alpha, s_0, batch, ARGS)[0].detach().tolist()
    for k, e in np.ndindex(S, E):
        rows = zip(delta[k][e], d[k].tolist())
        slopes = [math.copysign(abs(x) ** 0.5, x) * (0.3 * 0.9 * (1 - y) - 1) for x, y in rows]
        assert grad[k, e].item() == pytest.approx(np.mean(slopes) + 0.1 * 0.4, rel=1e-4)


def test_a_residual_of_zero_has_a_finite_gradient(batch):
    critic, target, actor, alpha, s_0 = toy()
    for net in critic, target:
        for x in net.parameters():
            x.data.zero_()
    alpha.log_alpha.data.fill_(-torch.inf)
    s, a, r, s_next, d = batch
    for loss in (m.critic_loss(critic, target, actor, alpha, s_0, (s, a, r * 0, s_next, d), ARGS),
                 m.actor_loss(actor, critic, target, alpha, s_0, (s, a, r * 0, s_next, d), ARGS)[0]):
        assert all(x is None or x.isfinite().all() for x in grads(loss, critic, actor))


# --- a finite MDP: states and actions as unit vectors, of which an "action" of pi is the mean ---
class TableQ(torch.nn.Module):
    def __init__(self, q):  # (S, n, k), for both critics
        super().__init__()
        self.q = torch.nn.Parameter(q.unsqueeze(1).repeat(1, E, 1, 1))

    def forward(self, s, a):
        return torch.einsum("sbn,senk,sbk->seb", s, self.q, a)


class TablePi(torch.nn.Module):
    net = []

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def sample(self, s):
        pi = (s @ self.logits).softmax(-1)
        return pi, (pi * pi.log()).sum(-1)


@pytest.fixture
def mdp():
    """n = 4 states, k = 3 actions; each seed has its own rewards, moves (one of which ends), data, starts, pi, alpha."""
    torch.set_default_dtype(torch.float64)
    rng, n, k = torch.Generator().manual_seed(2), 4, 3
    s, a = torch.eye(n).repeat_interleave(k, 0), torch.eye(k).repeat(n, 1)
    to = torch.randint(0, n, (S, n * k), generator=rng)
    to[:, :n] = torch.arange(n)  # every state can be reached
    count = torch.randint(1, 5, (S, n * k), generator=rng)
    ends = torch.zeros(S, n * k)
    ends[:, -1] = 1
    rows = torch.stack([torch.multinomial(x.double(), 40, True, generator=rng) for x in count])
    rows[:, : n * k] = torch.arange(n * k)  # every pair is in the data
    reward = torch.rand(S, n * k, generator=rng)
    start = torch.randint(0, n, (S, 11), generator=rng)
    start[:, :n] = torch.arange(n)
    logits, alpha = torch.randn(S, n, k, generator=rng), torch.tensor([0.0, 0.1, 0.3])
    pick = lambda x: x.gather(1, rows)
    batch = s[rows], a[rows], pick(reward), torch.eye(n)[pick(to)], pick(ends)
    yield SimpleNamespace(n=n, k=k, to=to, ends=ends, reward=reward, logits=logits, alpha=alpha, batch=batch,
                          s_0=torch.eye(n)[start], data=torch.stack([x.bincount(minlength=n * k) / 40 for x in rows]))
    torch.set_default_dtype(torch.float32)


def solve(mdp, logits, gamma, w, p, share):
    """(zeta / w, Q, min_Q J), each (S, .): visits, a residual whose f' they are, and Q by linear equations."""
    pi = logits.softmax(-1)
    live = (1 - mdp.ends).unsqueeze(-1)
    move = live * torch.einsum("sxn,snk->sxnk", torch.eye(mdp.n)[mdp.to], pi).flatten(2)  # (S, n k, n k)
    entropy = -(pi * pi.log()).sum(-1).gather(1, mdp.to)
    reward = mdp.reward + gamma * (1 - mdp.ends) * mdp.alpha.unsqueeze(-1) * entropy
    first = (mdp.s_0.mean(1).unsqueeze(-1) * pi).flatten(1)
    one = torch.eye(mdp.n * mdp.k)
    visits = (1 - gamma) * torch.linalg.solve(one - share * gamma * move.mT, first)
    ratio = visits / mdp.data
    delta = (w * ratio) ** (1 / (p - 1))
    q = torch.linalg.solve(one - gamma * move, reward - delta)
    return ratio, q.unflatten(1, (mdp.n, mdp.k)), (w * visits * (reward - delta) + mdp.data * power(delta, p)).sum(-1)


def pieces(mdp, share, p=1.5, gamma=0.8, w=0.3):
    args = SimpleNamespace(gamma=gamma, algae_alpha=w, exponent=p, online_share=share)
    actor, alpha = TablePi(mdp.logits.clone()), lambda: mdp.alpha.unsqueeze(-1)
    return args, actor, alpha, solve(mdp, mdp.logits, gamma, w, p, share)


@pytest.mark.parametrize("p, share", [(2.0, 1.0), (1.5, 1.0), (1.5, 0.05)])
def test_at_rest_zeta_is_the_density_ratio(p, share, mdp):
    """Of the visits of pi for a discount of share * gamma to the data, while Q is pi's value of r - delta."""
    args, actor, alpha, (ratio, q, _) = pieces(mdp, share, p)
    critic, target = TableQ(q), TableQ(q)
    (grad,) = torch.autograd.grad(m.critic_loss(critic, target, actor, alpha, mdp.s_0, mdp.batch, args).sum(), critic.q)
    assert grad.abs().max() < 1e-12
    _, _, zeta = m.actor_loss(actor, critic, target, alpha, mdp.s_0, mdp.batch, args)
    s, a, *_ = mdp.batch
    at = (s.argmax(-1) * mdp.k + a.argmax(-1)).unsqueeze(1).expand(S, E, -1)
    torch.testing.assert_close(zeta / args.algae_alpha, ratio.unsqueeze(1).expand(S, E, -1).gather(2, at))
    if share == 1:
        live = (ratio * mdp.data).sum(-1)
        assert (live < 1).all() and (live > 0.5).all()  # the rest is where episodes have ended


def test_at_rest_the_loss_is_least_and_its_actor_gradient_the_policy_gradient(mdp):
    """-grad L_pi = grad in pi of min_Q J, for which the visits of pi are differentiated."""
    args, actor, alpha, (_, q, value) = pieces(mdp, 1.0)
    critic, target = TableQ(q), TableQ(torch.randn_like(q))  # with m = 1 the targets mean nothing
    loss = m.critic_loss(critic, target, actor, alpha, mdp.s_0, mdp.batch, args)
    torch.testing.assert_close(loss.detach(), E * value)
    for _ in range(10):
        other = TableQ(q + 0.1 * torch.randn_like(q))
        assert (m.critic_loss(other, target, actor, alpha, mdp.s_0, mdp.batch, args) > loss).all()
    l_pi, *_ = m.actor_loss(actor, critic, target, alpha, mdp.s_0, mdp.batch, args)
    (found,) = torch.autograd.grad(l_pi.sum(), actor.logits)
    logits = mdp.logits.clone().requires_grad_()
    _, _, value = solve(mdp, logits, args.gamma, args.algae_alpha, args.exponent, 1.0)
    (expected,) = torch.autograd.grad(value.sum(), logits)
    torch.testing.assert_close(-found, expected)
    assert expected.abs().max() > 1e-3


# --- the agent ---
def agent_of(tmp_path, **flags):
    data = made(tmp_path / "x-v0", [4, 9, 20, 7], ["terminal", "timeout", "terminal", "timeout"], obs_dim=O, act_dim=A)
    args = small("algaedice", data, "", num_seeds=S, eval_episodes=0, **flags)
    m.setup(args)
    data = m.load(args)
    m.prepare(data, args)
    return m.Agent(args, O, A, data)


@pytest.mark.parametrize("freq", [2, 3])
def test_an_update_draws_where_episodes_begin_and_moves_actor_and_targets_once(freq, tmp_path, monkeypatch):
    agent, seen, steps = agent_of(tmp_path, policy_freq=freq), [], []
    assert agent.updates_per_call == freq
    for name in "critic_loss", "actor_loss":
        def recorded(*x, loss=getattr(m, name), name=name):
            seen.append((name, *x[4:6]))
            return loss(*x)
        monkeypatch.setattr(m, name, recorded)
    monkeypatch.setattr(m, "polyak", lambda *x, polyak=m.polyak: steps.append(x) or polyak(*x))
    losses = agent.update()
    assert [name for name, *_ in seen] == ["critic_loss"] * freq + ["actor_loss"] and len(steps) == 1
    starts = {(float(e), 0.0) for e in range(4)}
    drawn = [{tuple(x) for x in s_0[k, :, :2].tolist()} for _, s_0, _ in seen for k in range(S)]
    assert all(x <= starts for x in drawn) and set().union(*drawn) == starts
    assert not torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[0][1][0], seen[0][1][1])  # seeds, too
    assert not torch.equal(seen[0][2][0], seen[1][2][0])
    assert seen[-1][1] is seen[-2][1] and seen[-1][2] is seen[-2][2]
    assert losses["zeta"].shape == (S,) and (losses["zeta"] > 0).all()


@pytest.mark.parametrize("flag, value", [("exponent", 1.0), ("online_share", 1.5), ("algae_alpha", 0.0), ("gamma", 1.0)])
def test_bad_input_is_one_sentence(flag, value, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        agent_of(tmp_path, **{flag: value})
    message = stopped.value.code
    assert message.startswith(f"algaedice: --{flag.replace('_', '-')} {value} is ") and "\n" not in message
