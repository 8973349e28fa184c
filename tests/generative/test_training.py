from __future__ import annotations

import math
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
import torch
from torch import nn

from oneira.generative.training import TrainSettings, fit, learning_rate
from oneira.platform.checkpoints import Checkpoints
from oneira.platform.errors import CheckpointError, ConfigError, Interrupted, NumericalError


class Noisy(nn.Module):
    """Two layers and a loss with noise: nothing in it is the same twice unless the loop makes it so."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def loss(self, batch, generator):
        x = batch["x"] + 0.1 * torch.randn(batch["x"].shape, generator=generator)
        error = (self.body(x) - batch["x"].flip(-1)).square().mean()
        return error, {"error": error.detach()}


def batch_at(step):
    return {"x": torch.randn(16, 8, generator=torch.Generator().manual_seed(step))}


SETTINGS = TrainSettings(steps=40, batch_size=16, lr=1e-2, ema=0.9, save_every=10, log_every=5, precision="fp32")


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("killed_at", [5, 25, 40])
def test_killed_run_continues_as_if_never_stopped(tmp_path, precision, ema, killed_at):
    settings = TrainSettings(**{**vars(SETTINGS), "precision": precision, "ema": ema})
    undisturbed = fit(Noisy(), batch_at, settings)

    def kill(step, **values):
        if step == killed_at:
            raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit(Noisy(), batch_at, settings, checkpoints=checkpoints, name="m", log=kill)
    assert checkpoints.step("m") == ({5: None, 25: 20, 40: 40}[killed_at])
    steps = []
    resumed = fit(
        Noisy(), batch_at, settings, checkpoints=checkpoints, name="m", log=lambda step, **values: steps.append(step)
    )
    assert same(weights(undisturbed), weights(resumed))
    assert all(step > (checkpoints.step("m") if killed_at == 40 else killed_at // 10 * 10) for step in steps)


def test_log_gives_the_same_numbers_after_a_resume(tmp_path):
    def run(checkpoints, stop_at=None):
        seen = {}

        def log(step, **values):
            if step == stop_at:
                raise KeyboardInterrupt
            seen[step] = values

        try:
            fit(Noisy(), batch_at, SETTINGS, checkpoints=checkpoints, log=log)
        except KeyboardInterrupt:
            pass
        return seen

    whole = run(None)
    assert sorted(whole) == list(range(5, 41, 5))
    assert set(whole[5]) == {"loss", "lr", "grad_norm", "error"}
    checkpoints = Checkpoints(tmp_path)
    assert {**run(checkpoints, stop_at=25), **run(checkpoints)} == whole


def test_checkpoint_of_other_settings_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    fit(Noisy(), batch_at, SETTINGS, checkpoints=checkpoints, name="m")
    other = TrainSettings(**{**vars(SETTINGS), "lr": 1e-3})
    with pytest.raises(CheckpointError, match="lr"):
        fit(Noisy(), batch_at, other, checkpoints=checkpoints, name="m")


def test_checkpoint_of_another_model_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    fit(Noisy(), batch_at, SETTINGS, checkpoints=checkpoints, name="m")
    other = Noisy()
    other.body.append(nn.Linear(8, 8))
    with pytest.raises(CheckpointError, match="another model"):
        fit(other, batch_at, SETTINGS, checkpoints=checkpoints, name="m")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_batch_stops_with_the_last_good_step_kept(tmp_path, bad):
    checkpoints, model = Checkpoints(tmp_path), Noisy()
    poisoned = lambda step: {"x": batch_at(step)["x"] + (bad if step == 24 else 0)}  # noqa: E731
    with pytest.raises(NumericalError, match="step 25"):
        fit(model, poisoned, SETTINGS, checkpoints=checkpoints, name="m")
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert checkpoints.load("m").step == 24
    healed = fit(model, batch_at, SETTINGS, checkpoints=checkpoints, name="m")
    assert same(weights(healed), weights(fit(Noisy(), batch_at, SETTINGS)))


def test_gradient_that_is_not_finite_is_found_even_when_the_loss_is():
    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def loss(self, batch, generator):
            return self.w.abs().sqrt().sum(), {}

    model = Steep()
    with pytest.raises(NumericalError, match="step 1"):
        fit(model, batch_at, SETTINGS)
    assert model.w.item() == 0


def test_first_step_is_the_learning_rate_whatever_the_gradient():
    # Adam's first step is lr * sign(gradient): the same with the gradient clipped to a hundredth.
    for clip in (0.0, 1e-2):
        settings = TrainSettings(steps=1, batch_size=16, lr=0.125, clip=clip, precision="fp32")
        after, before = weights(fit(Noisy(), batch_at, settings)), weights(Noisy())
        move = (after["body.0.weight"] - before["body.0.weight"]).abs()
        assert move.max() < 0.12501 and move.median() > 0.1249
        assert torch.equal(after["frozen"], before["frozen"])


def test_averaged_weights_are_returned():
    plain, averaged = (fit(Noisy(), batch_at, TrainSettings(**{**vars(SETTINGS), "ema": ema})) for ema in (0.0, 0.999))
    assert not same(weights(plain), weights(averaged))
    assert not averaged.training


class Normed(nn.Module):
    """A batch norm and a weight behind it."""

    def __init__(self):
        super().__init__()
        self.norm, self.weight = nn.BatchNorm1d(8), nn.Parameter(torch.ones(8))

    def loss(self, batch, generator):
        return (self.norm(batch["x"]) * self.weight - batch["x"].flip(-1)).square().mean(), {}

    def values(self):
        return self.weight.detach().clone(), self.norm.running_mean.clone()


def test_the_average_by_hand():
    model = Normed()
    settings = TrainSettings(steps=30, batch_size=16, lr=0.05, ema=0.8, precision="fp32")
    states = []
    fit(model, batch_at, replace(settings, ema=0.0, log_every=1), log=lambda step, **_: states.append(model.values()))
    wanted = [Normed().weight.detach(), Normed().norm.running_mean]
    for step, state in enumerate(states, 1):
        decay = min(0.8, (1 + step) / (10 + step))
        wanted = [decay * old + (1 - decay) * new for old, new in zip(wanted, state, strict=True)]
    averaged = fit(Normed(), batch_at, settings)
    for value, should in zip(averaged.values(), wanted, strict=True):
        assert torch.allclose(value, should, atol=1e-6)
    assert not torch.allclose(averaged.norm.running_mean, states[-1][1], atol=1e-3)


def test_what_a_bad_step_saw_is_forgotten(tmp_path):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.register_buffer("count", torch.zeros(()))

        def loss(self, batch, generator):
            self.count += 1
            return (self.weight * (float("nan") if self.count == 8 else 1.0)).sum(), {}

    model, checkpoints = Counting(), Checkpoints(tmp_path)
    with pytest.raises(NumericalError, match="step 8"):
        fit(model, batch_at, SETTINGS, checkpoints=checkpoints, name="m")
    assert model.count == 7 and checkpoints.load("m").tensors["model.count"] == 7


def test_patience_goes_on_where_it_was_though_nothing_was_ever_finite(tmp_path):
    settings = replace(SETTINGS, validate_every=5, patience=4, save_every=5)
    steps, checkpoints = [], Checkpoints(tmp_path)

    def kill(step, **values):
        steps.append(step)
        if step == 10 and len(steps) == 2:
            raise KeyboardInterrupt

    for _ in range(2):
        with suppress(KeyboardInterrupt):
            fit(Noisy(), batch_at, settings, checkpoints=checkpoints, log=kill, validate=lambda model: math.nan)
    assert steps[-1] == 20


def test_learning_rate_warms_up_and_falls_to_its_fraction():
    settings = TrainSettings(steps=1000, batch_size=1, lr=2.0, warmup=100, final_lr_fraction=0.1)
    assert learning_rate(settings, 0) == pytest.approx(0.02)
    assert learning_rate(settings, 99) == learning_rate(settings, 100) == pytest.approx(2.0)
    assert learning_rate(settings, 550) == pytest.approx(1.1)  # half of the cosine: the mean of 2.0 and 0.2
    assert learning_rate(settings, 999) == pytest.approx(0.2, rel=0.01)
    assert learning_rate(TrainSettings(steps=1, batch_size=1, lr=2.0), 0) == 2.0


def test_training_starts_from_given_weights():
    trained = fit(Noisy(), batch_at, SETTINGS)
    tiny = TrainSettings(steps=1, batch_size=16, lr=0.0)
    assert same(weights(fit(Noisy(), batch_at, tiny, init=trained.state_dict())), weights(trained))


def test_lease_is_asked_before_every_step_and_can_stop_the_loop(tmp_path):
    class Impatient:
        torch_device, steps = torch.device("cpu"), 0

        @contextmanager
        def lease(self, *, bytes=0, priority="train", deadline=None):
            assert bytes > 0 and priority == "train"
            yield self

        def step(self):
            self.steps += 1
            if self.steps == 13:
                raise Interrupted("enough")

    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(Interrupted):
        fit(Noisy(), batch_at, SETTINGS, device=Impatient(), checkpoints=checkpoints, name="m")
    assert checkpoints.load("m").step == 10


@pytest.mark.parametrize("bad", [{"steps": 0}, {"lr": -1.0}, {"lr": math.nan}, {"ema": 1.0}, {"clip": -1.0}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        TrainSettings(**{"steps": 1, "batch_size": 1, **bad})
