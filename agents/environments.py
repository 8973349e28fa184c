"""The worlds that agents see: one contract for pixel environments.

A `World` names a reference environment of Gymnasium (reported scores come from it alone), the preprocessing that turns its frames into
the uint8 64x64x3 frames that every agent sees, its actions, and a fast batch of it for collecting data and training controllers.
A new world is a new `World` in `WORLDS`: DESIGN.md's DoomTakeCover, with discrete actions and real termination, fits as it is.

Shapes: n environments in a batch, R of them stepped at a time, A the size of an action.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from oneira.platform.errors import ConfigError, EnvironmentMissing, did_you_mean

FRAME = 64


class Batch(Protocol):
    """Environments stepped together in one process, on seeds of their own."""

    num_envs: int

    def reset(self) -> np.ndarray:
        """Start every environment. Returns frames, uint8 [n, 64, 64, 3]."""

    def step(
        self, actions: np.ndarray, rows: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Step `rows` (int64 [R]). Returns frames uint8 [R, 64, 64, 3], rewards float64 [R], terminated bool [R], truncated bool [R]."""

    @property
    def steps_since_tile(self) -> np.ndarray:
        """int [n]: steps since the last progress, for cutting hopeless episodes short in training."""


class CarRacing:
    """Gymnasium's CarRacing-v3 (Klimov): drive a lap; +1000/tiles for each new tile, -0.1 a step, -100 for leaving the field.

    Preprocessing: rows 0..83 of the 96x96 observation (the dashboard below is cut off), shrunk by area to 64x64.
    """

    name = "carracing"
    env_id = "CarRacing-v3"
    preprocessing = "rows 0..83 of 96x96, area resize to 64x64x3 uint8"
    action_size = 3
    action_low = np.array([-1.0, 0.0, 0.0], np.float32)
    action_high = np.array([1.0, 1.0, 1.0], np.float32)
    max_steps = 1000

    def batch(self, seeds: Sequence[int], track_of: np.ndarray) -> Batch:
        """The fast twin: `seeds` are the K tracks, `track_of` int [n] says which of them an environment drives."""
        from .carracing.simulator import CarRacingBatch

        return CarRacingBatch(seeds, track_of)

    def reference(self, render_mode: str | None = None):
        """Gymnasium's own environment, headless.

        Raises:
            EnvironmentMissing: Box2D or pygame is not installed.
        """
        import gymnasium

        try:
            return gymnasium.make(self.env_id, render_mode=render_mode)
        except gymnasium.error.DependencyNotInstalled as error:
            raise EnvironmentMissing(
                f"{self.env_id} needs Box2D and pygame: pip install 'gymnasium[box2d]' ({error})"
            ) from error

    def preprocess(self, frames: np.ndarray) -> np.ndarray:
        """Reference frames, uint8 [n, 96, 96, 3], to what agents see, uint8 [n, 64, 64, 3]."""
        return preprocess_carracing(frames)


def preprocess_carracing(frames: np.ndarray) -> np.ndarray:
    """Cut the dashboard off and shrink by area: uint8 [n, 96, 96, 3] -> uint8 [n, 64, 64, 3].

    Raises:
        ValueError: frames of another shape or type.
    """
    import cv2

    if frames.ndim != 4 or frames.shape[1:] != (96, 96, 3) or frames.dtype != np.uint8:
        raise ValueError(f"CarRacing frames are uint8 [n, 96, 96, 3], not {frames.dtype} {list(frames.shape)}")
    out = np.empty((len(frames), FRAME, FRAME, 3), np.uint8)
    for i, frame in enumerate(frames):
        cv2.resize(frame[:84], (FRAME, FRAME), dst=out[i], interpolation=cv2.INTER_AREA)
    return out


WORLDS = {"carracing": CarRacing}


def make_world(name: str) -> CarRacing:
    """The world of this name.

    Raises:
        ConfigError: unknown; the nearest known one is named.
    """
    if name not in WORLDS:
        raise ConfigError(f"unknown environment '{name}'. {did_you_mean(name, WORLDS)}")
    return WORLDS[name]()
