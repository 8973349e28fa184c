"""Ways between two embeddings or codes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def slerp(start: np.ndarray, end: np.ndarray, share: float) -> np.ndarray:
    """The embedding of which `share` in [0, 1] of the way from start to end is gone, float32 [E].

    Its direction is on the great circle between theirs, its length between theirs in equal steps. Where they are opposite no circle is
    shortest, and where they are one there is none: then the way is a straight line.
    """
    lengths = np.linalg.norm(start), np.linalg.norm(end)
    a, b = (
        np.asarray(v, np.float64) / max(float(length), 1e-12) for v, length in zip((start, end), lengths, strict=True)
    )
    angle = np.arccos(np.clip(a @ b, -1, 1))
    near = np.sin(angle) < 1e-6
    if near:
        return ((1 - share) * np.asarray(start, np.float64) + share * np.asarray(end, np.float64)).astype(np.float32)
    shares = np.sin([(1 - share) * angle, share * angle]) / np.sin(angle)
    way = shares[0] * a + shares[1] * b
    length = (1 - share) * lengths[0] + share * lengths[1]
    return (way / max(float(np.linalg.norm(way)), 1e-12) * length).astype(np.float32)


def arc(a: Tensor, b: Tensor, count: int) -> Tensor:
    """`count` points [count, ...] from a [...] to b [...] along `slerp`, ends included: what lies between two draws of a normal
    distribution is as long as they are."""
    start, end = (x.detach().cpu().flatten().numpy() for x in (a, b))
    way = np.stack([slerp(start, end, share) for share in np.linspace(0, 1, count)])
    return torch.from_numpy(way).reshape(count, *a.shape).to(a.device)
