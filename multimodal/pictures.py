"""Pictures between their two ranges and sizes: uint8 [0, 255] outside of networks, float32 [-1, 1] within.

Legend: B pictures, H W rows and columns, S the side of a square picture, in pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .stages import PictureRequest, State


def to_signed(pictures: np.ndarray | Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_bytes(pictures: Tensor) -> np.ndarray:
    """float32 [B, 3, H, W], beyond [-1, 1] cut off -> uint8 [B, H, W, 3]."""
    x = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return x.permute(0, 2, 3, 1).cpu().numpy()


def resize(pictures: Tensor, side: int) -> Tensor:
    """[B, 3, H, W] -> [B, 3, side, side], as they are where they fit; squashed where they are not square."""
    if pictures.shape[-2:] == (side, side):
        return pictures
    x = F.interpolate(pictures, (side, side), mode="bicubic", antialias=True, align_corners=False)
    return x.clamp(-1, 1)


def fit_mask(mask: np.ndarray, side: int) -> Tensor:
    """bool [H, W] -> float32 [1, side, side]: 1 where any pixel under it is True."""
    return F.adaptive_max_pool2d(torch.as_tensor(mask)[None, None].float(), side)[0]


def keep_outside(drawn: np.ndarray, original: np.ndarray | None, mask: np.ndarray | None) -> np.ndarray:
    """What was drawn uint8 [S, S, 3] where the mask is True, the original elsewhere; all of it where there is no mask.

    original: uint8 [H, W, 3]. mask: bool [H, W], of any size.
    """
    if original is None or mask is None:
        return drawn
    side = len(drawn)
    kept = to_bytes(resize(to_signed(original[None]), side))[0]
    return np.where(fit_mask(mask, side)[0, :, :, None].bool().numpy(), drawn, kept)


def finished(x: Tensor, request: PictureRequest) -> np.ndarray:
    """What a sampler drew, float32 [3, S, S] in [-1, 1], as a request gets it: uint8 [S, S, 3], an edit only within its mask."""
    drawn = to_bytes(x[None])[0]
    return keep_outside(drawn, request.picture, request.mask) if request.task == "edit" else drawn


def drawn_state(x: Tensor, request: PictureRequest) -> State:
    """A sampler's picture for the state: as `finished` gives it, and unrounded for the stage that enlarges it.

    Rounding makes a level of 255 of the last bit in which batches of different sizes differ, and the next stage two of it.
    """
    drawn = x.detach().float().cpu()
    if request.task == "edit" and request.picture is not None and request.mask is not None:
        side = drawn.shape[-1]
        known = resize(to_signed(request.picture[None]), side)[0]
        drawn = torch.where(fit_mask(request.mask, side).bool(), drawn, known)
    return {"picture": finished(x, request), "drawn": drawn.clamp(-1, 1).numpy()}
