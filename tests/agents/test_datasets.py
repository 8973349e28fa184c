"""Frames of rollouts as a data set of the generative package."""

from __future__ import annotations

import numpy as np
import pytest

from oneira.agents.stages import store_of
from oneira.generative.datasets import DataConfig, load_data
from oneira.platform.errors import ConfigError, DataError
from oneira.platform.presets import load_preset
from oneira.platform.runs import Run


@pytest.fixture
def run(tmp_path):
    run = Run.create(tmp_path / "run", "carracing-quick", load_preset("carracing-quick"))
    rng = np.random.default_rng(0)
    with store_of(run).writer("a", policy="none") as writer:
        for _ in range(2):
            frames = rng.integers(0, 256, (26, 64, 64, 3), dtype=np.uint8)
            action, reward = np.zeros((25, 3), np.float32), np.zeros(25, np.float32)
            writer.add_episode(frames=frames, actions=action, rewards=reward, terminated=False, truncated=False, seed=1)
    return run


def test_frames_are_the_rollouts_own(run):
    data, store = load_data(DataConfig(name="frames", path=str(run.path), size=64)), store_of(run)
    assert [data.size(split) for split in ("train", "validation", "test")] == [42, 5, 5]
    assert np.array_equal(data.rows("test", np.arange(5))["x"], store.frames(np.arange(47, 52)))
    small = load_data(DataConfig(name="frames", path=str(run.path), size=32)).rows("train", np.array([3]))["x"]
    block = store.frames(np.array([3]))[0, :2, :2].astype(float).mean((0, 1))
    assert small.shape == (1, 32, 32, 3) and np.abs(small[0, 0, 0] - block).max() <= 0.5


def test_mistakes_are_told(run, tmp_path):
    with pytest.raises(ConfigError, match="size"):
        load_data(DataConfig(name="frames", path=str(run.path), size=48))
    with pytest.raises(DataError, match=r"data\.path"):
        load_data(DataConfig(name="frames"))
    empty = Run.create(tmp_path / "empty", "carracing-quick", load_preset("carracing-quick"))
    with pytest.raises(DataError, match="0 frames"):
        load_data(DataConfig(name="frames", path=str(empty.path)))
