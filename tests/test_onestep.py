"""onestep.py: losses by hand, successive steps across the ends of episodes, both phases, and chains with a known Q."""
import csv
import math
from types import SimpleNamespace

import numpy as np
import onestep
import pytest
import torch
from conftest import checkpoint, flat, made, resume, same, small, stop_at

S, B, O, A = 3, 5, 4, 6
ARGS = SimpleNamespace(gamma=0.9, beta=3.0)
IMPROVE, CLONE = torch.tensor(True), torch.tensor(False)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    d = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0]).expand(S, B)
    s, s_next = torch.randn(2, S, B, O)
    a, a_next = torch.rand(2, S, B, A) * 2 - 1
    return s, a, torch.randn(S, B), s_next, d, a_next


def toy(seed=1):
    torch.manual_seed(seed)
    critic, critic_target = onestep.Critic(S, O, A, 8), onestep.Critic(S, O, A, 8)
    actor, value = onestep.Actor(S, O, A, 8), onestep.Value(S, O, 8)
    actor.log_std.data += torch.linspace(-1, 1, S * A).view(S, 1, A)
    return critic, critic_target, actor, value


def forward(net, k, *x):
    """One network of a module by plain matrix products, on one vector."""
    x = torch.cat(x).unsqueeze(0)
    for layer in net:
        x = x @ layer.weight[k] + layer.bias[k] if hasattr(layer, "weight") else layer(x)
    return x[0].detach()


def each():
    return [(k, i) for k in range(S) for i in range(B)]


def close(tensor, expected):
    assert tensor.shape == (S,)
    np.testing.assert_allclose(tensor.detach(), expected, rtol=2e-5, atol=1e-6)


def test_critic_by_hand(batch):
    """SARSA: the target's action at s' is the data's."""
    s, a, r, s_next, d, a_next = batch
    critic, critic_target, *_ = toy()
    expected = np.zeros(S)
    for k, i in each():
        y = r[k, i] + 0.9 * (1 - d[k, i]) * forward(critic_target.net, k, s_next[k, i], a_next[k, i])
        expected[k] += (forward(critic.net, k, s[k, i], a[k, i]) - y).item() ** 2 / B
    assert critic(s, a).shape == (S, B)
    close(onestep.critic_loss(critic, critic_target, batch, ARGS), expected)


def test_value_by_hand(batch):
    s, a, *_ = batch
    critic, _, _, value = toy()
    expected = np.zeros(S)
    for k, i in each():
        expected[k] += (forward(critic.net, k, s[k, i], a[k, i]) - forward(value.net, k, s[k, i])).item() ** 2 / B
    close(onestep.value_loss(value, critic, batch), expected)


@pytest.mark.parametrize("improve", [CLONE, IMPROVE])
def test_actor_by_hand(improve, batch):
    """Weights are cut off after exp, which overflows in seed 0; a clone has none."""
    s, a, *_ = batch
    critic, _, actor, value = toy()
    critic.net[-1].bias.data[0] += 1000
    expected = np.zeros(S)
    for k, i in each():
        adv = (forward(critic.net, k, s[k, i], a[k, i]) - forward(value.net, k, s[k, i])).item()
        w = math.exp(min(3 * adv, math.log(100))) if improve else 1
        normal = torch.distributions.Normal(torch.tanh(forward(actor.net, k, s[k, i])), actor.log_std[k, 0].detach().exp())
        expected[k] -= w * normal.log_prob(a[k, i]).sum().item() / B
    close(onestep.actor_loss(actor, value, critic, improve, batch, ARGS), expected)


def test_each_loss_has_a_gradient_in_its_own_network_only(batch):
    critic, critic_target, actor, value = toy()
    losses = [(critic, onestep.critic_loss(critic, critic_target, batch, ARGS)), (value, onestep.value_loss(value, critic, batch)),
              (actor, onestep.actor_loss(actor, value, critic, IMPROVE, batch, ARGS))]
    for own, loss in losses:
        for net in critic, critic_target, actor, value:
            grads = torch.autograd.grad(loss.sum(), list(net.parameters()), allow_unused=True, retain_graph=True)
            assert all((grad is not None) == (net is own) for grad in grads)


def data_of(lengths, ends, tmp_path, arrays={}, **flags):
    args = small("onestep", made(tmp_path / "x", lengths, ends, **arrays), "", num_seeds=S, **flags)
    onestep.setup(args)
    data = onestep.load(args)
    onestep.prepare(data, args)
    return data, args


def test_successive_steps_by_hand(tmp_path):
    """Nine steps in four episodes, of which two are cut off: nothing follows their last step."""
    actions = np.tile(np.arange(1, 10, dtype=np.float32)[:, None] / 100, 2)
    data, args = data_of([3, 2, 1, 3], ["terminal", "timeout", "terminal", ""], tmp_path, {"actions": actions}, batch_size=6)
    expected = [2, 3, 0, 5, 0, 0, 8, 9, 0]  # the next action of the same episode, 0 where there is none
    torch.testing.assert_close(data.next_action, torch.tensor(expected).unsqueeze(-1).expand(9, 2) / 100)
    assert data.steps.tolist() == [0, 1, 2, 3, 5, 6, 7]  # without the last steps of episodes 1 and 3


def test_no_draw_crosses_the_end_of_an_episode(tmp_path):
    data, args = data_of([5, 4, 1, 6], ["timeout", "terminal", "timeout", "terminal"], tmp_path, batch_size=16)
    args.batch_size = 400
    s, a, r, s_next, d, a_next = onestep.draw(data, args)
    assert a_next.shape == (S, 400, 2) and d.shape == (S, 400) and not torch.equal(s[0], s[1])
    go_on = d == 0
    torch.testing.assert_close(s_next[go_on][:, 1] - s[go_on][:, 1], torch.ones(int(go_on.sum())))  # a step later
    torch.testing.assert_close(a_next[go_on][:, 0], s_next[go_on][:, 1] / 100)  # the action of that step
    drawn = {(int(x[0]), int(x[1])) for x in s.flatten(0, 1)}
    assert drawn == {(0, t) for t in range(4)} | {(1, t) for t in range(4)} | {(3, t) for t in range(6)}
    assert {(int(x[0]), int(x[1])) for x in s[d == 1]} == {(1, 3), (3, 5)}


def agent_of(dataset, S=S, **flags):
    args = small("onestep", dataset, "", num_seeds=S, eval_episodes=0, **flags)
    onestep.setup(args)
    data = onestep.load(args)
    onestep.prepare(data, args)
    torch.manual_seed(0)
    return onestep.Agent(args, data.obs_dim, data.act_dim, data)


def weights(module):
    return [p.clone() for p in module.parameters()]


def test_pi_clones_until_q_and_v_rest_to_the_bit(hopper, monkeypatch):
    agent, phases, loss = agent_of(hopper, num_updates=20, improve_share=0.3), [], onestep.actor_loss
    monkeypatch.setattr(onestep, "actor_loss", lambda *x: phases.append(bool(x[3])) or loss(*x))
    for i in range(20):
        before = [weights(m) for m in (agent.critic, agent.value, agent.actor)]
        agent.update()
        after = [weights(m) for m in (agent.critic, agent.value, agent.actor)]
        same = [all(map(torch.equal, a, b)) for a, b in zip(before, after)]
        assert same == ([False, False, False] if i < 14 else [True, True, False])
    assert phases == [False] * 14 + [True] * 6


def test_q_does_not_know_the_policy(hopper):
    """One step: whatever pi is, Q and V are the same to the bit."""
    found = []
    for change in 0, 1:
        agent = agent_of(hopper)
        agent.actor.net[0].weight.data += change
        torch.manual_seed(1)
        for _ in range(5):
            agent.update()
        found.append(weights(agent.critic) + weights(agent.value))
    assert all(map(torch.equal, *found))


CHAIN = 4  # states; "left" (a < 0) ends the episode with reward 1, "right" goes on; at the last, it ends with 3


def chain(rng, episodes, right):
    """Arrays of episodes of a policy that goes right with a probability; where it may not stop an episode is cut off."""
    rows, lengths, ends = [], [], []
    for _ in range(episodes):
        for t in range(CHAIN):
            go = rng.random() < right
            rows.append((t, 1.0 if go else -1.0, 3.0 if go and t == CHAIN - 1 else 0.0 if go else 1.0))
            if not go or t == CHAIN - 1:
                break
        lengths.append(t + 1)
        ends.append("terminal")
    t, a, r = np.array(rows, np.float32).T
    obs = np.eye(CHAIN + 1, dtype=np.float32)
    return dict(observations=obs[t.astype(int)], next_observations=obs[t.astype(int) + 1], actions=a[:, None], rewards=r), lengths, ends


def test_q_of_a_chain_is_that_of_the_behaviour(tmp_path):
    """Q(t, right) = gamma V(t + 1) with V(t) = p Q(t, right) + 1 - p: of the data's policy, and below the optimal one's."""
    p, gamma = 0.5, 0.9
    arrays, lengths, ends = chain(np.random.default_rng(0), 150, p)
    agent = agent_of(made(tmp_path / "x", lengths, ends, obs_dim=CHAIN + 1, act_dim=1, **arrays), gamma=gamma, tau=0.1,
                     return_range=0.0, num_updates=10**6, batch_size=64, hidden_dim=32, learning_rate=5e-3)
    for i in range(500):
        if i == 350:
            agent.args.learning_rate = 3e-4
        agent.update()
    t, a = agent.data.obs.argmax(-1).numpy(), agent.data.action[:, 0].numpy() > 0
    p = [a[t == k].mean() for k in range(CHAIN)]  # as drawn
    right, values = 3.0, []
    for k in reversed(range(CHAIN)):
        values.append(right)
        right = gamma * (p[k] * right + 1 - p[k])
    s = torch.eye(CHAIN + 1)[:CHAIN].expand(S, -1, -1)
    ones = torch.ones(S, CHAIN, 1)
    q = agent.critic(s, ones * (1 - 1e-5)).detach()
    optimal = [3 * gamma ** (CHAIN - 1 - k) for k in range(CHAIN)]
    assert values[-1] < optimal[0] - 0.7
    np.testing.assert_allclose(q, np.tile(values[::-1], (S, 1)), atol=0.12)
    np.testing.assert_allclose(agent.critic(s, -ones * (1 - 1e-5)).detach(), np.ones((S, CHAIN)), atol=0.12)
    v = [p[k] * values[::-1][k] + 1 - p[k] for k in range(CHAIN)]
    np.testing.assert_allclose(agent.value(s).detach(), np.tile(v, (S, 1)), atol=0.12)


def test_the_step_after_a_cut_is_no_terminal_one(tmp_path):
    """Reward 1 for ever, in episodes that are cut off: Q is 1 / (1 - gamma) all the same, since no cut is ever drawn."""
    n = 20
    agent = agent_of(made(tmp_path / "x", [n] * 5, ["timeout"] * 5, observations=np.zeros((100, 3), np.float32),
                          next_observations=None, rewards=np.ones(100, np.float32)),
                     gamma=0.8, tau=0.2, return_range=0.0, num_updates=10**6, learning_rate=1e-2)
    for _ in range(150):
        agent.update()
    np.testing.assert_allclose(agent.critic(agent.data.obs, agent.data.action).detach().mean(1), np.full(S, 5.0), rtol=0.08)


def test_one_step_finds_the_best_action_and_a_clone_the_mean():
    """Reward -(a - best)^2, actions uniform."""
    n, best = 1000, torch.tensor([0.5, -0.4])
    torch.manual_seed(0)
    data = SimpleNamespace(obs=torch.zeros(n, 2), next_obs=torch.zeros(n, 2), action=torch.rand(n, 2) * 2 - 1,
                           terminated=torch.ones(n), episode=torch.arange(n))
    data.reward = -(data.action - best).square().sum(-1)
    args = onestep.Args(num_seeds=S, num_updates=600, improve_share=0.4, batch_size=128, hidden_dim=32, learning_rate=1e-2,
                        return_range=50.0, device="cpu")
    onestep.prepare(data, args)
    agent = onestep.Agent(args, 2, 2, data)
    for i in range(600):
        agent.update()
        if i == 350:
            assert agent.policy(data.obs[:1]).abs().max() < 0.12
    np.testing.assert_allclose(agent.policy(data.obs[:1]).detach()[:, 0], best.expand(S, -1), atol=0.12)


# --- as tests/test_runs.py does, on batches with a next action ---
def tensors_of(agent):
    opts = {name: x.state_dict()["state"] for name, x in vars(agent).items() if isinstance(x, torch.optim.Optimizer)}
    states = {"agent": agent.state_dict(), **opts}
    return {name: x for name, x in flat(states).items() if x.dim()}


def batches(n):
    torch.manual_seed(5)
    return [(torch.randn(S, 8, 4), torch.rand(S, 8, 2) * 2 - 1, torch.randn(S, 8), torch.randn(S, 8, 4),
             (torch.rand(S, 8) < 0.2).float(), torch.rand(S, 8, 2) * 2 - 1) for _ in range(n)]


def fed(agent, rows, monkeypatch):
    feed = iter(rows)
    monkeypatch.setattr(onestep, "draw", lambda data, args: next(feed))
    for _ in rows:
        agent.update()
    return tensors_of(agent)


def plain(S):
    torch.manual_seed(0)
    return onestep.Agent(onestep.Args(num_seeds=S, num_updates=8, improve_share=0.5, hidden_dim=16, device="cpu"), 4, 2, None)


def test_nan_in_seed_0_leaves_the_others_bit_identical(monkeypatch):
    poisoned = batches(6)
    poisoned[1][1][0] = torch.nan
    clean, poisoned = fed(plain(S), batches(6), monkeypatch), fed(plain(S), poisoned, monkeypatch)
    assert all(torch.equal(x[1:], poisoned[name][1:]) for name, x in clean.items())
    assert poisoned["/agent/actor.net.0.weight"][0].isnan().all() and poisoned["/agent/critic.net.0.weight"][0].isnan().all()


def test_seeds_together_equal_seeds_apart(monkeypatch):
    together, start = plain(S), {name: x.clone() for name, x in tensors_of(plain(S)).items()}
    together = fed(together, batches(8), monkeypatch)
    for k in range(S):
        apart = plain(1)
        for name, x in tensors_of(apart).items():
            x.copy_(start[name][k : k + 1])
        for name, x in fed(apart, [[x[k : k + 1] for x in batch] for batch in batches(8)], monkeypatch).items():
            torch.testing.assert_close(x[0], together[name][k], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("stop", [12, 36])
def test_resume_equals_uninterrupted_to_the_bit_in_both_phases(stop, hopper, tmp_path, monkeypatch):
    flags = dict(num_seeds=2, improve_share=0.3)
    whole = onestep.main(small("onestep", hopper, tmp_path / "a", **flags))
    stop_at(onestep, stop, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        onestep.main(small("onestep", hopper, tmp_path / "b", **flags))
    monkeypatch.undo()
    (folder,) = (tmp_path / "b").iterdir()
    assert stopped.value.code == f"onestep: stopped at update {stop}; go on with --resume {folder}"
    resume(onestep, folder)
    a, b = checkpoint(whole), checkpoint(folder)
    assert a["update"] == 40 and all(same(a[part], b[part]) for part in ("update", "agent", "moments", "rng"))
    for name in "eval.csv", "losses.csv":
        assert (whole / name).read_text() == (folder / name).read_text()
    rows = list(csv.DictReader((whole / "eval.csv").open()))
    assert [(row["update"], row["seed"]) for row in rows] == [("20", "0"), ("20", "1"), ("40", "0"), ("40", "1")]
    policy = torch.export.load(whole / "policy.pt2").module()
    assert policy(torch.zeros(7, 11)).shape == (2, 7, 3)
    assert all(x.dim() == 0 or x.shape[0] == 2 for x in flat(a["agent"]).values())


@pytest.mark.parametrize("flags, part", [
    ({"improve_share": 0.0}, "--improve-share has to be between 0 and 1"),
    ({"improve_share": 1.0}, "--improve-share has to be between 0 and 1"), ({"beta": -1.0}, "--beta cannot be -1.0")])
def test_bad_flags_are_one_sentence(flags, part, hopper, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        onestep.main(small("onestep", hopper, tmp_path / "out", **flags))
    assert stopped.value.code == f"onestep: {part}" and not (tmp_path / "out").exists()


def test_data_without_two_steps_in_a_row_are_refused(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        data_of([1] * 20, ["timeout"] * 20, tmp_path, return_range=0.0)
    assert stopped.value.code == "onestep: in these data no step has a next one"
