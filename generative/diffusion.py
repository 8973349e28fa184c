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

SCHEDULES = ("linear", "scaled-linear", "cosine", "offset-cosine")
PREDICTIONS = ("eps", "x0", "v")
SAMPLERS = ("ddpm", "ddim", "dpm++")
SPACINGS = ("trailing", "leading", "linspace")

Prediction = Literal["eps", "x0", "v"]
Sampler = Literal["ddpm", "ddim", "dpm++"]
# network(x float32 [M, ...], t int64 [M], row int64 [M], without bool [M]) -> its prediction [M, ...]. `row` says whose
# x it is (its place among the rows), `without` where the prediction is to be made without the condition.
Network = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How much of the signal is left at each of T timesteps.

    "linear": beta from 1e-4 to 0.02 (Ho et al. 2020, section 4; scaled for other T than 1000). "scaled-linear": the root of
    beta is linear (Rombach et al. 2022). "cosine": Nichol & Dhariwal 2021, eq. 17, beta at most 0.999. "offset-cosine":
    alpha is a cosine from 0.95 to 0.02, so that neither end is without signal or without noise (Foster 2023, "Generative
    Deep Learning", chapter 8).

    Args:
        betas: the first and the last, of the linear kinds; None are those of Ho et al.
        clean: whether what comes after timestep 0 is the picture itself; else it is as noisy as at timestep 0, which some
            public networks were made for.
    """

    kind: Literal["linear", "scaled-linear", "cosine", "offset-cosine"] = "offset-cosine"
    timesteps: int = 1000
    betas: tuple[float, float] | None = None
    clean: bool = True

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ConfigError(f"kind is '{self.kind}'. {did_you_mean(self.kind, SCHEDULES)}")
        if self.timesteps < 2:
            raise ConfigError(f"timesteps is {self.timesteps}; it must be at least 2.")
        if self.betas is not None and not 0 < self.betas[0] <= self.betas[1] < 1:
            raise ConfigError(f"betas are {self.betas}; they must rise within (0, 1).")

    @property
    def alpha_sigma(self) -> tuple[Tensor, Tensor]:
        """alpha and sigma, float32 [T] each."""
        return _rates(self.kind, self.timesteps, self.betas)[1]

    def at(self, t: int) -> tuple[float, float]:
        """alpha and sigma of timestep t; t = -1 is the picture itself, (1, 0), where the schedule ends clean."""
        if t < 0 and self.clean:
            return 1.0, 0.0
        alpha, sigma = _rates(self.kind, self.timesteps, self.betas)[0]
        return float(alpha[max(t, 0)]), float(sigma[max(t, 0)])

    def rates(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of timesteps t int64 [B], shaped to multiply `like` [B, ...]."""
        shape = (-1,) + (1,) * (like.dim() - 1)
        alpha, sigma = (rate[t.cpu()].to(like.device).view(shape) for rate in self.alpha_sigma)
        return alpha, sigma


@functools.cache
def _rates(
    kind: str, timesteps: int, betas: tuple[float, float] | None
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[Tensor, Tensor]]:
    """(alpha, sigma) of all timesteps as float64, and the same as float32 tensors."""
    if kind in ("linear", "scaled-linear"):
        first, last = betas or (1e-4 * 1000 / timesteps, 0.02 * 1000 / timesteps)
        power = 1 if kind == "linear" else 2
        beta = np.linspace(first ** (1 / power), last ** (1 / power), timesteps) ** power
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

    Timesteps are uniform, one from each B-th of them, so that every batch sees all levels of noise.
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
    """All steps of a row: the timesteps int64 [K], falling, the sums' numbers (a, b, c, d), float64 [K, 4], and between which
    two the variance of the noise lies where a network tells it: their logarithms, float64 [K, 2]."""

    timesteps: np.ndarray
    numbers: np.ndarray
    variances: np.ndarray


@dataclass(frozen=True)
class Spacing:
    """Which timesteps are taken (Lin et al. 2023, table 2): "trailing" evenly from the last one down, "leading" evenly from
    the first one up, "linspace" with both ends. offset: added to each, of "leading"."""

    kind: Literal["trailing", "leading", "linspace"] = "trailing"
    offset: int = 0

    def timesteps(self, total: int, sampler: Sampler, steps: int) -> np.ndarray:
        """int64 [steps], falling. Of the last two kinds DPM-Solver++ takes one more and leaves out the lowest, as diffusers does."""
        if self.kind == "trailing":
            return np.round(np.arange(total, 0, -total / steps)[:steps]).astype(np.int64) - 1
        one_more = sampler == "dpm++" or (self.kind == "linspace" and steps == 1)
        points = steps + one_more
        if self.kind == "leading":
            rising = np.arange(points) * (total // points) + self.offset
        else:
            rising = np.round(np.linspace(0, total - 1, points))
        return np.minimum(rising[int(one_more) :][::-1].astype(np.int64), total - 1)


@functools.lru_cache(maxsize=256)
def plan(
    schedule: Schedule, sampler: Sampler, steps: int, eta: float = 0.0, spacing: Spacing = Spacing("trailing")
) -> Plan:
    """The plan of `steps` steps.

    Args:
        sampler: "ddpm" (Ho et al. 2020, eq. 7), "ddim" (Song et al. 2021, eq. 12 and 16), or "dpm++" (DPM-Solver++ 2M, Lu
            et al. 2022, algorithm 2; its first and last steps are of first order).
        eta: of "ddim": 0 adds no noise, 1 as much as "ddpm" does.

    Raises:
        UsageError: an unknown sampler, steps outside [1, T] or more than the spacing has, or eta outside [0, 1].
    """
    if sampler not in SAMPLERS:
        raise UsageError(f"Unknown sampler '{sampler}'. {did_you_mean(sampler, SAMPLERS)}")
    if not 1 <= steps <= schedule.timesteps:
        raise UsageError(f"{steps} steps asked for; allowed are 1 to {schedule.timesteps}.")
    if not 0 <= eta <= 1:
        raise UsageError(f"eta is {eta}; it must be in [0, 1].")
    timesteps = spacing.timesteps(schedule.timesteps, sampler, steps)
    if (np.diff(timesteps) >= 0).any():
        raise UsageError(f"{steps} steps asked for; with timesteps that are '{spacing.kind}' there are fewer.")
    ends = [*timesteps.tolist(), -1]
    if sampler == "dpm++":
        numbers = [_dpm_numbers(schedule, ends[max(k - 1, 0)], ends[k], ends[k + 1]) for k in range(steps)]
    else:
        share = 1.0 if sampler == "ddpm" else eta  # DDPM is DDIM with all of the noise (Song et al. 2021, section 4.1)
        numbers = [_ddim_numbers(schedule, ends[k], ends[k + 1], share) for k in range(steps)]
    variances = [_log_variances(schedule, ends[k], ends[k + 1]) for k in range(steps)]
    return Plan(timesteps, np.array(numbers), np.array(variances))


def _log_variances(schedule: Schedule, t: int, s: int) -> tuple[float, float]:
    """Of the true posterior where x_0 is a point, and of one step of noising (Nichol & Dhariwal 2021, section 3.1)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t), schedule.at(s)
    beta = max(1 - (alpha_t / alpha_s) ** 2, 1e-20)
    return math.log(max((sigma_s / sigma_t) ** 2 * beta, 1e-20)), math.log(beta)


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
        sampler: Sampler = "dpm++", eta: float = 0.0, spacing: Spacing = Spacing("trailing"),
    ) -> Row:  # fmt: skip
        """A row at its first step, all noise. Raises UsageError for what `plan` refuses, and for a negative seed."""
        if seed < 0:
            raise UsageError(f"The seed is {seed}; it must not be negative.")
        return cls(plan(schedule, sampler, steps, eta, spacing), seed, guidance, noise_of(seed, 0, shape))

    @property
    def done(self) -> bool:
        return self.position == len(self.plan.timesteps)

    @property
    def timestep(self) -> int:
        """Of the step to be made next."""
        return int(self.plan.timesteps[self.position])


@dataclass(frozen=True)
class Dynamic:
    """Estimates of x_0 are kept within the `share` of them that lies nearest to 0, but no less than [-1, 1] and no more than
    `most`, and shrunk to [-1, 1] (Saharia et al. 2022, "dynamic thresholding", section 2.3)."""

    share: float = 0.995
    most: float = 1.0

    def __call__(self, x_0: Tensor) -> Tensor:
        far = torch.quantile(x_0.abs().flatten(1), self.share, dim=1).clamp(1, max(1.0, self.most))
        far = far.view(-1, *(1,) * (x_0.dim() - 1))
        return x_0.clamp(-far, far) / far


@torch.no_grad()
def advance(
    rows: Sequence[Row], network: Network, schedule: Schedule, prediction: Prediction, *, clip: float | Dynamic = 0.0,
    device: torch.device | str = "cpu",
) -> None:  # fmt: skip
    """Makes one step of every row, in place, with one call of the network. No row may be done.

    Args:
        network: see `Network`. It gets every row, and every row whose guidance is not 1 a second time, without its
            condition. With twice the channels, the second half tells the variance of the noise: -1 to 1, from the
            least to the largest of `Plan.variances` (for rows of "ddpm").
        clip: estimates of x_0 are kept within [-clip, clip]; 0 leaves them as they are.
        device: where network and arithmetic work, and where the rows' tensors are afterwards.
    """
    if any(row.done for row in rows):
        raise UsageError("A row that is done cannot be advanced; take it out of the batch.")
    x_t = torch.stack([row.x for row in rows]).to(device)
    t = torch.tensor([row.timestep for row in rows])
    output, spread = _guided(rows, network, x_t, t.to(device))
    x_0 = to_x0(prediction, output, x_t, *schedule.rates(t, x_t))
    if isinstance(clip, Dynamic):
        x_0 = clip(x_0)
    elif clip:
        x_0 = x_0.clamp(-clip, clip)
    numbers = torch.from_numpy(np.stack([row.plan.numbers[row.position] for row in rows])).float()
    a, b, c, d = numbers.T.reshape(4, -1, *(1,) * (x_t.dim() - 1)).to(device)
    before = torch.stack([x_0[i] if row.estimate is None else row.estimate.to(device) for i, row in enumerate(rows)])
    d = d if spread is None else _told_deviation(rows, spread)
    x_s = a * x_t + b * x_0 + c * before + d * _fresh_noise(rows, x_t, spread is not None)
    for i, row in enumerate(rows):
        row.x, row.estimate, row.position = x_s[i], x_0[i], row.position + 1


def _guided(rows: Sequence[Row], network: Network, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the network says, guided where a row asks for it; one call, float32. And what it tells with its condition of the
    variance, or None."""
    every = torch.arange(len(rows))
    twice = torch.tensor([i for i, row in enumerate(rows) if row.guidance != 1.0], dtype=torch.long)
    row = torch.cat([every, twice])
    without = torch.arange(len(row)) >= len(rows)
    place = x_t.device
    output = network(x_t[row.to(place)], t[row.to(place)], row.to(place), without.to(place)).float()
    spread = None
    if output.shape[1] == 2 * x_t.shape[1]:
        output, spread = output.chunk(2, 1)
        spread = spread[: len(rows)]
    guided, unconditional = output[: len(rows)].clone(), output[len(rows) :]
    for i, other in zip(twice.tolist(), unconditional, strict=True):
        guided[i] = other + rows[i].guidance * (guided[i] - other)
    return guided, spread


def _told_deviation(rows: Sequence[Row], spread: Tensor) -> Tensor:
    """Of the noise, as the network tells it [B, ...]; none at timestep 0."""
    ends = torch.from_numpy(np.stack([row.plan.variances[row.position] for row in rows])).float().to(spread.device)
    least, largest = ends.T.reshape(2, -1, *(1,) * (spread.dim() - 1))
    share = (spread + 1) / 2
    return torch.exp(0.5 * (share * largest + (1 - share) * least))


def _fresh_noise(rows: Sequence[Row], like: Tensor, told: bool) -> Tensor:
    """Noise of the rows that have some at this step: where their plan says so, or where its size is `told` by the network."""
    noise = torch.zeros_like(like)
    for i, row in enumerate(rows):
        if row.timestep > 0 if told else row.plan.numbers[row.position, 3]:
            noise[i] = noise_of(row.seed, row.position + 1, row.x.shape)
    return noise
