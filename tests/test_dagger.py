"""DAgger's interaction: who acts, who labels, what is kept; and a problem on which cloning drifts."""
import csv

import dagger as m
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import checkpoint, resume, same, stop_at

SEEN = []  # per environment that a test made: the (obs, action, next_obs) of all its steps, None at each reset


class Drift(gym.Env):
    """x' = 1.5 x + a + 0.2 between walls at -0.5 and 0.5, reward -|x|. The best policy begins near 0 and stays there:
    it never shows how to come back. Actions are 2 a + 1: labels have to be mapped. The second observation is 1."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 3, (1,))

    def __init__(self):
        self.steps = []
        SEEN.append(self.steps)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1e-3, 1e-3)
        self.steps.append(None)
        return self.obs(), {}

    def obs(self):
        return np.array([self.x, 1], np.float32)

    def step(self, action):
        before = self.obs()
        self.x = float(np.clip(1.5 * self.x + (float(action[0]) - 1) / 2 + 0.2, -0.5, 0.5))
        self.steps.append((before, np.array(action), self.obs()))
        return self.obs(), -abs(self.x), False, False, {}


class Best(torch.nn.Module):
    def forward(self, obs):  # (B, 2) -> (1, B, 1)
        return (1 - 2 * (1.5 * obs[:, :1] + 0.2)).unsqueeze(0)


gym.register("Drift-v0", Drift, max_episode_steps=40)


class Wrong(torch.nn.Module):
    def forward(self, obs):  # one action only
        return obs[None, :, :1]


def exported(module, obs_dim, path):
    shapes = ({0: torch.export.Dim("B")},)
    torch.export.save(torch.export.export(module, (torch.zeros(2, obs_dim),), dynamic_shapes=shapes), path)
    return str(path)


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    return exported(Best(), 2, tmp_path_factory.mktemp("expert") / "best.pt2")


def args(best, out="", **flags):
    shape = dict(env_id="Drift-v0", num_updates=40, rounds=4, steps_per_round=30, batch_size=16, hidden_dim=16,
                 eval_every=20, eval_episodes=2, device="cpu", out_dir=str(out), num_seeds=3)
    return m.Args(**{**shape, "expert": str(best), **flags})


def collected(best, i, S=3, actor=None, **flags):
    """The replay of round i of a fresh actor, or of a given one, the actor, and what the environments saw."""
    one = args(best, num_seeds=S, **flags)
    m.setup(one)
    task = m.make_task(one)
    task.spec.max_episode_steps = one.horizon or task.spec.max_episode_steps
    replay, actor = m.Replay(S, one.steps_per_round, 2, 1), actor or m.Actor(S, 2, 1, one.hidden_dim)
    SEEN.clear()
    m.collect(one, task, m.load_expert(one, task), actor, replay, i)
    return replay, actor, [list(steps) for steps in SEEN]


def test_every_visited_state_is_labelled_by_the_expert_whoever_acted(best):
    replay, actor, seen = collected(best, 3, beta_decay=0.5, steps_per_round=400)
    assert replay.size == 400 and len(seen) == 3
    for k, steps in enumerate(seen):
        steps = [x for x in steps if x is not None]
        obs, executed = (torch.tensor(np.stack([x[i] for x in steps])) for i in range(2))
        torch.testing.assert_close(replay.obs[k], obs, rtol=0, atol=0)
        label = -(1.5 * obs[:, :1] + 0.2)
        torch.testing.assert_close(replay.action[k], label.clamp(-1, 1))
        pi = actor(obs.expand(3, -1, -1))[k].detach()
        by_expert, by_agent = ((executed - (2 * a + 1)).abs().squeeze(1) < 1e-5 for a in (label.clamp(-1, 1), pi))
        assert (by_expert ^ by_agent).all()
        assert by_expert.float().mean().item() == pytest.approx(0.25, abs=0.08)
        for i in range(0, 400, 40):  # drawn per step: both act in one episode
            assert 0 < by_expert[i : i + 40].sum() < 40


@pytest.mark.parametrize("p, betas", [(0.0, [1, 0, 0]), (0.5, [1, 0.5, 0.25]), (1.0, [1, 1, 1])])
def test_schedule(p, betas, best, monkeypatch):
    """Draws just below beta_i leave the step to the expert, draws at beta_i to the agent."""
    for i, beta in enumerate(betas, 1):
        for draw, expert_acts in (beta - 1e-3, True), (beta, False):
            if 0 <= draw < 1:
                monkeypatch.setattr(torch, "rand", lambda *size, draw=draw: torch.full(size, draw))
                replay, _, seen = collected(best, i, beta_decay=p, steps_per_round=5)
                executed = np.stack([x[1] for x in seen[0] if x is not None])
                by_expert = np.allclose(executed, 2 * replay.action[0].numpy() + 1, atol=1e-5)
                assert by_expert == expert_acts


def test_horizon_is_respected_and_episodes_are_labelled_to_their_end(best, tmp_path):
    _, _, seen = collected(best, 2, horizon=7, steps_per_round=30)
    for steps in seen:
        resets = [i for i, x in enumerate(steps) if x is None]
        assert resets == [0, 8, 16, 24, 32] and len(steps) == 30 + 5
    starts = {float(steps[i + 1][0][0]) for steps in seen for i in (0, 8, 16, 24, 32)}
    assert len(starts) == 15  # no two episodes begin alike
    for horizon, length in (7, "7.0000"), (None, "40.0000"):
        rows = list(csv.DictReader((m.main(args(best, tmp_path, horizon=horizon)) / "eval.csv").open()))
        assert {row["length_mean"] for row in rows} == {length}


def replay_of(folder):
    return checkpoint(folder)["agent"]["data._extra_state"]


def test_all_rounds_are_kept_for_each_agent(best, tmp_path):
    runs = [m.main(args(best, tmp_path, rounds=n, num_updates=10 * n)) for n in (4, 1)]
    four, one = (replay_of(run) for run in runs)
    assert four["size"] == 120 and four["obs"].shape == (3, 120, 2) and one["size"] == 30
    assert torch.equal(four["obs"][:, :30], one["obs"]) and torch.equal(four["action"][:, :30], one["action"])
    assert all(len(set(four["obs"][:, i, 0].tolist())) == 3 for i in (0, 30, 60, 90))
    assert len(set(four["obs"][0, ::30, 0].tolist())) == 4  # nor do rounds begin alike


def test_batches_come_from_all_labels_of_their_own_agent():
    replay = m.Replay(3, 50, 2, 1)
    for i in range(40):
        replay.add(torch.tensor([[0.0, i], [1, i], [2, i]]), torch.tensor([[0.0], [1], [2]]))
    s, a = replay.sample(1000)
    assert s.shape == (3, 1000, 2) and a.shape == (3, 1000, 1)
    for k in range(3):
        assert (s[k, :, 0] == k).all() and (a[k] == k).all() and set(s[k, :, 1].tolist()) == set(range(40))


def test_loss_by_hand():
    torch.manual_seed(0)
    actor, s, a = m.Actor(3, 4, 2, 6), torch.randn(3, 5, 4), torch.rand(3, 5, 2) * 2 - 1
    loss = m.actor_loss(actor, (s, a))
    for k in range(3):
        x = s[k]
        for i in 0, 2, 4:
            x = x @ actor.net[i].weight[k] + actor.net[i].bias[k]
            x = x.relu() if i < 4 else x.tanh()
        errors = [(x[i, j] - a[k, i, j]).item() ** 2 for i in range(5) for j in range(2)]
        assert loss.shape == (3,) and loss[k].item() == pytest.approx(np.mean(errors))


def test_agents_collect_together_as_apart(best, monkeypatch):
    draws, seed = torch.rand(60, 3, 1), m.draw_seed
    calls, who = [], slice(None)

    def rand(*size):
        calls.append(size)
        return draws[len(calls) - 1, who]

    monkeypatch.setattr(torch, "rand", rand)
    together, actor, _ = collected(best, 2, beta_decay=0.5, steps_per_round=60)
    for k in range(3):
        calls, who = [], slice(k, k + 1)
        monkeypatch.setattr(m, "draw_seed", lambda first, zero, _, *rest: seed(first, zero, k, *rest))
        alone = m.Actor(1, 2, 1, 16)
        for p, q in zip(alone.parameters(), actor.parameters()):
            p.data.copy_(q.data[who])
        apart, _, _ = collected(best, 2, S=1, actor=alone, beta_decay=0.5, steps_per_round=60)
        torch.testing.assert_close(apart.obs[0], together.obs[k], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(apart.action[0], together.action[k], rtol=1e-4, atol=1e-5)


def test_nan_in_agent_0_leaves_what_the_others_collect_alone(best):
    clean, actor, _ = collected(best, 2)
    actor.net[0].weight.data[0] = torch.nan
    spoilt, _, _ = collected(best, 2, actor=actor)
    assert torch.equal(clean.obs[1:], spoilt.obs[1:]) and torch.equal(clean.action[1:], spoilt.action[1:])
    assert spoilt.obs.isfinite().all() and not torch.equal(clean.obs[0], spoilt.obs[0])


@pytest.mark.parametrize("stop", [5, 20, 26])
def test_resume_within_a_round_and_between_two_is_exact(stop, best, tmp_path, monkeypatch):
    flags = dict(beta_decay=0.5, num_seeds=2)
    whole = m.main(args(best, tmp_path / "a", **flags))
    stop_at(m, stop, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        m.main(args(best, tmp_path / "b", **flags))
    monkeypatch.undo()
    (folder,) = (tmp_path / "b").iterdir()
    assert stopped.value.code == f"dagger: stopped at update {stop}; go on with --resume {folder}"
    assert checkpoint(folder)["update"] == stop and replay_of(folder)["size"] == 30 * -(-stop // 10)
    resume(m, folder)
    a, b = checkpoint(whole), checkpoint(folder)
    assert all(same(a[part], b[part]) for part in ("update", "agent", "moments", "rng"))
    for name in "eval.csv", "losses.csv":
        assert (whole / name).read_text() == (folder / name).read_text()


@pytest.mark.parametrize("stop", [20, 26])
def test_num_updates_cannot_be_given_anew(stop, best, tmp_path, monkeypatch):
    """It says how long a round is. What was refused leaves the run as it was."""
    stop_at(m, stop, monkeypatch)
    with pytest.raises(SystemExit):
        m.main(args(best, tmp_path))
    monkeypatch.undo()
    (folder,) = tmp_path.iterdir()
    with pytest.raises(SystemExit) as stopped:
        resume(m, folder, num_updates=60)
    assert stopped.value.code.startswith("dagger: --num-updates ") and "\n" not in stopped.value.code
    resume(m, folder)
    assert checkpoint(folder)["update"] == 40


def test_updates_are_spread_over_the_rounds_and_labels_are_logged(best, tmp_path, monkeypatch):
    seen, update = [], m.Agent.update
    monkeypatch.setattr(m.Agent, "update", lambda self: seen.append(int(self.data.size)) or update(self))
    folder = m.main(args(best, tmp_path, num_updates=38))
    assert seen == [30] * 10 + [60] * 10 + [90] * 10 + [120] * 10
    rows = [row for row in csv.DictReader((folder / "losses.csv").open()) if row["name"] == "labels"]
    assert [(row["update"], row["seed"], row["value"]) for row in rows] == [("40", k, "120") for k in "012"]


@pytest.mark.parametrize("case", ["missing", "garbage", "observations", "actions", "folder"])
def test_an_expert_that_does_not_fit(case, best, tmp_path, capfd):
    (tmp_path / "garbage").write_bytes(b"garbage")
    wrong = exported(Wrong(), 11, tmp_path / "wrong.pt2")
    flags = {"missing": {"expert": "no/such.pt2"}, "garbage": {"expert": str(tmp_path / "garbage")},
             "observations": {"env_id": "Hopper-v5"}, "folder": {"expert": str(tmp_path)},
             "actions": {"env_id": "Hopper-v5", "expert": wrong}}[case]
    with pytest.raises(SystemExit) as stopped:
        m.main(args(**{"best": best, "out": tmp_path / "out", **flags}))
    message = stopped.value.code
    assert message.startswith("dagger: --expert ") and "\n" not in message and not capfd.readouterr().err
    assert flags.get("expert", str(best)) in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [{"beta_decay": -0.1}, {"beta_decay": 1.5}, {"beta_decay": float("nan")},
                                   {"horizon": 0}, {"rounds": 0}, {"steps_per_round": 0}])
def test_impossible_flags(flags, best, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        m.main(args(best, tmp_path / "out", **flags))
    ((name, value),) = flags.items()
    assert stopped.value.code == f"dagger: --{name.replace('_', '-')} cannot be {value}"
    assert not (tmp_path / "out").exists()


def test_the_shipped_expert_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = m.Args(device="cpu")
    label = m.load_expert(one, m.make_task(one))(torch.zeros(4, 11))
    assert label.shape == (4, 3) and label.abs().max() <= 1


def test_dagger_comes_back_where_cloning_drifts(best, tmp_path):
    """With as many labels and updates every agent of DAgger loses less than a quarter of what any clone loses."""
    cost, shape = [], dict(num_updates=900, eval_every=900, hidden_dim=32, batch_size=64, learning_rate=1e-3)
    for rounds in 1, 6:
        folder = m.main(args(best, tmp_path, rounds=rounds, steps_per_round=240 // rounds, **shape))
        cost.append([-float(row["return_mean"]) for row in csv.DictReader((folder / "eval.csv").open())])
    assert max(cost[1]) < min(cost[0]) / 4, cost
