"""Bad input ends with one plain sentence on standard error and status 2, and leaves nothing behind."""
import json
import resource
import shutil
import sys
from importlib import import_module
from types import SimpleNamespace

import bc
import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import td3_bc
import torch
from conftest import checkpoint, record, same, small, write_d4rl


def refused(capsys, tmp_path, *words, method="bc", dataset=None, **flags):
    """Runs `method` on bad input and checks how it ends; the words are parts of the message."""
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        import_module(method).main(small(method, dataset, out, **flags))
    message = capsys.readouterr().err.strip()
    assert stopped.value.code == 2
    assert message.startswith(f"{method}: ") and "Traceback" not in message and "\n" not in message
    for word in words:
        assert str(word) in message
    assert not out.exists()


def offline(monkeypatch):
    def download(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(minari, "download_dataset", download)


def test_unknown_id_says_what_ships_where_it_looked_and_how_to_list_the_hub(capsys, tmp_path, monkeypatch):
    offline(monkeypatch)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))
    refused(capsys, tmp_path, "hopper/nothing-v0", "no network", "minari list remote", tmp_path / "root", "ships",
            dataset="hopper/nothing-v0")
    assert not (tmp_path / "root").exists()


def test_the_default_of_a_file_that_was_copied_alone(capsys, tmp_path, monkeypatch):
    offline(monkeypatch)
    monkeypatch.setattr(bc, "__file__", str(tmp_path / "bc.py"))
    monkeypatch.chdir(tmp_path)
    refused(capsys, tmp_path, "nothing ships", "directory or a D4RL .hdf5 file", dataset=bc.Args.dataset_id)


@pytest.mark.parametrize("name", ["hopper/medium", "x", "a/b/c", "/no/such/folder"])
def test_id_without_version(name, capsys, tmp_path, monkeypatch):
    offline(monkeypatch)
    refused(capsys, tmp_path, "version", dataset=name)


def test_directory_that_is_no_dataset(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(capsys, tmp_path, tmp_path / "empty", "data/", dataset=tmp_path / "empty")
    (tmp_path / "empty" / "data").mkdir()
    refused(capsys, tmp_path, tmp_path / "empty", dataset=tmp_path / "empty")


@pytest.mark.parametrize("damage", ["truncated", "garbage", "metadata"])
def test_damaged_minari_set(damage, capsys, tmp_path, hopper):
    root = shutil.copytree(hopper, tmp_path / "set")
    path = root / "data" / ("metadata.json" if damage == "metadata" else "main_data.hdf5")
    content = path.read_bytes()
    path.write_bytes(b"garbage" if damage == "garbage" else content[: len(content) // 2])
    refused(capsys, tmp_path, root, dataset=root)


def test_damaged_or_missing_d4rl_file(capsys, tmp_path):
    path = tmp_path / "x.hdf5"
    refused(capsys, tmp_path, path, dataset=path)
    content = open(write_d4rl(path, [40], ["timeout"]), "rb").read()
    path.write_bytes(content[: len(content) // 2])
    refused(capsys, tmp_path, path, "cannot be read", dataset=path)


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "terminals", "timeouts"])
def test_d4rl_file_without_a_needed_key(key, capsys, tmp_path):
    path = write_d4rl(tmp_path / "x.hdf5", [40], ["timeout"], **{key: None})
    refused(capsys, tmp_path, path, key, dataset=path)


def test_empty_dataset(capsys, tmp_path, hopper):
    path = write_d4rl(tmp_path / "x.hdf5", [0], [""], observations=np.zeros((0, 3)), actions=np.zeros((0, 2)),
                      next_observations=np.zeros((0, 3)), terminals=np.zeros(0, bool), timeouts=np.zeros(0, bool))
    refused(capsys, tmp_path, path, "0 transitions", dataset=path)
    root = shutil.copytree(hopper, tmp_path / "set")
    with h5py.File(root / "data" / "main_data.hdf5", "w"):
        (root / "data" / "metadata.json").write_text(json.dumps(
            {**json.loads((root / "data" / "metadata.json").read_text()), "total_episodes": 0, "total_steps": 0}))
    refused(capsys, tmp_path, root, "0 transitions", dataset=root)


def change(hopper, tmp_path, episode, key, edit):
    root = shutil.copytree(hopper, tmp_path / "set")
    with h5py.File(root / "data" / "main_data.hdf5", "a") as file:
        group = file[f"episode_{episode}"]
        value = edit(group[key][()])
        del group[key]
        group[key] = value
    return root


def test_as_many_observations_as_actions(capsys, tmp_path, hopper):
    root = change(hopper, tmp_path, 2, "observations", lambda x: x[:-1])
    refused(capsys, tmp_path, "episode 2", "one observation more", dataset=root)


@pytest.mark.parametrize("key", ["observations", "actions", "rewards"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_or_inf_names_the_episode(key, value, capsys, tmp_path, hopper):
    def edit(x):
        x = x.copy()
        x[-1] = value
        return x

    refused(capsys, tmp_path, "episode 3", "NaN or inf", dataset=change(hopper, tmp_path, 3, key, edit))


def test_discrete_actions(capsys, tmp_path):
    refused(capsys, tmp_path, "continuous", dataset=record(tmp_path, "CartPole-v1", 60))
    refused(capsys, tmp_path, "continuous", method="sac", env_id="CartPole-v1")
    path = write_d4rl(tmp_path / "x.hdf5", [40], ["timeout"], actions=np.zeros(40, np.int64))
    refused(capsys, tmp_path, "continuous", dataset=path)


def test_other_observations_than_the_environment(capsys, tmp_path, hopper):
    refused(capsys, tmp_path, "11", "17", dataset=hopper, env_id="HalfCheetah-v5")
    path = write_d4rl(tmp_path / "x.hdf5", [40], ["timeout"], obs_dim=11, act_dim=2)
    refused(capsys, tmp_path, "actions", dataset=path, env_id="Hopper-v5")
    path = write_d4rl(tmp_path / "x.hdf5", [40], ["timeout"], actions=np.full((40, 2), 3.0))
    refused(capsys, tmp_path, "--env-id", dataset=path)


def test_rewards_that_are_no_numbers(capsys, tmp_path):
    path = write_d4rl(tmp_path / "x.hdf5", [40], ["timeout"], rewards=np.zeros((40, 1), np.float32))
    refused(capsys, tmp_path, "rewards", dataset=path)


def test_iql_cannot_scale_equal_returns_nor_take_an_impossible_expectile(capsys, tmp_path):
    path = write_d4rl(tmp_path / "x.hdf5", [40], ["timeout"])
    refused(capsys, tmp_path, "--return-range 0", method="iql", dataset=path)
    refused(capsys, tmp_path, "--expectile", method="iql", dataset=path, expectile=1.5)
    refused(capsys, tmp_path, "--dropout", method="iql", dataset=path, dropout=2.0)


def test_sac_needs_an_environment_with_vectors(capsys, tmp_path):
    refused(capsys, tmp_path, "--env-id", method="sac", env_id="")
    refused(capsys, tmp_path, "(96, 96, 3)", method="sac", env_id="CarRacing-v3")


def test_track_without_wandb(capsys, tmp_path, hopper, monkeypatch):
    def init(**_):
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    refused(capsys, tmp_path, "--track", "no API key", dataset=hopper, track=True)


def test_missing_environment(capsys, tmp_path, hopper, monkeypatch):
    refused(capsys, tmp_path, "NoSuch", "--env-id", dataset=hopper, env_id="NoSuch-v0")

    def make(*args, **kwargs):
        raise gym.error.DependencyNotInstalled("mujoco is not installed")

    monkeypatch.setattr(gym, "make", make)
    refused(capsys, tmp_path, "mujoco is not installed", "--eval-episodes 0", dataset=hopper)
    folder = bc.main(small("bc", hopper, tmp_path / "fine", eval_episodes=0))  # the bounds are those of the dataset
    assert (folder / "policy.pt2").exists()


@pytest.mark.parametrize("flags", [
    {"num_seeds": 0}, {"num_updates": 0}, {"batch_size": 0}, {"batch_size": -1}, {"hidden_dim": 0}, {"eval_every": 0},
    {"eval_episodes": -1}, {"eval_workers": -1}, {"seed": -1}, {"gamma": 1.5}, {"learning_rate": 0.0},
    {"learning_rate": float("nan")}, {"seed": 2**70}, {"batch_size": 10**6}, {"device": "tpu"}], ids=str)
def test_impossible_flags(flags, capsys, tmp_path, hopper):
    refused(capsys, tmp_path, f"--{next(iter(flags)).replace('_', '-')}", next(iter(flags.values())), dataset=hopper, **flags)


@pytest.mark.parametrize("method, flag", [("td3_bc", "alpha"), ("iql", "beta"), ("cql", "cql_alpha"), ("mopo", "penalty"),
                                          ("cql", "cql_target_gap"), ("cql_discrete", "cql_alpha")])
def test_weights_are_not_below_zero_and_not_nan(method, flag, capsys, tmp_path, hopper):
    for value in -1.0, float("nan"):
        word = f"--{flag.replace('_', '-')} cannot be {value}"
        refused(capsys, tmp_path, word, method=method, dataset=hopper, **{flag: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda(capsys, tmp_path, hopper):
    refused(capsys, tmp_path, "--device cuda", dataset=hopper, device="cuda")


def test_out_dir_that_cannot_be_written(capsys, tmp_path, hopper):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        bc.main(small("bc", hopper, tmp_path / "file" / "out"))
    assert stopped.value.code == 2 and str(tmp_path / "file") in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(hopper, tmp_path_factory):
    return bc.main(small("bc", hopper, tmp_path_factory.mktemp("finished")))


def resume(capsys, *words, method=bc, folder, **flags):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        method.main(method.Args(resume=str(folder), **flags))
    message = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "\n" not in message
    for word in words:
        assert str(word) in message


def test_resume_of_something_else(capsys, tmp_path, finished):
    resume(capsys, "another method", method=td3_bc, folder=finished)
    resume(capsys, tmp_path, folder=tmp_path)
    resume(capsys, "--learning-rate", "0.001", "0.0003", folder=finished, learning_rate=0.001)
    resume(capsys, "--dataset-id", folder=finished, dataset_id="other-v0")


def test_a_flag_that_is_typed_counts_even_if_it_is_the_default(capsys, tmp_path, finished, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["bc.py", "--resume", str(folder), "--batch-size", "256"])
    resume(capsys, "--batch-size 256", "16", folder=folder, batch_size=256)


def test_resume_of_a_broken_checkpoint(capsys, tmp_path, finished):
    folder = shutil.copytree(finished, tmp_path / "run")
    content = (folder / "checkpoint.pt").read_bytes()
    for broken in content[: len(content) // 2], b"", b"garbage":
        (folder / "checkpoint.pt").write_bytes(broken)
        resume(capsys, "checkpoint.pt", folder=folder)
        assert (folder / "checkpoint.pt").read_bytes() == broken


def test_num_updates_may_grow_on_resume_unless_a_schedule_needs_it(capsys, tmp_path, hopper, finished):
    import iql

    folder = shutil.copytree(finished, tmp_path / "run")
    bc.main(bc.Args(resume=str(folder), num_updates=60))
    assert checkpoint(folder)["update"] == 60
    resume(capsys, "--num-updates", method=iql, folder=iql.main(small("iql", hopper, tmp_path)), num_updates=60)


def test_a_write_that_fails_half_way_leaves_the_last_good_checkpoint(capsys, tmp_path, hopper, monkeypatch):
    """The file-size limit of the process sinks below the size of a checkpoint after the first one."""
    before, save, states = resource.getrlimit(resource.RLIMIT_FSIZE), td3_bc.Run.save, []

    def patched(self):
        if self.update == 40:
            states.append((self.dir / "checkpoint.pt").read_bytes())
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(states[0]) // 2, before[1]))
        save(self)

    monkeypatch.setattr(td3_bc.Run, "save", patched)
    try:
        with pytest.raises(SystemExit) as stopped:
            td3_bc.main(small("td3_bc", hopper, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (folder,) = tmp_path.iterdir()
    assert stopped.value.code == 2 and "checkpoint.pt cannot be written" in capsys.readouterr().err
    assert (folder / "checkpoint.pt").read_bytes() == states[0] and not list(folder.glob("*.part"))
    monkeypatch.undo()
    td3_bc.main(td3_bc.Args(resume=str(folder)))
    whole = td3_bc.main(small("td3_bc", hopper, tmp_path / "whole"))
    assert same(checkpoint(whole)["modules"], checkpoint(folder)["modules"])


def test_recording_needs_a_threshold_and_an_empty_place(capsys, tmp_path, hopper):
    refused(capsys, tmp_path, "--medium-return", method="sac", env_id="Pendulum-v1", record=str(tmp_path / "sets"))
    (tmp_path / "file").write_text("")
    refused(capsys, tmp_path, "--record", method="sac", record=str(tmp_path / "file"))
    (tmp_path / "sets" / "hopper" / "medium-v0").mkdir(parents=True)
    refused(capsys, tmp_path, "holds datasets already", method="sac", record=str(tmp_path / "sets"))
