"""Recurrent models of text: stacked LSTM (Hochreiter & Schmidhuber 1997) or GRU (Cho et al. 2014) layers.

One set of vectors is the tokens' embedding and, turned round, what the last state is compared with (Press & Wolf 2017).

Legend: B texts, L places, V tokens, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from oneira.platform.errors import ConfigError, did_you_mean

from .spaces import Space
from .texts import TextModel

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig:
    """cell, width, layers: of the recurrent layers."""

    cell: Literal["lstm", "gru"] = "lstm"
    width: int = 192
    layers: int = 2

    def __post_init__(self) -> None:
        if self.cell not in CELLS:
            raise ConfigError(f"cell is '{self.cell}'. {did_you_mean(self.cell, CELLS)}")
        for key in ("width", "layers"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least 1.")


class Recurrent(TextModel):
    """Raises ConfigError for rows that are not texts."""

    kind = "recurrent"
    Config = RecurrentConfig

    def __init__(self, config: RecurrentConfig, space: Space):
        super().__init__(config, space)
        space.require("text", self.kind)
        self.embedding = nn.Embedding(space.levels, config.width)
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)
        self.body = CELLS[config.cell](config.width, config.width, config.layers, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(space.levels))

    def _say(self, h: Tensor) -> Tensor:
        return h @ self.embedding.weight.T + self.bias

    def logits(self, tokens: Tensor) -> Tensor:
        return self._say(self.body(self.embedding(tokens))[0])

    def begin(self, rows: int) -> dict[str, Any]:
        return {"memory": None}

    def advance(self, state: dict[str, Any], tokens: Tensor) -> Tensor:
        h, state["memory"] = self.body(self.embedding(tokens), state["memory"])
        return self._say(h[:, -1])
