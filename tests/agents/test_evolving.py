"""Populations together: stopped anywhere and continued to the same bytes, migrants between them, and where they begin."""

from dataclasses import replace

import numpy as np
import pytest

from oneira.agents import evolving
from oneira.agents.controller import initial_parameters
from oneira.agents.evolution import Population
from oneira.agents.evolving import evolve
from oneira.agents.presets import carracing_quick
from oneira.agents.stages import drawn_model
from oneira.platform.errors import ConfigError
from oneira.platform.executor import SerialExecutor
from oneira.platform.runs import Run


class Stopping(SerialExecutor):
    """Stops after so many answers, as Ctrl-C would, or without a word."""

    def __init__(self, answers: int, why: type[BaseException] = KeyboardInterrupt) -> None:
        super().__init__()
        self.left, self.why = answers, why

    def wait(self, handles):
        if not self.left:
            raise self.why
        self.left -= 1
        return super().wait(handles)


class Unreliable(SerialExecutor):
    """Answers come in an order by chance, some after their work was done twice: lost and made again, or sent to two."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.chance, self.orders, self.twice = np.random.default_rng(seed), [], 0

    def wait(self, handles):
        self.orders.append(int(self.chance.integers(len(handles))))
        handle = list(handles)[self.orders[-1]]
        if self.chance.random() < 0.3:
            self.twice += 1
            self.submit(handle.function, handle.shared, handle.unit, threads=handle.threads).result()
        handle.run()
        return handle


@pytest.fixture(scope="module")
def config():
    small = carracing_quick().smoke()
    plan = small.rounds[1]
    populations = tuple(replace(p, generations=3, horizon=20) for p in plan.populations)
    return replace(small, rounds=(small.rounds[0], replace(plan, segments=1, populations=populations)))


def shared_of(config, executor):
    tree, rng = drawn_model(config), np.random.default_rng(0)
    sizes = {"z": config.memory.z, "h": config.memory.hidden, "c": config.memory.hidden}
    tree["starts"] = {name: rng.standard_normal((8, size)).astype(np.float32) for name, size in sizes.items()}
    tree["starts"]["reward_prev"] = np.zeros(8, np.float32)
    return executor.share(tree)


def run_evolution(config, run, executor):
    return {
        name: population.state()
        for name, population in evolve(config, 1, run, executor, shared_of(config, executor), {}).items()
    }


def same(a, b):
    return a[1] == b[1] and all(np.array_equal(a[0][key], b[0][key]) for key in a[0]) and set(a[0]) == set(b[0])


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    run = Run.create(tmp_path_factory.mktemp("evolving") / "whole", "carracing-quick", config)
    return run_evolution(config, run, SerialExecutor())


@pytest.mark.parametrize("answers", [1, 4, 10])
def test_evolution_stopped_within_a_generation_goes_on_to_the_same_bytes(config, whole, tmp_path, answers):
    """Before it ends it saves, so that no generation whose answers were all in is bred again: one is three answers, two units and the mean."""
    stopped = Run.create(tmp_path / "stopped", "carracing-quick", config)
    with pytest.raises(KeyboardInterrupt):
        run_evolution(config, stopped, Stopping(answers))
    left = Stopping(10**6)
    again = run_evolution(config, stopped, left)
    assert 10**6 - left.left == 2 * 3 * 3 - answers // 3 * 3
    assert set(again) == {"real", "dream"} and all(same(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize("answers", [4])
def test_evolution_killed_within_a_generation_goes_on_to_the_same_bytes(config, whole, tmp_path, monkeypatch, answers):
    monkeypatch.setattr(evolving, "SAVE_SECONDS", 0.0)
    killed = Run.create(tmp_path / "killed", "carracing-quick", config)
    with pytest.raises(SystemError):
        run_evolution(config, killed, Stopping(answers, SystemError))
    assert killed.checkpoints.exists("01-evolve")
    again = run_evolution(config, killed, SerialExecutor())
    assert set(again) == {"real", "dream"} and all(same(again[name], whole[name]) for name in whole)


def test_lost_doubled_and_reordered_answers_change_no_byte(config, whole, tmp_path):
    executor = Unreliable(seed=0)
    again = run_evolution(config, Run.create(tmp_path / "run", "carracing-quick", config), executor)
    assert any(executor.orders) and executor.twice > 2
    assert all(same(again[name], whole[name]) for name in whole)


def test_means_visit_each_other_at_the_end_of_a_segment(config):
    searches = []
    for number, p in enumerate(config.rounds[1].populations):
        population = Population(p.evolution, initial_parameters(config.controller) + number)
        searches.append(evolving._Search(p, population, 0))
    evolving._migrate(searches, last=False)
    for ours, other in (searches, searches[::-1]):
        np.testing.assert_array_equal(ours.population.ask()[-1], other.population.mean)
    for search in searches:
        search.population.tell(np.zeros(search.config.evolution.popsize))
    evolving._migrate(searches, last=True)  # nobody would meet the visitor any more
    assert not any(len(search.population._pending) for search in searches)


def test_a_population_starts_where_another_of_the_round_before_is(config, tmp_path):
    first = config.rounds[1]
    onward = replace(first.populations[0], name="after", start="dream", generations=0)
    longer = replace(config, rounds=(*config.rounds, replace(first, populations=(onward,))))
    run, executor = Run.create(tmp_path / "run", "carracing-quick", longer), SerialExecutor()
    before = evolve(longer, 1, run, executor, shared_of(longer, executor), {})
    after = evolve(longer, 2, run, executor, shared_of(longer, executor), before)["after"]
    np.testing.assert_array_equal(after.mean, before["dream"].mean)
    np.testing.assert_allclose(after.covariance, before["dream"].covariance)
    assert after.sigma == before["dream"].sigma


def test_a_start_that_is_not_there_is_named(config):
    first = config.rounds[1]
    with pytest.raises(ConfigError, match=r"starts from .dreem.\. Did you mean .dream."):
        replace(
            config, rounds=(*config.rounds, replace(first, populations=(replace(first.populations[0], start="dreem"),)))
        )
