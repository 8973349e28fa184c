"""FFJORD (Grathwohl et al. 2019): a flow in continuous time over points, dx/dt = f(x, t), from x at t = 0 to z at t = 1.

    d log p(x(t)) / dt = - tr(df/dx)                                     (Chen et al. 2018, theorem 1)

so f may be any network. Training estimates the trace by e^T (df/dx) e with one e of signs a row (Hutchinson 1990; Grathwohl
et al., eq. 7), which stays fixed along the way; densities use the whole trace, exact up to the solver. The solver is
torchdiffeq's: Runge-Kutta with fixed steps in training, so that a step costs always the same, Dormand-Prince with its own
steps elsewhere.

Legend: B rows, D numbers of a row; t time in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchdiffeq import odeint

from oneira.platform.errors import ConfigError

from .flows import Flow, normal_log_prob
from .spaces import Space

TOLERANCE = 1e-6  # of the solver outside of training, relative and absolute


@dataclass(frozen=True, kw_only=True)
class FFJORDConfig:
    """width, depth: of f's hidden layers. steps: of the solver in training, each of four evaluations of f.

    kinetic: weight of the mean of |f|^2 along the way in the loss (Finlay et al. 2020, eq. 8), which keeps paths straight,
    so that few steps are enough.
    """

    width: int = 64
    depth: int = 3
    steps: int = 6
    kinetic: float = 0.01

    def __post_init__(self) -> None:
        for key in ("width", "depth", "steps"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least 1.")
        if self.kinetic < 0:
            raise ConfigError(f"kinetic is {self.kinetic}; it must not be negative.")


class FFJORD(Flow):
    """Raises ConfigError for rows that are not points."""

    kind = "ffjord"
    Config = FFJORDConfig

    def __init__(self, config: FFJORDConfig, space: Space):
        super().__init__(config, space)
        space.require("points", self.kind)
        self.field = Field(space.dims, config.width, config.depth)

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Negative log-likelihood with the estimated trace, in nats a number, plus `kinetic` times the mean |f|^2."""
        x = batch["x"]
        signs = torch.randint(0, 2, x.shape, generator=generator, device=x.device).to(x.dtype) * 2 - 1
        zero = x.new_zeros(len(x))

        def motion(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                y = state[0] if state[0].requires_grad else state[0].detach().requires_grad_()
                velocity = self.field(t, y)
                (product,) = torch.autograd.grad(velocity, y, signs, create_graph=True)
            return velocity, (product * signs).sum(1), velocity.square().mean(1)

        span = torch.tensor([0.0, 1.0], device=x.device)
        options = {"step_size": 1 / self.config.steps}
        z, trace, kinetic = (part[-1] for part in odeint(motion, (x, zero, zero), span, method="rk4", options=options))
        nats = -(normal_log_prob(z) + trace).mean() / self.space.dims
        return nats + self.config.kinetic * kinetic.mean(), self._as_bits(nats.detach())

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        learning = torch.is_grad_enabled()

        def motion(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                y = state[0] if state[0].requires_grad else state[0].detach().requires_grad_()
                velocity = self.field(t, y)
                rows = [
                    torch.autograd.grad(velocity[:, i].sum(), y, create_graph=learning, retain_graph=True)[0][:, i]
                    for i in range(y.shape[1])
                ]
            return velocity, torch.stack(rows, 1).sum(1)

        z, trace = self._solve(motion, (x, x.new_zeros(len(x))), 0.0, 1.0)
        return z, trace

    def invert(self, z: Tensor) -> Tensor:
        (x,) = self._solve(lambda t, state: (self.field(t, state[0]),), (z,), 1.0, 0.0)
        return x

    def _solve(self, motion: object, state: tuple[Tensor, ...], start: float, end: float) -> tuple[Tensor, ...]:
        """The state at `end`. The solver's steps suit the batch as a whole, so rows are solved for a batch at a time."""
        span = torch.tensor([start, end], device=state[0].device)
        path = odeint(motion, state, span, rtol=TOLERANCE, atol=TOLERANCE, method="dopri5")
        return tuple(part[-1] for part in path)


class Field(nn.Module):
    """f(t, x) -> dx/dt [B, D]: tanh layers, each with the time as one more input."""

    def __init__(self, dims: int, width: int, depth: int):
        super().__init__()
        sizes = [dims, *[width] * depth]
        self.layers = nn.ModuleList(nn.Linear(a + 1, b) for a, b in pairwise(sizes))
        self.last = nn.Linear(width, dims)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        time = t.expand(len(x), 1).to(x.dtype)
        for layer in self.layers:
            x = torch.tanh(layer(torch.cat([x, time], 1)))
        return self.last(x)
