"""A transformer encoder-decoder (Vaswani et al. 2017): reads one text, writes another.

    model.translate(["a red circle"], seed=0, temperature=0)          # one text for each
    model.attention_maps(source, tokens)                              # where the writer looks in what it read

Rows have two texts: batch["source"] and batch["x"], both tokens of the same vocabulary. The encoder's blocks see both ways; each
block of the decoder sees what is written so far and all of the source.

Legend: B pairs, L places of the target, S of the source, V tokens, W width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .choosing import check_choice, draw, narrowed
from .gpt import Block, Kept, attention_sheet, check_sizes, sines
from .models import GenerativeModel
from .spaces import BEGIN, END, PAD, Space


@dataclass(frozen=True, kw_only=True)
class TranslatorConfig:
    """width, heads: of all blocks. layers: of the encoder, and of the decoder. Positions are sines and cosines."""

    width: int = 128
    layers: int = 3
    heads: int = 4

    def __post_init__(self) -> None:
        check_sizes(self)


class Translator(GenerativeModel):
    """Without a source there is nothing to write, so `sample` raises UsageError; `translate` takes one."""

    kind = "translator"
    Config = TranslatorConfig

    def __init__(self, config: TranslatorConfig, space: Space):
        super().__init__(config, space)
        space.require("text", self.kind)
        width, heads = config.width, config.heads
        self.embedding = nn.Embedding(space.levels, width)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.readers = nn.ModuleList(Block(width, heads, causal=False) for _ in range(config.layers))
        self.read_norm = nn.LayerNorm(width)
        self.looks = nn.ModuleList(Look(width, heads) for _ in range(config.layers))
        self.writers = nn.ModuleList(Block(width, heads) for _ in range(config.layers))
        self.write_norm, self.say = nn.LayerNorm(width), nn.Linear(width, space.levels)

    def _embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        return self.embedding(tokens) + sines(start, start + tokens.shape[1], self.config.width, tokens.device)

    def read(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B, S] -> states [B, S, W], and which of them may be looked at, bool [B, S]."""
        x, seen = self._embed(source), source != PAD
        for block in self.readers:
            x = block(x, seen=seen)
        return self.read_norm(x), seen

    def logits(self, read: tuple[Tensor, Tensor], tokens: Tensor, state: list[Kept] | None = None) -> Tensor:
        """Of the token after each of tokens int64 [B, L] that are written: [B, L, V]. With `state`, after what it has seen."""
        x = self._embed(tokens, state[0].length if state else 0)
        for i, (look, block) in enumerate(zip(self.looks, self.writers, strict=True)):
            x = look(block(x, kept=state[i] if state else None), *read)
        return self.say(self.write_norm(x))

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """-log p of each token of batch["x"] given those before and batch["source"], nats a token."""
        x = batch["x"]
        said = self.logits(self.read(batch["source"]), x[:, :-1]).float()
        nats = F.cross_entropy(said.flatten(0, 1), x[:, 1:].flatten(), ignore_index=PAD)
        return nats, {"perplexity": nats.detach().exp()}

    @torch.no_grad()
    def translate(
        self, sources: Sequence[str], seed: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
    ) -> list[str]:
        """One text for each source; see `choosing.narrowed`. What is too long is cut to the model's places."""
        from .datasets import token_rows

        check_choice(temperature, top_k, top_p)
        reader, longest = self.space.reader(), self.space.shape[0]
        read = self.read(torch.from_numpy(token_rows(reader, list(sources), longest)).to(self.device))
        size = len(sources), self.config.heads, longest, self.config.width // self.config.heads
        state = [
            Kept(torch.empty(size, device=self.device), torch.empty(size, device=self.device)) for _ in self.writers
        ]
        uniform = torch.rand(len(sources), longest, generator=self.generator(seed), device=self.device)
        written = torch.full((len(sources), 1), BEGIN, device=self.device)
        alive = torch.ones(len(sources), dtype=torch.bool, device=self.device)
        while written.shape[1] < longest and alive.any():
            logits = self.logits(read, written[:, -1:], state)[:, -1]
            logits[:, PAD] = -torch.inf
            new = draw(narrowed(logits, temperature, top_k, top_p), uniform[:, written.shape[1]])
            written = torch.cat([written, torch.where(alive, new, END)[:, None]], 1)
            alive &= new != END
        rows = [row[1:] for row in written.tolist()]
        return [reader.decode(row[: row.index(END)] if END in row else row) for row in rows]

    def texts(self, batch: Mapping[str, Tensor]) -> list[str]:
        """Each source, and the text that is made of it."""
        reader = self.space.reader()
        sources = [reader.decode(row) for row in batch["source"].tolist()]
        return [f"{a} -> {b}" for a, b in zip(sources, self.translate(sources, 0, temperature=0), strict=True)]

    @torch.no_grad()
    def attention_maps(self, source: Tensor, tokens: Tensor) -> Tensor:
        """How much each place of tokens int64 [B, L] takes from each of source [B, S]: float32 [layers, B, N, L, S]."""
        states, seen = self.read(source.to(self.device))
        x, maps = self._embed(tokens.to(self.device)), []
        looks: Any = self.looks
        for look, block in zip(looks, self.writers, strict=True):
            x = block(x)
            maps.append(look.weights(x, states, seen))
            x = look(x, states, seen)
        return torch.stack(maps)

    def pictures(self, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        maps = self.attention_maps(batch["source"][:1], batch["x"][:1])
        return attention_sheet(maps, "where each place of the text (downwards) looks in its source")

    def own_scores(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        with torch.no_grad():
            return {"perplexity": float(self.loss(batch, self.generator(0))[1]["perplexity"])}


class Look(nn.Module):
    """x [B, L, W] + what it takes from the states of the source [B, S, W]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def _split(self, x: Tensor, states: Tensor) -> Iterator[Tensor]:
        parts = (self.q(self.norm(x)), *self.kv(states).chunk(2, -1))
        return (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)

    def weights(self, x: Tensor, states: Tensor, seen: Tensor) -> Tensor:
        """The softmax itself, [B, N, L, S]."""
        q, k, _ = self._split(x, states)
        scores = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[-1])
        return scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)

    def forward(self, x: Tensor, states: Tensor, seen: Tensor) -> Tensor:
        q, k, v = self._split(x, states)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])
        return x + self.out(found.transpose(1, 2).flatten(2))
