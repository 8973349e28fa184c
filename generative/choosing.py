"""Choosing one value from a model's scores: temperature, top-k, top-p, and the draw itself.

The draw takes a number u in [0, 1) from the caller and finds the value whose share of the cumulated probabilities holds it:
so what is drawn depends on scores and u alone, not on how many rows are drawn together or in which order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oneira.platform.errors import UsageError


def check_choice(temperature: float, top_k: int, top_p: float) -> None:
    """Raises UsageError for what `narrowed` cannot work with."""
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"The temperature is {temperature}; it must be finite and not negative.")
    if top_k < 0:
        raise UsageError(f"top_k is {top_k}; it must not be negative (0 keeps all).")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p is {top_p}; it must be in (0, 1].")


def narrowed(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits [..., V] of the distribution that is drawn from; what is ruled out has -inf.

    Args:
        temperature: divides the logits; 0 leaves the most probable value only.
        top_k: how many of the most probable stay; 0 = all.
        top_p: the most probable stay until they have this share together, the one that reaches it included (Holtzman et
            al. 2020, section 3.1).
    """
    if temperature == 0:
        top_k, temperature = 1, 1.0
    logits = logits.float() / temperature
    if top_k == 0 and top_p == 1:
        return logits
    ordered, places = logits.sort(dim=-1, descending=True, stable=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # what those have that are more probable
    ruled_out = before >= top_p
    if top_k:
        ruled_out[..., top_k:] = True
    return torch.full_like(logits, -torch.inf).scatter(-1, places, ordered.masked_fill(ruled_out, -torch.inf))


def draw(logits: Tensor, u: Tensor) -> Tensor:
    """Values int64 [...] from logits [..., V] by numbers u in [0, 1) of shape [...]."""
    cumulated = logits.double().softmax(-1).cumsum(-1)
    below = (cumulated <= u.double()[..., None] * cumulated[..., -1:]).sum(-1)
    return below.clamp(max=logits.shape[-1] - 1)
