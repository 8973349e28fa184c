"""ViZDoom's own Gymnasium environment of take_cover.cfg, as it scores: frames instead of dictionaries, 2,100 steps at most."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium
import numpy as np

from oneira.platform.errors import EnvironmentMissing

from .processes import Watched, confine, remove, require_vizdoom


class Screen(gymnasium.Wrapper):
    """The entry `screen` of ViZDoom's observations, uint8 [240, 320, 3]; the game is guarded and leaves no file behind."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.observation_space = env.observation_space["screen"]  # type: ignore[index]
        self._folder = confine(env.unwrapped.game)  # type: ignore[attr-defined]

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """See gymnasium.Env. EnvironmentMissing where the game does not start."""
        observation, info = self._guarded(lambda: self.env.reset(**options))
        return observation["screen"], info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """See gymnasium.Env. EnvironmentMissing where the game died."""
        observation, reward, terminated, truncated, info = self._guarded(lambda: self.env.step(action))
        return observation["screen"], float(reward), terminated, truncated, info

    def close(self) -> None:
        """End the game and remove its folder."""
        self.env.close()
        remove(self._folder)

    def _guarded(self, call: Any) -> Any:
        vizdoom = require_vizdoom()
        try:
            with Watched(self._folder):
                return call()
        except (vizdoom.ViZDoomErrorException, vizdoom.ViZDoomUnexpectedExitException) as error:
            self.close()
            raise EnvironmentMissing(f"A game of {self.env.spec} died: {error}") from error


def make_reference(env_id: str, max_steps: int, render_mode: str | None) -> gymnasium.Env:
    """The environment; EnvironmentMissing without ViZDoom."""
    require_vizdoom()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its registration and of pygame
        import vizdoom.gymnasium_wrapper  # noqa: F401 - registers it

        return Screen(gymnasium.make(env_id, render_mode=render_mode, max_episode_steps=max_steps))
