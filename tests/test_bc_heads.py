"""Cloning with a density: each against torch.distributions, its integral, a loop by hand, and demonstrations of two modes."""
import itertools
import math
from types import SimpleNamespace

import bc
import bc_categorical
import bc_gaussian
import bc_gmm
import bc_vae
import numpy as np
import pytest
import test_runs
import torch
from conftest import made, small
from torch.distributions import (Categorical, Independent, MixtureSameFamily, Normal, TanhTransform, TransformedDistribution,
                                 kl_divergence)

S, B, OBS, ACT, H = 3, 5, 4, 2, 6


def actor(module, scale=1.0, **flags):
    """A policy in float64 whose weights are `scale` times what they begin with."""
    torch.manual_seed(0)
    one = module.Actor(S, OBS, ACT, H, **flags).double()
    for p in one.parameters():
        p.data *= scale
    return one


def batch(bound=1.0):
    torch.manual_seed(1)
    return torch.randn(S, B, OBS).double(), bound * (torch.rand(S, B, ACT).double() * 2 - 1)


def head(one, k, s, net="net"):
    """What a network of agent k gives for one state, layer by layer, before any tanh."""
    layers = [layer for layer in getattr(one, net) if hasattr(layer, "weight")]
    for i, layer in enumerate(layers):
        s = s @ layer.weight[k] + layer.bias[k, 0]
        s = s.clamp(min=0) if i + 1 < len(layers) else s
    return s


def close(tensor, expected):
    assert tensor.shape == (S,)
    np.testing.assert_allclose(tensor.detach().numpy(), expected, rtol=1e-10)


def box(n, bound=1.0):
    """The midpoints (n^2, 2) of n^2 cells of [-bound, bound]^2, and the area of one."""
    x = ((torch.arange(n).double() + 0.5) / n * 2 - 1) * bound
    return torch.cartesian_prod(x, x), (2 * bound / n) ** 2


def integral(one, n, bound=1.0):
    """Of exp(log pi(a|s)) over actions, for two states and each agent: (S, 2)."""
    (a, area), s = box(n, bound), batch()[0][:, :2]
    found = [one.log_prob(s[:, [i]].expand(S, len(a), OBS), a.expand(S, -1, -1)).exp().sum(-1) * area for i in range(2)]
    return torch.stack(found, -1).detach()


def trained(module, updates, obs, action, **flags):
    """Two agents after so many updates on these transitions."""
    rest = torch.zeros(len(obs))
    data = SimpleNamespace(obs=obs, action=action, reward=rest, next_obs=obs, terminated=rest)
    flags = dict(hidden_dim=64, batch_size=128, learning_rate=3e-3) | flags
    agent = module.Agent(module.Args(num_seeds=2, device="cpu", **flags), obs.shape[-1], action.shape[-1], data)
    for _ in range(updates):
        agent.update()
    return agent


def two_modes(module, updates, **flags):
    """Actions (2, 1000, 2) of two agents in random states, where a demonstration goes to (0.7, 0.5) or (-0.7, -0.5),
    a coin's throw whatever the state is."""
    torch.manual_seed(0)
    side = torch.randint(2, (2000, 1)) * 2.0 - 1
    action = torch.tensor([0.7, 0.5]) * side + 0.03 * torch.randn(2000, 2)
    agent = trained(module, updates, torch.rand(2000, 3) * 2 - 1, action, **flags)
    with torch.no_grad():
        return agent.policy(torch.rand(2, 1000, 3) * 2 - 1)


def keeps_both(drawn, near, share):
    """Whether `share` of the actions lie within `near` of one of the two modes, about half of them at each."""
    gap = [(drawn - torch.tensor([0.7, 0.5]) * side).abs().amax(-1) < near for side in (1, -1)]
    right, left = (x.float().mean(-1) for x in gap)
    return (right + left).min() >= share and (right - left).abs().max() < 0.15


def test_squared_error_falls_between_two_modes():
    drawn = two_modes(bc, 300)
    assert drawn[..., 0].abs().mean() < 0.25 and not keeps_both(drawn, 0.3, 0.1)


# --- bc_gaussian ---
def test_gaussian_log_probability_is_that_of_a_tanh_of_a_normal():
    one, (s, a) = actor(bc_gaussian, 3.0), batch(0.999)
    mean, log_std = one.net(s).chunk(2, -1)
    std = (-5 + 5 * (torch.tanh(log_std) + 1) / 2).exp()
    assert std.min() < 0.05 and std.max() <= 1
    squashed = TransformedDistribution(Normal(mean, std), TanhTransform())
    torch.testing.assert_close(one.log_prob(s, a), squashed.log_prob(a).sum(-1))
    torch.testing.assert_close(one(s), torch.tanh(mean))


def test_gaussian_loss_by_hand():
    one, (s, a) = actor(bc_gaussian), batch(0.999)
    expected = []
    for k in range(S):
        total = 0.0
        for i in range(B):
            x = head(one, k, s[k, i]).tolist()
            for j in range(ACT):
                u, std = math.atanh(a[k, i, j]), math.exp(-5 + 2.5 * (math.tanh(x[ACT + j]) + 1))
                density = math.exp(-0.5 * ((u - x[j]) / std) ** 2) / (std * math.sqrt(2 * math.pi))
                total -= (math.log(density) - math.log(1 - a[k, i, j].item() ** 2)) / B
        expected.append(total)
    close(bc_gaussian.actor_loss(one, (s, a)), expected)


def test_gaussian_integrates_to_one_over_the_box():
    torch.testing.assert_close(integral(actor(bc_gaussian), 200), torch.ones(S, 2).double(), rtol=1e-3, atol=0)


def test_gaussian_is_finite_where_the_data_is_at_the_bounds(tmp_path):
    folder = made(tmp_path / "x", [30], ["timeout"], actions=np.tile(np.array([[-1, 1]], np.float32), (30, 1)))
    args = bc_gaussian.Args(dataset_id=folder, eval_episodes=0, batch_size=8, device="cpu")
    data = bc_gaussian.load(args)
    one = bc_gaussian.Actor(1, 3, 2, H)
    assert bc_gaussian.actor_loss(one, (data.obs[None], data.action[None])).isnan()
    bc_gaussian.prepare(data, args)
    assert data.action.abs().max() < 1
    agent = bc_gaussian.Agent(args, 3, 2, data)
    for _ in range(20):
        loss = agent.update()["actor_loss"]
    assert loss.isfinite() and all(p.isfinite().all() for p in agent.parameters())


def test_gaussian_finds_mean_and_deviation_before_the_tanh():
    """Maximum likelihood of tanh(u), u ~ N(m, d^2), whatever s is: mu = m and sigma = d."""
    torch.manual_seed(0)
    m, d = torch.tensor([0.8, -0.3]), torch.tensor([0.5, 0.1])
    obs = torch.rand(4000, 3) * 2 - 1
    action = torch.tanh(m + d * torch.randn(4000, 2))
    agent = trained(bc_gaussian, 400, obs, action)
    mean, log_std = agent.actor.net(torch.rand(2, 500, 3) * 2 - 1).detach().chunk(2, -1)
    torch.testing.assert_close(mean.mean(1), m.expand(2, 2), rtol=0, atol=0.06)
    std = (-5 + 2.5 * (torch.tanh(log_std) + 1)).exp()
    torch.testing.assert_close(std.mean(1), d.expand(2, 2), rtol=0.15, atol=0)


def test_one_gaussian_falls_between_two_modes_like_squared_error():
    assert two_modes(bc_gaussian, 300)[..., 0].abs().mean() < 0.3


# --- bc_gmm ---
def mixture(one, s, K):
    """Its parts from the network's output: K times a logit, the means, the raw deviations."""
    x = one.net(s).unflatten(-1, (K, -1))
    return x[..., 0], torch.tanh(x[..., 1 : 1 + ACT]), torch.nn.functional.softplus(x[..., 1 + ACT :]) + 1e-4


def test_mixture_log_probability_is_that_of_torch():
    one, (s, a) = actor(bc_gmm, 3.0, K=5), batch()
    logits, mean, std = mixture(one, s, 5)
    assert logits.softmax(-1).amax(-1).max() > 0.5 and mean.shape == std.shape == (S, B, 5, ACT)
    reference = MixtureSameFamily(Categorical(logits=logits), Independent(Normal(mean, std), 1))
    torch.testing.assert_close(one.log_prob(s, a), reference.log_prob(a))


def test_mixture_loss_by_hand():
    one, (s, a) = actor(bc_gmm, K=4), batch()
    expected = []
    for k in range(S):
        total = 0.0
        for i in range(B):
            parts = head(one, k, s[k, i]).view(4, 1 + 2 * ACT).tolist()
            weight, density = [math.exp(part[0]) for part in parts], 0.0
            for w, (_, *rest) in zip(weight, parts):
                product = w / sum(weight)
                for j in range(ACT):
                    std = math.log(1 + math.exp(rest[ACT + j])) + 1e-4
                    z = (a[k, i, j].item() - math.tanh(rest[j])) / std
                    product *= math.exp(-0.5 * z**2) / (std * math.sqrt(2 * math.pi))
                density += product
            total -= math.log(density) / B
        expected.append(total)
    close(bc_gmm.actor_loss(one, (s, a)), expected)


def test_mixture_integrates_to_one_over_the_plane_and_to_less_over_the_box():
    one = actor(bc_gmm, K=5)
    torch.testing.assert_close(integral(one, 150, bound=7.0), torch.ones(S, 2).double(), rtol=1e-6, atol=0)
    assert integral(one, 100).max() < 0.99


@torch.no_grad()
def test_mixture_draws_a_component_by_its_weight_and_stays_at_its_mean():
    one, n = actor(bc_gmm, 3.0, K=5), 40_000
    one.net[-1].bias.data.view(S, 1, 5, -1)[..., 1:] = 0  # only the weights depend on what follows
    one.net[-1].weight.data.view(S, H, 5, -1)[..., 1:] = 0
    place = torch.linspace(-2, 2, 5).double()
    one.net[-1].bias.data.view(S, 1, 5, -1)[..., 1] = place
    one.net[-1].bias.data.view(S, 1, 5, -1)[..., 2] = place.abs()
    s = batch()[0][:, :1]
    torch.manual_seed(0)
    drawn = one(s.expand(S, n, OBS))
    mean = torch.stack([torch.tanh(place), torch.tanh(place.abs())], -1)  # (5, 2)
    gap, k = (drawn.unsqueeze(-2) - mean).abs().amax(-1).min(-1)
    assert gap.max() < 1e-3 and (drawn - mean[k]).std().item() == pytest.approx(1e-4, rel=0.02)
    weight = one.net(s).unflatten(-1, (5, -1))[:, 0, :, 0].softmax(-1)  # (S, 5)
    found = torch.stack([k[j].bincount(minlength=5) for j in range(S)]) / n
    assert weight.max() > 0.4 and (found - weight).abs().max() < 4 * 0.5 / n**0.5


def test_mixture_keeps_two_modes():
    assert keeps_both(two_modes(bc_gmm, 500), 0.1, 0.95)


def test_mixture_is_finite_on_demonstrations_without_noise():
    """A deviation that is not bounded below would go to 0 and the loss to -inf."""
    agent = trained(bc_gmm, 400, torch.zeros(200, 3), torch.tensor([1.0, -0.3]).expand(200, 2))
    *_, std = agent.actor.mixture(torch.zeros(2, 1, 3))
    loss = agent.update()["actor_loss"]
    assert loss.isfinite().all() and std.min() >= 1e-4
    assert (agent.policy(torch.zeros(2, 7, 3)) - torch.tensor([1.0, -0.3])).abs().max() < 0.05


@torch.no_grad()
def test_mixture_acts_in_the_box():
    one = bc_gmm.Actor(S, OBS, ACT, H, 5)
    one.net[-1].bias.data += 30  # every mean is 1
    drawn = one(torch.randn(S, 200, OBS))
    assert drawn.max() == 1 and drawn.min() > 0.99


# --- bc_vae ---
@pytest.mark.parametrize("shift, low, high", [(-3, -4, 15), (14, -4, 15)])
def test_vae_loss_by_hand(shift, low, high, monkeypatch):
    """With log sigma beyond either of its bounds, and the divergence of torch."""
    one, (s, a) = actor(bc_vae, 3.0, clip=0.5), batch()
    Z = 2 * ACT
    one.encoder[-1].bias.data[..., Z:] += shift
    eps = torch.randn(S, B, Z).double()
    monkeypatch.setattr(torch, "randn_like", lambda x: eps)
    loss, expected, seen = bc_vae.actor_loss(one, (s, a)), [], []
    for k in range(S):
        error, kl = [], []
        for i in range(B):
            x = head(one, k, torch.cat([s[k, i], a[k, i]]), "encoder")
            seen += x[Z:].tolist()
            mean, std = x[:Z], x[Z:].clamp(low, high).exp()
            pi = torch.tanh(head(one, k, torch.cat([s[k, i], mean + std * eps[k, i]])))
            error += [(pi[j] - a[k, i, j]).item() ** 2 for j in range(ACT)]
            kl += kl_divergence(Normal(mean, std), Normal(torch.zeros(Z).double(), 1.0)).tolist()
        expected.append(np.mean(error) + 0.5 * np.mean(kl))
    assert min(seen) < low < max(seen) or min(seen) < high < max(seen)
    close(loss, expected)


def test_vae_encoder_learns_from_the_action_as_well_as_from_the_divergence():
    one, (s, a) = actor(bc_vae, clip=0.5), batch()
    mean, log_std = one.encoder(torch.cat([s, a], -1)).chunk(2, -1)
    kl = kl_divergence(Normal(mean, log_std.exp()), Normal(torch.zeros_like(mean), 1.0)).mean((-2, -1))
    for part in kl, bc_vae.actor_loss(one, (s, a)) - kl / 2:
        for grad in torch.autograd.grad(part.sum(), one.encoder.parameters(), retain_graph=True):
            assert (grad.flatten(1).abs().amax(1) > 1e-6).all()


@torch.no_grad()
def test_vae_acts_by_the_decoder_at_clipped_latents(monkeypatch):
    one, (s, _) = actor(bc_vae, 2.0, clip=0.5), batch()
    eps = 2 * torch.randn(S, B, 2 * ACT).double()
    monkeypatch.setattr(torch, "randn", lambda *size, **_: eps)
    assert eps.abs().max() > 1 and eps.abs().min() < 0.5
    found = one(s)
    for k in range(S):
        for i in range(B):
            z = eps[k, i].minimum(torch.tensor(0.5)).maximum(torch.tensor(-0.5))
            torch.testing.assert_close(found[k, i], torch.tanh(head(one, k, torch.cat([s[k, i], z]))))


def test_vae_keeps_two_modes():
    assert keeps_both(two_modes(bc_vae, 500), 0.2, 0.7)


# --- bc_categorical ---
def bin_of(a, n):
    """The bin of a number, by its edges."""
    edges = [2 * k / n - 1 for k in range(n + 1)]
    return max(k for k in range(n) if a >= edges[k])


def hand_log_p(one, j, s, centres, i):
    """Agent j's log probabilities of dimension i's bins for one state, given the centres of the dimensions before it."""
    x = torch.cat([s, torch.tensor([c if e < i else 0.0 for e, c in enumerate(centres[:-1])]).double()])
    layers = list(one.net)[::2]
    for layer in layers:
        x = x @ layer.weight[j, i] + layer.bias[j, i, 0]
        x = x if layer is layers[-1] else x.clamp(min=0)
    return (x - x.exp().sum().log()).tolist()


@pytest.mark.parametrize("n", [1, 2, 7, 11, 21, 256])
def test_bins_are_equal_and_their_centres_in_the_middle(n):
    one = bc_categorical.Actor(S, OBS, ACT, H, n)
    centres, edges = one.centre(torch.arange(n)), torch.linspace(-1, 1, n + 1)
    torch.testing.assert_close(centres, torch.tensor([-1 + (k + 0.5) * 2 / n for k in range(n)]))
    inside = torch.stack([centres, edges[:-1] + 1e-4 / n, edges[1:] - 1e-4 / n]).view(1, -1, 1).expand(S, -1, ACT)
    assert torch.equal(one.index(inside), torch.arange(n).repeat(3).view(1, -1, 1).expand(S, -1, ACT))
    assert one.index(torch.tensor([-1.0, 1.0])).tolist() == [0, n - 1]


@pytest.mark.parametrize("A, n", [(1, 7), (2, 5)])
@torch.no_grad()
def test_joint_index_and_back(A, n, monkeypatch):
    """Each cell of the grid has an index of its own; draws are the centres of the cells, by their probability."""
    one = bc_categorical.Actor(S, OBS, A, H, n, joint=True)
    cells = torch.cartesian_prod(*[one.centre(torch.arange(n))] * A).view(1, n**A, A).expand(S, -1, -1)
    assert sorted(one.index(cells)[0].flatten().tolist()) == list(range(n**A))
    assert torch.equal(one.index(cells + 0.9 / n), one.index(cells - 0.9 / n))
    s = torch.randn(S, 1, OBS).expand(-1, n**A, -1)
    log_p = one.log_prob(s, cells)  # a density: times the area of a cell it sums to one
    torch.testing.assert_close((log_p.exp() * (2 / n) ** A).sum(-1), torch.ones(S))
    sure = one.index(cells)
    monkeypatch.setattr(one, "logits", lambda s, k: 1e4 * torch.nn.functional.one_hot(sure, n**A).float().transpose(1, 2))
    torch.testing.assert_close(one(s), cells)


def test_joint_loss_by_hand():
    n, (s, a), expected = 4, batch(), []
    one = actor(bc_categorical, 3.0, bins=n, joint=True)
    for k in range(S):
        total = 0.0
        for i in range(B):
            x, y = (bin_of(v, n) for v in a[k, i].tolist())
            total -= (hand_log_p(one, k, s[k, i], [], 0)[x + n * y] + 2 * math.log(n / 2)) / B
        expected.append(total)
    np.testing.assert_allclose(bc_categorical.actor_loss(one, (s, a)).detach(), expected, rtol=1e-6)


def test_discrete_actions_as_they_are(monkeypatch):
    """The loss is torch's cross-entropy; draws are integers with the probabilities of the softmax."""
    monkeypatch.setattr(bc_categorical, "DISCRETE", True)
    torch.manual_seed(0)
    one, s, a = bc_categorical.Actor(S, OBS, 4, H, 21), torch.randn(S, B, OBS), torch.randint(4, (S, B))
    logits = one.net(s.unsqueeze(1)).squeeze(1)  # (S, B, 4)
    reference = torch.nn.functional.cross_entropy(logits.flatten(0, 1), a.flatten(), reduction="none").view(S, B).mean(-1)
    torch.testing.assert_close(bc_categorical.actor_loss(one, (s, a)), reference)
    with torch.no_grad():
        drawn = one(s[:, :1].expand(-1, 20_000, -1))
    assert drawn.shape == (S, 20_000) and drawn.dtype == torch.long
    for k in range(S):
        np.testing.assert_allclose(drawn[k].bincount(minlength=4) / 20_000, logits[k, 0].softmax(-1).detach(), atol=0.02)


def test_either_kind_of_actions_by_the_data(hopper, tmp_path, monkeypatch):
    """Discrete, joint and factors in one process: what one run found does not stay for the next."""
    monkeypatch.setattr(bc_categorical, "DISCRETE", False)  # set back at the end
    cartpole = hopper.parents[1] / "cartpole" / "tiny-v0"
    folder = bc_categorical.main(small("bc_categorical", cartpole, tmp_path / "0", num_seeds=3))
    policy = torch.export.load(folder / "policy.pt2").module()
    assert policy(torch.zeros(7, 4)).shape == (3, 7) and policy(torch.zeros(7, 4)).dtype == torch.long
    assert len((folder / "eval.csv").read_text().split()) == 7
    plane = made(tmp_path / "plane", [40], ["timeout"])
    bc_categorical.main(small("bc_categorical", plane, tmp_path / "1", joint=True, eval_episodes=0))
    for data, flags in (hopper, {"joint": True}), (cartpole, {"joint": True}):
        with pytest.raises(SystemExit) as stopped:
            bc_categorical.main(small("bc_categorical", data, tmp_path, **flags))
        assert stopped.value.code == "bc_categorical: --joint is for continuous actions of one or two dimensions"
    with pytest.raises(SystemExit) as stopped:
        bc_categorical.main(small("bc_categorical", tmp_path / "nothing-here", tmp_path))
    assert "bc_categorical: --dataset-id" in stopped.value.code and "\n" not in stopped.value.code


def test_categorical_loss_by_hand_factor_by_factor():
    n, (s, a), expected = 5, batch(), []
    one = actor(bc_categorical, 3.0, bins=n)
    for k in range(S):
        total = 0.0
        for i in range(B):
            bins = [bin_of(x, n) for x in a[k, i].tolist()]
            centres = [(2 * b + 1) / n - 1 for b in bins]
            for j in range(ACT):
                total -= (hand_log_p(one, k, s[k, i], centres, j)[bins[j]] + math.log(n / 2)) / B
        expected.append(total)
    np.testing.assert_allclose(bc_categorical.actor_loss(one, (s, a)).detach(), expected, rtol=1e-6)


@torch.no_grad()
def test_a_dimension_sees_the_bins_before_it_and_nothing_else():
    one = bc_categorical.Actor(S, OBS, 4, H, 5)
    s, k = torch.randn(S, B, OBS), torch.randint(5, (S, B, 4))
    for j in range(4):
        changed = k.clone()
        changed[..., j] = (k[..., j] + 2) % 5
        same = (one.logits(s, k) == one.logits(s, changed)).flatten(2).all(-1)  # (S, 4)
        assert same[:, : j + 1].all() and not same[:, j + 1 :].any()
    low, high = ((2 * k + x) / 5 - 1 for x in (0.1, 1.9))  # within a bin it makes no difference where
    assert torch.equal(one.log_prob(s, low), one.log_prob(s, high))


def test_categorical_integrates_to_one_over_the_box():
    torch.testing.assert_close(integral(actor(bc_categorical, 3.0, bins=5), 50), torch.ones(S, 2).double(), rtol=1e-6, atol=0)


@torch.no_grad()
def test_categorical_draws_whole_actions_by_their_probability():
    n, draws, s = 3, 30_000, batch()[0][:, 0]
    one = actor(bc_categorical, 2.5, bins=n)
    torch.manual_seed(0)
    drawn = one(s.unsqueeze(1).expand(S, draws, OBS))
    bins = ((drawn + 1) / 2 * n).long()
    torch.testing.assert_close(drawn.float(), (2 * bins + 1) / n - 1)  # always a centre
    for k in range(S):
        found = (bins[k, :, 0] * n + bins[k, :, 1]).bincount(minlength=n * n) / draws
        expected = []
        for x, y in itertools.product(range(n), range(n)):
            centres = [(2 * x + 1) / n - 1, (2 * y + 1) / n - 1]
            expected.append(math.exp(hand_log_p(one, k, s[k], centres, 0)[x] + hand_log_p(one, k, s[k], centres, 1)[y]))
        assert sum(expected) == pytest.approx(1) and 0.3 < max(expected) < 0.9
        np.testing.assert_allclose(found, expected, atol=4 * 0.5 / draws**0.5)


def test_categorical_keeps_two_modes():
    assert keeps_both(two_modes(bc_categorical, 500), 0.2, 0.95)


@pytest.fixture
def categorical_as_others(monkeypatch):
    """What is not finite has no bin: the generic poison goes into s."""
    fixed = test_runs.fixed_batches
    monkeypatch.setattr(test_runs, "OFFLINE", [*test_runs.OFFLINE, "bc_categorical"])
    monkeypatch.setattr(test_runs, "fixed_batches", lambda method, module, patch, batches: fixed(
        method, module, patch, [(s + 0 * r.unsqueeze(-1), a.nan_to_num(), *rest) for s, a, r, *rest in batches]))


def test_categorical_runs_like_the_others(hopper, whole, tmp_path, monkeypatch, capsys, categorical_as_others):
    test_runs.test_a_run_trains_and_writes_its_files("bc_categorical", hopper, whole, tmp_path / "files", capsys)
    test_runs.test_shapes_are_what_their_comments_say("bc_categorical", whole)
    test_runs.test_agent_k_is_not_agent_0_nor_seed_k("bc_categorical", hopper, whole, tmp_path / "seeds", monkeypatch)
    test_runs.test_resume_equals_uninterrupted_to_the_bit("bc_categorical", hopper, whole, tmp_path / "resume", monkeypatch)


@pytest.mark.parametrize("test", [test_runs.test_nan_in_seed_0_leaves_the_others_bit_identical,
                                  test_runs.test_seeds_together_equal_seeds_apart], ids=lambda test: test.__name__)
def test_categorical_seeds_are_apart(test, monkeypatch, categorical_as_others):
    test("bc_categorical", monkeypatch)


# --- samplers as files ---
@pytest.mark.parametrize("module", [bc_gmm, bc_vae, bc_categorical])
def test_exported_sampler_draws_anew_and_evaluation_does_not(module, hopper, tmp_path):
    a, b = (module.main(small(module.__name__, hopper, tmp_path / str(i), num_seeds=3)) for i in range(2))
    assert (a / "eval.csv").read_text() == (b / "eval.csv").read_text()
    policy = torch.export.load(a / "policy.pt2").module()
    for n in 1, 7, 40:
        drawn = policy(torch.zeros(n, 11))
        assert drawn.shape == (3, n, 3) and drawn.abs().max() <= 1
    assert not torch.equal(policy(torch.zeros(40, 11)), drawn)
    torch.manual_seed(3)
    first = policy(torch.zeros(4, 11))
    torch.manual_seed(3)
    assert torch.equal(policy(torch.zeros(4, 11)), first)
