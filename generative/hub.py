"""A data set of the Hugging Face hub, by its name: pictures or texts, from its Parquet files.

    oneira train cnn-things --set data.name=hub --set data.path=uoft-cs/cifar10
    oneira train gpt-captions --set data.name=hub --set data.path=FOLDER          # of Parquet files that are already here

Of several columns, pictures are what the hub calls an image (a struct with "bytes"), labels the whole numbers whose name has
"label" in it, texts the column "text" or else the first of strings. Files belong to the split that a word of
their path names; without a test and a validation split, rows are divided at random as the user's own files are.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oneira.platform.errors import DataError
from oneira.platform.store import fetch

from .datasets import Arrays, DataConfig, Rows, Split, learn_tokens, square, text_space, token_rows
from .spaces import Space

if TYPE_CHECKING:
    import pyarrow

CONVERTED = "refs/convert/parquet"  # the branch in which the hub keeps every data set as Parquet
MOST_CLASSES = 100_000
VALIDATION = 0.1  # the share of the training rows, where there is a test split and no other


def hub(config: DataConfig) -> Arrays:
    """The data set that `config.path` names, in memory.

    Raises:
        DataError: the hub cannot be reached and holds no copy here, there is no such data set, or it has no rows that a model takes.
    """
    files = _files(config.path)
    splits: dict[Split, list[Path]] = {"train": [], "validation": [], "test": []}
    for name, file in files:
        splits[_split_of(name)].append(file)
    train = splits["train"]
    if not train:
        raise DataError(f"'{config.path}' has no training rows: {', '.join(name for name, _ in files)}.")
    pictures, labels, texts = _columns(train[0], config.path)
    if pictures:
        return _pictures(config, splits, pictures, labels)
    return _texts(config, splits, texts)


def _split_of(name: str) -> Split:
    """The split that a file's path names by one of its words; "train" where there is none."""
    words = set(re.split(r"[^a-z]+", name))
    if words & {"validation", "valid", "val", "dev"}:
        return "validation"
    return "test" if "test" in words else "train"


def _files(path: str) -> list[tuple[str, Path]]:
    """The Parquet files of a folder or of the hub, by their names in lower case."""
    folder = Path(path).expanduser()
    if not path or not folder.is_dir():
        folder = _fetched(path)
    found = [(str(file.relative_to(folder)).lower(), file) for file in sorted(folder.rglob("*.parquet"))]
    if not found:
        raise DataError(f"'{path}' holds no Parquet files.")
    return found


def _fetched(name: str) -> Path:
    """The folder of the hub's Parquet files, fetched now or earlier."""
    if name.count("/") != 1:
        raise DataError(f"'{name}' names no data set of the hub. Say which: --set data.path=OWNER/NAME")
    failed = f"The data set '{name}' cannot be fetched from the hub"
    advice = "fetch its Parquet files elsewhere and give their folder: --set data.path=FOLDER"
    folder = Path()
    for revision in ("main", CONVERTED):
        folder = fetch(name, failed, advice, repo_type="dataset", revision=revision, allow_patterns="*.parquet")
        if any(folder.rglob("*.parquet")):
            break
    return folder


def _columns(file: Path, path: str) -> tuple[str, str, str]:
    """The names of the columns with pictures, labels and texts; "" where there is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"'{file}' cannot be read as Parquet: {error}") from error
    pictures = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    labels = [f.name for f in schema if pa.types.is_integer(f.type) and "label" in f.name.lower()]
    texts = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    texts.sort(key=lambda name: name != "text")
    if not pictures and not texts:
        said = ", ".join(f"{f.name} ({f.type})" for f in schema)
        raise DataError(f"'{path}' has neither pictures nor texts. Its columns: {said}.")
    return tuple(names[0] if names else "" for names in (pictures, labels, texts))  # type: ignore[return-value]


def _rows(files: list[Path], columns: list[str]) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        try:
            with pq.ParquetFile(file) as table:
                batch: pyarrow.RecordBatch
                for batch in table.iter_batches(1024, columns=columns):
                    yield from batch.to_pylist()
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise DataError(f"'{file}' cannot be read as Parquet: {error}") from error


def _pictures(config: DataConfig, splits: dict[Split, list[Path]], column: str, label: str) -> Arrays:
    def read(files: list[Path]) -> Rows:
        found: list[np.ndarray] = []
        labels: list[int] = []
        for row in _rows(files, [column, label] if label else [column]):
            content = (row[column] or {}).get("bytes")
            if not content:
                raise DataError(f"Picture {len(found)} of '{config.path}' is not in its Parquet file.")
            found.append(square(io.BytesIO(content), config.size, f"picture {len(found)} of {config.path}"))
            labels.append(-1 if label and row[label] is None else row[label] if label else 0)
        if not found:
            raise DataError(f"'{config.path}' has a split without rows.")
        return {"x": np.stack(found)} | ({"y": np.array(labels, np.int64)} if label else {})

    rows = {split: read(files) for split, files in splits.items() if files}
    classes = 1 + max(int(part["y"].max()) for part in rows.values()) if label else 0
    if label and not (min(int(part["y"].min()) for part in rows.values()) >= 0 and classes <= MOST_CLASSES):
        raise DataError(f"'{config.path}' has labels that are no numbers from 0 to {MOST_CLASSES}.")
    space = Space(kind="pictures", shape=rows["train"]["x"].shape[1:], levels=256, classes=classes)
    return _divided(space, rows)


def _texts(config: DataConfig, splits: dict[Split, list[Path]], column: str) -> Arrays:
    texts = {
        split: [row[column] or "" for row in _rows(files, [column])] for split, files in splits.items() if files
    }  # fmt: skip
    if not any(texts["train"]):
        raise DataError(f"'{config.path}' holds no text.")
    tokenizer = learn_tokens(texts["train"], config.vocabulary)
    rows: dict[Split, Rows] = {
        split: {"x": token_rows(tokenizer, part, config.length)} for split, part in texts.items() if part
    }
    return _divided(text_space(tokenizer, config.length), rows)


def _divided(space: Space, rows: dict[Split, Rows]) -> Arrays:
    """The three splits of what there is: a validation split alone is measured on, and one that lacks is a part of the training rows."""
    if "test" not in rows and "validation" in rows:
        rows = {"train": rows["train"], "test": rows["validation"]}
    if "test" not in rows:
        return Arrays.divide(space, rows["train"])
    if "validation" in rows:
        return Arrays(space, rows)
    order = np.random.default_rng(0).permutation(len(rows["train"]["x"]))
    first = max(1, int(len(order) * VALIDATION))
    if first >= len(order):
        raise DataError(f"{len(order)} rows are too few to train on and to measure on.")
    places: dict[Split, np.ndarray] = {"validation": order[:first], "train": order[first:]}
    parts: dict[Split, Rows] = {name: {k: v[at] for k, v in rows["train"].items()} for name, at in places.items()}
    return Arrays(space, rows | parts)
