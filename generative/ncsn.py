"""Score matching with annealed Langevin dynamics (Song & Ermon 2019), over points or pictures.

    s(x, sigma) learns the slope of log p of data with normal noise sigma, for a falling row of sigmas (eq. 5 and 6);
    x <- x + a s(x, sigma) + sqrt(2 a) noise,  a = step * sigma^2, some steps at each sigma              (algorithm 1)

and a last step to the mean of what x may have been without noise (Jolicoeur-Martineau et al. 2021, section 3.1). The network
says -noise; divided by sigma that is the slope. The largest sigma should be about as large as data are apart (Song & Ermon
2020, technique 1).

Legend: B rows, I levels of noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from oneira.platform.errors import ConfigError

from .ddpm import UNet
from .models import GenerativeModel
from .noise import Noise
from .spaces import Space


@dataclass(frozen=True, kw_only=True)
class NCSNConfig:
    """width: of the network's first scale. first, last, levels: the sigmas, evenly spaced in their logarithm (pixels are seen in
    [-1, 1]). steps, step: of `sample` at each sigma; `step` is half of the paper's epsilon / sigma_last^2."""

    width: int = 48
    first: float = 3.0
    last: float = 0.05
    levels: int = 16
    steps: int = 10
    step: float = 0.15

    def __post_init__(self) -> None:
        for key, lowest in {"width": 8, "levels": 2, "steps": 1}.items():
            if getattr(self, key) < lowest:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least {lowest}.")
        if self.width % 8:
            raise ConfigError(f"width is {self.width}; it must be a multiple of 8.")
        if not (0 < self.last < self.first and 0 < self.step < 1):
            raise ConfigError("The sigmas must fall from `first` to `last` > 0, and `step` must be in (0, 1).")


class NCSN(GenerativeModel):
    """Raises ConfigError for texts, and for pictures whose sides are odd."""

    kind = "ncsn"
    Config = NCSNConfig
    sigmas: Tensor

    def __init__(self, config: NCSNConfig, space: Space):
        super().__init__(config, space)
        if space.kind == "text":
            raise ConfigError("Score matching takes points or pictures, not texts.")
        if space.kind == "pictures" and any(side % 2 for side in space.shape[:2]):
            raise ConfigError(f"{space.shape[0]}x{space.shape[1]} pixels; both sides must be even.")
        sigmas = torch.logspace(0, 1, config.levels, base=config.last / config.first) * config.first
        self.register_buffer("sigmas", sigmas, persistent=False)
        self.network = (
            PointsNetwork(space.dims, 2 * config.width, config.levels)
            if space.kind == "points"
            else UNet(space.shape[2], (config.width, 2 * config.width), 0)
        )

    def _real(self, rows: Tensor) -> Tensor:
        if self.space.kind == "points":
            return rows
        return self.space.to_signed(rows.permute(0, 3, 1, 2))

    def _noise_said(self, x: Tensor, level: Tensor) -> Tensor:
        """The network's guess of -noise. It sees x shrunk to about unit size, whatever the noise."""
        shape = (-1,) + (1,) * (x.dim() - 1)
        small = x / (1 + self.sigmas[level] ** 2).sqrt().view(shape)
        if self.space.kind == "points":
            return self.network(small, level).float()
        return self.network(small, level * (1000 // self.config.levels), None).float()

    def score(self, x: Tensor, level: int) -> Tensor:
        """The slope of log p of rows x (real, [B, ...]) with noise of level `level`."""
        levels = torch.full((len(x),), level, device=x.device)
        return self._noise_said(x, levels) / self.sigmas[level]

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """sigma^2 |s(x + sigma e, sigma) + e / sigma|^2 a number, the mean over levels by chance (eq. 6, its weight)."""
        x = self._real(batch["x"])
        level = torch.randint(self.config.levels, (len(x),), generator=generator, device=x.device)
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        noisy = x + self.sigmas[level].view((-1,) + (1,) * (x.dim() - 1)) * noise
        return (self._noise_said(noisy, level) + noise).square().mean(), {}

    @torch.no_grad()
    def draw(self, noise: Noise) -> Tensor:
        """Rows by `steps` Langevin steps at each sigma from the largest down."""
        height, *rest = self.space.shape
        shape = (height,) if self.space.kind == "points" else (rest[1], height, rest[0])
        x = self.config.first * noise.normal(*shape)
        for level, sigma in enumerate(self.sigmas.tolist()):
            size = self.config.step * sigma**2
            for _ in range(self.config.steps):
                x = x + size * self.score(x, level) + (2 * size) ** 0.5 * noise.normal(*shape)
        x = x + self.sigmas[-1] ** 2 * self.score(x, self.config.levels - 1)
        if self.space.kind == "points":
            return x
        return self.space.to_levels(x.permute(0, 2, 3, 1)).contiguous()


class PointsNetwork(nn.Module):
    """Points [B, D] and levels int64 [B] -> [B, D]."""

    def __init__(self, dims: int, width: int, levels: int):
        super().__init__()
        self.first, self.level = nn.Linear(dims, width), nn.Embedding(levels, width)
        self.body = nn.Sequential(
            nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dims)
        )

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.body(self.first(x) + self.level(level))
