"""The worlds of the lessons of cloning are what their pictures say."""
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmark_results"))
import lessons_cloning as lessons


def test_demonstrations_pass_on_either_side_and_miss_the_obstacle():
    episodes = lessons.fork_demonstrations()
    x = [np.array([x for x, _ in episode]) for episode in episodes]
    left = np.mean([path[np.abs(path[:, 0]).argmin(), 1] > 0 for path in x])
    assert 0.45 < left < 0.55
    for path in x:
        along = np.linspace(0, len(path) - 1, 50 * len(path))
        assert np.hypot(*(np.interp(along, range(len(path)), z) for z in path.T)).min() > lessons.FORK_RADIUS


def test_the_expert_stops_at_red_and_only_there():
    for seen, actions in lessons.line_demonstrations(200, 3):
        (x, light, past), a = seen.T, actions[:, 0]
        assert past[0] == 1 and np.array_equal(past[1:], a[:-1]) and x[-1] < 0.5 <= x[-1] + 0.1
        np.testing.assert_allclose(x[1:], x[:-1] + 0.05 * (a[:-1] + 1))
        assert ((a < -0.8) | (a > 0.8)).all() and (light[a < -0.8] == -1).all()
        over = np.flatnonzero((x[:-1] <= 0) & (x[1:] > 0))
        assert len(over) == 1 and light[over[0]] == 1
        assert over[0] + 1 - max((light < 0).sum(), np.ceil(-x[0] / lessons.LINE_SPEED)) <= 8  # far from late


def test_a_drive_that_ignores_the_light_is_seen_to_run_it():
    seen, _, red = lessons.line_drives(lambda seen: np.ones(seen.shape[:-1]), np.full((2, 3), -2.0), np.array([0, 10, 59]))
    assert red.tolist() == [[False, False, True]] * 2  # it is there after 20 steps
    seen, _, red = lessons.line_drives(lambda seen: seen[..., 1], np.full((2, 3), -0.05), np.array([0, 10, 59]))
    assert not red.any() and (seen[-1, ..., 0] > 0).all()
