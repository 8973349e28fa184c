"""Several populations at once on one pool of workers, each in its world, dream or real.

A generation of a population is a few fixed units of work (`fitness`); as soon as its last answer is in, the population is told and asks
again, whatever the others do. Populations meet only at the ends of segments, at fixed generations, so that who was faster changes
nothing. All of them are saved together, between generations, and continue from there byte for byte.

Seeds: a generation's tracks or dreams follow from (run seed, round, population, generation), the same for all its candidates
(common random numbers). Training tracks are drawn from [0, 2^24).

Shapes: P parameters, lambda candidates, S episodes each.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from oneira.platform.executor import Executor
from oneira.platform.runs import Run

from .controller import initial_parameters
from .evolution import Population
from .fitness import dream_unit, real_unit
from .settings import PopulationConfig, RoundConfig, WorldModelConfig

TRAINING_SEEDS = 2**24
SAVE_SECONDS = 30.0  # of evolution that a kill may cost


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed for a place in a run, named by numbers and words."""
    entropy = [zlib.crc32(p.encode()) if isinstance(p, str) else int(p) for p in parts]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def track_seeds(count: int, *parts: int | str) -> list[int]:
    """That many training tracks for a place in a run."""
    return [int(s) for s in np.random.default_rng(seed_of(*parts)).integers(0, TRAINING_SEEDS, count)]


def units_of(config: PopulationConfig, params: np.ndarray, episodes: int, *place: int | str) -> list[dict[str, Any]]:
    """Units of work that measure `params` [K, P] in the population's world; K need not be the population's size."""
    common: dict[str, Any]
    if config.world == "real":
        common = {"seeds": track_seeds(episodes, *place), "max_steps": config.horizon, "stuck": config.stuck}
    else:
        common = {"seed": seed_of(*place), "rollouts": episodes, "horizon": config.horizon, "tau": config.tau}
        common |= {"stuck": config.stuck, "lost_cost": config.lost_cost}
    params = np.asarray(params, np.float32)
    return [{"params": params[i : i + config.unit], **common} for i in range(0, len(params), config.unit)]


class _Search:
    """A population under way: its generation's units, and what came back."""

    def __init__(self, config: PopulationConfig, population: Population, told: int) -> None:
        self.config, self.population = config, population
        self.told = told  # generations of this round
        self.function = real_unit if config.world == "real" else dream_unit
        self.answers: dict[int, dict[str, Any]] = {}
        self.num_units = 0
        self.started = 0.0
        self.env_steps = 0
        self.mean_of_mean = float("nan")

    def log(self, run: Run, round_index: int, searches: list[_Search], fitness: np.ndarray, began: float) -> None:
        now, place = time.perf_counter(), searches.index(self)
        same_world = [s for s in searches if s.config.world == self.config.world]
        extra = {} if np.isnan(self.mean_of_mean) else {"mean_of_mean": self.mean_of_mean}
        steps = sum(a["env_steps"] for a in self.answers.values())
        self.env_steps += steps
        run.log(
            f"evolve-{self.config.world}",
            round_index * 1_000_000 + place * 100_000 + self.told,
            population=self.config.name,
            world=self.config.world,
            round=round_index,
            generation=self.population.generation,
            mean=float(np.nanmean(fitness)),
            best=float(np.nanmax(fitness)),
            sigma=self.population.sigma,
            env_steps=steps,
            seconds=now - self.started,
            wall_s=now - began,
            at=sum(s.told for s in same_world),
            total=sum(s.config.generations for s in same_world),
            **extra,
        )


def evolve(
    config: WorldModelConfig, round_index: int, run: Run, executor: Executor, shared: Any, before: dict[str, Population]
) -> dict[str, Population]:
    """Run a round's populations to their last generation.

    Args:
        shared: the executor's handle of the packed world model with its starts. before: populations of the last round.

    Returns:
        Populations by name. Saved as checkpoint "RR-evolve".
    """
    plan = config.rounds[round_index]
    name = f"{round_index:02d}-evolve"
    searches, segment = _restore(config, plan, run, name, before)
    save = _saver(run, name, searches)
    began = time.perf_counter()
    while segment < plan.segments:
        goals = {s.config.name: s.config.generations * (segment + 1) // plan.segments for s in searches}
        _segment(config, round_index, run, executor, shared, searches, goals, began, save, segment)
        _migrate(searches, last=segment + 1 == plan.segments)
        segment += 1
        save(segment)
    return {s.config.name: s.population for s in searches}


def _restore(
    config: WorldModelConfig, plan: RoundConfig, run: Run, name: str, before: dict[str, Population]
) -> tuple[list[_Search], int]:
    """Populations as the checkpoint holds them, or new ones; `told` counts the generations of this round."""
    kept = run.checkpoints.load(name) if run.checkpoints.exists(name) else None
    searches = []
    for p in plan.populations:
        if kept is not None:
            tensors = {
                k.removeprefix(f"{p.name}/"): v.numpy() for k, v in kept.tensors.items() if k.startswith(f"{p.name}/")
            }
            population, told = (
                Population.from_state(p.evolution, tensors, kept.meta[p.name]["state"]),
                kept.meta[p.name]["told"],
            )
        elif p.name in before and not plan.restart:
            population, told = Population.from_state(p.evolution, *before[p.name].state()), 0
        else:
            population, told = Population(p.evolution, initial_parameters(config.controller)), 0
            if p.start in before:
                other = before[p.start]
                population.restart_from(other.mean, other.sigma, other.covariance)
        searches.append(_Search(p, population, told))
    return searches, 0 if kept is None else kept.meta["segment"]


def _saver(run: Run, name: str, searches: list[_Search]) -> Callable[[int], None]:
    def save(segment: int) -> None:
        tensors: dict[str, np.ndarray] = {}
        meta: dict[str, Any] = {"segment": segment}
        for s in searches:
            arrays, state = s.population.state()
            tensors |= {f"{s.config.name}/{k}": np.asarray(v) for k, v in arrays.items()}
            meta[s.config.name] = {"state": state, "told": s.told}
        step = segment + 1000 * sum(s.told for s in searches)
        run.checkpoints.save(name, tensors, meta, step=step)

    return save


def _segment(
    config: WorldModelConfig, round_index: int, run: Run, executor: Executor, shared: Any, searches: list[_Search],
    goals: dict[str, int], began: float, save: Callable[[int], None], segment: int,
) -> None:  # fmt: skip
    """Generations of all populations up to their goals, interleaved as answers come."""
    pending: dict[Any, tuple[_Search, int]] = {}
    saved = time.perf_counter()

    def ask(s: _Search) -> None:
        if s.told >= goals[s.config.name]:
            return
        place = (config.seed, "evolve", round_index, s.config.name, s.population.generation)
        units = units_of(s.config, s.population.ask(), s.config.episodes, *place)
        if s.population.generation % s.config.check_every == 0:
            check = (
                "check",
                config.seed,
                round_index,
            )  # the same places every time, so that a curve's changes are the controller's
            units += units_of(s.config, s.population.best_mean()[None], 16, *check)
        s.started, s.num_units, s.answers = time.perf_counter(), len(units), {}
        for i, unit in enumerate(units):
            pending[executor.submit(s.function, shared, unit)] = (s, i)

    for s in searches:
        ask(s)
    while pending:
        try:
            handle = executor.wait(pending.keys())
        except KeyboardInterrupt:  # or SIGTERM: between two answers every population is whole
            save(segment)
            raise
        s, i = pending.pop(handle)
        s.answers[i] = handle.result()
        if len(s.answers) < s.num_units:
            continue
        size = s.config.evolution.popsize // s.config.unit
        fitness = np.concatenate([s.answers[i]["returns"] for i in range(size)]).mean(1)
        s.mean_of_mean = float(s.answers[size]["returns"].mean()) if s.num_units > size else float("nan")
        s.population.tell(fitness)
        s.told += 1
        s.log(run, round_index, searches, fitness, began)
        if time.perf_counter() - saved > SAVE_SECONDS:  # when to save changes no result
            save(segment)
            saved = time.perf_counter()
        ask(s)


def _migrate(searches: list[_Search], last: bool) -> None:
    """Each population's mean visits all others as a candidate of their next generation; whether it stays, its fitness there decides."""
    if last or len(searches) < 2:
        return
    means = {s.config.name: s.population.mean.copy() for s in searches}
    for s in searches:
        visitors = [mean for name, mean in means.items() if name != s.config.name]
        s.population.inject(np.stack(visitors[: s.config.evolution.popsize // 4]))
