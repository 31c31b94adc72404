"""What a run leaves behind: files, evaluations, independent seeds, and the same end after any interruption."""
import csv
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import DISCRETE, METHODS, OFFLINE, checkpoint, flat, made, real, resume, same, small, stop_at

ROOT = Path(__file__).resolve().parents[1]


def acts_in_hopper(method):
    return method not in DISCRETE and method != "dqn"


def network(method):
    return "critic" if method == "bcq" or not acts_in_hopper(method) else "actor"


def run(method, hopper, out, **flags):
    return import_module(method).main(small(method, hopper, out, **flags))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_trains_and_writes_its_files(method, hopper, whole, tmp_path, capsys):
    for S, folder in (2, whole(method)), (1, run(method, hopper, tmp_path)):
        assert {path.name for path in folder.iterdir()} == {
            "args.json", "run.json", "eval.csv", "losses.csv", "checkpoint.pt", "policy.pt2"}
        rows = list(csv.DictReader((folder / "eval.csv").open()))
        assert [(row["update"], row["seed"]) for row in rows] == [(u, str(k)) for u in ("20", "40") for k in range(S)]
        assert list(rows[0]) == ["update", "seed", "episodes", "return_mean", "return_std", "discounted_return_mean",
                                 "length_mean", "score"]
        for row in rows:
            assert float(row["length_mean"]) > 1
            if acts_in_hopper(method):
                score = 100 * (float(row["return_mean"]) + 20.272305) / (3234.3 + 20.272305)
                assert float(row["score"]) == pytest.approx(score, abs=1e-3)
            else:
                assert row["score"] == ""  # nobody says what is random and what is expert
        losses = list(csv.DictReader((folder / "losses.csv").open()))
        assert {row["seed"] for row in losses} == {str(k) for k in range(S)}
        assert all(np.isfinite(float(row["value"])) for row in losses)
        about = json.loads((folder / "run.json").read_text())
        assert about["method"] == method and checkpoint(folder)["update"] == about["update"] == 40
        assert about["wall_seconds"] > 0 and about["torch"] == torch.__version__ and about["device"] == "cpu"
    last = capsys.readouterr().out.strip()
    assert "return" in last and ("score" in last) == acts_in_hopper(method) and str(folder) in last and "nan" not in last


@pytest.mark.parametrize("method", METHODS)
def test_shapes_are_what_their_comments_say(method, whole):
    policy = torch.export.load(whole(method) / "policy.pt2").module()
    if acts_in_hopper(method):
        assert policy(torch.zeros(7, 11)).shape == (2, 7, 3)
    else:
        assert policy(torch.zeros(7, 4)).shape == (2, 7) and policy(torch.zeros(7, 4)).dtype == torch.long
    for name, x in flat(checkpoint(whole(method))["agent"]).items():
        assert x.dim() == 0 or x.shape[0] == 2, name


def test_policy_needs_nothing_of_this_repository(hopper, tmp_path):
    """From raw observations to environment actions, with normalisation inside, as the evaluation computes them."""
    import td3_bc

    args = small("td3_bc", hopper, tmp_path, num_seeds=3)
    folder = td3_bc.main(args)
    code = ("import sys, torch, numpy; policy = torch.export.load(sys.argv[1]).module();"
            "print(policy(torch.linspace(-2, 2, 22).view(2, 11)).tolist())")
    result = subprocess.run([sys.executable, "-c", code, folder / "policy.pt2"], cwd=tmp_path, capture_output=True, text=True)
    s, data, actor = torch.linspace(-2, 2, 22).view(2, 11), td3_bc.load(args), td3_bc.Actor(3, 11, 3, 16)
    td3_bc.prepare(data, args)
    found = checkpoint(folder)["agent"]
    actor.load_state_dict({name: found[f"actor.{name}"] for name in actor.state_dict()})
    expected = actor(((s - data.mean) / data.std).expand(3, 2, 11))
    torch.testing.assert_close(torch.tensor(eval(result.stdout)), expected.detach())


@pytest.mark.parametrize("method", METHODS)
def test_resume_equals_uninterrupted_to_the_bit(method, hopper, whole, tmp_path, monkeypatch):
    module, whole = import_module(method), whole(method)
    stop_at(module, 26, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        run(method, hopper, tmp_path, num_seeds=2)
    (folder,) = tmp_path.iterdir()
    assert f"stopped at update 26; go on with --resume {folder}" in stopped.value.code
    assert checkpoint(folder)["update"] == 26
    monkeypatch.undo()
    monkeypatch.setattr(module, "export", torch.save)  # takes less time
    resume(module, folder)
    a, b = checkpoint(whole), checkpoint(folder)
    assert a["update"] == b["update"] == 40
    for part in "agent", "moments", "rng":
        assert same(a[part], b[part]), part
    for name in "eval.csv", "losses.csv":
        assert (whole / name).read_text() == (folder / name).read_text()


@pytest.mark.parametrize("method", [*OFFLINE, *DISCRETE])
def test_agent_k_is_not_agent_0_nor_seed_k(method, hopper, whole, tmp_path, monkeypatch):
    whole(method)
    monkeypatch.setattr(import_module(method), "export", torch.save)  # takes less time
    a, b = (checkpoint(folder)["agent"][f"{network(method)}.net.0.weight"]
            for folder in (whole(method), run(method, hopper, tmp_path, num_seeds=2, seed=1)))
    assert not any(torch.equal(x, y) for x, y in [(a[0], a[1]), (a[0], b[0]), (a[1], b[0]), (a[1], b[1])])


def agent(method, S, args, data):
    torch.manual_seed(0)
    return import_module(method).Agent(args, 4, 2, data)


def tensors_of(agent, S):
    opts = {name: x.state_dict()["state"] for name, x in vars(agent).items() if isinstance(x, torch.optim.Optimizer)}
    states = {"agent": agent.state_dict(), **opts}
    return {name: x for name, x in flat(states).items() if x.dim() and len(x) == S and "_extra_state" not in name}


def fixed_batches(method, module, monkeypatch, batches):
    """Feeds prepared batches instead of drawn ones."""
    feed = iter(batches)
    if hasattr(module, "Replay"):
        monkeypatch.setattr(module.Replay, "sample", lambda self, B: next(feed))
    else:
        monkeypatch.setattr(module, "sample", lambda data, args: next(feed))


def make_batches(method, S, B=8, n=24):
    torch.manual_seed(5)
    draw = (lambda: torch.rand(S, B, 2) * 2 - 1) if acts_in_hopper(method) else lambda: (2 * torch.rand(S, B)).long()
    return [(torch.randn(S, B, 4), draw(), torch.randn(S, B), torch.randn(S, B, 4),
             (torch.rand(S, B) < 0.2).float()) for _ in range(n)]


def data_for(module, S):
    """A replay, or a fixed set of five episodes of four steps."""
    if hasattr(module, "Replay"):
        return module.Replay(S, 4, 4, *[2] * acts_in_hopper(module.METHOD))
    return SimpleNamespace(obs=torch.linspace(-1, 1, 80).view(20, 4), episode=torch.arange(5).repeat_interleave(4))


def args_for(module, S):
    return module.Args(num_seeds=S, hidden_dim=16, device="cpu")


@pytest.mark.parametrize("method", METHODS)
def test_nan_in_seed_0_leaves_the_others_bit_identical(method, monkeypatch):
    module, found = import_module(method), []
    for poison in False, True:
        batches = make_batches(method, 3)
        if poison:
            batches[3][2][0] = torch.nan
            if acts_in_hopper(method):
                batches[3][1][0] = torch.nan
        one = agent(method, 3, args_for(module, 3), data_for(module, 3))
        fixed_batches(method, module, monkeypatch, batches)
        torch.manual_seed(1)
        for _ in range(6):
            one.update()
        found.append(tensors_of(one, 3))
    clean, poisoned = found
    assert all(torch.equal(x[1:], poisoned[name][1:]) for name, x in clean.items())
    assert poisoned[f"/agent/{network(method)}.net.0.weight"][0].isnan().all()


@pytest.mark.parametrize("method", METHODS)
def test_seeds_together_equal_seeds_apart(method, monkeypatch):
    """S agents side by side against S agents of one, from the same weights and fed the same batches and noise."""
    module, S = import_module(method), 3
    make = lambda n: agent(method, n, args_for(module, n), data_for(module, n))
    randint = torch.randint

    def like(draw):  # noise of agent k by the order of the call, whether it is alone or not
        def drawn(x):
            calls.append((len(calls), *x.shape[1:]))
            torch.manual_seed(len(calls))
            return draw(S, *x.shape[1:])[who]
        return drawn

    monkeypatch.setattr(torch, "randn_like", like(torch.randn))
    monkeypatch.setattr(torch, "rand_like", like(torch.rand))
    monkeypatch.setattr(torch, "randint", lambda low, high, shape, **_: (
        like(lambda *size: randint(low, high, size))(torch.empty(shape))))
    together = make(S)
    start = {name: x.clone() for name, x in tensors_of(together, S).items()}
    calls, who = [], slice(None)
    fixed_batches(method, module, monkeypatch, make_batches(method, S))
    for _ in range(6):
        together.update()
    for k in range(S):
        apart = make(1)
        for name, x in tensors_of(apart, 1).items():
            x.copy_(start[name][k : k + 1])
        calls, who = [], slice(k, k + 1)
        fixed_batches(method, module, monkeypatch, [[x[k : k + 1] for x in batch] for batch in make_batches(method, S)])
        for _ in range(6):
            apart.update()
        for name, x in tensors_of(apart, 1).items():
            torch.testing.assert_close(x[0], tensors_of(together, S)[name][k], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", ["td3_bc", "bcq_discrete"])
def test_a_seed_that_is_not_finite_is_named_once_and_evaluates_to_nan(method, hopper, tmp_path, monkeypatch, capsys):
    module, count = import_module(method), []
    loss = module.critic_loss

    def patched(*args):
        count.append(0)
        return loss(*args) * torch.tensor([1.0, math.nan if len(count) > 1015 else 1.0, 1.0])

    clean = run(method, hopper, tmp_path / "clean", num_seeds=3, num_updates=1040, eval_every=1000)
    monkeypatch.setattr(module, "critic_loss", patched)
    folder = run(method, hopper, tmp_path / "nan", num_seeds=3, num_updates=1040, eval_every=1000)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seed ")]
    assert said == ["seed 1: critic_loss is nan at update 1040"]
    found, expected = (list(csv.reader((x / "eval.csv").open())) for x in (folder, clean))
    assert found[:5] == expected[:5] and found[6] == expected[6]  # all of 1000, seeds 0 and 2 of 1040
    assert found[5] == ["1040", "1", "2", "nan", "nan", "nan", "nan", ""]
    a, b = checkpoint(clean)["agent"], checkpoint(folder)["agent"]
    assert all(torch.equal(x[[0, 2]], b[name][[0, 2]]) for name, x in a.items())


def test_when_no_seed_is_finite_the_run_stops(hopper, tmp_path, monkeypatch):
    import bc

    loss = bc.actor_loss
    monkeypatch.setattr(bc, "actor_loss", lambda *args: loss(*args) * math.nan)
    with pytest.raises(SystemExit) as stopped:
        run("bc", hopper, tmp_path, num_updates=5000)
    (folder,) = tmp_path.iterdir()
    assert "no seed is finite any more" in stopped.value.code and str(folder) in stopped.value.code


def test_evaluation_is_the_same_in_line_and_in_workers_and_alone(hopper, tmp_path, monkeypatch):
    """td3_bc with two worker processes writes the same eval.csv, and an episode's return is that of a plain loop."""
    import td3_bc

    a = run("td3_bc", hopper, tmp_path / "a", num_seeds=2)
    monkeypatch.setattr(td3_bc, "ProcessPoolExecutor", real)
    b = run("td3_bc", hopper, tmp_path / "b", num_seeds=2, eval_workers=2)
    assert (a / "eval.csv").read_text() == (b / "eval.csv").read_text()
    policy, rows = torch.export.load(a / "policy.pt2").module(), list(csv.DictReader((a / "eval.csv").open()))
    env, returns, discounted, lengths = gym.make("Hopper-v5"), [], [], []
    for seed in np.random.SeedSequence([0, 40]).generate_state(4)[2:]:
        obs, _ = env.reset(seed=int(seed))
        rewards, ended = [], False
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(policy(torch.tensor(obs[None], dtype=torch.float32))[1, 0].numpy())
            rewards.append(reward)
            ended = terminated or truncated
        returns.append(sum(rewards))
        discounted.append(sum(0.99**t * reward for t, reward in enumerate(rewards)))
        lengths.append(len(rewards))
    row = rows[-1]
    assert (row["update"], row["seed"]) == ("40", "1")
    assert float(row["return_mean"]) == pytest.approx(np.mean(returns), rel=1e-3)
    assert float(row["return_std"]) == pytest.approx(np.std(returns), rel=1e-2, abs=1e-2)
    assert float(row["discounted_return_mean"]) == pytest.approx(np.mean(discounted), rel=1e-3)
    assert float(row["length_mean"]) == np.mean(lengths)


def test_a_worker_that_dies_ends_the_run_with_a_sentence(hopper, tmp_path, monkeypatch):
    import td3_bc

    collect = td3_bc.Run.collect

    def patched(self, wait=False):
        for worker in self.pool._processes.values() if self.jobs else []:
            worker.kill()
        collect(self, wait)

    monkeypatch.setattr(td3_bc, "ProcessPoolExecutor", real)
    monkeypatch.setattr(td3_bc.Run, "collect", patched)
    with pytest.raises(SystemExit) as stopped:
        run("td3_bc", hopper, tmp_path)
    assert re.fullmatch("td3_bc: the evaluation of update [24]0 failed: .+", stopped.value.code)  # waiting or handing in


class Endless(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), 1.0, False, False, {}


gym.register("Endless-v0", Endless)


def test_an_episode_that_does_not_end_is_cut_off(tmp_path):
    folder = run("bc", made(tmp_path / "x", [30], ["timeout"]), tmp_path / "out", env_id="Endless-v0", eval_episodes=1)
    assert {row["length_mean"] for row in csv.DictReader((folder / "eval.csv").open())} == {"10000.0000"}


def test_no_evaluation_without_environment_or_episodes(hopper, tmp_path):
    for dataset, flags in (made(tmp_path / "x", [30], ["timeout"]), {}), (hopper, {"eval_episodes": 0}):
        folder = run("bc", dataset, tmp_path / "out", **flags)
        assert len((folder / "eval.csv").read_text().splitlines()) == 1 and (folder / "policy.pt2").exists()


def test_data_without_environment_is_evaluated_in_the_one_that_is_named(tmp_path):
    data = made(tmp_path / "x", [30], ["timeout"], obs_dim=11, act_dim=3)
    folder = run("bc", data, tmp_path / "out", env_id="Hopper-v5")
    assert len((folder / "eval.csv").read_text().splitlines()) == 3


def test_track_logs_to_wandb(hopper, tmp_path, monkeypatch):
    logged, begun = [], {}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **kw: begun.update(kw), log=logged.append))
    run("bc", hopper, tmp_path, track=True, wandb_project_name="p")
    assert begun["project"] == "p" and begun["config"]["batch_size"] == 16
    assert any({"update", "actor_loss"} <= row.keys() for row in logged) and any("score" in row for row in logged)


FAST = """
import sys, time, types
sys.path.insert(0, sys.argv.pop(1))
import td3_bc
if __name__ == "__main__":
    td3_bc.time = types.SimpleNamespace(time=lambda: 100 * time.time(), time_ns=time.time_ns)  # saves every 0.6 s
    td3_bc.main(td3_bc.parse())
"""


def processes(tag):
    """Process ids of all that carry `tag` in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"RUN_TAG={tag}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_stopped_three_times_it_ends_the_same_and_leaves_no_process(hopper, tmp_path):
    """By SIGKILL at any moment, and by signals to the whole group, which a worker leaves to its parent."""
    (tmp_path / "fast.py").write_text(FAST)
    flags = ("--dataset-id", hopper, "--num-updates", 6000, "--eval-every", 1500, "--eval-episodes", 2, "--eval-workers", 1,
             "--batch-size", 64, "--hidden-dim", 32, "--device", "cpu")
    env = {**os.environ, "RUN_TAG": f"{time.time()}"}
    command = lambda *words: [sys.executable, tmp_path / "fast.py", ROOT / "algorithms", *map(str, (*flags, *words))]
    whole = subprocess.Popen(command("--out-dir", tmp_path / "a"), env=env, stderr=subprocess.PIPE, text=True)
    begin, place, rng, points = ("--out-dir", tmp_path / "b"), tmp_path / "b", random.Random(time.time()), set()
    for number in signal.SIGKILL, signal.SIGINT, signal.SIGTERM:
        began = time.time()
        process = subprocess.Popen(command(*begin), env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
        while not [path for path in place.glob("**/args.json") if path.stat().st_mtime > began]:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1.5))
        os.kill(process.pid, number) if number == signal.SIGKILL else os.killpg(process.pid, number)
        _, err = process.communicate(timeout=60)
        (folder,) = (tmp_path / "b").iterdir()
        begin, place = ("--resume", folder), folder
        if number != signal.SIGKILL:
            last = err.splitlines()[-1]
            assert re.fullmatch(rf"td3_bc: stopped at update \d+; go on with --resume {re.escape(str(folder))}", last)
            assert process.returncode == 1 and "Traceback" not in err
        if (folder / "checkpoint.pt").exists():
            points.add(checkpoint(folder)["update"])
    print("resumed from", sorted(points))
    assert points
    end = subprocess.run(command(*begin), env=env, capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    _, err = whole.communicate()
    assert whole.returncode == 0 and "score" in err and "updates/s" in err  # the progress bar
    deadline = time.time() + 10
    while processes(env["RUN_TAG"]) and time.time() < deadline:
        time.sleep(0.1)
    assert processes(env["RUN_TAG"]) == []
    (a,) = (tmp_path / "a").iterdir()
    for name in "eval.csv", "losses.csv":
        assert (a / name).read_text() == (folder / name).read_text()
    x, y = checkpoint(a), checkpoint(folder)
    assert all(same(x[part], y[part]) for part in ("update", "agent", "moments", "rng"))
