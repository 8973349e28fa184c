"""The one training loop: a plain function that fits any model whose `loss(batch, generator)` gives a scalar.

    model = fit(VAE(VAEConfig()), lambda step: frames[choice(step)], TrainSettings(steps=2000, batch_size=128))

Batches are a pure function of the step, and the noise of step k comes from a generator seeded by (seed, k). So a step
depends on nothing but weights, optimizer, EMA and its number: a run that was killed and goes on from its checkpoint
ends with the same bytes as one that was not (same machine, same number of threads; GPUs in torch's deterministic mode).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from oneira.platform.checkpoints import Checkpoints
from oneira.platform.devices import Device, LocalDevice, pick_precision
from oneira.platform.errors import CheckpointError, ConfigError, NumericalError


class Trainable(Protocol):
    """What `fit` asks of an `nn.Module`. All randomness must come from `generator`, none from torch's global one."""

    def loss(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Returns (scalar to minimise, named scalars to log)."""
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
    clip: float = 1.0  # of the global gradient norm; 0 = off
    ema: float = 0.0  # decay of the averaged weights, which are returned; 0 = off
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    channels_last: bool = False
    save_every: int = 0  # steps; 0 = never
    log_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        lowest_of = {"steps": 1, "batch_size": 1, "warmup": 0, "save_every": 0, "log_every": 1, "seed": 0}
        for key, lowest in lowest_of.items():
            if getattr(self, key) < lowest:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least {lowest}.")
        for key in ("lr", "weight_decay", "clip"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be finite and not negative.")
        if not 0 <= self.final_lr_fraction <= 1:
            raise ConfigError(f"final_lr_fraction is {self.final_lr_fraction}; it must be in [0, 1].")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema is {self.ema}; it must be in [0, 1).")


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
) -> Model:
    """Trains `model` in place and returns it in eval mode, with its averaged weights if `settings.ema` is on.

    Args:
        model: see `Trainable`; its weights stay fp32, the forward pass runs in `settings.precision`.
        batch_at: step in [0, steps) -> batch: tensors, or dicts, lists and tuples of them. Must be a pure function.
        device: where to train and who grants the time; None means this process's own.
        checkpoints, name: where the state is saved every `save_every` steps and at the end, and from where it goes on.
        log: called as log(step, loss=, lr=, grad_norm=, **model's) every `log_every` steps and at the end, from step 1.
        init: weights to begin with where there is no checkpoint.

    Raises:
        NumericalError: a loss or gradient is not finite; model and checkpoint keep the last good step.
        CheckpointError: the checkpoint `name` is of another model or settings, or cannot be written.
    """
    device = LocalDevice() if device is None else device
    place = device.torch_device
    model.to(place).train()
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    if init is not None:
        model.load_state_dict(dict(init))
    state = _State(model, settings, place)
    if checkpoints is not None and checkpoints.exists(name):
        state.load(*_read(checkpoints, name))
    with device.lease(bytes=state.num_bytes(), priority="train") as lease:
        for step in range(state.step, settings.steps):
            lease.step()
            try:
                values = _update(state, _to(batch_at(step), place), place)
            except NumericalError:
                if checkpoints is not None and settings.save_every and state.step:
                    checkpoints.save(name, *state.save(), step=state.step)
                raise
            done = state.step == settings.steps
            if checkpoints is not None and settings.save_every and (done or state.step % settings.save_every == 0):
                checkpoints.save(name, *state.save(), step=state.step)
            if done or state.step % settings.log_every == 0:
                log(state.step, **{key: float(value) for key, value in values.items()})
    state.use_average()
    return model.eval()


class _State:
    """All that one step hands to the next: weights, optimizer, averaged weights, number of steps done."""

    def __init__(self, model: nn.Module, settings: TrainSettings, place: torch.device):
        self.model, self.settings, self.step = model, settings, 0
        self.parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.average = {key: p.detach().clone() for key, p in self.parameters.items()} if settings.ema else {}
        self.precision = pick_precision(settings.precision, place)

    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.model.state_dict().values()) * (5 if self.average else 4)

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        tensors |= {f"average.{key}": value for key, value in self.average.items()}
        for key, parameter in self.parameters.items():
            for kind, value in self.optimizer.state[parameter].items():
                tensors[f"{kind}.{key}"] = value
        return tensors, {"settings": _identity(self.settings)}

    def load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], step: int) -> None:
        if meta.get("settings") != _identity(self.settings):
            wanted = _identity(self.settings)
            raise CheckpointError(f"The checkpoint was trained with {meta.get('settings')}, not {wanted}.")
        try:
            self.model.load_state_dict({key: tensors[f"model.{key}"] for key in self.model.state_dict()})
            for key, value in self.average.items():
                value.copy_(tensors[f"average.{key}"])
            for key, parameter in self.parameters.items():
                moments = {kind: torch.empty_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
                for kind, value in moments.items():
                    value.copy_(tensors[f"{kind}.{key}"])
                count = tensors[f"step.{key}"].to(parameter.device)
                self.optimizer.state[parameter] = {"step": count, **moments}
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"The checkpoint is of another model: {error}") from error
        self.step = step

    @torch.no_grad()
    def use_average(self) -> None:
        for key, value in self.average.items():
            self.parameters[key].copy_(value)


def _identity(settings: TrainSettings) -> dict[str, Any]:
    """The settings on which the weights depend."""
    return {key: value for key, value in vars(settings).items() if key not in ("save_every", "log_every")}


def _read(checkpoints: Checkpoints, name: str) -> tuple[Mapping[str, Tensor], Mapping[str, Any], int]:
    checkpoint = checkpoints.load(name)
    return checkpoint.tensors, checkpoint.meta, checkpoint.step


def _update(state: _State, batch: Any, place: torch.device) -> dict[str, Any]:
    """One optimizer step; counts it only when it was good. Returns what to log."""
    settings, parameters = state.settings, list(state.parameters.values())
    state.optimizer.zero_grad(set_to_none=True)
    with torch.autocast(place.type, torch.bfloat16, enabled=state.precision is torch.bfloat16):
        loss, values = cast(Trainable, state.model).loss(batch, _generator(settings.seed, state.step, place))
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, settings.clip or math.inf)
    if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
        raise NumericalError(
            f"At step {state.step + 1} the loss is {loss.item()} and its gradient's norm {norm.item()}; "
            f"both must be finite. The weights of step {state.step} are kept. Try a lower lr than {settings.lr:g}."
        )
    rate = learning_rate(settings, state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    state.step += 1
    if state.average:
        # Young averages forget faster, or the random first weights would stay in them for 1 / (1 - decay) steps.
        decay = min(settings.ema, (1 + state.step) / (10 + state.step))
        torch._foreach_lerp_(list(state.average.values()), [p.detach() for p in parameters], 1 - decay)
    return {"loss": loss.detach(), "lr": rate, "grad_norm": norm, **values}


def learning_rate(settings: TrainSettings, step: int) -> float:
    """The rate of step `step` in [0, steps): linear warm-up, then half a cosine down to `final_lr_fraction`."""
    warmup = min(settings.warmup, settings.steps // 4)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    cosine = 0.5 + 0.5 * math.cos(math.pi * progress)
    return settings.lr * (settings.final_lr_fraction + (1 - settings.final_lr_fraction) * cosine)


def _generator(seed: int, step: int, place: torch.device) -> torch.Generator:
    mixed = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0]
    return torch.Generator(place).manual_seed(int(mixed >> np.uint64(1)))


def _to(batch: Any, place: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {key: _to(value, place) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_to(value, place) for value in batch)
    return torch.as_tensor(batch).to(place, non_blocking=True)
