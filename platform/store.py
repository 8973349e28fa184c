"""Named models: a folder of `models/` each, as runs are folders of `runs/`; and models of the Hugging Face hub, by OWNER/NAME.

    find("mine")               models/mine
    find("OWNER/NAME")         fetched from the hub, or what was fetched before; OWNER/NAME@REVISION is one state of it
    find("some/folder")        itself

Only configs, vocabularies and safetensors are ever fetched or copied: nothing that could run. Imports no torch.
"""

from __future__ import annotations

import re
import secrets
import shutil
from pathlib import Path
from typing import Any

from .errors import DataError, UsageError

MODELS = Path("models")
KINDS = (".json", ".safetensors", ".txt", ".model")  # files that are read; and README.md, which says what a model is
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}")
_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_SNAPSHOTS = "snapshots"  # the hub's cache: models--OWNER--NAME/snapshots/COMMIT


def find(name: str | Path) -> Path | None:
    """The folder that a name means: a folder of that path, one of `models/`, a model of the hub; None where it is none of these.

    Raises:
        DataError: the name is written as one of the hub's, and the hub cannot be reached and nothing of it was fetched before,
            or there is no such model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if _NAME.fullmatch(str(name)) and (MODELS / name).is_dir():
        return MODELS / name
    return _fetch(str(name)) if _HUB.fullmatch(str(name)) and not path.exists() else None


def name_of(folder: Path) -> str:
    """What a model in this folder is called: the folder's name; for what was fetched from the hub, the name there."""
    if folder.parent.name == _SNAPSHOTS:
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.absolute().name


def stored() -> list[Path]:
    """The folders of `models/`, by name."""
    return sorted(place for place in MODELS.glob("*") if place.is_dir() and _NAME.fullmatch(place.name))


def place_for(name: str) -> Path:
    """Where a new model of that name goes. Raises UsageError: it is no name, or is taken."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' is no name of a model: letters, digits, '_', '.' and '-', beginning with a letter or digit."
        )
    if (MODELS / name).exists():
        raise UsageError(f"There is a model '{name}' already: '{MODELS / name}'. Give another: --name NAME")
    return MODELS / name


def copy(source: Path, target: Path) -> list[str]:
    """Copies a model's folder, whole or not at all, and returns the names of files that were left out because they are not read.

    Raises:
        UsageError: `target` is there and not empty. DataError: it cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"'{target}' is there already; give a new folder.")
    left: list[str] = []

    def leave(folder: str, names: list[str]) -> set[str]:
        hidden = {name for name in names if name.startswith(".")}
        strange = {
            name for name in names if not (Path(folder) / name).is_dir() and not is_read(name) and name not in hidden
        }
        left.extend(str((Path(folder) / name).relative_to(source)) for name in sorted(strange))
        return hidden | strange

    writing = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        writing.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, writing, ignore=leave)
        if target.exists():
            target.rmdir()
        writing.rename(target)
    except OSError as error:
        raise DataError(f"Cannot copy '{source}' to '{target}': {error.strerror or error}.") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return left


def is_read(name: str) -> bool:
    """Whether a file of that name is ever read; of weights that are there in full precision, their halves are not."""
    return name == "README.md" or (Path(name).suffix in KINDS and ".fp16" not in name)


def _fetch(name: str) -> Path:
    match = _HUB.fullmatch(name)
    assert match is not None
    # Beside a folder for each part, many models hold the same weights once more in one big file, and in half precision.
    return fetch(
        match[1], f"There is no folder and no run '{name}', and the hub's model of that name cannot be fetched",
        "fetch it elsewhere and give its folder", revision=match[2], ignore_patterns=["*.fp16.*", "*.non_ema.*", "*onnx*"],
        allow_patterns=["*.json", "README.md", "model.safetensors", "open_clip_model.safetensors"]
        + [f"*/*{kind}" for kind in KINDS],
    )  # fmt: skip


def fetch(name: str, failed: str, advice: str, **settings: Any) -> Path:
    """The folder of a repository of the hub, fetched now or earlier.

    Args:
        name: OWNER/NAME. failed, advice: what the error says happened, and what to do where there is no network.
        settings: of `huggingface_hub.snapshot_download`.

    Raises:
        DataError: the hub cannot be reached and nothing was fetched before, or it has no such repository.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        return Path(snapshot_download(name, etag_timeout=10, **settings))
    except (OSError, ValueError, HTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{failed} ({reason}). Where there is no network, {advice}.") from error
