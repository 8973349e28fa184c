"""The scenes data set: endless captioned pictures of coloured shapes, of which every attribute is known.

    scenes = sample(np.arange(1000))          # attributes, the same on any machine
    pictures = draw(scenes, 64)               # uint8 [1000, 64, 64, 3], at any size up to 256
    texts = captions(scenes)                  # "a small red circle left of a blue star, on a black background"

Splits: "train" never shows some pairs of shape and colour, nor some combinations of two objects; "pairs" (one object)
and "combos" (two objects) show nothing else; "all" keeps no such rule.
"""

from .attributes import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    UNSEEN,
    Scenes,
    Thing,
    altered,
    combo_held_out,
    compose,
    lesson_scenes,
    pair_held_out,
    rearranged,
    sample,
)
from .captions import captions, vocabulary
from .drawing import draw, scene_batch
from .judging import Reading, agreement, grid_labels, true_reading

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "KINDS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "UNSEEN",
    "Reading",
    "Scenes",
    "Thing",
    "agreement",
    "altered",
    "captions",
    "combo_held_out",
    "compose",
    "draw",
    "grid_labels",
    "lesson_scenes",
    "pair_held_out",
    "rearranged",
    "sample",
    "scene_batch",
    "true_reading",
    "vocabulary",
]
