"""Many games of DoomTakeCover stepped together: what collects data and checks controllers.

ViZDoom waits for a game outside Python's lock, so a few threads keep several games busy. Games are kept for the next batch of this
process: a started game costs 0.16 s, and the same seed gives the same episode in a fresh game and in a used one (a test holds that).

Shapes: n games, R of them stepped at a time.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from oneira.platform.errors import EnvironmentMissing

from . import processes
from .processes import Watched, confine, remove, require_vizdoom

BUTTONS = ([0.0, 0.0], [0.0, 1.0], [1.0, 0.0])
"""MOVE_LEFT, MOVE_RIGHT by action, numbered as ViZDoom's Gymnasium environment does: 0 nothing, 1 right, 2 left."""
THREADS = 8
FRAME = 64
KEPT = 64  # idle games of this process, of 9 MiB each
_starting = threading.Lock()  # one fork at a time: one of four at once has been seen never to become a game


class Game:
    """One game of take_cover.cfg, rendered at 160x120; `start` begins an episode, `step` plays one tic of 1/35 s."""

    def __init__(self, max_steps: int) -> None:
        vizdoom = require_vizdoom()
        self._failed = vizdoom.ViZDoomErrorException, vizdoom.ViZDoomUnexpectedExitException
        self.max_steps = max_steps
        self._seed, self._steps, self._over, self._stood_still = 0, 0, True, False
        self._game = vizdoom.DoomGame()
        self._game.load_config(os.path.join(vizdoom.scenarios_path, "take_cover.cfg"))
        self._game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
        self._game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        self._game.set_window_visible(False)
        self.folder: Path = confine(self._game)

    def start(self, seed: int, out: np.ndarray) -> None:
        """Begin the episode of a seed in [0, 2^32); its first frame goes to `out`, uint8 [64, 64, 3]."""
        self._seed, self._steps, self._over = seed, 0, False
        try:
            self._game.set_seed(seed)
            if self._game.is_running():
                self._call(self._game.new_episode)
            else:
                with _starting:
                    self._call(self._game.init)
            self._see(out)
        except self._failed as error:
            raise self._died(error) from error

    def _call(self, call: Any, *given: Any) -> Any:
        with Watched(self.folder) as watched:
            try:
                return call(*given)
            finally:
                self._stood_still = watched.ended

    def step(self, action: int, out: np.ndarray) -> tuple[float, bool, bool]:
        """One tic. A game that ended shows nothing: `out` is then left as it is.

        Returns:
            reward, 1 for a tic survived or not; terminated; truncated.
        """
        if self._over:
            raise ValueError("this episode is over")
        try:
            reward = float(self._call(self._game.make_action, BUTTONS[action]))
            terminated = bool(self._game.is_episode_finished())
            if not terminated:
                self._see(out)
        except self._failed as error:
            raise self._died(error) from error
        self._steps += 1
        truncated = not terminated and self._steps >= self.max_steps
        self._over = terminated or truncated
        return reward, terminated, truncated

    def _see(self, out: np.ndarray) -> None:
        import cv2

        cv2.resize(self._game.get_state().screen_buffer, (FRAME, FRAME), dst=out, interpolation=cv2.INTER_AREA)

    def _died(self, error: Exception) -> EnvironmentMissing:
        self.close()
        fate = f"stood still for {processes.PATIENCE:.0f} s" if self._stood_still else "died"
        return EnvironmentMissing(f"The game of seed {self._seed} {fate} after {self._steps} steps: {error}")

    def close(self) -> None:
        """End the process and remove its folder; a second call does nothing."""
        self._game.close()
        remove(self.folder)


_idle: list[Game] = []


def _take(count: int, max_steps: int) -> list[Game]:
    games: list[Game] = []
    try:
        for _ in range(count):
            games.append(_idle.pop() if _idle else Game(max_steps))
            games[-1].max_steps = max_steps
    except BaseException:
        _put_back(games)
        raise
    return games


def _put_back(games: list[Game]) -> None:
    for game in games:
        if len(_idle) < KEPT and game.folder.is_dir():
            _idle.append(game)
        else:
            game.close()


def close_idle() -> None:
    """End the games that no batch uses."""
    while _idle:
        _idle.pop().close()


class DoomBatch:
    """n games; see `environments.Batch`.

    Args:
        seeds: of K episodes, in [0, 2^32). seed_of: int [n], which of them a game plays.
        max_steps: after which an episode is truncated.
    """

    def __init__(self, seeds: Sequence[int], seed_of: np.ndarray, max_steps: int) -> None:
        self.num_envs = len(seed_of)
        self._seeds = [int(seeds[k]) for k in seed_of]
        self._games = _take(self.num_envs, max_steps)
        self._frames = np.zeros((self.num_envs, FRAME, FRAME, 3), np.uint8)
        self._threads = ThreadPoolExecutor(min(THREADS, self.num_envs), "doom")
        weakref.finalize(self, _finish, self._games, self._threads)

    def reset(self) -> np.ndarray:
        """Start every episode. Returns frames, uint8 [n, 64, 64, 3]."""
        self._each(lambda i: self._games[i].start(self._seeds[i], self._frames[i]), range(self.num_envs))
        return self._frames.copy()

    def step(
        self, actions: np.ndarray, rows: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Step `rows` (int64 [R], all by default) with actions int64 [R] in {0, 1, 2}.

        Returns:
            frames uint8 [R, 64, 64, 3] (the last one again where the episode terminated), rewards float64 [R], terminated bool [R],
            truncated bool [R].

        Raises:
            EnvironmentMissing: a game died.
        """
        rows = np.arange(self.num_envs) if rows is None else rows
        pairs = list(zip(rows.tolist(), np.asarray(actions).tolist(), strict=True))
        results = self._each(lambda pair: self._games[pair[0]].step(pair[1], self._frames[pair[0]]), pairs)
        rewards, terminated, truncated = (np.array(column) for column in zip(*results, strict=True))
        return self._frames[rows], rewards, terminated, truncated

    def _each(self, work: Any, items: Sequence[Any]) -> list[Any]:
        """Do all of it, in a few portions a thread; the first error is raised when all have ended."""
        size = -(-len(items) // THREADS)
        portions = [items[i : i + size] for i in range(0, len(items), size)]
        futures = [self._threads.submit(lambda p: [work(item) for item in p], portion) for portion in portions]
        wait(futures)  # an error must not leave games at work behind it
        return [value for future in futures for value in future.result()]

    @property
    def steps_since_tile(self) -> np.ndarray:
        """int64 [n]: always 0, since staying alive is progress."""
        return np.zeros(self.num_envs, np.int64)


def _finish(games: list[Game], threads: ThreadPoolExecutor) -> None:
    threads.shutdown(wait=True)
    _put_back(games)
