"""Driving and walking by what a camera sees: the networks' sizes, the drawn world against projective geometry, labels
against hand computations, and runs."""
import importlib.util
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import gymnasium as gym
import numpy as np
import pilotnet
import pytest
import torch
import trailnet
from conftest import checkpoint, resume, same, stop_at
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FILES = {"pilotnet": ("Road-v0", "num_drives"), "trailnet": ("Trail-v0", "num_walks")}
both = pytest.mark.parametrize("m", [pilotnet, trailnet], ids=FILES)
INK = torch.tensor([[[0.0] * 3, [0.0] * 3, [0.0] * 3, [255.0] * 3]])  # a white line and nothing else


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Minutes of 20 steps."""
    for m in pilotnet, trailnet:
        monkeypatch.setattr(m, "MINUTE", 20)
        monkeypatch.setattr(gym.spec(FILES[m.METHOD][0]), "max_episode_steps", 20)


def args(m, out="", **flags):
    shape = dict(num_updates=6, batch_size=3, eval_every=6, eval_episodes=1, device="cpu", num_seeds=2)
    return m.Args(**{**shape, "out_dir": str(out), FILES[m.METHOD][1]: 2, **flags})


def loaded(m, **flags):
    one = args(m, **flags)
    m.setup(one)
    data = m.load(one)
    m.prepare(data, one)
    return one, data


# --- networks ---
def outputs(convs, h):
    shapes = []
    for layer in convs:
        h = layer(h)
        shapes.append(tuple(h.shape[1:]))
    return shapes


def test_pilotnet_has_the_papers_layers_and_counts():
    actor = pilotnet.Actor(1)
    shapes = outputs(actor.convs, torch.zeros(1, 3, 66, 200))[::2]
    assert shapes == [(24, 31, 98), (36, 14, 47), (48, 5, 22), (64, 3, 20), (64, 1, 18)]
    full = list(actor.full)[::2]
    assert [tuple(layer.weight.shape[1:]) for layer in full] == [(1152, 100), (100, 50), (50, 10), (10, 1)]
    assert sum(p.numel() for p in actor.parameters()) == 252_219
    weights = [layer.weight[0, 0].numel() for layer in list(actor.convs)[::2]]  # that one output has
    connections = sum(c * h * w * (n + 1) for (c, h, w), n in zip(shapes, weights))
    connections += sum(layer.weight.numel() + layer.bias.numel() for layer in full)
    assert round(connections / 1e6) == 27


def test_trailnet_has_four_convolutions_with_pooling():
    actor = trailnet.Actor(1)
    shapes = outputs(actor.convs, torch.zeros(1, 3, 101, 101))
    assert shapes[::3] == [(32, 98, 98), (32, 46, 46), (32, 20, 20), (32, 7, 7)]
    assert shapes[2::3] == [(32, 49, 49), (32, 23, 23), (32, 10, 10), (32, 3, 3)]
    assert actor.logits(torch.zeros(1, 2, 3 * 101 * 101)).shape == (1, 2, 3)


def test_pilotnet_sees_yuv_made_from_red_green_and_blue():
    actor, seen = pilotnet.Actor(1), []
    actor.convs[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, :, 0, 0]))
    colours = torch.tensor([[255.0, 255, 255], [0, 0, 0], [255, 0, 0], [0, 0, 255]])
    for colour in colours:
        actor(colour.repeat_interleave(66 * 200).view(1, 1, -1))
    (white, black, red, blue) = seen
    assert torch.allclose(white, torch.tensor([1.0, 0, 0]), atol=2e-3) and torch.allclose(black, -white, atol=1e-5)
    assert red[2] > 1 and red[1] < 0 and blue[1] > 0.8 and blue[2] < 0 and red[0] > blue[0]


@both
def test_seeds_are_apart_and_nan_stays_in_its_seed(m):
    torch.manual_seed(0)
    together, alone = m.Actor(3), m.Actor(1)
    s = 255 * torch.rand(3, 2, 3 * m.H * m.W)
    a = torch.randint(3, (3, 2)) if m is trailnet else torch.randn(3, 2, 1)
    loss = m.actor_loss(together, (s, a))
    grads = torch.autograd.grad(loss.sum(), list(together.parameters()))
    for k in range(3):
        alone.load_state_dict({n: x if n == "yuv" else x[k : k + 1] for n, x in together.state_dict().items()})
        own = m.actor_loss(alone, (s[k : k + 1], a[k : k + 1]))
        torch.testing.assert_close(loss[k : k + 1], own, rtol=1e-4, atol=1e-6)
        for whole, part in zip(grads, torch.autograd.grad(own.sum(), list(alone.parameters()))):
            torch.testing.assert_close(whole[k : k + 1], part, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        next(together.parameters())[0] = torch.nan
    after = m.actor_loss(together, (s, a))
    assert after[0].isnan() and torch.equal(after[1:], loss[1:])


def test_losses_by_hand():
    torch.manual_seed(0)
    logits, a, p = torch.randn(3, 4, 3), torch.randint(3, (3, 4)), torch.randn(3, 4, 1)

    class Fixed:
        def __init__(self, found):
            self.logits = self.__call__ = lambda s: found

        def __call__(self, s):
            return p

    for k in range(3):
        loss = sum(-logits[k, b].softmax(-1)[a[k, b]].log() for b in range(4)) / 4
        torch.testing.assert_close(trailnet.actor_loss(Fixed(logits), (None, a))[k], loss)
        loss = sum((p[k, b, 0] - a[k, b]) ** 2 for b in range(4)) / 4
        torch.testing.assert_close(pilotnet.actor_loss(Fixed(p), (None, a.unsqueeze(-1).float()))[k], loss)


# --- the drawn world ---
def place(m, e, psi, bend, s, d):
    """Row and column of the point d m right of the middle of a circle's road, s m on, seen by projective geometry."""
    sin, cos = np.sin(bend * s), np.cos(bend * s)
    point = np.array([sin / bend - d * sin, (1 - cos) / bend + d * cos])
    ahead, right = np.array([[np.cos(psi), np.sin(psi)], [-np.sin(psi), np.cos(psi)]]) @ (point - [0, e])
    return m.HORIZON + m.HEIGHT * m.ALONG / ahead, m.W / 2 + m.ACROSS * right / ahead


@both
@pytest.mark.parametrize("e, psi, bend", [(0.0, 0.0, 1e-6), (0.4, 0.05, 0.02), (-0.5, 0.1, -0.015), (0.2, -0.1, -0.03)])
def test_a_point_of_the_road_is_where_projective_geometry_says(m, e, psi, bend, monkeypatch):
    monkeypatch.setattr(m, "LINE", (1.7, 1.9))
    frame = (torch.tensor([x]) for x in (0.0, e, psi))
    picture = m.render(*frame, torch.full((1, m.J), bend), INK)[0, 0]
    found, reach = 0, 8 if m is pilotnet else 3
    for s in np.linspace(4, 12, 9):
        for side in -1, 1:
            row, column = place(m, e, psi, bend, s, side * 1.8)
            spots = [place(m, e, psi, bend, s, side * d)[1] for d in (1.7, 1.9)]
            if reach < column < m.W - reach and row < m.H - 1:
                found += 1
                height = row - 0.5 - int(row - 0.5)  # rows are drawn at their middle: between two of them
                rows = picture[[int(row - 0.5), int(row - 0.5) + 1]]
                columns = np.arange(round(column) - reach, round(column) + reach)
                line = ((1 - height) * rows[0] + height * rows[1])[columns].numpy()
                assert abs((line * (columns + 0.5)).sum() / line.sum() - column) < (1 if m is pilotnet else 0.4)
                assert line.sum() / 255 == pytest.approx(abs(spots[1] - spots[0]), rel=0.3)
    assert found >= 6


@both
def test_what_is_mirrored_looks_mirrored(m):
    torch.manual_seed(0)
    at, e, psi, look = 9 * torch.rand(5), torch.randn(5) * 0.3, torch.randn(5) * 0.2, 255 * torch.rand(5, 4, 3)
    bend = torch.randn(5, 1) * 0.02 + torch.randn(5, m.J) * 0.005
    assert (m.render(at, e, psi, bend, look).flip(-1) - m.render(at, -e, -psi, -bend, look)).abs().max() < 0.1


@both
def test_steering_right_goes_right_and_off_by_a_metre_is_put_back(m):
    env = gym.make(FILES[m.METHOD][0])
    env.reset(seed=3)
    world, total, hands = env.unwrapped, 0.0, 0
    world.bend = lambda s: 0.0 * np.asarray(s)  # straight on
    for t in range(20):
        before = world.e
        _, reward, terminated, truncated, info = env.step(np.array([m.STEER]))
        assert terminated is False and truncated == (t == 19)
        if info["intervention"]:
            assert (world.e, world.psi) == (0, 0) and before > 0
        else:
            assert world.e > before and abs(world.e) <= m.LIMIT
        total, hands = total + reward, hands + info["intervention"]
    seconds = 20 * m.DT
    assert hands >= 1 and 100 * total / seconds == pytest.approx(100 * (1 - 6 * hands / seconds))


# --- labels ---
@pytest.mark.parametrize("shift, turn, label", [(0.5, 0.1, -0.0275), (-0.5, 0.0, 0.0075), (0.0, 0.05, -0.01)])
def test_recovery_by_hand(shift, turn, label):
    assert pilotnet.recover(shift, turn) == pytest.approx(label)
    third = -(shift + 20 * turn + 200 * label) / 8000  # y = shift + turn x + label x^2 / 2 + third x^3 is 0 at 20 m
    assert turn + 20 * label + 1200 * third == pytest.approx(0, abs=1e-12)  # and so is y'


def test_recovery_leads_back_in_a_few_seconds():
    world = pilotnet.World()
    world.reset(seed=0)
    world.e, world.psi = 0.9, 0.05
    for _ in range(50):
        world.move(float(world.bend(world.at)) + pilotnet.recover(world.e, world.psi))
    assert abs(world.e) < 0.05 and abs(world.psi) < 0.01


def fix(monkeypatch, camera, noise, mirrored=0.9):
    """The draws of views(): the first frame, this camera, this noise."""
    cameras = lambda *size, **_: torch.full(size[-1], camera if len(size) == 3 else 0)
    monkeypatch.setattr(torch, "randint", cameras)
    monkeypatch.setattr(torch, "randn", lambda size, **_: torch.full(size, noise))
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(
        size[0] if isinstance(size[0], tuple) else size, mirrored if isinstance(size[0], tuple) else 0.5))


@pytest.mark.parametrize("camera", [-1, 0, 1])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_side_views_are_steered_back(camera, noise, monkeypatch):
    one, data = loaded(pilotnet)
    at, e, psi, bend, look, action = (x[data.index[:1]] for x in data.parts[0])
    fix(monkeypatch, camera, noise)
    s, a = pilotnet.views(data, one)
    shift, turn = 0.5 * camera + 0.4 * noise, 0.03 * noise
    label = action - 6 * shift / 20**2 - 4 * turn / 20  # by hand
    torch.testing.assert_close(0.1 * a, label.expand(2, 3, 1))
    assert noise or np.sign(float(0.1 * a[0, 0, 0] - action)) == -camera
    seen = pilotnet.render(at, e + shift, psi + turn, bend, look).flatten(1)
    torch.testing.assert_close(s, seen.expand(2, 3, -1), rtol=1e-4, atol=0.01)
    one.side_cameras = False
    s, a = pilotnet.views(data, one)
    torch.testing.assert_close(0.1 * a, action.expand(2, 3, 1))
    torch.testing.assert_close(s, pilotnet.render(at, e, psi, bend, look).flatten(1).expand(2, 3, -1))


@pytest.mark.parametrize("camera, label", [(-1, 2), (0, 1), (1, 0)])
def test_what_looks_right_has_to_turn_left_unless_mirrored(camera, label, monkeypatch):
    one, data = loaded(trailnet)
    at, e, psi, bend, look = (x[:1] for x in data.parts[0])
    fix(monkeypatch, camera, 0.0)
    s, a = trailnet.views(data, one)
    seen = trailnet.render(at, e, psi + np.pi / 6 * camera, bend, look)
    assert (a == label).all()
    torch.testing.assert_close(s, seen.flatten(1).expand(2, 3, -1), rtol=0, atol=0.05)
    paint = torch.tensor([[[0.0] * 3, [0.0] * 3, [255.0] * 3, [255.0] * 3]])  # the trail alone
    columns = trailnet.render(at, e, psi + np.pi / 6 * camera, bend, paint)[0, 0, 60:].sum(0)
    assert abs((columns * (torch.arange(101) - 50)).sum() / columns.sum() + 17 * camera) < 10  # 29.2 tan(30 degrees)
    fix(monkeypatch, camera, 0.0, mirrored=0.1)
    s, a = trailnet.views(data, one)
    assert (a == 2 - label).all()
    torch.testing.assert_close(s, seen.flip(-1).flatten(1).expand(2, 3, -1), rtol=0, atol=0.05)
    one.side_cameras = False
    assert (trailnet.views(data, one)[1] == 1).all()


def test_the_walker_turns_to_where_the_trail_leads():
    class Sure(trailnet.Actor):
        def logits(self, s):
            return 9 * torch.eye(3).expand(1, 3, 3)

    left, straight, right = Sure(1)(torch.zeros(1, 3, 1)).flatten()
    assert left < -0.9 and abs(straight) < 0.01 and right > 0.9


def test_a_picture_that_is_not_distorted_stays_and_one_that_is_moves_a_tenth(monkeypatch):
    s = 255 * torch.rand(1, 3, 101, 101)
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, 0.5))
    torch.testing.assert_close(trailnet.distort(s), s, rtol=0, atol=0.05)
    draws = torch.tensor([0.5, 0.5, 1.0, 0.5]).view(4, 1)  # turn, scale, and 10 % along the rows
    monkeypatch.setattr(torch, "rand", lambda *size, **_: draws)
    moved = trailnet.distort(s)
    torch.testing.assert_close(moved[..., 50], 0.9 * s[..., 60] + 0.1 * s[..., 61], rtol=0, atol=0.1)


@both
def test_the_test_is_on_other_ways(m):
    one, data = loaded(m)
    looks = [set(part[4][:, 0, 0].tolist()) for part in data.parts]
    assert [len(x) for x in looks] == [2, 5] and not looks[0] & looks[1]


def test_bends_are_drawn_more_often():
    _, data = loaded(pilotnet)
    action = data.parts[0][-1].abs()
    count = torch.bincount(data.index, minlength=len(action))
    assert count.min() == 1 and count.max() == 2 and action[count == 2].min() >= action[count == 1].max()


@both
def test_another_environment_is_refused(m):
    with pytest.raises(SystemExit, match="--env-id Pendulum-v1 does not show pictures of"):
        m.load(args(m, env_id="Pendulum-v1"))


# --- runs ---
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each file, in minutes of 20 steps."""
    with pytest.MonkeyPatch.context() as patch:
        found = {}
        for m in pilotnet, trailnet:
            patch.setattr(m, "MINUTE", 20)
            patch.setattr(gym.spec(FILES[m.METHOD][0]), "max_episode_steps", 20)
            found[m.METHOD] = m.main(args(m, tmp_path_factory.mktemp(m.METHOD)))
    return found


@both
def test_a_run_scores_its_autonomy_and_exports_its_policy(m, runs):
    folder = runs[m.METHOD]
    rows = np.atleast_1d(np.genfromtxt(folder / "eval.csv", delimiter=",", names=True))
    assert np.allclose(rows["score"], 100 * rows["return_mean"] / (20 * m.DT), atol=0.01)
    assert (rows["length_mean"] == 20).all()
    logged = (folder / "losses.csv").read_text()
    assert ("test_loss" if m is pilotnet else "accuracy") in logged
    policy = torch.export.load(folder / "policy.pt2").module()
    obs = torch.from_numpy(gym.make(FILES[m.METHOD][0]).reset(seed=1)[0])
    actions = policy(obs.expand(5, -1))
    assert actions.shape == (2, 5, 1) and (m is pilotnet or actions.abs().max() <= m.STEER)


@both
def test_an_interrupted_run_ends_as_the_whole_one(m, runs, tmp_path, monkeypatch):
    train = m.train
    monkeypatch.setattr(m, "export", lambda policy, path: path.touch())
    stop_at(m, 3, monkeypatch)
    with pytest.raises(SystemExit):
        m.main(args(m, tmp_path))
    monkeypatch.setattr(m, "train", train)
    folder = resume(m, next(tmp_path.iterdir()))
    whole, parts = checkpoint(runs[m.METHOD]), checkpoint(folder)
    assert all(same(whole[key], parts[key]) for key in ("agent", "moments", "rng"))
    for name in "eval.csv", "losses.csv":
        assert (folder / name).read_text() == (runs[m.METHOD] / name).read_text()


@both
def test_it_can_be_watched(m, runs, capsys):
    spec = importlib.util.spec_from_file_location("watch", ROOT / "benchmark_results" / "watch.py")
    watch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(watch)
    watch.main([str(runs[m.METHOD]), "--steps", "8", "--every", "2", "--seeds", "1"])
    image = Image.open(runs[m.METHOD] / "watch-1.gif")
    assert image.n_frames > 1 and image.width == 240 and "seed 1: return" in capsys.readouterr().out


def test_a_copied_file_runs_alone(tmp_path):
    text = (ROOT / "algorithms" / "trailnet.py").read_text()
    (tmp_path / "mine.py").write_text(text.replace("MINUTE, LIMIT = 1.4, 0.2, 300", "MINUTE, LIMIT = 1.4, 0.2, 9"))
    words = "--num-walks 1 --num-updates 2 --batch-size 2 --eval-episodes 1 --eval-workers 1 --device cpu".split()
    ends = subprocess.run([sys.executable, "mine.py", *words], cwd=tmp_path, capture_output=True, text=True)
    assert ends.returncode == 0, ends.stderr
    assert len(list(tmp_path.glob("runs/*/policy.pt2"))) == 1 and "score" in ends.stdout
