"""combo.py: its critic loss by hand, what it pushes down and up, and how data and imagined steps are mixed. The model,
its fit and where imagined episodes end are MOPO's: see test_mopo.py."""
import csv
import math
from types import SimpleNamespace

import combo
import numpy as np
import pytest
import torch
from conftest import checkpoint, flat, made, resume, same, stop_at

S, E, B, O, A, n, REAL = 3, 2, 7, 4, 6, 10, 3
ARGS = SimpleNamespace(gamma=0.9, beta=5.0, num_proposals=n, real_ratio=0.45)  # 0.45 of 7 rows are 3


@pytest.fixture
def batch():
    torch.manual_seed(0)
    d = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]).expand(S, B)
    return torch.randn(S, B, O), torch.rand(S, B, A) * 2 - 1, torch.randn(S, B), torch.randn(S, B, O), d


def toy():
    torch.manual_seed(1)
    actor = combo.Actor(S, O, A, 8)
    actor.net[-1].bias.data += torch.linspace(-1, 1, S * 2 * A).view(S, 1, -1)
    return combo.Critic(S, O, A, 8), combo.Critic(S, O, A, 8), actor


def q_of(critic, k, e, s, a):
    x = torch.cat([s, a])
    for layer in critic.net:
        x = x @ layer.weight[k, e] + layer.bias[k, e, 0] if hasattr(layer, "weight") else layer(x)
    return x.item()


def test_critic_by_hand(batch):
    """Squared errors of all rows without entropy in y; beta times logsumexp of 30 in all states, less Q of the data."""
    s, a, r, s_next, d = batch
    critic, critic_target, actor = toy()
    torch.manual_seed(7)
    loss, gap = combo.critic_loss(critic, critic_target, actor, batch, ARGS)
    torch.manual_seed(7)
    with torch.no_grad():
        a_target, _ = actor.sample(s_next)
        (a_pi, log_pi), (a_next, log_next) = actor.sample(s, n), actor.sample(s_next, n)
        a_unif = torch.rand_like(a_pi) * 2 - 1
    log_unif = torch.full_like(log_pi, -A * math.log(2))
    expected, gaps = np.zeros(S), np.zeros((S, E))
    for k, i in np.ndindex(S, B):
        q_next = min(q_of(critic_target, k, e, s_next[k, i], a_target[k, i]) for e in range(E))
        y = (r[k, i] + 0.9 * (1 - d[k, i]) * q_next).item()
        for e in range(E):
            q = q_of(critic, k, e, s[k, i], a[k, i])
            terms = [q_of(critic, k, e, s[k, i], x[k, j * B + i]) - log_mu[k, j * B + i].item()
                     for x, log_mu in ((a_unif, log_unif), (a_pi, log_pi), (a_next, log_next)) for j in range(n)]
            expected[k] += (q - y) ** 2 / B
            gaps[k, e] += np.logaddexp.reduce(terms) / B - (q / REAL if i < REAL else 0)
    expected += 5 * gaps.sum(1)
    assert loss.shape == (S,) and gap.shape == (S, E) and not gap.requires_grad
    np.testing.assert_allclose(gap, gaps, rtol=1e-4)
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-4)


def test_proposals_go_down_in_every_state_and_only_the_datas_actions_go_up(batch):
    """The regulariser's gradient: a softmax over each state's 30, - 1 / REAL for data, none for imagined actions."""
    critic, critic_target, actor = toy()
    values = []

    def record(s, a):
        values.append(critic(s, a))
        values[-1].retain_grad()
        return values[-1]

    s, a, r, s_next, d = batch
    grads = []
    for beta in 0.0, 5.0:
        torch.manual_seed(7)
        args = SimpleNamespace(**{**vars(ARGS), "beta": beta})
        loss, _ = combo.critic_loss(record, critic_target, actor, batch, args)
        loss.sum().backward()
        grads.append(values[-1].grad.unflatten(-1, (1 + 3 * n, B)))
    assert not grads[0][:, :, 1:].any() and grads[0][:, :, 0].all()
    own = grads[1] - grads[0]
    assert (own[:, :, 1:] > 0).all()
    torch.testing.assert_close(own[:, :, 1:].sum(2), torch.full((S, E, B), 5.0 / B))
    torch.testing.assert_close(own[:, :, 0, :REAL], torch.full((S, E, REAL), -5.0 / REAL))
    assert own[:, :, 0, REAL:].abs().max() < 1e-6


def args_for(**flags):
    return combo.Args(**{**dict(device="cpu", num_seeds=S, num_models=E, num_elites=1, hidden_dim=16, batch_size=10,
                                model_hidden_dim=8, real_ratio=0.35, rollout_batch=11, horizon=4), **flags})


def agent_for(args, N=30):
    torch.manual_seed(0)
    obs, next_obs = torch.randn(2, N, O)
    data = SimpleNamespace(
        obs=obs, next_obs=next_obs, action=torch.rand(N, A) * 2 - 1, reward=torch.arange(N).float(),
        terminated=torch.zeros(N), episode=torch.arange(N) // 10, spec=SimpleNamespace(name="HalfCheetah"))
    return combo.Agent(args, O, A, data)


def test_a_batch_is_data_first_then_the_seeds_own_imagined_steps(monkeypatch):
    """Both losses have the whole of it: the policy is improved in imagined states as well."""
    agent, seen = agent_for(args_for()), []
    for k in range(S):
        agent.replay.r[k] = 100 * (k + 1)
    agent.replay.count.fill_(50)
    for name, at in ("critic_loss", 3), ("actor_loss", 3):
        def recorded(*x, loss=getattr(combo, name), at=at):
            seen.append(x[at])
            return loss(*x)
        monkeypatch.setattr(combo, name, recorded)
    for _ in range(20):
        losses = agent.update()
    assert list(losses) == ["critic_loss", "actor_loss", "alpha_loss", "q_start", "gap"]
    assert all(x.shape == (S,) for x in losses.values()) and len(seen) == 40
    for batch in seen:
        s, a, r, s_next, d = batch
        assert s.shape == s_next.shape == (S, 10, O) and a.shape == (S, 10, A) and r.shape == d.shape == (S, 10)
        assert (r[:, :3] < 30).all() and (r[:, 3:] == 100 * torch.arange(1, 4).unsqueeze(1)).all()
        assert torch.equal(s[:, :3], agent.data.obs[r[:, :3].long()])
    assert seen[0] is seen[1] and not torch.equal(seen[0][2], seen[2][2])


def test_imagined_rewards_are_the_models_without_a_penalty(monkeypatch):
    agent = agent_for(args_for())
    monkeypatch.setattr(combo, "imagine", lambda dynamics, elites, s, a: (7 * s[..., 0] + a.sum(-1), s + 1))
    agent.rollout()
    replay, size = agent.replay, 11 * 4
    assert (replay.count == size).all()
    s, a, r, s_next = (x[:, :size] for x in (replay.s, replay.a, replay.r, replay.s_next))
    torch.testing.assert_close(r, 7 * s[..., 0] + a.sum(-1))
    torch.testing.assert_close(s_next, s + 1)


@pytest.mark.parametrize("beta", [0.0, 0.5, 5.0])
def test_what_a_model_promises_counts_less_than_the_data_by_a_closed_form(beta):
    """One state; actions above 0 earn 1 in the data, those below earn 1.5 or more in imagined steps, and pi is uniform.
    Then Q+ = 1 + beta p and Q- = r - beta p with p = e^Q- / (e^Q+ + e^Q-): equal at beta = 0.5, r = 1.5."""
    rewards, q = torch.tensor([1.5, 2.0, 3.0]), torch.zeros(S, E, 2, requires_grad=True)
    critic = lambda s, a: torch.where(a[..., 0].unsqueeze(1) > 0, q[..., :1], q[..., 1:])
    uniform = lambda s, n=1: (torch.rand(S, n * 8, 1) * 2 - 1, torch.full((S, n * 8), -math.log(2)))
    actor = SimpleNamespace(sample=uniform)
    imagined, s = torch.arange(8) >= 4, torch.zeros(S, 8, 1)
    a, r = torch.where(imagined, -0.5, 0.5).expand(S, 8).unsqueeze(-1), torch.where(imagined, rewards.unsqueeze(1), 1.0)
    batch = s, a, r, s, torch.ones(S, 8)
    args = SimpleNamespace(gamma=0.9, beta=beta, num_proposals=100, real_ratio=0.5)
    torch.manual_seed(0)
    for i in range(100):
        loss, _ = combo.critic_loss(critic, lambda s, a: torch.zeros(S, E, 8), actor, batch, args)
        (grad,) = torch.autograd.grad(loss.sum(), q)
        q.data -= (0.4 if i < 50 else 0.05) * grad
    p = torch.full((S,), 0.5)
    for _ in range(200):
        p += 0.1 * (torch.sigmoid(rewards - 1 - 2 * beta * p) - p)
    expected = torch.stack([1 + beta * p, rewards - beta * p], -1).unsqueeze(1).expand(S, E, 2)
    torch.testing.assert_close(q.detach(), expected, atol=0.05, rtol=0)
    assert (q[0, :, 1] - q[0, :, 0]).mean().item() == pytest.approx({0.0: 0.5, 0.5: 0.0, 5.0: -1.45}[beta], abs=0.1)


def test_seeds_together_equal_seeds_apart(monkeypatch):
    def like(draw):  # noise of agent k by the order of the call, whether it is alone or not
        def drawn(x):
            calls.append(0)
            torch.manual_seed(len(calls))
            return draw(S, *x.shape[1:])[who]
        return drawn

    def updates(number):
        feed = iter(batches)
        part = lambda rows: tuple(x[who, rows] for x in next(feed))
        monkeypatch.setattr(combo, "sample", lambda data, args: part(slice(3)))
        monkeypatch.setattr(combo.Replay, "sample", lambda self, size: part(slice(3, 10)))
        agent = agent_for(args_for(num_seeds=number))
        for name, x in agent.state_dict().items():
            if x.dim():
                x.copy_(start[name][who])
        calls.clear()
        for _ in range(4):
            agent.update()
        return {name: x for name, x in agent.state_dict().items() if x.dim()}

    monkeypatch.setattr(torch, "randn_like", like(torch.randn))
    monkeypatch.setattr(torch, "rand_like", like(torch.rand))
    torch.manual_seed(5)
    batches = [(torch.randn(S, 10, O), torch.rand(S, 10, A) * 2 - 1, torch.randn(S, 10), torch.randn(S, 10, O),
                (torch.rand(S, 10) < 0.2).float()) for _ in range(8)]
    start = {name: x.clone() for name, x in agent_for(args_for()).state_dict().items()}
    calls, who = [], slice(None)
    together = updates(S)
    assert not torch.equal(together["critic.net.0.weight"], start["critic.net.0.weight"])
    for k in range(S):
        who = slice(k, k + 1)
        for name, x in updates(1).items():
            torch.testing.assert_close(x[0], together[name][k], rtol=1e-4, atol=1e-6, msg=name)


def test_nan_in_seed_0_leaves_the_others_bit_identical():
    found = []
    for poison in False, True:
        agent = agent_for(args_for())
        agent.fitted.error.fill_(1)
        if poison:
            agent.dynamics_best.layers[2].weight.data[0] = torch.nan
        for _ in range(2):
            agent.rollout()
            losses = agent.update()
        found.append({name: x for name, x in flat(agent.state_dict()).items() if x.dim()})
    clean, poisoned = found
    assert all(torch.equal(x[1:], poisoned[name][1:]) for name, x in clean.items())
    assert losses["critic_loss"].isnan().tolist() == [True, False, False]


def run(hopper, out, **flags):
    return combo.main(combo.Args(**{**dict(
        dataset_id=str(hopper), out_dir=str(out), device="cpu", num_seeds=2, num_updates=12, eval_every=6,
        eval_episodes=1, batch_size=10, hidden_dim=8, num_models=2, num_elites=1, model_hidden_dim=8,
        model_epochs=2, horizon=3, rollout_every=5, rollout_batch=20), **flags}))


def test_a_run_logs_its_losses_and_goes_on_to_the_bit(hopper, tmp_path, monkeypatch):
    whole = run(hopper, tmp_path / "a")
    rows = [(row["update"], row["seed"], row["name"]) for row in csv.DictReader((whole / "losses.csv").open())]
    assert rows == [("12", seed, name) for seed in "01"
                    for name in ("critic_loss", "actor_loss", "alpha_loss", "q_start", "gap")]
    policy = torch.export.load(whole / "policy.pt2").module()
    assert policy(torch.zeros(7, 11)).shape == (2, 7, 3)
    stop_at(combo, 8, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        run(hopper, tmp_path / "b")
    monkeypatch.undo()
    (folder,) = (tmp_path / "b").iterdir()
    assert stopped.value.code == f"combo: stopped at update 8; go on with --resume {folder}"
    resume(combo, folder)
    a, b = checkpoint(whole), checkpoint(folder)
    for part in "update", "agent", "moments", "rng":
        assert same(a[part], b[part]), part
    for file in "eval.csv", "losses.csv":
        assert (whole / file).read_text() == (folder / file).read_text()


@pytest.mark.parametrize("flags, part", [
    ({"eval_episodes": 0}, "no rule ends imagined episodes of None: --env-id"),
    ({"env_id": "Swimmer-v5"}, "no rule ends imagined episodes of Swimmer: --env-id"),
    ({"real_ratio": 1.0}, "--real-ratio 1.0 of --batch-size 10 leaves no data or no rollouts"),
    ({"real_ratio": 0.05}, "--real-ratio 0.05 of --batch-size 10 leaves no data or no rollouts")])
def test_bad_input_is_one_sentence_and_nothing_written(flags, part, hopper, tmp_path):
    if flags.get("env_id") == "Swimmer-v5":
        hopper = made(tmp_path / "swimmer-v0", [50], ["timeout"], obs_dim=8, act_dim=2)
    with pytest.raises(SystemExit) as stopped:
        run(hopper, tmp_path / "out", **flags)
    message = stopped.value.code
    assert message.startswith("combo: ") and part in message and "\n" not in message and not (tmp_path / "out").exists()
