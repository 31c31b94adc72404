"""sac_offline.py and cql.py: the logsumexp over proposals, its gradient, its value by hand, the Lagrangian, q_start."""
import difflib
import math
import re
from pathlib import Path
from types import SimpleNamespace

import cql
import numpy as np
import pytest
import sac_offline
import torch
from conftest import made, small

S, E, B, O, A, n = 3, 2, 5, 4, 6, 10
ARGS = SimpleNamespace(gamma=0.9, cql_alpha=5.0, cql_target_gap=None, num_proposals=n)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    d = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0]).expand(S, B)
    return torch.randn(S, B, O), torch.rand(S, B, A) * 2 - 1, torch.randn(S, B), torch.randn(S, B, O), d


def toy(module, seed=1):
    torch.manual_seed(seed)
    actor = module.Actor(S, O, A, 8)
    actor.net[-1].bias.data += torch.linspace(-1, 1, S * 2 * A).view(S, 1, -1)
    return module.Critic(S, O, A, 8), module.Critic(S, O, A, 8), actor, module.Temperature(S)


def forward(net, x, *lead):
    """One network of a module by plain matrix products."""
    for layer in net:
        x = x @ layer.weight[lead] + layer.bias[lead] if hasattr(layer, "weight") else layer(x)
    return x


def draw(actor, s, number, clamp):
    """(a, log density) with the density of the squashed Gaussian by change of variables, one state at a time."""
    mean, log_std = zip(*(forward(actor.net, s[k], k).chunk(2, -1) for k in range(S)))
    mean, log_std = torch.stack(mean), torch.stack(log_std)
    log_std = log_std.clamp(-5, 2) if clamp else -5 + 3.5 * (torch.tanh(log_std) + 1)
    mean, std = (x.repeat(1, number, 1).double() for x in (mean, log_std.exp()))
    u = mean + std * torch.randn(mean.shape).double()
    log_prob = torch.distributions.Normal(mean, std).log_prob(u) - torch.log1p(-torch.tanh(u) ** 2)
    return torch.tanh(u).float(), log_prob.sum(-1)


def test_sac_offline_critic(batch):
    s, a, r, s_next, d = batch
    critic, critic_target, actor, alpha = toy(sac_offline)
    alpha.log_alpha.data = torch.tensor([-1.0, 0.0, 0.5])
    torch.manual_seed(7)
    loss = sac_offline.critic_loss(critic, critic_target, actor, alpha, batch, ARGS)
    torch.manual_seed(7)
    a_next, log_prob = draw(actor, s_next, 1, clamp=False)
    expected = np.zeros(S)
    for k in range(S):
        for i in range(B):
            x, x_next = torch.cat([s[k, i], a[k, i]]), torch.cat([s_next[k, i], a_next[k, i]])
            q_next = min(forward(critic_target.net, x_next, k, e).item() for e in range(E))
            y = r[k, i] + 0.9 * (1 - d[k, i]) * (q_next - math.exp([-1, 0, 0.5][k]) * log_prob[k, i])
            expected[k] += sum((forward(critic.net, x, k, e).item() - y.item()) ** 2 / B for e in range(E))
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-4)


def test_cql_critic_by_hand(batch):
    """Squared error without entropy in y, plus w (logsumexp - Q(s, a)) for each critic over 30 actions, all at s."""
    s, a, r, s_next, d = batch
    critic, critic_target, actor, multiplier = toy(cql)
    multiplier.log_alpha.data = torch.tensor([0.0, 0.7, -0.7])
    torch.manual_seed(7)
    loss, gap = cql.critic_loss(critic, critic_target, actor, multiplier, batch, ARGS)
    torch.manual_seed(7)
    a_target, _ = draw(actor, s_next, 1, clamp=True)
    (a_pi, log_pi), (a_next, log_next) = draw(actor, s, n, clamp=True), draw(actor, s_next, n, clamp=True)
    a_unif = torch.rand(S, n * B, A) * 2 - 1
    expected, gaps = np.zeros(S), np.zeros((S, E))
    for k in range(S):
        for i in range(B):
            x_next = torch.cat([s_next[k, i], a_target[k, i]])
            q_next = min(forward(critic_target.net, x_next, k, e).item() for e in range(E))
            y = (r[k, i] + 0.9 * (1 - d[k, i]) * q_next).item()
            for e in range(E):
                q = forward(critic.net, torch.cat([s[k, i], a[k, i]]), k, e).item()
                terms = []
                for j in range(n):
                    for actions, log_mu in ((a_unif, None), (a_pi, log_pi), (a_next, log_next)):
                        value = forward(critic.net, torch.cat([s[k, i], actions[k, j * B + i]]), k, e).item()
                        terms.append(value - (-A * math.log(2) if log_mu is None else log_mu[k, j * B + i].item()))
                assert len(terms) == 30
                gaps[k, e] += 5 * (np.logaddexp.reduce(terms) - q) / B
                expected[k] += (q - y) ** 2 / B
    expected += np.exp([0.0, 0.7, -0.7]) * gaps.sum(1)
    np.testing.assert_allclose(gap, gaps, rtol=1e-4)
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-4)


def test_logsumexp_runs_over_30_actions_of_one_state_and_critic(batch, monkeypatch):
    seen, logsumexp = [], torch.Tensor.logsumexp
    monkeypatch.setattr(torch.Tensor, "logsumexp", lambda x, dim: seen.append((x.shape, dim)) or logsumexp(x, dim))
    critic, critic_target, actor, multiplier = toy(cql)
    cql.critic_loss(critic, critic_target, actor, multiplier, batch, ARGS)
    assert seen == [((S, E, 30, B), 2)]


def test_q_at_sampled_actions_has_a_gradient_and_data_actions_the_opposite(batch):
    """The gradient of the penalty in Q is softmax - 1[data]: it sums to zero over a state's 31 values."""
    critic, critic_target, actor, multiplier = toy(cql)
    values = []

    def record(s, a):
        values.append(critic(s, a))
        values[-1].retain_grad()
        return values[-1]

    s, a, r, s_next, d = batch
    loss, _ = cql.critic_loss(record, critic_target, actor, multiplier, batch, ARGS)
    (values[0].sum() * 0 + loss.sum()).backward()
    grad = values[0].grad.unflatten(-1, (31, B))
    assert (grad[:, :, 1:] > 0).all()
    torch.testing.assert_close(grad[:, :, 1:].sum(2), torch.full((S, E, B), 5.0 / B))


def test_data_term_belongs_to_each_critic(batch):
    critic, critic_target, actor, multiplier = toy(cql)
    torch.manual_seed(3)
    _, before = cql.critic_loss(critic, critic_target, actor, multiplier, batch, ARGS)
    critic.net[-1].weight.data[:, 1] *= 3
    torch.manual_seed(3)
    _, after = cql.critic_loss(critic, critic_target, actor, multiplier, batch, ARGS)
    assert torch.equal(before[:, 0], after[:, 0]) and not torch.isclose(before[:, 1], after[:, 1]).any()


def test_penalty_of_a_constant_q_is_the_log_volume_of_the_actions(batch):
    """With pi uniform in density the 30 weights are equal and logsumexp(Q - log mu) = Q + log 30 + A log 2."""
    _, critic_target, _, multiplier = toy(cql)
    uniform = SimpleNamespace(sample=lambda s, n=1: (torch.rand(S, n * B, A) * 2 - 1,
                                                     torch.full((S, n * B), -A * math.log(2))))
    constant = lambda s, a: torch.full((S, E, s.shape[1]), 7.0)
    _, gap = cql.critic_loss(constant, critic_target, uniform, multiplier, batch, ARGS)
    torch.testing.assert_close(gap, torch.full((S, E), 5 * (math.log(30) + A * math.log(2))))


def test_multiplier_climbs_above_the_target_gap_and_falls_below():
    multiplier = cql.Temperature(S)
    gap = torch.tensor([[9.0, 11.0], [5.0, 5.0], [0.0, 2.0]])
    loss = cql.multiplier_loss(multiplier, gap, SimpleNamespace(cql_target_gap=5.0))
    assert torch.equal(loss.detach(), torch.tensor([-5.0, 0.0, 4.0]))
    (grad,) = torch.autograd.grad(loss.sum(), multiplier.parameters())
    assert grad.sign().tolist() == [-1, 0, 1]


def test_the_multiplier_rests_at_a_million():
    multiplier = cql.Temperature(1)
    for log_alpha in 14.0, 89.0:
        multiplier.log_alpha.data.fill_(log_alpha)
        loss = cql.multiplier_loss(multiplier, torch.tensor([[9.0, 11.0]]), SimpleNamespace(cql_target_gap=5.0))
        (grad,) = torch.autograd.grad(loss.sum(), multiplier.parameters())
        assert grad == 0 and multiplier().item() == pytest.approx(1e6)


def agent_of(module, dataset, **flags):
    args = small(module.METHOD, dataset, "", num_seeds=S, eval_episodes=0, **flags)
    module.setup(args)
    data = module.load(args)
    return module.Agent(args, data.obs_dim, data.act_dim, data)


@pytest.mark.parametrize("gap", [None, 1.0])
def test_the_multiplier_moves_only_with_a_target_gap(gap, hopper):
    agent = agent_of(cql, hopper, cql_target_gap=gap)
    for _ in range(3):
        agent.update()
    assert ((agent.multiplier.log_alpha != 0).all() if gap else (agent.multiplier.log_alpha == 0).all())


@pytest.mark.parametrize("module", [sac_offline, cql])
def test_q_start_is_the_value_of_the_mode_where_episodes_begin(module, hopper):
    agent = agent_of(module, "+".join([str(hopper)] * 4))
    data, N = agent.data, int(agent.data.episode.max()) + 1
    assert 64 < N < 128
    first = [int((data.episode == i).nonzero()[0]) for i in range(0, N, 2)]  # at most 64, of all sets of a mixture
    agent.update()
    q_start = agent.update()["q_start"]
    s = data.obs[first].expand(S, -1, -1)
    expected = agent.critic(s, agent.actor(s)).amin(1).mean(-1)
    torch.testing.assert_close(q_start, expected.detach())


def test_cql_puts_actions_without_data_below_the_data_and_sac_does_not(tmp_path):
    """One step with reward 1 at a = 0.5, the only action in the data."""
    path = made(tmp_path / "one-v0", [1] * 64, ["terminal"] * 64, act_dim=1, actions=np.full((64, 1), 0.5, np.float32),
                rewards=np.ones(64, np.float32))
    gaps = {}
    for module in (sac_offline, cql):
        agent = agent_of(module, path, batch_size=32, hidden_dim=32, critic_lr=3e-3)
        for _ in range(300):
            agent.update()
        s, other = agent.data.obs[:32].expand(S, -1, -1), torch.linspace(-1, 1, 32).view(1, -1, 1).expand(S, -1, 1)
        at_data = agent.critic(s, torch.full_like(other, 0.5)).mean((1, 2))
        gaps[module.METHOD] = (at_data - agent.critic(s, other).mean((1, 2))).detach()
    assert (gaps["cql"] > 1).all() and (gaps["sac_offline"] < 0.5).all(), gaps


def test_cql_differs_from_sac_offline_by_60_lines():
    a, b = ([x for x in Path(m.__file__).read_text().splitlines() if x.strip()] for m in (sac_offline, cql))
    changed = [x for x in difflib.unified_diff(a, b, n=0, lineterm="") if re.match(r"[+-](?![+-]{2})", x)]
    assert len(changed) <= 60
