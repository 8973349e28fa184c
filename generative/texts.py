"""What all models of text share that say, after each token, how probable every next one is.

    model.sample(3, seed=0, temperature=0.8)                # three texts
    model.complete(["a red "], seed=0, top_p=0.9)           # texts that begin as given
    model.token_log_probs("a red circle")                   # [("a", -1.2), ...]: how probable each token was

A family gives `logits` (all places at once, for training) and `begin` and `advance` (one place after another, with what
was computed before kept).

Legend: B texts, L places, V tokens of the vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from oneira.platform.errors import UsageError

from .choosing import check_choice, draw, narrowed
from .models import GenerativeModel
from .noise import Noise
from .spaces import BEGIN, END, PAD


class TextModel(GenerativeModel):
    """Rows are tokens int64 [B, L]; what is asked of a token is to say the next one. PAD is never asked for."""

    pad, first_token, end_token = PAD, BEGIN, END

    @abstractmethod
    def logits(self, tokens: Tensor) -> Tensor:
        """Of the token after each of tokens int64 [B, L]: [B, L, V]."""

    @abstractmethod
    def begin(self, rows: int) -> Any:
        """The state before the first token."""

    @abstractmethod
    def advance(self, state: Any, tokens: Tensor) -> Tensor:
        """Takes tokens int64 [B, L] in, all after what `state` has seen; changes it. Returns the last one's logits [B, V]."""

    @property
    def longest(self) -> int:
        """Places of a text that `sample` makes, at most."""
        return self.space.shape[0]

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """-log p of each token given those before, in nats a token."""
        x = batch["x"]
        nats = F.cross_entropy(self.logits(x[:, :-1]).flatten(0, 1).float(), x[:, 1:].flatten(), ignore_index=self.pad)
        return nats, {"perplexity": nats.detach().exp()}

    @torch.no_grad()
    def log_prob(self, x: Tensor) -> Tensor:
        """log p of all tokens after the first, given it, float32 [B], nats."""
        x = x.to(self.device)
        found = F.cross_entropy(
            self.logits(x[:, :-1]).float().transpose(1, 2), x[:, 1:], ignore_index=self.pad, reduction="none"
        )
        return -found.sum(1)

    def conditionals(self, x: Tensor) -> Tensor:
        """The logits of each token of x, given those before, [B, L, V]; of the first, given that a text begins."""
        return self.logits(torch.cat([torch.full_like(x[:, :1], self.first_token), x[:, :-1]], 1))

    def draw(
        self, noise: Noise, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, beginning: str = ""
    ) -> list[str]:
        """Whole texts, all with the same beginning; see `choosing.narrowed`, and `complete` for what is refused."""
        return self._finish([beginning] * len(noise), noise.rows, (temperature, top_k, top_p))

    def check(
        self, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, beginning: str = "", **_: Any
    ) -> None:
        check_choice(temperature, top_k, top_p)
        self._read([beginning])

    def complete(
        self, beginnings: Sequence[str], seed: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
    ) -> list[str]:
        """Whole texts that begin as given. A text's draws depend on its place in the list, not on the other texts.

        Raises:
            UsageError: a beginning that fills all places, or settings that make no sense.
        """
        self.generator(seed)  # refuses what is no seed
        rows = [(seed, row) for row in range(len(beginnings))]
        return self._finish(beginnings, rows, (temperature, top_k, top_p))

    def _finish(
        self, beginnings: Sequence[str], chances: Sequence[tuple[int, int]], choice: tuple[float, int, float]
    ) -> list[str]:
        """The whole texts; chances: seed and place of each, from which its draws come."""
        check_choice(*choice)
        given, reader = self._read(beginnings), self.space.reader()
        texts = [""] * len(given)
        for length in sorted({len(tokens) for tokens in given}):  # texts that begin with as many tokens go on together
            rows = [row for row, tokens in enumerate(given) if len(tokens) == length]
            uniform = torch.stack([self._uniform(*chances[row]) for row in rows])
            tokens = torch.tensor([given[row] for row in rows], device=self.device)
            for row, whole in zip(rows, self._go_on(tokens, uniform, choice), strict=True):
                texts[row] = reader.decode(whole)
        return texts

    def _read(self, beginnings: Sequence[str]) -> list[list[int]]:
        """The tokens of each beginning. Raises UsageError where one fills all places."""
        read = self.space.reader().encode_batch(list(beginnings))
        given = [[self.first_token, *encoding.ids] for encoding in read]
        if given and max(map(len, given)) >= self.longest:
            raise UsageError(
                f"A beginning has {max(map(len, given)) - 1} tokens; at most {self.longest - 2} leave room."
            )
        return given

    def _uniform(self, seed: int, row: int) -> Tensor:
        """The numbers by which a row's tokens are drawn, one for each place."""
        mixed = int(np.random.SeedSequence((seed, row)).generate_state(1, np.uint64)[0] >> np.uint64(1))
        return torch.rand(self.longest, generator=self.generator(mixed), device=self.device)

    @torch.no_grad()
    def _go_on(self, tokens: Tensor, uniform: Tensor, choice: tuple[float, int, float]) -> list[list[int]]:
        """Draws until END or the last place. Returns the tokens of each text, without BEGIN and END."""
        state = self.begin(len(tokens))
        logits = self.advance(state, tokens)
        alive = torch.ones(len(tokens), dtype=torch.bool, device=self.device)
        while tokens.shape[1] < self.longest and alive.any():
            if self.pad >= 0:
                logits[:, self.pad] = -torch.inf
            new = draw(narrowed(logits, *choice), uniform[:, tokens.shape[1]])
            new = torch.where(alive, new, torch.full_like(new, self.end_token))
            alive &= new != self.end_token
            tokens = torch.cat([tokens, new[:, None]], 1)
            if tokens.shape[1] < self.longest and alive.any():
                logits = self.advance(state, new[:, None])
        rows = [row[1:] for row in tokens.tolist()]
        return [row[: row.index(self.end_token)] if self.end_token in row else row for row in rows]

    def tokens_of(self, text: str) -> Tensor:
        """A text as BEGIN and its tokens, int64 [1, L]."""
        return torch.tensor([[self.first_token, *self.space.reader().encode(text).ids]], device=self.device)

    @torch.no_grad()
    def token_log_probs(self, text: str) -> list[tuple[str, float]]:
        """Every token of a text, and how probable it was after those before, in nats. Of a letter of several tokens the last
        one has it, those before have ""."""
        tokens, reader = self.tokens_of(text), self.space.reader()
        if tokens.shape[1] == 1:
            return []
        found = self.logits(tokens[:, :-1]).float().log_softmax(-1)[0].gather(1, tokens[0, 1:, None])[:, 0]
        ids = tokens[0, 1:].tolist()
        so_far = ["", *(reader.decode(ids[: place + 1]).rstrip("\ufffd") for place in range(len(ids)))]
        pieces = [after[len(before) :] for before, after in pairwise(so_far)]
        return list(zip(pieces, found.tolist(), strict=True))
