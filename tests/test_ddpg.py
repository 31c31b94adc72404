"""ddpg.py, ddpg_offline.py and td3.py: their losses by hand, who is stepped when in an update, the best action of small
problems, and the datasets that are recorded: they replay, end where they should, and the loader reads them."""
from importlib import import_module
from types import SimpleNamespace

import ddpg
import ddpg_offline
import gymnasium as gym
import minari
import numpy as np
import pytest
import td3
import td3_bc
import torch
from conftest import checkpoint, resume, same, small, stop_at
from test_learning import BEST  # and Point-v0

S, B, O, A = 3, 5, 4, 6
ARGS = SimpleNamespace(gamma=0.9, policy_noise=0.2, noise_clip=0.1)


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
@pytest.mark.parametrize("module", [ddpg, ddpg_offline])
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


@pytest.mark.parametrize("module", [ddpg, ddpg_offline])
def test_ddpg_critic(module, batch):
    s, a, r, s_next, d = batch
    critic, critic_target, _, actor_target = toy(module, 2)
    q, q_next = critic(s, a).detach(), critic_target(s_next, actor_target(s_next)).detach()
    total = np.zeros(S)
    for k, i in each():
        total[k] += (q[k, i] - r[k, i] - 0.9 * (1 - d[k, i]) * q_next[k, i]) ** 2 / B
    close(module.critic_loss(critic, critic_target, actor_target, batch, ARGS), total)


@pytest.mark.parametrize("module", [ddpg, ddpg_offline])
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


@pytest.mark.parametrize("module", [ddpg, ddpg_offline])
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


def weights(*modules):
    return [p.detach().clone() for module in modules for p in module.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def watch(module, agent, monkeypatch):
    """A list into which every call of a loss writes its name, its arguments and the online weights at that time."""
    seen = []
    for name in "critic_loss", "actor_loss":
        def watched(*args, name=name, loss=getattr(module, name)):
            seen.append((name, args, weights(agent.critic), weights(agent.actor)))
            return loss(*args)
        monkeypatch.setattr(module, name, watched)
    return seen


def batches(n):
    """As a replay gives them."""
    return [(torch.randn(S, 8, O), torch.rand(S, 8, A) * 2 - 1, torch.randn(S, 8), torch.randn(S, 8, O),
             (torch.rand(S, 8) < 0.2).float()) for _ in range(n)]


def moved(old, online, tau):
    return [(1 - tau) * x + tau * y for x, y in zip(old, online, strict=True)]


@pytest.mark.parametrize("module", [ddpg, ddpg_offline])
def test_an_update_steps_the_critic_then_the_actor_then_both_targets(module, monkeypatch):
    agent = online_agent(ddpg, tau=0.5) if module is ddpg else offline_agent(tau=0.5)
    if module is ddpg:
        monkeypatch.setattr(ddpg.Replay, "sample", lambda self, B: batches(1)[0])
    critic, actor = weights(agent.critic), weights(agent.actor)
    targets = weights(agent.critic_target, agent.actor_target)
    seen = watch(module, agent, monkeypatch)
    agent.update()
    (first, called, *before), (second, _, critic_between, actor_between), *_ = seen
    assert (first, second) == ("critic_loss", "actor_loss") and equal(sum(before, []), critic + actor)
    assert agent.updates_per_call == 1 and called[:3] == (agent.critic, agent.critic_target, agent.actor_target)
    assert not equal(critic_between, critic) and equal(actor_between, actor)  # the actor climbs the new Q
    assert equal(critic_between, weights(agent.critic)) and not equal(actor, weights(agent.actor))  # and leaves it
    torch.testing.assert_close(weights(agent.critic_target, agent.actor_target),
                               moved(targets, weights(agent.critic, agent.actor), 0.5))


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


@pytest.mark.parametrize("width", [1, 0.1])
def test_it_finds_the_best_action_of_wide_data_and_believes_in_unseen_ones_on_narrow_data(width):
    """A reward of -|a - best|^2 in every step, of which Q <= 0 of any policy is the sum."""
    torch.manual_seed(0)
    flags = dict(num_seeds=4, hidden_dim=32, batch_size=64, device="cpu", gamma=0.9, tau=0.1, learning_rate=2e-3)
    args = ddpg_offline.Args(**flags)
    best, obs, next_obs, action = torch.tensor([0.5, -0.4]), *(torch.rand(3, 1000, 2) * 2 - 1)
    data = SimpleNamespace(obs=obs, next_obs=next_obs, action=width * action, terminated=torch.zeros(1000),
                           reward=-(width * action - best).square().sum(-1), episode=torch.arange(1000))
    agent = ddpg_offline.Agent(args, 2, 2, data)
    for _ in range(600):
        q_start = agent.update()["q_start"]
    pi = agent.actor(torch.rand(4, 500, 2) * 2 - 1).mean(1).detach()
    if width == 1:
        torch.testing.assert_close(pi, best.expand(4, 2), atol=0.2, rtol=0)
        assert q_start.abs().max() < 1
    else:
        assert q_start.mean() > 5 and pi.abs().mean() > 0.9


# --- td3.py ---
def test_td3_critic(batch):
    """Both critics have one target, the smaller Q' at one noisy action; its noise is clipped, then the action."""
    s, a, r, s_next, d = batch
    critic, critic_target, _, actor_target = toy(td3, 2)
    actor_target.net[-1].bias.data += torch.linspace(-3, 3, A)  # some actions near the bounds
    torch.manual_seed(7)
    loss = td3.critic_loss(critic, critic_target, actor_target, batch, ARGS)
    torch.manual_seed(7)
    noise, pi = 0.2 * torch.randn(S, B, A), actor_target(s_next).detach()
    assert (noise.abs() > 0.1).any() and (pi + noise.clamp(-0.1, 0.1)).abs().max() > 1
    a_next = torch.zeros(S, B, A)
    for k, i in each():
        for j in range(A):
            a_next[k, i, j] = max(-1.0, min(1.0, pi[k, i, j] + max(-0.1, min(0.1, noise[k, i, j].item()))))
    q, q_next, total = critic(s, a).detach(), critic_target(s_next, a_next).detach(), np.zeros(S)
    for k, i in each():
        y = r[k, i] + 0.9 * (1 - d[k, i]) * min(q_next[k, 0, i], q_next[k, 1, i])
        total[k] += ((q[k, 0, i] - y) ** 2 + (q[k, 1, i] - y) ** 2) / B
    close(loss, total)


def test_td3_actor_climbs_the_first_q_alone(batch):
    critic, _, actor, _ = toy(td3, 3)
    q, loss = critic(batch[0], actor(batch[0])), td3.actor_loss(actor, critic, batch[0])
    assert q.shape == (S, 2, B)
    close(loss, -q[:, 0].mean(-1).detach())
    slope = lambda x: torch.autograd.grad(x.sum(), actor.parameters(), retain_graph=True)
    for x, y in zip(slope(loss), slope(-q[:, 0] / B)):
        torch.testing.assert_close(x, y)


def test_td3_steps_the_actor_and_moves_the_targets_once_in_two_critic_steps(monkeypatch):
    agent = online_agent(td3, tau=0.5)
    critic, actor = weights(agent.critic), weights(agent.actor)
    targets = weights(agent.critic_target, agent.actor_target)
    given = batches(2)
    monkeypatch.setattr(td3.Replay, "sample", lambda self, B, feed=iter(given): next(feed))
    seen = watch(td3, agent, monkeypatch)
    agent.update()
    assert agent.updates_per_call == 2 and [name for name, *_ in seen] == ["critic_loss", "critic_loss", "actor_loss"]
    (_, one, critic_0, actor_0), (_, two, critic_1, actor_1), (_, last, critic_2, actor_2) = seen
    assert equal(critic_0, critic) and not equal(critic_1, critic_0) and not equal(critic_2, critic_1)
    assert equal(actor_0 + actor_1 + actor_2, 3 * actor) and not equal(weights(agent.actor), actor)
    assert equal(critic_2, weights(agent.critic))  # the actor's step leaves the critic
    for args, fed in zip((one, two), given):
        assert args[:4] == (agent.critic, agent.critic_target, agent.actor_target, fed)
    assert last[2] is given[1][0]
    torch.testing.assert_close(weights(agent.critic_target, agent.actor_target),
                               moved(targets, weights(agent.critic, agent.actor), 0.5))


# --- acting ---
def online_agent(module, **flags):
    torch.manual_seed(0)
    args = module.Args(num_seeds=S, hidden_dim=16, batch_size=8, device="cpu", **flags)
    return module.Agent(args, O, A, module.Replay(S, 4, O, A))


ONLINE = [ddpg, td3]


@pytest.mark.parametrize("module", ONLINE)
def test_exploration_adds_noise_and_stays_in_the_bounds(module):
    actor = module.Actor(S, O, A, 8)
    s = torch.randn(S, 4000, O)
    pi, a = actor(s), actor.sample(s, 0.1)
    inside = pi.abs() < 0.5  # five deviations from the bounds
    assert (a - pi)[inside].std().item() == pytest.approx(0.1, rel=0.02) and abs((a - pi)[inside].mean()) < 0.002
    assert torch.equal(actor.sample(s, 0.0), pi) and actor.sample(s, 5.0).abs().max() == 1


@pytest.mark.parametrize("module", ONLINE)
def test_the_first_steps_are_uniform_and_later_ones_follow_the_policy(module, tmp_path):
    folder = module.main(small(module.METHOD, None, tmp_path, num_seeds=2, num_steps=700, learning_starts=690,
                               eval_episodes=0, exploration_noise=0.0))
    found = replay_of(folder)
    first = found["action"][:, :690]
    assert first.abs().max() <= 1 and first.std().item() == pytest.approx(3**-0.5, rel=0.05)
    actor, before = module.Actor(2, 11, 3, 16), checkpoint(folder)["agent"]
    actor.load_state_dict({name: before[f"actor.{name}"] for name in actor.state_dict()})
    torch.testing.assert_close(found["action"][:, -1:], actor(found["obs"][:, -1:]), atol=0.05, rtol=0)


@pytest.mark.parametrize("module", ONLINE)
def test_a_truncated_step_is_not_terminated(module, tmp_path):
    """Pendulum never terminates: 200 steps, then a time limit."""
    folder = module.main(small(module.METHOD, None, tmp_path, env_id="Pendulum-v1", num_steps=220, eval_episodes=0))
    found = replay_of(folder)
    assert found["truncated"][0].nonzero().flatten().tolist() == [199] and not found["terminated"].any()
    assert not torch.equal(found["next_obs"][0, 199], found["obs"][0, 200])
    assert found["action"].abs().max() <= 1


@pytest.mark.parametrize("module", ONLINE)
def test_online_it_finds_the_best_action(module, tmp_path):
    args = small(module.METHOD, None, tmp_path, env_id="Point-v0", num_seeds=2, num_steps=800, learning_starts=200,
                 learning_rate=2e-3, hidden_dim=32, batch_size=64, eval_episodes=0, eval_every=10**6)
    policy = torch.export.load(module.main(args) / "policy.pt2").module()
    found = policy(torch.rand(500, 2) * 2 - 1).mean(1).numpy()
    np.testing.assert_allclose(found, np.stack([BEST, BEST]), atol=0.2)


# --- recording ---
KINDS = {"ddpg": {"final": 240, "imitation": 120, "imperfect": 120},
         "td3": {"random": 120, "medium-replay": 80, "medium": 120, "expert": 120}}


def record(module, tmp_path, name, **flags):
    sets = tmp_path / f"{name}_sets"
    judged = {"medium_return": 1.0} if module is td3 else {}
    flags = {"num_steps": 240, "eval_every": 80, "eval_episodes": 2, "record": str(sets), "record_steps": 120,
             "num_seeds": 2, "exploration_noise": 0.5, **judged, **flags}
    return module.main(small(module.METHOD, None, tmp_path / name, **flags)), sets / "hopper"


@pytest.fixture(scope="module", params=KINDS)
def recorded(request, tmp_path_factory):
    """The module, the directory of its run, that of its sets."""
    module = import_module(request.param)
    return module, *record(module, tmp_path_factory.mktemp(request.param), "run")


def replay_of(folder):
    return checkpoint(folder)["agent"]["data._extra_state"]


def episodes(root, kind):
    data = minari.MinariDataset(root / f"{kind}-v0" / "data")
    return data, list(data.iterate_episodes())


def test_recorded_episodes_replay_from_seed_and_actions(recorded):
    module, _, root = recorded
    for kind in KINDS[module.METHOD]:
        data, recording = episodes(root, kind)
        env = data.recover_environment()
        seeds = [about["seed"] for about in data.storage.get_episode_metadata(range(len(data)))]
        assert len(set(seeds)) == len(seeds) > 1
        for seed, episode in zip(seeds[:4], recording):
            obs, _ = env.reset(seed=seed)
            for t, action in enumerate(episode.actions[:20]):
                np.testing.assert_array_equal(obs.astype(np.float32), episode.observations[t])
                obs, reward, terminated, truncated, _ = env.step(action)
                assert reward == pytest.approx(episode.rewards[t], rel=1e-5) and terminated == episode.terminations[t]


def test_episodes_end_exactly_once_and_sizes_are_as_asked(recorded):
    module, _, root = recorded
    assert {path.name for path in root.glob("*-v0")} == {f"{kind}-v0" for kind in KINDS[module.METHOD]}
    for kind, steps in KINDS[module.METHOD].items():
        data, recording = episodes(root, kind)
        assert data.total_steps == steps == sum(len(e.actions) for e in recording)
        for e in recording:
            ends = e.terminations | e.truncations
            assert ends[-1] and not ends[:-1].any() and not (e.terminations & e.truncations).any()
            assert e.observations.dtype == np.float32 and len(e.observations) == len(e.actions) + 1
        assert all(e.terminations[-1] for e in recording[:-1])  # only the last may be cut
        about = data.storage.metadata
        assert about["ref_max_score"] == 3234.3 and about["algorithm_name"].lower() == module.METHOD
        assert f"algorithms/{module.METHOD}.py" in about["description"] and "--num-steps 240" in about["description"]


def test_the_replay_is_recorded_in_the_order_in_which_agent_0_saw_it(recorded, tmp_path):
    """The first n steps, as an offline method loads them, are what a concurrent learner has after n steps."""
    module, folder, root = recorded
    found, kind = replay_of(folder), {"td3": "medium-replay", "ddpg": "final"}[module.METHOD]
    data, n = td3_bc.load(small("td3_bc", root / f"{kind}-v0", tmp_path)), KINDS[module.METHOD][kind]
    for name in "obs", "action", "reward", "next_obs", "terminated":
        torch.testing.assert_close(getattr(data, name), found[name][0, :n], rtol=0, atol=1e-6)
    assert found["size"] == 240
    boundary = (found["terminated"] + found["truncated"])[:, :-1] > 0
    assert torch.equal(found["next_obs"][:, :-1][~boundary], found["obs"][:, 1:][~boundary])


def test_policies_are_exported_and_recorded_sets_train(recorded, tmp_path):
    module, folder, root = recorded
    final = torch.export.load(folder / "policy.pt2").module()(torch.ones(5, 11))
    for kind in {"td3": ("medium", "expert"), "ddpg": ("expert",)}[module.METHOD]:
        policy = torch.export.load(root / f"{kind}.pt2").module()(torch.ones(5, 11))
        assert policy.shape == (1, 5, 3)
    torch.testing.assert_close(policy[0], final[0])
    one, two = list(KINDS[module.METHOD])[-2:]
    td3_bc.main(small("td3_bc", f"{root / f'{one}-v0'}+{root / f'{two}-v0'}", tmp_path))


def test_recording_goes_on_after_an_interruption(recorded, tmp_path, monkeypatch):
    module, whole, sets = recorded
    stop_at(module, 156, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        record(module, tmp_path, "b")
    monkeypatch.undo()
    (folder,) = (tmp_path / "b").iterdir()
    assert stopped.value.code == f"{module.METHOD}: stopped at update 156; go on with --resume {folder}"
    resume(module, folder)
    a, b = checkpoint(folder), checkpoint(whole)
    assert all(same(a[part], b[part]) for part in ("update", "agent", "moments", "rng"))
    for kind in KINDS[module.METHOD]:
        a, b = (episodes(root, kind)[1] for root in (sets, tmp_path / "b_sets" / "hopper"))
        assert len(a) == len(b) and all(np.array_equal(x.observations, y.observations) for x, y in zip(a, b))


def residuals(policy, found):
    """Of every recorded step what the policy does, and what was done beside it."""
    pi = torch.cat([policy(torch.from_numpy(e.observations[:-1]))[0] for e in found])
    return pi, torch.from_numpy(np.concatenate([e.actions for e in found])) - pi


def test_a_recording_has_the_noise_that_it_should_have(recorded):
    module, _, root = recorded
    policy = torch.export.load(root / "expert.pt2").module()
    if module is td3:
        pi, rest = residuals(policy, episodes(root, "expert")[1])
        assert rest[pi.abs() < 0.5].std().item() == pytest.approx(0.5, rel=0.2)  # --exploration-noise
    else:
        assert residuals(policy, episodes(root, "imitation")[1])[1].abs().max() < 1e-5
        assert residuals(policy, episodes(root, "imperfect")[1])[1].abs().mean() > 0.1


@pytest.mark.parametrize("uniform, noise", [(0.3, 0.0), (0.0, 0.3)])
def test_imperfect_is_a_mixture_of_uniform_actions_and_noise(uniform, noise, monkeypatch):
    """Each ingredient alone: a share of steps that are not the policy's, or the deviation of all."""
    actor, args = ddpg.Actor(1, 11, 3, 16), ddpg.Args(record_steps=1000)
    agent = SimpleNamespace(args=args, task=ddpg.make_task(args))
    with torch.no_grad():
        pi, rest = residuals(actor, ddpg.Recorder.rollouts(agent, 1, actor, uniform, noise))
    if noise:
        assert rest[pi.abs() < 0.1].std().item() == pytest.approx(0.3, rel=0.08)
    else:
        assert (rest.abs().amax(-1) > 1e-5).float().mean().item() == pytest.approx(0.3, abs=0.05)


def test_an_agent_that_is_not_finite_is_not_recorded(tmp_path, monkeypatch):
    loss = ddpg.critic_loss
    monkeypatch.setattr(ddpg, "critic_loss", lambda *args: loss(*args) * torch.tensor([torch.nan, 1.0]))
    with pytest.raises(SystemExit) as stopped:
        record(ddpg, tmp_path, "x", num_steps=60, eval_every=60)
    assert stopped.value.code == "ddpg: agent 0 is not finite: nothing is recorded"


@pytest.mark.parametrize("module", ONLINE)
def test_recording_is_refused_with_a_sentence(module, hopper, tmp_path):
    (tmp_path / "sets" / "hopper" / "some-v0").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for flags, said in [({"record": str(tmp_path / "sets")}, "holds datasets already"),
                        ({"record": str(tmp_path / "file")}, "--record"),
                        ({"exploration_noise": -0.1}, "--exploration-noise cannot be -0.1")]:
        with pytest.raises(SystemExit) as stopped:
            module.main(small(module.METHOD, None, tmp_path / "out", **flags))
        assert said in stopped.value.code and "\n" not in stopped.value.code
