"""Bytes to arrays and back, and the shelf of pictures that have an address for an hour."""

from __future__ import annotations

import base64
import binascii
import io
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

MAX_BYTES = 8 << 20  # of an uploaded file
MAX_PIXELS = 4096 * 4096  # of a picture, as its header says; checked before it is decoded
READS = ("PNG", "JPEG", "WEBP")
HOUR = 3600.0
SHELF_BYTES = 256 << 20


class NoPicture(ValueError):
    """The bytes are no picture that is taken; the message says why."""


def read_picture(data: bytes, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """A square picture, made to `size`: uint8 [size, size, 3], and its alpha uint8 [size, size] where it has one.

    Raises:
        NoPicture: not PNG, JPEG or WebP, damaged, not square, or too large; nothing was decoded where the header tells.
    """
    return _read(data, size)[:2]


def read_edit(data: bytes, mask: bytes | None, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture uint8 [size, size, 3] and where it is to be edited, bool [size, size]: where the mask is fully transparent.

    Without a mask the picture's own transparency is it, as in OpenAI's API.

    Raises:
        NoPicture: as `read_picture`; the mask has another size than the picture, or nothing in it is transparent.
    """
    picture, alpha, shape = _read(data, size)
    if mask is not None:
        _, alpha, mask_shape = _read(mask, size)
        if mask_shape != shape:
            raise NoPicture(f"The mask is {_show(mask_shape)}, the image {_show(shape)}; they must be of one size.")
    if alpha is None or not (alpha == 0).any():
        raise NoPicture(
            "Nothing is transparent in the mask (or in the image, without a mask): nothing is to be edited."
        )
    return picture, alpha == 0


def _read(data: bytes, size: int) -> tuple[np.ndarray, np.ndarray | None, tuple[int, int]]:
    from PIL import Image

    if len(data) > MAX_BYTES:
        raise NoPicture(f"The file has {len(data)} bytes; at most {MAX_BYTES} are taken.")
    try:
        with Image.open(io.BytesIO(data), formats=READS) as image:
            shape = image.size
            if shape[0] * shape[1] > MAX_PIXELS:
                raise NoPicture(f"The picture is {_show(shape)}; at most {MAX_PIXELS} pixels are taken.")
            if shape[0] != shape[1]:
                raise NoPicture(f"The picture is {_show(shape)}; it must be square.")
            whole = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except NoPicture:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, which it checks in the header as well
        raise NoPicture(f"The picture is larger than the {MAX_PIXELS} pixels that are taken.") from error
    except Exception as error:  # the decoders raise anything at damaged files: OSError, SyntaxError, struct.error, ...
        raise NoPicture(f"The file cannot be read as {', '.join(READS)}: it is none, or damaged.") from error
    colours = whole.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    alpha = whole.getchannel("A").resize((size, size), Image.Resampling.NEAREST) if whole.mode == "RGBA" else None
    return np.array(colours), None if alpha is None else np.array(alpha), shape


def _show(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def from_data_url(text: str) -> bytes:
    """The bytes of "data:image/...;base64,...". Raises NoPicture."""
    head, _, data = text.partition(",")
    if not head.endswith(";base64"):
        raise NoPicture("The picture must be a data: URL in base64: data:image/png;base64,...")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise NoPicture(f"The picture is no base64: {error}.") from error


def write_picture(picture: np.ndarray, kind: str = "png", quality: int | None = None) -> bytes:
    """A file of uint8 [H, W, 3]. kind: "png", "jpeg" or "webp"; quality of the last two, 0 to 100 (best)."""
    from PIL import Image

    file = io.BytesIO()
    settings = {} if kind == "png" else {"quality": 95 if quality is None else quality}
    Image.fromarray(picture).save(file, kind, **settings)
    return file.getvalue()


@dataclass(frozen=True)
class _Kept:
    data: bytes
    kind: str
    until: float


class Shelf:
    """Pictures by a secret name, each for an hour; the oldest make room where there are too many bytes."""

    def __init__(self, seconds: float = HOUR, most: int = SHELF_BYTES) -> None:
        self._seconds, self._most = seconds, most
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def put(self, data: bytes, kind: str) -> str:
        """Keeps a picture; its name, which nobody can guess."""
        name = f"{secrets.token_urlsafe(24)}.{kind}"
        self._kept[name] = _Kept(data, kind, time.monotonic() + self._seconds)
        self._tidy()
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """(bytes, kind), or None where there is none, or no longer."""
        self._tidy()
        found = self._kept.get(name)
        return (found.data, found.kind) if found else None

    def _tidy(self) -> None:
        now, size = time.monotonic(), sum(len(kept.data) for kept in self._kept.values())
        while self._kept:
            first = next(iter(self._kept.values()))
            if first.until > now and size <= self._most:
                return
            size -= len(first.data)
            self._kept.popitem(last=False)
