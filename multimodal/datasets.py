"""The scenes as data sets of `oneira.generative`: pictures ("scenes"), pictures of one labelled object ("things"), captions, and
pairs of captions ("paraphrases": one in few words, and one that leaves nothing out).

All are endless. "validation" and "test" begin at `UNSEEN`, which no training reaches.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from oneira.generative.datasets import DataConfig, Rows, Split, learn_tokens, text_space, token_rows
from oneira.generative.spaces import Space

from .scenes import COLOURS, SHAPES, UNSEEN, captions, draw, sample

HELD = 1 << 20  # rows of "validation", and of "test"
FIRST = {"train": 0, "validation": UNSEEN, "test": UNSEEN + HELD}
TRIES = 32  # scenes among which a "thing" finds one of a single object


@dataclass(frozen=True)
class _Endless:
    space: Space

    def size(self, split: Split) -> int:
        return UNSEEN if split == "train" else HELD

    def _numbers(self, split: Split, indices: np.ndarray) -> np.ndarray:
        return np.asarray(indices, np.int64) + FIRST[split]


class Scenes(_Endless):
    """Pictures of scenes of the training split, uint8 [B, size, size, 3]."""

    def rows(self, split: Split, indices: np.ndarray) -> Rows:
        return {"x": draw(sample(self._numbers(split, indices)), self.space.shape[0])}


class Things(_Endless):
    """Pictures of one object; its label is shape * len(COLOURS) + colour, all pairs."""

    def rows(self, split: Split, indices: np.ndarray) -> Rows:
        numbers = self._numbers(split, indices)
        some = sample((numbers[:, None] * TRIES + np.arange(TRIES)).ravel(), "all")
        found = (some.kind == 0).reshape(-1, TRIES).argmax(1) + np.arange(len(numbers)) * TRIES
        scenes = some[found]
        labels = scenes.shape[:, 0].astype(np.int64) * len(COLOURS) + scenes.colour[:, 0]
        return {"x": draw(scenes, self.space.shape[0]), "y": labels}


@dataclass(frozen=True)
class Captions(_Endless):
    """Captions of scenes as tokens, int64 [B, length]."""

    tokenizer: Any

    def rows(self, split: Split, indices: np.ndarray) -> Rows:
        texts = captions(sample(self._numbers(split, indices)))
        return {"x": token_rows(self.tokenizer, texts, self.space.shape[0])}


class Paraphrases(Captions):
    """Captions that leave nothing out, and in "source" another of the same scene in other words, which may."""

    def rows(self, split: Split, indices: np.ndarray) -> Rows:
        scenes = sample(self._numbers(split, indices))
        texts, length = {"x": captions(scenes, full=True), "source": captions(scenes, 1)}, self.space.shape[0]
        return {key: token_rows(self.tokenizer, value, length) for key, value in texts.items()}


def scenes_data(config: DataConfig) -> Scenes:
    return Scenes(Space(kind="pictures", shape=(config.size, config.size, 3), levels=256))


def things_data(config: DataConfig) -> Things:
    classes = len(SHAPES) * len(COLOURS)
    return Things(Space(kind="pictures", shape=(config.size, config.size, 3), levels=256, classes=classes))


@functools.cache
def captions_data(config: DataConfig) -> Captions:
    tokenizer = learn_tokens(captions(sample(np.arange(5000))), config.vocabulary)
    return Captions(text_space(tokenizer, config.length), tokenizer)


@functools.cache
def paraphrases_data(config: DataConfig) -> Paraphrases:
    base = captions_data(config)
    return Paraphrases(base.space, base.tokenizer)
