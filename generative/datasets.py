"""Data sets by name: what ships, what is made, and the user's own files. Others come by entry points:

    [project.entry-points."oneira.datasets"]
    mine = "my_package.data:mine"                # mine(config: DataConfig) -> Dataset

"digits" (scikit-learn's 8x8, 17 levels, labelled), "moons" (two moons, points), "images" (a folder; a subfolder is a
label where there are several), "texts" (a .txt file or a folder of them), "array" (a .npy file: float points [N, D] or
uint8 pictures [N, H, W, C]), "hub" (a data set of the Hugging Face hub by its name, see `hub`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from oneira.platform.errors import ConfigError, DataError
from oneira.platform.presets import load_entry_point

from .spaces import BEGIN, END, PAD, Space

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
Rows = dict[str, np.ndarray]  # "x": rows as the space says; "y": labels int64 [N], where there are labels


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data. path: of "images", "texts" and "array", and the name of "hub". size: pixels a side of pictures that are read or drawn.
    length: tokens of a row of text, and vocabulary: how many different ones there may be."""

    name: str
    path: str = ""
    size: int = 32
    length: int = 64
    vocabulary: int = 512

    def __post_init__(self) -> None:
        for key, lowest in {"size": 4, "length": 4, "vocabulary": 300}.items():
            if getattr(self, key) < lowest:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least {lowest}.")


class Dataset(Protocol):
    """Rows by number, in three splits that share none."""

    @property
    def space(self) -> Space: ...

    def size(self, split: Split) -> int:
        """How many rows a split has; data that are made as they are asked for may have 2^40."""
        ...

    def rows(self, split: Split, indices: np.ndarray) -> Rows:
        """Some rows of a split, by their numbers int64 [B]."""
        ...


@dataclass(frozen=True)
class Arrays:
    """A data set held in memory: {split: rows}."""

    space: Space
    splits: dict[Split, Rows]

    def size(self, split: Split) -> int:
        return len(self.splits[split]["x"])

    def rows(self, split: Split, indices: np.ndarray) -> Rows:
        return {key: value[indices] for key, value in self.splits[split].items()}

    @classmethod
    def divide(cls, space: Space, rows: Rows, parts: tuple[float, float] = (0.1, 0.1)) -> Arrays:
        """Splits rows at random, always in the same way: `parts` are the shares of "validation" and "test"."""
        count = len(rows["x"])
        order = np.random.default_rng(0).permutation(count)
        first, second = int(count * parts[0]), int(count * (parts[0] + parts[1]))
        if first < 1 or second <= first or second >= count:
            raise DataError(f"{count} rows are too few to train on and to measure on.")
        places = {"validation": order[:first], "test": order[first:second], "train": order[second:]}
        return cls(space, {s: {k: v[places[s]] for k, v in rows.items()} for s in SPLITS})


def load_data(config: DataConfig) -> Dataset:
    """The data set of a config.

    Raises:
        UsageError: no such name; the message gives the nearest.
        DataError: the files are not there or not what they should be.
    """
    return load_entry_point("oneira.datasets", "data set", config.name)(config)


def batches(dataset: Dataset, batch_size: int, seed: int) -> Callable[[int], Rows]:
    """The batch of each step, a pure function of the step: every epoch goes through all rows once, in its own order.

    Endless data (2^32 rows and more) are drawn with a hash of the step instead. The last rows of an epoch that do not
    fill a batch are left for another epoch.
    """
    size = dataset.size("train")
    count = min(batch_size, size)
    orders: dict[int, np.ndarray] = {}

    def batch_at(step: int) -> Rows:
        if size >= 1 << 32:
            return dataset.rows("train", np.random.default_rng((seed, step)).integers(size, size=count))
        epoch, place = divmod(step, size // count)
        if epoch not in orders:
            orders.clear()
            orders[epoch] = np.random.default_rng((seed, epoch)).permutation(size)
        return dataset.rows("train", orders[epoch][place * count : (place + 1) * count])

    return batch_at


def first_rows(dataset: Dataset, split: Split, count: int) -> Rows:
    """The first rows of a split, at most `count`."""
    return dataset.rows(split, np.arange(min(count, dataset.size(split))))


# What ships and what is made ------------------------------------------------------------------------------------------


def digits(config: DataConfig) -> Arrays:
    """scikit-learn's 1,797 written digits, uint8 [N, 8, 8, 1] of 17 levels, with labels 0 to 9."""
    from sklearn.datasets import load_digits

    found = load_digits()
    space = Space(kind="pictures", shape=(8, 8, 1), levels=17, classes=10)
    rows = {"x": found.images.astype(np.uint8)[..., None], "y": found.target.astype(np.int64)}
    return Arrays.divide(space, rows, (0.1, 0.2))


def moons(config: DataConfig) -> Arrays:
    """Two moons, float32 [N, 2], label 0 or 1: half circles of radius 1 with normal noise of 0.08, 40,000 in all."""
    from sklearn.datasets import make_moons

    x, y = make_moons(40_000, noise=0.08, random_state=0)
    rows = {"x": x.astype(np.float32), "y": y.astype(np.int64)}
    return Arrays.divide(Space(kind="points", shape=(2,), classes=2), rows, (0.1, 0.25))


# The user's own --------------------------------------------------------------------------------------------------------


def _path(config: DataConfig) -> Path:
    path = Path(config.path).expanduser()
    if not config.path or not path.exists():
        raise DataError(f"There is no '{config.path}'. Say where the data are: --set data.path=PATH")
    return path


def images(config: DataConfig) -> Arrays:
    """All pictures of a folder, cut to a square and made `size` pixels wide, in memory: uint8 [N, size, size, 3]."""
    folder = _path(config)
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
    if not files:
        raise DataError(f"'{folder}' holds no pictures ({', '.join(PICTURES)}).")
    found = np.empty((len(files), config.size, config.size, 3), np.uint8)
    for place, file in zip(found, files, strict=True):
        place[:] = square(file, config.size, str(file))
    names = sorted({file.parent for file in files})
    rows: Rows = {"x": found}
    if len(names) > 1:
        rows["y"] = np.array([names.index(file.parent) for file in files], np.int64)
    classes = len(names) if len(names) > 1 else 0
    return Arrays.divide(Space(kind="pictures", shape=found.shape[1:], levels=256, classes=classes), rows)


def _in_colours(picture: Any) -> Any:
    """A picture of any of PIL's modes as RGB: 16 bits a pixel become 8, and what is transparent white."""
    from PIL import Image

    if picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")


def square(file: Any, size: int, name: str) -> np.ndarray:
    """A picture's file, cut to a square and made `size` pixels wide, uint8 [size, size, 3]. Raises DataError with its name."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file) as picture:
            return np.asarray(ImageOps.fit(_in_colours(ImageOps.exif_transpose(picture)), (size, size)))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"'{name}' cannot be read as a picture: {error}") from error


def array(config: DataConfig) -> Arrays:
    """A .npy file: uint8 [N, H, W, C] with 1 or 3 channels, or floats [N, D]."""
    path = _path(config)
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"'{path}' cannot be read as an array: {error}") from error
    if not isinstance(found, np.ndarray):
        raise DataError(f"'{path}' holds several arrays ({', '.join(found.files)}); one .npy file is needed.")
    if found.dtype == np.uint8 and found.ndim == 4 and found.shape[-1] in (1, 3):
        return Arrays.divide(Space(kind="pictures", shape=found.shape[1:], levels=256), {"x": found})
    if found.dtype.kind == "f" and found.ndim == 2:
        with np.errstate(over="ignore"):
            points = found.astype(np.float32)
        if np.isfinite(points).all():
            return Arrays.divide(Space(kind="points", shape=points.shape[1:]), {"x": points})
    raise DataError(
        f"'{path}' holds {found.dtype} {list(found.shape)}; allowed are uint8 [N, H, W, 1 or 3] and floats [N, D] that are finite in float32."
    )


def texts(config: DataConfig) -> Arrays:
    """A .txt file, or all of a folder, cut into rows of `length` tokens of which each begins with BEGIN, int64 [N, length]."""
    path = _path(config)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    try:
        documents = [file.read_text(encoding="utf-8") for file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' cannot be read as UTF-8 text: {error}") from error
    if not any(documents):
        raise DataError(f"'{path}' holds no text.")
    tokenizer = learn_tokens(documents, config.vocabulary)
    stream = [token for text in tokenizer.encode_batch(documents) for token in (*text.ids, END)]
    piece = config.length - 1
    pieces = np.array(stream[: len(stream) // piece * piece], np.int64).reshape(-1, piece)
    rows = np.concatenate([np.full((len(pieces), 1), BEGIN), pieces], 1)
    return Arrays.divide(text_space(tokenizer, config.length), {"x": rows})


def learn_tokens(documents: list[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer (Sennrich et al. 2016) with PAD, BEGIN and END first; any text survives it unchanged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["[PAD]", "[BOS]", "[EOS]"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.encode_special_tokens = True  # "[EOS]" in a text is five letters
    return tokenizer


def text_space(tokenizer: Any, length: int) -> Space:
    """The space of rows of `length` tokens of this tokenizer."""
    return Space(kind="text", shape=(length,), levels=tokenizer.get_vocab_size(), tokenizer=tokenizer.to_str())


def token_rows(tokenizer: Any, documents: list[str], length: int) -> np.ndarray:
    """Each text as BEGIN, its tokens, END, then PAD; int64 [N, length], cut where it is too long."""
    rows = np.full((len(documents), length), PAD, np.int64)
    for row, text in zip(rows, tokenizer.encode_batch(documents), strict=True):
        ids = [BEGIN, *text.ids, END][:length]
        row[: len(ids)] = ids
    return rows
