"""Scenes as data sets of the generative package: labels, splits, texts."""

from __future__ import annotations

import numpy as np
import pytest

from oneira.generative.datasets import DataConfig, batches, first_rows, load_data
from oneira.multimodal.scenes import COLOURS, SHAPES


def load(name, **values):
    return load_data(DataConfig(name=name, **{"size": 16, "length": 48, **values}))


@pytest.mark.parametrize("name", ["scenes", "things", "captions", "paraphrases"])
def test_splits_share_no_rows_and_are_always_the_same(name):
    data = load(name)
    rows = [first_rows(data, split, 40) for split in ("train", "validation", "test")]
    every = np.concatenate([part["x"].reshape(40, -1) for part in rows])
    assert len(np.unique(every, axis=0)) > 100
    again = load(name).rows("test", np.arange(40))
    assert all(np.array_equal(again[key], value) for key, value in rows[2].items())
    a, b = (batches(data, 8, seed=3)(5)["x"] for _ in range(2))
    assert np.array_equal(a, b) and not np.array_equal(a, batches(data, 8, seed=3)(6)["x"])


def test_things_are_what_their_label_says():
    from oneira.multimodal.datasets import FIRST, TRIES
    from oneira.multimodal.scenes import draw, sample

    data = load("things")
    rows = data.rows("test", np.arange(60))
    assert data.space.classes == 80 and len(set(rows["y"])) > 20
    for i, (picture, label) in enumerate(zip(rows["x"], rows["y"], strict=True)):
        some = sample((FIRST["test"] + i) * TRIES + np.arange(TRIES), "all")
        single = some[np.flatnonzero((some.kind == 0) & (some.count == 1))[:1]]
        assert np.array_equal(draw(single, 16)[0], picture)
        assert (
            (int(single.shape[0, 0]), int(single.colour[0, 0])) == divmod(int(label), len(COLOURS)) < (len(SHAPES), 0)
        )


def test_captions_come_back_as_texts():
    data = load("paraphrases")
    reader, rows = data.space.reader(), data.rows("train", np.arange(30))
    for key in ("x", "source"):
        assert rows[key].shape == (30, 48) and (rows[key][:, 0] == 1).all() and (rows[key] == 2).any(1).all(), (
            "none is cut"
        )
        texts = reader.decode_batch(rows[key].tolist())
        assert all(
            any(colour in text for colour in (*COLOURS, "grey", "violet", "crimson")) or len(text) > 8 for text in texts
        )
    assert (rows["x"] != 0).sum() > (rows["source"] != 0).sum(), "one of the two leaves nothing out"
