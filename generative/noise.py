"""The randomness of rows that are drawn together but for different askers: each group of rows has a generator of its own.

    noise = Noise([(2, generator_a), (3, generator_b)])
    noise.normal(8)                                       # float32 [5, 8]; the first two rows depend on generator_a alone

So a row is the same whoever shares its batch, up to what sums of another shape may differ in their last digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Noise:
    """`groups`: how many rows each has, and its generator; all on one device."""

    def __init__(self, groups: Sequence[tuple[int, torch.Generator]]) -> None:
        self.groups = list(groups)

    def __len__(self) -> int:
        return sum(count for count, _ in self.groups)

    @property
    def rows(self) -> list[tuple[int, int]]:
        """Of each row, the seed of its group and its place there."""
        return [(generator.initial_seed(), i) for count, generator in self.groups for i in range(count)]

    @property
    def places(self) -> Tensor:
        """Of each row, its place in its group, int64 [N]."""
        return torch.tensor([place for _, place in self.rows], dtype=torch.long)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float32 [N, *shape]."""
        return self._each(lambda n, of: torch.randn(n, *shape, generator=of, device=of.device))

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1), float32 [N, *shape]."""
        return self._each(lambda n, of: torch.rand(n, *shape, generator=of, device=of.device))

    def integers(self, below: int) -> Tensor:
        """Numbers in [0, below), int64 [N]."""
        return self._each(lambda n, of: torch.randint(below, (n,), generator=of, device=of.device))

    def bits(self, probabilities: Tensor) -> Tensor:
        """1.0 with these probabilities [N, ...], else 0.0."""
        parts = iter(probabilities.split([count for count, _ in self.groups]))
        return self._each(lambda n, of: torch.bernoulli(next(parts), generator=of))

    def _each(self, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        return torch.cat([draw(count, generator) for count, generator in self.groups])
