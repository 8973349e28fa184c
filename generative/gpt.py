"""GPT: a decoder-only transformer of text (Radford et al. 2019), causal, with its keys and values kept while it samples.

    model = fit(GPT(GPTConfig(), space), batch_at, settings)
    model.sample(3, seed=0, temperature=0.8, top_p=0.95)
    model.attention_maps(model.tokens_of("a red circle"))        # where each place looks, by layer and head
    read_gpt2("path/of/gpt2")                                    # weights in transformers' format

Blocks are x + attention(norm(x)) and x + mlp(norm(x)). Positions are learned vectors, sines and cosines (Vaswani et al. 2017,
section 3.5), or rotations of queries and keys (Su et al. 2021, section 3.2.2).

Legend: B texts, L places, V tokens, W width, N heads, D = W / N.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneira.platform.errors import ConfigError, DataError, UsageError, did_you_mean

from .spaces import BEGIN, END, PAD, Space, sheet
from .texts import TextModel

POSITIONS = ("learned", "sinusoidal", "rotary")


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """width, layers, heads: of the blocks. pad, first_token, end_token: those of the tokenizer; pad is -1 where there is none."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    positions: Literal["learned", "sinusoidal", "rotary"] = "learned"
    pad: int = PAD
    first_token: int = BEGIN
    end_token: int = END

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise ConfigError(f"positions is '{self.positions}'. {did_you_mean(self.positions, POSITIONS)}")
        check_sizes(self)


def check_sizes(config: Any) -> None:
    """Raises ConfigError unless blocks can have this `width`, and there is a number of `layers` and `heads`."""
    for key in ("width", "layers", "heads"):
        if getattr(config, key) < 1:
            raise ConfigError(f"{key} is {getattr(config, key)}; it must be at least 1.")
    if config.width % (2 * config.heads):
        raise ConfigError(f"width is {config.width}; it must be a multiple of twice the {config.heads} heads.")


@dataclass
class Kept:
    """What a layer keeps of the places that it has seen: keys and values [B, N, longest, D], filled up to `length`."""

    keys: Tensor
    values: Tensor
    length: int = 0


class GPT(TextModel):
    """Raises ConfigError for rows that are not texts."""

    kind = "gpt"
    Config = GPTConfig

    def __init__(self, config: GPTConfig, space: Space):
        super().__init__(config, space)
        space.require("text", self.kind)
        self.pad, self.first_token, self.end_token = config.pad, config.first_token, config.end_token
        self.embedding = nn.Embedding(space.levels, config.width)
        self.places = nn.Embedding(space.shape[0], config.width) if config.positions == "learned" else None
        blocks = [Block(config.width, config.heads) for _ in range(config.layers)]
        self.blocks: Any = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.width)
        self.apply(_initialise)
        for block in blocks:  # so that the sum of all layers does not grow with their number (GPT-2, section 2.3)
            for last in (block.attention.out, block.shrink):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * config.layers))

    def _embed(self, tokens: Tensor, start: int) -> Tensor:
        end = start + tokens.shape[1]
        if end > self.space.shape[0]:
            raise UsageError(f"A text of {end} tokens; this model sees at most {self.space.shape[0]}.")
        x = self.embedding(tokens)
        if self.places is not None:
            return x + self.places(torch.arange(start, end, device=tokens.device))
        if self.config.positions == "sinusoidal":  # the embedding is small, as the sines are not
            return x * math.sqrt(self.config.width) + sines(start, end, self.config.width, x.device)
        return x

    def _turns(self, start: int, end: int) -> tuple[Tensor, Tensor] | None:
        if self.config.positions != "rotary":
            return None
        angles = angles_of(start, end, self.config.width // self.config.heads, self.device)
        return angles.cos(), angles.sin()

    def logits(self, tokens: Tensor) -> Tensor:
        x, turns = self._embed(tokens, 0), self._turns(0, tokens.shape[1])
        for block in self.blocks:
            x = block(x, turns)
        return self.norm(x) @ self.embedding.weight.T

    def begin(self, rows: int) -> list[Kept]:
        size = rows, self.config.heads, self.space.shape[0], self.config.width // self.config.heads
        empty = [torch.empty(size, device=self.device) for _ in range(2 * self.config.layers)]
        return [Kept(keys, values) for keys, values in zip(empty[::2], empty[1::2], strict=True)]

    def advance(self, state: list[Kept], tokens: Tensor) -> Tensor:
        start = state[0].length
        x, turns = self._embed(tokens, start), self._turns(start, start + tokens.shape[1])
        for block, kept in zip(self.blocks, state, strict=True):
            x = block(x, turns, kept)
        return self.norm(x[:, -1]) @ self.embedding.weight.T

    @torch.no_grad()
    def attention_maps(self, tokens: Tensor) -> Tensor:
        """How much each place (rows) takes from each earlier one: float32 [layers, B, N, L, L]; rows add up to 1."""
        x, turns = self._embed(tokens, 0), self._turns(0, tokens.shape[1])
        maps = []
        for block in self.blocks:
            maps.append(block.attention.weights(block.before(x), turns))
            x = block(x, turns)
        return torch.stack(maps)

    def pictures(self, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        return attention_sheet(self.attention_maps(batch["x"][:1].to(self.device)))


def attention_sheet(maps: Tensor, what: str = "where each place (downwards) looks") -> dict[str, np.ndarray]:
    """Attention maps [layers, B, N, L, S] of the first text as a picture, a layer a row."""
    first = maps[:, 0].cpu().numpy()
    tiles = (255 * (1 - first / first.max((-1, -2), keepdims=True))).astype(np.uint8)
    layers, heads, places, others = tiles.shape
    grey = tiles.reshape(layers * heads, places, others, 1).repeat(3, -1)
    return {f"{what} (dark), a layer a row, a head a column": sheet(grey, heads, gap=2)}


class Block(nn.Module):
    """x [B, L, W] -> [B, L, W]. `causal`: no place sees a later one. `seen` bool [B, L]: which places others may see."""

    def __init__(self, width: int, heads: int, causal: bool = True):
        super().__init__()
        self.before, self.attention = nn.LayerNorm(width), Attention(width, heads, causal)
        self.between, self.grow, self.shrink = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(
        self,
        x: Tensor,
        turns: tuple[Tensor, Tensor] | None = None,
        kept: Kept | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        x = x + self.attention(self.before(x), turns, kept, seen)
        return x + self.shrink(F.gelu(self.grow(self.between(x)), approximate="tanh"))


class Attention(nn.Module):
    """Attention of several heads among the places of a text."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def _split(self, x: Tensor, turns: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return (turned(q, turns), turned(k, turns), v) if turns is not None else (q, k, v)

    def forward(
        self,
        x: Tensor,
        turns: tuple[Tensor, Tensor] | None = None,
        kept: Kept | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        q, k, v = self._split(x, turns)
        start = 0
        if kept is not None:
            start, end = kept.length, kept.length + x.shape[1]
            kept.keys[:, :, start:end], kept.values[:, :, start:end], kept.length = k, v, end
            k, v = kept.keys[:, :, :end], kept.values[:, :, :end]
        mask = None if seen is None else seen[:, None, None]
        if self.causal and start and x.shape[1] > 1:  # several places at once, behind others
            mask = _sees(x.shape[1], k.shape[2], x.device)
        found = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal and not start and x.shape[1] > 1
        )
        return self.out(found.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, turns: tuple[Tensor, Tensor] | None, seen: Tensor | None = None) -> Tensor:
        """The softmax itself, [B, N, L, L]."""
        q, k, _ = self._split(x, turns)
        scores = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[-1])
        if self.causal:
            scores = scores.masked_fill(~_sees(x.shape[1], x.shape[1], x.device), -torch.inf)
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
        return scores.softmax(-1)


def _sees(queries: int, keys: int, device: torch.device) -> Tensor:
    """Which of the keys each of the last `queries` places may see: itself and earlier ones, bool [queries, keys]."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def angles_of(start: int, end: int, size: int, device: torch.device) -> Tensor:
    """place / 10000^(2 i / size) of places [start, end) and i < size / 2: float32 [end - start, size / 2], radians."""
    rates = 10000.0 ** (-torch.arange(0, size, 2, device=device) / size)
    return torch.arange(start, end, device=device)[:, None] * rates


def sines(start: int, end: int, width: int, device: torch.device) -> Tensor:
    """Positions as sines and cosines by turns, float32 [end - start, width] (Vaswani et al. 2017, section 3.5)."""
    angles = angles_of(start, end, width, device)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


def turned(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """x [..., L, D], each pair (i, i + D / 2) turned by its place's angle: products then depend on distances alone."""
    (cos, sin), (a, b) = turns, x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


# GPT-2 in transformers' format ----------------------------------------------------------------------------------------

# ours: theirs. Their linear layers hold the transpose.
NAMES = {
    "before": "ln_1", "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj", "between": "ln_2", "grow": "mlp.c_fc",
    "shrink": "mlp.c_proj",
}  # fmt: skip
NORMS = ("before", "between")


def read_gpt2(folder: str | Path) -> GPT:
    """A folder that transformers saved a GPT-2 in (config.json, model.safetensors, and tokenizer.json for texts).

    Raises:
        DataError: it is not there, not a GPT-2, or differs from the published one in more than its sizes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        card = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "model.safetensors")
        tokenizer = (
            (folder / "tokenizer.json").read_text(encoding="utf-8") if (folder / "tokenizer.json").exists() else ""
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"'{folder}' holds no GPT-2 that can be read: {error}") from error
    wanted = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    usual = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }
    said = usual | card
    wrong = [
        f"{key} is {said.get(key)!r}, not {value!r}"
        for key, value in (wanted | usual).items()
        if said.get(key) != value
    ]
    if card.get("n_inner") not in (None, 4 * card.get("n_embd", 0)):
        wrong.append(f"n_inner is {card['n_inner']}, not four times the width")
    if wrong:
        raise DataError(f"'{folder}' holds another kind of model: {'; '.join(wrong)}.")
    end = card.get("eos_token_id")
    config = GPTConfig(
        width=card["n_embd"], layers=card["n_layer"], heads=card["n_head"], pad=-1,
        first_token=end if card.get("bos_token_id") is None else card["bos_token_id"], end_token=end,
    )  # fmt: skip
    space = Space(kind="text", shape=(card["n_positions"],), levels=card["vocab_size"], tokenizer=tokenizer)
    model = GPT(config, space)
    try:
        model.load_state_dict(_renamed(weights, config.layers))
        if "lm_head.weight" in weights and not torch.equal(weights["lm_head.weight"].float(), model.embedding.weight):
            raise RuntimeError("lm_head differs from wte")
    except (KeyError, RuntimeError) as error:
        raise DataError(f"The weights in '{folder}' are not those of its config: {error}") from error
    return model.eval()


def _renamed(theirs: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    theirs = {key.removeprefix("transformer."): value.float() for key, value in theirs.items()}
    ours = {"embedding.weight": theirs["wte.weight"], "places.weight": theirs["wpe.weight"]}
    for part in ("weight", "bias"):
        ours[f"norm.{part}"] = theirs[f"ln_f.{part}"]
        for layer in range(layers):
            for mine, its in NAMES.items():
                value = theirs[f"h.{layer}.{its}.{part}"]
                ours[f"blocks.{layer}.{mine}.{part}"] = value if mine in NORMS or part == "bias" else value.T
    return ours
