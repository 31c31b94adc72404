"""What the loader reads, from which kinds of source, and how steps stay aligned in every episode."""
import json
import shutil
import time
from types import SimpleNamespace

import from_d4rl
import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import td3_bc
import torch
from conftest import arrays, made, record


def load(dataset, **flags):
    return td3_bc.load(td3_bc.Args(dataset_id=str(dataset), device="cpu", batch_size=2, **{"eval_episodes": 0, **flags}))


def test_every_step_of_every_episode_is_aligned(hopper):
    data, i = load(hopper), 0
    episodes = list(minari.MinariDataset(hopper / "data").iterate_episodes())
    assert len(episodes) >= 3
    for n, episode in enumerate(episodes):
        rows = slice(i, i + len(episode.actions))
        i = rows.stop
        for tensor, expected in ((data.obs, episode.observations[:-1]), (data.next_obs, episode.observations[1:]),
                                 (data.action, episode.actions), (data.reward, episode.rewards),
                                 (data.terminated, episode.terminations)):
            assert tensor.dtype == torch.float32
            np.testing.assert_array_equal(tensor[rows], expected.astype(np.float32))
        assert (data.episode[rows] == n).all()
    assert i == len(data.obs)


def test_truncated_step_is_kept_and_not_terminated(hopper):
    data = load(hopper)
    last = list(minari.MinariDataset(hopper / "data").iterate_episodes())[-1]
    assert last.truncations[-1] and not last.terminations[-1]
    assert data.terminated[-1] == 0 and data.terminated.sum() > 3
    np.testing.assert_array_equal(data.next_obs[-1], last.observations[-1].astype(np.float32))


def write(path, **changes):
    """The arrays of three episodes as an HDF5 or .npz file."""
    found = arrays([4, 3, 5], ["terminal", "timeout", ""], **changes)
    if path.suffix == ".npz":
        np.savez(path, **found)
    else:
        with h5py.File(path, "w") as file:
            for key, value in found.items():
                file[key] = value
    return str(path)


@pytest.mark.parametrize("kind", ["hdf5", "npz"])
def test_a_file_with_next_observations_keeps_every_step(kind, tmp_path, capsys):
    from_d4rl.main([write(tmp_path / f"x.{kind}"), str(tmp_path / "x-v0")])
    assert f"--dataset-id {tmp_path / 'x-v0'}" in capsys.readouterr().out
    data = load(tmp_path / "x-v0")
    assert data.episode.tolist() == [0] * 4 + [1] * 3 + [2] * 5
    assert data.terminated.tolist() == [0, 0, 0, 1] + [0] * 8
    assert data.reward.tolist() == list(range(12))
    torch.testing.assert_close(data.action[:, 0] * 100, data.obs[:, 1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(data.next_obs, data.obs + torch.tensor([0.0, 1.0, 0.0]))
    with h5py.File(tmp_path / "x-v0" / "data" / "main_data.hdf5") as file:
        assert file["episode_0/observations"].dtype == np.float32 and file["episode_0/observations"].shuffle
        assert [bool(file[f"episode_{i}/truncations"][-1]) for i in range(3)] == [False, True, True]


def test_without_next_observations_only_an_unterminated_episode_loses_its_last_step(tmp_path):
    data = load(made(tmp_path / "x", [4, 3, 5], ["terminal", "timeout", ""], next_observations=False))
    assert data.episode.tolist() == [0] * 4 + [1] * 2 + [2] * 4
    alive = data.terminated == 0
    torch.testing.assert_close(data.next_obs[alive], (data.obs + torch.tensor([0.0, 1.0, 0.0]))[alive])
    assert data.reward.tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]


def test_a_converted_set_has_the_bounds_and_references_of_its_environment(tmp_path):
    data = load(made(tmp_path / "x", [30], ["timeout"], obs_dim=11, act_dim=3, env_id="Hopper-v5"), eval_episodes=1)
    assert data.spec.id == "Hopper-v5" and data.reference == (-20.272305, 3234.3)
    action = np.full((30, 1), 1.5, np.float32)
    data = load(made(tmp_path / "y", [30], ["timeout"], actions=action, env_id="Pendulum-v1"))
    assert data.spec is None and (data.action == 0.75).all()


def test_places_are_searched_in_order(tmp_path, monkeypatch, hopper):
    """A path, then a shipped set, then Minari, which knows the local root and the hub (here a stand-in)."""
    monkeypatch.setattr(td3_bc, "__file__", str(tmp_path / "clone" / "algorithms" / "td3_bc.py"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "local"))
    monkeypatch.chdir(tmp_path)
    asked, opened, read = [], [], minari.MinariDataset

    def download(name, *args, **kwargs):
        asked.append(name)
        shutil.copytree(hopper, tmp_path / "local" / name)

    monkeypatch.setattr(minari.storage.hosting, "download_dataset", download)
    load("some/set-v0")
    load("some/set-v0")
    assert asked == ["some/set-v0"]
    monkeypatch.setattr(minari, "MinariDataset", lambda path: opened.append(path) or read(path))
    for place in ("clone/datasets", "."):
        shutil.copytree(hopper, tmp_path / place / "some/set-v0", dirs_exist_ok=True)
        load("some/set-v0")
    assert asked == ["some/set-v0"]
    assert [path.resolve().relative_to(tmp_path).parts[0] for path in opened] == ["clone", "some"]


def test_mixture_and_a_path_with_a_plus(tmp_path, hopper, monkeypatch):
    one = load(hopper)
    both = load(f"{hopper}+{hopper}")
    assert len(both.obs) == 2 * len(one.obs) and both.episode.max() == 2 * one.episode.max() + 1
    shutil.copytree(hopper, tmp_path / "a+b")
    assert len(load(tmp_path / "a+b").obs) == len(one.obs)


def test_actions_are_mapped_by_the_bounds_of_the_environment(tmp_path):
    root = record(tmp_path, "Pendulum-v1", 250)  # bounds -2 and 2
    data, raw = load(root, eval_episodes=1), np.concatenate([e.actions for e in minari.MinariDataset(root / "data")])
    np.testing.assert_allclose(data.action, raw / 2, atol=1e-6)
    policy = td3_bc.RawPolicy(torch.nn.Linear(3, 1, bias=False), 1, data)
    policy.policy.weight.data.fill_(0.5)
    assert policy(torch.tensor([[1.0, 0, 0], [0, -2, 0]])).tolist() == [[[1.0], [-2.0]]]


def test_dict_observations_are_flattened_alike_in_data_and_environment():
    episode = {"b": np.array([[1, 2], [3, 4]]), "a": np.array([[5], [6]])}
    np.testing.assert_array_equal(td3_bc.flat(episode), [[5, 1, 2], [6, 3, 4]])
    np.testing.assert_array_equal(td3_bc.flat({"goal": {"z": [0], "y": [9]}, "b": [1, 2]}), [1, 2, 9, 0])


def test_reference_is_d4rls_for_hopper_else_the_datasets_own(tmp_path, hopper):
    assert load(hopper, eval_episodes=1).reference == (-20.272305, 3234.3)
    root = record(tmp_path, "Pendulum-v1", 250)
    assert np.isnan(load(root, eval_episodes=1).reference).all()
    path = root / "data" / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ref_min_score": -1500.0, "ref_max_score": -150.0}))
    assert load(root, eval_episodes=1).reference == (-1500.0, -150.0)


def test_td3_bc_normalises_and_iql_scales_by_true_episodes(tmp_path):
    import iql

    path = made(tmp_path / "x", [4, 3, 5], ["terminal", "timeout", ""])
    data = load(path)
    td3_bc.prepare(data, td3_bc.Args())
    assert data.obs[:, :2].mean(0).abs().max() < 1e-6 and (data.obs[:, :2].std(0, correction=0) - 1).abs().max() < 2e-3
    torch.testing.assert_close(data.next_obs, data.obs + torch.tensor([0.0, 1.0, 0.0]) / data.std)
    data = load(path)
    iql.prepare(data, iql.Args(device="cpu"))  # returns of the episodes: 6, 15 and 45
    np.testing.assert_allclose(data.reward, np.arange(12) * 1000 / (45 - 6), rtol=1e-5)
    data = load(path)
    iql.prepare(data, iql.Args(device="cpu", return_range=0, reward_shift=-1))
    np.testing.assert_allclose(data.reward, np.arange(12) - 1)


def test_a_million_transitions_load_in_seconds(tmp_path):
    """In episodes of 1,000 steps, a quarter of it here; written uncompressed, as Minari does."""
    n, T = 250, 1000
    path = made(tmp_path / "x", [T] * n, ["timeout"] * n, obs_dim=11, act_dim=3, actions=np.zeros((n * T, 3), np.float32))
    start = time.process_time()  # not the clock on the wall: a test may share its cores
    assert len(load(path).obs) == n * T
    assert time.process_time() - start < 3 / 4


def test_sample_draws_whole_rows_for_each_seed(tmp_path):
    data = load(made(tmp_path / "x", [40], ["terminal"]))
    torch.manual_seed(0)
    s, a, r, s_next, d = td3_bc.sample(data, SimpleNamespace(num_seeds=3, batch_size=50, device="cpu"))
    assert s.shape == (3, 50, 3) and a.shape == (3, 50, 2) and r.shape == d.shape == (3, 50)
    torch.testing.assert_close(s[..., 1], r)
    torch.testing.assert_close(s_next[..., 1], r + 1)
    torch.testing.assert_close(a[..., 0] * 100, r)
    assert not torch.equal(r[0], r[1])
