"""RealNVP (Dinh, Sohl-Dickstein & Bengio 2017): a flow of affine couplings over points.

    model = fit(RealNVP(RealNVPConfig(), space), batch_at, settings)
    model.log_prob(points)                        # exact, nats

A coupling leaves half of the numbers as they are and scales and shifts the others by what a small network says of the
first half (eq. 7 and 8), so that inverse and determinant cost no more than the map itself. Even and odd numbers take turns.

Legend: B rows, D numbers of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from oneira.platform.errors import ConfigError

from .flows import Flow
from .spaces import Space

STEEPEST = 6.9  # nats: a coupling scales by at most e^6.9, about 1,000, either way


@dataclass(frozen=True, kw_only=True)
class RealNVPConfig:
    """couplings: how many. width, depth: of the hidden layers of each one's network."""

    couplings: int = 8
    width: int = 64
    depth: int = 2

    def __post_init__(self) -> None:
        for key in ("couplings", "width", "depth"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least 1.")
        if self.couplings < 2:
            raise ConfigError("couplings is 1; with fewer than 2 half of the numbers would never change.")


class RealNVP(Flow):
    """Raises ConfigError for rows that are not points of at least two numbers."""

    kind = "realnvp"
    Config = RealNVPConfig

    def __init__(self, config: RealNVPConfig, space: Space):
        super().__init__(config, space)
        space.require("points", self.kind)
        if space.dims < 2:
            raise ConfigError("RealNVP needs points of at least 2 numbers: one half says what becomes of the other.")
        self.couplings: Any = nn.ModuleList(
            Coupling(space.dims, i % 2, config.width, config.depth) for i in range(config.couplings)
        )

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        halves = x[:, 0::2], x[:, 1::2]
        total: Tensor | float = 0.0
        for coupling in self.couplings:
            halves, log_det = coupling(*halves)
            total = total + log_det
        return _woven(*halves), torch.as_tensor(total)

    def invert(self, z: Tensor) -> Tensor:
        halves = z[:, 0::2], z[:, 1::2]
        for coupling in reversed(self.couplings):
            halves = coupling.invert(*halves)
        return _woven(*halves)


def _woven(even: Tensor, odd: Tensor) -> Tensor:
    x = torch.empty(len(even), even.shape[1] + odd.shape[1], device=even.device, dtype=even.dtype)
    x[:, 0::2], x[:, 1::2] = even, odd
    return x


class Coupling(nn.Module):
    """Changes the even numbers by what the odd ones say (turn 0), or the other way round (turn 1)."""

    def __init__(self, dims: int, turn: int, width: int, depth: int):
        super().__init__()
        self.turn = turn
        sizes = (-(-dims // 2), dims // 2)
        changed, given = sizes[turn], sizes[1 - turn]
        inner = (given, *[width] * depth)
        layers = [layer for a, b in pairwise(inner) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.network = nn.Sequential(*layers, nn.Linear(width, 2 * changed))

    def _terms(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and log-scale; the log-scale bends softly towards its bounds."""
        shift, raw = self.network(given).float().chunk(2, dim=1)
        return shift, raw / (1 + raw.abs() / STEEPEST)

    def forward(self, even: Tensor, odd: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        changed, given = (odd, even) if self.turn else (even, odd)
        shift, log_scale = self._terms(given)
        changed = changed * log_scale.exp() + shift
        return ((given, changed) if self.turn else (changed, given)), log_scale.sum(1)

    def invert(self, even: Tensor, odd: Tensor) -> tuple[Tensor, Tensor]:
        """Undoes `forward`."""
        changed, given = (odd, even) if self.turn else (even, odd)
        shift, log_scale = self._terms(given)
        changed = (changed - shift) * (-log_scale).exp()
        return (given, changed) if self.turn else (changed, given)
