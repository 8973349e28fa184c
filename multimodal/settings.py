"""Configs of this package's runs: which network learns what, from which scenes, and how it is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from oneira.generative.learning import learn, lesson_report, seed_of, smoke_of
from oneira.generative.training import TrainSettings

from .checker import Checker, CheckerConfig
from .clip import Clip, ClipConfig
from .scenes import (
    COLOURS,
    SHAPES,
    UNSEEN,
    Scenes,
    agreement,
    altered,
    captions,
    draw,
    grid_labels,
    lesson_scenes,
    sample,
)
from .scenes.captions import with_article
from .words import Words, with_unknown_words


@dataclass(frozen=True, kw_only=True)
class ClipRun:
    """CLIP on pairs of scene and caption. checks: pictures of each score."""

    seed: int = 0
    clip: ClipConfig = field(default_factory=ClipConfig)
    training: TrainSettings
    checks: int = 2000

    def smoke(self) -> ClipRun:
        return replace(self, training=smoke_of(self.training), checks=64)

    def train(self, run: Any, executor: Any) -> dict[str, Any]:
        return learn(self, run, executor)

    def report(self, run: Any) -> Path:
        return lesson_report(run, "pictures and captions in one space")

    def build(self) -> Clip:
        return Clip.new(self.clip)

    def batches(self) -> Callable[[int], dict[str, np.ndarray]]:
        size, count = self.clip.image_size, self.training.batch_size
        words = Clip.new(self.clip).words
        return lambda step: caption_batch(
            words, lesson_scenes(self.seed, step, count), size, seed_of(self.seed, "words", step)
        )

    def score(self, model: Clip) -> dict[str, float]:
        """Zero-shot accuracy among all shapes in all colours, and which of 100 captions belongs to a picture."""
        prompts = [
            [f"one {colour} {shape}", *(start + with_article(f"{colour} {shape}") for start in ("", "a picture of "))]
            for shape in SHAPES
            for colour in COLOURS
        ]
        scores = {}
        for split in ("pairs", "all"):
            s = sample(np.arange(self.checks) + UNSEEN, split)
            s = s[s.kind == 0]
            found = model.classify(draw(s, self.clip.image_size), prompts).numpy()
            scores[f"zero_shot_{split}"] = float(np.mean(found == s.shape[:, 0] * len(COLOURS) + s.colour[:, 0]))
        s = sample(np.arange(self.checks) + UNSEEN, "combos")
        right = 0
        for start in range(0, len(s), 100):
            part = s[start : start + 100]
            right += int(
                (
                    model.classify(draw(part, self.clip.image_size), captions(part, full=True)).numpy()
                    == np.arange(len(part))
                ).sum()
            )
        scores["retrieval_combos"] = right / len(s)
        return scores


@dataclass(frozen=True, kw_only=True)
class CheckerRun:
    """The judge, on scenes of all kinds: it must also know what is held out. checks: pictures of the score."""

    seed: int = 0
    checker: CheckerConfig = field(default_factory=CheckerConfig)
    training: TrainSettings
    checks: int = 5000

    def smoke(self) -> CheckerRun:
        return replace(self, training=smoke_of(self.training), checks=64)

    def train(self, run: Any, executor: Any) -> dict[str, Any]:
        return learn(self, run, executor)

    def report(self, run: Any) -> Path:
        return lesson_report(run, "the judge of pictures")

    def build(self) -> Checker:
        return Checker(self.checker)

    def batches(self) -> Callable[[int], dict[str, np.ndarray]]:
        count = self.training.batch_size
        return lambda step: label_batch(lesson_scenes(self.seed, step, count, "all"))

    def score(self, model: Checker) -> dict[str, float]:
        """The share of true pictures that are read right, by attribute; "all" is every attribute and place at once."""
        scenes = sample(np.arange(self.checks) + UNSEEN, "all")
        right = agreement(scenes, model.read(draw(scenes, 64)))
        shares = {key: float(value.mean()) for key, value in right.items()}
        return {**shares, "all": float((right["everything"] & right["places"]).mean())}


def caption_batch(words: Words, some: Scenes, size: int, seed: int) -> dict[str, np.ndarray]:
    """Of B scenes, or rather of half of them: pictures uint8 [B, S, S, 3], tokens int64 [B, L].

    The second half of the batch is the first with one thing altered in each scene. Without, colours and places tell the
    pictures of a batch apart, and nothing asks for shapes (compare Yuksekgonul et al. 2023, section 4). And up to half of the
    scenes show one object: there it is easiest to see what a word means.
    """
    count = len(some)
    half = -(-count // 2)
    alone, others = (np.flatnonzero((some.count == 1) == yes) for yes in (True, False))
    alone = alone[: max(half // 2, half - len(others))]
    base = some[np.concatenate([alone, others[: half - len(alone)]])]
    both = base, altered(base, seed)[: count // 2]
    tokens = words([text for scenes in both for text in captions(scenes)])
    tokens = with_unknown_words(tokens, words, np.random.default_rng(seed))
    return {"pictures": np.concatenate([draw(scenes, size) for scenes in both]), "tokens": tokens}


def label_batch(scenes: Scenes) -> dict[str, np.ndarray]:
    """Their pictures, uint8 [B, 64, 64, 3], and their `grid_labels`."""
    return {"pictures": draw(scenes, 64), **grid_labels(scenes)}
