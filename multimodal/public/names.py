"""How a public model is named: one folder or name, or its parts, "prior=PATH,decoder=PATH". Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from oneira.platform import store
from oneira.platform.errors import UsageError

INDEX = "model_index.json"  # what a pipeline's folder has
PARTS = ("prior", "decoder", "upsampler")


def is_public(name: str) -> bool:
    """Whether the name is of parts, or of a folder that says that it is a pipeline of diffusers'."""
    return bool(split(name)) or (place_of(name) / INDEX).is_file()


def place_of(name: str) -> Path:
    """The folder of one name or path, which need not be there. Raises DataError for a name of the hub's that cannot be fetched."""
    return store.find(name) or Path(name).expanduser()


def split(name: str) -> dict[str, Path]:
    """The parts of "prior=PATH,decoder=PATH"; none where the name is not written so. Raises UsageError: one is given twice."""
    kinds = "|".join(PARTS)
    if not re.match(rf"({kinds})=", name):
        return {}
    found: dict[str, Path] = {}
    for piece in re.split(rf",(?=(?:{kinds})=)", name):
        part, _, path = piece.partition("=")
        if part in found:
            raise UsageError(f"'{name}' names '{part}' twice.")
        found[part] = place_of(path)
    return found


def absolute(name: str) -> str:
    """The same name as a process in another folder understands it. Names of no folder stay as they are."""
    if parts := split(name):
        return ",".join(f"{part}={path.absolute()}" for part, path in parts.items())
    path = store.find(name)
    return name if path is None else str(path.absolute())
