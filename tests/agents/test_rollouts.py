"""The rollout store: exact, whole or absent after a crash, and small in memory however much it holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oneira.agents.batches import Windows, frame_batches, sequence_batches
from oneira.agents.rollouts import RolloutStore
from oneira.platform.errors import DataError

LENGTHS = {"round0-0000": [5, 1, 7], "round0-0001": [3], "round1-0000": [9, 4]}
DIGEST = "0123456789abcdef"


def episode(length: int, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "frames": rng.integers(0, 256, (length + 1, 8, 8, 3), dtype=np.uint8),
        "actions": rng.normal(size=(length, 3)).astype(np.float32),
        "rewards": rng.normal(size=length).astype(np.float32),
        "terminated": seed % 2 == 0,
        "truncated": seed % 2 == 1,
        "seed": seed,
    }


def filled(folder: Path) -> tuple[RolloutStore, list[dict]]:
    store, episodes = RolloutStore(folder), []
    for shard, lengths in LENGTHS.items():
        with store.writer(shard, policy="random", env_id="CarRacing-v3") as writer:
            for length in lengths:
                episodes.append(episode(length, len(episodes)))
                writer.add_episode(**episodes[-1])
    return store, episodes


def latent(frames: np.ndarray) -> np.ndarray:
    """A stand-in for V with a known answer: the first two pixels of a frame."""
    return frames[:, 0, :2, 0].astype(np.float32) / 8


def encode(store: RolloutStore) -> None:
    for shard in store.latents(DIGEST).missing():
        mu = np.concatenate([latent(chunk) for chunk in store.chunks(shard)])
        store.put_latents(shard, DIGEST, mu.astype(np.float16), -mu)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    _, episodes = filled(tmp_path / "data")
    store = RolloutStore(tmp_path / "data")
    assert store.shards == sorted(LENGTHS)
    assert (store.num_steps, store.num_frames) == (29, 35)
    store.verify()
    assert store.meta("round0-0001") == {"policy": "random", "env_id": "CarRacing-v3"}
    for read, written in zip(store.episodes(), episodes, strict=True):
        steps = slice(read.first_step, read.first_step + read.length)
        frames = store.frames(np.arange(read.first_frame, read.first_frame + read.length + 1))
        np.testing.assert_array_equal(frames, written["frames"])
        np.testing.assert_array_equal(store.actions[steps], written["actions"])
        np.testing.assert_array_equal(store.rewards[steps], written["rewards"])
        assert store.terminated[steps].tolist() == [False] * (read.length - 1) + [written["terminated"]]
        assert store.truncated[steps].tolist() == [False] * (read.length - 1) + [written["truncated"]]
        assert (read.seed, read.terminated, read.truncated) == tuple(
            written[key] for key in ("seed", "terminated", "truncated")
        )


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 34), max_size=60))
def test_frames_come_in_the_order_asked_for(tmp_path_factory: pytest.TempPathFactory, asked: list[int]) -> None:
    folder = tmp_path_factory.getbasetemp() / "shared-store"
    store, episodes = (RolloutStore(folder), None) if folder.exists() else filled(folder)
    every = np.concatenate([chunk for shard in store.shards for chunk in store.chunks(shard)])
    np.testing.assert_array_equal(store.frames(np.array(asked, np.int64)), every[asked])
    assert episodes is None or len(every) == sum(len(e["frames"]) for e in episodes)


def test_a_shard_is_written_once_and_never_half(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    with pytest.raises(DataError, match="exists already"):
        store.writer("round0-0000")
    with pytest.raises(RuntimeError), store.writer("round9") as writer:
        writer.add_episode(**episode(4, 1))
        raise RuntimeError("the simulator died")
    with pytest.raises(DataError, match="no episode"), store.writer("empty"):
        pass
    with pytest.raises(DataError, match="cannot name a shard"):
        store.writer("../escape")
    with pytest.raises(DataError, match=r"frames \[T\+1"), store.writer("short") as writer:
        writer.add_episode(**{**episode(4, 1), "rewards": np.zeros(5, np.float32)})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(LENGTHS)


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path: Path) -> None:
    filled(tmp_path)
    code = f"""
        import numpy as np, time
        from oneira.agents.rollouts import RolloutStore
        with RolloutStore({str(tmp_path)!r}).writer("killed") as writer:
            for seed in range(10**6):
                writer.add_episode(np.zeros((3, 8, 8, 3), np.uint8), np.zeros((2, 3)), np.zeros(2),
                                   terminated=False, truncated=True)
                print("one", flush=True)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    parts = list(tmp_path.glob(".*"))
    store = RolloutStore(tmp_path)
    assert parts and store.shards == sorted(LENGTHS)
    store.clean()
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_a_data_error_and_leaves_the_others(tmp_path: Path) -> None:
    """A limit on file sizes stands in for the end of the disk: the system refuses the bytes in the same way."""
    filled(tmp_path)
    code = f"""
        import resource
        import numpy as np
        from oneira.agents.rollouts import RolloutStore
        from oneira.platform.errors import DataError
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
        try:
            with RolloutStore({str(tmp_path)!r}).writer("full") as writer:
                for _ in range(100):
                    writer.add_episode(np.zeros((11, 64, 64, 3), np.uint8), np.zeros((10, 3)), np.zeros(10),
                                       terminated=False, truncated=True)
        except DataError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    assert "Cannot write" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(LENGTHS)


@pytest.mark.parametrize("damage", ["cut", "bytes", "meta", "pickle"])
def test_damage_is_said_aloud(tmp_path: Path, damage: str) -> None:
    store, _ = filled(tmp_path)
    shard = tmp_path / "round0-0001"
    if damage == "cut":
        os.truncate(shard / "frames.npy", 200)
    elif damage == "bytes":
        data = bytearray((shard / "frames.npy").read_bytes())
        data[300] ^= 1
        (shard / "frames.npy").write_bytes(data)
        with pytest.raises(DataError, match="damaged"):
            store.verify()
        return
    elif damage == "meta":
        (shard / "meta.json").write_text("{")
    else:
        np.save(shard / "seeds.npy", np.array([{"an": "object"}], dtype=object))
        meta = json.loads((shard / "meta.json").read_text())
        meta["files"]["seeds.npy"]["bytes"] = (shard / "seeds.npy").stat().st_size
        (shard / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="round0-0001"):
        RolloutStore(tmp_path)


def test_a_selection_is_a_store_of_its_own(tmp_path: Path) -> None:
    whole, _ = filled(tmp_path)
    part = RolloutStore(tmp_path, select=lambda shard: shard.startswith("round1-"))
    assert part.shards == ["round1-0000"] and part.num_steps == 13
    encode(part)
    assert whole.latents(DIGEST).missing() == ["round0-0000", "round0-0001"]
    first = whole.episodes()[4].first_frame
    np.testing.assert_array_equal(part.frames(np.arange(15)), whole.frames(first + np.arange(15)))


def test_windows_count_every_place_and_never_leave_their_episode(tmp_path: Path) -> None:
    store, episodes = filled(tmp_path)
    windows = Windows.of(store, 4)
    episode_index, offset = windows.locate(np.arange(len(windows)))
    for e, data in enumerate(episodes):
        starts = offset[episode_index == e]
        length = len(data["rewards"])
        # L places at the start of the episode, one at every later step
        assert starts.tolist() == [0] * 4 + list(range(1, length))


def test_sequence_batches_are_the_data_and_pad_with_zeros(tmp_path: Path) -> None:
    store, episodes = filled(tmp_path)
    encode(store)
    length, batch_size = 4, 64
    windows = Windows.of(store, length)
    batch_at = sequence_batches(store, DIGEST, length=length, batch_size=batch_size, seed=3)
    batch = batch_at(7)
    which, offset = windows.locate(np.random.default_rng([3, 7]).integers(0, len(windows), batch_size))
    for row, (e, start) in enumerate(zip(which, offset, strict=True)):
        data = episodes[e]
        end = min(start + length, len(data["rewards"]))
        n = end - start
        expected = np.zeros((length + 1, 2), np.float32)
        expected[: n + 1] = latent(data["frames"])[start : end + 1]
        np.testing.assert_array_equal(batch["mu"][row], expected)
        np.testing.assert_array_equal(batch["logvar"][row], -expected)
        np.testing.assert_array_equal(batch["action"][row, :n], data["actions"][start:end])
        np.testing.assert_array_equal(batch["reward"][row, :n], data["rewards"][start:end])
        assert batch["valid"][row].tolist() == [1.0] * n + [0.0] * (length - n)
        assert not batch["action"][row, n:].any() and not batch["reward"][row, n:].any()
        done = np.zeros(length, np.float32)
        if data["terminated"] and end == len(data["rewards"]):
            done[n - 1] = 1
        np.testing.assert_array_equal(batch["done"][row], done)
    assert batch["valid"].min() == 0 and batch["done"].max() == 1  # the cases above did occur
    assert all(value.dtype == np.float32 for value in batch.values())


def test_batches_depend_on_seed_and_step_only(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    encode(store)
    again = RolloutStore(tmp_path)
    frames, others = (frame_batches(s, batch_size=16, seed=5) for s in (store, again))
    first = frames(11)
    frames(12)
    np.testing.assert_array_equal(first, frames(11))
    np.testing.assert_array_equal(first, others(11))
    assert (first != frames(12)).any() and (first != frame_batches(store, batch_size=16, seed=6)(11)).any()
    ours, theirs = (sequence_batches(s, DIGEST, length=3, batch_size=8, seed=1)(4) for s in (store, again))
    assert all((ours[key] == theirs[key]).all() for key in ours)


def test_a_share_of_a_batch_is_fresh(tmp_path: Path) -> None:
    """Actions tell the episode: they are random numbers that no two share."""
    store, episodes = filled(tmp_path)
    encode(store)
    newest = {tuple(a) for data in episodes[4:] for a in data["actions"]}  # of round1-0000
    batch_at = sequence_batches(store, DIGEST, length=4, batch_size=40, seed=3, newest="round1-", fresh=0.5)
    fresh = np.array([[tuple(row["action"][0]) in newest for row in _rows(batch_at(step))] for step in range(30)])
    assert fresh[:, :20].all() and 0 < fresh[:, 20:].mean() < 1
    alone = sequence_batches(store, DIGEST, length=4, batch_size=40, seed=3, newest="round9-", fresh=0.5)
    plain = sequence_batches(store, DIGEST, length=4, batch_size=40, seed=3)
    assert all((alone(2)[key] == plain(2)[key]).all() for key in plain(2))  # a round without data of its own


def _rows(batch: dict) -> list[dict]:
    return [{key: value[i] for key, value in batch.items()} for i in range(len(batch["valid"]))]


def test_latents_and_states_belong_to_one_digest(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    with pytest.raises(DataError, match="without latents"):
        sequence_batches(store, DIGEST, length=3, batch_size=8, seed=1)
    encode(store)
    assert store.latents(DIGEST).missing() == [] and store.latents("another").missing() == store.shards
    count = store.episodes()[3].length + 1
    state = np.arange(count * 6, dtype=np.float16).reshape(count, 6)
    store.put_states("round0-0001", "m1", state, -state)
    first = store.episodes()[3].first_frame
    np.testing.assert_array_equal(store.states("m1").gather(np.array([first + 2]))["c"], -state[[2]].astype(np.float32))
    with pytest.raises(DataError, match="float16 or float32"):
        store.put_latents("round0-0001", "short", state[1:], state[1:])
    store.drop_derived("m1")
    assert store.latents(DIGEST).missing() == store.shards and store.states("m1").missing() == [
        "round0-0000",
        "round1-0000",
    ]


READER = """
    import sys
    import numpy as np
    from oneira.agents import shards
    from oneira.agents.batches import frame_batches, sequence_batches
    from oneira.agents.rollouts import RolloutStore

    def resident():
        lines = open("/proc/self/status").read().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
        return (sizes["RssAnon"] + sizes["RssFile"] + sizes["RssShmem"]) / 1024

    shards.PAGE_BUDGET = int(sys.argv[2]) or shards.PAGE_BUDGET
    before = resident()
    store = RolloutStore(sys.argv[1])
    frames = frame_batches(store, batch_size=256, seed=0)
    sequences = sequence_batches(store, "digest", length=32, batch_size=64, seed=0)
    peak = 0.0
    for step in range(150):
        frames(step), sequences(step)
        peak = max(peak, resident())
    print(store.num_frames, peak - before)
"""


def sparse_store(folder: Path, *, shards: int, episodes: int, length: int) -> None:
    """A store with holes for frames: the size of a real one, hardly any disk."""
    from oneira.agents.shards import _header

    count, steps = episodes * (length + 1), episodes * length
    small = {
        "actions": np.zeros((steps, 3), np.float32),
        "rewards": np.zeros(steps, np.float32),
        "terminated": np.zeros(steps, bool),
        "truncated": np.zeros(steps, bool),
        "starts": np.arange(episodes + 1, dtype=np.int64) * length,
        "seeds": np.zeros(episodes, np.int64),
    }
    for shard in range(shards):
        name = f"shard-{shard:04d}"
        for place, arrays, holes in (
            (folder / name, small, {"frames": ((64, 64, 3), np.uint8)}),
            (folder / "latents@digest" / name, {}, {"mu": ((32,), np.float16), "logvar": ((32,), np.float16)}),
        ):
            place.mkdir(parents=True)
            for key, array in arrays.items():
                np.save(place / f"{key}.npy", array)
            for key, (row, dtype) in holes.items():
                header = _header(np.dtype(dtype), (count, *row))
                (place / f"{key}.npy").write_bytes(header)
                os.truncate(place / f"{key}.npy", len(header) + count * int(np.prod(row)) * np.dtype(dtype).itemsize)
            files = {p.name: {"bytes": p.stat().st_size, "sha256": ""} for p in place.glob("*.npy")}
            (place / "meta.json").write_text(json.dumps({"files": files}))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident size from Linux's /proc")
def test_a_million_frames_stay_on_disk(tmp_path: Path) -> None:
    """12 GB of frames: a reader grows by less than 256 MiB, and by more if it keeps the pages it has touched."""
    sparse_store(tmp_path, shards=100, episodes=10, length=999)

    def growth(budget: int) -> float:
        command = [sys.executable, "-c", textwrap.dedent(READER), str(tmp_path), str(budget)]
        started = time.monotonic()
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        print(f"budget {budget}: {output[1]} MiB in {time.monotonic() - started:.1f} s")
        assert int(output[0]) == 1_000_000
        return float(output[1])

    assert growth(0) < 256
    assert growth(1 << 60) > 256
