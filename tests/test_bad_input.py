"""Bad input ends with one plain sentence on standard error and a status that is not 0, and leaves nothing behind."""
import json
import math
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import bc
import from_d4rl
import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import td3_bc
import torch
from conftest import arrays, checkpoint, made, record, resume, same, small

ROOT = Path(__file__).resolve().parents[1]


def sentence(stopped, *words):
    """What a SystemExit says on standard error, in which the words stand."""
    message = stopped.value.code
    assert isinstance(message, str) and "\n" not in message and "Traceback" not in message
    for word in words:
        assert str(word) in message
    return message


def refused(tmp_path, *words, method="bc", dataset=None, **flags):
    """Runs `method` on bad input and checks how it ends; the words are parts of the message."""
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        import_module(method).main(small(method, dataset, out, **flags))
    assert sentence(stopped, *words).startswith(f"{method}: ") and not out.exists()


def offline(monkeypatch):
    def download(name, *args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(minari, "load_dataset", download)


def test_a_command_says_it_on_standard_error(tmp_path):
    command = [sys.executable, ROOT / "algorithms" / "bc.py", "--dataset-id", "nope", "--out-dir", tmp_path / "out"]
    ends = subprocess.run(command, capture_output=True, text=True)
    assert ends.returncode == 1 and ends.stdout == "" and not (tmp_path / "out").exists()
    assert ends.stderr.startswith("bc: --dataset-id nope ") and len(ends.stderr.splitlines()) == 1


def test_unknown_id_says_what_it_takes(tmp_path, monkeypatch):
    offline(monkeypatch)
    refused(tmp_path, "hopper/nothing-v0", "no network", "hub", "datasets/", "directory",
            dataset="hopper/nothing-v0")


def test_the_default_of_a_file_that_was_copied_alone(tmp_path, monkeypatch):
    offline(monkeypatch)
    monkeypatch.setattr(bc, "__file__", str(tmp_path / "bc.py"))
    monkeypatch.chdir(tmp_path)
    refused(tmp_path, "no network", "directory", dataset=bc.Args.dataset_id)


@pytest.mark.parametrize("name", ["hopper/medium", "x", "a/b/c", "/no/such/folder"])
def test_id_without_version(name, tmp_path):
    refused(tmp_path, "version", dataset=name)


def test_directory_that_is_no_dataset(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path, tmp_path / "empty", "no directory", dataset=tmp_path / "empty")
    (tmp_path / "empty" / "data").mkdir()
    refused(tmp_path, tmp_path / "empty", dataset=tmp_path / "empty")


@pytest.mark.parametrize("damage", ["truncated", "garbage", "metadata"])
def test_damaged_minari_set(damage, tmp_path, hopper):
    root = shutil.copytree(hopper, tmp_path / "set")
    path = root / "data" / ("metadata.json" if damage == "metadata" else "main_data.hdf5")
    content = path.read_bytes()
    path.write_bytes(b"garbage" if damage == "garbage" else content[: len(content) // 2])
    refused(tmp_path, root, dataset=root)


def test_empty_dataset(tmp_path, hopper):
    root = shutil.copytree(hopper, tmp_path / "set")
    with h5py.File(root / "data" / "main_data.hdf5", "w"):
        (root / "data" / "metadata.json").write_text(json.dumps(
            {**json.loads((root / "data" / "metadata.json").read_text()), "total_episodes": 0, "total_steps": 0}))
    refused(tmp_path, root, "0 transitions", dataset=root)


def change(hopper, tmp_path, episode, key, edit):
    root = shutil.copytree(hopper, tmp_path / "set")
    with h5py.File(root / "data" / "main_data.hdf5", "a") as file:
        group = file[f"episode_{episode}"]
        value = edit(group[key][()])
        del group[key]
        group[key] = value
    return root


def test_as_many_observations_as_actions(tmp_path, hopper):
    root = change(hopper, tmp_path, 2, "observations", lambda x: x[:-1])
    refused(tmp_path, "one observation more", dataset=root)


@pytest.mark.parametrize("key", ["observations", "actions", "rewards"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_or_inf(key, value, tmp_path, hopper):
    def edit(x):
        x = x.copy()
        x[-1] = value
        return x

    refused(tmp_path, "NaN or inf", dataset=change(hopper, tmp_path, 3, key, edit))


def test_rewards_that_are_no_numbers(tmp_path, hopper):
    refused(tmp_path, dataset=change(hopper, tmp_path, 1, "rewards", lambda x: np.stack([x, x], 1)))


def test_discrete_actions(tmp_path):
    refused(tmp_path, "cannot choose actions in Discrete", dataset=record(tmp_path, "CartPole-v1", 60))
    refused(tmp_path, "cannot choose actions in Discrete", method="sac", env_id="CartPole-v1")


def test_continuous_actions_and_actions_outside_of_their_space(tmp_path, hopper):
    data = shutil.copytree(hopper, tmp_path / "continuous")
    refused(tmp_path, "cannot choose actions in Box", method="dqn_offline", dataset=data)
    data = made(tmp_path / "x", [40], ["timeout"], obs_dim=4, actions=np.full(40, 7))
    refused(tmp_path, "leave Discrete(2)", method="dqn_offline", dataset=data, env_id="CartPole-v1")


def test_other_observations_or_actions_than_the_environment(tmp_path):
    data = made(tmp_path / "y", [40], ["timeout"], obs_dim=5, act_dim=3)
    refused(tmp_path, "observations differ", dataset=data, env_id="Hopper-v5")
    data = made(tmp_path / "x", [40], ["timeout"], obs_dim=11, act_dim=2)
    refused(tmp_path, "actions", dataset=data, env_id="Hopper-v5")


def test_iql_cannot_scale_equal_returns_nor_take_an_impossible_expectile(tmp_path):
    data = made(tmp_path / "x", [40], ["timeout"])
    refused(tmp_path, "--return-range 0", method="iql", dataset=data)
    refused(tmp_path, "--expectile", method="iql", dataset=data, expectile=1.5)
    refused(tmp_path, "--dropout", method="iql", dataset=data, dropout=2.0)


def test_online_methods_need_an_environment_with_vectors(tmp_path):
    refused(tmp_path, "--env-id", method="sac", env_id="")
    refused(tmp_path, "(96, 96, 3)", method="sac", env_id="CarRacing-v3")


def test_track_without_wandb(tmp_path, hopper, monkeypatch):
    def init(**_):
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(SystemExit) as stopped:
        bc.main(small("bc", hopper, tmp_path, track=True))
    sentence(stopped, "--track", "no API key")


def test_missing_environment(tmp_path, hopper, monkeypatch):
    refused(tmp_path, "NoSuch", "--env-id", dataset=hopper, env_id="NoSuch-v0")

    def make(*args, **kwargs):
        raise gym.error.DependencyNotInstalled("mujoco is not installed")

    monkeypatch.setattr(gym, "make", make)
    refused(tmp_path, "mujoco is not installed", dataset=hopper)
    folder = bc.main(small("bc", hopper, tmp_path / "fine", eval_episodes=0))  # the bounds are those of the dataset
    assert (folder / "policy.pt2").exists()


@pytest.mark.parametrize("flags", [
    {"num_seeds": 0}, {"num_updates": 0}, {"batch_size": 0}, {"batch_size": -1}, {"hidden_dim": 0}, {"eval_every": 0},
    {"eval_episodes": -1}, {"eval_workers": 0}, {"seed": -1}, {"gamma": 1.5}, {"learning_rate": -1e-3},
    {"learning_rate": math.nan}, {"learning_rate": math.inf}, {"seed": 2**70}], ids=str)
def test_impossible_flags(flags, tmp_path, hopper):
    (name, value), = flags.items()
    refused(tmp_path, f"--{name.replace('_', '-')} cannot be {value}", dataset=hopper, **flags)


@pytest.mark.parametrize("method, flag", [("td3_bc", "alpha"), ("iql", "beta"), ("cql", "cql_alpha"), ("mopo", "penalty"),
                                          ("cql", "cql_target_gap"), ("cql_discrete", "cql_alpha")])
def test_weights_are_not_below_zero_and_not_nan(method, flag, tmp_path, hopper):
    for value in -1.0, math.nan:
        word = f"--{flag.replace('_', '-')} cannot be {value}"
        refused(tmp_path, word, method=method, dataset=hopper, **{flag: value})


def test_a_shift_may_be_below_zero(tmp_path, hopper):
    import iql

    iql.main(small("iql", hopper, tmp_path, reward_shift=-1.0, num_updates=2, eval_episodes=0))


def test_too_large_a_batch(tmp_path, hopper):
    refused(tmp_path, "600 transitions are fewer than --batch-size", dataset=hopper, batch_size=601)


@pytest.mark.parametrize("device", ["tpu", "cuda:99"] + ["cuda"] * (not torch.cuda.is_available()))
def test_a_device_that_is_not_here(device, tmp_path, hopper):
    refused(tmp_path, f"--device {device} is not here", dataset=hopper, device=device)


def test_out_dir_that_cannot_be_written(tmp_path, hopper):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        bc.main(small("bc", hopper, tmp_path / "file" / "out"))
    sentence(stopped, tmp_path / "file", "cannot be written")


@pytest.fixture(scope="module")
def finished(hopper, tmp_path_factory):
    return bc.main(small("bc", hopper, tmp_path_factory.mktemp("finished")))


def test_resume_of_something_else(tmp_path, finished):
    for module, folder, flags, words in (
            (td3_bc, finished, {}, ["is no use", "alpha"]), (bc, tmp_path, {}, [tmp_path]),
            (bc, finished, {"learning_rate": 0.001}, ["learning_rate cannot be given anew"]),
            (bc, finished, {"dataset_id": "other-v0", "batch_size": 256}, ["batch_size, dataset_id cannot"])):
        if module is td3_bc:  # of which bc.py's flags are a part
            saved = json.loads((finished / "args.json").read_text())
            folder = shutil.copytree(finished, tmp_path / "more")
            (folder / "args.json").write_text(json.dumps({**saved, "no_alpha": 1.0}))
        with pytest.raises(SystemExit) as stopped:
            resume(module, folder, **flags)
        sentence(stopped, "--resume", *words)


def test_resume_of_a_checkpoint_that_is_broken_or_of_another_method(tmp_path, finished):
    folder = shutil.copytree(finished, tmp_path / "run")
    content = (folder / "checkpoint.pt").read_bytes()
    for broken in content[: len(content) // 2], b"", b"garbage":
        (folder / "checkpoint.pt").write_bytes(broken)
        with pytest.raises(SystemExit) as stopped:
            resume(bc, folder)
        sentence(stopped, "checkpoint.pt cannot be used")
        assert (folder / "checkpoint.pt").read_bytes() == broken
    (folder / "checkpoint.pt").write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        resume(td3_bc, folder)
    sentence(stopped, "checkpoint.pt cannot be used", "critic")


def test_num_updates_may_grow_on_resume(tmp_path, finished):
    folder = shutil.copytree(finished, tmp_path / "run")
    resume(bc, folder, num_updates=60)
    assert checkpoint(folder)["update"] == 60


FULL = """
import resource, sys
sys.path.insert(0, sys.argv.pop(1))
import td3_bc
save = td3_bc.Run.save
def patched(self):
    if self.update >= 40:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    save(self)
td3_bc.Run.save = patched
if __name__ == "__main__":
    td3_bc.main(td3_bc.parse())
"""


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, hopper, monkeypatch):
    """The file-size limit of the process sinks below the size of a checkpoint after the first one."""
    from conftest import stop_at

    stop_at(td3_bc, 20, monkeypatch)
    with pytest.raises(SystemExit):
        td3_bc.main(small("td3_bc", hopper, tmp_path / "b"))
    monkeypatch.undo()
    (folder,) = (tmp_path / "b").iterdir()
    before = (folder / "checkpoint.pt").read_bytes()
    (tmp_path / "full.py").write_text(FULL)
    command = [sys.executable, tmp_path / "full.py", ROOT / "algorithms", "--resume", folder]
    ends = subprocess.run(command, capture_output=True, text=True)
    last = ends.stderr.splitlines()[-1]
    assert ends.returncode == 1 and f"{folder}/checkpoint.pt cannot be written" in last and "Traceback" not in ends.stderr
    assert (folder / "checkpoint.pt").read_bytes() == before
    resume(td3_bc, folder)
    whole = td3_bc.main(small("td3_bc", hopper, tmp_path / "a"))
    assert same(checkpoint(whole)["agent"], checkpoint(folder)["agent"])


def test_recording_needs_a_threshold_and_an_empty_place(tmp_path):
    refused(tmp_path, "--medium-return", method="sac", env_id="Pendulum-v1", record=str(tmp_path / "sets"))
    (tmp_path / "file").write_text("")
    refused(tmp_path, "--record", method="sac", record=str(tmp_path / "file"))
    (tmp_path / "sets" / "hopper" / "medium-v0").mkdir(parents=True)
    refused(tmp_path, "holds datasets already", method="sac", record=str(tmp_path / "sets"))


# --- datasets/from_d4rl.py ---
def converted(*words):
    with pytest.raises(SystemExit) as stopped:
        from_d4rl.main([str(word) for word in words])
    return stopped


def write_hdf5(path, **changes):
    with h5py.File(path, "w") as file:
        for key, value in arrays([40], ["timeout"], **changes).items():
            file[key] = value
    return path


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "terminals", "timeouts"])
def test_a_file_without_a_needed_key(key, tmp_path):
    sentence(converted(write_hdf5(tmp_path / "x.hdf5", **{key: None}), tmp_path / "x-v0"), "x.hdf5", f"{key} missing")


def test_files_that_cannot_be_converted(tmp_path):
    sentence(converted(tmp_path / "none.hdf5", tmp_path / "x-v0"), "none.hdf5")
    path = write_hdf5(tmp_path / "x.hdf5")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    sentence(converted(path, tmp_path / "x-v0"), "x.hdf5 cannot be used")
    for changes, word in (({"actions": np.full((40, 2), 3.0)}, "--env-id"), ({"rewards": np.zeros(39)}, "[39, 40] rows"),
                          ({"rewards": np.zeros((40, 1))}, "shapes")):
        sentence(converted(write_hdf5(tmp_path / "y.hdf5", **changes), tmp_path / "x-v0"), word)
    sentence(converted(write_hdf5(tmp_path / "y.hdf5"), tmp_path / "x-v0", "--env-id", "Hopper-v5"), "y.hdf5")
    assert [x.name for x in tmp_path.iterdir() if x.is_dir()] == []
    write_hdf5(tmp_path / "y.hdf5")
    from_d4rl.main([str(tmp_path / "y.hdf5"), str(tmp_path / "x-v0")])
    sentence(converted(tmp_path / "y.hdf5", tmp_path / "x-v0"), "is there already")
