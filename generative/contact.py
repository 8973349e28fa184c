"""A contact sheet: one picture with what several runs have learned to make, a panel each."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneira.platform.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL import Image

PANEL, MARGIN, TITLE = 224, 12, 18  # pixels
LETTERS, TEXT_SIZE, LINE = 36, 12, 15  # letters in a line of text, its size and height
INK = (40, 40, 40)


def check_sheet(path: Path) -> None:
    """Raises UsageError, before any work, for a file that a sheet is not written to."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"'{path}' is no .png, which a contact sheet is.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"There is no folder '{path.absolute().parent}'.")


def contact_sheet(panels: Sequence[tuple[str, Any, Sequence[str]]], path: Path, columns: int = 0) -> Path:
    """Writes panels (title, picture, texts): the picture, a file or uint8 [H, W, 3] or None, else the texts, or nothing.

    Args:
        columns: panels side by side; 0: about one and a half times as many as there are rows.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = columns or max(1, round(math.sqrt(1.5 * len(panels))))
    rows = math.ceil(len(panels) / columns)
    wide, high = PANEL + MARGIN, PANEL + TITLE + MARGIN
    page = Image.new("RGB", (columns * wide + MARGIN, rows * high + MARGIN), "white")
    pen, letters = ImageDraw.Draw(page), ImageFont.load_default(TEXT_SIZE)
    for i, (title, picture, texts) in enumerate(panels):
        x, y = MARGIN + (i % columns) * wide, MARGIN + (i // columns) * high
        pen.text((x, y), title, INK, letters)
        if picture is not None:
            page.paste(_fitted(picture), (x, y + TITLE))
        else:
            lines = [line for text in texts for line in [*textwrap.wrap(text, LETTERS), ""]]
            for k, line in enumerate(lines[: PANEL // LINE]):
                pen.text((x, y + TITLE + k * LINE), line, INK, letters)
    try:
        page.quantize(128).save(path, optimize=True)
    except OSError as error:
        raise DataError(f"Cannot write '{path}': {error.strerror or error}.") from error
    return path


def _fitted(picture: Any) -> Image.Image:
    """As large as a panel, in its own proportions."""
    from PIL import Image

    made = Image.open(picture) if isinstance(picture, (str, Path)) else Image.fromarray(picture)
    made = made.convert("RGB")
    share = PANEL / max(made.size)
    size = max(1, round(made.width * share)), max(1, round(made.height * share))
    return made.resize(size, Image.Resampling.NEAREST if share > 1 else Image.Resampling.LANCZOS)
