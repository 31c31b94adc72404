"""The same update as a CUDA graph and eagerly, and one run of each file on a GPU."""
from importlib import import_module

import pytest
import torch
from conftest import DISCRETE, METHODS, OFFLINE, checkpoint, flat, small

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("method", [*METHODS, "dt"])
def test_a_run_on_cuda(method, hopper, tmp_path, capsys):
    module = import_module(method)
    folder = module.main(small(method, hopper, tmp_path, device="cuda", num_seeds=3))
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
