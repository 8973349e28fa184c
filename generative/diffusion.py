"""Diffusion: noise schedules, the training pair, and samplers that work row by row.

    schedule = Schedule(kind="offset-cosine")
    x_t, t, target = training_pair(schedule, "v", x_0, generator)          # train a network to give target from (x_t, t)

    rows = [Row.begin(schedule, (3, 64, 64), seed=7, steps=20, guidance=3.0)]
    while not all(row.done for row in rows):
        advance(rows, network, schedule, "v", clip=1.0)                     # rows may join and leave between any two steps
    pictures = torch.stack([row.x for row in rows])

x_t = alpha_t x_0 + sigma_t noise with alpha^2 + sigma^2 = 1 (variance preserving). With x_0 as the network estimates it,
one step of DDPM, DDIM and DPM-Solver++ alike is a sum

    x_s = a x_t + b x_0 + c x_0' + d noise        (x_0': the estimate of the step before)

whose four numbers depend on the row's schedule alone. So rows of different samplers, numbers of steps, seeds and guidance
share one forward pass and one sum, and a row never depends on who shares the batch with it.

Legend: B rows, T timesteps of training, K steps of a row; t the timestep of now, s the next one, which is less noisy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from oneira.platform.errors import ConfigError, UsageError, did_you_mean

SCHEDULES = ("linear", "cosine", "offset-cosine")
PREDICTIONS = ("eps", "x0", "v")
SAMPLERS = ("ddpm", "ddim", "dpm++")

Prediction = Literal["eps", "x0", "v"]
Sampler = Literal["ddpm", "ddim", "dpm++"]
# network(x float32 [M, ...], t int64 [M], row int64 [M], without bool [M]) -> its prediction [M, ...]. `row` says whose
# x it is (its place among the rows), `without` where the prediction is to be made without the condition.
Network = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How much of the signal is left at each of T timesteps.

    "linear": beta from 1e-4 to 0.02 (Ho et al. 2020, section 4; scaled for other T than 1000). "cosine": Nichol &
    Dhariwal 2021, eq. 17, beta at most 0.999. "offset-cosine": alpha is a cosine from 0.95 to 0.02, so that neither end
    is without signal or without noise (Foster 2023, "Generative Deep Learning", chapter 8).
    """

    kind: Literal["linear", "cosine", "offset-cosine"] = "offset-cosine"
    timesteps: int = 1000

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ConfigError(f"kind is '{self.kind}'. {did_you_mean(self.kind, SCHEDULES)}")
        if self.timesteps < 2:
            raise ConfigError(f"timesteps is {self.timesteps}; it must be at least 2.")

    @property
    def alpha_sigma(self) -> tuple[Tensor, Tensor]:
        """alpha and sigma, float32 [T] each."""
        return _rates(self.kind, self.timesteps)[1]

    def at(self, t: int) -> tuple[float, float]:
        """alpha and sigma of timestep t; t = -1 is the picture itself: (1, 0)."""
        if t < 0:
            return 1.0, 0.0
        alpha, sigma = _rates(self.kind, self.timesteps)[0]
        return float(alpha[t]), float(sigma[t])

    def rates(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of timesteps t int64 [B], shaped to multiply `like` [B, ...]."""
        shape = (-1,) + (1,) * (like.dim() - 1)
        alpha, sigma = (rate[t.cpu()].to(like.device).view(shape) for rate in self.alpha_sigma)
        return alpha, sigma


@functools.cache
def _rates(kind: str, timesteps: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[Tensor, Tensor]]:
    """(alpha, sigma) of all timesteps as float64, and the same as float32 tensors."""
    if kind == "linear":
        beta = np.linspace(1e-4, 0.02, timesteps) * (1000 / timesteps)
        squared = np.cumprod(1 - np.minimum(beta, 0.999))
    elif kind == "cosine":
        left = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2
        squared = np.cumprod(1 - np.minimum(1 - left[1:] / left[:-1], 0.999))
    else:
        squared = np.cos(np.linspace(math.acos(0.95), math.acos(0.02), timesteps)) ** 2
    rates = np.sqrt(squared), np.sqrt(1 - squared)
    return rates, (torch.from_numpy(rates[0]).float(), torch.from_numpy(rates[1]).float())


def training_pair(
    schedule: Schedule, prediction: Prediction, x_0: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """What to show the network, and what it should say: (x_t [B, ...], t int64 [B], target [B, ...]).

    Timesteps are uniform, one from each B-th of their range, so that every batch sees all levels of noise.
    """
    rows, place = len(x_0), x_0.device
    jitter = torch.rand(rows, generator=generator, device=place)
    order = torch.randperm(rows, generator=generator, device=place)
    t = ((order + jitter) / rows * schedule.timesteps).long().clamp_(max=schedule.timesteps - 1)
    noise = torch.randn(x_0.shape, generator=generator, device=place)
    alpha, sigma = schedule.rates(t, x_0)
    x_t = alpha * x_0 + sigma * noise
    if prediction == "v":
        return x_t, t, alpha * noise - sigma * x_0
    return x_t, t, noise if prediction == "eps" else x_0


def to_x0(prediction: Prediction, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The estimate of x_0 that a prediction amounts to (v: Salimans & Ho 2022, appendix D)."""
    if prediction == "eps":
        return (x_t - sigma * output) / alpha
    if prediction == "v":
        return alpha * x_t - sigma * output
    return output


# Samplers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """All steps of a row: the timesteps int64 [K], falling, and the sums' numbers (a, b, c, d), float64 [K, 4]."""

    timesteps: np.ndarray
    numbers: np.ndarray


@functools.lru_cache(maxsize=256)
def plan(schedule: Schedule, sampler: Sampler, steps: int, eta: float = 0.0) -> Plan:
    """The plan of `steps` steps, evenly spaced from the last timestep down ("trailing": Lin et al. 2023, table 2).

    Args:
        sampler: "ddpm" (Ho et al. 2020, eq. 7), "ddim" (Song et al. 2021, eq. 12 and 16), or "dpm++" (DPM-Solver++ 2M, Lu
            et al. 2022, algorithm 2; its first and last steps are of first order).
        eta: of "ddim": 0 adds no noise, 1 as much as "ddpm" does.

    Raises:
        UsageError: an unknown sampler, steps outside [1, T], or eta outside [0, 1].
    """
    if sampler not in SAMPLERS:
        raise UsageError(f"Unknown sampler '{sampler}'. {did_you_mean(sampler, SAMPLERS)}")
    if not 1 <= steps <= schedule.timesteps:
        raise UsageError(f"{steps} steps asked for; allowed are 1 to {schedule.timesteps}.")
    if not 0 <= eta <= 1:
        raise UsageError(f"eta is {eta}; it must be in [0, 1].")
    timesteps = np.round(np.arange(schedule.timesteps, 0, -schedule.timesteps / steps)[:steps]).astype(np.int64) - 1
    ends = [*timesteps.tolist(), -1]
    if sampler == "dpm++":
        numbers = [_dpm_numbers(schedule, ends[max(k - 1, 0)], ends[k], ends[k + 1]) for k in range(steps)]
    else:
        share = 1.0 if sampler == "ddpm" else eta  # DDPM is DDIM with all of the noise (Song et al. 2021, section 4.1)
        numbers = [_ddim_numbers(schedule, ends[k], ends[k + 1], share) for k in range(steps)]
    return Plan(timesteps, np.array(numbers))


def _ddim_numbers(schedule: Schedule, t: int, s: int, eta: float) -> tuple[float, float, float, float]:
    alpha_t, sigma_t = schedule.at(t)
    alpha_s, sigma_s = schedule.at(s)
    d = eta * sigma_s / sigma_t * math.sqrt(1 - (alpha_t / alpha_s) ** 2)
    a = math.sqrt(max(sigma_s**2 - d**2, 0.0)) / sigma_t
    return a, alpha_s - a * alpha_t, 0.0, d


def _dpm_numbers(schedule: Schedule, before: int, t: int, s: int) -> tuple[float, float, float, float]:
    """`before` is the timestep of the estimate before, or t itself at the first step."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t), schedule.at(s)
    if s < 0:
        return 0.0, 1.0, 0.0, 0.0  # the picture itself is the last estimate
    a, b = sigma_s / sigma_t, alpha_s - alpha_t * sigma_s / sigma_t
    if before == t:
        return a, b, 0.0, 0.0
    log_snr = [math.log(alpha / sigma) for alpha, sigma in map(schedule.at, (before, t, s))]
    extra = 0.5 * (log_snr[2] - log_snr[1]) / (log_snr[1] - log_snr[0])
    return a, b * (1 + extra), -b * extra, 0.0


def noise_of(seed: int, place: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of a row, float32 on the CPU: a function of its seed and of where it is used, nothing else."""
    mixed = np.random.SeedSequence((seed, place)).generate_state(1, np.uint64)[0]
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(int(mixed >> np.uint64(1))))


@dataclass
class Row:
    """One sample under way. Make it with `Row.begin`; `advance` moves it.

    Attributes:
        plan, seed: how it goes, and from where its noise comes. guidance: how far to go from what the network says
            without the condition (0) to what it says with it (1) and beyond (Ho & Salimans 2022); 1 needs one pass.
        x: float32 [...], what it is now. estimate: of x_0, from the last step; None before the first. position: steps done.
    """

    plan: Plan
    seed: int
    guidance: float
    x: Tensor
    estimate: Tensor | None = None
    position: int = 0

    @classmethod
    def begin(
        cls, schedule: Schedule, shape: Sequence[int], *, seed: int, steps: int, guidance: float = 1.0,
        sampler: Sampler = "dpm++", eta: float = 0.0,
    ) -> Row:  # fmt: skip
        """A row at its first step, all noise. Raises UsageError for what `plan` refuses, and for a negative seed."""
        if seed < 0:
            raise UsageError(f"The seed is {seed}; it must not be negative.")
        return cls(plan(schedule, sampler, steps, eta), seed, guidance, noise_of(seed, 0, shape))

    @property
    def done(self) -> bool:
        return self.position == len(self.plan.timesteps)

    @property
    def timestep(self) -> int:
        """Of the step to be made next."""
        return int(self.plan.timesteps[self.position])


@torch.no_grad()
def advance(
    rows: Sequence[Row], network: Network, schedule: Schedule, prediction: Prediction, *, clip: float = 0.0,
    device: torch.device | str = "cpu",
) -> None:  # fmt: skip
    """Makes one step of every row, in place, with one call of the network. No row may be done.

    Args:
        network: see `Network`. It gets every row, and every row whose guidance is not 1 a second time, without its
            condition.
        clip: estimates of x_0 are kept within [-clip, clip]; 0 leaves them as they are.
        device: where network and arithmetic work, and where the rows' tensors are afterwards.
    """
    if any(row.done for row in rows):
        raise UsageError("A row that is done cannot be advanced; take it out of the batch.")
    x_t = torch.stack([row.x for row in rows]).to(device)
    t = torch.tensor([row.timestep for row in rows])
    output = _guided(rows, network, x_t, t.to(device))
    x_0 = to_x0(prediction, output, x_t, *schedule.rates(t, x_t))
    if clip:
        x_0 = x_0.clamp(-clip, clip)
    numbers = torch.from_numpy(np.stack([row.plan.numbers[row.position] for row in rows])).float()
    a, b, c, d = numbers.T.reshape(4, -1, *(1,) * (x_t.dim() - 1)).to(device)
    before = torch.stack([x_0[i] if row.estimate is None else row.estimate.to(device) for i, row in enumerate(rows)])
    x_s = a * x_t + b * x_0 + c * before + d * _fresh_noise(rows, x_t)
    for i, row in enumerate(rows):
        row.x, row.estimate, row.position = x_s[i], x_0[i], row.position + 1


def _guided(rows: Sequence[Row], network: Network, x_t: Tensor, t: Tensor) -> Tensor:
    """What the network says, guided where a row asks for it; one call, float32."""
    every = torch.arange(len(rows))
    twice = torch.tensor([i for i, row in enumerate(rows) if row.guidance != 1.0], dtype=torch.long)
    row = torch.cat([every, twice])
    without = torch.arange(len(row)) >= len(rows)
    place = x_t.device
    output = network(x_t[row.to(place)], t[row.to(place)], row.to(place), without.to(place)).float()
    guided, unconditional = output[: len(rows)].clone(), output[len(rows) :]
    for i, other in zip(twice.tolist(), unconditional, strict=True):
        guided[i] = other + rows[i].guidance * (guided[i] - other)
    return guided


def _fresh_noise(rows: Sequence[Row], like: Tensor) -> Tensor:
    noise = torch.zeros_like(like)
    for i, row in enumerate(rows):
        if row.plan.numbers[row.position, 3]:
            noise[i] = noise_of(row.seed, row.position + 1, row.x.shape)
    return noise
