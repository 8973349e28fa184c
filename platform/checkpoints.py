"""Checkpoints: safetensors and JSON in a folder that is either whole or not there.

    NAME@00000012/              one checkpoint, NAME at step 12
        tensors.safetensors     weights, optimizer and CMA-ES state
        meta.json               everything else; random generators' states are large integers
        manifest.json           size and sha256 of the two

How a save survives SIGKILL, a power cut and a full disk at any moment: all is written into a hidden folder, every file
and the folder are fsynced, then the folder is renamed into place and its parent fsynced. Until the rename the older
checkpoint is the newest; after it the new one is. Hidden folders are never read as checkpoints, with one exception:
`.old-NAME@STEP` was about to be replaced by one of the same step, and counts for as long as the new one is not there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import CheckpointError, UsageError
from .logs import say

if TYPE_CHECKING:
    import torch

TENSORS, META, MANIFEST = "tensors.safetensors", "meta.json", "manifest.json"
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,119}")
FOLDER = re.compile(rf"({NAME.pattern})@(\d{{8,}})")
WRITING, OLD, DYING = ".tmp-", ".old-", ".del-"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: CPU tensors by name, JSON values, and the step."""

    tensors: dict[str, torch.Tensor]
    meta: dict[str, Any]
    step: int


class Damaged(Exception):
    """A checkpoint's folder is not what its manifest says."""


class Vanished(Exception):
    """A checkpoint's folder was removed or replaced while it was read."""


class Checkpoints:
    """The checkpoints of one run. One process writes; any number may read meanwhile."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def save(self, name: str, tensors: Mapping[str, Any], meta: Mapping[str, Any], *, step: int = 0) -> Path:
        """Saves one checkpoint and returns its folder. Of the older steps of `name` only the one before stays.

        Args:
            tensors: torch tensors (any device) or numpy arrays of numbers, by name.
            meta: JSON values with text keys; NumPy scalars and arrays become numbers and lists, tuples become lists.
            step: not negative; saving again at a step replaces it, and steps beyond it are removed.

        Raises:
            CheckpointError: the disk is full or failing, or a value cannot be stored; what was there before is whole.
        """
        _check_name(name)
        if step < 0:
            raise UsageError(f"A checkpoint's step is {step}; it must not be negative.")
        files = {TENSORS: _tensor_bytes(name, tensors), META: json_bytes(plain(dict(meta), f"meta of '{name}'"))}
        final = self.folder / f"{name}@{step:08d}"
        writing = self.folder / f"{WRITING}{final.name}-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            make_folder(self.folder)
            writing.mkdir()
            files[MANIFEST] = _manifest_bytes(name, step, files)
            for file, data in files.items():
                write_synced(writing / file, data)
            sync(writing)
            self._commit(writing, final)
            self._forget_others(name, step)
        except OSError as error:
            shutil.rmtree(writing, ignore_errors=True)
            size = sum(len(data) for data in files.values()) / 2**20
            reason = "no room is left on the disk" if error.errno in FULL else error.strerror or str(error)
            raise CheckpointError(
                f"Cannot save checkpoint '{final.name}' ({size:.1f} MiB) in '{self.folder}': {reason}. "
                "What was saved before is kept."
            ) from error
        except BaseException:
            shutil.rmtree(writing, ignore_errors=True)
            raise
        return final

    def _commit(self, writing: Path, final: Path) -> None:
        if final.exists():
            # Nothing can be renamed over a folder that is not empty: put it aside, under a name that still counts.
            aside = self.folder / f"{OLD}{final.name}"
            _remove(aside)
            final.rename(aside)
        try:
            writing.rename(final)
        except OSError:
            self._bring_back(final)
            raise
        sync(self.folder)
        _remove(self.folder / f"{OLD}{final.name}")

    def _bring_back(self, final: Path) -> None:
        aside = self.folder / f"{OLD}{final.name}"
        if aside.exists() and not final.exists():
            aside.rename(final)

    def _forget_others(self, name: str, step: int) -> None:
        """Keeps `step` and the one before. Steps beyond are of a time line that was left by skipping a damaged one."""
        steps = dict(self._all(name))
        before = max((other for other in steps if other < step), default=None)
        for other, folder in steps.items():
            if other not in (step, before):
                _remove(folder)

    def load(self, name: str) -> Checkpoint:
        """The newest whole checkpoint of `name`; says on stderr when a newer one is damaged and was skipped.

        Raises:
            CheckpointError: there is none, or none is whole.
        """
        _check_name(name)
        problems: dict[str, str] = {}
        for _ in range(20):
            try:
                found = self._load_newest(name, problems)
            except Vanished:  # a writer removed what was being read, so there is a newer one now
                continue
            if found is not None:
                return found
            break
        if not problems:
            known = ", ".join(self.names()) or "none"
            raise CheckpointError(f"There is no checkpoint '{name}' in '{self.folder}'. There are: {known}.")
        listed = "; ".join(f"{folder}: {problem}" for folder, problem in problems.items())
        raise CheckpointError(
            f"No checkpoint '{name}' in '{self.folder}' is whole ({listed}). Remove its folders to do that work again."
        )

    def _load_newest(self, name: str, problems: dict[str, str]) -> Checkpoint | None:
        problems.clear()
        for step, folder in reversed(self._all(name)):
            try:
                checkpoint = _read(folder, name, step)
            except Damaged as damage:
                problems[folder.name] = str(damage)
                continue
            for bad, problem in problems.items():
                warn(f"checkpoint '{bad}' is damaged ({problem}); going on from '{folder.name}' in {self.folder}")
            return checkpoint
        return None

    def _all(self, name: str | None = None) -> list[tuple[int, Path]]:
        """(step, folder) of every checkpoint, whole or not, oldest first."""
        found: dict[str, tuple[int, Path]] = {}
        try:
            entries = sorted(os.listdir(self.folder))  # ".old-" sorts first, so that the real one replaces it
        except FileNotFoundError:
            return []
        for entry in entries:
            match = FOLDER.fullmatch(entry.removeprefix(OLD))
            if match and (name is None or match[1] == name):
                found[match[0]] = (int(match[2]), self.folder / entry)
        return sorted(found.values())

    def exists(self, name: str) -> bool:
        """Whether anything was saved under `name` (`load` alone proves that it is whole)."""
        return self.step(name) is not None

    def step(self, name: str) -> int | None:
        """The newest step saved under `name`, whole or not; None when there is none."""
        _check_name(name)
        steps = self._all(name)
        return steps[-1][0] if steps else None

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted({folder.name.removeprefix(OLD).rpartition("@")[0] for _, folder in self._all()})

    def delete(self, name: str) -> None:
        """Removes every step of `name`; nothing happens when there is none."""
        _check_name(name)
        for _, folder in self._all(name):
            _remove(folder)
            _remove(self.folder / f"{OLD}{folder.name.removeprefix(OLD)}")

    def clean(self) -> None:
        """Removes half-written and half-removed folders. Only the process that writes may call it, before it begins."""
        for entry in sorted(os.listdir(self.folder)) if self.folder.is_dir() else []:
            if entry.startswith((WRITING, DYING)):
                shutil.rmtree(self.folder / entry, ignore_errors=True)
            elif entry.startswith(OLD):
                self._bring_back(self.folder / entry.removeprefix(OLD))
                _remove(self.folder / entry)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def warn(message: str) -> None:
    """Says a warning aloud, on stderr."""
    say("warning", f"oneira: warning: {message}")


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' cannot name a checkpoint: letters, digits and . _ - only, not beginning with a dot."
        )


def _remove(folder: Path) -> None:
    """Removes a folder in one visible step: at no moment is a half of it there under its own name."""
    dying = folder.with_name(f"{DYING}{folder.name}-{secrets.token_hex(4)}")
    try:
        folder.rename(dying)
    except FileNotFoundError:
        return
    shutil.rmtree(dying, ignore_errors=True)


def write_synced(path: Path, data: bytes) -> None:
    """Writes a new file and waits until it is on the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o644)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest[: 2**24]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_replacing(path: Path, data: bytes) -> None:
    """Puts a file in place whole, or leaves the old one."""
    writing = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        write_synced(writing, data)
        writing.rename(path)
    except BaseException:
        writing.unlink(missing_ok=True)
        raise
    sync(path.parent)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it that are missing, and waits until their names are on the disk."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        sync(place.parent)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain(value: Any, path: str = "value") -> Any:
    """`value` as JSON values; raises CheckpointError naming the place of what is none."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise CheckpointError(f"{path} has the key {key!r}; JSON has text keys only.")
        return {key: plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{path}.{i}") for i, item in enumerate(value)]
    raise CheckpointError(f"{path} is a {type(value).__name__}, which JSON cannot hold.")


def json_bytes(value: Any) -> bytes:
    """JSON on indented lines, with a newline at the end. NaN and infinities are written as Python reads them back."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _tensor_bytes(name: str, tensors: Mapping[str, Any]) -> bytes:
    import safetensors.torch
    import torch

    ready: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for key, value in tensors.items():
        if not isinstance(value, (torch.Tensor, np.ndarray)):
            raise CheckpointError(
                f"'{key}' in checkpoint '{name}' is a {type(value).__name__}, not a tensor or an array."
            )
        try:
            tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
        except TypeError as error:
            raise CheckpointError(f"'{key}' in checkpoint '{name}' cannot be stored: {error}") from error
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:  # tied weights, views: each is stored in full
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        ready[key] = tensor
    try:
        return safetensors.torch.save(ready)
    except (KeyError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"The tensors of checkpoint '{name}' cannot be stored: {error}") from error


def _manifest_bytes(name: str, step: int, files: Mapping[str, bytes]) -> bytes:
    listed = {
        file: {"size": len(files[file]), "sha256": hashlib.sha256(files[file]).hexdigest()} for file in (TENSORS, META)
    }
    return json_bytes({"format": "oneira-checkpoint-1", "name": name, "step": step, "files": listed})


def _read(folder: Path, name: str, step: int) -> Checkpoint:
    """Reads a checkpoint; the bytes that are checked are the bytes that are used. Raises Damaged or Vanished."""
    import safetensors.torch

    files = _read_files(folder)
    # The manifest is a function of the files, so comparing it byte by byte finds a change anywhere, in itself as well.
    if files[MANIFEST] != _manifest_bytes(name, step, files):
        raise Damaged(_what_differs(files))
    try:
        return Checkpoint(safetensors.torch.load(files[TENSORS]), json.loads(files[META]), step)
    except (ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise Damaged(f"cannot be decoded: {error}") from error


def _read_files(folder: Path) -> dict[str, bytes]:
    """All files of the one folder that has this name now, even if a writer puts another in its place meanwhile."""
    try:
        place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError as error:
        raise Vanished from error
    except OSError as error:
        raise Damaged(f"cannot be read: {error.strerror or error}") from error
    files = {}
    try:
        for file in (TENSORS, META, MANIFEST):
            with open(os.open(file, os.O_RDONLY, dir_fd=place), "rb") as stream:
                files[file] = stream.read()
    except FileNotFoundError as error:
        if not folder.exists() or not os.path.samestat(folder.stat(), os.fstat(place)):
            raise Vanished from error
        raise Damaged(f"{file} is missing") from error
    except OSError as error:
        raise Damaged(f"cannot be read: {error.strerror or error}") from error
    finally:
        os.close(place)
    return files


def _what_differs(files: Mapping[str, bytes]) -> str:
    try:
        listed = json.loads(files[MANIFEST])["files"]
        for file in (TENSORS, META):
            if listed[file]["size"] != len(files[file]):
                return f"{file} has {len(files[file])} bytes instead of {listed[file]['size']}"
            if listed[file]["sha256"] != hashlib.sha256(files[file]).hexdigest():
                return f"the sha256 of {file} differs"
    except (ValueError, KeyError, TypeError):
        pass
    return f"{MANIFEST} is not the one that was written"
