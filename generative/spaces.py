"""What a model's rows are: points, pictures or texts, and how each is shown and written to a file.

A space is all that a model has to know of its data; it is kept with the weights, so that a model works without them.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from oneira.platform.checkpoints import write_replacing
from oneira.platform.errors import ConfigError, DataError, UsageError, did_you_mean

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

KINDS = ("points", "pictures", "text")
DIMENSIONS = {"points": 1, "pictures": 3, "text": 1}
INKS = np.array(
    [
        [59, 130, 196], [217, 130, 43], [63, 156, 107], [181, 84, 143], [138, 111, 209], [140, 140, 60], [200, 60, 60],
        [60, 170, 180], [110, 110, 110], [150, 90, 50],
    ]
)  # fmt: skip
PAD, BEGIN, END = 0, 1, 2  # tokens of every text model


@dataclass(frozen=True, kw_only=True)
class Space:
    """The rows of a data set, and what a model's `sample` gives.

    Attributes:
        kind: "points", float32 [N, D]; "pictures", uint8 [N, H, W, C]; "text", int64 [N, L] in a batch, and a list of N
            texts where a model gives them.
        shape: of one row, (D,), (H, W, C) or (L,).
        levels: how many values a pixel or a token may take, counted from 0; 0 for points.
        classes: how many labels there are; 0 without labels.
        tokenizer: of "text", as the JSON of the tokenizers library.
    """

    kind: Literal["points", "pictures", "text"]
    shape: tuple[int, ...]
    levels: int = 0
    classes: int = 0
    tokenizer: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind is '{self.kind}'. {did_you_mean(self.kind, KINDS)}")
        if len(self.shape) != DIMENSIONS[self.kind] or min(self.shape) < 1:
            raise ConfigError(f"shape is {self.shape}; {self.kind} have {DIMENSIONS[self.kind]} sizes of at least 1.")
        if self.kind != "points" and not 2 <= self.levels <= (256 if self.kind == "pictures" else 1 << 20):
            raise ConfigError(f"levels is {self.levels}; pictures have 2 to 256, texts as many as there are tokens.")

    @property
    def dims(self) -> int:
        """Numbers in a row."""
        return math.prod(self.shape)

    def to_signed(self, pictures: Tensor) -> Tensor:
        """Pictures of whole levels -> float32 of the same shape, 0 as -1 and the highest level as 1."""
        return pictures.float() * (2 / (self.levels - 1)) - 1

    def to_levels(self, x: Tensor) -> Tensor:
        """Undoes `to_signed`: the nearest level there is, uint8."""
        return ((x + 1) / 2 * (self.levels - 1)).round().clamp(0, self.levels - 1).byte()

    def reader(self) -> Tokenizer:
        """The tokenizer of a text space. Raises UsageError for the other kinds."""
        from tokenizers import Tokenizer

        if not self.tokenizer:
            raise UsageError(f"Rows of this model are {self.kind}; only texts have a tokenizer.")
        tokenizer = Tokenizer.from_str(self.tokenizer)
        tokenizer.encode_special_tokens = True  # which its JSON does not say: "[EOS]" in a text is five letters
        return tokenizer

    def require(self, kind: str, model: str) -> None:
        """Raises ConfigError unless the rows are of this kind."""
        if self.kind != kind:
            raise ConfigError(f"The model '{model}' takes {kind}; these data are {self.kind}.")


def visible(pictures: Any, levels: int) -> np.ndarray:
    """Pictures uint8 [N, H, W, C] of so many levels -> uint8 [N, H, W, 3] in [0, 255]."""
    array = np.asarray(pictures)
    full = np.round(array.astype(np.float32) * (255 / (levels - 1))).astype(np.uint8)
    return full.repeat(3, -1) if full.shape[-1] == 1 else full


def sheet(pictures: np.ndarray, columns: int = 0, gap: int = 1) -> np.ndarray:
    """Pictures uint8 [N, H, W, 3] side by side on white, as one uint8 [H', W', 3]; 0 columns: about a square."""
    n, h, w, _ = pictures.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    page = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = (i // columns) * (h + gap), (i % columns) * (w + gap)
        page[y : y + h, x : x + w] = picture
    return page


def scatter(points: np.ndarray, side: int = 320, labels: np.ndarray | None = None) -> np.ndarray:
    """The first two coordinates of points [N, D] as dots, uint8 [side, side, 3], in a colour for each label int [N]; what
    shows is [-3, 3] both ways."""
    page = np.full((side, side, 3), 255, np.int32)
    points = np.asarray(points)
    if points.shape[1] == 1:
        points = np.concatenate([points, 0 * points], 1)
    places = np.round((points[:, :2] / 6 + 0.5) * (side - 1)).astype(int)
    colours = INKS[np.zeros(len(places), int) if labels is None else np.asarray(labels) % len(INKS)]
    inside = ((places >= 1) & (places < side - 1)).all(1)
    places, darker = places[inside], (255 - colours[inside]) * 2 // 3
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        np.subtract.at(page, (side - 1 - places[:, 1] - dy, places[:, 0] + dx), darker)
    return page.clip(20, 255).astype(np.uint8)


def picture_of(samples: Any, space: Space) -> np.ndarray:
    """Samples of points or pictures as one picture, uint8 [H, W, 3]."""
    space.require("points" if space.kind == "points" else "pictures", "a contact sheet")
    if space.kind == "points":
        return scatter(samples)
    return sheet(visible(samples, space.levels))


FORMATS = {"points": (".png", ".npy"), "pictures": (".png", ".npy"), "text": (".txt",)}


def check_format(path: Path, space: Space) -> None:
    """Raises UsageError, before any work, for a file that samples of this space are not written to."""
    allowed = FORMATS[space.kind]
    if path.suffix.lower() not in allowed:
        raise UsageError(
            f"'{path}' is of no kind that {space.kind} are written to. {did_you_mean(path.suffix, allowed)}"
        )
    if not path.absolute().parent.is_dir():
        raise UsageError(f"There is no folder '{path.absolute().parent}'.")


def write_samples(samples: Any, space: Space, path: Path) -> None:
    """Writes samples: .png shows them, .npy holds them as arrays, .txt has a text a paragraph."""
    from PIL import Image

    check_format(path, space)
    try:
        if path.suffix.lower() == ".txt":
            path.write_text("\n\n".join(samples) + "\n", encoding="utf-8")
        elif path.suffix.lower() == ".npy":
            with path.open("wb") as file:
                np.lib.format.write_array(file, np.asarray(samples), allow_pickle=False)
        else:
            picture = picture_of(samples, space)
            times = max(1, 640 // max(picture.shape)) if space.kind == "pictures" else 1
            shown = io.BytesIO()
            Image.fromarray(picture.repeat(times, 0).repeat(times, 1)).save(shown, "PNG")
            write_replacing(path, shown.getvalue())  # who finds it there finds it whole
    except OSError as error:
        raise DataError(f"Cannot write '{path}': {error.strerror or error}.") from error
