"""Shards on disk: folders of .npy files that appear whole or not at all, and mappings that do not fill the memory.

A folder is written under a hidden name, every file and the folder are fsynced, and the folder is renamed into place,
so a crash costs at most the one in writing. Arrays grow while they are written: numpy pads the .npy header so that the
first axis can be corrected in place, and no more than one episode is ever held in memory.

Reading goes through `Mappings`: read-only memory maps, of which at most `OPEN_FILES` are open and whose pages are given
back to the kernel after every `PAGE_BUDGET` bytes: a process's resident size counts the pages of files it has mapped.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import re
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from oneira.platform.checkpoints import sync
from oneira.platform.errors import DataError

PAGE_BUDGET = 128 * 2**20  # bytes of mapped pages after which they are handed back
OPEN_FILES = 256  # every map holds a file descriptor; the usual limit of a process is 1024
FAULT_BYTES = 64 * 2**10  # Linux maps 16 pages around every fault: what one random read really costs
META = "meta.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def checked_name(name: str, kind: str = "shard") -> str:
    """`name` itself, or DataError where it cannot be the name of a folder."""
    if not NAME.fullmatch(name):
        raise DataError(f"'{name}' cannot name a {kind}: letters, digits, '.', '_' and '-' only, and no sign first.")
    return name


class FolderWriter:
    """A folder of growing arrays that appears under its name only when `commit` is called.

    Args:
        final: where the folder will stand; must not exist.
    Raises:
        DataError: it exists already, or the disk is full.
    """

    def __init__(self, final: Path) -> None:
        if final.exists():
            raise DataError(f"{final} exists already and is never written twice.")
        self.final = final
        self._temporary = final.parent / f".{final.name}.{secrets.token_hex(4)}.part"
        self._files: dict[str, tuple[BinaryIO, np.dtype, tuple[int, ...], Any]] = {}
        self._rows: dict[str, int] = {}
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            self._temporary.mkdir()
        except OSError as error:
            raise DataError(f"Cannot write {final}: {error}.") from error

    def append(self, name: str, rows: np.ndarray) -> None:
        """Append `rows` [n, ...] to NAME.npy; the first call fixes the dtype and the shape of a row."""
        rows = np.ascontiguousarray(rows)
        try:
            if name not in self._files:
                new = open(self._temporary / f"{name}.npy", "wb")  # noqa: SIM115 - closed by commit and abandon
                self._files[name] = (new, rows.dtype, rows.shape[1:], hashlib.sha256())
                self._rows[name] = 0
                new.write(_header(rows.dtype, (0, *rows.shape[1:])))
            file, dtype, shape, digest = self._files[name]
            if rows.dtype != dtype or rows.shape[1:] != shape:
                raise DataError(f"Rows of '{name}' are {dtype} {shape}; got {rows.dtype} {rows.shape[1:]}.")
            data = rows.reshape(-1).view(np.uint8).data
            file.write(data)
        except OSError as error:
            raise DataError(f"Cannot write {self.final}: {error}.") from error
        digest.update(data)
        self._rows[name] += len(rows)

    def commit(self, meta: Mapping[str, Any]) -> None:
        """Write meta.json (`meta`, and under "files" each array's size and its data's sha256) and rename into place."""
        files = {}
        try:
            for name, (file, dtype, shape, digest) in self._files.items():
                file.seek(0)
                file.write(_header(dtype, (self._rows[name], *shape)))
                file.flush()
                os.fsync(file.fileno())
                file.close()
                size = (self._temporary / f"{name}.npy").stat().st_size
                files[f"{name}.npy"] = {"bytes": size, "sha256": digest.hexdigest()}
            with open(self._temporary / META, "w", encoding="utf-8") as text:
                json.dump({**meta, "files": files}, text, indent=1, sort_keys=True)
                text.flush()
                os.fsync(text.fileno())
            sync(self._temporary)
            self._temporary.rename(self.final)
            sync(self.final.parent)
        except OSError as error:
            self.abandon()
            if not (self.final / META).is_file():  # else a retried unit of work was here first, with the same contents
                raise DataError(f"Cannot write {self.final}: {error}.") from error

    def abandon(self) -> None:
        """Remove what was written so far."""
        for file, *_ in self._files.values():
            with suppress(OSError):  # a full disk refuses the last bytes too
                file.close()
        shutil.rmtree(self._temporary, ignore_errors=True)


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """A version 1.0 .npy header; its length does not depend on shape[0]."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


def remove_parts(folder: Path) -> None:
    """Remove half-written folders. Only for a moment when nobody is writing, such as the start of a resumed run."""
    if folder.is_dir():
        for part in folder.glob(".*.part"):
            shutil.rmtree(part, ignore_errors=True)


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a committed folder, after a check that every array has the size it was written with."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        for name, entry in meta["files"].items():
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                raise DataError(f"{folder / name} has {size} bytes, written were {entry['bytes']}.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder} is not a whole shard: {error}.") from error
    return meta


def read_array(path: Path) -> np.ndarray:
    """A small array, read into memory. Never unpickles."""
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is not a readable array: {error}.") from error


def verify_folder(folder: Path) -> None:
    """Read every array and compare it with its sha256; DataError on the first that differs."""
    for name, entry in read_meta(folder)["files"].items():
        digest = hashlib.sha256()
        with open(folder / name, "rb") as file:
            file.seek(_data_offset(file))
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != entry["sha256"]:
            raise DataError(f"{folder / name} is damaged: its sha256 is not the one it was written with.")


def _data_offset(file: BinaryIO) -> int:
    try:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
    except ValueError as error:
        raise DataError(f"{file.name} is not a .npy file: {error}.") from error
    return file.tell()


class Mappings:
    """Read-only memory maps of many .npy files, with bounded resident pages and file descriptors."""

    def __init__(self) -> None:
        self._maps: OrderedDict[Path, np.ndarray] = OrderedDict()
        self._touched = 0

    def take(self, path: Path, rows: np.ndarray) -> np.ndarray:
        """Rows of an array as a copy. `rows` [n] int64, n >= 1, sorted for locality."""
        array = np.asarray(self._open(path))
        blocks = rows * (array.nbytes // max(len(array), 1)) // FAULT_BYTES
        return self._counted(array[rows], 1 + int(np.count_nonzero(np.diff(blocks))))

    def slice(self, path: Path, start: int, stop: int) -> np.ndarray:
        """The rows start..stop-1 as a copy."""
        array = self._open(path)
        row = array.nbytes // max(len(array), 1)
        begin = start * row // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < array.nbytes:
            _advise(array, "MADV_WILLNEED", begin, min((stop - start) * row + mmap.PAGESIZE, array.nbytes - begin))
        return self._counted(np.asarray(array)[start:stop].copy(), 1)

    def rows(self, path: Path) -> int:
        return len(self._open(path))

    def _counted(self, copy: np.ndarray, faults: int) -> np.ndarray:
        self._touched += copy.nbytes + faults * FAULT_BYTES
        if self._touched >= PAGE_BUDGET:
            self.drop_pages()
        return copy

    def _open(self, path: Path) -> np.ndarray:
        if path in self._maps:
            self._maps.move_to_end(path)
            return self._maps[path]
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} is not a readable array: {error}.") from error
        _advise(array, "MADV_RANDOM")  # without it the kernel reads megabytes around every frame
        self._maps[path] = array
        if len(self._maps) > OPEN_FILES:
            self._maps.popitem(last=False)
        return array

    def drop_pages(self) -> None:
        """Hand the mapped pages back; they stay in the kernel's page cache, so reading them again needs no disk."""
        for array in self._maps.values():
            if not _advise(array, "MADV_DONTNEED"):
                self._maps.clear()  # where the kernel takes no advice, unmapping does it
                break
        self._touched = 0

    def close(self) -> None:
        self._maps.clear()
        self._touched = 0


def _advise(array: np.ndarray, advice: str, start: int = 0, length: int | None = None) -> bool:
    """Advise the kernel about a mapped array; False where there is no such advice. start: bytes, whole pages."""
    if not hasattr(mmap, advice) or not isinstance(array.base, mmap.mmap):
        return False
    array.base.madvise(getattr(mmap, advice), start, len(array.base) - start if length is None else length)
    return True
