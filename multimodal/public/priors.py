"""The priors of DALL-E 2's kind that were published: diffusers' `PriorTransformer` with UnCLIPScheduler (Kandinsky 2.2, Karlo).

Legend: M rows, E embedding, L places of a text. Source: Ramesh et al. 2022, section 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..prior import needs_prior
from ..stages import PictureRequest, State
from .folders import PublicFolder
from .rows import RowStage, either
from .sampling import read_sampling

TEXT = ("embedding", "states", "mask")


class PriorStage(RowStage):
    """Fills image_embedding, float32 [E], where the stages before have not."""

    def __init__(self, folder: PublicFolder, device: torch.device, dtype: torch.dtype, scheduler: str = "scheduler"):
        """scheduler: the part that says how to sample."""
        super().__init__(
            "prior", folder, device, dtype, sampling=read_sampling(folder, scheduler),
            shape=(int(folder.config("prior").get("embedding_dim", 768)),), guidance=4.0, steps=25,
        )  # fmt: skip

    @cached_property
    def network(self) -> Any:
        return self.folder.load("prior").to(self.device)

    def needed(self, request: PictureRequest, state: Mapping[str, np.ndarray]) -> bool:
        return needs_prior(request, state)

    def conditions(self, request: PictureRequest, state: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        return text_of(state)

    def predict(self, x_t: Tensor, t: Tensor, given: Mapping[str, Tensor], without: Tensor) -> Tensor:
        embedding, states, mask = (either(without, given[f"empty_{key}"], given[f"text_{key}"]) for key in TEXT)
        return self.network(x_t, t, embedding, states, mask).predicted_image_embedding

    def find(self, x: Tensor, requests: Sequence[PictureRequest]) -> list[State]:
        return [{"image_embedding": row} for row in self.network.post_process_latents(x).cpu().numpy()]


def text_of(state: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """text_embedding, text_states, text_mask, and the empty ones."""
    return {f"{of}_{key}": torch.as_tensor(state[f"{of}_{key}"]) for of in ("text", "empty") for key in TEXT}
