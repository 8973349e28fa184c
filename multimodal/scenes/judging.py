"""What a judge of pictures has to say about a scene, and whether what it said fits the scene. No caption is parsed.

A judge reads objects on a grid of 8x8 cells: objects do not overlap, so no cell holds the centres of two.

Legend: N scenes, O = 3 places for objects, G = 8 cells along each side, rows first.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from .attributes import GROUP, OBJECTS, RELATION, UNIT, Scenes, relation_of

CELLS = 8


@dataclass(frozen=True)
class Reading:
    """What was read off N pictures: int64 [N] or [N, O], -1 for absent objects; x and y float32 in [0, 1], y downwards."""

    background: np.ndarray
    count: np.ndarray
    shape: np.ndarray
    colour: np.ndarray
    size: np.ndarray
    x: np.ndarray
    y: np.ndarray


def true_reading(scenes: Scenes) -> Reading:
    """What a perfect judge reads."""
    numbers = [getattr(scenes, key).astype(np.int64) for key in ("background", "count", "shape", "colour", "size")]
    return Reading(*numbers, *(np.asarray(v / UNIT, np.float32) for v in (scenes.x, scenes.y)))


def grid_labels(scenes: Scenes) -> dict[str, np.ndarray]:
    """Targets of a judge that looks at cells.

    Returns:
        background, count int64 [N] (count - 1, in [0, 3)); present float32 [N, G, G]; shape, colour, size int64
        [N, G, G], -100 where the cell holds no centre; offset float32 [N, G, G, 2] (x, y) in [0, 1) within the cell.
    """
    n = len(scenes)
    labels = {key: np.full((n, CELLS, CELLS), -100, np.int64) for key in ("shape", "colour", "size")}
    present, offset = np.zeros((n, CELLS, CELLS), np.float32), np.zeros((n, CELLS, CELLS, 2), np.float32)
    rows, places = np.nonzero(np.arange(OBJECTS) < scenes.count[:, None])
    x, y = scenes.x[rows, places] * CELLS / UNIT, scenes.y[rows, places] * CELLS / UNIT
    cell = rows, y.astype(np.int64), x.astype(np.int64)
    present[cell] = 1
    offset[cell] = np.stack([x % 1, y % 1], 1)
    for key, values in labels.items():
        values[cell] = getattr(scenes, key)[rows, places]
    count = scenes.count.astype(np.int64) - 1
    return {
        "background": scenes.background.astype(np.int64),
        "count": count,
        "present": present,
        "offset": offset,
        **labels,
    }


def agreement(scenes: Scenes, reading: Reading) -> dict[str, np.ndarray]:
    """Which scenes were read (or drawn) right, bool [N] each.

    Objects are matched so that the most shapes and colours agree; the order in which they were read does not matter.

    Returns:
        count, background; objects: count, shapes and colours all right; sizes: objects, and every size right;
        relation: objects, and object 0 stands to object 1 as the scene says (True where a scene has no relation);
        places: objects, each centre within 1/16 of the side of where the scene has it;
        everything: sizes, relation and background.
    """
    right = {
        "count": scenes.count == reading.count, "background": scenes.background == reading.background,
        **{key: np.zeros(len(scenes), bool) for key in ("objects", "sizes", "relation", "places")},
    }  # fmt: skip
    for n in np.flatnonzero(right["count"]).tolist():
        right["objects"][n], right["sizes"][n], right["relation"][n], right["places"][n] = _match(scenes, reading, n)
    return {**right, "everything": right["sizes"] & right["relation"] & right["background"]}


def _match(scenes: Scenes, reading: Reading, n: int) -> tuple[bool, bool, bool, bool]:
    count = int(scenes.count[n])
    best = (False, False, False, False)
    for order in map(list, permutations(range(count))):
        same = [
            getattr(scenes, key)[n, :count] == getattr(reading, key)[n, order] for key in ("shape", "colour", "size")
        ]
        if not (same[0] & same[1]).all():
            continue
        x, y = reading.x[n, order], reading.y[n, order]
        far = np.hypot(x - scenes.x[n, :count] / UNIT, y - scenes.y[n, :count] / UNIT).max()
        related = scenes.kind[n] != RELATION or relation_of(x[0], x[1], y[0], y[1]) == scenes.relation[n]
        best = max(best, (True, bool(same[2].all()), bool(related), bool(far < 1 / 16)))
        if scenes.kind[n] != GROUP:  # only things that are alike can be matched in more than one way
            break
    return best
