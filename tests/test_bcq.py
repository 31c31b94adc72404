"""bcq.py: the VAE's bound, the soft target and the perturbation by hand; and that it keeps to what the data does."""
from types import SimpleNamespace

import bcq
import ddpg_offline
import numpy as np
import pytest
import torch
from conftest import small

S, E, B, O, A, n = 3, 2, 5, 4, 6, 7
ARGS = SimpleNamespace(gamma=0.9, lam=0.75, num_draws=n)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    d = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0]).expand(S, B)
    return torch.randn(S, B, O), torch.rand(S, B, A) * 2 - 1, torch.randn(S, B), torch.randn(S, B, O), d


def toy():
    torch.manual_seed(1)
    vae, xi, xi_target = bcq.VAE(S, O, A, 8), bcq.Perturbation(S, O, A, 8, 0.05), bcq.Perturbation(S, O, A, 8, 0.05)
    return vae, xi, xi_target, bcq.Critic(S, O, A, 8), bcq.Critic(S, O, A, 8)


def forward(net, k, *x, e=()):
    """Agent k's network of one row."""
    x = torch.cat(x)
    for layer in net:
        x = x @ layer.weight[(k, *e)] + layer.bias[(k, *e)][0] if hasattr(layer, "weight") else layer(x)
    return x


def decoded(vae, k, s, z):
    return torch.tanh(forward(vae.decoder, k, s, z.clamp(-0.5, 0.5)))


def perturbed(xi, k, s, b):
    return (b + 0.05 * torch.tanh(forward(xi.net, k, s, b))).clamp(-1, 1)


def close(tensor, expected):
    assert tensor.shape == (S,)
    np.testing.assert_allclose(tensor.detach(), expected, rtol=2e-5, atol=1e-6)


def test_vae_by_hand(batch):
    """KL by torch.distributions; its sum over the latent is halved and divided by their number, once more for the mean."""
    s, a, *_ = batch
    vae, *_ = toy()
    torch.manual_seed(7)
    loss = bcq.vae_loss(vae, batch)
    torch.manual_seed(7)
    eps, expected = torch.randn(S, B, 2 * A), np.zeros(S)
    for k in range(S):
        for i in range(B):
            mean, log_std = forward(vae.encoder, k, s[k, i], a[k, i]).chunk(2)
            std = log_std.clamp(-4, 15).exp()
            z = mean + std * eps[k, i]
            error = (torch.tanh(forward(vae.decoder, k, s[k, i], z)) - a[k, i]).square().mean()  # z is not clipped here
            kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, std), torch.distributions.Normal(0, 1))
            expected[k] += (error + kl.sum() / (2 * 2 * A)).item() / B
    close(loss, expected)


def test_log_sigma_keeps_to_its_bounds(batch):
    s, a, *_ = batch
    vae, *_ = toy()
    for push, bound in (-1000.0, -4), (1000.0, 15):
        vae.encoder[-1].bias.data.fill_(push)
        assert (vae.encode(s, a)[1] == bound).all()


def test_critic_by_hand(batch):
    """The soft minimum over critics within the maximum over draws, at s', by the target perturbation."""
    s, a, r, s_next, d = batch
    vae, _, xi_target, critic, critic_target = toy()
    torch.manual_seed(7)
    loss = bcq.critic_loss(critic, critic_target, xi_target, vae, batch, ARGS)
    torch.manual_seed(7)
    z, expected = torch.randn(S, n * B, 2 * A), np.zeros(S)
    for k in range(S):
        for i in range(B):
            values = []
            for j in range(n):
                b = decoded(vae, k, s_next[k, i], z[k, j * B + i])
                x = perturbed(xi_target, k, s_next[k, i], b)
                q = [forward(critic_target.net, k, s_next[k, i], x, e=(e,)).item() for e in range(E)]
                values.append(0.75 * min(q) + 0.25 * max(q))
            y = r[k, i].item() + 0.9 * (1 - d[k, i].item()) * max(values)
            expected[k] += sum((forward(critic.net, k, s[k, i], a[k, i], e=(e,)).item() - y) ** 2 for e in range(E)) / B
    close(loss, expected)


def test_perturbation_by_hand_and_nothing_but_it_moves(batch):
    s, *_ = batch
    vae, xi, _, critic, _ = toy()
    torch.manual_seed(7)
    loss = bcq.xi_loss(xi, critic, vae, batch)
    torch.manual_seed(7)
    z = torch.randn(S, B, 2 * A)
    close(loss, [-np.mean([forward(critic.net, k, s[k, i], perturbed(xi, k, s[k, i], decoded(vae, k, s[k, i], z[k, i])),
                                   e=(0,)).item() for i in range(B)]) for k in range(S)])
    assert all(g is None for g in torch.autograd.grad(loss.sum(), vae.parameters(), allow_unused=True, retain_graph=True))
    grads = torch.autograd.grad(loss.sum(), [*xi.parameters(), *critic.parameters()], allow_unused=True)
    assert all(g.abs().sum() > 0 for g in grads[:6]) and all(not g[:, 1].any() for g in grads[6:])  # Q_2 plays no part


def test_actions_stay_within_phi_of_the_model_and_in_the_box():
    vae, xi, *_ = toy()
    s, b = torch.randn(S, 500, O), torch.rand(S, 500, A) * 2.2 - 1.1
    xi.net[-1].bias.data.fill_(1000.0)
    torch.testing.assert_close(xi(s, b), (b + 0.05).clamp(-1, 1))
    z = []
    vae.decode = lambda s, x: z.append(x) or x
    vae.sample(torch.zeros(S, 5000, O))
    assert z[0].shape == (S, 5000, 2 * A) and z[0].abs().max() == 0.5
    assert (z[0].abs() == 0.5).float().mean().item() == pytest.approx(0.617, abs=0.02)  # of a normal beyond 0.5


def test_the_policy_takes_the_best_of_its_draws_for_each_state():
    vae, xi, _, critic, _ = toy()
    s, policy = torch.randn(S, B, O), bcq.Policy(vae, xi, critic, 50)
    torch.manual_seed(7)
    pi = policy(s)
    torch.manual_seed(7)
    z = torch.randn(S, 50 * B, 2 * A)
    assert pi.shape == (S, B, A)
    for k in range(S):
        for i in range(B):
            found = [perturbed(xi, k, s[k, i], decoded(vae, k, s[k, i], z[k, j * B + i])) for j in range(50)]
            values = [forward(critic.net, k, s[k, i], x, e=(0,)).item() for x in found]
            torch.testing.assert_close(pi[k, i], found[int(np.argmax(values))], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("d, depends", [(0.0, True), (1.0, False)])
def test_target_stops_at_termination_only(d, depends, batch):
    s, a, r, s_next, _ = batch
    vae, _, xi_target, critic, critic_target = toy()
    losses = []
    for other in s_next, s_next + 1:
        torch.manual_seed(0)
        rows = s, a, r, other, torch.full((S, B), d)
        losses.append(bcq.critic_loss(critic, critic_target, xi_target, vae, rows, ARGS))
    assert torch.equal(*losses) != depends


def test_it_keeps_to_what_the_data_does(tmp_path):
    """One step; actions in [-0.6, 0.2] with rewards that grow with the action: DDPG leaves the data for 1, BCQ ends above
    the data's mean of -0.2 and at most Phi above its greatest action."""
    torch.manual_seed(0)
    N, found = 1000, {}
    obs, action = torch.rand(N, 3) * 2 - 1, torch.rand(N, 1) * 0.8 - 0.6
    data = SimpleNamespace(obs=obs, action=action, reward=action[:, 0], next_obs=obs, terminated=torch.ones(N),
                           episode=torch.arange(N))
    for module, updates, flags in (bcq, 400, dict(vae_dim=32)), (ddpg_offline, 800, {}):
        args = module.Args(num_seeds=2, batch_size=64, hidden_dim=32, device="cpu", **flags)
        agent = module.Agent(args, 3, 1, data)
        for _ in range(updates):
            agent.update()
        found[module.METHOD] = agent.policy(torch.rand(2, 200, 3) * 2 - 1)
    assert found["ddpg_offline"].min() > 0.9
    assert found["bcq"].mean() > -0.17 and found["bcq"].max() < 0.2 + 0.05 + 0.05


def test_a_share_above_1_is_refused(hopper, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        bcq.main(small("bcq", hopper, tmp_path / "out", lam=1.5))
    assert stopped.value.code.startswith("bcq: --lam cannot be 1.5") and not (tmp_path / "out").exists()
