"""Autoencoders over pictures: plain, denoising (Vincent et al. 2008), VAE (Kingma & Welling 2014), beta-VAE (Higgins et al. 2017).

    model.decode(model.encode(pictures))
    model.traverse(picture, dim=3)                     # one number of z changed step by step
    v = model.attribute(pictures, is_seven)            # the way in z from pictures without an attribute to those with it
    model.decode(model.encode(pictures) + v)
    model.interpolate(a, b, 8)                         # a morph

All say for each pixel a logistic distribution cut into the picture's levels (`pixelcnn.logistic_log_prob`), of which the
decoder gives the means and one learned number the scale, so that their losses are nats and can be compared. The VAE adds
beta times KL(q(z | x) || N(0, I)); with beta 1 its loss is a bound of -log p(x).

Legend: B pictures, Z numbers of z.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from oneira.platform.errors import ConfigError, UsageError, did_you_mean

from .interpolation import arc
from .models import GenerativeModel
from .noise import Noise
from .pixelcnn import logistic_log_prob
from .spaces import Space, scatter, sheet, visible

OBJECTIVES = ("plain", "denoising")
HASTE = 10.0  # the scale learns so much faster: Adam moves a number by about lr a step, and this one has far to go
CHANGED = (0, 1)  # labels of the pictures that a report shows on their way from one to the other


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """z: numbers of the code. width: channels next to the pixels. noise: of "denoising", a standard deviation of pixels
    in [-1, 1]."""

    objective: Literal["plain", "denoising"] = "plain"
    z: int = 16
    width: int = 32
    noise: float = 0.5

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective is '{self.objective}'. {did_you_mean(self.objective, OBJECTIVES)}")
        _check(self)


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """z: numbers of the code. width: channels next to the pixels. beta: weight of the KL; 1 is the VAE."""

    z: int = 16
    width: int = 32
    beta: float = 1.0

    def __post_init__(self) -> None:
        _check(self)
        if not self.beta > 0:
            raise ConfigError(f"beta is {self.beta}; it must be above 0.")


def _check(config: AutoencoderConfig | VAEConfig) -> None:
    for key in ("z", "width"):
        if getattr(config, key) < 1:
            raise ConfigError(f"{key} is {getattr(config, key)}; it must be at least 1.")
    if not getattr(config, "noise", 0.0) >= 0:
        raise ConfigError("noise must not be negative.")


class _Codes(GenerativeModel):
    """What both kinds share: the way from pictures to codes and back, and what one does with codes."""

    def __init__(self, config: AutoencoderConfig | VAEConfig, space: Space, outputs: int):
        super().__init__(config, space)
        space.require("pictures", self.kind)
        self.reader, self.writer = _networks(space, config.width, outputs, config.z)
        self.log_scale = nn.Parameter(torch.tensor(-1.0 / HASTE))

    def _means(self, z: Tensor) -> Tensor:
        """The decoder's means, [B, H, W, C], in [-1, 1] or a little beyond."""
        return self.writer(z).float().permute(0, 2, 3, 1)

    def _nats(self, x: Tensor, means: Tensor) -> Tensor:
        """-log p(x | z) of each picture, [B]."""
        log_scale = HASTE * self.log_scale
        parameters = torch.stack([torch.zeros_like(means), means, log_scale.expand_as(means)], -1)
        return -logistic_log_prob(parameters, x.long()[..., None], self.space.levels).flatten(1).sum(1)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """z float32 [B, Z] -> pictures uint8 [B, H, W, C], the most probable value of each pixel."""
        return self.space.to_levels(self._means(z.to(self.device)))

    def encode(self, x: Tensor) -> Tensor:
        """Pictures uint8 [B, H, W, C] -> z float32 [B, Z]."""
        with torch.no_grad():
            return self.reader(self.space.to_signed(x.to(self.device)).permute(0, 3, 1, 2)).float()[:, : self.config.z]

    def interpolate(self, a: Tensor, b: Tensor, count: int) -> Tensor:
        """A morph of `count` pictures between those that a [H, W, C] and b are decoded to, ends included."""
        z = self.encode(torch.stack([a, b]))
        return self.decode(arc(z[0], z[1], count))

    def traverse(self, picture: Tensor, dim: int, values: Tensor | None = None) -> Tensor:
        """The picture [H, W, C] decoded with number `dim` of its z set to each of `values` (default: -3 to 3 in 7 steps)."""
        if not 0 <= dim < self.config.z:
            raise UsageError(f"dim is {dim}; this model's z has numbers 0 to {self.config.z - 1}.")
        values = torch.linspace(-3, 3, 7) if values is None else values
        z = self.encode(picture[None]).repeat(len(values), 1)
        z[:, dim] = values.to(z)
        return self.decode(z)

    def attribute(self, x: Tensor, has_it: Tensor) -> Tensor:
        """The mean z of pictures x [N, ...] that have an attribute (bool [N]) less that of those that have not: [Z]."""
        if not has_it.any() or has_it.all():
            raise UsageError("An attribute's vector needs pictures with it and pictures without it.")
        z = self.encode(x)
        return z[has_it].mean(0) - z[~has_it].mean(0)

    def latent_map(self, x: Tensor) -> Tensor:
        """Where pictures lie on the two directions in which their z differ most: float32 [N, 2] (principal components)."""
        z = self.encode(x)
        z = z - z.mean(0)
        axes = torch.linalg.svd(z, full_matrices=False).Vh[:2]
        return z @ axes.T

    def pictures(self, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        x, levels = batch["x"][:16].cpu(), self.space.levels
        pairs = torch.cat([x[:8], self.decode(self.encode(x[:8])).cpu()])
        lines = torch.cat([self.traverse(x[0], dim, torch.linspace(-3, 3, 8)) for dim in range(min(8, self.config.z))])
        morphs = torch.cat([self.interpolate(x[i], x[i + 8], 8) for i in range(4)]) if len(x) == 16 else x[:0]
        found = {
            "true pictures, and what is left of them in z": pairs,
            "one number of z a row, from -3 to 3": lines,
            "morphs": morphs,
        }
        shown = {name: sheet(visible(rows.cpu(), levels), 8) for name, rows in found.items() if len(rows)}
        points = self.latent_map(batch["x"]).cpu().numpy()
        labels = batch["y"].cpu().numpy() if "y" in batch else None
        if labels is not None and (changed := self._changed(batch["x"].cpu(), batch["y"].cpu())) is not None:
            name = f"pictures of label {CHANGED[0]}, and the same with the way in z to label {CHANGED[1]} added, from 0 to 1.5 of it"
            shown[name] = sheet(visible(changed, levels), 8)
        return shown | {
            "z of test pictures, a colour a label": scatter(points * (1.2 / (points.std() or 1.0)), labels=labels)
        }

    def _changed(self, x: Tensor, y: Tensor) -> Tensor | None:
        """Pictures of one label a row, on their way to another: attribute arithmetic. None where there are too few."""
        first, other = (y == label for label in CHANGED)
        if first.sum() < 4 or other.sum() < 4:
            return None
        way = self.attribute(x[first | other], other[first | other])
        steps = torch.linspace(0, 1.5, 8).to(way)[:, None]
        return torch.cat([self.decode(self.encode(row[None]) + steps * way) for row in x[first][:4]]).cpu()

    def own_scores(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """reconstruction: the root of the mean squared error of pixels in [0, 1]."""
        back = self.decode(self.encode(batch["x"])).cpu().float()
        return {"reconstruction": float((back - batch["x"].cpu()).square().mean().sqrt()) / (self.space.levels - 1)}


class Autoencoder(_Codes):
    """A plain or a denoising one; its codes have no distribution, so it cannot be sampled from."""

    kind = "autoencoder"
    Config = AutoencoderConfig

    def __init__(self, config: AutoencoderConfig, space: Space):
        super().__init__(config, space, config.z)

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """-log p(x | z), nats a number; a denoising one sees the picture with noise."""
        x = self.space.to_signed(batch["x"])
        if self.config.objective == "denoising":
            x = x + self.config.noise * torch.randn(x.shape, generator=generator, device=x.device)
        nats = self._nats(batch["x"], self._means(self.reader(x.permute(0, 3, 1, 2)))).mean() / self.space.dims
        return nats, {}

    @torch.no_grad()
    def denoise(self, noisy: Tensor) -> Tensor:
        """Pictures float32 [B, H, W, C] with noise, in levels -> pictures uint8."""
        return self.decode(self.reader(self.space.to_signed(noisy.to(self.device)).permute(0, 3, 1, 2)))


class VAE(_Codes):
    """Its codes are as N(0, I), so that it can be sampled from."""

    kind = "vae"
    Config = VAEConfig

    def __init__(self, config: VAEConfig, space: Space):
        super().__init__(config, space, 2 * config.z)

    def _terms(self, x: Tensor, generator: torch.Generator, draws: int = 1) -> tuple[Tensor, Tensor]:
        """-log p(x | z), the mean over so many draws of z, and KL, [B] each."""
        mu, log_var = self.reader(self.space.to_signed(x).permute(0, 3, 1, 2)).float().chunk(2, 1)
        log_var = log_var.clamp(-12, 8)
        nats = []
        for _ in range(draws):
            z = mu + torch.exp(0.5 * log_var) * torch.randn(mu.shape, generator=generator, device=mu.device)
            nats.append(self._nats(x, self._means(z)))
        return torch.stack(nats).mean(0), 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum(1)

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """-log p(x | z) + beta KL, nats a number; and the bound in bits per dimension."""
        nats, kl = self._terms(batch["x"], generator)
        loss = (nats + self.config.beta * kl).mean() / self.space.dims
        bits = (nats + kl).mean().detach() / self.space.dims / math.log(2)
        return loss, {"bits_per_dim": bits, "kl": kl.mean().detach()}

    @torch.no_grad()
    def log_prob(self, x: Tensor, seed: int = 0, draws: int = 16) -> Tensor:
        """A lower bound of log p(x), float32 [B], nats: the mean of `draws` draws of z."""
        nats, kl = self._terms(x.to(self.device), self.generator(seed), draws)
        return -(nats + kl)

    def draw(self, noise: Noise) -> Tensor:
        """Pictures from z of a standard normal."""
        return self.decode(noise.normal(self.config.z))


def _networks(space: Space, width: int, outputs: int, z: int) -> tuple[nn.Module, nn.Module]:
    """(pictures [B, C, H, W] -> [B, outputs], z [B, Z] -> [B, C, H, W]): halved until at most 4 pixels are left, and back."""
    height, wide, channels = space.shape
    halvings = 0
    while min(height, wide) > 4:
        if height % 2 or wide % 2:
            raise ConfigError(f"Pictures of {space.shape[0]}x{space.shape[1]} pixels cannot be halved down to 4.")
        height, wide, halvings = height // 2, wide // 2, halvings + 1
    sizes = [width * 2**i for i in range(halvings + 1)]
    down: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.SiLU()]
    up: list[nn.Module] = []
    for a, b in pairwise(sizes):
        down += [nn.Conv2d(a, b, 4, 2, 1), nn.SiLU()]
        up = [nn.SiLU(), nn.ConvTranspose2d(b, a, 4, 2, 1), *up]
    flat = sizes[-1] * height * wide
    reader = nn.Sequential(*down, nn.Flatten(), nn.Linear(flat, 4 * width), nn.SiLU(), nn.Linear(4 * width, outputs))
    writer = nn.Sequential(
        nn.Linear(z, 4 * width), nn.SiLU(), nn.Linear(4 * width, flat), nn.Unflatten(1, (sizes[-1], height, wide)), *up,
        nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1),
    )  # fmt: skip
    return reader, writer
