"""fqe.py: its loss by hand, whose actions it asks for, known values, two kinds of actions, policies that do not fit."""
import csv
from types import SimpleNamespace

import fqe
import numpy as np
import pytest
import torch
from conftest import checkpoint, made, resume, same, small, stop_at

S, B, O, A = 3, 5, 4, 2


class Constant(torch.nn.Module):
    """Two agents whose action is their number / 4 - 0.5, or their number itself, whatever they see."""

    def __init__(self, act_dim, discrete=False):
        super().__init__()
        self.act_dim, self.discrete = act_dim, discrete

    def forward(self, obs):  # (B, obs_dim) -> (2, B, act_dim) or (2, B)
        zero = 0 * obs[:, 0].long() if self.discrete else 0 * obs[:, :1].expand(-1, self.act_dim)
        return torch.stack([zero, zero + 1] if self.discrete else [zero - 0.5, zero - 0.25])


class Seventh(torch.nn.Module):
    def forward(self, obs):  # (B, obs_dim) -> (1, B)
        return (7 + 0 * obs[:, 0].long()).unsqueeze(0)


def exported(path, policy, obs_dim):
    shapes = ({0: torch.export.Dim("B")},)
    torch.export.save(torch.export.export(policy, (torch.zeros(2, obs_dim),), dynamic_shapes=shapes), path)
    return str(path)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("policy") / "constant.pt2", Constant(2), 3)


def agent_of(data, policy, **flags):
    args = fqe.Args(dataset_id=data, policy=policy, num_seeds=S, hidden_dim=16, eval_episodes=0, device="cpu",
                    **{"batch_size": 16, "copy_every": 5, **flags})
    fqe.setup(args)
    found = fqe.load(args)
    fqe.prepare(found, args)
    return fqe.Agent(args, found.obs_dim, found.act_dim, found)


def test_loss_by_hand():
    torch.manual_seed(0)
    critic, target = fqe.Critic(S, O, A, 8), fqe.Critic(S, O, A, 8)
    sa, sa_next, r = torch.randn(S, B, O + A), torch.randn(S, B, O + A), torch.randn(S, B)
    d = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0]).expand(S, B)
    loss = fqe.critic_loss(critic, target, (sa, None, r, sa_next, d), SimpleNamespace(gamma=0.9))
    q, q_next = critic(sa).detach(), target(sa_next).detach()
    for k in range(S):
        x = sa[k]
        for layer in critic.net:
            x = x @ layer.weight[k] + layer.bias[k] if hasattr(layer, "weight") else layer(x)
        torch.testing.assert_close(q[k], x[:, 0].detach())
        errors = [(q[k, i] - r[k, i] - 0.9 * (1 - d[k, i]) * q_next[k, i]) ** 2 for i in range(B)]
        assert loss.shape == (S,) and loss[k].item() == pytest.approx(np.mean(errors), rel=1e-5)


@pytest.mark.parametrize("k", [0, 1])
def test_q_is_asked_for_the_data_s_action_now_and_the_policy_s_afterwards(k, policy, tmp_path):
    agent = agent_of(made(tmp_path / "x", [12, 18], ["terminal", "timeout"]), policy, agent=k)
    data, pi = agent.data, torch.full((30, 2), k / 4 - 0.5)
    torch.testing.assert_close(data.obs[:, 3:], data.action)
    torch.testing.assert_close(data.next_obs[:, 3:], pi)
    torch.testing.assert_close(data.next_obs[:, 1], data.obs[:, 1] + 1)
    assert data.start[:, :2].tolist() == [[0, 0], [1, 0]] and torch.equal(data.start[:, 3:], pi[:2])
    found = agent.update()
    torch.testing.assert_close(found["q_start"], agent.critic(data.start.expand(S, -1, -1)).mean(-1).detach())
    for p, q in zip(agent.critic.parameters(), agent.critic_target.parameters()):
        assert torch.equal(p, q)


def test_a_known_value_of_each_of_two_policies(policy, tmp_path):
    """Two steps; the reward is the sum of the actions, which are uniform in the data: V = (1 + gamma) 2 a."""
    rng, n = np.random.default_rng(0), 1000
    action = rng.uniform(-1, 1, (2 * n, 2)).astype(np.float32)
    data = made(tmp_path / "x", [2] * n, ["terminal"] * n, actions=action, rewards=action.sum(1))
    for k in 0, 1:
        agent = agent_of(data, policy, agent=k, batch_size=64, learning_rate=3e-3, copy_every=50)
        agent.data.obs[:, 0] = agent.data.next_obs[:, 0] = agent.data.start[:, 0] = 0  # the number of the episode
        for _ in range(9):
            found = agent.update()["q_start"]
        np.testing.assert_allclose(found, np.full(S, 1.99 * 2 * (k / 4 - 0.5)), atol=0.15)


def test_discrete_actions_are_one_hot(tmp_path):
    path = exported(tmp_path / "x.pt2", Constant(0, discrete=True), 4)
    args = small("dqn_offline", "", tmp_path)
    actions, n = np.random.default_rng(0).integers(0, 2, 400), 400
    data = made(tmp_path / "x", [1] * n, ["terminal"] * n, obs_dim=4, actions=actions, rewards=3.0 * actions,
                env_id="CartPole-v1")
    flags = {name: value for name, value in vars(args).items() if name in fqe.Args.__annotations__}
    flags.update(dataset_id=data, policy=path, agent=1, num_updates=1000, copy_every=50, batch_size=64, hidden_dim=32,
                 learning_rate=3e-3, eval_every=1000)
    folder = fqe.main(fqe.Args(**flags))
    rows = [row for row in csv.DictReader((folder / "losses.csv").open()) if row["name"] == "q_start"]
    assert float(rows[-1]["value"]) == pytest.approx(3, abs=0.2)
    played = list(csv.DictReader((folder / "eval.csv").open()))
    assert float(played[-1]["length_mean"]) < 20  # always to the right
    fqe.DISCRETE = False


def run(hopper, policy, out, **flags):
    args = fqe.Args(dataset_id=str(hopper), policy=policy, num_seeds=2, hidden_dim=16, batch_size=16, copy_every=2,
                    num_updates=40, eval_every=20, eval_episodes=2, device="cpu", out_dir=str(out), **flags)
    return fqe.main(args)


@pytest.fixture(scope="module")
def hopper_policy(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("policy") / "hopper.pt2", Constant(3), 11)


def test_a_run_says_estimate_and_truth_and_resumes_to_the_bit(hopper, hopper_policy, tmp_path, monkeypatch, capsys):
    whole = run(hopper, hopper_policy, tmp_path / "a", agent=1)
    assert "discounted return estimated at" in capsys.readouterr().out
    rows = list(csv.DictReader((whole / "eval.csv").open()))
    assert len(rows) == 4 and all(float(row["length_mean"]) > 1 for row in rows)
    policy = torch.export.load(whole / "policy.pt2").module()
    torch.testing.assert_close(policy(torch.randn(7, 11)), torch.full((2, 7, 3), -0.25))
    stop_at(fqe, 26, monkeypatch)
    with pytest.raises(SystemExit):
        run(hopper, hopper_policy, tmp_path / "b", agent=1)
    monkeypatch.undo()
    (folder,) = (tmp_path / "b").iterdir()
    resume(fqe, folder)
    a, b = checkpoint(whole), checkpoint(folder)
    assert all(same(a[part], b[part]) for part in ("update", "agent", "moments", "rng"))
    assert (whole / "eval.csv").read_text() == (folder / "eval.csv").read_text()


def test_nan_in_seed_0_leaves_the_others_bit_identical(policy, tmp_path):
    data, found = made(tmp_path / "x", [12, 18], ["terminal", "timeout"]), []
    for poison in False, True:
        agent = agent_of(data, policy)
        if poison:
            agent.critic.net[0].weight.data[0] = torch.nan
        torch.manual_seed(1)
        for _ in range(3):
            agent.update()
        found.append(agent.critic.state_dict())
    assert all(torch.equal(x[1:], found[1][name][1:]) for name, x in found[0].items())
    assert found[1]["net.0.weight"][0].isnan().all()


@pytest.mark.parametrize("case, word", [
    ("none", "--policy is no file"), ("missing", "nowhere.pt2"), ("agent", "agent 2"), ("dimensions", "does not act"),
    ("actions", "of another kind"), ("choices", "does not act")])
def test_a_policy_that_does_not_fit(case, word, hopper, policy, hopper_policy, tmp_path, monkeypatch):
    monkeypatch.setattr(fqe, "DISCRETE", False)  # a run sets it; what it was comes back
    other = exported(tmp_path / "two.pt2", Constant(2), 11)
    path = {"none": "", "missing": "nowhere.pt2", "dimensions": policy, "actions": other}.get(case, hopper_policy)
    if case == "choices":  # action 7, where the data know 0 to 3
        hopper, path = "lunarlander/mixed-v0", exported(tmp_path / "eight.pt2", Seventh(), 8)
    with pytest.raises(SystemExit) as stopped:
        run(hopper, path, tmp_path / "out", agent=2 if case == "agent" else 0)
    message = stopped.value.code
    assert message.startswith("fqe: ") and word in message and "\n" not in message and not (tmp_path / "out").exists()
