"""Laws of M: the density is the mixture's, the fused recurrence torch's LSTM, masked steps do not exist; it learns."""

import math

import pytest
import torch

from oneira.agents.memory import MDNRNN, MemoryConfig, mixture_nll
from oneira.platform.errors import ConfigError

SMALL = MemoryConfig(z=4, action=2, hidden=24, mixtures=3, reward_scale=2.0)


def make_batch(config: MemoryConfig, batch: int = 6, steps: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "mu": torch.randn(batch, steps + 1, config.z, generator=g),
        "logvar": torch.full((batch, steps + 1, config.z), -3.0),
        "action": torch.rand(batch, steps, config.action, generator=g),
        "reward": torch.randn(batch, steps, generator=g),
        "done": (torch.rand(batch, steps, generator=g) < 0.1).float(),
        "valid": torch.ones(batch, steps),
    }


def make_memory(config: MemoryConfig = SMALL, seed: int = 0) -> MDNRNN:
    torch.manual_seed(seed)
    return MDNRNN(config)


def mixture_by_torch(raw: torch.Tensor, config: MemoryConfig) -> torch.distributions.Distribution:
    logits, means, log_sigmas = raw.view(len(raw), 3, config.mixtures, config.z).transpose(2, 3).unbind(1)
    components = torch.distributions.Normal(means, log_sigmas.clamp(min=-6).exp())
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=logits), components)


def test_mixture_nll_and_its_gradient_are_those_of_torch_distributions():
    torch.manual_seed(0)
    raw = torch.randn(50, 3 * 3 * 4) * 2
    raw[0, 24:] = -8.0  # below the floor of log sigma: the density uses the floor and its gradient stops
    target, weight = torch.randn(50, 4), torch.rand(50) * (torch.arange(50) % 5 > 0)
    ours, reference = raw.clone().requires_grad_(), raw.clone().requires_grad_()
    value = mixture_nll(ours, target, weight, 3)
    expected = -(mixture_by_torch(reference, SMALL).log_prob(target).sum(1) * weight).sum()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    value.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-3, atol=1e-4)


def test_mixture_nll_of_a_hand_computed_case():
    # One dimension, weights 1/4 and 3/4, means 0 and 2, sigmas 1 and 1/2, at y = 1.
    raw = torch.tensor([[math.log(1.0), math.log(3.0), 0.0, 2.0, 0.0, math.log(0.5)]])
    density = 0.25 * math.exp(-0.5) / math.sqrt(2 * math.pi) + 0.75 * 2 * math.exp(-2) / math.sqrt(2 * math.pi)
    value = mixture_nll(raw, torch.tensor([[1.0]]), torch.ones(1), 2)
    assert value.item() == pytest.approx(-math.log(density), rel=1e-5)


def test_the_loss_terms_are_those_of_the_prediction():
    memory, batch = make_memory(), make_batch(SMALL)
    batch["logvar"][:] = -60.0  # no resampling noise: z is mu
    _, terms = memory.loss(batch, torch.Generator().manual_seed(0))
    z, reward = batch["mu"], batch["reward"]
    previous = torch.cat([torch.zeros(6, 1), reward[:, :-1]], 1)
    prediction, _ = memory(z[:, :-1], batch["action"], previous)
    normal = torch.distributions.Normal(prediction.means, prediction.log_sigmas.exp())
    log_p = torch.logsumexp(prediction.log_weights + normal.log_prob(z[:, 1:].unsqueeze(2)), 2)
    assert terms["nll"].item() == pytest.approx(-log_p.mean().item(), rel=1e-4)
    assert terms["reward_mse"].item() == pytest.approx(
        (((prediction.reward - reward) / 2.0) ** 2).mean().item(), rel=1e-4
    )
    bce = torch.nn.functional.binary_cross_entropy_with_logits(prediction.done_logit, batch["done"])
    assert terms["done_bce"].item() == pytest.approx(bce.item(), rel=1e-4)


def test_the_fused_recurrence_and_its_gradients_are_torchs_lstm():
    memory = make_memory()
    inputs = torch.randn(7, 5, SMALL.inputs)
    pull = torch.randn(7, 5, SMALL.hidden)
    ours = memory._hidden_for_training(inputs)
    (ours * pull).sum().backward()
    found = {name: p.grad.clone() for name, p in memory.lstm.named_parameters()}
    memory.zero_grad()
    reference = memory.lstm(inputs.transpose(0, 1))[0].transpose(0, 1)
    (reference * pull).sum().backward()
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    for name, parameter in memory.lstm.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-4)


def test_bf16_stays_near_fp32():
    memory, batch = make_memory(), make_batch(SMALL)
    losses, gradients = [], []
    for low in (False, True):
        memory.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss, _ = memory.loss(batch, torch.Generator().manual_seed(0))
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in memory.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert torch.cosine_similarity(*gradients, 0) > 0.995


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reward_input", [True, False])
def test_every_parameter_gets_a_gradient(dropout, reward_input):
    memory = make_memory(MemoryConfig(z=4, action=2, hidden=24, dropout=dropout, reward_input=reward_input))
    loss, _ = memory.loss(make_batch(SMALL), torch.Generator().manual_seed(0))
    loss.backward()
    for name, parameter in memory.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0, name


def test_the_generator_decides_all_chance():
    memory, batch = make_memory(MemoryConfig(z=4, action=2, hidden=24, dropout=0.5)), make_batch(SMALL)
    values = [memory.loss(batch, torch.Generator().manual_seed(seed))[0].item() for seed in (1, 1, 2)]
    assert values[0] == values[1] != values[2]


def test_invalid_steps_do_not_change_loss_or_gradient():
    memory = make_memory()
    batch = make_batch(SMALL, steps=9)
    batch["logvar"][:] = -60.0
    batch["valid"][:, 6:] = 0
    outcomes = []
    for variant in ("as it is", "garbage", "cut"):
        changed = {name: value.clone() for name, value in batch.items()}
        if variant == "garbage":
            for name in ("action", "reward", "done"):
                changed[name][:, 6:] = 7.0
            changed["mu"][:, 7:] = -7.0
        if variant == "cut":
            changed = {name: value[:, : 7 if name in ("mu", "logvar") else 6] for name, value in changed.items()}
        memory.zero_grad()
        loss, _ = memory.loss(changed, torch.Generator().manual_seed(0))
        loss.backward()
        outcomes.append((loss.detach(), torch.cat([p.grad.flatten() for p in memory.parameters()])))
    for loss, gradient in outcomes[1:]:
        torch.testing.assert_close(loss, outcomes[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, outcomes[0][1], rtol=1e-4, atol=1e-6)


def test_observe_equals_step_by_step():
    memory = make_memory()
    z, action, reward = torch.randn(3, 6, 4), torch.rand(3, 6, 2), torch.randn(3, 6)
    h, c = memory.observe(z, action, reward)
    assert h.shape == c.shape == (3, 7, 24) and not h[:, 0].any() and not c[:, 0].any()
    state, previous = None, torch.zeros(3)
    for t in range(6):
        _, state = memory(z[:, t : t + 1], action[:, t : t + 1], previous[:, None], state)
        previous = reward[:, t]
        torch.testing.assert_close(h[:, t + 1], state[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(c[:, t + 1], state[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["mu", "weight_hh_l0", "mixture.weight"])
def test_a_nan_is_seen(where):
    memory, batch = make_memory(), make_batch(SMALL)
    if where == "mu":
        batch["mu"][2, 3, 1] = float("nan")
    else:
        with torch.no_grad():
            dict(memory.named_parameters())[where if "." in where else f"lstm.{where}"][0] = float("nan")
    assert torch.isnan(memory.loss(batch, torch.Generator().manual_seed(0))[0])


@pytest.mark.parametrize("wrong", [{"z": 0}, {"reward_scale": 0.0}, {"dropout": 1.0}, {"done_weight": -1.0}])
def test_a_wrong_config_names_its_value(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        MemoryConfig(**wrong)


def toy_batch(seed: int, batch: int = 32, steps: int = 20) -> dict[str, torch.Tensor]:
    """A rotation pushed by actions: z' = 0.95 R z + 0.3 a + 0.05 noise, reward 2 z_0, done where z_1 > 0.5."""
    g = torch.Generator().manual_seed(seed)
    turn = torch.tensor([[math.cos(0.7), -math.sin(0.7)], [math.sin(0.7), math.cos(0.7)]]) * 0.95
    z = [torch.randn(batch, 2, generator=g) * 0.7]
    action = torch.randint(0, 2, (batch, steps, 2), generator=g) * 2.0 - 1.0
    for t in range(steps):
        z.append(z[-1] @ turn.t() + 0.3 * action[:, t] + 0.05 * torch.randn(batch, 2, generator=g))
    mu = torch.stack(z, 1)
    return {
        "mu": mu,
        "logvar": torch.full_like(mu, -12.0),
        "action": action,
        "reward": 2 * mu[:, :-1, 0],
        "done": (mu[:, :-1, 1] > 0.5).float(),
        "valid": torch.ones(batch, steps),
    }


def test_it_learns_toy_dynamics():
    memory = make_memory(MemoryConfig(z=2, action=2, hidden=32, mixtures=2, reward_scale=2.0))
    optimizer = torch.optim.Adam(memory.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400, 1e-4)
    for step in range(400):
        loss, _ = memory.loss(toy_batch(step), torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(memory.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    test = toy_batch(10_000)
    _, terms = memory.loss(test, torch.Generator().manual_seed(0))
    marginal = 0.5 * math.log(2 * math.pi * math.e * test["mu"].var().item())
    noise_floor = 0.5 * math.log(2 * math.pi * math.e * 0.05**2)  # -1.58 nats: nobody can know more
    assert noise_floor - 0.05 < terms["nll"].item() < marginal - 1.5
    assert terms["reward_mse"].item() < 0.02 * test["reward"].div(2).var().item()
    rate = test["done"].mean().item()
    assert terms["done_bce"].item() < -0.4 * (rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
