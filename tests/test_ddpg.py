"""ddpg_offline.py: its losses by hand, one step of each network and both targets in an update, the best action
of a small problem."""
from types import SimpleNamespace

import ddpg_offline
import numpy as np
import pytest
import torch
from conftest import checkpoint, small
from test_learning import BEST, uniform  # noqa: F401, a fixture

S, B, O, A = 3, 5, 4, 6
ARGS = SimpleNamespace(gamma=0.9)


def close(tensor, expected):
    assert tensor.shape == (S,)
    np.testing.assert_allclose(tensor.detach().numpy(), expected, rtol=2e-5, atol=1e-6)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    d = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0]).expand(S, B)
    return torch.randn(S, B, O), torch.rand(S, B, A) * 2 - 1, torch.randn(S, B), torch.randn(S, B, O), d


def toy(module, seed):
    """Critic, its target, actor, its target: four different networks."""
    torch.manual_seed(seed)
    return (module.Critic(S, O, A, 8), module.Critic(S, O, A, 8), module.Actor(S, O, A, 8), module.Actor(S, O, A, 8))


def each():
    return [(k, i) for k in range(S) for i in range(B)]


# --- DDPG's losses ---
@pytest.mark.parametrize("module", [ddpg_offline])
def test_the_critic_is_one_network_for_each_seed(module, batch):
    s, a, *_ = batch
    critic, _, actor, _ = toy(module, 1)
    q = critic(s, a)
    assert q.shape == (S, B) and actor(s).shape == (S, B, A) and critic.net[0].weight.shape == (S, O + A, 8)
    for k in range(S):
        x = torch.cat([s[k], a[k]], -1)
        for layer in critic.net:
            x = x @ layer.weight[k] + layer.bias[k] if hasattr(layer, "weight") else layer(x)
        torch.testing.assert_close(q[k], x[:, 0])


@pytest.mark.parametrize("module", [ddpg_offline])
def test_ddpg_critic(module, batch):
    s, a, r, s_next, d = batch
    critic, critic_target, _, actor_target = toy(module, 2)
    q, q_next = critic(s, a).detach(), critic_target(s_next, actor_target(s_next)).detach()
    total = np.zeros(S)
    for k, i in each():
        total[k] += (q[k, i] - r[k, i] - 0.9 * (1 - d[k, i]) * q_next[k, i]) ** 2 / B
    close(module.critic_loss(critic, critic_target, actor_target, batch, ARGS), total)


@pytest.mark.parametrize("module", [ddpg_offline])
def test_ddpg_actor_climbs_q(module, batch):
    """The loss, and its gradient by the chain rule: dQ/da at pi(s), then dpi/dphi."""
    critic, _, actor, _ = toy(module, 3)
    s = batch[0]
    q = critic(s, actor(s)).detach()
    loss = module.actor_loss(actor, critic, s)
    close(loss, [-np.mean([q[k, i] for i in range(B)]) for k in range(S)])
    found, a = torch.autograd.grad(loss.sum(), actor.parameters()), actor(s).detach().requires_grad_()
    slope = torch.autograd.grad(critic(s, a).sum(), a)[0] / B
    for x, y in zip(found, torch.autograd.grad(actor(s), actor.parameters(), -slope)):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("module", [ddpg_offline])
def test_target_stops_at_termination_only_and_has_no_gradient(module, batch):
    s, a, r, s_next, _ = batch
    critic, *targets = (x for i, x in enumerate(toy(module, 11)) if i != 2)
    for d, depends in (torch.zeros(S, B), True), (torch.ones(S, B), False):
        losses = [module.critic_loss(critic, *targets, (s, a, r, x, d), ARGS) for x in (s_next, s_next + 1)]
        assert torch.equal(*losses) != depends
    grads = torch.autograd.grad(losses[0].sum(), [p for x in targets for p in x.parameters()], allow_unused=True)
    assert grads == (None,) * len(grads)


# --- ddpg_offline.py ---
def offline_agent(**flags):
    """An agent with 20 steps in five episodes, and its module's args."""
    torch.manual_seed(0)
    args = ddpg_offline.Args(num_seeds=S, hidden_dim=16, batch_size=8, device="cpu", **flags)
    data = SimpleNamespace(obs=torch.randn(20, O), next_obs=torch.randn(20, O), action=torch.rand(20, A) * 2 - 1,
                           reward=torch.randn(20), terminated=torch.zeros(20),
                           episode=torch.arange(5).repeat_interleave(4))
    return ddpg_offline.Agent(args, O, A, data)


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def test_an_update_steps_the_critic_then_the_actor_then_both_targets(monkeypatch):
    agent, seen = offline_agent(), []
    for name in "critic_loss", "actor_loss":
        loss = getattr(ddpg_offline, name)
        monkeypatch.setattr(ddpg_offline, name, lambda *args, name=name, loss=loss: (
            seen.append((name, weights(agent.critic), weights(agent.actor))), loss(*args))[1])
    critic, actor, targets = weights(agent.critic), weights(agent.actor), [
        weights(agent.critic_target), weights(agent.actor_target)]
    agent.update()
    assert [name for name, *_ in seen[:2]] == ["critic_loss", "actor_loss"]
    (_, *before), (_, critic_between, actor_between) = seen[:2]
    assert all(torch.equal(x, y) for x, y in zip(before[0] + before[1], critic + actor))
    assert not any(torch.equal(x, y) for x, y in zip(critic_between, critic))  # the actor climbs the new Q
    assert all(torch.equal(x, y) for x, y in zip(actor_between, actor))
    assert all(torch.equal(x, y) for x, y in zip(critic_between, weights(agent.critic)))  # and does not move it
    for old, target, online in zip(targets, (agent.critic_target, agent.actor_target), (agent.critic, agent.actor)):
        for x, y, z in zip(old, target.parameters(), online.parameters()):
            torch.testing.assert_close(y, (0.995 * x + 0.005 * z).detach())


def test_q_start_is_q_of_the_policy_where_episodes_begin():
    agent = offline_agent()
    found = agent.update()["q_start"]
    first = agent.data.obs[[0, 4, 8, 12, 16]].expand(S, 5, O)
    close(found, agent.critic(first, agent.actor(first)).mean(-1).detach())


def test_observations_are_normalised_for_training_and_acting(hopper, tmp_path):
    args = small("ddpg_offline", hopper, tmp_path, num_seeds=3)
    data = ddpg_offline.load(args)
    raw, policy = data.obs.clone(), torch.export.load(ddpg_offline.main(args) / "policy.pt2").module()
    ddpg_offline.prepare(data, args)
    torch.testing.assert_close(data.obs.mean(0), torch.zeros(11), atol=1e-4, rtol=0)
    (folder,) = tmp_path.iterdir()
    actor, found = ddpg_offline.Actor(3, 11, 3, 16), checkpoint(folder)["agent"]
    actor.load_state_dict({name: found[f"actor.{name}"] for name in actor.state_dict()})
    torch.testing.assert_close(policy(raw[:7]), actor(data.obs[:7].expand(3, 7, 11)).detach())


def test_ddpg_offline_finds_the_best_action(uniform, tmp_path):  # noqa: F811
    args = small("ddpg_offline", uniform, tmp_path, num_seeds=2, num_updates=2000, hidden_dim=32, batch_size=128,
                 eval_episodes=0)
    policy = torch.export.load(ddpg_offline.main(args) / "policy.pt2").module()
    found = policy(torch.rand(500, 2) * 2 - 1).mean(1).numpy()
    np.testing.assert_allclose(found, np.stack([BEST, BEST]), atol=0.15)  # it wavers about it
