"""Makes a Minari set of plain arrays: D4RL's HDF5 files, .npz files, or arrays in memory.

    python datasets/from_d4rl.py hopper_medium-v2.hdf5 datasets/hopper/d4rl-medium-v2 --env-id Hopper-v5
    python datasets/from_d4rl.py mine.npz mine-v0
    python algorithms/iql.py --dataset-id mine-v0

FILE holds `observations` (N, obs_dim), `actions` (N, act_dim) or integers (N,), `rewards`, `terminals` (the task ended
here) and `timeouts` (the episode was cut off here) (N,), one row per step, episodes in a row; `next_observations`
(N, obs_dim) is optional. Without it a cut-off episode loses its last step, whose next observation nobody knows; a
terminated one keeps it, since nothing is bootstrapped from there. DIR is new; its name ends in a version like -v0.

--env-id names the environment to evaluate in, whose bounds then map the actions to [-1, 1]; without it they have to lie
in there already. D4RL's reference returns come along for HalfCheetah, Hopper and Walker2d.
"""
import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import gymnasium as gym
import h5py
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer
from pack import pack

KEYS = "observations", "actions", "rewards", "terminals", "timeouts"
REFERENCE = {  # D4RL's returns of a random and an expert policy, d4rl/infos.py
    "HalfCheetah": (-280.178953, 12135.0), "Hopper": (-20.272305, 3234.3), "Walker2d": (1.629008, 4592.3)}


def read(path):
    """{key: array} of an HDF5 or .npz file."""
    if Path(path).suffix == ".npz":
        with np.load(path) as file:
            return {key: file[key] for key in (*KEYS, "next_observations") if key in file}
    with h5py.File(path) as file:
        return {key: file[key][()] for key in (*KEYS, "next_observations") if key in file}


def episodes_of(arrays):
    """The EpisodeBuffers of the arrays."""
    missing = [key for key in KEYS if key not in arrays]
    assert not missing, f"{', '.join(missing)} missing"
    obs, action, reward, terminated, timeout = (np.asarray(arrays[key]) for key in KEYS)
    next_obs = arrays.get("next_observations")
    lengths = {len(x) for x in (obs, action, reward, terminated, timeout, obs if next_obs is None else next_obs)}
    assert len(lengths) == 1, f"the arrays have {sorted(lengths)} rows"
    assert obs.ndim == 2 and reward.ndim == terminated.ndim == timeout.ndim == 1 and len(obs), "no rows, or of other shapes"
    terminated, timeout = terminated.astype(bool), timeout.astype(bool) & ~terminated.astype(bool)
    ends, episodes = np.unique([*np.flatnonzero(terminated | timeout) + 1, len(obs)]), []
    for i, j in zip([0, *ends], ends):
        whole = next_obs is not None or terminated[j - 1]
        j -= not whole  # its next observation is not known
        if i == j:
            continue
        last = obs[j - 1] if next_obs is None and whole else next_obs[j - 1] if whole else obs[j]
        truncations = np.zeros(j - i, bool)
        truncations[-1] = not terminated[j - 1]
        steps = np.concatenate([obs[i:j], last[None]]).astype(np.float32)
        episodes.append(EpisodeBuffer(
            len(episodes), None, None, steps, action[i:j] if action.ndim == 1 else action[i:j].astype(np.float32),
            reward[i:j].astype(np.float32), terminated[i:j], truncations))
    return episodes


def write(arrays, folder, env_id="", description="made by datasets/from_d4rl.py"):
    """Writes the arrays as a new Minari set, which appears whole or not at all."""
    folder, episodes = Path(folder).resolve(), episodes_of(arrays)
    assert not folder.exists(), f"{folder} is there already"
    action = np.concatenate([episode.actions for episode in episodes])
    env = gym.make(env_id) if env_id else None
    if env:
        space = env.action_space
    elif np.issubdtype(action.dtype, np.integer) and action.ndim == 1:
        space = gym.spaces.Discrete(int(action.max()) + 1)
    else:
        assert np.abs(action).max() <= 1, "actions leave [-1, 1]: name the environment with --env-id"
        space = gym.spaces.Box(-1, 1, action.shape[1:], np.float32)
    assert space.contains(action[0].clip(space.low, space.high) if isinstance(space, gym.spaces.Box) else action[0]), (
        f"its actions are none of {space}")
    low, high = REFERENCE.get(env.spec.name, (None, None)) if env else (None, None)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as part:
        with warnings.catch_warnings(action="ignore"), mock.patch.dict(os.environ, MINARI_DATASETS_PATH=part):
            minari.create_dataset_from_buffers(
                "made-v0", episodes, env=env.spec if env else None, action_space=space,
                observation_space=gym.spaces.Box(-np.inf, np.inf, episodes[0].observations.shape[1:], np.float32),
                ref_min_score=low, ref_max_score=high, algorithm_name="unknown", description=description)
        pack(Path(part, "made-v0", "data", "main_data.hdf5"))
        Path(part, "made-v0").replace(folder)
    return folder


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="HDF5 or .npz")
    parser.add_argument("folder", help="of the new set")
    parser.add_argument("--env-id", default="", help="environment that the data is of")
    options = parser.parse_args(words)
    try:
        folder = write(read(options.file), options.folder, options.env_id, f"of {Path(options.file).name}")
    except Exception as error:
        sys.exit(f"from_d4rl.py: {options.file} cannot be used: {' '.join(str(error).split())}")
    print(f"{folder}: --dataset-id {folder}")


if __name__ == "__main__":
    main()
