"""What all normalizing flows share: exact densities and samples from one invertible map between x and z ~ N(0, I).

    log p(x) = log N(z; 0, I) + log |det dz/dx|,  z = f(x)                  (Rezende & Mohamed 2015, eq. 5)

A family gives `transform` (x -> z and its log-determinant) and `invert` (z -> x) over real numbers [B, ...]; this file
gives it densities, samples and the step from the whole numbers of pixels to real ones. A pixel of v of V levels becomes
(v + u) / V - 1/2 with u uniform in [0, 1): then E_u log p(x) - dims log V is a lower bound of the picture's own
log-probability (Theis, van den Oord & Bethge 2016, section 3.1).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .interpolation import arc
from .models import GenerativeModel
from .noise import Noise


class Flow(GenerativeModel):
    """A model with `transform` and `invert`."""

    invertible: ClassVar[bool] = True

    @abstractmethod
    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x float32 [B, ...] -> z [B, ...] of the same shape, and log |det dz/dx| [B]."""

    @abstractmethod
    def invert(self, z: Tensor) -> Tensor:
        """Undoes `transform`."""

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Negative log-likelihood, in nats a number, so that its size does not depend on the row's."""
        nats = -self.density(self.to_real(batch["x"], generator)).mean() / self.space.dims
        return nats, self._as_bits(nats.detach())

    def _as_bits(self, nats: Tensor) -> dict[str, Tensor]:
        if self.space.kind == "points":
            return {"nats": nats * self.space.dims}
        return {"bits_per_dim": nats / math.log(2) + math.log2(self.space.levels)}

    def density(self, x: Tensor) -> Tensor:
        """log p of real rows, float32 [B], nats."""
        z, log_det = self.transform(x)
        return normal_log_prob(z) + log_det

    def to_real(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Rows of the space as real numbers: points as they are, pixels with noise, in [-1/2, 1/2)."""
        if self.space.kind == "points":
            return rows
        noise = torch.rand(rows.shape, generator=generator, device=rows.device)
        return (rows.float() + noise) / self.space.levels - 0.5

    def to_rows(self, x: Tensor) -> Tensor:
        """Undoes `to_real`; what lies outside is the nearest level."""
        if self.space.kind == "points":
            return x
        return ((x + 0.5) * self.space.levels).floor().clamp(0, self.space.levels - 1).to(torch.uint8)

    @torch.no_grad()
    def log_prob(self, x: Tensor, seed: int = 0) -> Tensor:
        """log p of rows of the space, float32 [B], nats: exact for points; of pictures the bound of one draw of the noise."""
        found = self.density(self.to_real(x.to(self.device), self.generator(seed)))
        return found - (self.space.dims * math.log(self.space.levels) if self.space.levels else 0.0)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Rows -> z, float32 [B, ...]; pixels from the middle of their level."""
        x = x.to(self.device)
        if self.space.levels:
            x = (x.float() + 0.5) / self.space.levels - 0.5
        return self.transform(x)[0]

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """z float32 [B, ...] -> rows of the space."""
        return self.to_rows(self.invert(z.to(self.device)))

    @torch.no_grad()
    def draw(self, noise: Noise, *, temperature: float = 1.0) -> Tensor:
        """Rows from z of a normal distribution with standard deviation `temperature`."""
        return self.decode(temperature * noise.normal(*self.space.shape))

    def interpolate(self, a: Tensor, b: Tensor, count: int) -> Tensor:
        """`count` rows from row a [...] to row b [...], along the arc between their z."""
        z = self.encode(torch.stack([a, b]))
        return self.decode(arc(z[0], z[1], count))


def normal_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I) of z [B, ...], float32 [B], nats."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)
