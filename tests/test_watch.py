"""watch.py writes a GIF of each seed whose return is the environment's, or says in a sentence why not."""
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import record, small
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("watch", ROOT / "benchmark_results" / "watch.py")
watch = importlib.util.module_from_spec(spec)
spec.loader.exec_module(watch)


@pytest.fixture(scope="module")
def folder(hopper, tmp_path_factory):
    import dqn_offline

    return dqn_offline.main(small("dqn_offline", hopper, tmp_path_factory.mktemp("watch"), num_seeds=2, num_updates=4))


def test_a_gif_of_each_seed_with_the_return_of_the_episode(folder, capsys):
    watch.main([str(folder), "--every", "2", "--width", "120", "--seed", "5"])
    said = capsys.readouterr().out.splitlines()
    policy, env = torch.export.load(folder / "policy.pt2").module(), gym.make("CartPole-v1")
    for k, line in enumerate(said):
        obs, total, over = env.reset(seed=5)[0], 0, False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(policy(torch.tensor(obs).unsqueeze(0))[k, 0].item())
            total, over = total + reward, terminated or truncated
        image = Image.open(folder / f"watch-{k}.gif")
        assert f"return {total:.1f}" in line and image.size == (120, 98) and abs(image.n_frames - total / 2) <= 1
    assert len(said) == 2


class Exported:
    """A Decision Transformer's policy.pt2 as dt.evaluate wants it, which asks with one episode for each agent."""

    def __init__(self, folder, context):
        self.made, self.policy = (folder, context), SimpleNamespace(context=context)
        self.call = torch.export.load(folder / "policy.pt2").module()
        self.target, self.shift, self.parameters = self.call.target, self.call.shift, self.call.parameters

    def __reduce__(self):
        return Exported, self.made

    def __call__(self, *steps):  # (S, 1, T, .)
        return torch.stack([self.call(*(x[k] for x in steps))[k] for k in range(2)])


def test_a_decision_transformer_sees_its_last_steps_and_what_is_still_to_come(tmp_path, capsys):
    import dt

    data = record(tmp_path / "pendulum", "Pendulum-v1", 450)
    folder = dt.main(small("dt", data, tmp_path, num_seeds=2, num_updates=20, batch_size=8, context=4, num_layers=1))
    watch.main([str(folder), "--every", "50", "--width", "60", "--seed", "3"])
    spec = pickle.dumps(gym.spec("Pendulum-v1"))
    policy, episodes = pickle.dumps(Exported(folder, 4)), np.full((2, 1), 3)
    rows = dt.evaluate(policy, spec, episodes, 0.99, (0, 1))
    for line, row in zip(capsys.readouterr().out.splitlines()[-2:], rows):
        assert float(line.split("return ")[1].split(",")[0]) == pytest.approx(row[0], abs=0.1)
    assert rows[0][0] != rows[1][0]


@pytest.mark.parametrize("words, part", [(["--seeds", "7"], "--seeds 7"), (["--steps", "0"], "--steps")])
def test_wrong_flags(words, part, folder, capsys):
    with pytest.raises(SystemExit) as stop:
        watch.main([str(folder), *words])
    assert stop.value.code == 2 and part in capsys.readouterr().err


def test_what_cannot_be_watched_is_told(folder, tmp_path, capsys, monkeypatch):
    for name, change, part in (("none", None, "no directory of a finished run"),
                               ("table", {"method": "bcq_tabular"}, "cannot be watched"),
                               ("render", {}, "nothing renders CartPole-v1 here")):
        place = tmp_path / name
        place.mkdir()
        if change is not None:
            for file in "args.json", "run.json", "policy.pt2":
                (place / file).write_bytes((folder / file).read_bytes())
            about = json.loads((place / "run.json").read_text())
            (place / "run.json").write_text(json.dumps({**about, **change}))
        if name == "table":
            import bcq_tabular
            (place / "args.json").write_text(json.dumps(vars(bcq_tabular.Args())))
        if name == "render":
            make = gym.make
            monkeypatch.setattr(gym, "make", lambda *args, render_mode=None, **kwargs: (
                1 / 0 if render_mode else make(*args, **kwargs)))
        with pytest.raises(SystemExit) as stop:
            watch.main([str(place)])
        message = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and part in message and "\n" not in message, message


def test_a_renderer_that_is_not_installed_is_told(hopper, tmp_path):
    """In a process of its own, which has not imported MuJoCo: there PyOpenGL finds no library of this name."""
    import bc

    folder = bc.main(small("bc", hopper, tmp_path, num_updates=2, eval_episodes=0))
    hide = "import ctypes.util, sys; ctypes.util.find_library = lambda name: None; sys.argv[1:] = sys.argv[2:]; "
    path = ROOT / "benchmark_results" / "watch.py"
    code = hide + f"import runpy; runpy.run_path({str(path)!r}, run_name='__main__')"
    ends = subprocess.run([sys.executable, "-c", code, "--", str(folder)], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "MUJOCO_GL": "osmesa"})
    assert ends.returncode == 2 and "Traceback" not in ends.stderr, ends.stderr
    assert ends.stderr.startswith("watch.py: nothing renders Hopper-v5 here") and "install EGL or OSMesa" in ends.stderr
