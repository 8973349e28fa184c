"""The worlds that agents see: one contract for pixel environments.

A `World` names a reference environment of Gymnasium (reported scores come from it alone), the preprocessing that turns its frames into
the uint8 64x64x3 frames that every agent sees, its actions, and a fast batch of it for collecting data and training controllers.
A new world is a new `World` in `WORLDS`.

Shapes: n environments in a batch, R of them stepped at a time, A the size of an action.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

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


class World(Protocol):
    """What all parts know of a world.

    Attributes:
        simulator: what `batch` is, written into the data it gives. library: the distribution that the reference environment comes
            from. preprocessing, conditions: stamped into scores.
        action_size: A, of what M reads and a Box of actions holds. discrete: actions are whole numbers below A, int64 [n], and M
            reads them as one-hot vectors; else they are float32 [n, A] between `action_low` and `action_high`.
        survival: a step alive pays 1 and nothing else does, in dreams too, whatever M expects.
        max_steps: an episode's length at most. fps: of its films.
    """

    name: str
    env_id: str
    simulator: str
    library: str
    preprocessing: str
    conditions: dict[str, Any]
    action_size: int
    action_low: np.ndarray
    action_high: np.ndarray
    discrete: bool
    survival: bool
    max_steps: int
    fps: int

    def batch(self, seeds: Sequence[int], track_of: np.ndarray) -> Batch:
        """Fast environments for training: `seeds` are the K episodes, `track_of` int [n] says which of them an environment plays."""

    def reference(self, render_mode: str | None = None) -> Any:
        """The Gymnasium environment that scores; its observations are frames. EnvironmentMissing where its library is."""

    def preprocess(self, frames: np.ndarray) -> np.ndarray:
        """Reference frames, uint8 [n, H, W, 3], to what agents see, uint8 [n, 64, 64, 3]. ValueError for others."""


class CarRacing:
    """Gymnasium's CarRacing-v3 (Klimov): drive a lap; +1000/tiles for each new tile, -0.1 a step, -100 for leaving the field.

    Preprocessing: rows 0..83 of the 96x96 observation (the dashboard below is cut off), shrunk by area to 64x64.
    """

    name = "carracing"
    env_id = "CarRacing-v3"
    simulator = "twin"
    library = "gymnasium"
    preprocessing = "rows 0..83 of 96x96, area resize to 64x64x3 uint8"
    conditions: dict[str, Any] = {}  # noqa: RUF012
    action_size = 3
    action_low = np.array([-1.0, 0.0, 0.0], np.float32)
    action_high = np.array([1.0, 1.0, 1.0], np.float32)
    discrete = False
    survival = False
    max_steps = 1000
    fps = 50

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


class DoomTakeCover:
    """ViZDoom's DoomTakeCover: step aside from fireballs and live; every tic (1/35 s) alive pays 1, and so does the last.

    Actions are ViZDoom's: 0 nothing, 1 right, 2 left. Episodes have no end of their own but death; 2,100 steps are the paper's limit
    ("World Models", section 4.2). Preprocessing: the 320x240 screen, without a status bar, shrunk by area to 64x64. Training renders at
    160x120: the same game, and frames whose pixels differ by 3 of 255 on average and by less than 6 in the worst frame. A terminated
    episode shows nothing any more: its last frame is the one before.
    """

    name = "doom"
    env_id = "VizdoomTakeCover-v1"
    simulator = "160x120"
    library = "vizdoom"
    preprocessing = "320x240 (training: 160x120), area resize to 64x64x3 uint8"
    conditions: dict[str, Any] = {"skill": 4, "frame_skip": 1, "max_steps": 2100}  # noqa: RUF012
    action_size = 3
    action_low = np.zeros(3, np.float32)
    action_high = np.ones(3, np.float32)
    discrete = True
    survival = True
    max_steps = 2100
    fps = 35

    def batch(self, seeds: Sequence[int], track_of: np.ndarray) -> Batch:
        """See `World.batch`."""
        from .doom.simulator import DoomBatch

        return DoomBatch(seeds, track_of, self.max_steps)

    def reference(self, render_mode: str | None = None) -> Any:
        """See `World.reference`."""
        from .doom.reference import make_reference

        return make_reference(self.env_id, self.max_steps, render_mode)

    def preprocess(self, frames: np.ndarray) -> np.ndarray:
        """See `World.preprocess`; frames are uint8 [n, 240, 320, 3]."""
        import cv2

        if frames.ndim != 4 or frames.shape[1:] != (240, 320, 3) or frames.dtype != np.uint8:
            raise ValueError(
                f"DoomTakeCover frames are uint8 [n, 240, 320, 3], not {frames.dtype} {list(frames.shape)}"
            )
        out = np.empty((len(frames), FRAME, FRAME, 3), np.uint8)
        for i, frame in enumerate(frames):
            cv2.resize(frame, (FRAME, FRAME), dst=out[i], interpolation=cv2.INTER_AREA)
        return out


WORLDS: dict[str, type[World]] = {"carracing": CarRacing, "doom": DoomTakeCover}


def make_world(name: str) -> World:
    """The world of this name.

    Raises:
        ConfigError: unknown; the nearest known one is named.
    """
    if name not in WORLDS:
        raise ConfigError(f"unknown environment '{name}'. {did_you_mean(name, WORLDS)}")
    return WORLDS[name]()
