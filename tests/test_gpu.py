"""The same update as a CUDA graph and eagerly, and one run of each file on a GPU."""
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import ALL, DISCRETE, OFFLINE, checkpoint, resume, small, stop_at

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[1]
TABLES = "bcq_tabular", "bear_gridworld", "ope"
MODEL = dict(rollout_batch=20, model_epochs=2, model_hidden_dim=16)
FLAGS = {"mopo": dict(batch_size=40, **MODEL), "combo": MODEL, "bail": dict(envelope_epochs=2),
         "awr": dict(value_steps=5, turn_steps=20), "marwil": dict(turn_steps=20), "brac": dict(clone_updates=20),
         "fisher_brc": dict(clone_updates=20), "fqe": dict(policy=str(ROOT / "datasets" / "hopper" / "medium.pt2"))}


def args_of(method, hopper, out, device):
    """Args of a run of 40 updates of 3 agents on a device."""
    args = dict(device=device, num_seeds=3)
    if method.endswith("dagger"):
        args.update(expert=str(ROOT / "datasets" / "hopper" / "expert.pt2"), rounds=2, steps_per_round=60, batch_size=16,
                    hidden_dim=16, eval_episodes=1)
    elif method in ("pilotnet", "trailnet"):
        args.update(batch_size=4, eval_episodes=1, **{"num_drives" if method == "pilotnet" else "num_walks": 2})
    elif method not in TABLES:
        return small(method, hopper, out, **args, **FLAGS.get(method, {}))
    return import_module(method).Args(**args, num_updates=40, eval_every=20, out_dir=str(out))


@pytest.mark.parametrize("method", ALL)
def test_a_run_on_cuda(method, hopper, tmp_path):
    folder = import_module(method).main(args_of(method, hopper, tmp_path, "cuda"))
    assert checkpoint(folder)["update"] >= 40 and (folder / "policy.pt2").exists()  # fqe ends its iteration


@pytest.mark.parametrize("method", [*OFFLINE, *DISCRETE])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(method, hopper, tmp_path, monkeypatch):
    module = import_module(method)
    whole = module.main(args_of(method, hopper, tmp_path / "a", "cuda"))
    stop_at(module, 26, monkeypatch)
    with pytest.raises(SystemExit):
        module.main(args_of(method, hopper, tmp_path / "b", "cuda"))
    monkeypatch.undo()
    (folder,) = (tmp_path / "b").iterdir()
    resume(module, folder)
    a, b = checkpoint(whole)["agent"], checkpoint(folder)["agent"]
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("method", [*OFFLINE, *DISCRETE])
def test_graph_and_eager_updates_agree(method, hopper, tmp_path):
    module, ends, args = import_module(method), [], args_of(method, hopper, tmp_path, "cuda")
    for wrap in lambda agent: module.cuda_graph(agent.update).__next__, lambda agent: agent.update:
        module.setup(args)
        with torch.device("cuda"):
            data = module.load(args)
            module.prepare(data, args)
            torch.manual_seed(0)
            agent = module.Agent(args, data.obs_dim, data.act_dim, data)
        update = wrap(agent)
        for _ in range(19):
            update()
        losses = update()
        torch.cuda.synchronize()
        ends.append({name: x.clone() for name, x in agent.state_dict().items()})
        assert all(loss.shape == (3,) and loss.isfinite().all() for loss in losses.values())
    for name, x in ends[0].items():
        torch.testing.assert_close(x, ends[1][name], rtol=1e-3, atol=1e-3, msg=name)
