"""What models there are by name, and what is in one, read from their cards and the headers of their weights. Imports no torch.

Kinds: "text to image" (ours), a family of `public/`, "CLIP" (open_clip's format), a family of `generative/`.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from oneira.generative.finding import CARD, is_model
from oneira.generative.finding import find_model as find_generative
from oneira.platform import store
from oneira.platform.errors import DataError, UsageError, did_you_mean

from .public.folders import PublicFolder, read_json
from .public.names import INDEX

BUILTIN = Path(__file__).parent / "builtin"
CLIP_CONFIG = "open_clip_config.json"
TEXT_TO_IMAGE = "text to image"
MOST_HEADER = 100_000_000  # bytes; what safetensors itself allows


@dataclass(frozen=True, kw_only=True)
class Shelved:
    """A model by name. source: builtin, models, runs, or folder; bytes: of its weights' files."""

    name: str
    source: str
    kind: str
    place: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Part:
    """One network of a model. precision: types of its tensors."""

    name: str
    parameters: int
    precision: tuple[str, ...]
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Description:
    """All that is said about a model without loading it. card: its own settings; leftovers: files that are never read."""

    model: Shelved
    parts: tuple[Part, ...]
    card: dict[str, Any] = field(default_factory=dict)
    leftovers: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        return {
            **asdict(self.model),
            "parts": [asdict(p) for p in self.parts],
            "card": self.card,
            "leftovers": list(self.leftovers),
        }


def shelf() -> list[Shelved]:
    """Built-in models that are here, those of `models/`, and runs in `runs/` that hold a trained one."""
    from oneira.platform.runs import runs_folder

    found = [("builtin", "builtin", BUILTIN)] + [(place.name, "models", place) for place in store.stored()]
    found += [(run.name, "runs", run / "model") for run in runs_folder()]
    rows = [(name, source, kind_of(place), place) for name, source, place in found]
    return [
        Shelved(name=name, source=source, kind=kind, place=str(place), bytes=_weight_bytes(place))
        for name, source, kind, place in rows
        if kind is not None
    ]


def describe(name: str) -> Description:
    """Raises UsageError for an unknown name, DataError for a folder that is no model or holds damaged weights."""
    folder = folder_of(name)
    kind = kind_of(folder)
    if kind is None:
        raise DataError(
            f"'{folder}' is no model: it has no {CARD} of ours, no {INDEX} of diffusers' and no {CLIP_CONFIG}."
        )
    if kind not in ("CLIP", TEXT_TO_IMAGE) and (folder / INDEX).is_file():
        _check_public(folder)
    source = next((row.source for row in shelf() if Path(row.place).absolute() == folder.absolute()), "folder")
    model = Shelved(name=store.name_of(folder) if source == "folder" else str(name), source=source, kind=kind, place=str(folder), bytes=_weight_bytes(folder))  # fmt: skip
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    leftovers = tuple(sorted(str(path.relative_to(folder)) for path in files if not store.is_read(path.name)))
    return Description(model=model, parts=tuple(_parts(folder)), card=_card(folder), leftovers=leftovers)


def folder_of(name: str) -> Path:
    """Where the model of a name is: built-in, a run or preset, a folder, one of `models/`, or the hub's."""
    if name == "builtin":
        return BUILTIN
    run = _run_model(name)
    found = run or find_generative(name) or store.find(name)
    if found is None:
        known = ["builtin", *(row.name for row in shelf())]
        raise UsageError(f"There is no model '{name}'. {did_you_mean(name, dict.fromkeys(known))}")
    return found


def kind_of(folder: Path) -> str | None:
    """What a folder holds, by its files' names and its card; None where it is no model."""
    if is_model(folder):
        return str(read_json(folder / CARD).get("kind"))
    if (folder / CARD).is_file() and (folder / "decoder").is_dir():
        return TEXT_TO_IMAGE
    if (folder / INDEX).is_file():
        return str(read_json(folder / INDEX).get("_class_name", "unknown"))
    return "CLIP" if (folder / CLIP_CONFIG).is_file() else None


def _run_model(name: str) -> Path | None:
    """The model in a run that is no generative family's: a part of text-to-image."""
    from oneira.platform.runs import place_of

    place = place_of(name) / "model"
    return place if (place_of(name) / "config.json").is_file() and kind_of(place) is not None else None


def _check_public(folder: Path) -> None:
    from .public.loading import FAMILIES

    PublicFolder.open(folder, [family for families in FAMILIES.values() for family in families])


def _card(folder: Path) -> dict[str, Any]:
    for name in (CARD, INDEX, CLIP_CONFIG):
        if (folder / name).is_file():
            return read_json(folder / name)
    return {}


def _weights(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.safetensors") if path.is_file() and store.is_read(path.name))


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in _weights(folder))


def _parts(folder: Path) -> Iterator[Part]:
    places = sorted({path.parent for path in _weights(folder)})
    for place in places:
        files = [path for path in _weights(folder) if path.parent == place]
        headers = [entry for path in files for entry in _header(path).values()]
        yield Part(
            name=str(place.relative_to(folder)) if place != folder else "model",
            parameters=sum(math.prod(entry["shape"]) for entry in headers),
            precision=tuple(sorted({str(entry["dtype"]) for entry in headers})),
            bytes=sum(path.stat().st_size for path in files),
        )


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """{tensor: {"dtype", "shape", ...}} of a file of safetensors: eight bytes of length, then JSON."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MOST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            found = json.loads(file.read(length))
        return {
            name: {"dtype": entry["dtype"], "shape": [int(size) for size in entry["shape"]]}
            for name, entry in found.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
        raise DataError(f"'{path}' is no safetensors file: {error}") from error
