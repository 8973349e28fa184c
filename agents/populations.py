"""Every population of a run scored for itself, in its dream and in the real game: what a study of temperatures asks for.

The mean of each population's distribution plays episodes of the reference environment and of the dream at the population's own
temperature; both scores lie in evaluations/populations/NAME.json. The report sets one against the other, beside the paper's table.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from oneira.platform.executor import Executor
from oneira.platform.report import COLOURS, INK, Report, chart_style
from oneira.platform.runs import Run

from .environments import make_world
from .evaluation import evaluate_dream, evaluate_reference, promises_too_much, reported_seeds
from .evolution import Population
from .settings import PopulationConfig, WorldModelConfig
from .stages import packed_model
from .worldmodel import digest

PAPER = {
    "doom": {0.1: (2086, 193), 0.5: (2060, 196), 1.0: (1145, 868), 1.15: (918, 1092), 1.3: (732, 753)},
}
"""Mean score in the dream and in the real game by temperature: "World Models" (Ha & Schmidhuber 2018), table 2."""


def score_populations(config: WorldModelConfig, run: Run, executor: Executor) -> None:
    """Score what has no score yet. The last round must have a trained M."""
    index = len(config.rounds) - 1
    kept = run.checkpoints.load(f"{index:02d}-evolve")
    model = packed_model(run, config, f"{index:02d}-memory")
    model.pop("starts")
    folder = run.path / "evaluations" / "populations"
    folder.mkdir(parents=True, exist_ok=True)
    for p in config.rounds[index].populations:
        place = folder / f"{p.name}.json"
        if place.exists():
            continue
        prefix = f"{p.name}/"
        arrays = {k.removeprefix(prefix): v.numpy() for k, v in kept.tensors.items() if k.startswith(prefix)}
        population = Population.from_state(p.evolution, arrays, kept.meta[p.name]["state"])
        found = _scores(config, run, executor, p, model, np.asarray(population.best_mean(), np.float32))
        part = place.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1), encoding="utf-8")
        part.replace(place)


def _scores(
    config: WorldModelConfig, run: Run, executor: Executor, p: PopulationConfig, model: dict[str, Any], params: np.ndarray
) -> dict[str, Any]:  # fmt: skip
    memory = f"{len(config.rounds) - 1:02d}-memory"
    tree = {"key": digest([model["key"], params]), "model": model, "memory": memory, "params": params}
    seeds = reported_seeds(config.population_episodes)
    real = evaluate_reference(tree, seeds, executor, world=config.world, stage=p.name)
    dream = evaluate_dream(run, tree, seeds, stage=p.name, tau=p.tau)
    return {"population": p.name, "world": p.world, "tau": p.tau, "real": real, "dream": dream}


# ---- the report's part


def add_populations(page: Report, run: Run) -> None:
    """A section with a table and a plot of dream score against real score; nothing where no population was scored."""
    found = [
        json.loads(path.read_text(encoding="utf-8")) for path in (run.path / "evaluations").glob("populations/*.json")
    ]
    if not found:
        return
    found.sort(key=lambda entry: (entry["tau"], entry["population"]))
    longest = make_world(run.config.world).max_steps
    page.section(
        "Every population in its dream and in reality",
        "Populations bred in the same dream at different temperatures. A cold dream is easy to exploit: the controller finds a place "
        "where nothing ever happens to it, and dies in reality. The alarm rings where the dream score exceeds one and a half times "
        f"the real score by more than {0.3 * longest:.0f}, which is 0.3 a step of the longest episode ({longest} steps).",
    )
    page.table(
        ["population", "τ", "dream", "95% interval", "real", "95% interval", "paper: dream", "paper: real", "alarm"],
        [_row(entry, longest, PAPER.get(run.config.world, {})) for entry in found],
        f"{found[0]['real']['episodes']} episodes each, of {found[0]['real']['env_id']} ({found[0]['real']['env_version']}, "
        f"{json.dumps(found[0]['real']['conditions'])}) from seed {found[0]['real']['seeds'][0]}. What differs from the paper's table: "
        "its scores are those of the best controller found, these of a distribution's mean; dreams here begin at moments of recorded "
        "episodes; budgets of data, training and evolution are this run's.",
    )
    _plot(page, found, longest, PAPER.get(run.config.world, {}))


def exploited(entry: dict[str, Any], longest: int) -> bool:
    """The alarm's rule on a population's scores; `longest`: steps of the longest episode."""
    return promises_too_much(entry["dream"]["mean"] / longest, entry["real"]["mean"] / longest)


def alarm_region(longest: int, top: float) -> tuple[np.ndarray, np.ndarray]:
    """The corners below which the alarm rings: dream scores up to `top`, and the real scores under which `exploited` is true there."""
    dream = np.array([0.0, 0.3 * longest, top])
    return dream, np.maximum(dream - 0.3 * longest, 0) / 1.5


def _row(entry: dict[str, Any], longest: int, paper: dict[float, tuple[int, int]]) -> list[Any]:
    dream, real = entry["dream"], entry["real"]
    known = paper.get(entry["tau"], ("", ""))
    return [
        entry["population"], entry["tau"], dream["mean"], _interval(dream), real["mean"], _interval(real), *known,
        "⚠ exploits the dream" if exploited(entry, longest) else "",
    ]  # fmt: skip


def _interval(score: dict[str, Any]) -> str:
    low, high = score["ci95"]
    return "-" if low is None else f"{low:.0f}\u00a0…\u00a0{high:.0f}"


def _plot(page: Report, found: list[dict[str, Any]], longest: int, paper: dict[float, tuple[int, int]]) -> None:
    from matplotlib.figure import Figure

    with chart_style():
        figure = Figure(figsize=(9.2, 3.6), layout="constrained")
        axis = figure.subplots()
        for i, entry in enumerate(found):
            dream, real = entry["dream"], entry["real"]
            errors = [
                [[s["mean"] - s["ci95"][0]], [s["ci95"][1] - s["mean"]]] if s["std"] is not None else None
                for s in (dream, real)
            ]
            colour = COLOURS[i % len(COLOURS)]
            axis.errorbar(
                dream["mean"],
                real["mean"],
                xerr=errors[0],
                yerr=errors[1],
                fmt="o",
                color=colour,
                label=f"τ {entry['tau']}",
            )
        edge = np.array([0.0, max(longest, *(e["dream"]["mean"] for e in found))])
        axis.plot(edge, edge, color=INK, linewidth=0.8, linestyle=":", label="what the dream promises")
        axis.fill_between(*alarm_region(longest, edge[1]), alpha=0.08, color="#d1495b", linewidth=0, label="alarm")
        if paper:
            axis.plot(*zip(*paper.values(), strict=True), "x", color=INK, label="the paper's five")
        bounds = (0.0, 1.03 * edge[1])
        axis.set(xlabel="score in the dream", ylabel="score in the real game", xlim=bounds, ylim=bounds)
        axis.legend(frameon=False)
        page.figure(figure, "Each point is one population, with 95% intervals of both means.")
