"""The restricted Boltzmann machine (Smolensky 1986), trained by contrastive divergence with chains that go on (Tieleman 2008).

    model.sample(64, seed=0)                      # Gibbs sampling
    model.pseudo_log_likelihood(pictures)         # nats

E(v, h) = - b.v - c.h - v W h over visible v and hidden h in {0, 1}. Given one, the other's parts are independent; summed over
h, the free energy is F(v) = - b.v - sum_j log(1 + exp(c_j + (v W)_j)), and p(v) is in proportion to exp(-F(v)).
A pixel of V levels is seen as the share value / (V - 1), and shown as the probability that its bit is on (Hinton 2012,
"A practical guide to training restricted Boltzmann machines", section 2).

Legend: B rows, D visible and J hidden bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneira.platform.errors import ConfigError

from .models import GenerativeModel
from .noise import Noise
from .scores import unlike_score
from .spaces import Space


@dataclass(frozen=True, kw_only=True)
class RBMConfig:
    """hidden: bits. gibbs: steps of the chains at each step of training. chains: how many go on; 0: they begin at the data
    each time (CD-k of Hinton 2002). sweeps: Gibbs steps of `sample`."""

    hidden: int = 128
    gibbs: int = 1
    chains: int = 64
    sweeps: int = 500

    def __post_init__(self) -> None:
        for key, lowest in {"hidden": 1, "gibbs": 1, "chains": 0, "sweeps": 1}.items():
            if getattr(self, key) < lowest:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least {lowest}.")


class RBM(GenerativeModel):
    """Raises ConfigError for rows that are not pictures."""

    kind = "rbm"
    Config = RBMConfig
    chains: Tensor

    def __init__(self, config: RBMConfig, space: Space):
        super().__init__(config, space)
        space.require("pictures", self.kind)
        self.weight = nn.Parameter(0.01 * torch.randn(space.dims, config.hidden))
        self.visible, self.hidden = nn.Parameter(torch.zeros(space.dims)), nn.Parameter(torch.zeros(config.hidden))
        self.register_buffer(
            "chains", torch.zeros(config.chains, space.dims)
        )  # part of the state: training goes on with them

    def shares(self, x: Tensor) -> Tensor:
        """Pictures uint8 [B, H, W, C] as shares of the highest level, float32 [B, D]."""
        return x.flatten(1).float() / (self.space.levels - 1)

    def free_energy(self, v: Tensor) -> Tensor:
        """F(v) of v [B, D] in [0, 1]: float32 [B]."""
        return -(v @ self.visible) - F.softplus(v @ self.weight + self.hidden).sum(1)

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Mean F(data) - mean F(chains): its gradient is that of -log p, with the chains in place of the model's own rows."""
        v = self.shares(batch["x"])
        start = self.chains if self.config.chains else torch.bernoulli(v, generator=generator)
        end = self.gibbs(start, self.config.gibbs, Noise([(len(start), generator)]))
        if self.training and self.config.chains:
            self.chains.copy_(end)
        loss = self.free_energy(v).mean() - self.free_energy(end).mean()
        return loss, {"reconstruction": (self._mean_visible(self._mean_hidden(v)) - v).square().sum(1).mean().detach()}

    def _mean_hidden(self, v: Tensor) -> Tensor:
        return torch.sigmoid(v @ self.weight + self.hidden)

    def _mean_visible(self, h: Tensor) -> Tensor:
        return torch.sigmoid(h @ self.weight.T + self.visible)

    @torch.no_grad()
    def gibbs(self, v: Tensor, steps: int, noise: Noise) -> Tensor:
        """`steps` times hidden bits from visible ones and back; bits [B, D]."""
        for _ in range(steps):
            h = noise.bits(self._mean_hidden(v))
            v = noise.bits(self._mean_visible(h))
        return v

    @torch.no_grad()
    def draw(self, noise: Noise) -> Tensor:
        """Pictures after `sweeps` Gibbs steps from bits by chance; shown are the probabilities of the last step."""
        return self.precise()._draw(noise)

    def _draw(self, noise: Noise) -> Tensor:
        v = noise.bits(torch.sigmoid(self.visible).expand(len(noise), -1))
        v = self.gibbs(v, self.config.sweeps - 1, noise)
        return self.decode(noise.bits(self._mean_hidden(v)))

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """The probability of each hidden bit, float32 [B, J]."""
        return self._mean_hidden(self.shares(x.to(self.device)))

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Probabilities of hidden bits [B, J] -> pictures uint8 [B, H, W, C]."""
        levels = self._mean_visible(z.to(self.device)) * (self.space.levels - 1)
        return levels.round().to(torch.uint8).reshape(-1, *self.space.shape)

    @torch.no_grad()
    def pseudo_log_likelihood(self, v: Tensor) -> Tensor:
        """sum_i log p(v_i | all others) of v [B, D] in [0, 1]: float32 [B], nats (Besag 1975).

        scikit-learn's `score_samples` is an estimate of it by one i a row, drawn by chance.
        """
        total = torch.zeros(len(v), device=v.device)
        plain = self.free_energy(v)
        for i in range(v.shape[1]):
            flipped = v.clone()
            flipped[:, i] = 1 - flipped[:, i]
            total += F.logsigmoid(self.free_energy(flipped) - plain)
        return total

    @torch.no_grad()
    def ood_score(self, x: Tensor) -> Tensor:
        """How unlike the data pictures are, float32 [B]: their free energy. Compare it between rows of one model only."""
        return self.free_energy(self.shares(x.to(self.device)))

    def own_scores(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        likelihood = self.pseudo_log_likelihood(self.shares(batch["x"])).mean()
        return {"pseudo_log_likelihood": float(likelihood), **unlike_score(self, batch["x"])}
