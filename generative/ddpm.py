"""Diffusion over pictures: a U-Net that learns to take noise away (Ho, Jain & Abbeel 2020), sampled in any number of steps.

    model.sample(64, seed=0)                                      # DDIM in config.steps steps
    model.sample(64, seed=0, steps=1000, sampler="ddpm")
    model.sample(10, seed=0, labels=torch.arange(10), guidance=2.0)
    model.complete(pictures, known, seed=0)                       # inpainting
    model.interpolate(a, b, 8)                                    # along the arc between their noises

Schedules, the training pair and the samplers are `diffusion`'s. The network sees x_t and the timestep, and of a conditional
model the label, which is left out for a tenth of the rows in training, so that guidance can compare (Ho & Salimans 2022).

Legend: B pictures, C H W channels, rows and columns, K steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneira.platform.errors import ConfigError, UsageError

from .diffusion import Network, Prediction, Row, Sampler, Schedule, advance, plan, to_x0, training_pair
from .gpt import sines
from .interpolation import arc
from .models import GenerativeModel
from .noise import Noise
from .spaces import Space, sheet, visible

LEFT_OUT = 0.1  # the share of rows whose label is left out in training
INVERSION = 50  # steps of `encode`
PAINTING = 100  # of `complete`
TOGETHER = 256  # rows that one pass of the network takes in `sample`


@dataclass(frozen=True, kw_only=True)
class DDPMConfig:
    """widths: channels at each scale, each of half the side. prediction: of the network. steps, guidance:
    of `sample`, where it is not told otherwise."""

    widths: tuple[int, ...] = (48, 96)
    schedule: Schedule = field(default_factory=Schedule)
    prediction: Prediction = "v"
    conditional: bool = False
    steps: int = 20
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if not self.widths or any(width < 8 or width % 8 for width in self.widths):
            raise ConfigError(f"widths is {self.widths}; each must be a multiple of 8.")
        if not 1 <= self.steps <= self.schedule.timesteps:
            raise ConfigError(f"steps is {self.steps}; it must be in [1, {self.schedule.timesteps}].")


class DDPM(GenerativeModel):
    """Raises ConfigError for rows that are not pictures, whose sides cannot be halved, or that have no labels to be told."""

    kind = "ddpm"
    Config = DDPMConfig

    def __init__(self, config: DDPMConfig, space: Space):
        super().__init__(config, space)
        space.require("pictures", self.kind)
        if any(side % 2 ** (len(config.widths) - 1) for side in space.shape[:2]):
            raise ConfigError(
                f"{space.shape[0]}x{space.shape[1]} pixels cannot be halved {len(config.widths) - 1} times."
            )
        if config.conditional and not space.classes:
            raise ConfigError("conditional is on, but these data have no labels.")
        self.network = UNet(space.shape[2], config.widths, space.classes if config.conditional else 0)

    def _real(self, rows: Tensor) -> Tensor:
        """Pictures [B, H, W, C] -> float32 [B, C, H, W] in [-1, 1]."""
        return self.space.to_signed(rows.permute(0, 3, 1, 2))

    def _rows(self, x: Tensor) -> Tensor:
        return self.space.to_levels(x.permute(0, 2, 3, 1)).contiguous()

    @property
    def _shape(self) -> tuple[int, int, int]:
        height, width, channels = self.space.shape
        return channels, height, width

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The mean squared error of what the network predicts."""
        schedule, prediction = self.config.schedule, self.config.prediction
        x_t, t, target = training_pair(schedule, prediction, self._real(batch["x"]), generator)
        labels = None
        if self.config.conditional:
            left_out = torch.rand(len(t), generator=generator, device=t.device) < LEFT_OUT
            labels = torch.where(left_out, self.space.classes, batch["y"])
        error = F.mse_loss(self.network(x_t, t, labels).float(), target)
        return error, {}

    def _labels(self, labels: Tensor | None, count: int) -> Tensor | None:
        """What the network is told of `count` rows; without labels a conditional one is told that there is none."""
        if not self.config.conditional:
            if labels is not None:
                raise UsageError("This model was trained without labels; it cannot be asked for one.")
            return None
        labels = torch.full((count,), self.space.classes) if labels is None else labels
        if len(labels) != count or labels.min() < 0 or labels.max() > self.space.classes:
            raise UsageError(
                f"Wanted are {count} labels in [0, {self.space.classes}), or {self.space.classes} for none."
            )
        return labels.to(self.device)

    def draw(
        self, noise: Noise, *, steps: int = 0, sampler: Sampler = "ddim", guidance: float | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Pictures uint8 [n, H, W, C]; a picture depends on seed, its place and its own settings, not on n.

        Args:
            steps: 0 means those of the config, as does no guidance. guidance: see `diffusion.Row`.
            labels: int64 [n] of a conditional model; by default all labels by turns.
        """
        guidance = self.config.guidance if guidance is None else guidance
        if not self.config.conditional:
            guidance = 1.0  # there is nothing to be guided by
        elif labels is None:
            labels = noise.places % self.space.classes
        if not math.isfinite(guidance):
            raise UsageError(f"guidance is {guidance}; it must be finite.")
        told = self._labels(labels, len(noise))
        rows = [self._begin(seed, i, steps or self.config.steps, sampler, guidance) for seed, i in noise.rows]
        return self._finish(rows, told)

    def check(self, *, steps: int = 0, sampler: Sampler = "ddim", **_: Any) -> None:
        plan(self.config.schedule, sampler, steps or self.config.steps)

    def _begin(self, seed: int, i: int, steps: int, sampler: Sampler, guidance: float = 1.0) -> Row:
        mixed = int(np.random.SeedSequence((seed, i)).generate_state(1)[0])
        return Row.begin(self.config.schedule, self._shape, seed=mixed, steps=steps, sampler=sampler, guidance=guidance)

    def _finish(self, rows: list[Row], labels: Tensor | None) -> Tensor:
        for start in range(0, len(rows), TOGETHER):
            part = rows[start : start + TOGETHER]
            network = self._network(None if labels is None else labels[start : start + TOGETHER])
            while not part[0].done:
                advance(part, network, self.config.schedule, self.config.prediction, clip=1.0, device=self.device)
        return self._rows(torch.stack([row.x for row in rows]))

    def _network(self, labels: Tensor | None) -> Network:
        def network(x: Tensor, t: Tensor, row: Tensor, without: Tensor) -> Tensor:
            told = None if labels is None else torch.where(without, self.space.classes, labels[row])
            return self.network(x, t, told)

        return network

    @torch.no_grad()
    def complete(self, x: Tensor, known: Tensor, seed: int, *, steps: int = 0, labels: Tensor | None = None) -> Tensor:
        """Pictures of which the pixels `known` (bool [n, H, W, C] or one picture's) are given, the others painted in.

        At each step, what is known is put in place with as much new noise as the step has (Lugmayr et al. 2022, eq. 8; their
        repeated steps are not done). steps: 0 means 100, or all where the schedule has fewer.
        """
        steps = steps or min(PAINTING, self.config.schedule.timesteps)
        true, known = self._real(x.to(self.device)), known.to(self.device).expand(x.shape).permute(0, 3, 1, 2)
        told = self._labels(labels, len(x))
        rows = [
            self._begin(seed, i, steps, "ddpm", self.config.guidance if told is not None else 1.0)
            for i in range(len(x))
        ]
        noise, network = Noise([(1, self.generator(row.seed)) for row in rows]), self._network(told)
        while not rows[0].done:
            alpha, sigma = self.config.schedule.at(rows[0].timestep)
            for row, picture, mask, its in zip(rows, true, known, noise.normal(*self._shape), strict=True):
                row.x = torch.where(mask, alpha * picture + sigma * its, row.x.to(picture))
            advance(rows, network, self.config.schedule, self.config.prediction, clip=1.0, device=self.device)
        found = self._rows(torch.stack([row.x for row in rows]))
        return torch.where(known.permute(0, 2, 3, 1), x.to(found), found)

    @torch.no_grad()
    def encode(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Pictures -> the noise that DDIM would make them of, float32 [B, C, H, W], nearly (Song et al. 2021, section 4.3)."""
        schedule, now = self.config.schedule, self._real(x.to(self.device))
        told = self._labels(labels, len(x))
        times = plan(schedule, "ddim", min(INVERSION, schedule.timesteps)).timesteps[::-1]
        before = 0  # the picture itself counts as the least noisy step
        for t in times.tolist():
            (alpha, sigma), (alpha_s, sigma_s) = schedule.at(t), schedule.at(before)
            said = self.network(now, torch.full((len(x),), before, device=self.device), told).float()
            x_0 = to_x0(self.config.prediction, said, now, torch.tensor(alpha_s), torch.tensor(sigma_s)).clamp(-1, 1)
            now, before = alpha * x_0 + sigma * (now - alpha_s * x_0) / sigma_s, t
        return now

    def decode(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Noise [B, C, H, W] -> pictures uint8 [B, H, W, C], by DDIM without new noise."""
        rows = [self._begin(0, i, min(INVERSION, self.config.schedule.timesteps), "ddim") for i in range(len(z))]
        for row, noise in zip(rows, z, strict=True):
            row.x = noise
        return self._finish(rows, self._labels(labels, len(z)))

    def interpolate(self, a: Tensor, b: Tensor, count: int) -> Tensor:
        """`count` pictures between a [H, W, C] and b, nearly these at the ends: along the arc between their noises."""
        z = self.encode(torch.stack([a, b]))
        return self.decode(arc(z[0], z[1], count))

    def pictures(self, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        x, levels = batch["x"][:8].cpu(), self.space.levels
        if len(x) < 8:
            return {}
        known = torch.zeros(self.space.shape, dtype=torch.bool)
        known[: self.space.shape[0] // 2] = True
        painted = self.complete(x, known, 0).cpu()
        ways = torch.cat([self.interpolate(x[i], x[i + 4], 8).cpu() for i in range(4)])
        return {
            "true pictures, and the same with their lower half painted in": sheet(
                visible(torch.cat([x, painted]), levels), 8
            ),
            "between two pictures, along the arc of their noises": sheet(visible(ways, levels), 8),
        }


class UNet(nn.Module):
    """x_t [B, C, H, W], t int64 [B] (and labels int64 [B], of which the last means none) -> [B, C, H, W]."""

    def __init__(self, channels: int, widths: tuple[int, ...], classes: int):
        super().__init__()
        told = 4 * widths[0]
        self.rate = widths[0]
        self.time = nn.Sequential(nn.Linear(widths[0], told), nn.SiLU(), nn.Linear(told, told))
        self.label = nn.Embedding(classes + 1, told) if classes else None
        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down, self.shrink, self.up, self.grow = (nn.ModuleList() for _ in range(4))
        for a, b in zip(widths, (*widths[1:], 0), strict=True):
            self.down.append(Residual(a, a, told))
            self.up.insert(0, Residual(2 * a, a, told))
            if b:
                self.shrink.append(nn.Conv2d(a, b, 3, stride=2, padding=1))
                self.grow.insert(0, nn.Conv2d(b, a, 3, padding=1))
        self.middle = nn.ModuleList(
            [Residual(widths[-1], widths[-1], told), Look(widths[-1]), Residual(widths[-1], widths[-1], told)]
        )
        self.norm, self.last = nn.GroupNorm(8, widths[0]), nn.Conv2d(widths[0], channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        told = self.time(time_vectors(t, self.rate))
        if self.label is not None and labels is not None:
            told = told + self.label(labels)
        x, kept = self.first(x), []
        for i, block in enumerate(self.down):
            x = block(x, told)
            kept.append(x)
            if i < len(self.shrink):
                x = self.shrink[i](x)
        for block in self.middle:
            x = block(x, told)
        for i, block in enumerate(self.up):
            x = block(torch.cat([x, kept.pop()], 1), told)
            if i < len(self.grow):
                x = self.grow[i](F.interpolate(x, scale_factor=2.0))
        return self.last(F.silu(self.norm(x)))


def time_vectors(t: Tensor, width: int) -> Tensor:
    """Timesteps int64 [B] as sines and cosines, float32 [B, width]."""
    table = sines(0, int(t.max()) + 1, width, t.device)
    return table[t]


class Residual(nn.Module):
    """x + two convolutions, with what is told added between them."""

    def __init__(self, inputs: int, outputs: int, told: int):
        super().__init__()
        self.norm_1, self.conv_1 = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.told = nn.Linear(told, outputs)
        self.norm_2, self.conv_2 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.past = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x))) + self.told(F.silu(told))[:, :, None, None]
        return self.past(x) + self.conv_2(F.silu(self.norm_2(h)))


class Look(nn.Module):
    """Attention of one head among all places."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.GroupNorm(8, width),
            nn.Conv2d(width, 3 * width, 1),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        q, k, v = (part.flatten(2).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, 1))
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.out(found)
