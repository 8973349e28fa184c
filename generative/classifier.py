"""Classifiers, MLP and CNN: baselines, and the feature networks by which pictures are scored.

model.predict(pictures)                       # labels int64 [B]
model.features(pictures)                      # float32 [B, W], what the last layer sees
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneira.platform.errors import ConfigError, UsageError, did_you_mean

from .models import GenerativeModel
from .spaces import Space

BODIES = ("mlp", "cnn")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """body: what reads the pictures. width: of its hidden layers, and of the features. noise: added to pixels in [-1, 1]
    while it learns, a standard deviation; it stands in for more data."""

    body: Literal["mlp", "cnn"] = "cnn"
    width: int = 64
    noise: float = 0.1

    def __post_init__(self) -> None:
        if self.body not in BODIES:
            raise ConfigError(f"body is '{self.body}'. {did_you_mean(self.body, BODIES)}")
        if self.width < 1 or self.noise < 0:
            raise ConfigError(
                f"width is {self.width} and noise {self.noise}; they must be at least 1, and not negative."
            )


class Classifier(GenerativeModel):
    """It has the interface of the other models, but `sample` raises UsageError. Raises ConfigError without pictures or labels."""

    kind = "classifier"
    Config = ClassifierConfig

    def __init__(self, config: ClassifierConfig, space: Space):
        super().__init__(config, space)
        space.require("pictures", self.kind)
        if space.classes < 2:
            raise ConfigError("A classifier needs labels, and these data have none.")
        make = _mlp if config.body == "mlp" else _cnn
        self.body = make(space, config.width)
        self.last = nn.Linear(config.width, space.classes)

    def _read(self, x: Tensor) -> Tensor:
        """Pictures [B, H, W, C] -> float32 [B, C, H, W], each with mean 0 and standard deviation 1.

        As they are, what pictures have in common with their backgrounds drowns all else: an MLP then learns nothing of things.
        """
        x = self.space.to_signed(x.permute(0, 3, 1, 2))
        return F.layer_norm(x, x.shape[1:])

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Cross-entropy, nats; and the share that was right."""
        x = self._read(batch["x"])
        if self.training:
            x = x + self.config.noise * torch.randn(x.shape, generator=generator, device=x.device)
        said = self.last(self.body(x))
        right = (said.argmax(1) == batch["y"]).float().mean()
        return F.cross_entropy(said.float(), batch["y"]), {"accuracy": right.detach()}

    def reading(self, space: Space) -> Classifier:
        """This classifier, for rows of a space. Raises UsageError where it reads others."""
        its = self.space
        if (its.kind, its.shape, its.levels) != (space.kind, space.shape, space.levels):
            raise UsageError(
                f"The classifier reads {its.kind} {its.shape} of {its.levels} levels; these are {space.kind} {space.shape}."
            )
        return self

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return self.body(self._read(x.to(self.device)))

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        return self.last(self.features(x)).argmax(1)

    def own_scores(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        return {"accuracy": float((self.predict(batch["x"]).cpu() == batch["y"].cpu()).float().mean())}


def _mlp(space: Space, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(space.dims, 4 * width), nn.ReLU(), nn.Linear(4 * width, width), nn.ReLU()
    )


def _cnn(space: Space, width: int) -> nn.Module:
    """3x3 convolutions, each second one of stride 2 until at most 4 pixels are left, then one dense layer."""
    height, wide, channels = space.shape
    layers: list[nn.Module] = [nn.Conv2d(channels, width // 2 or 1, 3, padding=1), nn.ReLU()]
    inner = width // 2 or 1
    while min(height, wide) > 4:
        layers += [
            nn.Conv2d(inner, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
        ]
        height, wide, inner = -(-height // 2), -(-wide // 2), width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inner * height * wide, width), nn.ReLU())
