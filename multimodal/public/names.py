"""How a public model is named: one folder, or its parts, "prior=PATH,decoder=PATH". Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from oneira.platform.errors import UsageError

INDEX = "model_index.json"  # what a pipeline's folder has
PARTS = ("prior", "decoder", "upsampler")


def is_public(name: str) -> bool:
    """Whether the name is of parts, or of a folder that says that it is a pipeline of diffusers'."""
    return bool(split(name)) or (Path(name).expanduser() / INDEX).is_file()


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
        found[part] = Path(path).expanduser()
    return found


def absolute(name: str) -> str:
    """The same name as a process in another folder understands it. Names of no folder stay as they are."""
    if parts := split(name):
        return ",".join(f"{part}={path.absolute()}" for part, path in parts.items())
    path = Path(name).expanduser()
    return str(path.absolute()) if path.is_dir() else name
