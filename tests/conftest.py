import concurrent.futures
import functools
import os
import signal
import unittest.mock
from importlib import import_module
from pathlib import Path

import from_d4rl
import gymnasium as gym
import numpy as np
import pytest
import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
ALL = sorted(path.stem for path in (Path(__file__).resolve().parents[1] / "algorithms").glob("*.py"))
OFFLINE = ["bc", "td3_bc", "iql", "sac_offline", "cql", "bc_diffusion", "ddpg_offline", "bcq", "bear", "brac", "fisher_brc",
           "algaedice", "bc_gaussian", "bc_gmm", "bc_vae", "filtered_bc", "awac"]  # on transitions with continuous actions
DISCRETE = ["dqn_offline", "bcq_discrete", "cql_discrete"]
ONLINE = ["sac", "dqn", "ddpg", "td3"]
OFFLINE, DISCRETE, ONLINE = ([name for name in names if name in ALL] for names in (OFFLINE, DISCRETE, ONLINE))
METHODS = [*OFFLINE, *DISCRETE, *ONLINE]  # the others are so different that they have tests of their own


class InLine:
    """An executor that works in this process, at once."""

    def __init__(self, *_):
        pass

    def submit(self, function, *args):
        future = concurrent.futures.Future()
        with torch.random.fork_rng():
            future.set_result(function(*args))
        return future


real, concurrent.futures.ProcessPoolExecutor = concurrent.futures.ProcessPoolExecutor, InLine
for name in ALL:
    import_module(name)  # what a test imports evaluates in line; commands have worker processes
concurrent.futures.ProcessPoolExecutor = real


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "stopped" not in item.name)  # they take longest, and begin first
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


def arrays(lengths, ends, obs_dim=3, act_dim=2, next_observations=True, **changes):
    """D4RL's arrays of episodes that have these lengths and end in "terminal", "timeout" or neither (""). An observation
    holds (episode, step, 0.1), an action (step / 100, ...), a reward the global row number."""
    rows = [(e, t) for e, n in enumerate(lengths) for t in range(n)]
    obs = np.array([[e, t, *[0.1] * (obs_dim - 2)] for e, t in rows], np.float32)
    last = np.array([t == lengths[e] - 1 for e, t in rows], bool)
    kind = np.array([ends[e] for e, _ in rows], dtype=str)
    found = {
        "observations": obs, "actions": np.array([[t / 100] * act_dim for _, t in rows], np.float32),
        "rewards": np.arange(len(rows), dtype=np.float32),
        "terminals": last & (kind == "terminal"), "timeouts": last & (kind == "timeout")}
    if next_observations is True:
        next_observations = found["observations"] + np.eye(obs_dim, dtype=np.float32)[1]
    found.update({"next_observations": next_observations if next_observations is not False else None, **changes})
    return {key: value for key, value in found.items() if value is not None}


def made(folder, *args, env_id="", **changes):
    """The directory of a Minari set of `arrays`."""
    with unittest.mock.patch("from_d4rl.pack"):  # takes seconds
        return str(from_d4rl.write(arrays(*args, **changes), folder, env_id))


def small(method, dataset, out, **flags):
    """Args of a run that takes a second or two."""
    if method in DISCRETE and Path(dataset).parent.name == "hopper":
        dataset = Path(dataset).parents[1] / "cartpole" / "tiny-v0"
    data = {} if method in ONLINE else {"dataset_id": str(dataset)}
    steps = {"sac": dict(env_id="Hopper-v5", num_steps=40, learning_starts=8),
             "ddpg": dict(env_id="Hopper-v5", num_steps=40, learning_starts=8),
             "td3": dict(env_id="Hopper-v5", num_steps=40, learning_starts=8),
             "dqn": dict(env_id="CartPole-v1", num_steps=40, learning_starts=8, epsilon_steps=16, train_freq=2),
             "bcq": dict(num_updates=40, vae_dim=16, num_draws_acting=10),
             "bear": dict(num_updates=40, vae_dim=16, num_draws_acting=10)}
    steps = steps.get(method, dict(num_updates=40))
    shape = dict(batch_size=16, hidden_dim=16, eval_every=20, eval_episodes=2, device="cpu", out_dir=str(out))
    return import_module(method).Args(**{**data, **steps, **shape, **flags})


@pytest.fixture(scope="session")
def whole(hopper, tmp_path_factory):
    """method -> the directory of a run of two agents, which is made once."""
    return functools.cache(lambda method: import_module(method).main(
        small(method, hopper, tmp_path_factory.mktemp("whole"), num_seeds=2)))


def checkpoint(run):
    """Its agent {name: tensor}, moments, rng, counters [update, seconds, losses, evals]; and update."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    return {**state, "update": state["counters"][0]}


def resume(module, folder, **flags):
    """Goes on with a run as the command would."""
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return module.main(module.parse(["--resume", str(folder), *words]))


def stop_at(module, update, monkeypatch, number=signal.SIGTERM):
    """Lets a signal arrive in the call that leads to an update."""
    train = module.train

    def patched(run, step):
        def stopped():
            if run.update + run.agent.updates_per_call >= update:
                os.kill(os.getpid(), number)
            return step()
        return train(run, stopped)

    monkeypatch.setattr(module, "train", patched)


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
