"""The judge of pictures: a small convolutional network that reads every attribute off a scene.

    reading = Checker.load(folder).read(pictures)      # uint8 [B, H, W, 3] -> Reading
    agreement(scenes, reading)["everything"].mean()    # how many pictures are what their scenes say

It says for each of 8x8 cells whether an object's centre lies there, and which object. How many objects there are it says
of the picture as a whole; as many cells are read, the likeliest first, none beside another (objects do not overlap).

Legend: B pictures, G = 8 cells along each side, rows first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneira.platform.config import from_dict, to_dict
from oneira.platform.errors import ConfigError, DataError

from .scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Reading

SIZE = 64  # pixels that the network looks at
CELLS, OBJECTS = 8, 3
APART = 1.25  # cells that two objects' centres are apart at least; the smallest objects' are 1.6
NOISE = 0.03  # standard deviation at most of the noise on pictures in training, of the range [0, 1]
PARTS = {"present": 1, "offset": 2, "shape": len(SHAPES), "colour": len(COLOURS), "size": len(SIZES)}
WHOLE = {"count": OBJECTS, "background": len(BACKGROUNDS)}
CONFIG, WEIGHTS = "checker.json", "checker.safetensors"


@dataclass(frozen=True, kw_only=True)
class CheckerConfig:
    """width: channels next to the pixels; deeper stages have twice and four times as many. blocks: in each stage."""

    width: int = 32
    blocks: int = 2

    def __post_init__(self) -> None:
        if self.width < 8 or self.width % 8:
            raise ConfigError(f"width is {self.width}; it must be a multiple of 8.")
        if self.blocks < 1:
            raise ConfigError(f"blocks is {self.blocks}; it must be at least 1.")


class Block(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), whose second convolution begins at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.convs[1].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(F.relu(norm(y)))
        return x + y


class Checker(nn.Module):
    """Pictures to cells and wholes, and these to a `Reading`."""

    def __init__(self, config: CheckerConfig):
        super().__init__()
        self.config = config
        width, blocks = config.width, config.blocks
        # 2x2 pixels become channels at once: the first look costs a quarter, and no edge is lost.
        self.trunk = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            *(Block(2 * width) for _ in range(blocks)),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
            *(Block(4 * width) for _ in range(blocks)),
            nn.GroupNorm(8, 4 * width),
            nn.ReLU(),
        )
        self.cells = nn.Conv2d(4 * width, sum(PARTS.values()), 1)
        self.whole = nn.Linear(4 * width, sum(WHOLE.values()))

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Pictures float32 [B, 3, 64, 64] in [0, 1] -> logits: cells [B, channels, G, G] each, wholes [B, classes] each.

        "offset" is in (0, 1), from the cell's corner.
        """
        x = self.trunk(pictures * 2 - 1)
        parts = self.cells(x).float().split(list(PARTS.values()), dim=1)
        whole = self.whole(x.mean((2, 3))).float().split(list(WHOLE.values()), dim=1)
        found = {**dict(zip(PARTS, parts, strict=True)), **dict(zip(WHOLE, whole, strict=True))}
        return {**found, "offset": torch.sigmoid(found["offset"])}

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Sum of the cross entropies of all that is read. batch: pictures uint8 [B, 64, 64, 3], and `grid_labels`."""
        pictures = as_input(batch["pictures"])
        strength = NOISE * torch.rand(len(pictures), 1, 1, 1, generator=generator, device=pictures.device)
        noise = torch.randn(pictures.shape, generator=generator, device=pictures.device)
        found = self((pictures + strength * noise).clamp(0, 1))
        present = batch["present"]
        losses = {key: F.cross_entropy(found[key], batch[key]) for key in ("shape", "colour", "size", *WHOLE)}
        losses["present"] = F.binary_cross_entropy_with_logits(found["present"][:, 0], present, reduction="sum")
        losses["present"] = losses["present"] / present.sum()
        miss = (found["offset"].permute(0, 2, 3, 1) - batch["offset"]).abs().sum(-1)
        losses["offset"] = (miss * present).sum() / present.sum()
        return torch.stack(list(losses.values())).sum(), {key: value.detach() for key, value in losses.items()}

    @torch.no_grad()
    def read(self, pictures: np.ndarray | Tensor, chunk: int = 256) -> Reading:
        """Pictures uint8 [B, H, W, 3] of any size -> what is on them."""
        place = self.whole.weight.device
        parts = [
            self._read(as_input(torch.as_tensor(part).to(place))) for part in torch.as_tensor(pictures).split(chunk)
        ]
        return Reading(**{key: np.concatenate([part[key] for part in parts]) for key in parts[0]})

    def _read(self, pictures: Tensor) -> dict[str, np.ndarray]:
        found = self(pictures)
        count = found["count"].argmax(1) + 1
        rows, columns = torch.meshgrid(*[torch.arange(CELLS, device=count.device)] * 2, indexing="ij")
        # Centres in cells, [B, G * G]; everything else by cell likewise.
        x, y = ((found["offset"][:, i] + grid).flatten(1) for i, grid in enumerate((columns, rows)))
        kinds = {key: found[key].argmax(1).flatten(1) for key in ("shape", "colour", "size")}
        present = found["present"].flatten(1).clone()
        objects: dict[str, list[Tensor]] = {key: [] for key in (*kinds, "x", "y")}
        for o in range(OBJECTS):
            best = present.argmax(1, keepdim=True)
            there = o < count
            for key, values in (*kinds.items(), ("x", x / CELLS), ("y", y / CELLS)):
                objects[key].append(torch.where(there, values.gather(1, best)[:, 0], -1))
            near = torch.hypot(x - x.gather(1, best), y - y.gather(1, best)) < APART
            present = present.masked_fill(near, -torch.inf).scatter(1, best, -torch.inf)
        stacked = {key: torch.stack(values, 1).cpu().numpy() for key, values in objects.items()}
        return {"background": found["background"].argmax(1).cpu().numpy(), "count": count.cpu().numpy(), **stacked}

    def save(self, folder: Path) -> None:
        """Writes config and weights into an existing folder."""
        import safetensors.torch

        weights = {key: value.contiguous() for key, value in self.state_dict().items()}  # channels_last is not
        safetensors.torch.save_file(weights, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(to_dict(self.config)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Checker:
        """What `save` wrote, in eval mode. Raises DataError when the folder holds none."""
        import safetensors.torch

        try:
            config = from_dict(CheckerConfig, json.loads((folder / CONFIG).read_text(encoding="utf-8")))
            model = cls(config)
            model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
            return model.eval()
        except (OSError, ValueError, RuntimeError, ConfigError, safetensors.SafetensorError) as error:
            raise DataError(f"'{folder}' holds no checker: {error}") from error


def as_input(pictures: Tensor) -> Tensor:
    """Pictures uint8 [B, H, W, 3] of any size -> float32 [B, 3, 64, 64] in [0, 1]."""
    x = pictures.permute(0, 3, 1, 2).float() / 255
    if x.shape[-2:] != (SIZE, SIZE):
        x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
    return x
