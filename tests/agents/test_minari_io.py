"""Minari: a store that goes out and comes back is the same; other people's tools can read it on the way."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from oneira.agents.rollouts import RolloutStore
from oneira.platform.errors import DataError, UsageError

minari = pytest.importorskip("minari")

from oneira.agents.minari_io import export_minari, import_minari  # noqa: E402 - after the skip


@pytest.fixture
def store(tmp_path: Path) -> RolloutStore:
    store, rng = RolloutStore(tmp_path / "store"), np.random.default_rng(0)
    for shard, lengths in {"a": [4, 2], "b": [6]}.items():
        with store.writer(shard, policy="random", env_id="CarRacing-v3", preprocessing="rows 0-83, area") as writer:
            for length in lengths:
                writer.add_episode(
                    rng.integers(0, 256, (length + 1, 64, 64, 3), dtype=np.uint8),
                    rng.uniform(0, 1, (length, 3)).astype(np.float32),
                    rng.normal(size=length).astype(np.float32),
                    terminated=length == 4,
                    truncated=length == 6,
                    seed=length if length != 2 else -1,
                )
    return store


def test_round_trip_is_exact(tmp_path: Path, store: RolloutStore) -> None:
    export_minari(store, "oneira/carracing-v0", root=tmp_path / "minari")
    back = import_minari("oneira/carracing-v0", tmp_path / "back", root=tmp_path / "minari")
    assert back.episodes() == store.episodes()
    for path in sorted(p for p in store.folder.rglob("*") if p.is_file()):
        twin = back.folder / path.relative_to(store.folder)
        assert twin.read_bytes() == path.read_bytes(), path


def test_minari_itself_reads_it(tmp_path: Path, store: RolloutStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    export_minari(store, "oneira/carracing-v0")
    dataset = minari.load_dataset("oneira/carracing-v0")
    assert (dataset.total_episodes, dataset.total_steps) == (3, 12)
    assert dataset.env_spec.id == "CarRacing-v3" and list(minari.list_local_datasets()) == ["oneira/carracing-v0"]
    assert dataset.action_space.shape == (3,) and dataset.action_space.low[0] == -1
    for read, written in zip(dataset, store.episodes(), strict=True):
        frames = np.arange(written.first_frame, written.first_frame + written.length + 1)
        np.testing.assert_array_equal(read.observations, store.frames(frames))
        assert bool(read.terminations[-1]) == written.terminated and bool(read.truncations[-1]) == written.truncated


def test_a_foreign_data_set_comes_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that Minari's own writer made: discrete actions, lists of steps, another frame size."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    rng = np.random.default_rng(1)
    frames = [rng.integers(0, 256, (6, 96, 96, 3), dtype=np.uint8) for _ in range(3)]
    minari.create_dataset_from_buffers(
        "foreign-v3",
        [
            minari.data_collector.EpisodeBuffer(
                seed=7 + i,
                observations=list(frames[i]),
                actions=[0, 1, 2, 1, i],
                rewards=[0.5] * 5,
                terminations=[False] * 4 + [i == 1],
                truncations=[False] * 4 + [i != 1],
            )
            for i in range(3)
        ],
        observation_space=gymnasium.spaces.Box(0, 255, (96, 96, 3), np.uint8),
        action_space=gymnasium.spaces.Discrete(3),
        jpeg_encoding=False,
    )
    store = import_minari("foreign-v3", tmp_path / "store", preprocess=lambda f: f[:, ::2, ::2], episodes_per_shard=2)
    assert store.shards == ["minari-00000", "minari-00001"] and [e.seed for e in store.episodes()] == [7, 8, 9]
    assert store.actions[:5].tolist() == [[0], [1], [2], [1], [0]]
    assert [e.terminated for e in store.episodes()] == [False, True, False]
    np.testing.assert_array_equal(store.frames(np.arange(6, 12)), frames[1][:, ::2, ::2])


def test_wrong_sources_are_refused(tmp_path: Path, store: RolloutStore) -> None:
    root = tmp_path / "minari"
    with pytest.raises(UsageError, match="has the form"):
        export_minari(store, "no version", root=root)
    with pytest.raises(DataError, match="no shard"):
        export_minari(RolloutStore(tmp_path / "none"), "x-v0", root=root)
    with pytest.raises(DataError, match="no readable Minari"):
        import_minari("absent-v0", tmp_path / "back", root=root)
    folder = export_minari(store, "x-v0", root=root)
    with pytest.raises(UsageError, match="exists already"):
        export_minari(store, "x-v0", root=root)
    metadata = folder / "data" / "metadata.json"
    raw = json.loads(metadata.read_text())
    metadata.write_text(json.dumps({**{k: v for k, v in raw.items() if k != "action_space"}, "env_spec": "{}"}))
    with pytest.raises(DataError, match="does not record its spaces"):
        import_minari(folder, tmp_path / "back")
