"""Policies that drive to gather experience, n environments at a time: what V and M learn from.

    policy = Wandering(num_envs=16, seed=unit_seed)
    policy.reset(ended)                   # new habits for the environments whose episode ended
    actions = policy.act(features)        # float32 [n, A] in the environment's range, or int64 [n]

Each episode draws its habits anew (speed, nervousness, strength of noise), because a world model must have seen the
good and the bad of driving, and one average driver shows neither. All numbers come from one generator, seeded by the
unit of work.

Shapes: n environments, F features, A actions; times in environment steps.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from .controller import Controller, ControllerConfig

LOW = np.array([-1.0, 0.0, 0.0], dtype=np.float32)
HIGH = np.array([1.0, 1.0, 1.0], dtype=np.float32)


class Exploration(Protocol):
    """What gathers experience."""

    def reset(self, mask: np.ndarray | None = None) -> None:
        """Draw new habits for the environments in `mask` (bool [n]), or for all."""

    def act(self, features: np.ndarray | None) -> np.ndarray:
        """Actions float32 [n, A] or int64 [n] for features float32 [n, F]; policies that do not look take None."""


class CorrelatedNoise:
    """The Ornstein-Uhlenbeck process, sampled exactly: mean 0, deviation 1, correlation exp(-k / tau) after k steps.

    Args:
        shape: Of the values; the first axis is the environments.
        generator: Source of its random numbers.
    """

    def __init__(self, shape: tuple[int, ...], generator: np.random.Generator) -> None:
        self.value = np.zeros(shape)
        self._decay = np.zeros(shape)
        self._generator = generator

    def reset(self, mask: np.ndarray, tau: np.ndarray) -> None:
        """Start the rows in `mask` from the stationary distribution; tau: correlation times of all rows [steps]."""
        drawn = self._generator.standard_normal(self.value.shape)
        self.value[mask] = drawn[mask]
        self._decay[mask] = np.exp(-1 / tau)[mask]

    def step(self) -> np.ndarray:
        """The next values."""
        drawn = self._generator.standard_normal(self.value.shape)
        self.value = self._decay * self.value + np.sqrt(1 - self._decay**2) * drawn
        return self.value


def log_uniform(generator: np.random.Generator, low: float, high: float, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers between low and high, every octave as likely as any other."""
    return np.exp(generator.uniform(np.log(low), np.log(high), shape))


class Wandering:
    """Drives CarRacing without looking: steering and gas wander, and now and then it brakes.

    Habits of an episode: the average gas (from a crawl to a skid), how far and how fast steering and gas wander, a
    slight pull to one side, how often it brakes and how hard. On the fast twin speeds spread from 0 to some 50 m/s, and
    three quarters of the time it is off the road or back on old tiles: cut episodes that are stuck.
    """

    def __init__(self, num_envs: int, seed: int | list[int]) -> None:
        self.num_envs = num_envs
        self._generator = np.random.default_rng(seed)
        self._noise = CorrelatedNoise((num_envs, 2), self._generator)
        self._mean, self._spread = np.zeros((num_envs, 2)), np.zeros((num_envs, 2))
        self._brake_chance, self._brake_force = np.zeros(num_envs), np.zeros(num_envs)
        self._braking = np.zeros(num_envs, dtype=np.int64)
        self.reset()

    def reset(self, mask: np.ndarray | None = None) -> None:
        """See `Exploration.reset`."""
        mask = _whole(mask, self.num_envs)
        draw, n = self._generator, self.num_envs
        tau = np.stack([log_uniform(draw, 4, 40, (n,)), log_uniform(draw, 10, 100, (n,))], 1)
        mean = np.stack([draw.normal(0, 0.04, n), draw.uniform(-0.1, 0.4, n)], 1)
        spread = np.stack([log_uniform(draw, 0.08, 0.6, (n,)), draw.uniform(0.05, 0.3, n)], 1)
        chance, force = draw.uniform(0, 0.02, n), draw.uniform(0.1, 0.9, n)
        self._noise.reset(mask, tau)
        self._mean[mask], self._spread[mask] = mean[mask], spread[mask]
        self._brake_chance[mask], self._brake_force[mask] = chance[mask], force[mask]
        self._braking[mask] = 0

    def act(self, features: np.ndarray | None = None) -> np.ndarray:
        """See `Exploration.act`; it does not look."""
        steer, gas = (self._mean + self._spread * self._noise.step()).T
        starts = self._generator.random(self.num_envs) < self._brake_chance
        lengths = self._generator.geometric(1 / 12, self.num_envs)
        self._braking = np.where(starts, lengths, np.maximum(self._braking - 1, 0))
        braking = self._braking > 0
        action = np.stack([steer, np.where(braking, 0, gas), np.where(braking, self._brake_force, 0)], 1)
        return np.clip(action, LOW, HIGH).astype(np.float32)


class RandomChoices:
    """Acts at random among whole numbers, and stays with what it chose: discrete worlds' wandering.

    Habits of an episode: how long an action lasts on average (1 to 32 steps, every octave as likely; lengths are geometric), and how
    much it likes each of them (uniform over all distributions).

    Args:
        choices: number of actions.
    """

    def __init__(self, num_envs: int, seed: int | list[int], choices: int) -> None:
        self.num_envs, self.choices = num_envs, choices
        self._generator = np.random.default_rng(seed)
        self._change, self._upto = np.zeros(num_envs), np.zeros((num_envs, choices))
        self._action = np.zeros(num_envs, np.int64)
        self.reset()

    def reset(self, mask: np.ndarray | None = None) -> None:
        """See `Exploration.reset`."""
        mask = _whole(mask, self.num_envs)
        change = 1 / log_uniform(self._generator, 1, 32, (self.num_envs,))
        upto = self._generator.dirichlet(np.ones(self.choices), self.num_envs).cumsum(1)
        self._change[mask], self._upto[mask] = change[mask], upto[mask]
        self._action[mask] = self._drawn()[mask]

    def act(self, features: np.ndarray | None = None) -> np.ndarray:
        """Actions int64 [n]; it does not look."""
        changes = self._generator.random(self.num_envs) < self._change
        self._action = np.where(changes, self._drawn(), self._action)
        return self._action

    def _drawn(self) -> np.ndarray:
        below = self._generator.random((self.num_envs, 1)) >= self._upto[:, :-1]
        return below.sum(1)


class NoisyChoices:
    """A trained controller of discrete actions that errs: now and then another will takes over for a while; noise on parameters.

    An episode's share of errors is uniform in [0, error]; each lasts 8 steps on average and acts as `RandomChoices` does.

    Args:
        params: float [P] of the controller. parameter_noise: as `NoisyController`'s.
    """

    def __init__(
        self, num_envs: int, seed: int, config: ControllerConfig, params: np.ndarray, error: float, parameter_noise: float
    ) -> None:  # fmt: skip
        self.num_envs, self._error, self._parameter_noise = num_envs, error, parameter_noise
        self._controller, self._base = Controller(config), np.array(params, dtype=np.float64)
        self._generator = np.random.default_rng(seed)
        self._other = RandomChoices(num_envs, [seed, 1], config.choices)
        self._share, self._erring = np.zeros(num_envs), np.zeros(num_envs, bool)
        self._params = np.zeros((num_envs, self._controller.num_parameters), dtype=np.float32)
        self.reset()

    def reset(self, mask: np.ndarray | None = None) -> None:
        """See `Exploration.reset`."""
        mask = _whole(mask, self.num_envs)
        draw, n = self._generator, self.num_envs
        share = draw.uniform(0, self._error, n)
        drawn = draw.uniform(0, 1, (n, 1)) * self._parameter_noise * draw.standard_normal(self._params.shape)
        self._share[mask], self._erring[mask] = share[mask], False
        self._params[mask] = (self._base + drawn)[mask]
        self._other.reset(mask)

    def act(self, features: np.ndarray | None) -> np.ndarray:
        """Actions int64 [n]."""
        own, other = _act_each(self._controller, self._params, features), self._other.act()
        ends = 1 / 8
        begins = ends * self._share / (1 - self._share)  # so that the stationary share is that of the episode
        self._erring = self._generator.random(self.num_envs) < np.where(self._erring, 1 - ends, begins)
        return np.where(self._erring, other, own)


class RandomControllers:
    """Controllers with random parameters, another for each episode ("World Models", section 3: the random policy).

    Parameters are N(0, s^2) with s uniform in [0, scale]: near 0 all outputs stay in the middle, and large ones jump
    from end to end.
    """

    def __init__(self, num_envs: int, seed: int | list[int], config: ControllerConfig, scale: float = 0.3) -> None:
        self.num_envs = num_envs
        self._controller, self._scale = Controller(config), scale
        self._generator = np.random.default_rng(seed)
        self._params = np.zeros((num_envs, self._controller.num_parameters), dtype=np.float32)
        self.reset()

    def reset(self, mask: np.ndarray | None = None) -> None:
        """See `Exploration.reset`."""
        mask = _whole(mask, self.num_envs)
        scale = self._generator.uniform(0, self._scale, (self.num_envs, 1))
        drawn = scale * self._generator.standard_normal(self._params.shape)
        self._params[mask] = drawn[mask]

    def act(self, features: np.ndarray | None) -> np.ndarray:
        """See `Exploration.act`."""
        return _act_each(self._controller, self._params, features)


class NoisyController:
    """A trained controller that errs: correlated noise on actions and noise on parameters, by episode.

    Args:
        params: float [P] of the controller, for example a population's mean.
        action_noise: Largest standard deviation of the noise on an action; an episode's is uniform in [0, this].
        parameter_noise: Largest standard deviation of the noise on parameters, a number or float [P] (a population's
            sigma times the roots of its variances); an episode's is uniform in [0, this].
    """

    def __init__(
        self,
        num_envs: int,
        seed: int | list[int],
        config: ControllerConfig,
        params: np.ndarray,
        action_noise: float = 0.5,
        parameter_noise: float | np.ndarray = 0.1,
    ) -> None:
        self.num_envs = num_envs
        self._controller, self._base = Controller(config), np.array(params, dtype=np.float64)
        self._action_noise, self._parameter_noise = action_noise, parameter_noise
        self._generator = np.random.default_rng(seed)
        self._noise = CorrelatedNoise((num_envs, 3), self._generator)
        self._strength = np.zeros((num_envs, 1))
        self._params = np.zeros((num_envs, self._controller.num_parameters), dtype=np.float32)
        self.reset()

    def reset(self, mask: np.ndarray | None = None) -> None:
        """See `Exploration.reset`."""
        mask = _whole(mask, self.num_envs)
        draw, n = self._generator, self.num_envs
        tau = np.broadcast_to(log_uniform(draw, 2, 30, (n, 1)), (n, 3))
        strength = draw.uniform(0, self._action_noise, (n, 1))
        drawn = draw.uniform(0, 1, (n, 1)) * self._parameter_noise * draw.standard_normal(self._params.shape)
        self._noise.reset(mask, tau)
        self._strength[mask] = strength[mask]
        self._params[mask] = (self._base + drawn)[mask]

    def act(self, features: np.ndarray | None) -> np.ndarray:
        """See `Exploration.act`."""
        action = _act_each(self._controller, self._params, features)
        steer, gas, brake = self._noise.step().T
        # Brakes err by excess only and seldom: noise of both signs on a foot at rest would brake half of the time.
        error = np.stack([steer, gas, np.maximum(brake - 1, 0)], 1)
        return np.clip(action + self._strength * error, LOW, HIGH).astype(np.float32)


def _whole(mask: np.ndarray | None, num_envs: int) -> np.ndarray:
    return np.ones(num_envs, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)


def _act_each(controller: Controller, params_nP: np.ndarray, features_nF: np.ndarray | None) -> np.ndarray:
    """Every environment has a controller of its own: [n, P], [n, F] -> [n, A]."""
    if features_nF is None:
        raise ValueError("this policy looks: act() takes features [n, F]")
    features = torch.from_numpy(np.ascontiguousarray(features_nF, dtype=np.float32))
    return controller.act(torch.from_numpy(params_nP), features[:, None, :])[:, 0].numpy()
