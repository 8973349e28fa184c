"""Data sets: splits that share nothing, epochs, the user's own files, texts."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from oneira.generative.datasets import (
    SPLITS,
    Arrays,
    DataConfig,
    batches,
    first_rows,
    learn_tokens,
    load_data,
    square,
    token_rows,
)
from oneira.generative.spaces import BEGIN, END, PAD, Space, check_format, scatter, sheet, visible, write_samples
from oneira.platform.errors import ConfigError, DataError, UsageError


def write_array(path, array):
    with path.open("wb") as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def test_digits_and_moons():
    digits = load_data(DataConfig(name="digits"))
    assert sum(digits.size(split) for split in SPLITS) == 1797
    assert digits.space == Space(kind="pictures", shape=(8, 8, 1), levels=17, classes=10)
    rows = first_rows(digits, "test", 10**6)
    assert rows["x"].max() == 16 and rows["x"].dtype == np.uint8 and set(rows["y"]) == set(range(10))
    moons = load_data(DataConfig(name="moons"))
    x = [first_rows(moons, split, 10**6)["x"] for split in SPLITS]
    assert len(np.unique(np.concatenate(x), axis=0)) == sum(map(len, x)) == 40_000
    y = first_rows(moons, "train", 10**6)["y"]
    assert abs(y.mean() - 0.5) < 0.02 and abs(np.linalg.norm(x[0][y == 0], axis=1).mean() - 1) < 0.01


def test_the_same_name_gives_the_same_rows():
    a, b = (load_data(DataConfig(name="digits")).rows("test", np.arange(5)) for _ in range(2))
    assert np.array_equal(a["x"], b["x"])


def test_an_epoch_shows_every_row_once():
    data = Arrays.divide(Space(kind="points", shape=(1,)), {"x": np.arange(100, dtype=np.float32)[:, None]})
    batch_at = batches(data, 8, seed=1)
    epoch = [batch_at(step)["x"].ravel() for step in range(10)]
    assert len(np.unique(np.concatenate(epoch))) == 80 == data.size("train")
    assert not np.array_equal(batch_at(10)["x"].ravel(), epoch[0])
    assert np.array_equal(batches(data, 8, seed=1)(7)["x"].ravel(), epoch[7]), "a pure function of the step"
    assert len(batches(data, 1000, seed=1)(3)["x"]) == 80


def test_a_folder_of_pictures(tmp_path):
    for i in range(30):
        folder = tmp_path / ("cats" if i % 2 else "dogs")
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (20 + i, 10), (i, 2 * i, 255)).save(folder / f"{i}.png")
    (tmp_path / "cats" / "notes.txt").write_text("not a picture")
    data = load_data(DataConfig(name="images", path=str(tmp_path), size=8))
    assert data.space == Space(kind="pictures", shape=(8, 8, 3), levels=256, classes=2)
    rows = first_rows(data, "train", 100)
    assert len(rows["x"]) == 24 and (rows["x"][..., 2] == 255).all()
    assert np.array_equal(rows["y"], 1 - rows["x"][:, 0, 0, 0] % 2), "cats come first and have the odd numbers"
    (tmp_path / "cats" / "broken.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(DataError, match=r"broken\.png"):
        load_data(DataConfig(name="images", path=str(tmp_path), size=8))


def test_pictures_of_other_modes(tmp_path):
    deep = np.full((8, 8), 257 * 100, np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.paste((0, 0, 200, 255), (0, 0, 4, 8))
    clear.save(tmp_path / "clear.png")
    Image.new("P", (8, 8)).save(tmp_path / "palette.png")
    assert (square(tmp_path / "deep.png", 8, "deep") == 100).all()
    found = square(tmp_path / "clear.png", 8, "clear")
    assert found[0, 0].tolist() == [0, 0, 200] and found[0, 7].tolist() == [255, 255, 255]
    assert square(tmp_path / "palette.png", 8, "palette").shape == (8, 8, 3)


def test_arrays(tmp_path):
    place = tmp_path / "a.npy"
    for array, kind in ((np.zeros((40, 4, 4, 3), np.uint8), "pictures"), (np.ones((40, 3)), "points")):
        write_array(place, array)
        data = load_data(DataConfig(name="array", path=str(place)))
        assert data.space.kind == kind and data.space.shape == array.shape[1:] and data.size("train") == 32
    for bad in (
        np.zeros((40, 4, 4, 2), np.uint8),
        np.full((40, 2), np.nan),
        np.full((40, 2), 1e300),
        np.zeros((40, 2), np.int64),
    ):
        write_array(place, bad)
        with pytest.raises(DataError, match="allowed are"):
            load_data(DataConfig(name="array", path=str(place)))
    np.savez(tmp_path / "several.npz", a=np.zeros(3), b=np.zeros(3))
    with pytest.raises(DataError, match="several arrays"):
        load_data(DataConfig(name="array", path=str(tmp_path / "several.npz")))
    place.write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match="cannot be read"):
        load_data(DataConfig(name="array", path=str(place)))


def test_texts(tmp_path):
    (tmp_path / "a.txt").write_text("a rose is a rose is a rose. " * 40, encoding="utf-8")
    (tmp_path / "b.txt").write_text("über Röslein rot " * 40, encoding="utf-8")
    data = load_data(DataConfig(name="texts", path=str(tmp_path), length=10, vocabulary=300))
    reader = data.space.reader()
    every = np.concatenate([first_rows(data, split, 1000)["x"] for split in SPLITS])
    assert every.shape[1] == 10 and every.max() < data.space.levels <= 300
    whole = sum(
        len(ids.ids) + 1 for ids in reader.encode_batch(["a rose is a rose is a rose. " * 40, "über Röslein rot " * 40])
    )
    assert len(every) == whole // 9 and (every[:, 0] == BEGIN).all() and (every[:, 1:] != BEGIN).all()
    assert (every == END).sum() >= 1
    with pytest.raises(DataError, match="no text"):
        (tmp_path / "empty").mkdir()
        load_data(DataConfig(name="texts", path=str(tmp_path / "empty")))
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="UTF-8"):
        load_data(DataConfig(name="texts", path=str(tmp_path / "c.txt")))


def test_token_rows_by_hand():
    tokenizer = learn_tokens(["ab"], 300)
    a, b = tokenizer.encode("a").ids[0], tokenizer.encode("b").ids[0]
    assert a != b and (PAD, BEGIN, END) == (0, 1, 2)
    assert token_rows(tokenizer, ["a", "a b a b", ""], 4)[[0, 2]].tolist() == [
        [BEGIN, a, END, PAD],
        [BEGIN, END, PAD, PAD],
    ]


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        ({"name": "digit"}, UsageError, "digits"),
        ({"name": "images", "path": "nowhere"}, DataError, "data.path"),
        ({"name": "images"}, DataError, "data.path"),
    ],
)
def test_mistakes_are_told(config, error, said):
    with pytest.raises(error, match=said):
        load_data(DataConfig(**config))
    with pytest.raises(ConfigError, match="size"):
        DataConfig(name="digits", size=1)
    with pytest.raises(ConfigError, match="levels"):
        Space(kind="pictures", shape=(2, 2, 1), levels=300)


def test_too_few_rows_are_refused():
    with pytest.raises(DataError, match="too few"):
        Arrays.divide(Space(kind="points", shape=(1,)), {"x": np.zeros((5, 1))})


# Showing --------------------------------------------------------------------------------------------------------------


def test_sheets_by_hand():
    pictures = visible(np.array([0, 1, 2]).reshape(3, 1, 1, 1), 3)
    assert pictures[:, 0, 0, 0].tolist() == [0, 128, 255]
    page = sheet(pictures, columns=2)
    assert page[..., 0].tolist() == [[0, 255, 128], [255] * 3, [255, 255, 255]]


def test_scatter_puts_points_where_they_are():
    page = scatter(np.array([[1.5, 0.0]] * 3), side=61)
    ys, xs = np.where(page.min(-1) < 255)
    assert set(xs) == {45, 46} and set(ys) == {30, 29}


def test_files_of_samples(tmp_path):
    space = Space(kind="pictures", shape=(4, 4, 1), levels=3)
    samples = np.full((5, 4, 4, 1), 2, np.uint8)
    write_samples(samples, space, tmp_path / "a.npy")
    assert np.array_equal(np.load(tmp_path / "a.npy"), samples)
    write_samples(samples, space, tmp_path / "a.png")
    assert np.asarray(Image.open(tmp_path / "a.png")).min() == 255
    write_samples(["one", "two"], Space(kind="text", shape=(4,), levels=9), tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "one\n\ntwo\n"
    with pytest.raises(UsageError, match=r"\.png"):
        check_format(tmp_path / "a.pgn", space)
    with pytest.raises(UsageError, match="no folder"):
        check_format(tmp_path / "no" / "a.png", space)
