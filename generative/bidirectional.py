"""A recurrent encoder of text that reads both ways (Schuster & Paliwal 1997): at each place one half of the state has read what
stands before it, the other half what stands behind it.

    model.encode(tokens)                              # float32 [B, W], what a text is about
    model.complete(tokens, known, seed=0)             # fills in hidden tokens, the surest first

It learns to say tokens that are hidden from it, as `masked` says. The way back begins at a text's last token: PAD behind it
is not read.

Legend: B texts, L places, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from oneira.platform.errors import ConfigError

from .masked import MaskedTextModel
from .recurrent import CELLS, RecurrentConfig
from .spaces import PAD, Space


@dataclass(frozen=True, kw_only=True)
class BidirectionalConfig(RecurrentConfig):
    """cell, width, layers: of the recurrent layers; each way has half of the width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 2:
            raise ConfigError(f"width is {self.width}; it must be even, a half for each way.")


class Bidirectional(MaskedTextModel):
    """Raises ConfigError for rows that are not texts."""

    kind = "bidirectional"
    Config = BidirectionalConfig

    def __init__(self, config: BidirectionalConfig, space: Space):
        super().__init__(config, space)
        self.body = CELLS[config.cell](
            config.width, config.width // 2, config.layers, batch_first=True, bidirectional=True
        )

    def states(self, tokens: Tensor) -> Tensor:
        places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        lengths = ((tokens != PAD) * places).amax(1).clamp(min=1).cpu()  # a token that stands for another may be PAD
        read = pack_padded_sequence(self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.body(read)[0], batch_first=True, total_length=tokens.shape[1])[0]
