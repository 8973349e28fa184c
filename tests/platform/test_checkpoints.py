"""What a checkpoint promises: it is whole or not there, whatever happens while it is written or lies on the disk."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oneira.platform import checkpoints as module
from oneira.platform.checkpoints import Checkpoints
from oneira.platform.errors import CheckpointError, UsageError


def fill(store: Checkpoints, step: int, name: str = "memory") -> Path:
    return store.save(name, {"w": torch.full((3, 2), float(step))}, {"generation": step}, step=step)


def check(store: Checkpoints, step: int, name: str = "memory") -> None:
    loaded = store.load(name)
    assert (loaded.step, loaded.meta["generation"]) == (step, step)
    assert torch.equal(loaded.tensors["w"], torch.full((3, 2), float(step)))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool]
)
def test_tensors_come_back_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    value = (torch.arange(12) % 2 if dtype is torch.bool else torch.arange(12)).to(dtype).reshape(3, 4)
    tensors = {"a": value, "transposed": value.T, "scalar": value[0, 1], "empty": value[:0], "view": value[1:]}
    Checkpoints(tmp_path).save("v", tensors, {})
    loaded = Checkpoints(tmp_path).load("v").tensors
    assert set(loaded) == set(tensors)
    for key, tensor in tensors.items():
        assert loaded[key].dtype == dtype and torch.equal(loaded[key], tensor)


@pytest.mark.parametrize("dtype", ["float64", "float32", "int32", "uint32", "uint64", "bool"])
def test_arrays_come_back_exactly(tmp_path: Path, dtype: str) -> None:
    array = np.array([[0, 1], [1, 3]]).astype(dtype)
    array.flags.writeable = False
    Checkpoints(tmp_path).save("c", {"C": array}, {})
    assert np.array_equal(Checkpoints(tmp_path).load("c").tensors["C"].numpy(), array)


def test_special_floats_keep_their_bits(tmp_path: Path) -> None:
    bits = np.array([0x7FF8000000000001, 0xFFF0000000000000, 0x8000000000000000, 1], dtype=np.uint64)
    Checkpoints(tmp_path).save("f", {"x": bits.view(np.float64)}, {})
    assert np.array_equal(Checkpoints(tmp_path).load("f").tensors["x"].numpy().view(np.uint64), bits)


@pytest.mark.parametrize("kind", [np.random.PCG64, np.random.Philox, np.random.MT19937])
def test_a_random_generator_goes_on_where_it_was(tmp_path: Path, kind: type) -> None:
    generator = np.random.Generator(kind(7))
    generator.standard_normal(5)
    Checkpoints(tmp_path).save("rng", {}, {"rng": generator.bit_generator.state})
    other = np.random.Generator(kind(0))
    other.bit_generator.state = Checkpoints(tmp_path).load("rng").meta["rng"]
    assert np.array_equal(other.standard_normal(9), generator.standard_normal(9))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(meta=st.dictionaries(st.text(), json_values, max_size=5))
@settings(max_examples=30, deadline=None)
def test_meta_comes_back_exactly(meta: dict) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Checkpoints(Path(folder)).save("m", {}, meta)
        assert Checkpoints(Path(folder)).load("m").meta == meta


def test_the_newest_and_the_one_before_are_kept(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    for step in (1, 2, 10):
        fill(store, step)
    fill(store, 5, "vision")
    check(store, 10)
    assert sorted(os.listdir(tmp_path)) == ["memory@00000002", "memory@00000010", "vision@00000005"]
    assert sorted(os.listdir(tmp_path / "memory@00000010")) == ["manifest.json", "meta.json", "tensors.safetensors"]
    assert store.names() == ["memory", "vision"]
    assert (store.step("memory"), store.step("none"), store.exists("none")) == (10, None, False)
    store.delete("memory")
    store.delete("none")
    assert store.names() == ["vision"]


def test_saving_at_a_step_again_replaces_it_and_forgets_later_ones(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    for step in (1, 5, 9):
        fill(store, step)
    store.save("memory", {"w": torch.full((3, 2), 5.0)}, {"generation": 5, "again": True}, step=5)
    check(store, 5)
    assert store.load("memory").meta["again"] and sorted(os.listdir(tmp_path)) == ["memory@00000005"]


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "a@1", "ä", "a b", "x" * 121, "a\n"])
def test_names_that_could_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        Checkpoints(tmp_path).save(name, {}, {})
    with pytest.raises(UsageError):
        Checkpoints(tmp_path).load(name)


@pytest.mark.parametrize(
    ("tensors", "meta", "word"),
    [
        ({"x": np.array(["text"])}, {}, "'x'"),
        ({"x": np.array([object()])}, {}, "'x'"),
        ({"x": [1.0]}, {}, "list"),
        ({"x": np.ones(2, np.complex128)}, {}, "cannot be stored"),
        ({}, {"a": {"b": object()}}, "a.b"),
        ({}, {"a": {3: 1}}, "key 3"),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path: Path, tensors: dict, meta: dict, word: str) -> None:
    store = Checkpoints(tmp_path)
    fill(store, 1, "x")
    with pytest.raises(CheckpointError, match=word):
        store.save("x", tensors, meta, step=2)
    check(store, 1, "x")


# ---- damage on the disk


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_flipped_bit_is_found(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Checkpoints(Path(folder))
        fill(store, 1)
        newest = fill(store, 2)
        file = newest / data.draw(st.sampled_from(sorted(os.listdir(newest))))
        content = bytearray(file.read_bytes())
        place = data.draw(st.integers(0, len(content) * 8 - 1))
        content[place // 8] ^= 1 << place % 8
        file.write_bytes(content)
        check(store, 1)
        shutil.rmtree(Path(folder) / "memory@00000001")
        with pytest.raises(CheckpointError):
            store.load("memory")


@pytest.mark.parametrize("file", ["tensors.safetensors", "meta.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "longer", "missing", "a folder"])
def test_a_damaged_file_is_said_aloud_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage: str
) -> None:
    store = Checkpoints(tmp_path)
    fill(store, 1)
    path = fill(store, 2) / file
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"truncated": content[:-1], "emptied": b"", "longer": content + b"\n"}[damage])
    check(store, 1)
    captured = capsys.readouterr()
    assert "memory@00000002" in captured.err and "memory@00000001" in captured.err and not captured.out
    fill(store, 2)
    check(store, 2)
    assert not capsys.readouterr().err


def test_none_whole_is_an_error_that_names_them(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint 'memory'"):
        store.load("memory")
    (fill(store, 3) / "meta.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"memory@00000003: meta\.json has 2 bytes"):
        store.load("memory")


def test_a_checkpoint_under_another_name_or_step_is_not_taken_for_it(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    shutil.copytree(fill(store, 3), tmp_path / "memory@00000009")
    check(store, 3)
    shutil.copytree(tmp_path / "memory@00000003", tmp_path / "other@00000003")
    with pytest.raises(CheckpointError):
        store.load("other")


# ---- death and a full disk while saving

CALLS = [("os", "open"), ("os", "write"), ("os", "fsync"), ("Path", "mkdir"), ("Path", "rename")]


class FailingCalls:
    """Lets the nth call among the ones that write raise `error`; later ones go through."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, error: BaseException):
        self.count, self.at, self.error = 0, at, error
        for place, name in CALLS:
            owner = module.os if place == "os" else Path
            patch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, real):
        def call(*arguments, **keywords):
            self.count += 1
            if self.count == self.at:
                raise self.error
            return real(*arguments, **keywords)

        return call


class Killed(BaseException):
    pass


def calls_of_a_save(tmp_path: Path) -> int:
    store = Checkpoints(tmp_path / "count")
    fill(store, 1)
    with pytest.MonkeyPatch.context() as patch:
        calls = FailingCalls(patch, -1, Killed())
        fill(store, 2)
    return calls.count


@pytest.mark.parametrize("new_step", [2, 1], ids=["next step", "same step again"])
def test_a_full_disk_at_any_call_leaves_a_whole_checkpoint(tmp_path: Path, new_step: int) -> None:
    refused = 0
    for at in range(1, calls_of_a_save(tmp_path) + 8):
        store = Checkpoints(tmp_path / f"{at}")
        fill(store, 1)
        with pytest.MonkeyPatch.context() as patch:
            FailingCalls(patch, at, OSError(errno.ENOSPC, "No space left on device"))
            try:
                store.save("memory", {"w": torch.full((3, 2), 7.0)}, {"generation": 7}, step=new_step)
            except CheckpointError as error:
                refused += 1
                assert error.exit_code == 3 and "no room is left" in str(error)
        loaded = store.load("memory")
        assert loaded.meta["generation"] in (1, 7) and float(loaded.tensors["w"][0, 0]) == loaded.meta["generation"]
        assert not list((tmp_path / f"{at}").glob(".tmp-*"))
    assert refused >= 12


@pytest.mark.parametrize("new_step", [2, 1], ids=["next step", "same step again"])
def test_death_at_any_call_leaves_a_whole_checkpoint_and_clean_removes_the_rest(tmp_path: Path, new_step: int) -> None:
    """As SIGKILL does it, nothing is tidied up: `rmtree` is taken away as well."""
    for at in range(1, calls_of_a_save(tmp_path) + 8):
        store = Checkpoints(tmp_path / f"{at}")
        fill(store, 1)
        with pytest.MonkeyPatch.context() as patch:
            FailingCalls(patch, at, Killed())
            patch.setattr(module.shutil, "rmtree", lambda *_, **__: None)
            try:
                store.save("memory", {"w": torch.full((3, 2), 7.0)}, {"generation": 7}, step=new_step)
            except Killed:
                pass
        before = store.load("memory").meta
        store.clean()
        assert store.load("memory").meta == before and before["generation"] in (1, 7)
        assert not [entry for entry in os.listdir(store.folder) if entry.startswith(".")]
        fill(store, 3)
        check(store, 3)


def test_the_system_refuses_to_write_in_the_middle_of_a_file(tmp_path: Path) -> None:
    """A real limit of the kernel on a file's size: the first part of a write goes through, the next does not."""
    script = (
        "import sys, resource, signal, torch\n"
        "from oneira.platform.checkpoints import Checkpoints\n"
        "from oneira.platform.errors import CheckpointError\n"
        "store = Checkpoints(sys.argv[1])\n"
        "store.save('v', {'x': torch.ones(10)}, {'n': 1}, step=1)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n    store.save('v', {'x': torch.ones(1_000_000)}, {'n': 2}, step=2)\n"
        "except CheckpointError as error:\n    print(error.exit_code, store.load('v').meta['n'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "1"], done.stderr
    assert os.listdir(tmp_path) == ["v@00000001"]


def test_sigkill_while_saving(tmp_path: Path) -> None:
    script = (
        "import sys, torch\nfrom oneira.platform.checkpoints import Checkpoints\n"
        "store = Checkpoints(sys.argv[1])\nstep = 0\n"
        "while True:\n    step += 1\n    tensor = torch.full((50_000,), float(step))\n"
        "    store.save('v', {'x': tensor}, {'n': step}, step=step)\n    print(step, flush=True)\n"
    )
    for delay in (0.0, 0.013, 0.029):
        folder = tmp_path / str(delay)
        with subprocess.Popen(
            [sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            said = [int(process.stdout.readline()) for _ in range(3)]
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            said += [int(line) for line in process.stdout.read().split("\n")[:-1]]
        store = Checkpoints(folder)
        loaded = store.load("v")
        assert loaded.step >= said[-1] and torch.equal(loaded.tensors["x"], torch.full((50_000,), float(loaded.step)))
        store.clean()
        assert all(entry.startswith("v@") for entry in os.listdir(folder)) and len(os.listdir(folder)) <= 3


def test_a_reader_beside_a_writer_always_finds_a_whole_one(tmp_path: Path) -> None:
    script = (
        "import sys, torch\nfrom oneira.platform.checkpoints import Checkpoints\nstore = Checkpoints(sys.argv[1])\n"
        "for n in range(150):\n    store.save('v', {}, {'n': n}, step=n // 2)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) as process:
        store, seen = Checkpoints(tmp_path), []
        while process.poll() is None:
            if store.exists("v"):
                seen.append(store.load("v").meta["n"])
    assert process.returncode == 0 and store.load("v").meta["n"] == 149
    assert seen == sorted(seen) and len(seen) > 10
