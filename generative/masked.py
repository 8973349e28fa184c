"""What models of text share that say tokens which are hidden from them (BERT: Devlin et al. 2019, section 3.1).

    model.encode(tokens)                              # float32 [B, W], what a text is about
    model.complete(tokens, known, seed=0)             # fills in hidden tokens, the surest first

Of the tokens, 15% are asked for; of these, 80% are hidden, 10% are another token, 10% stay. A family gives `states`.

Legend: B texts, L places, V tokens of the vocabulary (and one more that hides), W width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .choosing import check_choice, draw, narrowed
from .models import GenerativeModel
from .spaces import END, PAD, Space

ASKED, HIDDEN, CHANGED = 0.15, 0.8, 0.1  # shares: of the tokens, and of those asked for


class MaskedTextModel(GenerativeModel):
    """Rows are tokens int64 [B, L]. Raises ConfigError for rows that are not texts."""

    def __init__(self, config: Any, space: Space):
        super().__init__(config, space)
        space.require("text", self.kind)
        self.hiding = space.levels  # the number of the token that hides others
        self.embedding = nn.Embedding(space.levels + 1, config.width)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.say = nn.Linear(config.width, space.levels)

    @abstractmethod
    def states(self, tokens: Tensor) -> Tensor:
        """What each place has become, [B, L, W]; `self.hiding` stands where a token is hidden."""

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
        check_choice(temperature, 0, 1.0)
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

    def texts(self, batch: Mapping[str, Tensor]) -> list[str]:
        """Each text with every third token hidden, and what it is filled in with."""
        reader, x = self.space.reader(), batch["x"].cpu()
        hidden = (torch.arange(x.shape[1]) % 3 == 2) & (x != PAD) & (x != END)
        filled = self.complete(x, ~hidden, 0, temperature=0).cpu()
        return [
            f"{''.join('_' if gone else reader.decode([token]) for token, gone in zip(row, its, strict=True))} -> {reader.decode(whole)}"
            for row, its, whole in zip(x.tolist(), hidden.tolist(), filled.tolist(), strict=True)
        ]

    def own_scores(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """accuracy: how often a token that is asked for is said right, of which a tenth can be seen and a tenth is another."""
        with torch.no_grad():
            return {"accuracy": float(self.loss(batch, self.generator(0))[1]["accuracy"])}
