"""What is in a scene, drawn from its index by whole-number arithmetic alone, so that every machine draws the same.

Random numbers are counter-based: number k of a scene is a hash of (seed, split, index, k), so a scene depends on no
other. The hash is SplitMix64's finaliser (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators").

Legend: N scenes, O = 3 places for objects. Lengths are in 1/4096 of the picture's side, x to the right, y downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numba
import numpy as np

from oneira.platform.errors import UsageError, did_you_mean

SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "gray")
SIZES = ("small", "medium", "large")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUNDS = ("white", "black", "cream", "navy", "mint", "lavender")
SPLITS = ("train", "pairs", "combos", "all")
KINDS = ("single", "relation", "group", "list")  # one object; two, one beside the other; two or three alike; three

OBJECTS = 3
UNIT = 4096  # a picture's side
GAP = 120  # between objects, and to the picture's edge, at least
RADII = (370, 550, 780)  # of the circle around an object of each size, before jitter
MAX_RADIUS = 811
TURN = 3600  # a full turn, in the unit of angles
TRIES = 64  # of a layout before the fixed one
UNSEEN = 1 << 40  # scenes of the training split with this index and beyond are kept for measuring
SINGLE, RELATION, GROUP, LIST = range(len(KINDS))
TRAIN, PAIRS, COMBOS, ALL = range(len(SPLITS))

_u64 = np.uint64
_JIT: Any = {"nogil": True, "cache": True}


@dataclass(frozen=True)
class Scenes:
    """Attributes of N scenes. What an absent object would have is -1.

    Attributes:
        index: int64 [N], from which captions draw their words; -1 for scenes that were composed by hand.
        kind: int8 [N], into KINDS. background: int8 [N], into BACKGROUNDS. count: int8 [N], objects, 1 to 3.
        relation: int8 [N], into RELATIONS: object 0 is left of / ... object 1; -1 unless kind is "relation".
        slope: int16 [N], by how much (of 255) the background is lighter at its lower edge than at its upper one.
        shape, colour, size: int8 [N, O], into SHAPES, COLOURS, SIZES.
        x, y, radius: int16 [N, O], centre and bounding circle. angle: int16 [N, O], in 1/3600 turn, clockwise.
        shade: int16 [N, O], by how much (of 255) the object's colour is lighter than its name's.
    """

    index: np.ndarray
    kind: np.ndarray
    background: np.ndarray
    count: np.ndarray
    relation: np.ndarray
    slope: np.ndarray
    shape: np.ndarray
    colour: np.ndarray
    size: np.ndarray
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    shade: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: slice | np.ndarray) -> Scenes:
        """Some of the scenes, by a slice, a mask or numbers."""
        return Scenes(**{key: value[rows] for key, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object of a composed scene; x, y in [0, 1], x to the right and y downwards."""

    shape: str
    colour: str
    size: str = "medium"
    x: float = 0.5
    y: float = 0.5


def pair_held_out(shape: Any, colour: Any) -> Any:
    """Whether the training split never shows this shape in this colour: two colours of each shape (numbers or arrays)."""
    return (3 * shape + colour) % 5 == 0


def combo_held_out(shape_a: Any, colour_a: Any, shape_b: Any, colour_b: Any) -> Any:
    """Whether the training split never shows these two objects in one scene: about a seventh of all different pairs."""
    different = (shape_a != shape_b) | (colour_a != colour_b)
    return different & ((3 * (shape_a + shape_b) + colour_a + colour_b) % 7 == 0)


def sample(indices: np.ndarray, split: str = "train", seed: int = 0, kinds: Sequence[str] = KINDS) -> Scenes:
    """The scenes of these indices.

    Args:
        indices: whole numbers [N], not negative. The same index, split, seed and kinds always give the same scene.
        split: "train", "pairs" (one object whose pair is held out), "combos" (two objects, the pair of each seen in
            training, their combination held out), or "all" (of the kinds of "train", nothing held out).
        kinds: of `KINDS`, those that "train" and "all" show; "pairs" and "combos" have one kind each.

    Raises:
        UsageError: an unknown split or kind, no kind, or a negative index.
    """
    if split not in SPLITS:
        raise UsageError(f"Unknown split '{split}'. {did_you_mean(split, SPLITS)}")
    if not kinds:
        raise UsageError(f"No kind of scenes. {did_you_mean('', KINDS)}")
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"Unknown kind of scenes '{kind}'. {did_you_mean(kind, KINDS)}")
    index = np.asarray(indices, np.int64).reshape(-1)
    if len(index) and index.min() < 0:
        raise UsageError(f"The index of a scene is {index.min()}; it must not be negative.")
    scenes = _empty(index)
    shown = np.isin(KINDS, kinds)
    _sample(seed, SPLITS.index(split), shown, *(getattr(scenes, field.name) for field in fields(scenes)))
    return scenes


def lesson_scenes(seed: int, step: int, count: int, split: str = "train", kinds: Sequence[str] = KINDS) -> Scenes:
    """What a run of this seed learns from at a step: scenes that no other step has, nor another seed."""
    return sample(np.arange(step * count, (step + 1) * count), split, seed, kinds)


def rearranged(scenes: Scenes, seed: int) -> Scenes:
    """Other scenes that the same captions fit: the same objects, background and relation, otherwise placed and jittered."""
    other = scenes[np.arange(len(scenes))]
    keys = ("index", "kind", "count", "relation", "slope", "size", "x", "y", "radius", "angle", "shade")
    _rearrange(seed, *(getattr(other, key) for key in keys))
    return other


def altered(scenes: Scenes, seed: int = 0) -> Scenes:
    """Scenes that differ from these in one thing alone, which a caption can tell: an object's shape (mostly), colour or size,
    two objects' colours or places exchanged, or the background. What one learns from the difference is what it is about.

    A scene stays as it is where no such change fits the picture and the training split.
    """
    other = scenes[np.arange(len(scenes))]
    keys = [field.name for field in fields(other) if field.name not in ("slope", "angle", "shade")]
    _alter(seed, *(getattr(other, key) for key in keys))
    return other


def compose(things: Sequence[Thing], background: str = "white") -> Scenes:
    """One scene of the given objects, without jitter. Whether they overlap is the caller's business.

    Two objects are taken for a "relation" by the longer of their distances in x and y, one alone for a "single".

    Raises:
        UsageError: not one to three objects, or an unknown name.
    """
    if not 1 <= len(things) <= OBJECTS:
        raise UsageError(f"A scene of {len(things)} objects; allowed are 1 to {OBJECTS}.")
    scenes = _empty(np.full(1, -1))
    scenes.count[0], scenes.background[0] = len(things), _number(background, BACKGROUNDS, "background")
    for o, thing in enumerate(things):
        scenes.shape[0, o] = _number(thing.shape, SHAPES, "shape")
        scenes.colour[0, o] = _number(thing.colour, COLOURS, "colour")
        scenes.size[0, o] = _number(thing.size, SIZES, "size")
        scenes.radius[0, o] = RADII[scenes.size[0, o]]
        scenes.x[0, o], scenes.y[0, o] = round(thing.x * UNIT), round(thing.y * UNIT)
        scenes.angle[0, o] = scenes.shade[0, o] = 0
    same = len({(thing.shape, thing.colour) for thing in things}) == 1
    scenes.kind[0] = SINGLE if len(things) == 1 else GROUP if same else RELATION if len(things) == 2 else LIST
    if scenes.kind[0] == RELATION:
        scenes.relation[0] = relation_of(*(int(v[0, o]) for v in (scenes.x, scenes.y) for o in (0, 1)))
    return scenes


def relation_of(x_a: Any, x_b: Any, y_a: Any, y_b: Any) -> Any:
    """The relation of a to b (numbers or arrays), by the longer of their distances; see `RELATIONS`."""
    dx, dy = np.subtract(x_a, x_b, dtype=np.float64), np.subtract(y_a, y_b, dtype=np.float64)
    return np.where(np.abs(dx) >= np.abs(dy), np.where(dx < 0, 0, 1), np.where(dy < 0, 2, 3))


def _number(name: str, names: Sequence[str], what: str) -> int:
    if name not in names:
        raise UsageError(f"Unknown {what} '{name}'. {did_you_mean(name, names)}")
    return names.index(name)


def _empty(index: np.ndarray) -> Scenes:
    n = len(index)
    whole = {key: np.full(n, -1, np.int8) for key in ("kind", "background", "count", "relation")}
    names = {key: np.full((n, OBJECTS), -1, np.int8) for key in ("shape", "colour", "size")}
    places = {key: np.full((n, OBJECTS), -1, np.int16) for key in ("x", "y", "radius", "angle", "shade")}
    return Scenes(index=index, slope=np.zeros(n, np.int16), **whole, **names, **places)


# The sampler ---------------------------------------------------------------------------------------------------------


@numba.njit(**_JIT)
def _mix(value):
    value = (value ^ (value >> _u64(30))) * _u64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> _u64(27))) * _u64(0x94D049BB133111EB)
    return value ^ (value >> _u64(31))


@numba.njit(**_JIT)
def _key(seed, split, index):
    """Where the stream of a scene begins."""
    key = _mix(_u64(seed) + _u64(0x9E3779B97F4A7C15))
    key = _mix(key ^ (_u64(split) + _u64(1)) * _u64(0xD1B54A32D192ED03))
    return _mix(key ^ (_u64(index) + _u64(1)) * _u64(0x9E3779B97F4A7C15))


@numba.njit(**_JIT)
def below(stream, limit):
    """A whole number in [0, limit), limit < 2^31. `stream`: uint64 [2], its key and the count of numbers taken."""
    stream[1] += _u64(1)
    high = _mix(stream[0] + stream[1] * _u64(0x9E3779B97F4A7C15)) >> _u64(32)
    return np.int64((high * _u64(limit)) >> _u64(32))


@numba.njit(**_JIT)
def stream_of(seed, split, index):
    stream = np.empty(2, np.uint64)
    stream[0], stream[1] = _key(seed, split, index), _u64(0)
    return stream


_pair_held_out = numba.njit(**_JIT)(pair_held_out)
_combo_held_out = numba.njit(**_JIT)(combo_held_out)


@numba.njit(**_JIT)
def _sample(
    seed, split, shown, index, kind, background, count, relation, slope, shape, colour, size, x, y, radius, angle, shade
):
    for n in range(len(index)):
        stream = stream_of(seed, split, index[n])
        kind[n] = _draw_kind(stream, split)
        while not shown[kind[n]] and split in (TRAIN, ALL):
            kind[n] = _draw_kind(stream, split)
        background[n] = below(stream, len(BACKGROUNDS))
        slope[n] = below(stream, 25) - 12
        count[n] = 1 if kind[n] == SINGLE else 2 if kind[n] == RELATION else 3
        if kind[n] == GROUP:
            count[n] = 2 + below(stream, 2)
        _draw_things(stream, split, kind[n], count[n], shape[n], colour[n], size[n])
        _vary(stream, count[n], size[n], radius[n], angle[n], shade[n])
        if kind[n] == RELATION:
            relation[n] = below(stream, len(RELATIONS))
        _place(stream, kind[n], count[n], relation[n], radius[n], x[n], y[n])


@numba.njit(**_JIT)
def _rearrange(seed, index, kind, count, relation, slope, size, x, y, radius, angle, shade):
    for n in range(len(index)):
        stream = stream_of(seed, len(SPLITS), index[n])
        slope[n] = below(stream, 25) - 12
        _vary(stream, count[n], size[n], radius[n], angle[n], shade[n])
        _place(stream, kind[n], count[n], relation[n], radius[n], x[n], y[n])


@numba.njit(**_JIT)
def _alter(seed, index, kind, background, count, relation, shape, colour, size, x, y, radius):
    for n in range(len(index)):
        stream = stream_of(seed, len(SPLITS) + 1, index[n])
        lot = below(stream, 100)
        for _ in range(TRIES):
            if lot < 10:
                background[n] = (background[n] + 1 + below(stream, len(BACKGROUNDS) - 1)) % len(BACKGROUNDS)
                break
            new = shape[n].copy(), colour[n].copy(), size[n].copy(), x[n].copy(), y[n].copy(), radius[n].copy()
            exchanged = lot < 50 and (kind[n] == RELATION or kind[n] == LIST)
            places = lot < 30 and kind[n] == RELATION
            if exchanged:
                if places:
                    _exchange(new[3])
                    _exchange(new[4])
                else:
                    _exchange(new[1])
            else:
                _change(stream, kind[n], count[n], new[0], new[1], new[2], new[5])
            if _belongs(TRAIN, kind[n], count[n], new[0], new[1]) and _fits(count[n], new[5], new[3], new[4]):
                shape[n], colour[n], size[n] = new[0], new[1], new[2]
                x[n], y[n], radius[n] = new[3], new[4], new[5]
                if places:
                    relation[n] ^= 1
                break
            if exchanged:
                lot = 50  # try another change


@numba.njit(**_JIT)
def _exchange(values):
    first = values[0]
    values[0] = values[1]
    values[1] = first


@numba.njit(**_JIT)
def _change(stream, kind, count, shape, colour, size, radius):
    """Another shape, colour or size of one object, or of all in a group."""
    what, chosen, by = below(stream, 10), below(stream, count), below(stream, 1 << 20)
    for o in range(count):
        if o != chosen and kind != GROUP:
            continue
        if what < 7:
            shape[o] = (shape[o] + 1 + by % (len(SHAPES) - 1)) % len(SHAPES)
        elif what < 8:
            colour[o] = (colour[o] + 1 + by % (len(COLOURS) - 1)) % len(COLOURS)
        else:
            size[o] = (size[o] + 1 + by % (len(SIZES) - 1)) % len(SIZES)
            radius[o] = RADII[size[o]] * (96 + below(stream, 9)) // 100


@numba.njit(**_JIT)
def _fits(count, radius, x, y):
    """Whether all objects lie within the picture and apart."""
    for o in range(count):
        edge = np.int64(radius[o]) + GAP
        if min(x[o], y[o]) < edge or max(x[o], y[o]) > UNIT - edge:
            return False
    return _disjoint(count, radius, x, y)


@numba.njit(**_JIT)
def _vary(stream, count, size, radius, angle, shade):
    for o in range(count):
        radius[o] = RADII[size[o]] * (96 + below(stream, 9)) // 100
        angle[o] = below(stream, 201) - 100
        shade[o] = below(stream, 25) - 12


@numba.njit(**_JIT)
def _place(stream, kind, count, relation, radius, x, y):
    if kind == RELATION:
        _place_beside(stream, relation, radius, x, y)
    else:
        _scatter(stream, count, radius, x, y)


@numba.njit(**_JIT)
def _draw_kind(stream, split):
    lot = below(stream, 100)
    if split == PAIRS:
        return SINGLE
    if split == COMBOS:
        return RELATION
    return SINGLE if lot < 30 else RELATION if lot < 70 else GROUP if lot < 85 else LIST


@numba.njit(**_JIT)
def _draw_things(stream, split, kind, count, shape, colour, size):
    """Shapes, colours and sizes, drawn until they belong to the split."""
    while True:
        for o in range(count):
            shape[o] = below(stream, len(SHAPES))
            colour[o] = below(stream, len(COLOURS))
            size[o] = below(stream, len(SIZES))
            if kind == GROUP and o > 0:
                shape[o], colour[o], size[o] = shape[0], colour[0], size[0]
        if _belongs(split, kind, count, shape, colour):
            return


@numba.njit(**_JIT)
def _belongs(split, kind, count, shape, colour):
    pairs, combos, twins = 0, 0, 0
    for a in range(count):
        pairs += _pair_held_out(shape[a], colour[a])
        for b in range(a):
            combos += _combo_held_out(shape[a], colour[a], shape[b], colour[b])
            twins += (shape[a] == shape[b]) & (colour[a] == colour[b])
    if kind != GROUP and twins:  # "a red circle left of a red circle" says nothing
        return False
    if split == ALL:
        return True
    return pairs == (split == PAIRS) and combos == (split == COMBOS)


@numba.njit(**_JIT)
def _anywhere(stream, radius):
    """A centre that keeps an object of this radius inside the picture."""
    edge = radius + GAP
    return edge + below(stream, UNIT - 2 * edge + 1)


@numba.njit(**_JIT)
def _place_beside(stream, relation, radius, x, y):
    """Two objects, disjoint along the relation's axis, and at most 0.6 as far apart along the other."""
    across = x if relation < 2 else y
    along = y if relation < 2 else x
    first, second = (0, 1) if relation % 2 == 0 else (1, 0)
    need = radius[0] + radius[1] + GAP
    low = radius[first] + GAP
    high = UNIT - radius[second] - GAP
    distance = need + below(stream, high - low - need + 1)
    across[first] = low + below(stream, high - low - distance + 1)
    across[second] = across[first] + distance
    along[0] = _anywhere(stream, radius[0])
    for _ in range(TRIES):
        along[1] = _anywhere(stream, radius[1])
        if 10 * abs(along[0] - along[1]) <= 6 * distance:
            return
    along[0] = along[1] = UNIT // 2


@numba.njit(**_JIT)
def _scatter(stream, count, radius, x, y):
    """Objects anywhere, disjoint; a layout that fits any sizes where none is found."""
    for _ in range(TRIES):
        for o in range(count):
            x[o], y[o] = _anywhere(stream, radius[o]), _anywhere(stream, radius[o])
        if _disjoint(count, radius, x, y):
            return
    for o in range(count):
        x[o] = (1060, 3036, 2048)[o]
        y[o] = (1140, 1140, 2960)[o]


@numba.njit(**_JIT)
def _disjoint(count, radius, x, y):
    for a in range(count):
        for b in range(a):
            need = np.int64(radius[a]) + radius[b] + GAP
            dx, dy = np.int64(x[a]) - x[b], np.int64(y[a]) - y[b]
            if dx * dx + dy * dy < need * need:
                return False
    return True
