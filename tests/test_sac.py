"""The datasets that sac.py records: they replay, they end where they should, and the loader reads them."""
import minari
import numpy as np
import pytest
import sac
import td3_bc
import torch
from conftest import checkpoint, resume, same, small, stop_at


def run(tmp_path, name, **flags):
    sets = tmp_path / f"{name}_sets"
    flags = {"num_steps": 400, "eval_every": 100, "eval_episodes": 2, "record": str(sets), "record_steps": 150,
             "medium_return": 1.0, "num_seeds": 2, **flags}
    return sac.main(small("sac", None, tmp_path / name, **flags)), sets / "hopper"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return run(tmp_path_factory.mktemp("sac"), "run")


def replay_of(folder):
    return checkpoint(folder)["agent"]["data._extra_state"]


def episodes(root, kind):
    data = minari.MinariDataset(root / f"{kind}-v0" / "data")
    return data, list(data.iterate_episodes())


@pytest.mark.parametrize("kind", ["random", "medium-replay", "medium", "expert"])
def test_recorded_episodes_replay_from_seed_and_actions(kind, recorded):
    data, recording = episodes(recorded[1], kind)
    env, seeds = data.recover_environment(), [m["seed"] for m in data.storage.get_episode_metadata(range(len(data)))]
    assert len(set(seeds)) == len(seeds) > 1
    for seed, episode in zip(seeds, recording):
        obs, _ = env.reset(seed=seed)
        for t, action in enumerate(episode.actions[:20]):
            np.testing.assert_array_equal(obs.astype(np.float32), episode.observations[t])
            obs, reward, terminated, truncated, _ = env.step(action)
            assert reward == pytest.approx(episode.rewards[t], rel=1e-5) and terminated == episode.terminations[t]


@pytest.mark.parametrize("kind, steps", [("random", 150), ("medium-replay", 100), ("medium", 150), ("expert", 150)])
def test_episodes_end_exactly_once_and_sizes_are_as_asked(kind, steps, recorded):
    data, recording = episodes(recorded[1], kind)
    assert data.total_steps == steps == sum(len(e.actions) for e in recording)
    for e in recording:
        ends = e.terminations | e.truncations
        assert ends[-1] and not ends[:-1].any() and not (e.terminations & e.truncations).any()
        assert e.observations.dtype == np.float32 and len(e.observations) == len(e.actions) + 1
    assert all(e.terminations[-1] for e in recording[:-1])  # only the last may be cut
    about = data.storage.metadata
    assert about["ref_max_score"] == 3234.3 and "--num-steps 400" in about["description"]


def test_medium_replay_is_what_agent_0_saw(recorded):
    replay = replay_of(recorded[0])
    obs = np.concatenate([e.observations[:-1] for e in episodes(recorded[1], "medium-replay")[1]])
    np.testing.assert_array_equal(obs, replay["obs"][0, :100])
    assert replay["size"] == 400
    boundary = (replay["terminated"] + replay["truncated"])[:, :-1] > 0
    assert torch.equal(replay["next_obs"][:, :-1][~boundary], replay["obs"][:, 1:][~boundary])


def test_policies_are_exported_and_a_recorded_set_trains(recorded, tmp_path):
    for kind in "medium", "expert":
        policy = torch.export.load(recorded[1] / f"{kind}.pt2").module()
        assert policy(torch.zeros(5, 11)).shape == (1, 5, 3)
    final = torch.export.load(recorded[0] / "policy.pt2").module()(torch.ones(1, 11))
    torch.testing.assert_close(policy(torch.ones(1, 11))[0], final[0])
    td3_bc.main(small("td3_bc", f"{recorded[1] / 'medium-v0'}+{recorded[1] / 'expert-v0'}", tmp_path))


def test_recording_goes_on_after_an_interruption(recorded, tmp_path, monkeypatch):
    stop_at(sac, 256, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "b")
    monkeypatch.undo()
    (folder,) = (tmp_path / "b").iterdir()
    assert stopped.value.code == f"sac: stopped at update 256; go on with --resume {folder}"
    resume(sac, folder)
    a, b = checkpoint(folder), checkpoint(recorded[0])
    assert all(same(a[part], b[part]) for part in ("update", "agent", "moments", "rng"))
    for kind in "random", "medium-replay", "medium", "expert":
        a, b = (episodes(root, kind)[1] for root in (recorded[1], tmp_path / "b_sets" / "hopper"))
        assert len(a) == len(b) and all(np.array_equal(x.observations, y.observations) for x, y in zip(a, b))


def test_a_truncated_step_is_not_terminated(tmp_path):
    """Pendulum never terminates: 200 steps, then a time limit."""
    folder = sac.main(small("sac", None, tmp_path, env_id="Pendulum-v1", num_steps=420, eval_every=420))
    replay = replay_of(folder)
    assert replay["truncated"][0].nonzero().flatten().tolist() == [199, 399] and not replay["terminated"].any()
    assert not torch.equal(replay["next_obs"][0, 199], replay["obs"][0, 200])
    assert replay["action"].abs().max() <= 1
