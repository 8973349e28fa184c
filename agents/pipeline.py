"""A world-model run from its first episode to its report: rounds of collect -> V -> M -> evolve -> check.

`train(config, run, executor)` is what `oneira train` and `oneira resume` call. Every stage looks at the run first and does only what is
missing; each commits its result before the next begins. "World Models" (Ha & Schmidhuber 2018), section 5, is the procedure.

After each round the mean of every population drives `checks` tracks of the fast twin of the real world; the best controller so far of
each world is kept. At the end those are scored on the reference environment.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from oneira.platform.checkpoints import Checkpoint, json_bytes, write_replacing
from oneira.platform.devices import num_cores
from oneira.platform.executor import Executor
from oneira.platform.runs import Run

from .environments import make_world
from .evaluation import DEFAULT_SEED, evaluate_reference, promises_too_much, rank_correlation, reported_seeds
from .evolution import Population
from .evolving import evolve, seed_of, track_seeds
from .fitness import dream_unit, real_unit
from .populations import score_populations
from .settings import PopulationConfig, WorldModelConfig
from .stages import collect, fit_memory, fit_vision, packed_model

DREAM_STEPS = 200  # of the dreams in which a population from the real world is looked at


def train(config: WorldModelConfig, run: Run, executor: Executor) -> dict[str, Any]:
    """Run what is missing of a run. Returns its summary: scores and where the time went."""
    populations: dict[str, Population] = {}
    shared: Any = None
    controllers: list[np.ndarray] = []
    _drop_leftovers(run)
    for index in range(len(config.rounds)):
        shared, populations, controllers = _round(config, index, run, executor, shared, populations, controllers)
    scores = _final_scores(config, run, executor)
    if config.population_episodes:
        with _timed(run, executor, "populations", len(config.rounds)):
            score_populations(config, run, executor)
    with _timed(run, executor, "film", len(config.rounds)):
        _pictures(config, run)
    return {**scores, "seconds": sum(line["seconds"] for line in run.metrics("stage"))}


def _round(
    config: WorldModelConfig, index: int, run: Run, executor: Executor, shared: Any, populations: dict[str, Population],
    controllers: list[np.ndarray],
) -> tuple[Any, dict[str, Population], list[np.ndarray]]:  # fmt: skip
    plan, kept = config.rounds[index], run.checkpoints
    vision, memory, check = (f"{index:02d}-{stage}" for stage in ("vision", "memory", "check"))
    if not kept.exists(memory):
        with _timed(run, executor, "collect", index):
            collect(config, index, run, executor, shared, controllers)
        if plan.vision is not None and not kept.exists(vision):
            with _timed(run, executor, "vision", index):
                precursor = _last(run, "vision", index)
                executor.submit(
                    fit_vision, None, {"run": str(run.path), "round": index, "precursor": precursor}, threads=0
                ).result()
        with _timed(run, executor, "memory", index):
            unit = {
                "run": str(run.path), "round": index, "vision": _last(run, "vision", index + 1),
                "precursor": "" if plan.restart else _last(run, "memory", index),
            }  # fmt: skip
            executor.submit(fit_memory, None, unit, threads=0).result()
    tree = packed_model(run, config, memory)
    shared = executor.share(tree)
    with _timed(run, executor, "evolve", index):
        populations = evolve(config, index, run, executor, shared, populations)
    if not kept.exists(check):
        with _timed(run, executor, "check", index):
            _check(config, index, run, executor, shared, populations)
    return shared, populations, [p.best_mean() for p in populations.values()] or controllers


def _drop_leftovers(run: Run) -> None:
    """States of training whose result is there already: a kill between the two leaves them."""
    for name in run.checkpoints.names():
        done, fit, _ = name.partition("-fit")
        if fit and run.checkpoints.exists(done):
            run.checkpoints.delete(name)


def _last(run: Run, stage: str, before: int) -> str:
    """Name of the newest checkpoint of a stage from a round before `before`, or ""."""
    names = [f"{r:02d}-{stage}" for r in range(before) if run.checkpoints.exists(f"{r:02d}-{stage}")]
    return names[-1] if names else ""


@contextmanager
def _timed(run: Run, executor: Executor, stage: str, index: int) -> Iterator[None]:
    """Log how long a stage took and how long units of work ran. A stage that is entered again adds to what it took before."""
    began, worked = time.perf_counter(), executor.core_seconds
    yield
    order = ("collect", "vision", "memory", "evolve", "check", "score", "film", "populations")
    step = index * len(order) + order.index(stage)
    before = next(
        (line for line in run.metrics("stage") if line["step"] == step), {"seconds": 0.0, "core_seconds": 0.0}
    )
    run.log(
        "stage", step, name=stage, round=index, seconds=before["seconds"] + time.perf_counter() - began,
        core_seconds=before["core_seconds"] + executor.core_seconds - worked, cores=num_cores(),
    )  # fmt: skip


# ---- the check at the end of a round


def _check(
    config: WorldModelConfig, index: int, run: Run, executor: Executor, shared: Any, populations: dict[str, Population]
) -> None:
    """Measure every population's mean in the real world's twin and in the dream; keep the best of each world."""
    best = _carry_over(run, index)
    dreams = any(plan.memory is not None for plan in config.rounds[: index + 1])  # an M as drawn dreams of nothing
    for p in config.rounds[index].populations:
        population = populations[p.name]
        real = _measure(
            config, executor, shared, p, population.best_mean()[None], config.checks, "real", ("check-end", index)
        )
        entry: dict[str, Any] = {
            "real_mean": float(real.mean()), "real_std": float(real.std(ddof=1)),
            "memory": f"{index:02d}-memory", "round": index, "population": p.name,
        }  # fmt: skip
        dream = _dream_check(config, index, run, executor, shared, p, population, entry["real_mean"]) if dreams else {}
        place = index * 100 + config.rounds[index].populations.index(p)
        scores = {"real_mean": entry["real_mean"], "real_std": entry["real_std"], **dream}
        run.log("check", place, round=index, population=p.name, world=p.world, **scores)
        if p.world not in best or entry["real_mean"] > best[p.world][0]["real_mean"]:
            best[p.world] = (entry, population.best_mean())
    name = f"{index:02d}-check"
    tensors = {world: params for world, (_, params) in best.items()}
    run.checkpoints.save(name, tensors, {"checks": {world: entry for world, (entry, _) in best.items()}})


def _dream_check(
    config: WorldModelConfig, index: int, run: Run, executor: Executor, shared: Any, p: PopulationConfig, population: Population,
    real_mean: float,
) -> dict[str, float]:  # fmt: skip
    """What the dream thinks of a population's mean, and whether to believe it."""
    horizon = p.horizon if p.world == "dream" else DREAM_STEPS
    place = ("check-end", index)
    dream = float(_measure(config, executor, shared, p, population.best_mean()[None], 64, "dream", place).mean())
    correlation = _rank_correlation(config, index, run, executor, shared, p, population)
    rings = alarm(correlation, dream / horizon, real_mean / make_world(config.world).max_steps)
    return {"dream_mean": dream, "rank_correlation": correlation, "alarm": int(rings)}


def alarm(correlation: float, dream_per_step: float, real_per_step: float) -> bool:
    """The dream-exploit alarm.

    It rings when the order in which the dream puts candidates says nothing about their order in reality (rank correlation at most 0),
    or when the dream promises more than half again what reality pays for a step, and 0.3 beyond.
    """
    return correlation <= 0 or promises_too_much(dream_per_step, real_per_step)


def _carry_over(run: Run, index: int) -> dict[str, tuple[dict[str, Any], np.ndarray]]:
    before = _last(run, "check", index)
    if not before:
        return {}
    kept = run.checkpoints.load(before)
    return {world: (entry, kept.tensors[world].numpy()) for world, entry in kept.meta["checks"].items()}


def _measure(
    config: WorldModelConfig, executor: Executor, shared: Any, p: PopulationConfig, params: np.ndarray, episodes: int, world: str,
    place: tuple[int | str, ...],
) -> np.ndarray:  # fmt: skip
    """Returns float64 [K * episodes] of `params` [K, P] in a world; full episodes in the real one."""
    if world == "real":
        seeds = track_seeds(episodes, config.seed, *place)
        half = -(-episodes // 2)
        common = {"params": np.asarray(params, np.float32), "max_steps": make_world(config.world).max_steps, "stuck": 0}
        units = [{**common, "seeds": part} for part in (seeds[:half], seeds[half:]) if part]
        answers = executor.map(real_unit, shared, units)
        return np.concatenate([a["returns"] for a in answers], 1)
    horizon = p.horizon if p.world == "dream" else DREAM_STEPS
    unit = {
        "params": np.asarray(params, np.float32), "seed": seed_of(config.seed, *place), "rollouts": episodes, "horizon": horizon,
        "tau": p.tau, "stuck": p.stuck, "lost_cost": 0.0,
    }  # fmt: skip
    return next(iter(executor.map(dream_unit, shared, [unit])))["returns"]


def _rank_correlation(
    config: WorldModelConfig,
    index: int,
    run: Run,
    executor: Executor,
    shared: Any,
    p: PopulationConfig,
    population: Population,
) -> float:
    """Spearman's rank correlation between dream and real returns of 16 candidates spread around the mean."""
    candidates = population.ask()[:16]
    real = _measure(config, executor, shared, p, candidates, 4, "real", ("rank", index)).mean(1)
    dream = _measure(config, executor, shared, p, candidates, 32, "dream", ("rank", index)).mean(1)
    place = index * 10_000 + 100 * config.rounds[index].populations.index(p)
    for i, (d, r) in enumerate(zip(dream, real, strict=True)):
        run.log("candidate", place + i, round=index, population=p.name, dream=float(d), real=float(r))
    return rank_correlation(dream, real)


# ---- the end of a run


def newest(run: Run, stage: str) -> str:
    """Name of the newest checkpoint of a stage ("vision", "memory", "check"), or ""."""
    return _last(run, stage, len(run.config.rounds))


def latest_agents(run: Run) -> Checkpoint | None:
    """The newest check: the best controller of each world so far, and what it scored."""
    name = newest(run, "check")
    return run.checkpoints.load(name) if name else None


def _final_scores(config: WorldModelConfig, run: Run, executor: Executor) -> dict[str, Any]:
    """Score the best controller on the reference environment, once; kept as evaluations/best.json."""
    from .agent import agent_tree

    place = run.path / "evaluations" / "best.json"
    if config.check_episodes and not place.exists():
        with _timed(run, executor, "score", len(config.rounds)):
            tree = agent_tree(run)
            score = evaluate_reference(tree, reported_seeds(config.check_episodes), executor, world=config.world)
            place.parent.mkdir(exist_ok=True)
            write_replacing(place, json_bytes(score))
    if not place.exists():
        return {}
    score = json.loads(place.read_text(encoding="utf-8"))
    return {f"real_{key}": score[key] for key in ("mean", "std", "ci95", "episodes")}


def _pictures(config: WorldModelConfig, run: Run) -> None:
    """What the report shows: reconstructions, and a film of the real world beside the dream."""
    from .showing import film, reconstructions

    reconstructions(run)
    place = run.media("real-and-dream.mp4")
    if config.film_steps and not place.exists():
        film(run, place, world="both", seed=DEFAULT_SEED, steps=config.film_steps)
