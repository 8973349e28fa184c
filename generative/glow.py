"""Glow (Kingma & Dhariwal 2018): a flow over pictures, on several scales.

    levels of (squeeze 2x2 pixels into channels, then `steps` times: actnorm, invertible 1x1 convolution, affine coupling);
    after each level but the last, half of the channels become z at once (section 3, figure 2).

Actnorm begins so that the first batch has mean 0 and variance 1 in each channel (section 3.1). The 1x1 convolution is
P L (U + diag(s)) with P fixed (section 3.2), whose log-determinant is the sum of log |s|.

Legend: B pictures, C H W channels, rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneira.platform.errors import ConfigError

from .flows import Flow
from .spaces import Space


@dataclass(frozen=True, kw_only=True)
class GlowConfig:
    """levels: scales; each halves the picture's sides. steps: of each. width: channels of a coupling's network."""

    levels: int = 2
    steps: int = 8
    width: int = 96

    def __post_init__(self) -> None:
        for key in ("levels", "steps", "width"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least 1.")


class Glow(Flow):
    """Raises ConfigError for rows that are not pictures, or whose sides cannot be halved `levels` times."""

    kind = "glow"
    Config = GlowConfig
    is_begun: Tensor

    def __init__(self, config: GlowConfig, space: Space):
        super().__init__(config, space)
        space.require("pictures", self.kind)
        height, width, channels = space.shape
        if height % 2**config.levels or width % 2**config.levels:
            raise ConfigError(f"{height}x{width} pixels cannot be halved {config.levels} times; set fewer levels.")
        self.scales: Any = nn.ModuleList()
        for level in range(config.levels):
            channels *= 4
            self.scales.append(nn.ModuleList(Step(channels, config.width) for _ in range(config.steps)))
            if level + 1 < config.levels:
                channels //= 2
        self.register_buffer("is_begun", torch.tensor(False))

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        if self.training and not self.is_begun:
            self._begin(batch["x"])
        return super().loss(batch, generator)

    @torch.no_grad()
    def _begin(self, rows: Tensor) -> None:
        """Sets every actnorm by the first batch, in the order in which the batch comes through them."""
        x = _channels_first(self.to_real(rows, self.generator(0)))
        for level, steps in enumerate(self.scales):
            x = F.pixel_unshuffle(x, 2)
            for step in steps:
                step.norm.begin(x)
                x, _ = step(x)
            if level + 1 < len(self.scales):
                x = x.chunk(2, 1)[0]
        self.is_begun.fill_(True)

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, total = _channels_first(x), x.new_zeros(len(x))
        parts = []
        for level, steps in enumerate(self.scales):
            x = F.pixel_unshuffle(x, 2)
            for step in steps:
                x, log_det = step(x)
                total = total + log_det
            if level + 1 < len(self.scales):
                x, done = x.chunk(2, 1)
                parts.append(done.flatten(1))
        return torch.cat([*parts, x.flatten(1)], 1).reshape(-1, *self.space.shape), total

    def invert(self, z: Tensor) -> Tensor:
        flat = z.reshape(len(z), -1)
        height, width, channels = self.space.shape
        parts = []
        for level in range(len(self.scales)):
            height, width, channels = height // 2, width // 2, channels * 4
            if level + 1 < len(self.scales):
                channels //= 2
            size = height * width * channels
            parts.append(flat[:, :size].reshape(-1, channels, height, width))
            flat = flat[:, size:]
        x = parts.pop()
        for level in reversed(range(len(self.scales))):
            if level + 1 < len(self.scales):
                x = torch.cat([x, parts.pop()], 1)
            for step in reversed(self.scales[level]):
                x = step.invert(x)
            x = F.pixel_shuffle(x, 2)
        return x.permute(0, 2, 3, 1)


def _channels_first(x_BHWC: Tensor) -> Tensor:
    return x_BHWC.permute(0, 3, 1, 2).float()


class Step(nn.Module):
    """Actnorm, 1x1 convolution, coupling: x [B, C, H, W] -> (the same shape, log-determinant [B])."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.norm, self.mix, self.coupling = ActNorm(channels), Mix(channels), Coupling(channels, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for part in (self.norm, self.mix, self.coupling):
            x, log_det = part(x)
            total = total + log_det
        return x, total

    def invert(self, x: Tensor) -> Tensor:
        return self.norm.invert(self.mix.invert(self.coupling.invert(x)))


class ActNorm(nn.Module):
    """Scales and shifts each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.log_scale, self.shift = (nn.Parameter(torch.zeros(1, channels, 1, 1)) for _ in range(2))

    @torch.no_grad()
    def begin(self, x: Tensor) -> None:
        mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
        self.log_scale.copy_(-(std + 1e-3).log())  # a channel that is always the same is left about as small as it is
        self.shift.copy_(-mean)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x + self.shift) * self.log_scale.exp(), self.log_scale.sum() * x[0, 0].numel()

    def invert(self, x: Tensor) -> Tensor:
        return x * (-self.log_scale).exp() - self.shift


class Mix(nn.Module):
    """An invertible matrix over channels, kept as P L (U + diag(sign * exp(log_s)))."""

    p: Tensor
    sign: Tensor

    def __init__(self, channels: int):
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels)).Q
        p, lower, upper = torch.linalg.lu(rotation)
        s = upper.diagonal()
        self.register_buffer("p", p)
        self.register_buffer("sign", s.sign())
        self.lower, self.upper = nn.Parameter(lower.tril(-1)), nn.Parameter(upper.triu(1))
        self.log_s = nn.Parameter(s.abs().log())

    def _factors(self) -> tuple[Tensor, Tensor]:
        lower = self.lower.tril(-1) + torch.eye(len(self.log_s), device=self.p.device)
        return lower, self.upper.triu(1) + torch.diag(self.sign * self.log_s.exp())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = self._factors()
        return _mixed(self.p @ lower @ upper, x), self.log_s.sum() * x[0, 0].numel()

    def invert(self, x: Tensor) -> Tensor:
        lower, upper = self._factors()
        inner = torch.linalg.solve_triangular(lower, self.p.T @ torch.eye(len(lower), device=x.device), upper=False)
        return _mixed(torch.linalg.solve_triangular(upper, inner, upper=True), x)


def _mixed(matrix: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("dc,bchw->bdhw", matrix, x)


class Coupling(nn.Module):
    """Half of the channels say how to scale and shift the others; at first not at all."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(channels // 2, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU()
        )
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def _terms(self, given: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = self.last(self.network(given)).float().chunk(2, 1)
        return shift, 2 * torch.tanh(raw / 2)  # log-scale within 2 nats: the inverse stays within float32's reach

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        given, changed = x.chunk(2, 1)
        shift, log_scale = self._terms(given)
        return torch.cat([given, (changed + shift) * log_scale.exp()], 1), log_scale.flatten(1).sum(1)

    def invert(self, x: Tensor) -> Tensor:
        given, changed = x.chunk(2, 1)
        shift, log_scale = self._terms(given)
        return torch.cat([given, changed * (-log_scale).exp() - shift], 1)
