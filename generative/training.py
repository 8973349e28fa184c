"""The one training loop: a plain function that fits any model whose `loss(batch, generator)` gives a scalar.

    model = fit(VAE(VAEConfig()), lambda step: frames[choice(step)], TrainSettings(steps=2000, batch_size=128))

Batches are a pure function of the step, and the noise of step k comes from a generator seeded by (seed, k). So a step
depends on nothing but weights, optimizer, EMA and its number: a run that was killed and goes on from its checkpoint
ends with the same bytes as one that was not (same machine, same number of threads; GPUs in torch's deterministic mode).
In a group of processes (`parallel`), each learns from its share of every batch, with noise of its own; the first one keeps
checkpoints and logs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from oneira.platform.checkpoints import Checkpoints
from oneira.platform.devices import Device, device_here, pick_precision
from oneira.platform.errors import CheckpointError, ConfigError, NumericalError

from .parallel import average, copy_from_first, kept_buffers, rank_and_size, share_of


class Trainable(Protocol):
    """What `fit` asks of an `nn.Module`. All randomness must come from `generator`, none from torch's global one."""

    def loss(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Returns (scalar to minimise, named scalars to log)."""
        ...


class Adversarial(Protocol):
    """What `fit` asks of a model whose parts play against each other, beside `loss` (which it does not call then).

    players: the names of submodules, one for each step of a cycle, such as ("critic", "critic", "generator"). At a step
    only the parameters of its player learn; Adam's moments and counts of the others stand still, so that each player
    has, in effect, an optimizer of its own.
    """

    players: tuple[str, ...]

    def player_loss(self, player: str, batch: Any, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """What this player minimises, and named scalars to log."""
        ...


Model = TypeVar("Model", bound=nn.Module)
Log = Callable[..., None]  # log(step, **values)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How long and how fast to train. The learning rate warms up linearly, then falls as a cosine."""

    steps: int  # of the optimizer
    batch_size: int  # for whoever makes `batch_at`; the loop itself takes batches as they come
    lr: float = 1e-3
    warmup: int = 100  # steps; at most a quarter of all
    final_lr_fraction: float = 0.05
    weight_decay: float = 0.0  # decoupled (AdamW)
    beta1: float = 0.9  # Adam's, of the first moment; adversarial models want it lower
    clip: float = 1.0  # of the global gradient norm; 0 = off
    ema: float = 0.0  # decay of the averaged weights, which are returned; 0 = off
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    channels_last: bool = False
    validate_every: int = 0  # steps; 0 = never
    patience: int = 0  # validations without a better value before training stops; 0 = it goes on to the end
    save_every: int = 0  # steps; 0 = never
    log_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        lowest_of = {"steps": 1, "batch_size": 1, "warmup": 0, "save_every": 0, "log_every": 1, "seed": 0}
        lowest_of |= {"validate_every": 0, "patience": 0}
        for key, lowest in lowest_of.items():
            if getattr(self, key) < lowest:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least {lowest}.")
        for key in ("lr", "weight_decay", "clip"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be finite and not negative.")
        if not 0 <= self.final_lr_fraction <= 1:
            raise ConfigError(f"final_lr_fraction is {self.final_lr_fraction}; it must be in [0, 1].")
        for key in ("ema", "beta1"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be in [0, 1).")
        if self.patience and not self.validate_every:
            raise ConfigError(f"patience is {self.patience}, but validate_every is 0: nothing would be validated.")


def fit(
    model: Model,
    batch_at: Callable[[int], Any],
    settings: TrainSettings,
    *,
    device: Device | None = None,
    checkpoints: Checkpoints | None = None,
    name: str = "training",
    log: Log = lambda step, **values: None,
    init: Mapping[str, Tensor] | None = None,
    validate: Callable[[Model], float] | None = None,
) -> Model:
    """Trains `model` in place and returns it in eval mode, with its averaged weights if `settings.ema` is on.

    With `validate_every`, the weights that are returned are those with the lowest validation value.

    Args:
        model: see `Trainable` and `Adversarial`; its weights stay fp32, the forward pass runs in `settings.precision`.
        batch_at: step in [0, steps) -> batch: tensors, or dicts, lists and tuples of them. Must be a pure function.
        device: where to train and who grants the time; None means `device_here()`.
        checkpoints, name: where the state is saved every `save_every` steps and at the end, and from where it goes on.
        log: called as log(step, loss=, lr=, grad_norm=, **model's) every `log_every` steps and at the end, from step 1.
        init: weights to begin with where there is no checkpoint.
        validate: asked every `validate_every` steps for a number of the model in eval mode, with its averaged weights;
            lower is better. Must be a pure function of the weights.

    Raises:
        NumericalError: a loss or gradient is not finite, or the model says so; model and checkpoint keep the last good step.
        CheckpointError: the checkpoint `name` is of another model or settings, or cannot be written.
    """
    device = device_here() if device is None else device
    place = device.torch_device
    model.to(place).train()
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    if init is not None:
        model.load_state_dict(dict(init))
    copy_from_first(model.state_dict().values())
    state = _State(model, settings, place)
    if checkpoints is not None and checkpoints.exists(name):
        state.load(*_read(checkpoints, name))
    if rank_and_size()[0]:
        checkpoints, log = None, lambda step, **values: None
    with device.lease(bytes=state.num_bytes(), priority="train") as lease:
        for step in range(state.step, settings.steps):
            if state.has_stopped:
                break
            lease.step()
            try:
                values = _update(state, _to(share_of(batch_at(step)), place), place)
            except NumericalError:
                if checkpoints is not None and settings.save_every and state.step:
                    checkpoints.save(name, *state.save(), step=state.step)
                raise
            if validate is not None and settings.validate_every and state.step % settings.validate_every == 0:
                values["validation"] = state.validate(validate)
            done = state.step == settings.steps or state.has_stopped
            if checkpoints is not None and settings.save_every and (done or state.step % settings.save_every == 0):
                checkpoints.save(name, *state.save(), step=state.step)
            if done or state.step % settings.log_every == 0:
                log(state.step, **{key: float(value) for key, value in values.items()})
    state.finish()
    return model.eval()


class _State:
    """All that one step hands to the next: weights, optimizer, averaged weights, number of steps done."""

    def __init__(self, model: nn.Module, settings: TrainSettings, place: torch.device):
        self.model, self.settings, self.step = model, settings, 0
        self.parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=settings.lr, betas=(settings.beta1, 0.999),
            weight_decay=settings.weight_decay, fused=True,
        )  # fmt: skip
        # What is averaged: parameters, and what batch norms found of the rows that these parameters make.
        self.averaged = self.parameters | _statistics(model)
        self.average = {key: p.detach().clone() for key, p in self.averaged.items()} if settings.ema else {}
        self.best: dict[str, Tensor] = {}  # of all that was validated: the whole state_dict
        self.best_value, self.waited = math.inf, 0
        self.precision = pick_precision(settings.precision, place)

    @property
    def has_stopped(self) -> bool:
        return bool(self.settings.patience) and self.waited >= self.settings.patience

    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.model.state_dict().values()) * (5 if self.average else 4)

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        tensors |= {f"average.{key}": value for key, value in self.average.items()}
        for key, parameter in self.parameters.items():
            for kind, value in self.optimizer.state[parameter].items():
                tensors[f"{kind}.{key}"] = value
        tensors |= {f"best.{key}": value for key, value in self.best.items()}
        meta: dict[str, Any] = {"settings": _identity(self.settings)}
        return tensors, meta | {"waited": self.waited} | ({"best": self.best_value} if self.best else {})

    def load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], step: int) -> None:
        wanted = _identity(self.settings)
        if LATER | dict(meta.get("settings") or {}) != wanted:
            raise CheckpointError(f"The checkpoint was trained with {meta.get('settings')}, not {wanted}.")
        try:
            self.model.load_state_dict({key: tensors[f"model.{key}"] for key in self.model.state_dict()})
            for key, value in self.average.items():
                value.copy_(tensors[f"average.{key}"])
            self.waited = meta.get("waited", 0)
            if "best" in meta:
                self.best = {key: tensors[f"best.{key}"].clone() for key in self.model.state_dict()}
                self.best_value = meta["best"]
            for key, parameter in self.parameters.items():
                if isinstance(self.model, HasPlayers) and f"step.{key}" not in tensors:
                    continue  # its player had no turn yet
                moments = {kind: torch.empty_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
                for kind, value in moments.items():
                    value.copy_(tensors[f"{kind}.{key}"])
                count = tensors[f"step.{key}"].to(parameter.device)
                self.optimizer.state[parameter] = {"step": count, **moments}
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"The checkpoint is of another model: {error}") from error
        self.step = step

    def validate(self, ask: Callable[[Any], float]) -> float:
        """Asks for a value of the averaged weights, and keeps these where they are the best so far."""
        learning = {key: p.detach().clone() for key, p in self.averaged.items()} if self.average else {}
        self._put(self.average)
        value = float(ask(self.model.eval()))
        if value < self.best_value:
            self.best = {key: tensor.detach().clone() for key, tensor in self.model.state_dict().items()}
            self.best_value, self.waited = value, 0
        else:
            self.waited += 1
        self._put(learning)
        self.model.train()
        return value

    def finish(self) -> None:
        if self.best:
            self.model.load_state_dict(self.best)
        else:
            self._put(self.average)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for key, value in values.items():
            self.averaged[key].copy_(value)


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running means and variances of a model's batch norms, by their names in its state_dict."""
    norms = {name: part for name, part in model.named_modules() if isinstance(part, nn.modules.batchnorm._NormBase)}
    found = {
        f"{name}.{key}": getattr(norm, key) for name, norm in norms.items() for key in ("running_mean", "running_var")
    }
    return {key: value for key, value in found.items() if value is not None}


# Settings that checkpoints of earlier versions do not name, as those were trained.
LATER = {"beta1": 0.9, "validate_every": 0, "patience": 0}


def _identity(settings: TrainSettings) -> dict[str, Any]:
    """The settings on which the weights depend."""
    return {key: value for key, value in vars(settings).items() if key not in ("save_every", "log_every")}


@runtime_checkable
class HasPlayers(Protocol):
    players: tuple[str, ...]


@contextmanager
def _turn(state: _State) -> Iterator[Callable[[Any, torch.Generator], tuple[Tensor, Mapping[str, Tensor]]]]:
    """Yields the loss of this step; of an adversarial model only the player's parameters ask for gradients meanwhile."""
    model = state.model
    if not isinstance(model, HasPlayers):
        yield cast(Trainable, model).loss
        return
    player = model.players[state.step % len(model.players)]
    others = [p for key, p in state.parameters.items() if not key.startswith(f"{player}.")]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield functools.partial(cast(Adversarial, model).player_loss, player)
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _read(checkpoints: Checkpoints, name: str) -> tuple[Mapping[str, Tensor], Mapping[str, Any], int]:
    checkpoint = checkpoints.load(name)
    return checkpoint.tensors, checkpoint.meta, checkpoint.step


def _update(state: _State, batch: Any, place: torch.device) -> dict[str, Any]:
    """One optimizer step; counts it only when it was good. Returns what to log."""
    settings, parameters = state.settings, list(state.parameters.values())
    before = [value.clone() for value in kept_buffers(state.model)]
    state.optimizer.zero_grad(set_to_none=True)
    try:
        with _turn(state) as loss_of:
            with torch.autocast(place.type, torch.bfloat16, enabled=state.precision is torch.bfloat16):
                loss, values = loss_of(batch, _generator(settings.seed, state.step, place))
            loss.backward()
        loss = average(parameters, loss)
        norm = nn.utils.clip_grad_norm_(parameters, settings.clip or math.inf)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            raise NumericalError(
                f"At step {state.step + 1} the loss is {loss.item()} and its gradient's norm {norm.item()}; "
                f"both must be finite. The weights of step {state.step} are kept. Try a lower lr than {settings.lr:g}."
            )
    except NumericalError:
        for value, old in zip(kept_buffers(state.model), before, strict=True):
            value.copy_(old)
        raise
    rate = learning_rate(settings, state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    state.step += 1
    # The first step may set parameters by its rows, as actnorm does: from then on all have the first process's.
    copy_from_first(state.model.state_dict().values() if state.step == 1 else kept_buffers(state.model))
    if state.average:
        # Young averages forget faster, or the random first weights would stay in them for 1 / (1 - decay) steps.
        decay = min(settings.ema, (1 + state.step) / (10 + state.step))
        torch._foreach_lerp_(list(state.average.values()), [p.detach() for p in state.averaged.values()], 1 - decay)
    return {"loss": loss, "lr": rate, "grad_norm": norm, **values}


def learning_rate(settings: TrainSettings, step: int) -> float:
    """The rate of step `step` in [0, steps): linear warm-up, then half a cosine down to `final_lr_fraction`."""
    warmup = min(settings.warmup, settings.steps // 4)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    cosine = 0.5 + 0.5 * math.cos(math.pi * progress)
    return settings.lr * (settings.final_lr_fraction + (1 - settings.final_lr_fraction) * cosine)


def _generator(seed: int, step: int, place: torch.device) -> torch.Generator:
    rank, _ = rank_and_size()
    mixed = np.random.SeedSequence((seed, step, rank) if rank else (seed, step)).generate_state(1, np.uint64)[0]
    return torch.Generator(place).manual_seed(int(mixed >> np.uint64(1)))


def _to(batch: Any, place: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {key: _to(value, place) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_to(value, place) for value in batch)
    return torch.as_tensor(batch).to(place, non_blocking=True)
