"""The same update as a CUDA graph and eagerly, and one run of each file on a GPU."""
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import ALL, DISCRETE, OFFLINE, checkpoint, flat, small

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[1]


FLAGS = {"mopo": dict(batch_size=40, rollout_batch=20, model_epochs=2, model_hidden_dim=16)}


def args_of(method, hopper, out, device):
    """Args of a run of 40 updates of 3 agents on a device."""
    args = dict(device=device, num_seeds=3)
    if method not in ("dagger", "bcq_tabular"):
        return small(method, hopper, out, **args, **FLAGS.get(method, {}))
    args.update(num_updates=40, eval_every=20, out_dir=str(out))
    if method == "dagger":
        args.update(expert=str(ROOT / "datasets/hopper/expert.pt2"), rounds=2, steps_per_round=60, batch_size=16,
                    hidden_dim=16, eval_episodes=1, eval_workers=0)
    return import_module(method).Args(**args)


@pytest.mark.parametrize("method", ALL)
def test_a_run_on_cuda(method, hopper, tmp_path, capsys):
    module = import_module(method)
    folder = module.main(args_of(method, hopper, tmp_path, "cuda"))
    assert checkpoint(folder)["update"] == 40 and (folder / "policy.pt2").exists()
    assert "no CUDA graph" not in capsys.readouterr().err
    module.main(module.Args(resume=str(folder)))


@pytest.mark.parametrize("method", [*OFFLINE, *DISCRETE])
def test_graph_and_eager_updates_agree(method, hopper, tmp_path, capsys):
    module, ends = import_module(method), []
    args = module.check(small(method, hopper, tmp_path, device="cuda", num_seeds=3))
    for wrap in module.cuda_graph, lambda agent: agent.update:
        data = module.load(args)
        module.prepare(data, args)
        torch.manual_seed(0)
        agent = module.Agent(args, data.obs_dim, data.act_dim, data)
        update = wrap(agent)
        for _ in range(19):
            update()
        losses = update()
        torch.cuda.synchronize()
        ends.append([x.clone() for m in agent.modules.values() for x in m.state_dict().values()])
        assert all(loss.shape == (3,) and loss.isfinite().all() for loss in losses.values())
    assert "no CUDA graph" not in capsys.readouterr().err
    for x, y in zip(*ends):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


def test_a_failed_capture_goes_on_eagerly(hopper, tmp_path, capsys, monkeypatch):
    import td3_bc

    update = td3_bc.Agent.update

    def patched(self):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("cannot be captured")
        return update(self)

    monkeypatch.setattr(td3_bc.Agent, "update", patched)
    folder = td3_bc.main(small("td3_bc", hopper, tmp_path, device="cuda"))
    assert "cannot be captured" in capsys.readouterr().err
    assert all(x.isfinite().all() for x in flat(checkpoint(folder)["modules"]).values())
