"""A problem with a known answer: one step, reward -|a - best(s)|^2 with best(s) = (0.5, -0.4) whatever s is. The data's
actions are uniform, so their mean, which BC has to find, is 0."""
from importlib import import_module

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import made, small

BEST = np.array([0.5, -0.4], np.float32)


class Point(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), -float(np.square(action - BEST).sum()), True, False, {}


gym.register("Point-v0", Point, max_episode_steps=1)


@pytest.fixture(scope="module")
def uniform(tmp_path_factory):
    rng, n = np.random.default_rng(0), 1000
    action, obs = rng.uniform(-1, 1, (2, n, 2)).astype(np.float32)
    return made(tmp_path_factory.mktemp("point") / "uniform-v0", [1] * n, ["terminal"] * n, observations=obs,
                next_observations=None, actions=action, rewards=-np.square(action - BEST).sum(1))


def learned(method, data, tmp_path, updates, **flags):
    """Mean action of each of two agents over random observations, (2, 2)."""
    steps = {"env_id": "Point-v0", "num_steps": updates} if method == "sac" else {"num_updates": updates}
    args = small(method, data, tmp_path, num_seeds=2, hidden_dim=32, batch_size=128, eval_episodes=0, eval_every=10**6,
                 **steps, **flags)
    policy = torch.export.load(import_module(method).main(args) / "policy.pt2").module()
    return policy(torch.rand(500, 2) * 2 - 1).mean(1).numpy()


def test_bc_finds_the_mean_of_the_data(uniform, tmp_path):
    assert np.abs(learned("bc", uniform, tmp_path, 600, learning_rate=1e-3)).max() < 0.1


@pytest.mark.parametrize("method, updates, flags", [
    ("td3_bc", 1500, {"learning_rate": 1e-3}),
    ("iql", 1000, {"learning_rate": 1e-3}),
    ("sac", 1500, {"actor_lr": 1e-3, "learning_starts": 300}),
])
def test_reinforcement_learning_finds_the_best_action(method, updates, flags, uniform, tmp_path):
    np.testing.assert_allclose(learned(method, uniform, tmp_path, updates, **flags), np.stack([BEST, BEST]), atol=0.12)
