"""The loop's two additions: models whose parts take turns, and stopping early; both go on after a kill to the same bytes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from oneira.generative.training import TrainSettings, fit
from oneira.platform.checkpoints import Checkpoints
from oneira.platform.errors import ConfigError


class Duel(nn.Module):
    """Two turns of a, one of b; a pulls w towards the batch, b away from what a has."""

    players = ("a", "a", "b")

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        for i, layer in enumerate((self.a, self.b)):
            nn.init.constant_(layer.weight, 0.1 * (i + 1))
            nn.init.zeros_(layer.bias)
        self.turns: list[str] = []

    def player_loss(self, player, batch, generator):
        self.turns.append(player)
        noise = 0.1 * torch.randn(batch.shape, generator=generator)
        gap = (self.a(batch + noise) - self.b(batch)).square().mean()
        return (gap if player == "a" else -gap), {"gap": gap.detach()}


def batch_at(step):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


SETTINGS = TrainSettings(steps=13, batch_size=8, lr=1e-2, beta1=0.5, save_every=2, log_every=1, precision="fp32")


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_only_the_player_of_a_step_learns():
    model, seen = Duel(), []

    def log(step, **values):
        seen.append(weights(model))

    before = weights(model)
    fit(model, batch_at, SETTINGS, log=log)
    assert model.turns == ["a", "a", "b"] * 4 + ["a"]
    for player, old, new in zip(model.turns, [before, *seen], seen, strict=False):
        for key in old:
            assert torch.equal(old[key], new[key]) == (not key.startswith(player)), (player, key)
    assert all(p.requires_grad and p.grad is None for p in model.b.parameters())  # the last turn was a's


def test_players_have_optimizers_of_their_own():
    # By hand: one Adam for each player, stepped at its turns only.
    model, other = Duel(), Duel()
    settings = TrainSettings(
        steps=9, batch_size=8, lr=1e-2, beta1=0.5, clip=0, warmup=0, final_lr_fraction=1.0, precision="fp32"
    )
    fit(model, batch_at, settings)
    optimizers = {
        player: torch.optim.AdamW(getattr(other, player).parameters(), lr=1e-2, betas=(0.5, 0.999), weight_decay=0.0)
        for player in "ab"
    }
    from oneira.generative.training import _generator

    for step in range(9):
        player = other.players[step % 3]
        loss, _ = other.player_loss(player, batch_at(step), _generator(0, step, torch.device("cpu")))
        optimizers[player].zero_grad()
        loss.backward(inputs=list(getattr(other, player).parameters()))
        optimizers[player].step()
    for a, b in zip(weights(model).values(), weights(other).values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("killed_at", [1, 3, 4, 8, 13])
def test_a_killed_duel_goes_on_to_the_same_bytes(tmp_path, killed_at):
    settings = TrainSettings(**{**vars(SETTINGS), "ema": 0.9})
    undisturbed = fit(Duel(), batch_at, settings)

    def kill(step, **values):
        if step == killed_at:
            raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit(Duel(), batch_at, settings, checkpoints=checkpoints, log=kill)
    assert same(weights(fit(Duel(), batch_at, settings, checkpoints=checkpoints)), weights(undisturbed))


# Stopping early -------------------------------------------------------------------------------------------------------


class Fit(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def loss(self, batch, generator):
        return (self.w - 1).square().sum(), {}


EARLY = TrainSettings(
    steps=200, batch_size=1, lr=0.05, warmup=0, final_lr_fraction=1.0, validate_every=5, patience=3, save_every=5,
    log_every=5, precision="fp32",
)  # fmt: skip


def distance(model):
    """Best at w = 0.5, on the way to 1."""
    assert not model.training
    return float((model.w.detach() - 0.5).abs())


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_training_stops_where_validation_was_best(ema):
    steps = []
    settings = TrainSettings(**{**vars(EARLY), "ema": ema})
    model = fit(
        Fit(),
        lambda step: torch.zeros(1),
        settings,
        validate=distance,
        log=lambda step, **v: steps.append((step, v["validation"])),
    )
    best = min(steps, key=lambda pair: pair[1])
    assert steps[-1][0] == best[0] + 15 < 200, "three validations after the best one"
    assert distance(model) == pytest.approx(best[1]) and best[1] < 0.15


def test_without_patience_the_best_weights_of_all_steps_are_kept():
    model = fit(Fit(), lambda step: torch.zeros(1), TrainSettings(**{**vars(EARLY), "patience": 0}), validate=distance)
    assert distance(model) < 0.15


@pytest.mark.parametrize("killed_at", [5, 15, 20])
def test_early_stopping_survives_a_kill(tmp_path, killed_at):
    undisturbed = fit(Fit(), lambda step: torch.zeros(1), EARLY, validate=distance)

    def kill(step, **values):
        if step == killed_at:
            raise KeyboardInterrupt

    checkpoints, later = Checkpoints(tmp_path), []
    arguments = {"validate": distance, "checkpoints": checkpoints}
    with pytest.raises(KeyboardInterrupt):
        fit(Fit(), lambda step: torch.zeros(1), EARLY, log=kill, **arguments)
    resumed = fit(Fit(), lambda step: torch.zeros(1), EARLY, log=lambda step, **v: later.append(step), **arguments)
    assert same(weights(resumed), weights(undisturbed))
    again = fit(Fit(), lambda step: torch.zeros(1), EARLY, log=lambda step, **v: later.append(-1), **arguments)
    assert -1 not in later and same(weights(again), weights(undisturbed)), "one that had stopped does not go on"


def test_patience_without_validation_is_refused():
    with pytest.raises(ConfigError, match="validate_every"):
        TrainSettings(steps=1, batch_size=1, patience=2)


def test_checkpoints_of_earlier_versions_are_read(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    settings = TrainSettings(steps=4, batch_size=1, save_every=2, precision="fp32")
    fit(Fit(), lambda step: torch.zeros(1), settings, checkpoints=checkpoints)
    kept = checkpoints.load("training")
    old = {
        key: value for key, value in kept.meta["settings"].items() if key not in ("beta1", "patience", "validate_every")
    }
    checkpoints.save("training", kept.tensors, {"settings": old}, step=kept.step)
    assert fit(Fit(), lambda step: torch.zeros(1), settings, checkpoints=checkpoints).w == kept.tensors["model.w"]
