"""Inception v3 (Szegedy et al. 2016) as a feature network, where its weights are there: the features that most papers score by.

    oneira compare RUN... --classifier FOLDER           # config.json with "architecture": "inception_v3", and model.safetensors

The weights are ImageNet's in torchvision's names, as timm publishes them. Papers use another port of the same network, so distances
are near to theirs, not equal. Pictures of any size and number of levels are made 299 pixels wide.

Legend: B pictures, D features, 2,048.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from oneira.platform.errors import DataError

from .spaces import Space

ARCHITECTURE, CARD, WEIGHTS = "inception_v3", "config.json", "model.safetensors"
SIDE = 299  # pixels
TOGETHER = 32  # pictures at a time


def is_inception(folder: str | Path) -> bool:
    """Whether a folder says that it holds an Inception v3."""
    try:
        return json.loads((Path(folder) / CARD).read_text(encoding="utf-8"))["architecture"] == ARCHITECTURE
    except (OSError, ValueError, KeyError, TypeError):
        return False


class Inception:
    """Features of the pictures of one space."""

    def __init__(self, folder: str | Path, space: Space | None = None):
        """Raises DataError where the weights are missing, damaged or another network's."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from torchvision.models import Inception3

        self.folder, self.space = Path(folder), space
        try:
            weights = load_file(self.folder / WEIGHTS)
            kept = {key: value for key, value in weights.items() if not key.startswith(("AuxLogits.", "fc."))}
            self.network = Inception3(aux_logits=False, transform_input=False, init_weights=False)
            missing, unknown = self.network.load_state_dict(kept, strict=False)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise DataError(f"The Inception in '{folder}' cannot be read: {error}") from error
        lacking = [key for key in missing if not key.startswith("fc.") and not key.endswith("num_batches_tracked")]
        if lacking or unknown:
            raise DataError(f"'{folder}' holds other weights than Inception's: {[*lacking, *unknown][0]} and more.")
        self.network.fc = torch.nn.Identity()
        self.network.eval()

    def reading(self, space: Space) -> Inception:
        """The same, for pictures of this space."""
        space.require("pictures", ARCHITECTURE)
        self.space = space
        return self

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Pictures uint8 [B, H, W, C] of the space -> float32 [B, D]."""
        assert self.space is not None, "`reading` says of which space the pictures are"
        found = []
        for part in x.split(TOGETHER):
            signed = self.space.to_signed(part).permute(0, 3, 1, 2)
            signed = signed.expand(-1, 3, -1, -1)
            found.append(self.network(F.interpolate(signed, (SIDE, SIDE), mode="bilinear", antialias=True)))
        return torch.cat(found)
