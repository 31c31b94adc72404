"""The files for discrete actions: losses against loops written by hand, the ends of BCQ's threshold, known answers, and
the datasets that dqn.py records."""
from importlib import import_module
from types import SimpleNamespace

import bcq_discrete
import cql_discrete
import dqn
import dqn_offline
import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from conftest import DISCRETE, checkpoint, made, record, resume, same, small, stop_at

S, B, O, A = 3, 5, 4, 6
ARGS = SimpleNamespace(gamma=0.9, cql_alpha=1.7, threshold=0.3)


def close(tensor, expected):
    assert tensor.shape == (S,)
    np.testing.assert_allclose(tensor.detach().numpy(), expected, rtol=2e-5, atol=1e-6)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    d = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0]).expand(S, B)
    return torch.randn(S, B, O), torch.randint(A, (S, B)), 3 * torch.randn(S, B), torch.randn(S, B, O), d


def critics(module, seed):
    """Two critics whose values are far apart and whose best actions differ."""
    torch.manual_seed(seed)
    pair = module.Critic(S, O, A, 8), module.Critic(S, O, A, 8)
    for critic in pair:
        critic.net[-1].weight.data *= 20
    return pair


def huber(x):
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def td_errors(critic, critic_target, batch, choose):
    """Q(s, a) - y of each seed and row, with the next action by choose(k, i)."""
    s, a, r, s_next, d = batch
    q, q_next = critic(s).detach(), critic_target(s_next).detach()
    return [[float(q[k, i, a[k, i]] - r[k, i] - 0.9 * (1 - d[k, i]) * q_next[k, i, choose(k, i)]) for i in range(B)]
            for k in range(S)]


def test_networks_are_independent_and_shaped(batch):
    s, *_ = batch
    critic, _ = critics(dqn, 1)
    q, policy = critic(s), dqn.Policy(critic)
    assert q.shape == (S, B, A) and policy(s).shape == (S, B) and policy(s).dtype == torch.long
    for k in range(S):
        x = s[k]
        for layer in critic.net:
            x = x @ layer.weight[k] + layer.bias[k] if hasattr(layer, "weight") else layer(x)
        torch.testing.assert_close(q[k], x)
        assert policy(s)[k].tolist() == [max(range(A), key=lambda j: q[k, i, j]) for i in range(B)]


@pytest.mark.parametrize("module", [dqn, dqn_offline])
def test_dqn_critic_takes_the_target_networks_maximum(module, batch):
    critic, critic_target = critics(module, 2)
    best = critic_target(batch[3]).argmax(-1)
    assert (best != critic(batch[3]).argmax(-1)).any()  # a double target would be another one
    errors = td_errors(critic, critic_target, batch, lambda k, i: best[k, i])
    close(module.critic_loss(critic, critic_target, batch, ARGS), [np.mean([huber(x) for x in row]) for row in errors])


@pytest.mark.parametrize("alpha", [0.0, 1.7])
def test_cql_critic(alpha, batch):
    s, a, *_ = batch
    critic, critic_target = critics(cql_discrete, 3)
    best, q = critic(batch[3]).argmax(-1), critic(s).detach().double().numpy()
    errors = td_errors(critic, critic_target, batch, lambda k, i: best[k, i])
    assert np.abs(errors).max() > 1  # where Huber's loss would be another one
    gap = [[np.log(np.exp(q[k, i]).sum()) - q[k, i, a[k, i]] for i in range(B)] for k in range(S)]
    expected = [np.mean([0.5 * x * x + alpha * g for x, g in zip(*rows)]) for rows in zip(errors, gap)]
    close(cql_discrete.critic_loss(critic, critic_target, batch, SimpleNamespace(gamma=0.9, cql_alpha=alpha)), expected)
    assert np.min(gap) > 0


def test_the_regulariser_of_cql_is_cross_entropy_with_q_as_logits(batch):
    s, a, *_ = batch
    critic, critic_target = critics(cql_discrete, 3)
    with_, without = (cql_discrete.critic_loss(critic, critic_target, batch, SimpleNamespace(gamma=0.9, cql_alpha=w))
                      for w in (1, 0))
    entropy = torch.nn.functional.cross_entropy(critic(s).flatten(0, 1), a.flatten(), reduction="none").view(S, B)
    torch.testing.assert_close(with_ - without, entropy.mean(-1), rtol=1e-4, atol=1e-4)


def allowed_best(q, logits, threshold):
    """The best action by q of those whose probability is at least the threshold, as a part of the likeliest one's."""
    b = torch.softmax(logits.double(), -1)
    allowed = [j for j in range(A) if b[j] / b.max() >= threshold]
    return max(allowed, key=lambda j: q[j]), len(allowed)


def bcq(seed, threshold=0.3):
    critic, critic_target = critics(bcq_discrete, seed)
    behaviour = bcq_discrete.Behaviour(S, O, A, 8)
    behaviour.net[-1].weight.data *= 5
    return critic, critic_target, behaviour, bcq_discrete.Policy(critic, behaviour, threshold)


def test_bcq_target_is_the_online_networks_best_allowed_action(batch):
    critic, critic_target, behaviour, policy = bcq(4)
    q, logits = critic(batch[3]).detach(), behaviour(batch[3]).detach()
    found = [[allowed_best(q[k, i], logits[k, i], 0.3) for i in range(B)] for k in range(S)]
    assert len({n for row in found for _, n in row}) > 2
    assert policy(batch[3]).tolist() == [[j for j, _ in row] for row in found]
    errors = td_errors(critic, critic_target, batch, lambda k, i: found[k][i][0])
    loss = bcq_discrete.critic_loss(critic, critic_target, policy, batch, ARGS)
    close(loss, [np.mean([huber(x) for x in row]) for row in errors])


def test_bcq_behaviour(batch):
    s, a, *_ = batch
    *_, behaviour, _ = bcq(5)
    logits, expected = behaviour(s).detach().double(), []
    for k in range(S):
        log_b = [logits[k, i, a[k, i]] - torch.log(torch.exp(logits[k, i]).sum()) for i in range(B)]
        expected.append(-np.mean(log_b) + 0.01 * np.mean([logits[k, i, j] ** 2 for i in range(B) for j in range(A)]))
    close(bcq_discrete.behaviour_loss(behaviour, batch), expected)


def test_threshold_0_is_q_learning_and_1_is_cloning():
    """A strict > at 1, as in the authors' code, allows nothing and ends in action 0."""
    critic, _, behaviour, policy = bcq(6)
    s = torch.randn(S, 500, O)
    policy.threshold = 0
    assert torch.equal(policy(s), critic(s).argmax(-1))
    policy.threshold = 1
    assert torch.equal(policy(s), behaviour(s).argmax(-1)) and policy(s).unique().tolist() == list(range(A))
    policy.threshold = 0.3
    assert not torch.equal(policy(s), critic(s).argmax(-1)) and not torch.equal(policy(s), behaviour(s).argmax(-1))


def test_an_action_at_the_threshold_is_allowed():
    policy = bcq_discrete.Policy(torch.nn.Identity(), torch.nn.Identity(), float(torch.tensor(-1.0).exp()))
    policy.critic.forward = lambda s: torch.tensor([[[0.0, 1.0, 2.0]]])
    policy.behaviour.forward = lambda s: torch.tensor([[[0.0, -1.0, -1.1]]])
    assert policy(None).item() == 1


def trained(module, batches, **flags):
    """The critic after the batches, from weights that depend on the seed alone."""
    torch.manual_seed(0)
    data = SimpleNamespace(obs=torch.zeros(2, O), episode=torch.tensor([0, 1]))
    agent = module.Agent(module.Args(num_seeds=S, hidden_dim=16, device="cpu", learning_rate=0.05, **flags), O, A, data)
    feed, before = iter(batches), module.sample
    module.sample = lambda *_: next(feed)
    try:
        for _ in batches:
            agent.update()
    finally:
        module.sample = before
    return agent.critic.state_dict()


def test_bcq_at_0_is_cql_without_its_regulariser(batch):
    """Both are double Q-learning, equal where errors stay below 1, Huber's bend; dqn_offline.py is not."""
    s, a, r, s_next, d = batch
    batches = [[x.roll(i, 1) for x in (s / 9, a, r / 9, s_next / 9, d)] for i in range(4)]
    a = trained(bcq_discrete, batches, threshold=0.0)
    for name, weight in trained(cql_discrete, batches, cql_alpha=0.0).items():
        torch.testing.assert_close(weight, a[name])
    assert not same(a, trained(dqn_offline, batches)) and not same(a, trained(bcq_discrete, batches, threshold=1.0))


class Choice(gym.Env):
    """One step; action 5 + 1 is right where the observation is positive, 5 + 0 elsewhere, 5 + 2 never."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(3, start=5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.obs, {}

    def step(self, action):
        assert action in (5, 6, 7)
        return self.obs, float(action - 5 == (self.obs[0] > 0)) - 1, True, False, {}


gym.register("Choice-v0", Choice, max_episode_steps=1)


def choices(folder, probability, n=1000):
    """n steps in Choice, in which actions have these probabilities."""
    rng = np.random.default_rng(0)
    obs, action = rng.uniform(-1, 1, (n, 2)).astype(np.float32), rng.choice(3, n, p=probability)
    return made(folder, [1] * n, ["terminal"] * n, observations=obs, next_observations=None, actions=5 + action,
                rewards=(action == (obs[:, 0] > 0)) - 1.0)


@pytest.fixture(scope="module")
def all_three(tmp_path_factory):
    return choices(tmp_path_factory.mktemp("all") / "three-v0", [0.3, 0.5, 0.2])


def share(folder, *actions):
    """How often the policy of a run does what is right, or one of the actions that are named."""
    obs = torch.rand(500, 2) * 2 - 1
    found = torch.export.load(folder / "policy.pt2").module()(obs)
    assert found.dtype == torch.long and set(found.unique().tolist()) <= {5, 6, 7}
    hit = torch.isin(found - 5, torch.tensor(actions)) if actions else found - 5 == (obs[:, 0] > 0)
    return hit.float().mean()


def learn(method, data, out, **flags):
    return import_module(method).main(small(method, data, out, env_id="Choice-v0", num_updates=300, batch_size=64,
                                            hidden_dim=32, learning_rate=3e-3, eval_every=10**6, **flags))


@pytest.mark.parametrize("method, flags", [
    ("dqn_offline", {}), ("bcq_discrete", {}), ("cql_discrete", {"cql_alpha": 0.1})])
def test_the_right_action_is_found_although_it_is_not_the_likeliest(method, flags, all_three, tmp_path):
    assert share(learn(method, all_three, tmp_path, **flags)) > 0.9


def test_cloning_does_what_is_done_most(all_three, tmp_path):
    assert share(learn("bcq_discrete", all_three, tmp_path, threshold=1.0), 1) > 0.98


def test_an_action_that_the_data_does_not_hold(tmp_path):
    """Every reward is at most 0, so an action that nobody tried looks good to DQN; BCQ and CQL leave it alone."""
    data = choices(tmp_path / "two-v0", [0.5, 0.5, 0.0], 500)
    assert share(learn("dqn_offline", data, tmp_path / "a"), 2) > 0.1
    assert share(learn("bcq_discrete", data, tmp_path / "b"), 2) == 0
    assert share(learn("cql_discrete", data, tmp_path / "c"), 2) == 0


def test_dqn_finds_the_right_action_online(tmp_path):
    args = small("dqn", None, tmp_path, env_id="Choice-v0", num_steps=500, learning_starts=200, epsilon_steps=100,
                 hidden_dim=32, batch_size=64, learning_rate=3e-3, eval_every=10**6)
    assert share(dqn.main(args)) > 0.9


@pytest.mark.parametrize("method", DISCRETE)
def test_q_start_is_the_value_of_the_policy_where_episodes_begin(method, tmp_path):
    module = import_module(method)
    args = small(method, record(tmp_path, "CartPole-v1", 60), tmp_path, num_seeds=2)
    data = module.load(args)
    module.prepare(data, args)
    assert data.action.dtype == torch.long and data.act_dim == 2
    agent = module.Agent(args, data.obs_dim, data.act_dim, data)
    q_start, q = agent.update()["q_start"], agent.critic(agent.start).detach()
    starts = [int((data.episode == e).nonzero()[0]) for e in range(int(data.episode[-1]) + 1)]
    assert torch.equal(agent.start[1], data.obs[starts])
    expected = [np.mean([float(q[k, i, a]) for i, a in enumerate(agent.policy(agent.start)[k])]) for k in range(2)]
    np.testing.assert_allclose(q_start.numpy(), expected, rtol=1e-5)


# --- dqn.py: acting and recording ---
def test_epsilon_is_1_until_learning_starts_and_then_falls_to_its_end():
    args = dqn.Args(env_id="CartPole-v1", num_seeds=3, device="cpu", learning_starts=300, epsilon_steps=600,
                    final_epsilon=0.1)
    torch.manual_seed(0)
    task, replay = dqn.make_task(args), dqn.Replay(3, 1500, 4)
    collector = dqn.Collector(args, task, SimpleNamespace(policy=lambda s: torch.ones(3, 1, dtype=torch.long)), replay)
    for _ in range(1500):
        collector.step()
    explored = 2 * (1 - replay.action.float()).mean(0)  # half of the uniform actions are 0
    parts = [explored[i:j].mean() for i, j in ((0, 300), (300, 600), (600, 900), (900, 1500))]
    np.testing.assert_allclose(parts, [1, 0.775, 0.325, 0.1], atol=0.08)
    assert not torch.equal(replay.action[0], replay.action[1])


def replay_of(folder):
    return checkpoint(folder)["agent"]["data._extra_state"]


def test_a_truncated_step_is_not_terminated(tmp_path):
    """A car that acts at random does not reach the top of the hill: 200 steps, then a time limit."""
    replay = replay_of(dqn.main(small("dqn", None, tmp_path, env_id="MountainCar-v0", num_steps=419, eval_every=420)))
    assert replay["size"] == 420 and replay["action"].dtype == torch.long
    assert replay["truncated"][0].nonzero().flatten().tolist() == [199, 399] and not replay["terminated"].any()
    assert not torch.equal(replay["next_obs"][0, 199], replay["obs"][0, 200])


def recording(tmp_path, name, **flags):
    sets = tmp_path / f"{name}_sets"
    flags = {"num_steps": 400, "eval_every": 100, "record": str(sets), "record_steps": 150, "medium_return": 1.0,
             "num_seeds": 2, **flags}
    return dqn.main(small("dqn", None, tmp_path / name, **flags)), sets / "cartpole"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return recording(tmp_path_factory.mktemp("dqn"), "run")


def episodes(root, kind):
    data = minari.MinariDataset(root / f"{kind}-v0" / "data")
    return data, list(data.iterate_episodes())


KINDS = [("random", 150, 1), ("medium-replay", 100, 1), ("mixed", 150, 2), ("expert", 150, 1)]


@pytest.mark.parametrize("kind, steps, parts", KINDS)
def test_recorded_episodes_replay_and_end_exactly_once(kind, steps, parts, recorded):
    data, found = episodes(recorded[1], kind)
    env, seeds = data.recover_environment(), [m["seed"] for m in data.storage.get_episode_metadata(range(len(data)))]
    assert len(set(seeds)) == len(seeds) > 1 and [e.id for e in found] == list(range(len(found)))
    assert data.total_steps == steps == sum(len(e.actions) for e in found)
    for seed, e in zip(seeds, found):
        obs, _ = env.reset(seed=seed)
        for t, action in enumerate(e.actions):
            np.testing.assert_array_equal(obs.astype(np.float32), e.observations[t])
            obs, reward, terminated, truncated, _ = env.step(action)
            assert (reward, terminated) == (e.rewards[t], e.terminations[t])
        np.testing.assert_array_equal(obs.astype(np.float32), e.observations[-1])
        ends = e.terminations | e.truncations
        assert ends[-1] and not ends[:-1].any() and not (e.terminations & e.truncations).any()
        assert e.observations.dtype == np.float32 and e.actions.dtype == np.int64
    assert sum(not e.terminations[-1] for e in found) <= parts  # only the last of each part may be cut


def test_scores_are_0_at_random_and_100_at_the_reward_threshold(recorded):
    whole = [e.rewards.sum() for e in episodes(recorded[1], "random")[1][:-1]]
    for kind, *_ in KINDS:
        about = episodes(recorded[1], kind)[0].storage.metadata
        assert about["ref_min_score"] == pytest.approx(np.mean(whole)) and about["ref_max_score"] == 475
        assert "--num-steps 400" in about["description"]


def test_medium_replay_is_what_agent_0_saw_and_mixed_is_half_random(recorded):
    replay = replay_of(recorded[0])
    obs = np.concatenate([e.observations[:-1] for e in episodes(recorded[1], "medium-replay")[1]])
    np.testing.assert_array_equal(obs, replay["obs"][0, :100])
    mixed = episodes(recorded[1], "mixed")[1]
    half = int(np.searchsorted(np.cumsum([len(e.actions) for e in mixed]), 75)) + 1
    assert sum(len(e.actions) for e in mixed[:half]) == 75
    policy = torch.export.load(recorded[1] / "medium.pt2").module()
    greedy = [policy(torch.from_numpy(e.observations[:-1]))[0].numpy() == e.actions for e in mixed]
    share = [np.concatenate(part).mean() for part in (greedy[:half], greedy[half:])]
    np.testing.assert_allclose(share, [0.5, 0.9], atol=0.15)  # 0.2 uniform, half of them the greedy one


@pytest.mark.parametrize("method", DISCRETE)
def test_a_recorded_set_trains(method, recorded, tmp_path):
    final = torch.export.load(recorded[0] / "policy.pt2").module()(torch.randn(9, 4))
    assert final.shape == (2, 9)
    assert torch.export.load(recorded[1] / "expert.pt2").module()(torch.zeros(5, 4)).shape == (1, 5)
    folder = import_module(method).main(small(method, recorded[1] / "mixed-v0", tmp_path, num_seeds=2))
    assert (folder / "eval.csv").read_text().splitlines()[-1].split(",")[-1]  # a score


def test_recording_goes_on_after_an_interruption(recorded, tmp_path, monkeypatch):
    stop_at(dqn, 256, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        recording(tmp_path, "b")
    monkeypatch.undo()
    (folder,) = (tmp_path / "b").iterdir()
    assert stopped.value.code == f"dqn: stopped at update 256; go on with --resume {folder}"
    resume(dqn, folder)
    a, b = checkpoint(folder), checkpoint(recorded[0])
    assert all(same(a[part], b[part]) for part in ("update", "agent", "moments", "rng"))
    for kind, *_ in KINDS:
        a, b = (episodes(root, kind)[1] for root in (recorded[1], tmp_path / "b_sets" / "cartpole"))
        assert len(a) == len(b) and all(np.array_equal(x.observations, y.observations) for x, y in zip(a, b))


def test_half_trained_is_half_way_from_random_to_the_reward_threshold(tmp_path, monkeypatch):
    """Random play in CartPole returns about 22, and 475 counts as solved."""
    found, write = [], dqn.Recorder.write
    monkeypatch.setattr(dqn.Recorder, "write", lambda self, kind, *parts: found.append(kind) or (
        write(self, kind, *parts) if kind == "random" else None))
    args = dqn.Args(record=str(tmp_path), env_id="CartPole-v1", record_steps=3000, device="cpu")
    recorder = dqn.Recorder(args, dqn.make_task(args), SimpleNamespace(policy=torch.nn.Identity()))
    run = SimpleNamespace(update=0, evals=["update,seed,episodes,return_mean"], total=9, lost=set(),
                          collect=lambda wait: None)
    recorder.look(run)
    for run.update, score in (1, 230.0), (2, 260.0):
        run.evals += [f"{run.update},0,2,{score}", f"{run.update},1,2,999.0", f"1{run.update},0,2,999.0"]
        recorder.look(run)
        assert found == ["random"] + ["medium-replay", "mixed"] * (score > 250)


def test_an_environment_without_a_threshold_is_recorded_with_medium_return(tmp_path):
    gym.register("ChoiceByName-v0", "test_discrete:Choice", max_episode_steps=1)
    _, root = recording(tmp_path, "x", env_id="ChoiceByName-v0", num_steps=40, eval_every=20, record_steps=20,
                        medium_return=-1e6)
    root = root.with_name("choicebyname")
    assert {path.name for path in root.glob("*-v0")} == {f"{kind}-v0" for kind, *_ in KINDS}
    assert "ref_min_score" not in episodes(root, "mixed")[0].storage.metadata


@pytest.mark.parametrize("flags, words", [({"env_id": "Choice-v0", "medium_return": None}, "--medium-return"),
                                          ({"record_steps": 151}, "--record-steps 151"),
                                          ({"eval_episodes": 0}, "--eval-episodes"),
                                          ({"env_id": "Pendulum-v1"}, "cannot choose actions in Box")])
def test_what_cannot_be_recorded_is_refused(flags, words, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        recording(tmp_path, "x", **flags)
    message = stopped.value.code
    assert message.startswith("dqn: --") and words in message and "\n" not in message and not list(tmp_path.iterdir())


def test_continuous_data_and_an_impossible_threshold_are_refused(hopper, tmp_path):
    for flags, words in [({"dataset_id": str(hopper)}, "cannot choose actions in Box"),
                         ({"threshold": 1.2}, "--threshold 1.2 ")]:
        with pytest.raises(SystemExit) as stopped:
            bcq_discrete.main(small("bcq_discrete", hopper, tmp_path / "out", **flags))
        message = stopped.value.code
        assert message.startswith("bcq_discrete: --") and words in message and "\n" not in message
        assert not (tmp_path / "out").exists()


def test_the_set_that_ships():
    """Half random, half half-trained, and every 40th episode replays as far as rounding allows."""
    root = dqn.Path(dqn.__file__).resolve().parents[1] / "datasets" / "lunarlander"
    data, found = episodes(root, "mixed")
    assert sum(f.stat().st_size for f in root.glob("**/*") if f.is_file()) < 8e6
    returns, lengths = np.array([e.rewards.sum() for e in found]), np.cumsum([len(e.actions) for e in found])
    half = int(np.searchsorted(lengths, data.total_steps / 2)) + 1
    assert data.total_steps == 80_000 and lengths[half - 1] == 40_000
    about = data.storage.metadata
    assert returns[:half].mean() == pytest.approx(about["ref_min_score"], abs=15) and about["ref_max_score"] == 200
    assert returns[half:].mean() > 50
    env, about = data.recover_environment(), list(data.storage.get_episode_metadata(range(len(data))))
    for e, seed in zip(found[::40], (m["seed"] for m in about[::40])):
        assert (e.terminations | e.truncations).nonzero()[0].tolist() == [len(e.actions) - 1]
        obs, _ = env.reset(seed=seed)
        for t, action in enumerate(e.actions[:30]):
            np.testing.assert_allclose(obs, e.observations[t], atol=1e-3)
            obs, *_ = env.step(action)
