"""Dreams as Gymnasium environments: M imagines the next step, V decodes it when somebody wants to look.

    dream = make_dream("runs/my-run", num_envs=16)                              # a gymnasium.vector.VectorEnv
    gymnasium.make("oneira.agents:oneira/Dream-v0", run="runs/my-run")           # one environment of it

Every episode starts from a state met in the run's real data and ends when M says so (terminated) or after `max_steps`
(truncated). Environment i of a vector seeded with s dreams what a single environment seeded with s + i dreams.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from oneira.platform.errors import DataError, UsageError, did_you_mean

from .dreaming import DreamModel, Noise
from .memory import MDNRNN, MemoryConfig

OBSERVATIONS = ("latent", "pixels")
_LATENT_BOUND = 100.0  # V's latents stay within tens even in a dream gone wrong; a finite box is what learners expect


@dataclass(frozen=True, kw_only=True)
class DreamSource:
    """All that a dream needs of a run.

    Args:
        members: the ensemble of memories, as modules or state dicts. config: theirs.
        starts: float32 z [N, Z], h [N, H], c [N, H], reward_prev [N]: states met in real data.
        decode: z float32 [B, Z] -> frames uint8 [B, 64, 64, 3].
        action_low, action_high: float32 [A], the world's.
        max_steps: length after which an episode is truncated.
        survival: the reward of every step is 1 (see `environments.World`), not what M expects.
    """

    members: Sequence[MDNRNN | Mapping[str, Tensor | np.ndarray]]
    config: MemoryConfig
    starts: Mapping[str, np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]
    action_low: np.ndarray
    action_high: np.ndarray
    max_steps: int = 1000
    survival: bool = False

    def __post_init__(self) -> None:
        missing = {"z", "h", "c", "reward_prev"} - set(self.starts)
        if missing or not len(self.starts["z"]):
            raise DataError(
                f"dream: the starts need rows of z, h, c and reward_prev; missing: {sorted(missing) or 'rows'}."
            )
        if np.shape(self.action_low) != (self.config.action,) or np.shape(self.action_high) != (self.config.action,):
            raise DataError(
                f"dream: action bounds need shape ({self.config.action},), got {np.shape(self.action_low)}."
            )


def make_dream(
    run: str | Path | DreamSource,
    num_envs: int = 16,
    obs: Literal["latent", "pixels"] = "latent",
    tau: float = 1.0,
    seed: int = 0,
    *,
    max_steps: int | None = None,
) -> "DreamVectorEnv":
    """The dream of a trained run as a vector environment.

    Args:
        run: a run's folder or name, or a DreamSource. num_envs: how many dreams side by side.
        obs: "latent": float32 [Z + H], z and then h, what the controller sees;
            "pixels": uint8 [64, 64, 3], V's picture of z.
        tau: temperature of the dream, at least 0; above 1 it is less certain and harder to exploit (section 4.4).
        seed: environment i is seeded with seed + i until `reset` is given another one.
        max_steps: overrides the run's.
    """
    if not isinstance(run, DreamSource):
        from .loading import dream_source

        run = dream_source(run)
    return DreamVectorEnv(run, num_envs, obs, tau, seed, max_steps=max_steps)


class DreamVectorEnv(VectorEnv):
    """See `make_dream`. Autoreset is gymnasium's default: a finished environment starts anew at its next step.

    That step's action is not used and its reward is 0.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  (gymnasium's own declaration)
        "render_modes": ["rgb_array"],
        "render_fps": 50,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        source: DreamSource,
        num_envs: int = 16,
        obs: str = "latent",
        tau: float = 1.0,
        seed: int = 0,
        *,
        max_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        if obs not in OBSERVATIONS:
            raise UsageError(f"obs {obs!r} is unknown. {did_you_mean(obs, OBSERVATIONS)}")
        if num_envs < 1 or tau < 0 or (max_steps is not None and max_steps < 1):
            raise UsageError(
                f"a dream needs num_envs >= 1, tau >= 0, max_steps >= 1; got {num_envs}, {tau}, {max_steps}."
            )
        self.num_envs, self.tau, self.render_mode = num_envs, tau, render_mode
        self.max_steps = max_steps or source.max_steps
        self._source, self._obs = source, obs
        self._model = DreamModel(source.members, source.config)
        low, high = (np.asarray(x, np.float32) for x in (source.action_low, source.action_high))
        self.single_action_space: gymnasium.Space = (
            gymnasium.spaces.Discrete(source.config.action)
            if source.config.discrete
            else gymnasium.spaces.Box(low, high, dtype=np.float32)
        )
        if obs == "latent":
            bound = np.ones(source.config.z + source.config.hidden, np.float32)
            bound[: source.config.z] = _LATENT_BOUND  # h = o * tanh(c) lies in [-1, 1]
            self.single_observation_space = gymnasium.spaces.Box(-bound, bound, dtype=np.float32)
        else:
            self.single_observation_space = gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._generators = [seeding.np_random(seed + i)[0] for i in range(num_envs)]
        shapes = {name: np.shape(source.starts[name])[1:] for name in ("z", "h", "c", "reward_prev")}
        self._state = {name: np.zeros((num_envs, *shape), np.float32) for name, shape in shapes.items()}
        self._keys, self._members = np.zeros(num_envs, np.uint64), np.zeros(num_envs, np.int64)
        self._steps, self._finished = np.zeros(num_envs, np.int64), np.zeros(num_envs, bool)
        self._started = False

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start new episodes in all environments, or in those of the boolean array `options["reset_mask"]`.

        Args:
            seed: int s: environment i gets s + i; a sequence: one for each (None: go on as it is); None: all go on.
        """
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int | np.integer) else seed
        mask = (
            np.ones(self.num_envs, bool) if options is None else options.get("reset_mask", np.ones(self.num_envs, bool))
        )
        if np.shape(mask) != (self.num_envs,) or (seeds is not None and len(seeds) != self.num_envs):
            raise UsageError(f"reset_mask and seeds need one entry for each of the {self.num_envs} environments.")
        for i in np.flatnonzero(mask).tolist():
            own = None if seeds is None else seeds[i]
            if own is not None:
                self._generators[i] = seeding.np_random(int(own))[0]
            self._begin(i, self._generators[i])
        self._started = True
        return self._observe(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Dream one step; actions float32 [num_envs, A], or int64 [num_envs]. UsageError before the first reset or for another shape."""
        actions = np.asarray(actions, self.action_space.dtype)
        if not self._started or actions.shape != self.action_space.shape:
            raise UsageError(
                f"step needs a reset first, and actions of shape {self.action_space.shape}; got {actions.shape}."
            )
        running = ~self._finished
        for i in np.flatnonzero(self._finished).tolist():
            self._begin(i, self._generators[i])
        rewards, terminated = np.zeros(self.num_envs, np.float64), np.zeros(self.num_envs, bool)
        for member in np.unique(self._members[running]):
            rows = np.flatnonzero(running & (self._members == member))
            rewards[rows], terminated[rows] = self._imagine(rows, actions[rows], int(member))
        self._steps[running] += 1
        truncated = running & ~terminated & (self._steps >= self.max_steps)
        self._finished = terminated | truncated
        return self._observe(), rewards, terminated, truncated, {}

    def features(self, names: str) -> np.ndarray:
        """What a controller sees of the dreams as they are, float32 [n, F]: "z", "zh" or "zch", one part a letter."""
        return np.concatenate([self._state[name] for name in names], 1)

    def render(self) -> tuple[np.ndarray, ...]:
        """V's picture of every dream, uint8 [64, 64, 3] each."""
        return tuple(self._source.decode(self._state["z"]))

    def _begin(self, i: int, generator: np.random.Generator) -> None:
        row = generator.integers(len(self._source.starts["z"]))
        self._keys[i] = generator.integers(2**63)
        self._members[i] = generator.integers(self._model.num_members)
        for name, values in self._state.items():
            values[i] = self._source.starts[name][row]
        self._steps[i], self._finished[i] = 0, False

    def _imagine(self, rows: np.ndarray, actions: np.ndarray, member: int) -> tuple[np.ndarray, np.ndarray]:
        noise = Noise.draw(self._keys[rows], self._steps[rows], self._source.config.z)
        z, h, c, reward_prev = (self._state[name][rows] for name in ("z", "h", "c", "reward_prev"))
        z, reward, done, h, c = self._model.step(z, actions, reward_prev, h, c, self.tau, noise, member=member)
        np.clip(z, -_LATENT_BOUND, _LATENT_BOUND, out=z)
        if self._source.survival:
            reward = np.ones_like(reward)
        for name, value in (("z", z), ("h", h), ("c", c), ("reward_prev", reward)):
            self._state[name][rows] = value
        return reward, noise.done < done

    def _observe(self) -> np.ndarray:
        if self._obs == "pixels":
            return np.array(self._source.decode(self._state["z"]))
        return self.features("zh")


class DreamEnv(gymnasium.Env):
    """One dream: `oneira/Dream-v0`. Arguments as `make_dream`'s; `render()` gives V's picture, uint8 [64, 64, 3]."""

    metadata: dict[str, Any] = {  # noqa: RUF012  (gymnasium's own declaration)
        "render_modes": ["rgb_array"],
        "render_fps": 50,
    }

    def __init__(
        self,
        run: str | Path | DreamSource,
        obs: Literal["latent", "pixels"] = "latent",
        tau: float = 1.0,
        seed: int = 0,
        *,
        max_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        self._dream = make_dream(run, 1, obs, tau, seed, max_steps=max_steps)
        self.render_mode = render_mode
        self.observation_space = self._dream.single_observation_space
        self.action_space = self._dream.single_action_space
        self._np_random, self._np_random_seed = seeding.np_random(seed)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._dream._generators[0] = self.np_random  # gymnasium owns the seeding of a single environment
        observation, info = self._dream.reset()
        return observation[0], info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self._dream.step(np.asarray(action)[None])
        return observation[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def render(self) -> np.ndarray | None:
        return self._dream.render()[0] if self.render_mode == "rgb_array" else None


def make_vector(run: str | Path | DreamSource, num_envs: int = 1, **options: Any) -> DreamVectorEnv:
    """`gymnasium.make_vec`'s way in; it adds a render_mode to the options of `make_dream`."""
    options.pop("render_mode", None)
    return make_dream(run, num_envs, **options)
