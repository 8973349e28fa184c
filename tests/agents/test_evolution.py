"""Evolution learns, ranks what is not finite last, and goes on from a saved state as if it had never stopped."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from cma.sampler import GaussFullSampler
from safetensors.torch import load, save

from oneira.agents.evolution import CovarianceSampler, EvolutionConfig, Population, eigh_on_one_thread
from oneira.platform.errors import CheckpointError, ConfigError, DataError, NumericalError, UsageError

KINDS = ["full", "separable"]


def sphere(x: np.ndarray) -> np.ndarray:
    return -((x - 1) ** 2).sum(-1)


def ellipsoid(x: np.ndarray) -> np.ndarray:
    return -((x - 1) ** 2 @ np.logspace(0, 4, x.shape[-1]))


def through_files(population: Population) -> Population:
    """State to the bytes of a safetensors file and of a JSON document, and a new population from them."""
    tensors, meta = population.state()
    data = save({name: torch.from_numpy(value) for name, value in tensors.items()})
    return Population.from_state(population.config, load(data), json.loads(json.dumps(meta)))


def assert_same(a: Population, b: Population) -> None:
    (tensors_a, meta_a), (tensors_b, meta_b) = a.state(), b.state()
    assert meta_a == meta_b
    assert tensors_a.keys() == tensors_b.keys()
    for name in tensors_a:
        assert tensors_a[name].tobytes() == tensors_b[name].tobytes(), name
    assert a.mean.tobytes() == b.mean.tobytes() and a.covariance.tobytes() == b.covariance.tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("problem", "dimensions", "generations"), [(sphere, 20, 150), (ellipsoid, 10, 250)])
def test_it_climbs(kind, problem, dimensions, generations):
    """From 20 or some 20000 below the top to a hundred-thousandth of one: a wrong order of ranks leads away."""
    population = Population(EvolutionConfig(kind=kind, popsize=16, sigma0=0.3, seed=1), np.zeros(dimensions))
    for _ in range(generations):
        population.tell(problem(population.ask()))
    assert problem(population.mean) > -1e-5
    assert population.generation == generations


def test_separable_learns_the_scale_of_each_parameter():
    population = Population(EvolutionConfig(popsize=16, sigma0=0.3, seed=2), np.zeros(10))
    for _ in range(200):
        population.tell(ellipsoid(population.ask()))
    spread = np.sqrt(population.covariance)
    assert spread[0] / spread[-1] > 20, "the weights differ 10^4-fold, so the best spreads differ 100-fold"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", [False, True], ids=["after-tell", "after-ask"])
def test_a_continued_population_is_byte_identical(kind, asked):
    """150 parameters: full covariance is decomposed in some generations and not in others."""
    config = EvolutionConfig(kind=kind, popsize=16, seed=3)
    problem = ellipsoid
    whole, stopped = Population(config, np.zeros(150)), Population(config, np.zeros(150))
    for generation in range(12):
        if asked:
            stopped.ask()
        if generation in (0, 1, 2, 5, 6, 9, 11):
            stopped = through_files(stopped)
        assert whole.ask().tobytes() == stopped.ask().tobytes()
        for population in (whole, stopped):
            population.tell(problem(population.ask()))
            if generation == 4:
                population.inject(np.full((2, 150), 0.2))
    assert_same(whole, stopped)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_does_not_change_with_its_population(kind):
    population = Population(EvolutionConfig(kind=kind, popsize=8), np.zeros(5))
    population.tell(sphere(population.ask()))
    tensors, meta = population.state()
    before = {name: value.copy() for name, value in tensors.items()}
    for _ in range(3):
        population.tell(sphere(population.ask()))
    for name, value in tensors.items():
        np.testing.assert_array_equal(value, before[name])
    assert Population.from_state(population.config, tensors, meta).generation == 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_ranks_last(kind):
    """Telling NaN or an infinity is telling the worst number there is."""
    config = EvolutionConfig(kind=kind, popsize=12, seed=4)
    broken, low = Population(config, np.zeros(6)), Population(config, np.zeros(6))
    for _ in range(5):
        fitness = sphere(broken.ask())
        best = np.argsort(fitness)[-3:]
        bad, worst = fitness.copy(), fitness.copy()
        bad[best] = [np.nan, np.inf, -np.inf]
        worst[best] = -1e30
        low.ask()
        broken.tell(bad)
        low.tell(worst)
    assert_same(broken, low)


def test_no_finite_fitness_is_an_error_that_loses_nothing():
    population = Population(EvolutionConfig(popsize=8), np.zeros(4))
    asked = population.ask()
    with pytest.raises(NumericalError, match="generation 0"):
        population.tell(np.full(8, np.nan))
    assert population.ask().tobytes() == asked.tobytes()


def test_only_the_order_of_fitness_counts():
    a, b = (Population(EvolutionConfig(popsize=12, seed=5), np.zeros(6)) for _ in range(2))
    for _ in range(4):
        a.tell(sphere(a.ask()))
        b.tell(np.arctan(sphere(b.ask())) * 3 + 7)
    assert_same(a, b)


def test_ask_repeats_itself_and_tell_wants_an_ask():
    population = Population(EvolutionConfig(popsize=8), np.zeros(4))
    with pytest.raises(UsageError, match="ask"):
        population.tell(np.zeros(8))
    first = population.ask()
    first[:] = 9
    assert not np.array_equal(population.ask(), first), "a caller's changes do not reach the population"
    with pytest.raises(DataError, match=r"\(7,\)"):
        population.tell(np.zeros(7))


def test_candidates_come_in_pairs_around_the_mean():
    for kind in KINDS:
        population = Population(EvolutionConfig(kind=kind, popsize=9), np.zeros(4))
        population.tell(sphere(population.ask()))
        offset = population.ask() - population.mean
        np.testing.assert_allclose(offset[0:8:2], -offset[1:8:2], atol=1e-12)
        single = Population(EvolutionConfig(kind=kind, popsize=8, mirrored=False), np.zeros(4)).ask()
        assert np.abs(single[0] + single[1]).max() > 1e-3


def test_the_global_random_numbers_are_left_alone():
    np.random.seed(0)
    expected = np.random.get_state()[1].copy()
    population = Population(EvolutionConfig(popsize=8), np.zeros(4))
    population.tell(sphere(population.ask()))
    np.testing.assert_array_equal(np.random.get_state()[1], expected)


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_a_world_starts_from_the_other_worlds_distribution(source, target):
    world = Population(EvolutionConfig(kind=source, popsize=16, seed=6), np.zeros(5))
    for _ in range(60):
        world.tell(ellipsoid(world.ask()))
    other = Population(EvolutionConfig(kind=target, popsize=3000, seed=7, mirrored=False), np.zeros(5))
    other.tell(sphere(other.ask()))
    other.restart_from(world.mean, world.sigma, world.covariance)
    assert other.generation == 1
    variances = np.diag(world.covariance) if source == "full" else world.covariance
    asked = other.ask()
    np.testing.assert_allclose(asked.std(0), world.sigma * np.sqrt(variances), rtol=0.1)
    np.testing.assert_allclose(asked.mean(0), world.mean, atol=0.1 * world.sigma * np.sqrt(variances.max()))
    if source == target == "full":
        np.testing.assert_allclose(other.covariance, world.covariance, rtol=1e-12)
    other.tell(ellipsoid(asked))
    assert_same(through_files(other), other)


def test_a_migrant_is_a_candidate_of_the_next_generation_and_draws_the_mean():
    for kind in KINDS:
        population = Population(EvolutionConfig(kind=kind, popsize=16, seed=8), np.zeros(30))
        migrant = np.full(30, 50.0)
        population.ask()
        population.inject(migrant)
        assert not (population.ask() == migrant).all(1).any(), "these candidates are already out"
        population.tell(sphere(population.ask()))
        restored = through_files(population)
        before = population.mean
        np.testing.assert_array_equal(population.ask()[-1], migrant)
        assert_same(through_files(population), population)
        fitness = -((population.ask() - migrant) ** 2).sum(1)
        population.tell(fitness)
        restored.ask()
        restored.tell(fitness)
        assert_same(restored, population)
        step = population.mean - before
        assert step.sum() / np.linalg.norm(step) / np.sqrt(30) > 0.3, "towards the migrant"
        assert np.linalg.norm(step) < 10 * 0.1 * np.sqrt(30), "no further than a candidate of its own could draw it"
        assert not (population.ask() == migrant).all(1).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_migrant_does_no_harm(kind):
    """Told as the worst, it changes nothing about where it came from: it could be anywhere."""
    results = []
    for position in (20.0, -300.0):
        population = Population(EvolutionConfig(kind=kind, popsize=16, seed=9), np.zeros(10))
        population.inject(np.full(10, position))
        fitness = sphere(population.ask())
        fitness[-1] = -1e9
        population.tell(fitness)
        results.append(population)
    assert_same(*results)


def test_impossible_requests_are_refused():
    population = Population(EvolutionConfig(popsize=8), np.zeros(4))
    with pytest.raises(UsageError, match="at most 2"):
        population.inject(np.zeros((3, 4)))
    with pytest.raises(DataError, match="4"):
        population.inject(np.zeros((1, 5)))
    with pytest.raises(DataError, match="positive"):
        population.restart_from(np.zeros(4), 0.1, -np.ones(4))
    population.ask()
    with pytest.raises(UsageError, match="tell"):
        population.restart_from(np.zeros(4))
    with pytest.raises(DataError, match="two or more"):
        Population(EvolutionConfig(), np.zeros(1))
    tensors, meta = population.state()
    with pytest.raises(CheckpointError, match="'separable'"):
        Population.from_state(EvolutionConfig(kind="full", popsize=8), tensors, meta)
    with pytest.raises(CheckpointError, match=r"\(16, 4\)"):
        Population.from_state(EvolutionConfig(popsize=16), tensors, meta)
    for wrong in ({"kind": "fulll"}, {"popsize": 3}, {"sigma0": 0.0}, {"mean_rate": 1.5}, {"seed": -1}):
        with pytest.raises(ConfigError, match=str(next(iter(wrong.values())))):
            EvolutionConfig(**wrong)


def test_the_sampler_updates_the_covariance_as_cma_does():
    rng = np.random.default_rng(10)
    ours, theirs = CovarianceSampler(np.ones(20), rng.standard_normal), GaussFullSampler(np.ones(20))
    for _ in range(5):
        vectors, weights = rng.standard_normal((9, 20)), np.linspace(0.1, -0.05, 9)
        for sampler in (ours, theirs):
            sampler.update(vectors.copy(), weights)
            sampler.update_now(-1)
        np.testing.assert_allclose(ours.C, theirs.C, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose((ours.B * ours.D**2) @ ours.B.T, ours.C, atol=1e-12)


def test_the_decomposition_does_not_depend_on_threads():
    rng = np.random.default_rng(11)
    factor = rng.standard_normal((300, 40))
    matrix = np.eye(300) + factor @ factor.T
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            answers.append(eigh_on_one_thread(matrix))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert answers[0][0].tobytes() == answers[1][0].tobytes() and answers[0][1].tobytes() == answers[1][1].tobytes()
