"""PixelCNN (van den Oord, Kalchbrenner & Kavukcuoglu 2016): pictures one number after another, row by row.

    model.sample(64, seed=0)                      # what was computed for earlier pixels is kept
    model.log_prob(pictures)                      # exact, nats
    model.complete(pictures, known, seed=0)       # fills in what is not known

Masked convolutions see only what comes before (section 3.4): of the channels of one pixel, those before in the order; of
pixels, those above and to the left. The first convolution leaves out the number itself (mask A), the later ones may see
what was made of it (mask B). A value is drawn from a softmax over all levels, or from a mixture of discretised logistic
distributions (Salimans et al. 2017, section 2.1).

Legend: B pictures, H W rows and columns, C channels of a picture, F features (in C groups), V levels, K parts of a mixture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneira.platform.errors import ConfigError, UsageError, did_you_mean

from .choosing import draw
from .models import GenerativeModel
from .noise import Noise
from .spaces import Space

HEADS = ("softmax", "logistic")
Cache = list[Tensor]  # of each convolution that sees its neighbours: its input with a border of zeros


@dataclass(frozen=True, kw_only=True)
class PixelCNNConfig:
    """head: how a value's distribution is said. width: features; blocks: residual ones. mixture: parts of "logistic"."""

    head: Literal["softmax", "logistic"] = "softmax"
    width: int = 64
    blocks: int = 6
    mixture: int = 5

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ConfigError(f"head is '{self.head}'. {did_you_mean(self.head, HEADS)}")
        for key in ("width", "blocks", "mixture"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least 1.")


class PixelCNN(GenerativeModel):
    """Raises ConfigError for rows that are not pictures."""

    kind = "pixelcnn"
    Config = PixelCNNConfig

    def __init__(self, config: PixelCNNConfig, space: Space):
        super().__init__(config, space)
        space.require("pictures", self.kind)
        groups = space.shape[2]
        width = -(-config.width // (2 * groups)) * 2 * groups  # every group has the same share, and so has half of it
        self.numbers = space.levels if config.head == "softmax" else 3 * config.mixture
        self.first = MaskedConv(groups, width, 7, "A", groups)
        self.blocks: Any = nn.ModuleList(Block(width, groups) for _ in range(config.blocks))
        self.last = MaskedConv(width, width, 1, "B", groups)
        self.out = MaskedConv(width, groups * self.numbers, 1, "B", groups)

    def _input(self, x: Tensor) -> Tensor:
        """Pictures [B, H, W, C] -> [B, C, H, W] in [-1, 1], in the weights' precision."""
        return self.space.to_signed(x.permute(0, 3, 1, 2)).to(self.out.weight)

    def _said(self, x: Tensor) -> Tensor:
        """Of the distribution of each number: [B, H, W, C, numbers]."""
        h = self.first(self._input(x))
        for block in self.blocks:
            h = block(h)
        found = self.out(F.relu(self.last(F.relu(h)))).to(self.out.weight)
        return found.permute(0, 2, 3, 1).unflatten(-1, (self.space.shape[2], self.numbers))

    def _log_probs(self, parameters: Tensor, values: Tensor) -> Tensor:
        """log p of values [..., N] under parameters [..., numbers]; [..., N]."""
        if self.config.head == "softmax":
            return parameters.log_softmax(-1).gather(-1, values.long())
        return logistic_log_prob(parameters, values, self.space.levels)

    def _nats(self, x: Tensor) -> Tensor:
        """-log p of each number, [B, H, W, C]."""
        return -self._log_probs(self._said(x), x.long()[..., None])[..., 0]

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """-log p, in nats a number. Nothing in it is random."""
        nats = self._nats(batch["x"]).mean()
        return nats, {"bits_per_dim": nats.detach() / 0.6931472}

    @torch.no_grad()
    def log_prob(self, x: Tensor) -> Tensor:
        """log p of pictures, float32 [B], nats: exact."""
        return -self._nats(x.to(self.device)).flatten(1).sum(1)

    def conditionals(self, x: Tensor) -> Tensor:
        """What is said of each number in order, [B, H * W * C, numbers]."""
        return self._said(x).flatten(1, 3)

    def draw(self, noise: Noise, *, cached: bool = True) -> Tensor:
        """Pictures uint8 [n, H, W, C]. Not `cached`: by one whole pass for each number; the same pictures."""
        nothing = torch.zeros(len(noise), *self.space.shape, dtype=torch.uint8, device=self.device)
        return self.precise()._fill(nothing, torch.zeros_like(nothing, dtype=torch.bool), noise, cached)

    def complete(self, x: Tensor, known: Tensor, seed: int, cached: bool = True) -> Tensor:
        """Pictures of which the numbers `known` (bool [n, H, W, C] or one picture's) are given, the others drawn in order.

        What is known takes part in what is drawn after it, not before: give the upper part rather than the lower one.
        """
        x, known = x.to(self.device).clone(), known.to(self.device).expand(x.shape)
        if x.shape[1:] != self.space.shape:
            raise UsageError(f"Pictures of shape {list(x.shape[1:])}; this model's are {list(self.space.shape)}.")
        x[~known] = 0
        return self.precise()._fill(x, known, self.noise([(len(x), seed)]), cached)

    @torch.no_grad()
    def _fill(self, x: Tensor, known: Tensor, noise: Noise, cached: bool) -> Tensor:
        """Draws what is not known of pictures uint8 [n, H, W, C], in place."""
        uniform = noise.uniform(*self.space.shape)
        levels = torch.arange(self.space.levels, device=self.device).expand(len(x), -1)
        cache = self._empty_cache(len(x))
        height, width, channels = self.space.shape
        for i in range(height):
            for j in range(width):
                for c in range(channels):
                    parameters = self._step(x, cache, i, j) if cached else self._said(x)[:, i, j]
                    value = draw(self._log_probs(parameters[:, c], levels), uniform[:, i, j, c])
                    x[:, i, j, c] = torch.where(known[:, i, j, c], x[:, i, j, c], value.to(x.dtype))
                if cached:  # what the last number makes of the layers' inputs at this place, later places will see
                    self._step(x, cache, i, j)
        return x

    def _empty_cache(self, rows: int) -> Cache:
        height, width, _ = self.space.shape
        convs = [self.first, *(block.middle for block in self.blocks)]
        return [
            self.out.weight.new_zeros(rows, conv.in_channels, height + 2 * conv.reach, width + 2 * conv.reach)
            for conv in convs
        ]

    def _step(self, x: Tensor, cache: Cache, i: int, j: int) -> Tensor:
        """The parameters [B, C, numbers] of one pixel, with the inputs of all layers at earlier pixels in the cache."""
        h = self.first.at(self._input(x[:, i : i + 1, j : j + 1])[:, :, 0, 0], cache[0], i, j)
        for block, kept in zip(self.blocks, cache[1:], strict=True):
            h = block.at(h, kept, i, j)
        h = F.relu(self.last.at(F.relu(h)))
        return self.out.at(h).unflatten(1, (self.space.shape[2], self.numbers))


class MaskedConv(nn.Conv2d):
    """A convolution that sees only what comes before, and of its own pixel what `kind` lets it see."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, size: int, kind: Literal["A", "B"], groups: int):
        super().__init__(inputs, outputs, size, padding=size // 2)
        self.reach = size // 2
        mask = torch.zeros(size, size)
        mask[: self.reach] = 1
        mask[self.reach, : self.reach] = 1
        of_input, of_output = (torch.arange(n) * groups // n for n in (inputs, outputs))
        own = of_output[:, None] > of_input if kind == "A" else of_output[:, None] >= of_input
        mask = mask.expand(outputs, inputs, size, size).clone()
        mask[:, :, self.reach, self.reach] = own.float()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.reach)

    def at(self, x: Tensor, kept: Tensor | None = None, i: int = 0, j: int = 0) -> Tensor:
        """The output [B, out] at pixel (i, j), of which the input is x [B, in]; puts x into what is kept."""
        weight, r = self.weight * self.mask, self.reach
        if kept is None:
            return F.linear(x, weight[:, :, 0, 0], self.bias)
        kept[:, :, i + r, j + r] = x
        window = kept[:, :, i : i + r + 1, j : j + 2 * r + 1]  # rows below are masked, so they are left out
        return F.linear(window.flatten(1), weight[:, :, : r + 1].flatten(1), self.bias)


class Block(nn.Module):
    """x + a masked convolution of half of the features (figure 5 of the paper)."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.inner = MaskedConv(width, width // 2, 1, "B", groups)
        self.middle = MaskedConv(width // 2, width // 2, 3, "B", groups)
        self.outer = MaskedConv(width // 2, width, 1, "B", groups)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.relu(self.middle(F.relu(self.inner(F.relu(x))))))

    def at(self, x: Tensor, kept: Tensor, i: int, j: int) -> Tensor:
        """The same for one pixel."""
        h = F.relu(self.inner.at(F.relu(x)))
        return x + self.outer.at(F.relu(self.middle.at(h, kept, i, j)))


def logistic_log_prob(parameters: Tensor, values: Tensor, levels: int) -> Tensor:
    """log p of whole numbers under a mixture of logistic distributions, cut into levels (Salimans et al. 2017, eq. 2).

    Args:
        parameters: floats [..., 3 K]: logits, means (in [-1, 1]) and log-scales of the parts.
        values: [..., N] in [0, levels); the lowest and the highest level reach to infinity.

    Returns:
        [..., N], in the parameters' precision.
    """
    logits, means, log_scales = (part[..., None, :] for part in parameters.chunk(3, -1))
    half = 1 / (levels - 1)
    x = (values.to(means.dtype) * 2 * half - 1)[..., None]  # as the pictures are given to the network
    inverse = torch.exp(-log_scales.clamp(min=-7))
    upper, lower = (x - means + half) * inverse, (x - means - half) * inverse
    # log(sigmoid(u) - sigmoid(l)) = log sigmoid(u) + log sigmoid(-l) + log(1 - e^(l - u)): exact far out on both sides.
    inside = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-2 * half * inverse))
    value = values[..., None]
    log_prob = torch.where(
        value == 0, F.logsigmoid(upper), torch.where(value == levels - 1, F.logsigmoid(-lower), inside)
    )
    return torch.logsumexp(logits.log_softmax(-1) + log_prob, -1)
