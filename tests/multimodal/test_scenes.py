"""The scenes data set: the same everywhere, as its rules say, drawn as geometry says, described truly."""

import hashlib
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.path import Path as Outline

from oneira.multimodal.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Thing,
    agreement,
    altered,
    captions,
    combo_held_out,
    compose,
    draw,
    grid_labels,
    pair_held_out,
    sample,
    scene_batch,
    true_reading,
    vocabulary,
)
from oneira.multimodal.scenes.attributes import GAP, GROUP, LIST, RADII, RELATION, SINGLE, UNIT, relation_of
from oneira.multimodal.scenes.captions import (
    BACKGROUND_WORDS,
    COLOUR_WORDS,
    RELATION_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    _plural,
)
from oneira.multimodal.scenes.drawing import GROUND, PAINT
from oneira.platform.errors import UsageError

MANY = np.arange(20_000)


def digest(scenes):
    parts = [np.ascontiguousarray(value).astype("<i8").tobytes() for _, value in sorted(vars(scenes).items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def test_there_is_enough_of_everything():
    assert len(SHAPES) >= 8 and len(COLOURS) >= 10 and len(SIZES) >= 3 and len(RELATIONS) == 4
    s = sample(MANY)
    assert set(np.unique(s.count)) == {1, 2, 3}
    for values, names in ((s.shape, SHAPES), (s.colour, COLOURS), (s.size, SIZES)):
        shares = np.bincount(values[values >= 0], minlength=len(names)) / (values >= 0).sum()
        assert shares.min() > 0.8 / len(names)
    assert np.bincount(s.background).min() > 0.9 * len(s) / len(BACKGROUNDS)
    assert np.bincount(s.relation[s.kind == RELATION]).min() > 0.2 * (s.kind == RELATION).sum()


@pytest.mark.parametrize("split", SPLITS)
def test_every_machine_draws_the_same_attributes(split):
    # Whole numbers only, so the digest is the same wherever this runs. Trained weights and figures hang on it.
    assert digest(sample(np.arange(500), split, seed=3)) == DIGESTS[split]


DIGESTS = {
    "train": "5085fdf852378974",
    "pairs": "5f8352f39950a314",
    "combos": "ca214f5333df69af",
    "all": "07561fca5ece345c",
}


def test_a_scene_depends_on_its_index_alone():
    order = np.random.default_rng(0).permutation(3000)
    assert digest(sample(np.arange(3000))[order]) == digest(sample(order))
    assert digest(sample(order)) != digest(sample(order, seed=1)) != digest(sample(order, "all"))


def test_kinds_of_scenes_can_be_chosen_and_all_are_the_plain_ones():
    few = sample(np.arange(2000), kinds=("single", "list"))
    assert set(few.kind) == {SINGLE, LIST} and 0.55 < (few.kind == SINGLE).mean() < 0.75  # 30 of 45
    assert not pair_held_out(few.shape[:, 0], few.colour[:, 0]).any()
    plain, every = sample(np.arange(100)), sample(np.arange(100), kinds=("list", "group", "relation", "single"))
    assert all(np.array_equal(getattr(plain, key), getattr(every, key)) for key in vars(plain))
    assert set(sample(np.arange(50), "combos", kinds=("single",)).kind) == {RELATION}
    for kinds, words in ((("singel",), "Did you mean 'single'"), ((), "No kind")):
        with pytest.raises(UsageError, match=words):
            sample(np.arange(1), kinds=kinds)


def test_an_altered_scene_differs_in_one_thing():
    s = sample(MANY)
    other = altered(s, 3)
    assert all(np.array_equal(getattr(s, key), getattr(sample(MANY), key)) for key in vars(s))
    assert all(np.array_equal(getattr(other, key), getattr(altered(s, 3), key)) for key in vars(s))
    assert not np.array_equal(other.shape, altered(s, 4).shape)
    keys = "background", "shape", "colour", "size", "relation"
    differ = {key: (getattr(s, key) != getattr(other, key)).reshape(len(s), -1).any(1) for key in keys}
    number = np.sum(list(differ.values()), axis=0)
    assert number.max() == 1 and number.mean() > 0.97
    assert {key: value.mean() > 0.03 for key, value in differ.items()} == dict.fromkeys(keys, True)
    assert 0.4 < differ["shape"].mean() < 0.7
    kept = "index", "kind", "count", "slope", "angle", "shade"
    assert all(np.array_equal(getattr(s, key), getattr(other, key)) for key in kept)
    swapped = differ["relation"]
    assert np.array_equal(s.x[swapped, 0], other.x[swapped, 1])
    assert np.array_equal(s.x[~swapped], other.x[~swapped]) and np.array_equal(s.y[~swapped], other.y[~swapped])
    exchanged = differ["colour"] & (s.kind == LIST) & (s.colour[:, 0] == other.colour[:, 1])
    assert (s.colour[exchanged, 1] == other.colour[exchanged, 0]).mean() > 0.9 and exchanged.sum() > 10
    related = other[other.kind == RELATION]
    where = relation_of(related.x[:, 0], related.x[:, 1], related.y[:, 0], related.y[:, 1])
    assert np.array_equal(where, related.relation)
    assert not np.any(held_out(other[:4000]))


def test_objects_are_apart_and_inside():
    for s in (*(sample(MANY, split) for split in SPLITS), altered(sample(MANY))):
        x, y, r = (v.astype(np.int64) for v in (s.x, s.y, s.radius))
        there = np.arange(3) < s.count[:, None]
        for v in (x, y):
            assert ((v - r >= GAP) & (v + r <= UNIT - GAP))[there].all()
        for a, b in ((0, 1), (0, 2), (1, 2)):
            both = there[:, a] & there[:, b]
            assert (np.hypot(x[:, a] - x[:, b], y[:, a] - y[:, b]) >= r[:, a] + r[:, b] + GAP)[both].all()
        assert (s.shape[~there] == -1).all() and (s.x[~there] == -1).all()


def test_sizes_cannot_be_taken_for_each_other():
    s = sample(MANY)
    ranges = [(s.radius[s.size == k].min(), s.radius[s.size == k].max()) for k in range(3)]
    assert all(1.2 * high < low for (_, high), (low, _) in pairwise(ranges))


def test_relations_are_unmistakable():
    s = sample(MANY)
    s = s[s.kind == RELATION]
    dx, dy = (np.subtract(v[:, 0], v[:, 1], dtype=np.int64) for v in (s.x, s.y))
    along = np.where(s.relation < 2, dx, dy)
    across = np.where(s.relation < 2, dy, dx)
    assert (np.sign(along) == np.where(s.relation % 2, 1, -1)).all()
    assert (np.abs(across) <= 0.6 * np.abs(along)).all()
    assert (np.abs(along) >= s.radius[:, 0] + s.radius[:, 1] + GAP).all()


def held_out(s):
    """(a held-out pair in the scene, a held-out combination), bool [N] each, one object at a time."""
    pair, combo = np.zeros(len(s), bool), np.zeros(len(s), bool)
    for n in range(len(s)):
        things = [(int(s.shape[n, o]), int(s.colour[n, o])) for o in range(s.count[n])]
        pair[n] = any(pair_held_out(*thing) for thing in things)
        combo[n] = any(combo_held_out(*a, *b) for i, a in enumerate(things) for b in things[:i])
    return pair, combo


def test_training_never_shows_what_is_held_out():
    few = np.arange(4000)
    train, pairs, combos, everything = (sample(few, split) for split in SPLITS)
    assert not np.any(held_out(train))
    pair, _ = held_out(pairs)
    assert pair.all() and (pairs.kind == SINGLE).all()
    pair, combo = held_out(combos)
    assert combo.all() and not pair.any() and (combos.kind == RELATION).all()
    pair, combo = held_out(everything)
    assert 0.1 < pair.mean() < 0.9 and 0.02 < combo.mean() < 0.9


def test_every_shape_and_colour_is_seen_in_training():
    table = np.array([[pair_held_out(s, c) for c in range(10)] for s in range(8)])
    assert (table.sum(1) == 2).all() and (table.sum(0) <= 2).all()
    s = sample(MANY)
    seen = np.zeros((8, 10), bool)
    seen[s.shape[s.kind == SINGLE, 0], s.colour[s.kind == SINGLE, 0]] = True
    assert np.array_equal(seen, ~table)
    kinds = [(a, b) for a in range(8) for b in range(10)]
    shares = np.mean([combo_held_out(*a, *b) for a in kinds for b in kinds if a != b])
    assert 0.1 < shares < 0.2
    assert all(combo_held_out(*a, *b) == combo_held_out(*b, *a) for a in kinds for b in kinds)


# ---- pictures


OUTLINES = {
    "square": [(-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)],
    "triangle": [(0, -1), (3**0.5 / 2, 0.5), (-(3**0.5) / 2, 0.5)],
    "diamond": [(0, -1), (2 / 3, 0), (0, 1), (-2 / 3, 0)],
    "star": [
        (r * np.sin(k * np.pi / 5), -r * np.cos(k * np.pi / 5)) for k, r in enumerate([1, 0.45] * 5)
    ],
    "cross": [
        (-0.3, -0.9), (0.3, -0.9), (0.3, -0.3), (0.9, -0.3), (0.9, 0.3), (0.3, 0.3), (0.3, 0.9), (-0.3, 0.9),
        (-0.3, 0.3), (-0.9, 0.3), (-0.9, -0.3), (-0.3, -0.3),
    ],
}  # fmt: skip


def inside(shape, points):
    """Whether points [K, 2] in the unit circle lie in a shape, from its corners or radii."""
    radius = np.hypot(*points.T)
    if shape == "circle":
        return radius < 0.9
    if shape == "ring":
        return (radius > 0.5) & (radius < 0.9)
    if shape == "heart":
        half = 0.52 / 2**0.5
        corners = [(0, 0.12 - 2 * half), (2 * half, 0.12), (0, 0.12 + 2 * half), (-2 * half, 0.12)]
        lobes = [np.hypot(points[:, 0] - side * half, points[:, 1] - 0.12 + half) < 0.52 for side in (-1, 1)]
        return Outline(corners).contains_points(points) | lobes[0] | lobes[1]
    return Outline(OUTLINES[shape]).contains_points(points)


@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_drawing_agrees_with_counting_points(shape, size):
    scene = compose([Thing(shape=shape, colour="red", size="large", x=0.47, y=0.55)])
    scene = replace(scene, angle=np.full((1, 3), 83, np.int16))
    picture = draw(scene, size)[0].astype(float)
    fine = 16 * size
    at = (np.arange(fine) + 0.5) / fine * UNIT
    x, y = np.meshgrid(at - scene.x[0, 0], at - scene.y[0, 0])
    turn = 2 * np.pi * 83 / 3600
    points = np.stack([np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x], -1) / RADII[2]
    near = np.abs(points).max(-1) < 1.1
    cover = np.zeros((fine, fine))
    cover[near] = inside(shape, points[near])
    cover = cover.reshape(size, 16, size, 16).mean((1, 3))[..., None]
    error = np.abs(picture - (GROUND[0] + cover * (PAINT[0] - GROUND[0]))).max(-1) / 211  # their contrast in blue
    assert error.mean() < 0.0016 * 64 / size and np.quantile(error, 0.999) < 0.25
    assert cover.sum() == pytest.approx(((GROUND[0] - picture) / (GROUND[0] - PAINT[0]))[..., 1].sum(), rel=0.03)


def test_nothing_is_drawn_outside_of_an_object():
    s = sample(np.arange(200))
    s = replace(s, slope=np.zeros_like(s.slope))
    at = np.arange(64) + 0.5
    for picture, n in zip(draw(s, 64), range(len(s)), strict=True):
        far = np.full((64, 64), np.inf)
        for o in range(s.count[n]):
            distance = np.hypot(at[None] - s.x[n, o] / 64, at[:, None] - s.y[n, o] / 64)
            far = np.minimum(far, distance - s.radius[n, o] / 64)
        assert (picture[far > 1.5] == GROUND[s.background[n]]).all()


def test_pictures_of_a_batch_do_not_depend_on_each_other():
    batch = scene_batch(np.arange(50), 64)
    assert batch.shape == (50, 64, 64, 3) and batch.dtype == np.uint8
    assert np.array_equal(batch[17], scene_batch(np.array([17]), 64)[0])
    assert np.array_equal(draw(sample(np.arange(50), "train"), 64), batch)
    assert len(np.unique(batch.reshape(50, -1), axis=0)) == 50


def test_a_picture_is_the_same_at_every_size():
    s = sample(np.arange(64))
    small, large = draw(s, 64).astype(float), draw(s, 256).astype(float)
    shrunk = large.reshape(64, 64, 4, 64, 4, 3).mean((2, 4))
    assert np.abs(small - shrunk).mean() < 0.6 and np.quantile(np.abs(small - shrunk), 0.999) < 40


def test_colours_stand_out_and_apart():
    for a in range(len(PAINT)):
        assert all(np.abs(PAINT[a] - PAINT[b]).max() >= 60 for b in range(a))
        assert all(np.abs(PAINT[a] - ground).max() >= 60 for ground in GROUND)


# ---- captions


def named(text, words):
    """Numbers of the names in a text, in the order in which they stand there."""
    numbers = {o: k for k, options in enumerate(words) for o in {*options, *map(_plural, options)}}
    longest_first = "|".join(sorted(numbers, key=len, reverse=True))
    return [numbers[found] for found in re.findall(rf"\b(?:{longest_first})\b", text)]


def test_captions_say_what_is_there():
    s = sample(np.arange(5000))
    sayings = captions(s)
    left_out = {"relation": 0, "size": 0, "background": 0}
    for n, text in enumerate(sayings):
        text = text.replace("dark blue", "navy")
        count = 1 if s.kind[n] == GROUP else s.count[n]
        things = list(zip(named(text, COLOUR_WORDS), named(text, SHAPE_WORDS), strict=True))
        wanted = [(s.colour[n, o], s.shape[n, o]) for o in range(count)]
        sizes, relation, ground = (named(text, w) for w in (SIZE_WORDS, RELATION_WORDS, BACKGROUND_WORDS))
        swapped = s.kind[n] == RELATION and things != wanted
        assert things == (wanted[::-1] if swapped else wanted), text
        assert sizes in ([], [s.size[n, o] for o in range(count)][:: -1 if swapped else 1]), text
        assert ground in ([], [s.background[n]]), text
        assert relation in ([], [s.relation[n] ^ 1 if swapped else s.relation[n]]), text
        assert ("two" in text.split()) == (s.kind[n] == GROUP and s.count[n] == 2)
        assert ("three" in text.split()) == (s.kind[n] == GROUP and s.count[n] == 3)
        left_out["size"] += not sizes
        left_out["background"] += not ground
        left_out["relation"] += s.kind[n] == RELATION and not relation
    assert all(0.03 * len(s) < count < 0.7 * len(s) for count in left_out.values()), left_out


def test_full_captions_leave_nothing_out():
    s = sample(np.arange(500))
    for n, text in enumerate(captions(s, full=True)):
        text = text.replace("dark blue", "navy")
        assert named(text, SIZE_WORDS) and named(text, BACKGROUND_WORDS)
        assert bool(named(text, RELATION_WORDS)) == (s.kind[n] == RELATION)


def test_captions_vary_and_repeat():
    s = sample(np.arange(300))
    assert captions(s) == captions(s) and captions(s)[40:50] == captions(s[40:50])
    assert sum(a != b for a, b in zip(captions(s), captions(s, 1), strict=True)) > 250
    assert len(set(captions(s[np.zeros(400, int)]))) == 1
    assert len({captions(s[:1], variant)[0] for variant in range(200)}) > 40


def test_the_vocabulary_is_exactly_what_captions_use():
    texts = captions(sample(MANY)) + captions(sample(np.arange(5000), "all"), 1)
    assert set(re.findall(r"[a-z]+", " ".join(texts))) == set(vocabulary())
    assert not set("".join(texts)) - set("abcdefghijklmnopqrstuvwxyz ,")


# ---- composed scenes and judging


def test_composed_scenes():
    left = Thing(shape="star", colour="blue", size="small", x=0.2, y=0.4)
    right = Thing(shape="star", colour="red", x=0.7, y=0.5)
    s = compose([left, right], "black")
    assert s.kind[0] == RELATION and RELATIONS[s.relation[0]] == "left of"
    assert re.search(r"blue star.* red star|red star.* blue star", captions(s, full=True)[0])
    assert RELATIONS[compose([right, left]).relation[0]] == "right of"
    assert compose([right, replace(right, x=0.2)]).kind[0] == GROUP and compose([left]).kind[0] == SINGLE
    assert compose([left, right, replace(left, shape="ring", y=0.8)]).kind[0] == LIST
    picture = draw(s, 64)[0]
    assert np.array_equal(picture[32, 45], PAINT[0]) and np.array_equal(picture[26, 13], PAINT[5])
    assert np.array_equal(picture[5, 5], GROUND[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compose([]), "0 objects"),
        (lambda: compose([Thing(shape="sta", colour="red")]), "'star'"),
        (lambda: compose([Thing(shape="star", colour="rde")]), "'red'"),
        (lambda: compose([Thing(shape="star", colour="red")], "whit"), "'white'"),
        (lambda: sample(np.arange(2), "tain"), "'train'"),
        (lambda: sample(np.array([-1])), "negative"),
        (lambda: scene_batch(np.arange(2), 512), "512"),
    ],
)
def test_wrong_names_and_sizes_are_explained(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_a_perfect_judge_agrees_and_any_mistake_is_seen():
    s = sample(np.arange(600), "all")
    true = true_reading(s)
    assert all(value.all() for value in agreement(s, true).values())
    flipped = replace(true, **{k: getattr(true, k)[:, ::-1].copy() for k in ("shape", "colour", "size", "x", "y")})
    order = np.argsort(flipped.shape < 0, axis=1, kind="stable")
    shuffled = {k: np.take_along_axis(getattr(flipped, k), order, 1) for k in ("shape", "colour", "size", "x", "y")}
    assert all(value.all() for value in agreement(s, replace(true, **shuffled)).values())
    for key, part in (("shape", "objects"), ("colour", "objects"), ("size", "sizes")):
        wrong = getattr(true, key).copy()
        wrong[:, 0] = (wrong[:, 0] + 1) % 3
        assert not agreement(s, replace(true, **{key: wrong}))[part].any()
    swapped = agreement(s, replace(true, x=np.flip(true.x, 1), y=np.flip(true.y, 1)))
    assert not agreement(s, replace(true, background=(true.background + 1) % 6))["everything"].any()
    assert not agreement(s, replace(true, count=true.count % 3 + 1))["objects"].any()
    assert not swapped["places"][s.kind == LIST].any()
    related = s.kind == RELATION
    exchanged = replace(true, x=true.x[:, [1, 0, 2]], y=true.y[:, [1, 0, 2]])
    assert not agreement(s, exchanged)["relation"][related].any() and agreement(s, exchanged)["objects"].all()


def test_grid_labels_hold_all_objects():
    s = sample(MANY)
    labels = grid_labels(s)
    assert (labels["present"].sum((1, 2)) == s.count).all()  # no cell holds two
    assert np.array_equal(labels["count"] + 1, s.count)
    n, row, column = np.nonzero(labels["present"])
    x = (column + labels["offset"][n, row, column, 0]) / 8
    y = (row + labels["offset"][n, row, column, 1]) / 8
    for i in np.random.default_rng(0).integers(0, len(n), 300):
        place = int(np.argmin(np.hypot(s.x[n[i]] / UNIT - x[i], s.y[n[i]] / UNIT - y[i])))
        assert s.x[n[i], place] / UNIT == pytest.approx(x[i], abs=1e-5)
        for key in ("shape", "colour", "size"):
            assert labels[key][n[i], row[i], column[i]] == getattr(s, key)[n[i], place]
    assert ((labels["shape"] == -100) == (labels["present"] == 0)).all()
