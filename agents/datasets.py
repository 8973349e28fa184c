"""Frames of a run's rollouts as a data set of `oneira.generative`: `--set data.name=frames --set data.path=RUN`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from oneira.generative.datasets import DataConfig, Rows, Split
from oneira.generative.spaces import Space
from oneira.platform.errors import ConfigError, DataError
from oneira.platform.runs import Run

from .rollouts import RolloutStore
from .stages import store_of

HELD = 0.1  # the share of frames of "validation", and of "test": the last ones, so that they are of other episodes


@dataclass(frozen=True)
class Frames:
    """Frames of a rollout store, uint8 [B, size, size, 3], read from the disk as they are asked for."""

    store: RolloutStore
    space: Space

    def size(self, split: Split) -> int:
        held = int(self.store.num_frames * HELD)
        return held if split != "train" else self.store.num_frames - 2 * held

    def rows(self, split: Split, indices: np.ndarray) -> Rows:
        first = {"train": 0, "validation": self.size("train"), "test": self.size("train") + self.size("validation")}
        frames = self.store.frames(np.asarray(indices, np.int64) + first[split])
        times = frames.shape[1] // self.space.shape[0]
        if times > 1:  # the mean of each block of pixels
            n, side = len(frames), self.space.shape[0]
            frames = frames.reshape(n, side, times, side, times, 3).mean((2, 4)).round().astype(np.uint8)
        return {"x": frames}


def frames_data(config: DataConfig) -> Frames:
    """The frames of the run `path`, made `size` pixels wide.

    Raises:
        DataError: the run has no rollouts. ConfigError: `size` does not divide the frames' own.
    """
    if not config.path:
        raise DataError("Whose frames? Name a run: --set data.path=RUN")
    store = store_of(Run.open(config.path))
    if store.num_frames < 20:
        raise DataError(
            f"The run '{config.path}' holds {store.num_frames} frames; too few to train on and to measure on."
        )
    side = store.frames(np.zeros(1, np.int64)).shape[1]
    if side % config.size:
        raise ConfigError(
            f"size is {config.size}; frames of {side} pixels can be made {side}, {side // 2} or {side // 4} wide."
        )
    return Frames(store, Space(kind="pictures", shape=(config.size, config.size, 3), levels=256))
