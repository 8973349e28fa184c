"""What the whole pipeline reaches: held-out prompts drawn, and every attribute read off the pictures by the judge.

    scores = score_pictures(pipe, Checker.load(folder), prompts=500)
    scores["one object"]["prior"]["colour and shape"]       # {"right", "of", "share", "ci95"}

One object of a pair of shape and colour never seen in training; two objects, of a combination never seen, with their
relation. The caption says everything (size and background too); no caption is parsed to judge a picture. Each is also drawn
with the prior replaced (see `TextToImage.conditioned`), and the judge reads the true picture, of the same size: what it gets
wrong there is its own mistake.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .checker import Checker
from .scenes import UNSEEN, Reading, Scenes, agreement, captions, draw, sample
from .stages import PictureRequest, through
from .text_to_image import CONDITIONS, TextToImage

KINDS = {"one object": "pairs", "two objects": "combos"}  # and the split that shows nothing else
# What is counted, and what the judge's agreement calls it.
COUNTED = {
    "one object": {"colour and shape": "objects", "size too": "sizes", "everything": "everything"},
    "two objects": {
        "colours and shapes": "objects", "and the relation": "relation", "sizes too": "sizes", "everything": "everything",
    },
}  # fmt: skip
Progress = Callable[[int, int], None]


def score_pictures(
    pipe: TextToImage, checker: Checker, *, prompts: int = 500, seed: int = 0, conditions: Sequence[str] = CONDITIONS,
    rows: int = 16, progress: Progress = lambda done, of: None,
) -> dict[str, Any]:  # fmt: skip
    """{kind: {condition: {what: {"right", "of", "share", "ci95"}}}, "conditions": {...}}.

    Args:
        prompts: of each kind; the k-th has the noise of seed + k. rows: pictures drawn together.
        conditions: what the decoder gets; see `TextToImage.conditioned`.
    """
    began = time.perf_counter()
    scores: dict[str, Any] = {}
    total = len(KINDS) * len(conditions) * prompts
    done = 0
    for kind, split in KINDS.items():
        scenes = sample(np.arange(prompts) + UNSEEN, split)
        texts = captions(scenes, full=True)
        scores[kind] = {}
        for condition in conditions:
            other = pipe.conditioned(condition)  # type: ignore[arg-type]
            requests = [PictureRequest(prompt=text, seed=seed + k) for k, text in enumerate(texts)]
            pictures = []
            for state in through(other.stages, requests, rows):
                pictures.append(state["picture"])
                done += 1
                progress(done, total)
            scores[kind][condition] = counted(kind, scenes, checker.read(np.stack(pictures)))
        scores[kind]["true picture"] = counted(kind, scenes, checker.read(draw(scenes, pipe.size)))
    used = {
        "model": pipe.name,
        "device": str(pipe.clip.mean.device),
        "prompts": prompts,
        "first_seed": seed,
        "splits": KINDS,
        "first_index": UNSEEN,
        "size": pipe.size,
    }
    scores["conditions"] = {**used, **vars(pipe.card), "wall_s": time.perf_counter() - began}
    return scores


def counted(kind: str, scenes: Scenes, reading: Reading) -> dict[str, Any]:
    """{what: share} of what was read of pictures of these scenes."""
    right = agreement(scenes, reading)
    return {what: share(right[key]) for what, key in COUNTED[kind].items()}


def share(right: np.ndarray) -> dict[str, Any]:
    """How many of bool [N] hold, with the interval in which the true share lies with 95% confidence."""
    return {
        "right": int(right.sum()),
        "of": len(right),
        "share": float(right.mean()),
        "ci95": wilson(int(right.sum()), len(right)),
    }


def wilson(right: int, of: int, z: float = 1.959964) -> list[float]:
    """Wilson's interval of a share (Wilson 1927): [low, high]. It stays within [0, 1] and is not a point at its ends."""
    p = right / of
    middle = (p + z**2 / (2 * of)) / (1 + z**2 / of)
    half = z / (1 + z**2 / of) * math.sqrt(p * (1 - p) / of + z**2 / (4 * of**2))
    return [max(0.0, middle - half), min(1.0, middle + half)]
