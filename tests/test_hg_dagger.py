"""HG-DAgger's gate: who has control, what is kept, how much the members doubt; and a person at the keyboard."""
import csv
from types import SimpleNamespace

import gymnasium as gym
import hg_dagger as m
import numpy as np
import pytest
import torch
from conftest import checkpoint, resume, same, stop_at
from test_dagger import Best, Drift, exported  # noqa: F401, importing it registers Drift-v0

STEPS = []  # per environment that a test made: the (obs, action) of its steps


class Plain(gym.Env):
    """Four numbers that are drawn anew each step. Actions are 2 a + 1."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (4,)), gym.spaces.Box(-1, 3, (2,))

    def __init__(self):
        self.steps = []
        STEPS.append(self.steps)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = self.np_random.uniform(-1, 1, 4).astype(np.float32)
        return self.obs, {}

    def step(self, action):
        self.steps.append((self.obs, np.array(action)))
        self.obs = self.np_random.uniform(-1, 1, 4).astype(np.float32)
        return self.obs, 0.0, False, False, {}


gym.register("Plain-v0", Plain, max_episode_steps=7)


def args(out="", **flags):
    shape = dict(env_id="Plain-v0", num_updates=40, rounds=4, steps_per_round=30, batch_size=16, hidden_dim=16,
                 ensemble=2, eval_every=20, eval_episodes=2, device="cpu", out_dir=str(out), num_seeds=3)
    return m.Args(**{**shape, **flags})


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    return exported(Best(), 2, tmp_path_factory.mktemp("expert") / "best.pt2")


@pytest.fixture
def unexported(monkeypatch):
    """Runs that leave no policy.pt2, which takes most of the time of a short one."""
    monkeypatch.setattr(m, "export", lambda policy, path: path.write_text(""))


def teacher(s):
    """An expert of Plain-v0: (S, 4) -> (S, 2)."""
    return s[:, :2]


def collected(one, i, expert=teacher, actor=None):
    """D of each agent after round i alone, the takeovers, the actor, and per agent the obs and actions of its steps."""
    m.setup(one)
    task = m.make_task(one)
    S, E = one.num_seeds, one.ensemble
    actor = actor or m.Actor(S, E, task.obs_dim, task.act_dim, one.hidden_dim)
    replay = torch.nn.ModuleList(m.Replay(1, one.steps_per_round, task.obs_dim, task.act_dim) for _ in range(S))
    STEPS.clear()
    takeovers = m.collect(one, task, expert, actor, replay, i)
    return replay, takeovers, actor, [[torch.tensor(np.stack(x)) for x in zip(*steps)] for steps in STEPS]


def silent(S=3, E=2):
    """An actor whose action is 0 everywhere."""
    actor = m.Actor(S, E, 4, 2, 5)
    for p in actor.parameters():
        p.data.zero_()
    return actor


FAR = torch.tensor([[0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0],
                    [1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1],
                    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])  # where the expert's wish is far from 0
CONTROL = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0],
                        [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1],
                        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])  # who has it when it hands back after 3 steps without


@pytest.mark.parametrize("i", [1, 2])
def test_the_expert_takes_over_holds_hands_back_and_only_its_steps_are_kept(i):
    labels = torch.where(FAR.T.unsqueeze(2).bool(), torch.tensor([0.4, -0.31]), torch.tensor([-0.3, 0.4]))  # (T, S, 2)
    calls = iter(labels)
    control = CONTROL.bool() if i > 1 else torch.ones_like(CONTROL).bool()  # the first round is cloning
    one = args(threshold=0.5, hold=3, steps_per_round=12)
    replay, takeovers, _, seen = collected(one, i, lambda s: next(calls), silent())
    for k, (obs, executed) in enumerate(seen):
        mine = control[k]
        assert replay[k].size == mine.sum()
        n = int(replay[k].size)
        assert torch.equal(replay[k].obs[0, :n], obs[mine]) and torch.equal(replay[k].action[0, :n], labels[mine, k])
        torch.testing.assert_close(executed, torch.where(mine.unsqueeze(1), 2 * labels[:, k] + 1, 1.0))
    assert [k for k, _ in takeovers] == ([] if i == 1 else [1, 0, 0, 1])


def test_doubt_is_the_norm_of_the_diagonal_of_the_members_covariance():
    """At takeovers alone, in their order, against a loop over members; and the action is the members' mean."""
    one = args(threshold=1.0, hold=2, steps_per_round=60, ensemble=5)
    _, takeovers, actor, seen = collected(one, 2)
    found = 0
    for k, (obs, executed) in enumerate(seen):
        had, quiet, known = False, 0, []
        for x, raw in zip(obs, executed):
            actions = []
            for e in range(5):
                h = x
                for j in 0, 2, 4:
                    h = h @ actor.net[j].weight[k, e] + actor.net[j].bias[k, e]
                    h = h.relu() if j < 4 else h.tanh()
                actions.append(h[0].detach().numpy())
            pi, far = np.mean(actions, 0), np.linalg.norm(np.mean(actions, 0) - x[:2].numpy()) > 1.0
            if far and not had:
                known.append(np.sqrt(np.sum(np.diag(np.cov(np.array(actions).T, ddof=0)) ** 2)))
            had, quiet = (True, 0) if far else (had and quiet + 1 < 2, quiet + 1)
            np.testing.assert_allclose(raw, 2 * (x[:2].numpy() if had else pi) + 1, atol=1e-5)
        assert len(known) > 2
        np.testing.assert_allclose([d for agent, d in takeovers if agent == k], known, rtol=1e-3)
        found += len(known)
    assert found == len(takeovers)


def test_tau_is_the_mean_of_the_last_quarter_of_the_doubts(best, tmp_path):
    folder = m.main(args(tmp_path, env_id="Drift-v0", expert=best, threshold=0.02, hold=1))
    doubts, found = {k: [] for k in "012"}, 0
    for row in csv.DictReader((folder / "losses.csv").open()):
        mine = doubts[row["seed"]]
        if row["name"] == "doubt":
            mine.append(float(row["value"]))
        if row["name"] == "tau":
            last = [d for i, d in enumerate(mine) if i >= int(0.75 * len(mine))]
            assert float(row["value"]) == pytest.approx(sum(last) / len(last), rel=1e-4)
            found = max(found, len(mine))
    assert found > 8


def filled(S=3, sizes=(5, 20, 9), E=2):
    """An agent whose D have these sizes and hold (k, i, 0, 0) with action k / 10; all else is NaN."""
    replay = torch.nn.ModuleList(m.Replay(1, 30, 4, 2) for _ in range(S))
    for k, (own, n) in enumerate(zip(replay, sizes)):
        own.obs.fill_(torch.nan)
        own.action.fill_(torch.nan)
        for i in range(n):
            own.add(torch.tensor([k, i, 0.0, 0.0]), torch.full((2,), k / 10))
    return m.Agent(args(num_seeds=S, ensemble=E), 4, 2, replay)


def test_members_learn_from_batches_of_their_own_from_all_of_their_agents_labels(monkeypatch):
    agent, seen, loss = filled(), [], m.actor_loss

    def watched(actor, batch):
        seen.append(batch)
        return loss(actor, batch)

    monkeypatch.setattr(m, "actor_loss", watched)
    for _ in range(30):
        out = agent.update()
    assert out["labels"].tolist() == [5, 20, 9] and out["actor_loss"].isfinite().all()
    s, a = (torch.stack(x) for x in zip(*seen))  # (30, S, E, B, .)
    assert s.shape == (30, 3, 2, 16, 4) and a.shape == (30, 3, 2, 16, 2)
    for k, n in enumerate((5, 20, 9)):
        assert (s[:, k, ..., 0] == k).all() and (a[:, k] == k / 10).all()
        assert all(set(s[:, k, e, :, 1].flatten().tolist()) == set(range(n)) for e in range(2))
    assert not torch.equal(s[:, :, 0], s[:, :, 1])


def test_loss_by_hand():
    torch.manual_seed(0)
    actor, s, a = m.Actor(3, 2, 4, 2, 6), torch.randn(3, 2, 5, 4), torch.rand(3, 2, 5, 2) * 2 - 1
    loss = m.actor_loss(actor, (s, a))
    for k in range(3):
        errors = []
        for e in range(2):
            x = s[k, e]
            for i in 0, 2, 4:
                x = x @ actor.net[i].weight[k, e] + actor.net[i].bias[k, e]
                x = x.relu() if i < 4 else x.tanh()
            errors += [(x[i, j] - a[k, e, i, j]).item() ** 2 for i in range(5) for j in range(2)]
        assert loss.shape == (3,) and loss[k].item() == pytest.approx(np.mean(errors))


def test_observations_are_normalised_by_each_agents_own_labels():
    agent = filled()
    m.prepare(agent.actor, agent.data)
    for k, n in enumerate((5, 20, 9)):
        assert agent.actor.mean[k, 0].tolist() == pytest.approx([k, (n - 1) / 2, 0, 0])
        assert agent.actor.std[k, 0].tolist() == pytest.approx([1e-3, np.arange(n).std() + 1e-3, 1e-3, 1e-3])


def test_agents_together_as_apart(monkeypatch):
    """What they collect and how they learn from it."""
    seed, draws = m.draw_seed, torch.rand(3, 1, 32, dtype=torch.float64)
    one = args(threshold=0.9, hold=2)
    together, takeovers, actor, _ = collected(one, 2)
    agents = m.Agent(one, 4, 2, together)
    agents.actor.load_state_dict(actor.state_dict())
    calls = iter([0, 1, 2])
    monkeypatch.setattr(torch, "rand", lambda *size, **_: draws[next(calls)])
    m.prepare(agents.actor, together)
    loss = agents.update()["actor_loss"]
    for k in range(3):
        monkeypatch.setattr(m, "draw_seed", lambda first, zero, _, *rest, k=k: seed(first, zero, k, *rest))
        alone = m.Actor(1, 2, 4, 2, 16)
        for p, q in zip(alone.parameters(), actor.parameters()):
            p.data.copy_(q.data[k : k + 1])
        single = args(threshold=0.9, hold=2, num_seeds=1)
        apart, mine, _, _ = collected(single, 2, actor=alone)
        n = int(apart[0].size)
        assert n == together[k].size and 0 < n < 30
        torch.testing.assert_close(apart[0].obs[:, :n], together[k].obs[:, :n])
        assert [d for _, d in mine] == pytest.approx([d for agent, d in takeovers if agent == k], rel=1e-4)
        agent = m.Agent(single, 4, 2, apart)
        agent.actor.load_state_dict(alone.state_dict())
        calls = iter([k])
        m.prepare(agent.actor, apart)
        torch.testing.assert_close(agent.update()["actor_loss"][0], loss[k])
        for p, q in zip(agent.actor.parameters(), agents.actor.parameters()):
            torch.testing.assert_close(p[0], q[k], rtol=1e-4, atol=1e-6)


def test_nan_in_agent_0_leaves_the_others_alone():
    one = args(threshold=0.9, hold=2)
    clean, takeovers, actor, _ = collected(one, 2)
    actor.net[0].weight.data[0] = torch.nan
    spoilt, found, _, _ = collected(one, 2, actor=actor)
    assert all(torch.equal(clean[k].obs, spoilt[k].obs) and clean[k].size == spoilt[k].size for k in (1, 2))
    assert spoilt[0].size == 0 and found == [x for x in takeovers if x[0]]


def test_resume_within_a_round_and_between_two_is_exact(best, tmp_path, unexported, monkeypatch):
    flags = dict(env_id="Drift-v0", expert=best, threshold=0.2, hold=2, num_seeds=2, eval_episodes=1, horizon=15)
    whole = m.main(args(tmp_path / "a", **flags))
    a = checkpoint(whole)
    sizes = [int(a["agent"][f"data.{k}._extra_state"]["size"]) for k in range(2)]
    assert all(30 < n < 120 for n in sizes) and ",doubt," in (whole / "losses.csv").read_text()
    for stop in 20, 26:
        with monkeypatch.context() as patch:
            stop_at(m, stop, patch)
            with pytest.raises(SystemExit) as stopped:
                m.main(args(tmp_path / str(stop), **flags))
        (folder,) = (tmp_path / str(stop)).iterdir()
        assert stopped.value.code == f"hg_dagger: stopped at update {stop}; go on with --resume {folder}"
        resume(m, folder)
        b = checkpoint(folder)
        assert all(same(a[part], b[part]) for part in ("update", "agent", "moments", "rng"))
        for name in "eval.csv", "losses.csv":
            assert (whole / name).read_text() == (folder / name).read_text()


@pytest.mark.parametrize("flags", [{"threshold": -0.1}, {"threshold": float("nan")}, {"hold": 0}, {"ensemble": 0}])
def test_impossible_flags(flags, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        m.main(args(tmp_path / "out", **flags))
    ((name, value),) = flags.items()
    assert stopped.value.code == f"hg_dagger: --{name} cannot be {value}" and not (tmp_path / "out").exists()


def test_corrections_mend_what_cloning_of_more_labels_leaves(best, tmp_path, unexported):
    """Every agent loses less than half of what any clone loses that has twice its labels and as many updates."""
    cost, labels = [], []
    shape = dict(env_id="Drift-v0", expert=best, num_updates=300, eval_every=300, hidden_dim=32, batch_size=32,
                 eval_episodes=1)
    for rounds in 1, 6:
        folder = m.main(args(tmp_path, rounds=rounds, steps_per_round=240 // rounds, threshold=0.1, hold=3,
                             learning_rate=2e-3, **shape))
        cost.append([-float(row["return_mean"]) for row in csv.DictReader((folder / "eval.csv").open())])
        labels.append([int(checkpoint(folder)["agent"][f"data.{k}._extra_state"]["size"]) for k in range(3)])
    assert labels[0] == [240] * 3 and max(labels[1]) < 120 and max(cost[1]) < min(cost[0]) / 2, (cost, labels)


# --- a person ---
CAR = "MountainCarContinuous-v0"


@pytest.fixture
def screen(monkeypatch):
    """A window that no one sees, in which time does not matter; pygame."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    import pygame
    from gymnasium.envs.classic_control.continuous_mountain_car import Continuous_MountainCarEnv as Car

    monkeypatch.setitem(Car.metadata, "render_fps", 100_000)
    yield pygame
    pygame.quit()


def presses(pygame, person, script):
    """`person` whose keys go down and up before the calls of a script {call: [(type, key), ...]}."""
    calls = iter(range(10_000))

    def scripted(obs):
        for kind, key in script.get(next(calls), []):
            pygame.event.post(pygame.event.Event(kind, key=key))
        pygame.event.post(pygame.event.Event(pygame.MOUSEMOTION, pos=(1, 1), rel=(1, 1), buttons=(0, 0, 0)))
        return person(obs)

    return scripted


def test_arrow_keys_hand_over_and_steer(screen):
    down, up, right, left = screen.KEYDOWN, screen.KEYUP, screen.K_RIGHT, screen.K_LEFT
    one = args(env_id=CAR, gate="keyboard", num_seeds=1, hold=2, steps_per_round=16)
    task = m.make_task(one)
    person, shown = m.load_person(one, task)
    assert shown.spec.kwargs["render_mode"] == "human" and "render_mode" not in task.spec.kwargs
    actor = m.Actor(1, 2, 2, 1, 5)
    for i, (keys, kept) in {2: ({3: [(down, right)], 6: [(up, right)], 9: [(down, left)], 10: [(down, right)],
                                 11: [(up, right), (up, left), (down, screen.K_a)]}, [1, 1, 1, 0, -1, 0, 0]),
                            1: ({5: [(down, screen.K_UP)]}, [0] * 5 + [1] * 11)}.items():
        replay = [m.Replay(1, 16, 2, 1)]
        takeovers = m.collect(one, shown, presses(screen, person, keys), actor, replay, i)
        n = int(replay[0].size)
        assert replay[0].action[0, :n, 0].tolist() == kept and len(takeovers) == (2 if i == 2 else 0)
    assert replay[0].obs[0].diff(dim=0)[6:, 1].min() > 0  # it was the person that drove: faster and faster to the right


def test_up_and_down_are_the_first_dimension_left_and_right_the_last(screen):
    one = args(env_id=CAR, num_seeds=1)
    person, _ = m.load_person(one, SimpleNamespace(act_dim=3, spec=m.make_task(one).spec))
    ways = {screen.K_UP: [1, 0, 0], screen.K_DOWN: [-1, 0, 0], screen.K_RIGHT: [0, 0, 1], screen.K_LEFT: [0, 0, -1]}
    for key, way in ways.items():
        screen.event.post(screen.event.Event(screen.KEYDOWN, key=key))
        assert person(None).tolist() == [way]
        screen.event.post(screen.event.Event(screen.KEYUP, key=key))
        assert person(None).isnan().all()


def test_a_run_at_the_keyboard(screen, tmp_path, unexported, monkeypatch):
    load, keys = m.load_person, {20: [(screen.KEYDOWN, screen.K_LEFT)], 25: [(screen.KEYUP, screen.K_LEFT)]}

    def scripted(*x):
        person, shown = load(*x)
        return presses(screen, person, keys), shown

    monkeypatch.setattr(m, "load_person", scripted)
    flags = dict(env_id=CAR, gate="keyboard", num_seeds=1, rounds=2, steps_per_round=15, hold=1, num_updates=4,
                 expert="no/such.pt2", horizon=20)
    folder = m.main(args(tmp_path, **flags))
    replay = checkpoint(folder)["agent"]["data.0._extra_state"]
    assert replay["size"] == 15 + 5 and (replay["action"][0, 15:20] == -1).all()
    assert len((folder / "eval.csv").read_text().split()) == 2


@pytest.mark.filterwarnings("ignore:.*render_mode")
@pytest.mark.parametrize("flags", [{"num_seeds": 3}, {"env_id": "Plain-v0"}])
def test_what_a_person_cannot_do(flags, screen, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        m.main(args(tmp_path / "out", **{"env_id": CAR, "gate": "keyboard", "num_seeds": 1, **flags}))
    message = stopped.value.code
    assert message.startswith("hg_dagger: --gate keyboard needs --num-seeds 1, a screen and") and "\n" not in message
    assert not (tmp_path / "out").exists()
