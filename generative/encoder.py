"""A transformer encoder of text, trained to say tokens that are hidden from it (BERT: Devlin et al. 2019, section 3.1).

    model.encode(tokens)                              # float32 [B, W], what a text is about
    model.complete(tokens, known, seed=0)             # fills in hidden tokens, the surest first
    model.attention_maps(tokens)                      # both ways

Of the tokens, 15% are asked for; of these, 80% are hidden, 10% are another token, 10% stay. Blocks are those of `gpt`, without
the causal mask; PAD is seen by no other place.

Legend: B texts, L places, V tokens of the vocabulary (and one more that hides), W width, N heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneira.platform.errors import UsageError

from .choosing import draw, narrowed
from .gpt import Block, attention_sheet, check_sizes, sines
from .models import GenerativeModel
from .spaces import PAD, Space

ASKED, HIDDEN, CHANGED = 0.15, 0.8, 0.1  # shares: of the tokens, and of those asked for


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """width, layers, heads: of the blocks. Positions are sines and cosines."""

    width: int = 128
    layers: int = 4
    heads: int = 4

    def __post_init__(self) -> None:
        check_sizes(self)


class Encoder(GenerativeModel):
    """Raises ConfigError for rows that are not texts."""

    kind = "encoder"
    Config = EncoderConfig

    def __init__(self, config: EncoderConfig, space: Space):
        super().__init__(config, space)
        space.require("text", self.kind)
        self.hiding = space.levels  # the number of the token that hides others
        self.embedding = nn.Embedding(space.levels + 1, config.width)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.blocks: Any = nn.ModuleList(Block(config.width, config.heads, causal=False) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.say = nn.Linear(config.width, space.levels)

    def _begin(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the first block sees, [B, L, W], and which places are seen, bool [B, L]."""
        if tokens.shape[1] > self.space.shape[0]:
            raise UsageError(f"A text of {tokens.shape[1]} tokens; this model sees at most {self.space.shape[0]}.")
        return self.embedding(tokens) + sines(0, tokens.shape[1], self.config.width, tokens.device), tokens != PAD

    def states(self, tokens: Tensor) -> Tensor:
        """What each place has become, [B, L, W]; `self.hiding` stands where a token is hidden."""
        x, seen = self._begin(tokens)
        for block in self.blocks:
            x = block(x, seen=seen)
        return self.norm(x)

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """-log p of the tokens that are asked for, nats a token."""
        x = batch["x"]
        chance = torch.rand(x.shape, generator=generator, device=x.device)
        other = torch.randint(self.space.levels, x.shape, generator=generator, device=x.device)
        asked = (chance < ASKED) & (x != PAD)
        asked[:, 1] |= ~asked.any(1)  # a row of which nothing is asked would teach nothing
        share = chance / ASKED
        shown = torch.where(asked & (share < HIDDEN), self.hiding, x)
        shown = torch.where(asked & (share >= HIDDEN) & (share < HIDDEN + CHANGED), other, shown)
        said = self.say(self.states(shown)[asked]).float()
        right = (said.argmax(-1) == x[asked]).float().mean()
        return F.cross_entropy(said, x[asked]), {"accuracy": right.detach()}

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Tokens int64 [B, L] -> the mean state of their places, PAD left out, float32 [B, W]."""
        x = x.to(self.device)
        weight = (x != PAD).float()[..., None]
        return (self.states(x) * weight).sum(1) / weight.sum(1).clamp(min=1)

    @torch.no_grad()
    def complete(self, x: Tensor, known: Tensor, seed: int, *, temperature: float = 1.0) -> Tensor:
        """Tokens int64 [B, L] with those filled in that are not `known` (bool [B, L]): at each step the place that is surest."""
        x = torch.where(known.to(self.device), x.to(self.device), self.hiding)
        uniform = torch.rand(x.shape, generator=self.generator(seed), device=self.device)
        while (open_ := x == self.hiding).any():
            logits = narrowed(self.say(self.states(x)), temperature)
            sureness = logits.softmax(-1).amax(-1).masked_fill(~open_, -1.0)
            place = sureness.argmax(1)
            rows = torch.arange(len(x), device=self.device)
            value = draw(logits[rows, place], uniform[rows, place])
            x[rows, place] = torch.where(open_[rows, place], value, x[rows, place])
        return x

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

    def own_scores(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """accuracy: how often a hidden token is said right."""
        with torch.no_grad():
            return {"accuracy": float(self.loss(batch, self.generator(0))[1]["accuracy"])}
