"""PointMaze's sets: the planner, what is stored, the evaluation; and stand-ins for AntMaze, Adroit and Kitchen."""
import dataclasses
import json
import pickle
import sys
from types import SimpleNamespace

import bc
import gymnasium as gym
import minari
import numpy as np
import pointmaze
import pytest
import torch
from minari.data_collector import EpisodeBuffer

pytest.importorskip("gymnasium_robotics", reason="needs pip install gymnasium-robotics")

MAP = [[1, 1, 1, 1, 1, 1],
       [1, 0, 0, 0, 0, 1],
       [1, 0, 1, 1, 0, 1],
       [1, 0, 0, 1, 0, 1],
       [1, 1, 1, 1, 1, 1]]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """900 steps with the planner's goals, and 700 of these with the evaluation's."""
    root = tmp_path_factory.mktemp("pointmaze")
    for name, words in (("own-v0", ["--steps", "900", "--goals", "planner"]), ("relabelled-v0", ["--steps", "700"])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pointmaze, "pack", lambda path: None)  # takes seconds
            patch.setattr(pointmaze, "score", lambda *_: (1, 100))
            pointmaze.main(["umaze", str(root / name), *words])
    return root


def episodes(folder):
    return list(minari.MinariDataset(folder / "data").iterate_episodes())


def load(folder, **flags):
    return bc.load(bc.Args(dataset_id=str(folder), device="cpu", batch_size=2, **{"eval_episodes": 1, **flags}))


def test_the_planner_walks_shortest_paths():
    """Over the top from the dead end on the right it is 5 cells to the corner, 8 to the dead end on the left."""
    maze = SimpleNamespace(maze_map=MAP)
    planner = pointmaze.Planner(maze)
    assert pointmaze.distances(MAP, (3, 4)) == {
        (3, 4): 0, (2, 4): 1, (1, 4): 2, (1, 3): 3, (1, 2): 4, (1, 1): 5, (2, 1): 6, (3, 1): 7, (3, 2): 8}
    path = [(3, 4)]
    while path[-1] != (3, 2):
        path.append(planner.next_cell(path[-1], (3, 2)))
    assert path == [(3, 4), (2, 4), (1, 4), (1, 3), (1, 2), (1, 1), (2, 1), (3, 1), (3, 2)]
    ring = [[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 0, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]]
    assert max(pointmaze.distances(ring, (1, 1)).values()) == 4  # both ways round


def test_goals_change_when_reached_and_are_near(sets):
    env = pointmaze.make("umaze").unwrapped
    planner, found = pointmaze.Planner(env.maze), episodes(sets / "own-v0")
    assert len(found) > 9 and all(episode.terminations[-1] for episode in found[:-1])
    for one, two in zip(found, found[1:]):
        for key in ("achieved_goal", "observation"):  # the walk goes on where it was
            np.testing.assert_array_equal(one.observations[key][-1], two.observations[key][0])
        assert not np.array_equal(one.observations["desired_goal"][0], two.observations["desired_goal"][0])
    for episode in found:
        goal, xy = episode.observations["desired_goal"], episode.observations["achieved_goal"]
        assert (goal == goal[0]).all()
        far = np.linalg.norm(xy - goal, axis=-1)
        assert (far[:-1] > pointmaze.RADIUS).all()
        np.testing.assert_array_equal(episode.terminations, far[1:] <= pointmaze.RADIUS)
        np.testing.assert_array_equal(episode.rewards, episode.terminations)
        assert 1 <= planner.far[planner.cell(xy[0])][planner.cell(goal[0])] <= 3
    assert found[-1].truncations[-1] != found[-1].terminations[-1]


def test_recorded_transitions_replay_in_the_environment(sets):
    env = pointmaze.make("umaze", max_episode_steps=10_000)
    obs, _ = env.reset(seed=0)
    for episode in episodes(sets / "own-v0"):
        assert np.abs(episode.actions).max() <= 1
        for t, action in enumerate(episode.actions):
            np.testing.assert_array_equal(pointmaze.rounded(obs["observation"]), episode.observations["observation"][t])
            obs, *_ = env.step(action)
    assert len(episode.actions) == t + 1
    np.testing.assert_array_equal(pointmaze.rounded(obs["observation"]), episode.observations["observation"][-1])


def test_walks_with_the_goal_of_the_evaluation(sets):
    """They are the planner's, without the steps that begin at that goal, and end with reward 1 where it is reached."""
    planner = pointmaze.Planner(pointmaze.make("umaze").unwrapped.maze)
    own, found = episodes(sets / "own-v0"), episodes(sets / "relabelled-v0")
    steps = {(*obs, *action) for e in own for obs, action in zip(e.observations["observation"], e.actions)}
    ends = 0
    for episode in found:
        goal, xy = episode.observations["desired_goal"], episode.observations["achieved_goal"]
        assert (goal == goal[0]).all() and planner.cell(goal[0]) == (1, 1)
        far = np.linalg.norm(xy - goal, axis=-1)
        assert (far[:-1] > pointmaze.RADIUS).all()
        np.testing.assert_array_equal(episode.terminations, far[1:] <= pointmaze.RADIUS)
        np.testing.assert_array_equal(episode.rewards, episode.terminations)
        assert steps >= {(*obs, *action) for obs, action in zip(episode.observations["observation"], episode.actions)}
        ends += episode.terminations.sum()
    assert 0 < ends < len(found)
    assert sum(len(episode.actions) for episode in found) == 700


def test_a_walk_past_the_goal_of_the_evaluation_is_cut():
    middle = pointmaze.make("umaze").unwrapped.maze.cell_rowcol_to_xy((1, 1))
    walk = [{"achieved_goal": middle + [x, 0], "desired_goal": None} for x in (0.1, 1, 0.8, 0.3, 0.2, 0.9, 1.2)]
    rng = SimpleNamespace(uniform=lambda *_: np.zeros(2))
    (one, a, reached), (two, b, not_reached) = pointmaze.relabelled("umaze", [(walk, np.arange(6), True)], rng)
    assert [obs["achieved_goal"][0] - middle[0] for obs in one] == pytest.approx([1, 0.8, 0.3])
    assert a.tolist() == [1, 2] and reached and b.tolist() == [5] and not not_reached and len(two) == 2
    assert all((obs["desired_goal"] == middle).all() for obs in one + two)


def test_the_flat_observation_holds_the_goal(sets):
    data = load(sets / "own-v0")
    expected = np.concatenate([episode.observations["desired_goal"][:-1] for episode in episodes(sets / "own-v0")])
    np.testing.assert_array_equal(data.obs[:, 2:4], expected)
    assert data.obs.shape == (900, 8) and torch.equal(data.obs[:, :2], data.obs[:, 4:6])
    obs = gym.make(data.spec).reset(seed=0)[0]
    np.testing.assert_array_equal(bc.flat(obs)[2:4], obs["desired_goal"].astype(np.float32))


@pytest.mark.parametrize("name, longest", [("umaze", 6), ("medium", 10), ("large", 18)])
def test_the_evaluation_asks_for_far_goals(name, longest):
    env = pointmaze.evaluation(name)
    planner = pointmaze.Planner(env.unwrapped.maze)
    assert max(planner.far[pointmaze.MAZES[name][1]].values()) == longest
    for seed in range(20):
        obs, _ = env.reset(seed=seed)
        goal, start = planner.cell(obs["desired_goal"]), planner.cell(obs["achieved_goal"])
        assert goal == pointmaze.MAZES[name][1] and planner.far[goal][start] > longest * 2 / 3
    assert pointmaze.score(name, 0.5, 2)[0] == 1


class Follow(torch.nn.Module):
    """The planner, or one that stands still, as a policy of flat observations."""

    def __init__(self, maze, steady):
        super().__init__()
        self.planner, self.steady, self.weight = pointmaze.Planner(maze), steady, torch.nn.Parameter(torch.zeros(1, 1))

    def forward(self, obs):  # (1, B, 8) -> (1, B, 2)
        actions = [0 * x[:2] if self.steady else self.planner(
            {"achieved_goal": x[:2], "desired_goal": x[2:4], "observation": x[4:]}) for x in obs[0].numpy()]
        return torch.tensor(np.array(actions, np.float32))[None].clamp(-1, 1)


def test_success_and_the_evaluation_make_the_round_trip(sets):
    """An episode of the evaluation ends at the goal with return 1, or after 300 steps with 0: a score is a rate."""
    dataset = minari.MinariDataset(sets / "own-v0" / "data")
    metadata = dataset.storage.get_episode_metadata(range(dataset.total_episodes))
    success = [bool(episode["success"]) for episode in metadata]
    assert success == [bool(episode.terminations[-1]) for episode in dataset.iterate_episodes()]
    data = load(sets / "own-v0")
    assert data.reference == (0, 1) and data.spec.max_episode_steps == 300
    assert data.spec.kwargs["continuing_task"] is False
    env = gym.make(data.spec)
    assert env.unwrapped.maze.maze_map == [
        [1, 1, 1, 1, 1], [1, "g", 0, 0, 1], [1, 1, 1, 0, 1], [1, "r", "r", 0, 1], [1, 1, 1, 1, 1]]
    for steady, expected in ((False, 1), (True, 0)):
        policy, seeds = Follow(env.unwrapped.maze, steady), np.array([[1, 2]])
        spread = bc.evaluate(pickle.dumps(policy), pickle.dumps(data.spec), seeds, 0.99, data.reference)
        assert spread[0, [0, 1, 4]].tolist() == [expected, 0, 100 * expected]
        assert spread[0, 3] == 300 if steady else 50 < spread[0, 3] < 200


@pytest.mark.parametrize("words, said", [
    (["tiny", "x-v0"], "umaze"), (["umaze"], "folder"), (["umaze", "x-v0", "--steps", "0"], "--steps cannot be 0"),
    (["umaze", "x-v0", "--reach", "0"], "--reach"), (["umaze", "x-v0", "--noise", "nan"], "--noise"),
    (["umaze", "x-v0", "--seed", "-1"], "--seed"), (["umaze", "x-v0", "--steps", "many"], "many"),
    (["umaze", "."], "is there already")])
def test_errors_are_one_sentence(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        pointmaze.main(words)
    assert said in stopped.value.code and stopped.value.code.startswith("pointmaze.py: ")
    assert "\n" not in stopped.value.code and not list(tmp_path.iterdir())


def test_without_gymnasium_robotics_it_says_what_to_install(sets, tmp_path, monkeypatch):
    for name in [*sys.modules]:
        if name.split(".")[0] == "gymnasium_robotics":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.raises(SystemExit, match="pointmaze.py: gymnasium_robotics is missing: pip install gymnasium-robotics"):
        pointmaze.main(["umaze", str(tmp_path / "x-v0")])
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="gymnasium_robotics"):
        load(sets / "own-v0")
    assert len(load(sets / "own-v0", eval_episodes=0).obs) == 900


def box(*shape):
    return gym.spaces.Box(-np.inf, np.inf, shape, np.float64)


TASKS = gym.spaces.Dict({"microwave": box(1), "kettle": box(7), "light switch": box(2), "slide cabinet": box(1)})
STAND_INS = {  # spaces of sets on the hub: their observations, the width when flat, actions
    "AntMaze_UMaze-v4": (
        gym.spaces.Dict({"achieved_goal": box(2), "desired_goal": box(2), "observation": box(27)}), 31, 8),
    "AdroitHandDoor-v1": (box(39), 39, 28),
    "FrankaKitchen-v1": (
        gym.spaces.Dict({"achieved_goal": TASKS, "desired_goal": TASKS, "observation": box(59)}), 81, 9)}


@pytest.mark.parametrize("env_id", STAND_INS)
def test_sets_of_the_hub_load_from_stand_ins(env_id, tmp_path, monkeypatch):
    """Two episodes of random numbers in the spaces of AntMaze, Adroit and Kitchen, which nests a Dict in a Dict; then
    the environment, which for Kitchen cannot be built beside MuJoCo 4."""
    space, width, act_dim = STAND_INS[env_id]
    actions = gym.spaces.Box(-1, 1, (act_dim,), np.float64 if env_id == "FrankaKitchen-v1" else np.float32)
    space.seed(0), actions.seed(0)
    kwargs = {"tasks_to_complete": [*TASKS]} if env_id == "FrankaKitchen-v1" else {}
    spec, found = dataclasses.replace(gym.spec(env_id), kwargs={**gym.spec(env_id).kwargs, **kwargs}), []
    for n, T in enumerate((3, 5)):
        steps = [space.sample() for _ in range(T + 1)]
        found.append(EpisodeBuffer(
            n, n, None, stacked(steps), np.array([actions.sample() for _ in range(T)]), np.arange(T, dtype=np.float64),
            np.zeros(T, bool), np.arange(T) == T - 1))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    minari.create_dataset_from_buffers(
        "D4RL/standin-v0", found, observation_space=space, action_space=actions)
    path = tmp_path / "D4RL" / "standin-v0" / "data" / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "env_spec": spec.to_json()}))
    data = bc.load(bc.Args(dataset_id="D4RL/standin-v0", device="cpu", batch_size=8, eval_episodes=0))
    assert data.obs.shape == (8, width) and data.action.shape == (8, act_dim) and data.terminated.sum() == 0
    np.testing.assert_array_equal(data.obs[-1], bc.flat(steps[-2]))
    flags = dict(dataset_id="D4RL/standin-v0", device="cpu", batch_size=8, eval_episodes=1)
    try:
        gym.make(spec)
    except Exception:  # Kitchen beside MuJoCo 4
        with pytest.raises(SystemExit, match="^bc: --dataset-id D4RL/standin-v0 is no directory"):
            bc.load(bc.Args(**flags))
    else:
        data = bc.load(bc.Args(**flags))
        assert data.spec.id == env_id
        assert bc.flat(gym.make(data.spec).reset(seed=0)[0]).shape == (width,)


def stacked(steps):
    if isinstance(steps[0], dict):
        return {key: stacked([step[key] for step in steps]) for key in steps[0]}
    return np.array(steps)
