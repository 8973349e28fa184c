"""Checkpoints on a disk that fails, forgets or lies: what loads is the old one or the new one, whole, or an error.

The power cuts are simulated: every call that writes is recorded, and for each place in the record the disk is put
together again as a machine may find it that was switched off there.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from oneira.platform import checkpoints as module
from oneira.platform.checkpoints import Checkpoints
from oneira.platform.errors import CheckpointError, OneiraError

FILES = ("tensors.safetensors", "meta.json", "manifest.json")


def fill(store: Checkpoints, step: int, value: int) -> Path:
    return store.save("c", {"w": torch.full((5, 3), float(value))}, {"value": value}, step=step)


def value_of(store: Checkpoints) -> int:
    """The value that the loaded checkpoint was saved with; its tensor and its meta must agree about it."""
    loaded = store.load("c")
    assert torch.equal(loaded.tensors["w"], torch.full((5, 3), float(loaded.meta["value"])))
    return loaded.meta["value"]


# ---- calls that fail


class Failing:
    """Lets the nth of the calls that write raise EIO, or write half of what it was given; the later ones go through."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, short: bool = False):
        self.count, self.at, self.short, self.resting = 0, at, short, False
        for owner, name in [
            (os, "open"),
            (os, "write"),
            (os, "fsync"),
            (os, "close"),
            (Path, "mkdir"),
            (Path, "rename"),
        ]:
            patch.setattr(owner, name, self.wrap(name, getattr(owner, name)))

        patch.setattr(module.shutil, "rmtree", self.pause(shutil.rmtree))

    def pause(self, real):
        """What removes leftovers has calls of its own, which are not those of a save."""

        def call(*arguments, **keywords):
            self.resting = True
            try:
                return real(*arguments, **keywords)
            finally:
                self.resting = False

        return call

    def wrap(self, name, real):
        def call(*arguments, **keywords):
            if self.resting:
                return real(*arguments, **keywords)
            self.count += 1
            if self.short and name == "write":
                return real(arguments[0], arguments[1][: max(1, len(arguments[1]) // 2)])
            if not self.short and self.count == self.at:
                if name == "close":
                    real(*arguments)
                raise OSError(errno.EIO, "Input/output error")
            return real(*arguments, **keywords)

        return call


@pytest.mark.parametrize("step", [2, 1], ids=["next step", "same step again"])
def test_an_io_error_at_any_call_leaves_the_old_or_the_new_one(tmp_path: Path, step: int) -> None:
    refused, counted = 0, Checkpoints(tmp_path / "counted")
    fill(counted, 1, 1)
    with pytest.MonkeyPatch.context() as patch:
        calls = Failing(patch, -1)
        fill(counted, step, 7)
    for at in range(1, calls.count + 1):
        store = Checkpoints(tmp_path / str(at))
        fill(store, 1, 1)
        with pytest.MonkeyPatch.context() as patch:
            Failing(patch, at)
            try:
                fill(store, step, 7)
            except CheckpointError as error:
                refused += 1
                assert "Input/output error" in str(error)
        assert value_of(store) in (1, 7)
    assert refused >= 15


def test_short_writes_are_gone_on_with(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        failing = Failing(patch, -1, short=True)
        fill(store, 1, 1)
    assert failing.count > 30 and value_of(store) == 1


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_the_disk_cannot_read_any_more_counts_as_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    store = Checkpoints(tmp_path)
    fill(store, 1, 1)
    bad = fill(store, 2, 2)
    real = os.open

    def failing(path, *arguments, **keywords):
        if path == file and os.readlink(f"/proc/self/fd/{keywords['dir_fd']}") == str(bad):
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.os, "open", failing)
        assert value_of(store) == 1
    assert "c@00000002" in capsys.readouterr().err


# ---- power cuts


@dataclass
class Disk:
    """What is on a disk: bytes by file, and names by folder, as the processes see it and as it is after a power cut."""

    top: Path
    seen: dict[str, bytes | None] = field(default_factory=dict)  # by path; None is a folder
    lasting_names: set[str] = field(default_factory=set)
    lasting_bytes: dict[str, bytes] = field(default_factory=dict)
    descriptors: dict[int, str] = field(default_factory=dict)
    states: list[tuple[dict, set, dict]] = field(default_factory=list)

    def keep(self) -> None:
        self.states.append((dict(self.seen), set(self.lasting_names), dict(self.lasting_bytes)))

    def name(self, path: Path | str) -> str:
        return str(Path(path).relative_to(self.top))

    def record(self, patch: pytest.MonkeyPatch) -> None:
        real = {name: getattr(os, name) for name in ("open", "write", "fsync", "close")}
        mkdir, rename, rmtree = Path.mkdir, Path.rename, shutil.rmtree

        def opened(path, *arguments, **keywords):
            descriptor = real["open"](path, *arguments, **keywords)
            if isinstance(path, Path) and path.is_relative_to(self.top):
                self.descriptors[descriptor] = self.name(path)
                if path.is_file():
                    self.seen[self.name(path)] = b""
                    self.keep()
            return descriptor

        def written(descriptor, data):
            count = real["write"](descriptor, data)
            if descriptor in self.descriptors:
                self.seen[self.descriptors[descriptor]] += bytes(data[:count])
                self.keep()
            return count

        def synced(descriptor):
            real["fsync"](descriptor)
            name = self.descriptors[descriptor]
            if (self.top / name).is_dir():
                inside = {entry for entry in self.seen if str(Path(entry).parent) == name}
                self.lasting_names -= {
                    entry for entry in self.lasting_names if str(Path(entry).parent) == name and entry not in inside
                }
                self.lasting_names |= inside
            else:
                self.lasting_bytes[name] = self.seen[name]
            self.keep()

        def closed(descriptor):
            self.descriptors.pop(descriptor, None)
            real["close"](descriptor)

        def made(path, *arguments, **keywords):
            mkdir(path, *arguments, **keywords)
            if path != self.top:
                self.seen.setdefault(self.name(path), None)
                self.keep()

        def renamed(path, target):
            rename(path, target)
            old, new = self.name(path), self.name(target)

            def moved(entry: str) -> str:
                return new + entry[len(old) :] if entry == old or entry.startswith(f"{old}/") else entry

            self.seen = {moved(entry): data for entry, data in self.seen.items()}
            # A folder's own content moves with it, whether or not the name did reach the disk.
            self.lasting_bytes = {moved(entry): data for entry, data in self.lasting_bytes.items()}
            self.lasting_names = {entry if entry == old else moved(entry) for entry in self.lasting_names}
            self.descriptors = {number: moved(entry) for number, entry in self.descriptors.items()}
            self.keep()
            return target

        def removed(path, **keywords):
            rmtree(path, **keywords)
            name = self.name(path)
            self.seen = {e: d for e, d in self.seen.items() if e != name and not e.startswith(f"{name}/")}
            self.keep()

        for name, function in {"open": opened, "write": written, "fsync": synced, "close": closed}.items():
            patch.setattr(os, name, function)
        patch.setattr(Path, "mkdir", made)
        patch.setattr(Path, "rename", renamed)
        patch.setattr(module.shutil, "rmtree", removed)


def rebuild(folder: Path, names: dict[str, bytes | None]) -> None:
    for name, data in sorted(names.items()):
        place = folder / name
        if data is None:
            place.mkdir(parents=True, exist_ok=True)
        elif place.parent.is_dir():
            place.write_bytes(data)


def after_the_cut(state: tuple[dict, set, dict]) -> list[dict[str, bytes | None]]:
    """The three worst disks: all that was seen; names without the bytes that nobody synced; half of those bytes."""
    seen, _, lasting = state
    lost = {name: data if data is None else lasting.get(name, b"") for name, data in seen.items()}
    half = {name: data if data is None or name in lasting else data[: len(data) // 2] for name, data in seen.items()}
    return [seen, lost, half]


@pytest.mark.parametrize("step", [2, 1], ids=["next step", "same step again"])
def test_a_power_cut_after_any_call_leaves_the_old_or_the_new_one(tmp_path: Path, step: int) -> None:
    top = tmp_path / "disk"
    top.mkdir()
    disk, store = Disk(top), Checkpoints(top)
    with pytest.MonkeyPatch.context() as patch:
        disk.record(patch)
        fill(store, 1, 1)
        first = len(disk.states)
        fill(store, step, 7)
    seen = set()
    for number, state in enumerate(disk.states[first - 1 :]):
        for kind, names in enumerate(after_the_cut(state)):
            folder = tmp_path / f"{number}-{kind}"
            folder.mkdir()
            rebuild(folder, names)
            again = Checkpoints(folder)
            before = value_of(again)
            again.clean()
            assert value_of(again) == before
            seen.add(before)
            shutil.rmtree(folder)
    assert seen == {1, 7} and len(disk.states) - first > 12


def test_what_was_saved_is_on_the_disk_when_save_returns(tmp_path: Path) -> None:
    """Every name on the way to the bytes was synced, that of the folder of checkpoints as well."""
    top = tmp_path / "disk"
    top.mkdir()
    disk, store = Disk(top), Checkpoints(top / "run" / "checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        disk.record(patch)
        final = disk.name(fill(store, 1, 1))
    _, names, lasting = disk.states[-1]
    assert all(lasting[f"{final}/{file}"] for file in FILES)
    wanted = {"run", "run/checkpoints", final, *(f"{final}/{file}" for file in FILES)}
    assert wanted <= names


# ---- damage


def damage(chance: random.Random, folders: list[Path]) -> str:
    """Damages files of these checkpoints in one of many ways, and says how."""
    folder = chance.choice(folders)
    file = folder / chance.choice(FILES)
    data = bytearray(file.read_bytes() or b"\0")  # what was damaged before may be empty
    kind = chance.choice(["bit", "bits", "cut", "zeros", "longer", "gone", "swap", "byte", "folder gone", "folder cut"])
    place = chance.randrange(len(data))
    if kind in ("bit", "bits"):
        for _ in range(1 if kind == "bit" else chance.randint(2, 40)):
            place = chance.randrange(len(data))
            data[place] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del data[place:]
    elif kind == "zeros":
        data[place : place + 512] = bytes(min(512, len(data) - place))
    elif kind == "longer":
        data += chance.randbytes(chance.randint(1, 600))
    elif kind == "byte":
        del data[place]
    elif kind == "swap":
        other = chance.choice(folders) / chance.choice(FILES)
        data = bytearray(other.read_bytes())
    elif kind == "folder gone":
        shutil.rmtree(folder)
        return kind
    elif kind == "folder cut":
        for name in FILES:
            whole = (folder / name).read_bytes()
            (folder / name).write_bytes(whole[: chance.randrange(len(whole) + 1)])
        return kind
    if kind == "gone":
        file.unlink()
    else:
        file.write_bytes(data)
    return kind


def damage_many(folder: Path, seeds: range, capsys: pytest.CaptureFixture[str]) -> dict[str, int]:
    """Each seed damages the newest checkpoint, the older one or both. Counts what became of them."""
    made = Checkpoints(folder / "made")
    originals = {path.name: path for path in (fill(made, 1, 1), fill(made, 2, 2))}
    whole = {name: {file: (path / file).read_bytes() for file in FILES} for name, path in originals.items()}
    counts = dict.fromkeys(("newest", "the one before", "refused", "silent", "wrong", "crashed"), 0)
    for seed in seeds:
        chance = random.Random(seed)
        top = folder / "damaged"
        shutil.copytree(folder / "made", top)
        store, copies = Checkpoints(top), [top / name for name in originals]
        damage(chance, chance.choice([copies[1:], copies[1:], copies[:1], copies]))
        if chance.random() < 0.3 and copies[0].exists() and all((copies[0] / file).exists() for file in FILES):
            damage(chance, copies[:1])
        intact = {
            int(copy.name[-1])
            for copy in copies
            if all((copy / f).is_file() and (copy / f).read_bytes() == whole[copy.name][f] for f in FILES)
        }
        newest_there = copies[1].exists()
        try:
            value = value_of(store)
        except OneiraError:
            counts["refused" if not intact else "wrong"] += 1
        except Exception:
            counts["crashed"] += 1
        else:
            said = capsys.readouterr().err
            counts["wrong"] += value != max(intact, default=None)
            counts["silent"] += value == 1 and newest_there and "c@00000002" not in said
            counts["newest" if value == 2 else "the one before"] += 1
        shutil.rmtree(top)
    return counts


def test_damaged_checkpoints_never_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = damage_many(tmp_path, range(400), capsys)
    assert counts["silent"] == counts["wrong"] == counts["crashed"] == 0, counts
    assert min(counts["newest"], counts["the one before"], counts["refused"]) > 20, counts


@pytest.mark.slow
def test_ten_thousand_damages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = damage_many(tmp_path, range(1000, 11_000), capsys)
    with capsys.disabled():
        print(f"\n10,000 damages: {counts}")
    assert counts["silent"] == counts["wrong"] == counts["crashed"] == 0, counts
