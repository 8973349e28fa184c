"""Exploration: actions in range, habits that last an episode, and the same seed drives the same."""

from __future__ import annotations

import numpy as np
import pytest

from oneira.agents.controller import Controller, ControllerConfig, num_parameters
from oneira.agents.exploration import HIGH, LOW, CorrelatedNoise, NoisyController, RandomControllers, Wandering

CONFIG = ControllerConfig(z=4, memory=6)
PARAMS = np.random.default_rng(0).standard_normal(num_parameters(CONFIG)) * 0.5
POLICIES = {
    "wandering": lambda n, seed: Wandering(n, seed),
    "random": lambda n, seed: RandomControllers(n, seed, CONFIG),
    "noisy": lambda n, seed: NoisyController(n, seed, CONFIG, PARAMS),
}


def drive(policy, steps: int = 50) -> np.ndarray:
    """Actions [steps, n, 3] on features that are the same at every call."""
    rng = np.random.default_rng(1)
    features = rng.standard_normal((steps, policy.num_envs, CONFIG.num_features)).astype(np.float32)
    return np.stack([policy.act(row) for row in features])


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_actions_are_in_range_and_follow_the_seed(make):
    actions = drive(make(16, 3))
    assert actions.dtype == np.float32 and actions.shape == (50, 16, 3)
    assert (actions >= LOW).all() and (actions <= HIGH).all()
    np.testing.assert_array_equal(actions, drive(make(16, 3)))
    assert not np.array_equal(actions, drive(make(16, 4)))
    assert not np.array_equal(actions, drive(make(16, [3, 1])))


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_reset_gives_new_habits_to_the_ended_alone(make):
    policy = make(8, 5)
    before = {name: np.copy(value) for name, value in vars(policy).items() if isinstance(value, np.ndarray)}
    mask = np.arange(8) % 3 == 0
    policy.reset(mask)
    drawn = [name for name in before if not np.array_equal(before[name], getattr(policy, name))]
    assert drawn, "some habit is new"
    for name in drawn:
        if before[name].shape[:1] == (8,):
            np.testing.assert_array_equal(getattr(policy, name)[~mask], before[name][~mask])
            assert (getattr(policy, name)[mask] != before[name][mask]).all()


def test_correlated_noise_is_what_its_formula_says():
    noise = CorrelatedNoise((4000, 1), np.random.default_rng(6))
    noise.reset(np.ones(4000, dtype=bool), np.full((4000, 1), 5.0))
    values = np.stack([noise.value.copy(), *(noise.step().copy() for _ in range(20))])[..., 0]
    np.testing.assert_allclose(values.std(1), 1, atol=0.06)
    for k in (1, 5, 15):
        np.testing.assert_allclose((values[0] * values[k]).mean(), np.exp(-k / 5), atol=0.06)


def test_wandering_episodes_differ_in_speed_and_some_brake():
    actions = drive(Wandering(64, 7), 400)
    gas, brake = actions[..., 1].mean(0), actions[..., 2]
    assert gas.min() < 0.08 and gas.max() > 0.3
    assert 0.02 < (brake > 0).mean() < 0.3
    assert (actions[..., 1][brake > 0] == 0).all(), "one foot"
    steer = actions[..., 0] - actions[..., 0].mean(0)
    correlation = (steer[1:] * steer[:-1]).mean() / (steer**2).mean()
    assert correlation > 0.8, "a step is 1/50 s; hands do not jump"


def test_without_noise_it_is_the_controller():
    features = np.random.default_rng(8).standard_normal((5, CONFIG.num_features)).astype(np.float32)
    exact = NoisyController(5, 9, CONFIG, PARAMS, action_noise=0, parameter_noise=0)
    np.testing.assert_allclose(exact.act(features), Controller(CONFIG).act_numpy(PARAMS, features), atol=1e-6)
    per_parameter = np.zeros(len(PARAMS))
    per_parameter[-3] = 5  # the bias of steering
    moved = NoisyController(5, 9, CONFIG, PARAMS, 0, per_parameter).act(features) - exact.act(features)
    assert (moved[:, 0] != 0).any() and np.abs(moved[:, 1:]).max() < 1e-6


def test_a_policy_that_looks_wants_features():
    with pytest.raises(ValueError, match="features"):
        RandomControllers(2, 0, CONFIG).act(None)
