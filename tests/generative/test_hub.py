"""Data sets of the hub: real Parquet files in a folder, and what is said where there is no network."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from oneira.generative.datasets import DataConfig, load_data
from oneira.generative.spaces import BEGIN
from oneira.platform.errors import DataError


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (value, 0, 255)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def write(folder, name, **columns):
    place = folder / name
    place.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), place)


def load(folder, **settings):
    return load_data(DataConfig(name="hub", path=str(folder), **settings))


def test_pictures_with_labels_and_a_test_split(tmp_path):
    for part in range(2):
        values = range(20 * part, 20 * part + 20)
        write(
            tmp_path, f"plain/train-{part}.parquet", img=[png(v) for v in values], coarse_label=[v % 3 for v in values]
        )
    write(
        tmp_path, "plain/test-0.parquet", img=[png(200 + v) for v in range(6)], coarse_label=[v % 3 for v in range(6)]
    )
    data = load(tmp_path, size=8)
    assert data.space.shape == (8, 8, 3) and data.space.classes == 3
    assert [data.size(split) for split in ("train", "validation", "test")] == [36, 4, 6]
    for split, first in (("train", 0), ("validation", 0), ("test", 200)):
        rows = data.rows(split, np.arange(data.size(split)))
        assert np.array_equal(rows["y"], (rows["x"][:, 0, 0, 0].astype(int) - first) % 3)
    assert data.rows("test", np.arange(6))["x"][:, 3, 3, 0].tolist() == [200, 201, 202, 203, 204, 205]


def test_files_belong_to_the_split_that_a_word_of_their_path_names(tmp_path):
    for name, count in (("latest/train-0", 30), ("latest/validation", 7), ("latest/test", 5)):
        write(tmp_path, f"{name}.parquet", text=[f"{name} {i}" for i in range(count)])
    data = load(tmp_path, length=12, vocabulary=300)
    assert [data.size(split) for split in ("train", "validation", "test")] == [30, 7, 5]
    (tmp_path / "latest" / "test.parquet").unlink()
    assert [load(tmp_path).size(split) for split in ("train", "validation", "test")] == [27, 3, 7]


def test_texts_without_a_test_split(tmp_path):
    write(tmp_path, "train.parquet", id=["a"] * 40, text=[f"row {i} of a text" for i in range(40)])
    data = load(tmp_path, length=12, vocabulary=300)
    reader, rows = data.space.reader(), data.rows("train", np.arange(32))["x"]
    assert data.size("test") == 4 and rows.shape == (32, 12) and (rows[:, 0] == BEGIN).all()
    assert all(reader.decode(row.tolist()).endswith(" of a text") for row in rows)


def test_mistakes_are_told(tmp_path):
    with pytest.raises(DataError, match="no Parquet"):
        load(tmp_path)
    write(tmp_path, "test.parquet", text=["a"])
    with pytest.raises(DataError, match="no training rows"):
        load(tmp_path)
    write(tmp_path, "train.parquet", score=[1.5, 2.5])
    with pytest.raises(DataError, match=r"score \(double\)"):
        load(tmp_path)
    write(tmp_path, "train.parquet", image=[png(1), {"bytes": b"GIF8 no more", "path": None}])
    with pytest.raises(DataError, match="picture 1 of"):
        load(tmp_path)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load(tmp_path)
    with pytest.raises(DataError, match="OWNER/NAME"):
        load("cifar10")


def test_without_a_network_it_says_what_to_do(tmp_path):
    code = (
        "from oneira.generative.datasets import DataConfig, load_data\n"
        "from oneira.platform.errors import DataError\n"
        "try: load_data(DataConfig(name='hub', path='nobody/nothing'))\n"
        "except DataError as error: print(error)"
    )
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}  # nobody listens at that port
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | nowhere, capture_output=True, text=True, timeout=120
    )
    assert "'nobody/nothing' cannot be fetched" in done.stdout and "data.path=FOLDER" in done.stdout, done.stderr[
        -2000:
    ]
    assert "\n" not in done.stdout.strip()
