"""The Decision Transformer: what a prediction depends on, parts against torch.nn or a loop, and acting on returns."""
import csv
import pickle
from types import SimpleNamespace

import dt
import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import checkpoint, flat, made, resume, same, small, stop_at

S, B, K, O, A, D, T_MAX = 3, 4, 5, 6, 2, 8, 11


def args(**flags):
    shape = dict(num_seeds=S, hidden_dim=D, num_heads=2, num_layers=2, context=K, dropout=0.0, warmup=1, device="cpu")
    return dt.Args(**{**shape, **flags})


def make(**flags):
    """An agent whose every weight, norms and biases included, is random."""
    torch.manual_seed(0)
    agent = dt.Agent(args(**flags), O, A, SimpleNamespace(timestep=torch.arange(T_MAX)))
    for p in agent.actor.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return agent


def make_batch(seed=1, S=S):
    """Windows of 5, 3, 1 and 2 steps; what pads them is arbitrary."""
    torch.manual_seed(seed)
    t = torch.randint(T_MAX - K, (S, B, 1)) + torch.arange(K)
    valid = (torch.arange(K) < torch.tensor([5, 3, 1, 2]).unsqueeze(1)).float().expand(S, B, K)
    return [1000 * torch.randn(S, B, K), torch.randn(S, B, K, O), torch.rand(S, B, K, A) * 2 - 1, t, valid]


def reference(actor, k, rtg, s, a, t, mask):
    """Agent k's predictions (B, K, A) by torch.nn's own layers, on which `mask` (B, 3 K, 3 K) is added."""
    d = actor.time.shape[-1]

    def linear(mine):
        layer = nn.Linear(*mine.weight.shape[1:])
        layer.weight.data, layer.bias.data = mine.weight.data[k].T, mine.bias.data[k, 0]
        return layer

    def norm(mine):
        layer = nn.LayerNorm(d)
        layer.weight.data, layer.bias.data = mine.weight.data[k, 0, 0], mine.bias.data[k, 0, 0]
        return layer

    time = nn.Embedding.from_pretrained(actor.time.data[k])(t)
    x = torch.zeros(*t.shape, 3, d)
    x[:, :, 0] = linear(actor.embed_rtg)(rtg.unsqueeze(-1) / 1000) + time
    x[:, :, 1] = linear(actor.embed_s)(s) + time
    x[:, :, 2] = linear(actor.embed_a)(a) + time
    x = norm(actor.norm_in)(x.flatten(1, 2))
    for mine in actor.blocks:
        block = nn.TransformerEncoderLayer(d, mine.H, 4 * d, 0.0, "relu", batch_first=True, norm_first=True)
        block.norm1, block.norm2 = norm(mine.norm_1), norm(mine.norm_2)
        block.linear1, block.linear2 = linear(mine.mlp[0]), linear(mine.mlp[2])
        block.self_attn.in_proj_weight.data = torch.cat([mine.query.weight[k].T, mine.key_value.weight[k].T]).data
        block.self_attn.in_proj_bias.data = torch.cat([mine.query.bias[k, 0], mine.key_value.bias[k, 0]]).data
        block.self_attn.out_proj.weight.data = mine.out.weight.data[k].T
        block.self_attn.out_proj.bias.data = mine.out.bias.data[k, 0]
        x = block(x, mask.repeat_interleave(mine.H, 0))
    return torch.tanh(linear(actor.head)(norm(actor.norm_out)(x[:, 1::3]))).detach()


def test_network_is_that_of_torch_nn_for_each_seed():
    actor, (*steps, _) = make().actor, make_batch()
    causal = torch.full((B, 3 * K, 3 * K), -1e9).triu(1)
    pi = actor(*steps)
    assert pi.shape == (S, B, K, A)
    for k in range(S):
        torch.testing.assert_close(pi[k], reference(actor, k, *(x[k] for x in steps), causal), rtol=1e-4, atol=1e-5)


def test_padding_at_the_end_is_the_authors_padding_at_the_start():
    """Their windows begin with pads (actions -10, everything else 0), and scores of pads get -10,000."""
    actor, (*steps, valid) = make().actor, make_batch()
    pi = actor(*steps)
    for k in range(S):
        left = [torch.full_like(x[k], pad) for x, pad in zip(steps, (0, 0, -10, 0))]
        mask = torch.full((B, 3 * K, 3 * K), -1e4).triu(1)
        for i, n in enumerate(valid[k].sum(-1).int().tolist()):
            mask[i, :, : 3 * (K - n)] -= 1e4
            for x, y in zip(left, steps):
                x[i, K - n :] = y[k, i, :n]
        expected = reference(actor, k, *left, mask)
        for i, n in enumerate(valid[k].sum(-1).int().tolist()):
            torch.testing.assert_close(pi[k, i, :n], expected[i, K - n :], rtol=1e-4, atol=1e-5)


def test_an_action_is_predicted_from_the_past_the_return_to_go_and_the_state():
    actor, steps = make().actor, make_batch()[:4]
    pi, t = actor(*steps), 2
    for n, name in enumerate(("rtg", "s", "a", "t")):
        for at in range(K):
            other = [x.clone() for x in steps]
            other[n][:, :, at] = other[n][:, :, at] + 1
            differs = (actor(*other) - pi)[:, :, t].abs().amax((1, 2)) > 1e-6  # (S,)
            seen = at < t or at == t and name != "a"  # the action itself is not seen
            assert differs.tolist() == [seen] * S, (name, at)


def test_a_window_that_grows_predicts_the_same():
    actor, steps = make().actor, make_batch()[:4]
    pi = actor(*steps)
    for n in range(1, K + 1):
        torch.testing.assert_close(actor(*(x[:, :, :n] for x in steps)), pi[:, :, :n], rtol=1e-4, atol=1e-5)


def test_pads_change_neither_loss_nor_gradient():
    actor, batch, other = make().actor, make_batch(), make_batch(seed=2)
    valid = batch[-1].bool()
    mixed = [torch.where(valid.view(*valid.shape, *[1] * (x.dim() - 3)), x, y) for x, y in zip(batch[:4], other)]
    mixed[3].clamp_(max=T_MAX - 1)
    a, b = (dt.actor_loss(actor, [*steps, batch[-1]]) for steps in (batch[:4], mixed))
    torch.testing.assert_close(a, b)
    for x, y in zip(*(torch.autograd.grad(loss.sum(), actor.parameters()) for loss in (a, b))):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_loss_is_the_mean_over_valid_steps():
    actor, batch = make().actor, make_batch()
    batch[-1] = batch[-1].clone()
    batch[-1][1, 0, 4] = 0  # another number of valid steps than the other seeds have
    pi, (_, _, a, _, valid), expected = actor(*batch[:4]).detach(), batch, []
    for k in range(S):
        errors = [(pi[k, i, t, j] - a[k, i, t, j]).item() ** 2
                  for i in range(B) for t in range(K) for j in range(A) if valid[k, i, t]]
        assert len(errors) == A * (10 if k == 1 else 11)
        expected.append(np.mean(errors))
    loss = dt.actor_loss(actor, batch)
    assert loss.shape == (S,)
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-5)


def test_layer_norm_is_one_for_each_seed():
    torch.manual_seed(3)
    mine, x = dt.LayerNorm(S, D), 5 + 2 * torch.randn(S, B, K, D)
    for p in mine.parameters():
        p.data = torch.randn_like(p)
    for k in range(S):
        expected = nn.functional.layer_norm(x[k], (D,), mine.weight[k, 0, 0], mine.bias[k, 0, 0])
        torch.testing.assert_close(mine(x)[k], expected)


def test_gradients_are_clipped_for_each_seed_as_for_one_network():
    torch.manual_seed(4)
    start = [torch.randn(S, 1, 1, D), torch.randn(S, D, A), torch.randn(S, 1, A)]
    weight = torch.tensor([1e-3, 1.0, 50.0])  # the first seed stays below the bound
    norms = []
    for k in range(S):
        params = [x[k].clone().requires_grad_() for x in start]
        (weight[k] * sum(p.sin().sum() for p in params)).backward()
        norms.append(nn.utils.clip_grad_norm_(params, 0.25).item())
        expected = [p.detach() - p.grad for p in params]
        mine = [x.clone().requires_grad_() for x in start]
        dt.clipped_step(torch.optim.SGD(mine, lr=1.0), weight * sum(p.sin().flatten(1).sum(1) for p in mine), 0.25)
        for p, q in zip(mine, expected):
            torch.testing.assert_close(p[k].detach(), q)
    assert norms[0] < 0.25 < norms[1] < norms[2]


def load(path, **flags):
    wanted = dt.Args(dataset_id=str(path), device="cpu", batch_size=2, eval_episodes=0, **flags)
    data = dt.load(wanted)
    dt.prepare(data, wanted)
    return data


def test_returns_to_go_begin_anew_with_each_episode_and_hold_the_reward_of_their_step(tmp_path):
    data = load(made(tmp_path / "x-v0", [4, 3, 5], ["terminal", "timeout", ""]))  # rewards 0, 1, ..., 11
    assert data.rtg.tolist() == [6, 6, 5, 3, 15, 11, 6, 45, 38, 30, 21, 11]
    assert data.timestep.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]
    assert data.last.tolist() == [3] * 4 + [6] * 3 + [11] * 5
    assert data.returns.tolist() == [6, 15, 45] and data.target == 45
    assert load(tmp_path / "x-v0", target_return=12.5).target == 12.5
    torch.testing.assert_close(data.obs[:, :2].std(0, correction=0), torch.ones(2), rtol=1e-5, atol=0)


def test_windows_begin_anywhere_and_end_with_their_episode(tmp_path):
    data = load(made(tmp_path / "x-v0", [4, 3, 9], ["terminal", "timeout", ""]))
    raw = data.obs * data.std + data.mean  # (episode, step, 0.1)
    data.obs = raw.round(decimals=3)
    torch.manual_seed(0)
    rtg, s, a, t, valid = dt.windows(data, SimpleNamespace(num_seeds=S, batch_size=4000, context=K, device="cpu"))
    assert rtg.shape == t.shape == valid.shape == (S, 4000, K) and s.shape == (S, 4000, K, 3)
    episode, step = s[..., 0], s[..., 1]
    assert (episode == episode[..., :1]).all() and (step == t).all()  # not even a pad is another episode's
    length = torch.tensor([4, 3, 9])[episode[..., 0].long()]
    torch.testing.assert_close(valid.sum(-1), (length - t[..., 0]).clamp(max=K).float())
    assert ((t - t[..., :1])[valid > 0] == torch.arange(K).expand_as(t)[valid > 0]).all()
    assert (valid[..., :-1] >= valid[..., 1:]).all()
    torch.testing.assert_close(a[..., 0] * 100, step, rtol=1e-4, atol=1e-4)
    first = torch.tensor([0, 4, 7])[episode[..., 0].long()] + t[..., 0]
    share = torch.stack([torch.bincount(first[k], minlength=16) for k in range(S)]) / 4000
    assert (share - 1 / 16).abs().max() < 0.02 and not torch.equal(first[0], first[1])


def test_timestep_embedding_is_shared_by_a_steps_tokens_learned_and_clipped(monkeypatch):
    agent, batch = make(), make_batch()
    actor, t = agent.actor, batch[3]
    (grad,) = torch.autograd.grad(dt.actor_loss(actor, batch).sum(), [actor.time])
    for k in range(S):
        used = set(t[k][batch[-1][k] > 0].tolist())
        assert set(grad[k].abs().sum(-1).nonzero().flatten().tolist()) == used
    before, seen = actor.time.detach().clone(), []
    actor.norm_in.register_forward_hook(lambda module, x, y: seen.append(x[0]))
    for p in actor.embed_rtg, actor.embed_s, actor.embed_a:
        p.weight.data.zero_()
        p.bias.data.zero_()
    actor(*batch[:4])
    for i in range(3):  # R, s and a of a step get one embedding, and the next step another
        torch.testing.assert_close(seen[0][1, 2, i::3], before[1, t[1, 2]])
    late = [*batch[:3], t + 100]
    assert torch.equal(actor(*late), actor(*batch[:3], torch.full_like(t, T_MAX - 1)))
    monkeypatch.setattr(dt, "windows", lambda data, args: make_batch())
    agent.update()
    assert not torch.equal(before, actor.time)


def test_rate_rises_and_everything_decays(monkeypatch):
    agent = make(warmup=4, learning_rate=0.1)
    monkeypatch.setattr(dt, "windows", lambda data, args: make_batch())
    rates = []
    for _ in range(6):
        agent.update()
        rates.append(agent.actor_opt.param_groups[0]["lr"].item())
    np.testing.assert_allclose(rates, [0.025, 0.05, 0.075, 0.1, 0.1, 0.1], rtol=1e-6)
    (group,) = agent.actor_opt.param_groups
    assert group["weight_decay"] == 1e-4 and len(group["params"]) == len(list(agent.actor.parameters()))
    assert isinstance(agent.actor_opt, torch.optim.AdamW)


def test_dropout_acts_in_training_and_not_in_evaluation():
    actor, steps = make(dropout=0.5).actor, make_batch()[:4]
    actor.time.data[1:] = actor.time.data[0]
    assert not torch.equal(actor(*steps), actor(*steps))
    assert torch.equal(actor.eval()(*steps), actor(*steps))
    task = SimpleNamespace(mean=torch.zeros(O), std=torch.ones(O), shift=torch.zeros(A), scale=torch.ones(A),
                           target=torch.tensor(1.0))
    raw = dt.RawPolicy(actor.train(), S, task)
    assert torch.equal(raw(*steps), raw(*steps)) and actor.training


def tensors_of(agent):
    states = agent.actor.state_dict(), agent.actor_opt.state_dict()["state"]
    return {name: x for name, x in flat(states).items() if x.dim()}


def test_nan_in_seed_0_leaves_the_others_bit_identical(monkeypatch):
    found = []
    for poison in False, True:
        agent, feed = make(), [make_batch(seed) for seed in range(4)]
        if poison:
            feed[1][1][0] = torch.nan
        feed = iter(feed)
        monkeypatch.setattr(dt, "windows", lambda data, args: next(feed))
        for _ in range(4):
            agent.update()
        found.append(tensors_of(agent))
    clean, poisoned = found
    assert all(len(x) == S and torch.equal(x[1:], poisoned[name][1:]) for name, x in clean.items())
    assert poisoned["/0/head.weight"][0].isnan().all()


def test_seeds_together_equal_seeds_apart(monkeypatch):
    def trained(agent, who):
        feed = iter([[x[who] for x in make_batch(seed)] for seed in range(4)])
        monkeypatch.setattr(dt, "windows", lambda data, args: next(feed))
        for _ in range(4):
            agent.update()
        return tensors_of(agent)

    start = make().actor.state_dict()
    together = trained(make(), slice(None))
    for k in range(S):
        agent = make(num_seeds=1)
        agent.actor.load_state_dict({name: x[k : k + 1] for name, x in start.items()})
        for name, x in trained(agent, slice(k, k + 1)).items():
            values = slice(D if name.endswith("key_value.bias") else 0, None)  # a key's bias: gradients of rounding
            expected = together[name][k][..., values]
            torch.testing.assert_close(x[0][..., values], expected, rtol=1e-4, atol=1e-6, msg=name)


class Sum(gym.Env):
    """Six steps, each of which rewards its action; observations are noise."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action):
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), float(action[0]), False, False, {}


gym.register("Sum-v0", Sum, max_episode_steps=6)


class Spy(nn.Module):
    """Looks at what `evaluate` hands a policy; agent k in episode i does k / 10 + i / 100. Agent 1 is not finite."""

    policy, shift, target, seen = SimpleNamespace(context=4), torch.zeros(1), torch.tensor(7.0), []

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.0], [torch.nan], [0.0]]))

    def forward(self, *window):
        self.seen.append([x.clone() for x in window])
        return torch.arange(S).view(S, 1, 1) / 10 + torch.arange(2).view(1, 2, 1) / 100


def test_acting_takes_rewards_off_the_target_and_sees_the_last_steps():
    spec, seeds, Spy.seen = gym.make("Sum-v0").spec, np.arange(6).reshape(S, 2), []
    rows = dt.evaluate(pickle.dumps(Spy()), pickle.dumps(spec), seeds, 0.9, (0.0, 2.0))
    assert rows.shape == (S, 5) and np.isnan(rows[1]).all() and len(Spy.seen) == 6
    for row, a in (rows[0], 0.005), (rows[2], 0.205):
        assert row.tolist() == pytest.approx([6 * a, 0.03, a * sum(0.9**t for t in range(6)), 6, 300 * a])
    env = gym.make("Sum-v0")
    obs, action = [env.reset(seed=5)[0]], 0.21  # agent 2, episode 1
    for t, (rtg, o, a, timestep) in enumerate(Spy.seen):
        assert rtg.shape == timestep.shape == (S, 2, min(t + 1, 4))
        steps = list(range(max(0, t - 3), t + 1))
        assert timestep[2, 1].tolist() == steps and timestep.dtype == torch.long
        np.testing.assert_allclose(rtg[2, 1], [7 - action * i for i in steps], rtol=1e-5)
        np.testing.assert_array_equal(o[2, 1], np.array(obs)[steps])
        np.testing.assert_allclose(a[2, 1, :, 0], [action if i < t else 0 for i in steps], rtol=1e-6)
        obs.append(env.step([action])[0])


def test_export_acts_as_the_evaluation_does(hopper, tmp_path):
    """From raw observations and environment actions; an episode's return is that of a plain loop."""
    flags = dict(num_seeds=2, context=K, target_return=50.0, learning_rate=1e-2, warmup=1)
    folder = dt.main(small("dt", hopper, tmp_path, **flags))
    policy = torch.export.load(folder / "policy.pt2").module()
    steps = [torch.zeros(7, 3, *n) for n in ((), (11,), (3,))]
    assert policy(*steps, torch.zeros(7, 3, dtype=torch.long)).shape == (2, 7, 3)
    env, returns = gym.make("Hopper-v5"), []
    for seed in np.random.SeedSequence([0, 40]).generate_state(4)[2:]:  # of agent 1
        obs, target, ended = env.reset(seed=int(seed))[0], 50.0, False
        steps, rewards = [], []
        while not ended:
            steps = [*steps, [target, obs, np.zeros(3), len(rewards)]][-K:]
            rtg, o, a, t = (torch.tensor(np.array(x))[None] for x in zip(*steps))
            action = policy(rtg.float(), o.float(), a.float(), t)[1, 0].numpy()
            steps[-1][2] = action
            obs, reward, terminated, truncated, _ = env.step(action)
            rewards.append(reward)
            target, ended = target - reward, terminated or truncated
        returns.append(sum(rewards))
    row = list(csv.DictReader((folder / "eval.csv").open()))[-1]
    assert (row["update"], row["seed"]) == ("40", "1")
    assert float(row["return_mean"]) == pytest.approx(np.mean(returns), rel=1e-3)


def test_resume_equals_uninterrupted_to_the_bit_with_dropout_and_sweep(hopper, tmp_path, monkeypatch):
    flags = dict(num_seeds=2, sweep=True, context=K)
    monkeypatch.setattr(dt, "export", torch.save)  # takes seconds less
    whole = dt.main(small("dt", hopper, tmp_path / "a", **flags))
    with monkeypatch.context() as patch:
        stop_at(dt, 26, patch)
        with pytest.raises(SystemExit) as stopped:
            dt.main(small("dt", hopper, tmp_path / "b", **flags))
    (folder,) = (tmp_path / "b").iterdir()
    assert stopped.value.code == f"dt: stopped at update 26; go on with --resume {folder}"
    assert checkpoint(folder)["update"] == 26 and not (folder / "targets.csv").exists()
    resume(dt, folder)
    a, b = checkpoint(whole), checkpoint(folder)
    assert all(same(a[part], b[part]) for part in ("update", "agent", "moments", "rng"))
    for name in "eval.csv", "losses.csv", "targets.csv":
        assert (whole / name).read_text() == (folder / name).read_text()


def test_what_is_asked_for_is_what_it_brings(tmp_path, monkeypatch):
    """Given that m uniform actions sum to R, each is R / m on average: so much does the policy that fits the data."""
    monkeypatch.setattr(dt, "export", torch.save)  # takes seconds less
    rng, n = np.random.default_rng(0), 500
    action, obs = rng.uniform(-1, 1, (6 * n, 1)), rng.uniform(-1, 1, (6 * n, 2))
    uniform = made(tmp_path / "uniform-v0", [6] * n, ["timeout"] * n, obs_dim=2, observations=obs, actions=action,
                   rewards=action[:, 0])
    flags = dict(num_seeds=2, num_updates=500, batch_size=64, hidden_dim=32, num_layers=1, context=6, dropout=0.0,
                 learning_rate=1e-3, warmup=50, return_scale=3.0, env_id="Sum-v0", eval_every=500, sweep=True,
                 max_norm=1.0)
    folder = dt.main(small("dt", uniform, tmp_path, **flags))
    best = action.reshape(n, 6).sum(1).max()
    rows = [{name: float(x) for name, x in row.items()} for row in csv.DictReader((folder / "targets.csv").open())]
    assert sorted({row["target"] for row in rows})[4] == pytest.approx(best, abs=1e-3) and len(rows) == 14
    for row in rows[:10]:  # up to the data's best
        assert row["return_mean"] == pytest.approx(row["target"], abs=0.5)
    evaluated = list(csv.DictReader((folder / "eval.csv").open()))
    assert [float(row["return_mean"]) for row in evaluated] == [row["return_mean"] for row in rows[8:10]]
    policy = torch.load(folder / "policy.pt2", weights_only=False)
    obs, first = torch.rand(500, 1, 2) * 2 - 1, torch.zeros(500, 1, dtype=torch.long)
    for asked in 2.0, -2.0:
        action = policy(torch.full((500, 1), asked), obs, torch.zeros(500, 1, 1), first)
        np.testing.assert_allclose(action.mean((1, 2)), asked / 6, atol=0.12)


@pytest.mark.parametrize("flags, word", [
    ({"num_heads": 3}, "--num-heads 3"), ({"return_scale": 0.0}, "--return-scale"), ({"context": 0}, "--context"),
    ({"weight_decay": -1.0}, "--weight-decay"), ({"max_norm": float("nan")}, "--max-norm"),
    ({"dropout": 2.0}, "--dropout"), ({"dropout": 1.0}, "--dropout"),
    ({"target_return": float("nan")}, "--target-return"), ({"sweep": True, "eval_episodes": 0}, "--sweep")])
def test_impossible_flags(flags, word, hopper, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        dt.main(small("dt", hopper, tmp_path / "out", **flags))
    message = stopped.value.code
    assert message.startswith("dt: --") and word in message and "\n" not in message and not (tmp_path / "out").exists()
