"""A transformer encoder of text, trained to say tokens that are hidden from it (BERT: Devlin et al. 2019).

    model.encode(tokens)                              # float32 [B, W], what a text is about
    model.complete(tokens, known, seed=0)             # fills in hidden tokens, the surest first
    model.attention_maps(tokens)                      # both ways

Blocks are those of `gpt`, without the causal mask; PAD is seen by no other place. How it learns is `masked`'s.

Legend: B texts, L places, W width, N heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oneira.platform.errors import UsageError

from .gpt import Block, attention_sheet, check_sizes, sines
from .masked import MaskedTextModel
from .spaces import PAD, Space


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """width, layers, heads: of the blocks. Positions are sines and cosines."""

    width: int = 128
    layers: int = 4
    heads: int = 4

    def __post_init__(self) -> None:
        check_sizes(self)


class Encoder(MaskedTextModel):
    """Raises ConfigError for rows that are not texts."""

    kind = "encoder"
    Config = EncoderConfig

    def __init__(self, config: EncoderConfig, space: Space):
        super().__init__(config, space)
        self.blocks: Any = nn.ModuleList(Block(config.width, config.heads, causal=False) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def _begin(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the first block sees, [B, L, W], and which places are seen, bool [B, L]."""
        if tokens.shape[1] > self.space.shape[0]:
            raise UsageError(f"A text of {tokens.shape[1]} tokens; this model sees at most {self.space.shape[0]}.")
        return self.embedding(tokens) + sines(0, tokens.shape[1], self.config.width, tokens.device), tokens != PAD

    def states(self, tokens: Tensor) -> Tensor:
        x, seen = self._begin(tokens)
        for block in self.blocks:
            x = block(x, seen=seen)
        return self.norm(x)

    @torch.no_grad()
    def attention_maps(self, tokens: Tensor) -> Tensor:
        """How much each place (rows) takes from each other: float32 [layers, B, N, L, L]; rows add up to 1."""
        x, seen = self._begin(tokens.to(self.device))
        maps = []
        for block in self.blocks:
            maps.append(block.attention.weights(block.before(x), None, seen))
            x = block(x, seen=seen)
        return torch.stack(maps)

    def pictures(self, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        return attention_sheet(self.attention_maps(batch["x"][:1]))
