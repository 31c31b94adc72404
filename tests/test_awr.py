"""awr.py: TD(lambda) against its recursion, weights of each seed apart, turns of V and pi, and problems in closed form."""
import csv
import math
from types import SimpleNamespace

import awr
import numpy as np
import pytest
import torch
from conftest import checkpoint, flat, made, resume, same, small, stop_at

S, B, O, A = 3, 5, 4, 6


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(S, B, O), torch.rand(S, B, A) * 2 - 1, torch.randn(S, B)


def forward(net, k, x):
    """One network of a module by plain matrix products, on one vector."""
    x = x.unsqueeze(0)
    for layer in net:
        x = x @ layer.weight[k] + layer.bias[k] if hasattr(layer, "weight") else layer(x)
    return x[0].detach()


def close(tensor, expected):
    assert tensor.shape == (S,)
    np.testing.assert_allclose(tensor.detach(), expected, rtol=2e-5, atol=1e-6)


def test_losses_by_hand(batch):
    """The third of the batch is R to V and w to pi."""
    s, a, x = batch
    torch.manual_seed(1)
    value, actor = awr.Value(S, O, 8), awr.Actor(S, O, A, 8)
    actor.log_std.data += torch.linspace(-1, 1, S * A).view(S, 1, A)
    errors, policy = np.zeros((2, S))
    for k in range(S):
        for i in range(B):
            errors[k] += (x[k, i] - forward(value.net, k, s[k, i])).item() ** 2 / B
            normal = torch.distributions.Normal(torch.tanh(forward(actor.net, k, s[k, i])), actor.log_std[k, 0].detach().exp())
            policy[k] -= x[k, i].item() * normal.log_prob(a[k, i]).sum().item() / B
    assert value(s).shape == (S, B) and actor(s).shape == (S, B, A) and actor.log_prob(s, a).shape == (S, B)
    close(awr.value_loss(value, batch), errors)
    close(awr.actor_loss(actor, batch), policy)


LENGTHS, ENDS = [5, 1, 9, 1, 2, 6], ["terminal", "timeout", "timeout", "terminal", "", "terminal"]


def steps(lengths=LENGTHS, ends=ENDS, seed=0):
    rng, N = np.random.default_rng(seed), sum(lengths)
    data = SimpleNamespace(obs=torch.tensor(rng.normal(size=(N, O))).float(), reward=torch.tensor(rng.normal(size=N)).float())
    data.next_obs, data.action = (torch.tensor(rng.normal(size=(N, n))).float() for n in (O, A))
    data.episode = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    data.terminated = torch.zeros(N)
    for end, kind in zip(np.cumsum(lengths) - 1, ends):
        data.terminated[end] = float(kind == "terminal")
    inner = data.episode[1:] == data.episode[:-1]
    data.next_obs[:-1][inner] = data.obs[1:][inner]
    return data


def recursion(v_next, data, gamma, lam):
    """R of one seed from the last step of each episode to its first, in float64."""
    reward, d, episode = data.reward.double().numpy(), data.terminated.numpy(), data.episode.numpy()
    ret = np.zeros(len(reward))
    for t in reversed(range(len(reward))):
        v = float(v_next[t])
        if t + 1 == len(reward) or episode[t + 1] != episode[t]:
            ret[t] = reward[t] + (0 if d[t] else gamma * v)
        else:
            ret[t] = reward[t] + gamma * ((1 - lam) * v + lam * ret[t + 1])
    return ret


@pytest.mark.parametrize("lengths, ends", [(LENGTHS, ENDS), ([16], ["terminal"]), ([17], ["timeout"]), ([1, 1], ["", "terminal"])])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_td_lambda_is_its_recursion(lam, lengths, ends):
    data, args = steps(lengths, ends), awr.Args(gamma=0.9, td_lambda=lam)
    awr.prepare(data, args)
    v_next = torch.randn(S, len(data.reward))
    ret = awr.td_lambda(v_next, data, args)
    assert ret.shape == (S, len(data.reward))
    for k in range(S):
        np.testing.assert_allclose(ret[k], recursion(v_next[k], data, 0.9, lam), rtol=1e-4, atol=1e-5)


def test_a_long_episode_has_its_discounted_return():
    data, args = steps([1000, 3], ["terminal", "terminal"]), awr.Args(gamma=0.99, td_lambda=1.0)
    awr.prepare(data, args)
    ret = awr.td_lambda(torch.full((S, 1003), 1e6), data, args)  # V is asked nowhere
    expected = (data.reward[:1000].double() * 0.99 ** torch.arange(1000, dtype=torch.float64)).sum()
    np.testing.assert_allclose(ret[:, 0], np.full(S, expected), rtol=1e-4, atol=1e-4)


def test_v_is_asked_where_an_episode_is_cut_off_and_not_where_it_terminates():
    data, args = steps([4, 4], ["terminal", "timeout"]), awr.Args(gamma=0.5, td_lambda=1.0)
    data.reward = torch.zeros(8)
    awr.prepare(data, args)
    v_next = torch.zeros(S, 8)
    v_next[:, [3, 7]] = 16.0
    assert awr.td_lambda(v_next, data, args).tolist() == [[0, 0, 0, 0, 1, 2, 4, 8]] * S


def test_nothing_leaks_from_one_episode_to_another():
    data, args = steps(), awr.Args(td_lambda=1.0)
    awr.prepare(data, args)
    v_next = torch.randn(S, 24)
    before = awr.td_lambda(v_next, data, args)
    data.reward[6:15] += 1000  # episode 2
    after = awr.td_lambda(v_next, data, args)
    other = data.episode != 2
    assert torch.equal(before[:, other], after[:, other]) and (after[:, ~other] > before[:, ~other] + 900).all()


def test_weights_by_hand():
    """A to mean 0 and deviation 1 of its seed, divided by beta, 20 at most, after exp, which overflows here."""
    adv = torch.randn(S, 50) * torch.tensor([[1.0], [10], [100]]) + torch.tensor([[0.0], [50], [-300]])
    adv[1, 7] = 3e3
    for beta in 1.0, 0.05:
        w = awr.weights(adv, SimpleNamespace(beta=beta))
        for k in range(S):
            x = adv[k].double().numpy()
            x = (x - x.mean()) / (x.std() + 1e-5)
            np.testing.assert_allclose(w[k], np.minimum(np.exp(np.minimum(x / beta, 50)), 20), rtol=2e-3)
    assert w.isfinite().all() and w[1, 7] == 20
    assert awr.weights(torch.zeros(S, 9), SimpleNamespace(beta=1.0)).tolist() == [[1.0] * 9] * S


def agent_for(S=S, data=None, **flags):
    args = awr.Args(**{**dict(num_seeds=S, hidden_dim=16, batch_size=8, value_steps=4, turn_steps=3, device="cpu"), **flags})
    data = data or steps()
    data.obs, data.next_obs = data.obs.clone(), data.next_obs.clone()
    awr.prepare(data, args)
    torch.manual_seed(0)
    return awr.Agent(args, data.obs.shape[1], data.action.shape[1], data)


def test_evaluate_asks_v_at_the_next_observation_of_every_step():
    """It goes over the observations once, since the next one is mostly in the next row."""
    agent, data = agent_for(), steps()
    for p in agent.value.parameters():
        p.data += torch.randn_like(p)
    agent.evaluate()
    data.obs, data.next_obs = agent.data.obs, agent.data.next_obs
    for k in range(S):
        v_next = [forward(agent.value.net, k, x).item() for x in data.next_obs]
        expected = recursion(v_next, data, 0.99, 0.95)
        np.testing.assert_allclose(agent.ret[k], expected, rtol=1e-4, atol=1e-4)
        adv = expected - np.array([forward(agent.value.net, k, x).item() for x in data.obs])
        np.testing.assert_allclose(agent.weight[k], np.minimum(np.exp((adv - adv.mean()) / (adv.std() + 1e-5)), 20), rtol=1e-3)


def test_prepare_normalises_observations_and_knows_where_episodes_end():
    data, raw, args = steps(), steps(), awr.Args()
    raw.next_obs = data.next_obs.clone()
    awr.prepare(data, args)
    assert data.last.nonzero().flatten().tolist() == [4, 5, 14, 15, 17, 23] and data.longest == 9
    torch.testing.assert_close(data.obs.mean(0), torch.zeros(O), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.obs * data.std + data.mean, raw.obs)
    torch.testing.assert_close(data.next_obs * data.std + data.mean, raw.next_obs)


def test_a_draw_brings_each_seeds_own_label():
    agent = agent_for()
    agent.args.batch_size = 100
    x = torch.arange(S).unsqueeze(1) * 100.0 + torch.arange(24)
    s, a, label = awr.draw(agent.data, x, agent.args)
    i = (label - torch.arange(S).unsqueeze(1) * 100).long()
    assert s.shape == (S, 100, O) and torch.equal(s, agent.data.obs[i]) and torch.equal(a, agent.data.action[i])
    assert set(i[0].tolist()) == set(range(24)) and not torch.equal(i[0], i[1])


def test_v_is_fitted_to_the_old_r_and_pi_to_weights_by_the_new_v(monkeypatch):
    agent, seen, loss = agent_for(), [], awr.value_loss
    monkeypatch.setattr(awr, "draw", lambda data, x, args, draw=awr.draw: seen.append(x.clone()) or draw(data, x, args))
    old = agent.ret.clone()
    agent.evaluate()
    assert torch.equal(agent.ret, old)  # it begins with those of the first V
    agent.turn()
    assert len(seen) == 4 and all(torch.equal(x, old) for x in seen) and not torch.equal(agent.ret, old)
    new, weight = agent.ret.clone(), agent.weight.clone()
    agent.evaluate()
    assert torch.equal(agent.ret, new) and torch.equal(agent.weight, weight)  # they are those of the present V
    before = [p.clone() for p in agent.value.parameters()]
    agent.update()
    assert torch.equal(seen[4], weight) and torch.equal(agent.weight, weight)
    assert all(map(torch.equal, before, agent.value.parameters()))


def test_turns_come_before_their_steps(hopper, tmp_path, monkeypatch):
    calls = []
    for name in "turn", "update":
        method = getattr(awr.Agent, name)
        monkeypatch.setattr(awr.Agent, name, lambda self, name=name, method=method: calls.append(name[0]) or method(self))
    awr.main(small("awr", hopper, tmp_path, num_updates=7, turn_steps=3, value_steps=2, eval_episodes=0))
    assert "".join(calls) == "tuuutuuutu"


@pytest.mark.parametrize("lam", [0.0, 0.9])
def test_v_of_a_chain_is_that_of_the_behaviour(lam):
    """Five states in a row, reward 1 for each step, gamma 0.8: V(t) = (1 - 0.8^(5 - t)) / 0.2, whatever lambda."""
    n = 20
    data = SimpleNamespace(obs=torch.eye(5).repeat(n, 1), next_obs=torch.eye(5).roll(-1, 0).repeat(n, 1), reward=torch.ones(5 * n),
                           action=torch.zeros(5 * n, 1), terminated=torch.tensor([0.0, 0, 0, 0, 1]).repeat(n),
                           episode=torch.arange(n).repeat_interleave(5))
    agent = agent_for(data=data, gamma=0.8, td_lambda=lam, value_steps=20, batch_size=32, learning_rate=1e-2)
    for _ in range(20):
        agent.turn()
    v = agent.value(agent.data.obs[:5]).detach()
    np.testing.assert_allclose(v, np.tile((1 - 0.8 ** np.arange(5, 0, -1)) / 0.2, (S, 1)), atol=0.15)


def test_a_bandit_in_closed_form():
    """Reward -(a - 0.5)^2 under uniform actions: pi is the Gaussian that is nearest to exp(A / beta)."""
    n, beta, a = 2000, 0.4, np.linspace(-1, 1, 2000)
    zeros, action = torch.zeros(n, 1), torch.tensor(a).float().unsqueeze(-1)
    data = SimpleNamespace(obs=zeros, next_obs=zeros, action=action, reward=-(action[:, 0] - 0.5).square(),
                           terminated=torch.ones(n), episode=torch.arange(n))
    agent = agent_for(data=data, beta=beta, batch_size=128, learning_rate=1e-2, value_steps=50)
    for i in range(300):
        if i in (0, 100):
            agent.turn()
        if i == 200:
            agent.actor_opt.param_groups[0]["lr"].fill_(1e-3)
        agent.update()
    adv = -np.square(a - 0.5)
    weight = np.minimum(np.exp((adv - adv.mean()) / adv.std() / beta), 20)
    mean = (weight * a).sum() / weight.sum()
    std = np.sqrt((weight * np.square(a - mean)).sum() / weight.sum())
    assert 0.3 < mean < 0.48
    np.testing.assert_allclose(agent.policy(agent.data.obs[:1])[:, 0, 0].detach(), np.full(S, mean), atol=0.05)
    np.testing.assert_allclose(agent.actor.log_std.exp().flatten().detach(), np.full(S, std), rtol=0.1)


# --- as tests/test_runs.py does, on labels of all steps ---
def tensors_of(agent):
    opts = {name: x.state_dict()["state"] for name, x in vars(agent).items() if isinstance(x, torch.optim.Optimizer)}
    return {name: x for name, x in flat({"agent": agent.state_dict(), **opts}).items() if x.dim()}


def trained(agent, monkeypatch, who=slice(None)):
    """Two turns with prepared draws, those of the seeds `who` of S."""
    rng, randint = torch.Generator().manual_seed(5), torch.randint
    monkeypatch.setattr(torch, "randint", lambda high, shape, **_: randint(high, (S, *shape[1:]), generator=rng)[who])
    for _ in range(2):
        agent.turn()
        for _ in range(3):
            agent.update()
    monkeypatch.undo()
    return tensors_of(agent)


def test_nan_in_seed_0_leaves_the_others_bit_identical(monkeypatch):
    found = []
    for poison in False, True:
        agent = agent_for()
        if poison:
            agent.value.net[0].weight.data[0] = agent.actor.net[0].weight.data[0] = torch.nan
        found.append(trained(agent, monkeypatch))
    clean, poisoned = found
    assert all(torch.equal(x[1:], poisoned[name][1:]) for name, x in clean.items())
    assert poisoned["/agent/ret"][0].isnan().all() and poisoned["/agent/weight"][0].isnan().all()


def test_seeds_together_equal_seeds_apart(monkeypatch):
    together = agent_for()
    start = {name: x.clone() for name, x in tensors_of(together).items()}
    together = trained(together, monkeypatch)
    for k in range(S):
        apart = agent_for(1)
        for name, x in tensors_of(apart).items():
            x.copy_(start[name][k : k + 1])
        for name, x in trained(apart, monkeypatch, slice(k, k + 1)).items():
            torch.testing.assert_close(x[0], together[name][k], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("stop", [16, 26])
def test_resume_equals_uninterrupted_to_the_bit(stop, hopper, tmp_path, monkeypatch):
    """At the end of a turn and within one."""
    flags = dict(num_seeds=2, turn_steps=8, value_steps=3)
    whole = awr.main(small("awr", hopper, tmp_path / "a", **flags))
    stop_at(awr, stop, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        awr.main(small("awr", hopper, tmp_path / "b", **flags))
    monkeypatch.undo()
    (folder,) = (tmp_path / "b").iterdir()
    assert stopped.value.code == f"awr: stopped at update {stop}; go on with --resume {folder}"
    resume(awr, folder)
    a, b = checkpoint(whole), checkpoint(folder)
    assert a["update"] == 40 and all(same(a[part], b[part]) for part in ("update", "agent", "moments", "rng"))
    for name in "eval.csv", "losses.csv":
        assert (whole / name).read_text() == (folder / name).read_text()
    rows = list(csv.DictReader((whole / "losses.csv").open()))
    assert {row["name"] for row in rows} == {"value_loss", "actor_loss"} and all(math.isfinite(float(x["value"])) for x in rows)
    policy = torch.export.load(whole / "policy.pt2").module()
    assert policy(torch.zeros(7, 11)).shape == (2, 7, 3)
    assert all(x.shape[0] == 2 for x in flat(a["agent"]).values())


@pytest.mark.parametrize("flags", [{"beta": 0.0}, {"td_lambda": 1.1}])
def test_bad_flags_are_one_sentence(flags, hopper, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        awr.main(small("awr", hopper, tmp_path / "out", **flags))
    assert stopped.value.code == "awr: --td-lambda has to be at most 1, --beta above 0" and not (tmp_path / "out").exists()
