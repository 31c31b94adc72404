"""The lessons of lessons_evaluation.py: their claims on their numbers."""
import sys

import numpy as np
import pytest
from test_lessons import ROOT, lessons

import lessons_evaluation as evaluation


@pytest.mark.parametrize("name", ["bear_gridworld", "importance"])
def test_it_has_no_commands(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lessons.py", "--list", name])
    lessons.main()
    assert capsys.readouterr().out == f"{name}: computed in lessons_evaluation.py\n"


def test_the_support_reaches_g_and_no_weight_of_the_penalty_does():
    found = evaluation.bear_gridworld_numbers()
    most = [found.reach[n].max() for n in evaluation.SIZES]
    assert most[0] < 0.06 and most[1] < 1e-4 and most[2] < 1e-9  # ever less in larger worlds
    for n in evaluation.SIZES:
        assert np.isclose(found.support[n], 1)
        assert 1 < found.reach[n][0] / (8 / (9 ** (n + 1) - 1)) < 1.8  # tight: nearly the chance of the data
        assert found.reach[n][-1] < 1e-99
    assert found.right[-1] > 0.999 and found.right[0] < 1e-4  # no error of Q: the generous one does
    generous, tight = (found.pi[evaluation.DRAWN[name]] for name in ("generous", "tight"))
    assert generous[5, 0] > 0.99 and (generous[1:5, 1] > 0.5).all()
    assert np.allclose(tight[1:10], found.mu[1:10], atol=0.03)
    assert (found.supported[5:10, 1] == 1).all() and (found.supported[1:5, 0] == 1).all()


def test_importance_sampling_spreads_with_the_distance_and_the_horizon():
    found = evaluation.importance_numbers()
    for rows in found.distance, found.horizon:
        for name in "is", "pdis":
            assert (np.diff([row["error"][name] for row in rows]) > 0).all()
        for size in "whole", "step":
            assert (np.diff([row[size] for row in rows]) < 0).all() and rows[-1]["whole"] < 4 < 70 < rows[0]["whole"]
        assert rows[-1]["error"]["is"] > rows[-1]["error"]["pdis"] > 1 > rows[-1]["error"]["wis"]
        for row in rows:
            assert row["error"]["pdis"] <= row["error"]["is"] + 1e-12 and row["error"]["wpdis"] < row["error"]["pdis"]
            assert row["whole"] <= row["step"] + 1e-9
            if row["error"]["is"] < 0.25:  # where 200 sets are enough
                assert np.isclose(row["sampled"]["is"], row["error"]["is"], rtol=0.2)
                assert np.isclose(row["sampled"]["pdis"], row["error"]["pdis"], rtol=0.2)
    assert found.distance[-1]["sampled"]["is"] < 2 < 1000 < found.distance[-1]["error"]["is"]


def test_exact_moments_equal_the_sum_over_all_episodes():
    """Of five steps of two actions, which leave nothing to chance."""
    right, T = 0.7, 5
    truth, deviation = evaluation.exactly(right, T)
    mean, second = {"is": 0, "pdis": 0}, {"is": 0, "pdis": 0}
    for bits in np.ndindex(*[2] * T):
        s, p, rho, G, weighed = 3, 1.0, 1.0, 0.0, 0.0
        for a in bits:
            p *= right if a else 1 - right
            rho *= evaluation.GOOD / right if a else (1 - evaluation.GOOD) / (1 - right)
            s = min(max(s + 2 * a - 1, 0), 6)
            G, weighed = G + s / 6, weighed + rho * s / 6
        for name, x in ("is", rho * G), ("pdis", weighed):
            mean[name] += p * x
            second[name] += p * x**2
    for name in "is", "pdis":
        assert np.isclose(mean[name], truth)
        assert np.isclose(deviation[name], ((second[name] - truth**2) / evaluation.EPISODES) ** 0.5)
