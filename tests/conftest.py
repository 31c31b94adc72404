import os
import sys
from importlib import import_module
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
OFFLINE = ["bc", "td3_bc", "iql", "sac_offline", "cql", "bc_diffusion"]  # on transitions with continuous actions
DISCRETE = ["dqn_offline", "bcq_discrete", "cql_discrete"]
ONLINE = ["sac", "dqn"]
METHODS = [*OFFLINE, *DISCRETE, *ONLINE]
ALL = [*METHODS, "bcq_tabular", "dagger", "dt", "mopo"]  # the last four are so different that they have tests of their own


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA"))


@pytest.fixture(autouse=True)
def own_minari_root(monkeypatch, tmp_path_factory):
    """No test reads or writes the user's Minari root."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.getbasetemp() / "minari"))


@pytest.fixture(scope="session")
def hopper(tmp_path_factory):
    """A directory with about 600 steps of a random policy in Hopper: short, terminated episodes and one cut off. Beside
    it stands one of CartPole, which `small` gives to discrete methods."""
    root = tmp_path_factory.mktemp("sets") / "hopper"
    record(root.parent / "cartpole", "CartPole-v1", 600)
    return record(root, "Hopper-v5", 600)


def record(root, env_id, steps):
    """Records a random policy into the Minari set `root`/tiny-v0 and returns that directory."""
    import minari
    from minari.data_collector import EpisodeBuffer

    env, episodes = gym.make(env_id), []
    env.action_space.seed(0)
    while steps > 0:
        obs, actions, rewards, ends = [env.reset(seed=len(episodes))[0]], [], [], [(False, False)]
        while steps > 0 and not any(ends[-1]):
            actions.append(env.action_space.sample())
            next_obs, reward, terminated, truncated, _ = env.step(actions[-1])
            steps -= 1
            obs.append(next_obs)
            rewards.append(reward)
            ends.append((terminated, truncated or steps == 0))
        terminations, truncations = np.array(ends[1:]).T
        episodes.append(EpisodeBuffer(len(episodes), len(episodes), None, np.array(obs), np.array(actions),
                                      np.array(rewards), terminations, truncations))
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(root)
    try:
        minari.create_dataset_from_buffers("tiny-v0", episodes, env=env)
    finally:
        os.environ.pop("MINARI_DATASETS_PATH")
        if before:
            os.environ["MINARI_DATASETS_PATH"] = before
    return root / "tiny-v0"


def write_d4rl(path, lengths, ends, obs_dim=3, act_dim=2, next_observations=True, **changes):
    """A D4RL file whose episodes have these lengths and end in "terminal", "timeout" or neither (""). An observation
    holds (episode, step, 0.1), an action (step / 100, ...), a reward the global row number."""
    rows = [(e, t) for e, n in enumerate(lengths) for t in range(n)]
    obs = np.array([[e, t, *[0.1] * (obs_dim - 2)] for e, t in rows], np.float32)
    last = np.array([t == lengths[e] - 1 for e, t in rows], bool)
    kind = np.array([ends[e] for e, _ in rows], dtype=str)
    data = {
        "observations": obs, "actions": np.array([[t / 100] * act_dim for _, t in rows], np.float32),
        "rewards": np.arange(len(rows), dtype=np.float32),
        "terminals": last & (kind == "terminal"), "timeouts": last & (kind == "timeout")}
    if next_observations is True:
        data["next_observations"] = obs + np.eye(obs_dim, dtype=np.float32)[1]
    if isinstance(next_observations, np.ndarray):
        data["next_observations"] = next_observations
    data.update(changes)
    with h5py.File(path, "w") as file:
        for key, value in data.items():
            if value is not None:
                file[key] = value
    return str(path)


def small(method, dataset, out, **flags):
    """Args of a run that takes a second or two."""
    if method in DISCRETE and Path(dataset).parent.name == "hopper":
        dataset = Path(dataset).parents[1] / "cartpole" / "tiny-v0"
    data = {} if method in ONLINE else {"dataset_id": str(dataset)}
    steps = {"sac": dict(env_id="Hopper-v5", num_steps=40, learning_starts=8),
             "dqn": dict(env_id="CartPole-v1", num_steps=40, learning_starts=8, epsilon_steps=16, train_freq=2)}
    steps = steps.get(method, dict(num_updates=40))
    shape = dict(batch_size=16, hidden_dim=16, eval_every=20, eval_episodes=2, eval_workers=0, device="cpu", out_dir=str(out))
    return import_module(method).Args(**{**data, **steps, **shape, **flags})


def checkpoint(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def flat(state, prefix=""):
    """Nested dicts and lists to {path: leaf}."""
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, (list, tuple)):
        items = enumerate(state)
    else:
        return {prefix: state}
    return {path: leaf for key, value in items for path, leaf in flat(value, f"{prefix}/{key}").items()}


def same(a, b):
    """Whether two nested states are equal to the bit."""
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(
        torch.equal(x, b[k]) if isinstance(x, torch.Tensor) else x == b[k] for k, x in a.items())
