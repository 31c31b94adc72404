"""Records a planner's walks between random goals in PointMaze, as a Minari set that has to be stitched.

    python datasets/pointmaze.py umaze datasets/pointmaze/umaze-v0
    python algorithms/iql.py --dataset-id pointmaze/umaze-v0 --return-range 0 --reward-shift -1 --expectile 0.9

The planner follows a shortest path over the maze's cells, towards the middle of the next one with a PD controller and
Gaussian noise on its actions. It never starts anew: within 0.45 of its goal, where the environment calls it reached, it
draws another one, as in D4RL's maze2d and Minari's D4RL/pointmaze, but at most --reach cells away, so that no walk
leads through the whole maze. A walk is an episode.

As in maze2d the goal that is stored is not the planner's but that of the evaluation (Minari's cell for it, with the
environment's noise). The reward is 1 where a walk happens to come by, which ends the episode. --goals planner stores
the planner's own goals, as Minari's sets do: each is reached, which truncates an episode there and terminates it here.

The evaluation starts in the far third of the maze and ends at the goal with reward 1, or with 0 at the time limit: a
return is a success, a score its percentage. Observations are achieved_goal, desired_goal and observation (position,
velocity).
"""
import argparse
import os
import sys
import tempfile
import warnings
from collections import deque
from pathlib import Path
from unittest import mock

import gymnasium as gym
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer
from pack import pack

MAZES = {  # environment and the cell of the goal in evaluation, Minari's for its D4RL/pointmaze sets
    "umaze": ("PointMaze_UMaze-v3", (1, 1)), "medium": ("PointMaze_Medium-v3", (6, 6)),
    "large": ("PointMaze_Large-v3", (7, 9))}
RADIUS = 0.45  # how near the environment calls a goal reached


def distances(grid, cell):
    """{free cell: length of the shortest path from `cell`}, nearest first."""
    found, queue = {cell: 0}, deque([cell])
    while queue:
        i, j = here = queue.popleft()
        for there in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            if grid[there[0]][there[1]] != 1 and there not in found:
                found[there] = found[here] + 1
                queue.append(there)
    return found


class Planner:
    """Where to push: towards the next cell of the shortest path to the goal, or the goal itself once in its cell."""

    def __init__(self, maze):
        self.maze = maze
        free = [tuple(cell) for cell in np.argwhere([[value != 1 for value in row] for row in maze.maze_map]).tolist()]
        self.far = {cell: distances(maze.maze_map, cell) for cell in free}

    def cell(self, xy):
        return tuple(self.maze.cell_xy_to_rowcol(xy).tolist())

    def next_cell(self, cell, goal):
        i, j = cell
        near = [there for there in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)) if there in self.far]
        return cell if cell == goal else min(near, key=self.far[goal].get)

    def __call__(self, obs):
        xy, velocity, goal = obs["achieved_goal"], obs["observation"][2:], obs["desired_goal"]
        cell, last = self.cell(xy), self.cell(goal)
        target = goal if cell == last else self.maze.cell_rowcol_to_xy(self.next_cell(cell, last))
        return 10 * (target - xy) - velocity  # the gains of D4RL's and Minari's controllers


def walks(name, seed, reach, noise):
    """Yields (T + 1 observations, actions (T, 2), whether the goal was reached) of one walk after the other."""
    env = make(name, continuing_task=True)
    limit, env = env.spec.max_episode_steps, env.unwrapped  # the time limit counts for each walk instead
    planner, rng = Planner(env.maze), np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    while True:
        xy = obs["achieved_goal"]
        here = planner.far[planner.cell(xy)]
        cells = [cell for cell, far in here.items() if 1 <= far <= reach]
        goal = xy
        while np.linalg.norm(goal - xy) <= RADIUS:
            middle = env.maze.cell_rowcol_to_xy(cells[rng.integers(len(cells))])
            goal = middle + rng.uniform(-0.25, 0.25, 2)  # the noise of the environment's own goals
        env.goal = goal
        observations, actions, reached = [{**obs, "desired_goal": goal}], [], False
        while not reached and len(actions) < limit:
            action = planner(observations[-1]) + noise * rng.standard_normal(2)
            actions.append(action.clip(-1, 1).astype(np.float32))
            obs, _, _, _, info = env.step(actions[-1])
            observations.append(obs)
            reached = info["success"]
        yield observations, np.array(actions), reached


def make(name, **kwargs):
    import gymnasium_robotics  # noqa: F401, registers the environments

    return gym.make(MAZES[name][0], **kwargs)


def evaluation(name):
    """The environment to evaluate in: "r" marks cells to start from, "g" the goal's."""
    grid = [list(row) for row in make(name).unwrapped.maze.maze_map]
    (i, j), far = MAZES[name][1], distances(grid, MAZES[name][1])
    for cell, steps in far.items():
        if steps > 2 / 3 * max(far.values()):
            grid[cell[0]][cell[1]] = "r"
    grid[i][j] = "g"
    return make(name, maze_map=grid, continuing_task=False)


def relabelled(name, walks, rng):
    """The walks with the goal of the evaluation in place of the planner's, as in D4RL's maze2d: cut where that happens
    to be reached, without the steps that begin there, which no evaluation sees."""
    middle = make(name).unwrapped.maze.cell_rowcol_to_xy(MAZES[name][1])
    for observations, actions, _ in walks:
        goal = middle + rng.uniform(-0.25, 0.25, 2)
        at = [np.linalg.norm(obs["achieved_goal"] - goal) <= RADIUS for obs in observations]
        first = 0
        for t in range(1, len(at)):
            if at[t - 1]:
                first = t
            elif at[t] or t == len(at) - 1:
                yield [{**obs, "desired_goal": goal} for obs in observations[first:t + 1]], actions[first:t], at[t]


def rounded(x):
    """Multiples of 1 / 65,536, far finer than the noise, which compress better."""
    return (np.round(np.array(x) * 2**16) / 2**16).astype(np.float32)


def episodes(walks, steps):
    """The EpisodeBuffers of the first `steps` steps: reward 1 and a termination where the goal is reached."""
    found = []
    while steps:
        observations, actions, reached = next(walks)
        T = min(len(actions), steps)
        last = np.arange(T) == len(actions) - 1
        obs = {key: rounded([obs[key] for obs in observations[:T + 1]]) for key in observations[0]}
        found.append(EpisodeBuffer(
            len(found), None, None, obs, actions[:T], (last & reached).astype(np.float32), last & reached,
            (np.arange(T) == T - 1) & ~(last & reached)))
        steps -= T
    return found


def write(found, folder, name, description):
    """Writes the episodes as a new Minari set, which appears whole or not at all."""
    folder, env = Path(folder).resolve(), make(name, continuing_task=True)
    space = gym.spaces.Dict({
        key: gym.spaces.Box(-np.inf, np.inf, box.shape, np.float32) for key, box in env.observation_space.items()})
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as part:
        with warnings.catch_warnings(action="ignore"), mock.patch.dict(os.environ, MINARI_DATASETS_PATH=part):
            made = minari.create_dataset_from_buffers(
                "made-v0", found, env=env.spec, eval_env=evaluation(name).spec, observation_space=space,
                action_space=env.action_space, ref_min_score=0.0, ref_max_score=1.0,  # a return is a success rate
                algorithm_name="waypoint planner", description=description)
            made.storage.update_episode_metadata({"success": bool(episode.terminations[-1])} for episode in found)
        pack(Path(part, "made-v0", "data", "main_data.hdf5"))
        Path(part, "made-v0").replace(folder)


def score(name, noise, n=100):
    """Success rate and mean length of the planner in n episodes of the evaluation."""
    env, rng, results = evaluation(name), np.random.default_rng(0), []
    planner = Planner(env.unwrapped.maze)
    for seed in range(n):
        (obs, _), steps, over = env.reset(seed=seed), 0, False
        while not over:
            action = planner(obs) + noise * rng.standard_normal(2)
            obs, reward, terminated, truncated, _ = env.step(action.clip(-1, 1).astype(np.float32))
            steps, over = steps + 1, terminated or truncated
        results.append((reward, steps))
    return np.mean(results, 0)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"pointmaze.py: {message}")
    parser.add_argument("maze", choices=MAZES)
    parser.add_argument("folder", help="of the new set")
    parser.add_argument("--steps", type=int, default=100_000, help="to store")
    parser.add_argument("--seed", type=int, default=0, help="of the start, the goals and the noise")
    parser.add_argument("--reach", type=int, default=3, help="cells to the next goal, at most")
    parser.add_argument("--noise", type=float, default=0.5, help="deviation of the noise on actions")
    parser.add_argument("--goals", choices=("evaluation", "planner"), default="evaluation", help="which goal is stored")
    options = parser.parse_args(words)
    try:
        for name, low in (("steps", 1), ("seed", 0), ("reach", 1), ("noise", 0)):
            assert low <= getattr(options, name) < np.inf, f"--{name} cannot be {getattr(options, name)}"
        assert not Path(options.folder).exists(), f"{options.folder} is there already"
        stream = walks(options.maze, options.seed, options.reach, options.noise)
        if options.goals == "evaluation":
            stream = relabelled(options.maze, stream, np.random.default_rng([options.seed, 1]))
        found = episodes(stream, options.steps)
        flags = " ".join(f"--{name} {getattr(options, name)}" for name in ("steps", "seed", "reach", "noise", "goals"))
        write(found, options.folder, options.maze, f"python datasets/pointmaze.py {options.maze} DIR {flags}")
    except ModuleNotFoundError as error:
        sys.exit(f"pointmaze.py: {error.name} is missing: pip install gymnasium-robotics")
    except Exception as error:
        sys.exit(f"pointmaze.py: {' '.join(str(error).split()) or type(error).__name__}")
    reached = [episode.terminations[-1] for episode in found]
    print(f"{options.folder}: {sum(len(episode.rewards) for episode in found)} transitions in {len(found)} episodes, "
          f"{np.mean(reached):.3f} of which reach their goal; the longest has {max(len(e.rewards) for e in found)}")
    for noise in {0.0, options.noise}:
        rate, length = score(options.maze, noise)
        print(f"the planner with noise {noise}: success {rate:.2f} in 100 evaluations, {length:.0f} steps")


if __name__ == "__main__":
    main()
