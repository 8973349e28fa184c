"""Generative adversarial networks over pictures: DCGAN (Radford, Metz & Chintala 2016) and WGAN-GP (Gulrajani et al. 2017).

    model = fit(GAN(GANConfig(objective="wgan-gp"), space), batch_at, settings)      # the two take turns
    model.sample(64, seed=0, labels=torch.arange(64) % 10)                           # of a conditional one

"dcgan": the critic says how likely a picture is to be true. True ones are called `smooth` rather than 1 (Salimans et al. 2016,
section 3.4), and all get noise that keeps the two sets of pictures overlapping. The painter (the generator of the papers; that
word means random numbers here) maximises the log-probability of being taken for true. "wgan-gp": the critic's mean on true
pictures less its mean on others estimates their Wasserstein distance, where its gradient at points between them has norm 1, which
a penalty asks for (eq. 3). No batch norm in the critic: with it, the penalty's norm would not be of one picture.

A conditional critic adds the product of its features with a vector of the label (Miyato & Koyama 2018, eq. 3); the painter
is told the label with its z.

Legend: B pictures, Z numbers of z.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneira.platform.errors import ConfigError, UsageError, did_you_mean

from .models import GenerativeModel
from .noise import Noise
from .scores import NEIGHBOURS, coverage, features_of
from .spaces import Space

OBJECTIVES = ("dcgan", "wgan-gp")
COLLAPSED = 0.1  # coverage of the true rows below which a painter counts as collapsed


@dataclass(frozen=True, kw_only=True)
class GANConfig:
    """critic_steps: turns of the critic before each of the painter. conditional: whether labels are given.
    smooth, noise: of "dcgan", see above; noise is a standard deviation of pixels in [-1, 1]. penalty: of "wgan-gp"."""

    objective: Literal["dcgan", "wgan-gp"] = "wgan-gp"
    z: int = 32
    width: int = 64
    conditional: bool = False
    critic_steps: int = 3
    smooth: float = 0.9
    noise: float = 0.1
    penalty: float = 10.0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective is '{self.objective}'. {did_you_mean(self.objective, OBJECTIVES)}")
        for key in ("z", "width", "critic_steps"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least 1.")
        if not (0.5 < self.smooth <= 1 and self.noise >= 0 and self.penalty >= 0):
            raise ConfigError("smooth must be in (0.5, 1], noise and penalty not negative.")


class GAN(GenerativeModel):
    """Raises ConfigError for rows that are not square pictures of 4 times a power of two, or that have no labels to be told."""

    kind = "gan"
    Config = GANConfig

    def __init__(self, config: GANConfig, space: Space):
        super().__init__(config, space)
        space.require("pictures", self.kind)
        side = space.shape[0]
        if space.shape[1] != side or side < 4 or side & (side - 1):
            raise ConfigError(f"Pictures of {side}x{space.shape[1]} pixels; both sides must be the same power of two.")
        if config.conditional and not space.classes:
            raise ConfigError("conditional is on, but these data have no labels.")
        classes = space.classes if config.conditional else 0
        self.players = ("critic",) * config.critic_steps + ("painter",)
        self.painter = Painter(config.z, config.width, side, space.shape[2], classes)
        self.critic = Critic(config.width, side, space.shape[2], classes)

    def player_loss(
        self, player: str, batch: Mapping[str, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """What the "critic" or the "painter" minimises, of true rows batch["x"] (and labels batch["y"])."""
        true = self.space.to_signed(batch["x"].permute(0, 3, 1, 2))
        labels = batch["y"] if self.config.conditional else None
        z = torch.randn(len(true), self.config.z, generator=generator, device=true.device)
        if player == "painter":
            said = self.critic(self._blurred(self.painter(z, labels), generator), labels)
            loss = F.softplus(-said).mean() if self.config.objective == "dcgan" else -said.mean()
            return loss, {"painter": loss.detach()}
        with torch.no_grad():
            painted = self.painter(z, labels)
        loss, gap = self._critic_loss(true, painted, labels, generator)
        return loss, {"critic": loss.detach(), "gap": gap.detach()}

    def _critic_loss(
        self, true: Tensor, painted: Tensor, labels: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        said, other = (self.critic(self._blurred(x, generator), labels) for x in (true, painted))
        gap = said.mean() - other.mean()
        if self.config.objective == "dcgan":
            wanted = torch.full_like(said, self.config.smooth)
            return F.binary_cross_entropy_with_logits(said, wanted) + F.softplus(other).mean(), gap
        share = torch.rand(len(true), 1, 1, 1, generator=generator, device=true.device)
        between = torch.lerp(true, painted, share).requires_grad_()
        with torch.enable_grad():  # where the loss is only measured, too
            (slope,) = torch.autograd.grad(self.critic(between, labels).sum(), between, create_graph=True)
        steepness = slope.flatten(1).norm(dim=1)
        return -gap + self.config.penalty * (steepness - 1).square().mean(), gap

    def _blurred(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if self.config.objective != "dcgan" or not self.config.noise:
            return x
        return x + self.config.noise * torch.randn(x.shape, generator=generator, device=x.device)

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Both players' losses added up, which nobody minimises: for measuring and for the checker."""
        critic, values = self.player_loss("critic", batch, generator)
        painter, more = self.player_loss("painter", batch, generator)
        return critic + painter, {**values, **more}

    @torch.no_grad()
    def decode(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """z float32 [B, Z] (and labels int64 [B] of a conditional one) -> pictures uint8 [B, H, W, C]."""
        if self.config.conditional and labels is None:
            labels = torch.arange(len(z)) % self.space.classes
        if labels is not None and not self.config.conditional:
            raise UsageError("This model was trained without labels; it cannot be asked for one.")
        if labels is not None and not (
            len(labels) == len(z) and 0 <= labels.min() <= labels.max() < self.space.classes
        ):
            raise UsageError(f"Wanted are {len(z)} labels in [0, {self.space.classes}).")
        x = self.painter(z.to(self.device), None if labels is None else labels.to(self.device))
        return self.space.to_levels(x.permute(0, 2, 3, 1))

    def draw(self, noise: Noise, *, labels: Tensor | None = None) -> Tensor:
        """Pictures uint8 [n, H, W, C]; of a conditional one, of labels int64 [n], or of all labels by turns."""
        if self.config.conditional and labels is None:
            labels = noise.places % self.space.classes
        return self.decode(noise.normal(self.config.z), labels).contiguous()

    def own_scores(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """mode_collapse: 1.0 where the samples lie near so few true rows that the painter paints only some kinds."""
        if len(batch["x"]) < NEIGHBOURS:
            return {}
        true, drawn = batch["x"].cpu()[:1000], self.sample(min(1000, len(batch["x"])), 0).cpu()
        found = coverage(features_of(true, self.space), features_of(drawn, self.space))
        return {"mode_collapse": float(found < COLLAPSED)}

    def alarms(self, scores: Mapping[str, float]) -> list[str]:
        if not scores.get("mode_collapse"):
            return []
        return [
            f"Mode collapse: fewer than {COLLAPSED:.0%} of the true rows have a sample near them. Try a lower lr, more critic_steps, "
            "or objective = 'wgan-gp'."
        ]


class Painter(nn.Module):
    """z [B, Z] -> pictures [B, C, side, side] in [-1, 1]: from 4x4 upwards, each time twice as large."""

    def __init__(self, z: int, width: int, side: int, channels: int, classes: int):
        super().__init__()
        doublings = int(math.log2(side // 4))
        self.classes, wide = classes, width * 2**doublings
        self.first = nn.Linear(z + classes, wide * 16, bias=False)
        layers: list[nn.Module] = [nn.BatchNorm2d(wide), nn.ReLU()]
        for _ in range(doublings):
            layers += [nn.ConvTranspose2d(wide, wide // 2, 4, 2, 1, bias=False), nn.BatchNorm2d(wide // 2), nn.ReLU()]
            wide //= 2
        self.body = nn.Sequential(*layers, nn.Conv2d(wide, channels, 3, padding=1), nn.Tanh())

    def forward(self, z: Tensor, labels: Tensor | None) -> Tensor:
        if labels is not None:
            z = torch.cat([z, F.one_hot(labels, self.classes).to(z.dtype)], 1)
        return self.body(self.first(z).unflatten(1, (-1, 4, 4)))


class Critic(nn.Module):
    """Pictures [B, C, side, side] -> how true each looks, [B]."""

    def __init__(self, width: int, side: int, channels: int, classes: int):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.LeakyReLU(0.2)]
        while side > 4:
            layers += [nn.Conv2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2)]
            width, side = 2 * width, side // 2
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 16, width), nn.LeakyReLU(0.2))
        self.last = nn.Linear(width, 1)
        self.of_label = nn.Embedding(classes, width) if classes else None

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        h = self.body(x)
        said = self.last(h)[:, 0]
        return said if self.of_label is None or labels is None else said + (self.of_label(labels) * h).sum(1)
