"""An energy-based model with Langevin sampling and a replay buffer (Du & Mordatch 2019), over points or pictures.

    p(x) is in proportion to exp(-E(x));  x <- x - (step^2 / 2) dE/dx + step * noise        (their eq. 2)

Training lowers the energy of data and raises that of the chains' rows. The chains go on from step to step; a few begin anew
each time, from noise. Chains that find rows of much lower energy than all data, or none near it, mean that training falls apart: the
alarm ends it. Energies tell what is unlike the data: `ood_score`.

Legend: B rows, R rows of the buffer. Pixels are seen as numbers in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from oneira.platform.errors import ConfigError, NumericalError

from .models import GenerativeModel
from .noise import Noise
from .scores import unlike_score
from .spaces import Space

FARTHEST = 0.5  # that one step follows the slope, in each number of a row
BEHIND = 3.0  # nats by which the chains' energy may lie above the data's after training
ALARM = 50.0  # nats by which the energies of chains and data may differ, on average


@dataclass(frozen=True, kw_only=True)
class EBMConfig:
    """width: of the network. steps, step: Langevin's, in each step of training. heat: the share of Langevin's noise that is
    added: 1 is exact, less samples exp(-E / heat^2), as is done with pictures (Du & Mordatch 2019, section 3.2). buffer: rows
    that go on; fresh: the share of chains that begin anew. pull: weight of the squared energies, which keeps them near 0.
    sweeps: steps of `sample`."""

    width: int = 128
    steps: int = 20
    step: float = 0.05
    heat: float = 1.0
    buffer: int = 2048
    fresh: float = 0.05
    pull: float = 0.05
    sweeps: int = 1000

    def __post_init__(self) -> None:
        for key in ("width", "steps", "buffer", "sweeps"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least 1.")
        if not (self.step > 0 and self.heat > 0 and 0 <= self.fresh <= 1 and self.pull >= 0):
            raise ConfigError("step and heat must be above 0, fresh in [0, 1], and pull not negative.")


class EBM(GenerativeModel):
    """Raises ConfigError for texts, and for pictures whose sides are not multiples of 4."""

    kind = "ebm"
    Config = EBMConfig
    buffer: Tensor

    def __init__(self, config: EBMConfig, space: Space):
        super().__init__(config, space)
        if space.kind == "text":
            raise ConfigError("An energy-based model takes points or pictures, not texts.")
        self.network = (
            _points_network(space, config.width) if space.kind == "points" else _pictures_network(space, config.width)
        )
        self.register_buffer("buffer", self._noise(config.buffer, torch.Generator().manual_seed(0)))

    def energy(self, x: Tensor) -> Tensor:
        """E of real rows [B, ...]: float32 [B], nats up to a constant."""
        if self.space.kind == "pictures":
            x = x.permute(0, 3, 1, 2)
        return self.network(x).float()[:, 0]

    def _real(self, rows: Tensor) -> Tensor:
        return rows if self.space.kind == "points" else self.space.to_signed(rows)

    def _noise(self, count: int, generator: torch.Generator) -> Tensor:
        """Rows to begin at: points of a wide normal, or pixels alike in [-1, 1]."""
        size, place = (count, *self.space.shape), generator.device
        if self.space.kind == "points":
            return 2 * torch.randn(size, generator=generator, device=place)
        return 2 * torch.rand(size, generator=generator, device=place) - 1

    def langevin(self, x: Tensor, steps: int, noise: Noise) -> Tensor:
        """`steps` steps from x [B, ...], by the energy's own gradient; pixels stay within [-1, 1]."""
        wanted = [p.requires_grad for p in self.parameters()]
        self.requires_grad_(False)
        try:
            for _ in range(steps):
                x = x.detach().requires_grad_()
                with torch.enable_grad():
                    (slope,) = torch.autograd.grad(self.energy(x).sum(), x)
                way = (self.config.step**2 / 2 * slope).clamp(-FARTHEST, FARTHEST)
                x = x.detach() - way + self.config.step * self.config.heat * noise.normal(*x.shape[1:])
                if self.space.kind == "pictures":
                    x = x.clamp(-1, 1)
        finally:
            for parameter, want in zip(self.parameters(), wanted, strict=True):
                parameter.requires_grad_(want)
        return x.detach()

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """mean E(data) - mean E(chains), plus `pull` times their mean squares. Raises NumericalError at the alarm."""
        true = self._real(batch["x"])
        if self.space.kind == "pictures":  # a little noise: the energy of whole levels alone could be a comb
            true = true + 0.02 * torch.randn(true.shape, generator=generator, device=true.device)
        # No row twice: which of two ends would stay in the buffer is not the same each time.
        rows = torch.randperm(len(self.buffer), generator=generator, device=true.device)[: len(true)]
        start = self.buffer[rows]
        is_fresh = torch.rand(len(rows), generator=generator, device=true.device) < self.config.fresh
        start[is_fresh] = self._noise(int(is_fresh.sum()), generator)
        end = self.langevin(start, self.config.steps, Noise([(len(start), generator)]))
        if self.training:
            self.buffer[rows] = end
        e_true, e_chains = self.energy(true), self.energy(end)
        gap = e_true.mean() - e_chains.mean()
        if abs(gap.item()) > ALARM:
            raise NumericalError(
                f"Training falls apart: the energies of chains and data lie {gap.item():.1f} nats apart; {ALARM:g} are allowed. "
                "Try a lower lr, more `steps`, or a larger `pull`."
            )
        pull = self.config.pull * (e_true.square().mean() + e_chains.square().mean())
        return gap + pull, {"gap": gap.detach(), "energy": e_true.mean().detach()}

    @torch.no_grad()
    def draw(self, noise: Noise) -> Tensor:
        """Rows after `sweeps` Langevin steps, each chain from a row of the buffer drawn by chance."""
        x = self.langevin(self.buffer[noise.integers(len(self.buffer))], self.config.sweeps, noise)
        return x if self.space.kind == "points" else self.space.to_levels(x)

    @torch.no_grad()
    def ood_score(self, x: Tensor) -> Tensor:
        """How unlike the data rows are, float32 [B]: their energy. Compare it between rows of one model only."""
        return self.energy(self._real(x.to(self.device)))

    def own_scores(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """ood_auroc: see `scores.unlike_score`. chains_behind: nats by which the energy of the buffer's rows lies above that of
        true ones, on average."""
        with torch.no_grad():
            behind = self.energy(self.buffer).mean() - self.ood_score(batch["x"]).mean()
        return {**unlike_score(self, batch["x"]), "chains_behind": float(behind)}

    def alarms(self, scores: Mapping[str, float]) -> list[str]:
        if not (behind := scores.get("chains_behind", 0.0)) > BEHIND:
            return []
        return [
            f"The chains' energy lies {behind:.1f} nats above the data's: they do not reach what the network calls likely, and "
            "samples do not look like data. Try a larger step with less heat, or more steps."
        ]


def _points_network(space: Space, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(space.dims, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
        nn.Linear(width, 1),
    )  # fmt: skip


def _pictures_network(space: Space, width: int) -> nn.Module:
    height, wide, channels = space.shape
    if height % 4 or wide % 4:
        raise ConfigError(f"{height}x{wide} pixels; both sides must be multiples of 4.")
    return nn.Sequential(
        nn.Conv2d(channels, width // 2, 3, padding=1), nn.SiLU(), nn.Conv2d(width // 2, width, 4, 2, 1), nn.SiLU(),
        nn.Conv2d(width, width, 4, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(width * height * wide // 16, width), nn.SiLU(),
        nn.Linear(width, 1),
    )  # fmt: skip
