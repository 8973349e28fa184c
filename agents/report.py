"""report.html of a world-model run: scores with their conditions, fitness in both worlds, V and M, where the time went.

It reads nothing but `run.metrics(stage)`, evaluations/*.json (the JSON of `oneira evaluate`), media/ and
provenance.json, so that it can be built at any moment of a run; a part without data is left out.

Metrics by stage; (stage, step) must be unique, since a later line replaces an earlier one:

    collect       round, env_steps, mean_return                     one line a unit of work
    vision        round, member, loss, recon, kl, frames_per_s      step counts on within a round
    memory        round, member, loss, nll, reward_mse, done_bce, transitions_per_s
    evolve-real, evolve-dream
                  round, population, generation, mean, best, sigma, env_steps, and from time to time mean_of_mean, the
                  return of the distribution's mean
    check         round, population, world, real_mean, real_std, dream_mean, rank_correlation, alarm (0 or 1)
    candidate     round, population, dream, real                    one line a candidate of the rank correlation
    stage         name, round, seconds, core_seconds, cores         name: collect, vision, memory, evolve, check, ...
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from oneira.platform.config import to_dict
from oneira.platform.console import show_seconds
from oneira.platform.errors import DataError
from oneira.platform.report import COLOURS, INK, Report, chart_style
from oneira.platform.runs import Run

from .populations import add_populations

Line = dict[str, Any]
ALARM = "#d1495b"
DREAM = "oneira/Dream-v0"
POINTS = 600  # of a curve; more cannot be seen and make a heavy file
WORLDS = {"real": "the real world", "dream": "the dream"}
FILMS = {
    "real-and-dream": "One controller, once in the real world and once in its dream",
    "real": "The controller in the real world",
    "dream": "The same controller in its dream",
}


def build_report(run: Run) -> Path:
    """Write the run's report.html from what it holds by now, and return its path."""
    worlds = {p.world for plan in run.config.rounds for p in plan.populations}
    places = [place for world, place in (("real", "the real world"), ("dream", "its dream")) if world in worlds]
    page = Report(run.name, f"{run.preset}: a world model, and controllers trained in {' and in '.join(places)}")
    clock = _clock(run)
    _scores(page, run, clock)
    _films(page, run)
    _fitness(page, run, clock)
    _reality(page, run)
    add_populations(page, run)
    _vision(page, run)
    _memory(page, run)
    _time(page, run)
    _provenance(page, run)
    return page.write(run.report_path)


# ---- scores and films


def _scores(page: Report, run: Run, clock: Callable[[Line], float]) -> None:
    found = [_read_score(path) for path in sorted((run.path / "evaluations").glob("*.json"))]
    scores = [score for score in found if score["env_id"] != DREAM]
    lines = run.metrics()
    checks = [line for line in run.metrics("check") if "dream_mean" in line]
    tiles: dict[str, Any] = {}
    page.section("Scores", "Full episodes of the reference environment, on seeds that were not used in training.")
    if scores:
        best = max(
            scores, key=lambda score: (score["stage"] == "best", score["episodes"])
        )  # not the luckiest: the surest
        spread = "" if best["std"] is None else f" ± {best['std']:.0f}"
        tiles |= {"real score": f"{best['mean']:.0f}{spread}", "95% interval of the mean": _interval(best["ci95"])}
    if checks:
        last = [line["rank_correlation"] for line in checks if line["round"] == checks[-1]["round"]]
        tiles["dream and reality agree (ρ)"] = round(float(np.mean(last)), 2)
        tiles["dream-exploit alarms"] = f"{sum(int(line['alarm']) for line in checks)} of {len(checks)}"
    if lines:
        tiles["time spent"] = show_seconds(max(clock(line) for line in lines))
    page.tiles(tiles)
    if not scores:
        page.text("This run has not been scored yet: `oneira evaluate` does it.")
        return
    _score_table(page, scores)
    _returns(page, scores)
    if dreamt := [score for score in found if score["env_id"] == DREAM]:
        page.text(
            "What the same controllers reach in the run's own dream, which is what they believe and not what they are worth:"
        )
        _score_table(page, dreamt)


def _score_table(page: Report, scores: Sequence[dict[str, Any]]) -> None:
    page.table(
        ["controller", "mean", "std", "95% interval", "episodes", "seeds", "environment", "steps", "time"],
        [
            [
                score["stage"], score["mean"], score["std"], _interval(score["ci95"]), score["episodes"],
                f"{score['seeds'][0]}\u00a0…\u00a0{score['seeds'][-1]}", f"{score['env_id']} ({score['env_version']})",
                score["env_steps"], show_seconds(score["wall_s"]),
            ]
            for score in scores
        ],
        f"Preprocessing: {scores[0]['preprocessing']}. {_told(scores[0])}std with ddof 1; Student's interval of the mean.",
    )  # fmt: skip


def _read_score(path: Path) -> dict[str, Any]:
    try:
        score = json.loads(path.read_text(encoding="utf-8"))
        score["returns"][0], score["seeds"][0], score["mean"] + 0.0, score["stage"] + ""
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(f"{path} is no evaluation: {error!r}.") from error
    return score


def _interval(interval: Sequence[float | None]) -> str:
    low, high = interval
    return "-" if low is None or high is None else f"{low:.0f}\u00a0…\u00a0{high:.0f}"


def _returns(page: Report, scores: Sequence[dict[str, Any]]) -> None:
    """Every episode as a dot, the mean and its interval as a bar."""
    with chart_style():
        figure, axes = _figure(height=0.9 + 0.45 * len(scores))
        for y, (score, colour) in enumerate(zip(scores, _colours(len(scores)), strict=True)):
            jitter = 0.22 * np.sin(2.4 * np.arange(score["episodes"]))
            axes[0].plot(score["returns"], y + jitter, "o", markersize=4, alpha=0.45, color=colour, markeredgewidth=0)
            axes[0].plot(score["ci95"], [y, y], color=INK, linewidth=4, alpha=0.8, solid_capstyle="round")
            axes[0].plot(score["mean"], y, "D", color=INK, markersize=7)
        axes[0].set(yticks=range(len(scores)), yticklabels=[s["stage"] for s in scores], xlabel="return of an episode")
        axes[0].set_ylim(len(scores) - 0.5, -0.5)
        page.figure(figure, "Every dot is an episode; the diamond is their mean, the bar its 95% interval.")


def _films(page: Report, run: Run) -> None:
    folder = run.path / "media"
    films = sorted(folder.glob("*.mp4"), key=lambda p: ([*FILMS, p.stem].index(p.stem), p.stem))
    if not films:
        return
    page.section(
        "Reality and dream", "What the controller sees, and what its world model imagines when it drives alone."
    )
    page.videos([(path, FILMS.get(path.stem, path.stem.replace("-", " "))) for path in films])


# ---- evolution


def _fitness(page: Report, run: Run, clock: Callable[[Line], float]) -> None:
    worlds = {world: lines for world in WORLDS if (lines := run.metrics(f"evolve-{world}"))}
    if not worlds:
        return
    page.section(
        "Evolution",
        "The return of the controllers in the world in which they are bred. The line is the mean of a generation, the "
        "band reaches up to its best candidate, and dots are the distribution's mean, measured by itself.",
    )
    _fitness_figure(page, worlds, lambda i, line: clock(line) / 60, "minutes since the run began")
    _fitness_figure(page, worlds, lambda i, line: i + 1, "generation")
    with chart_style():
        figure, axes = _figure(height=2.2)
        groups = _groups([line for lines in worlds.values() for line in lines], "population")
        for (name, lines), colour in zip(groups.items(), _colours(len(groups)), strict=True):
            axes[0].semilogy(np.arange(1, len(lines) + 1), [line["sigma"] for line in lines], color=colour, label=name)
        axes[0].set(title="Step size of the search", xlabel="generation", ylabel="sigma")
        axes[0].legend(frameon=False)
        page.figure(figure)


def _fitness_figure(
    page: Report, worlds: Mapping[str, list[Line]], place: Callable[[int, Line], float], xlabel: str
) -> None:
    with chart_style():
        figure, axes = _figure(len(worlds))
        for axis, (world, all_lines) in zip(axes, worlds.items(), strict=True):
            groups = _groups(all_lines, "population")
            for (name, lines), colour in zip(groups.items(), _colours(len(groups)), strict=True):
                x = np.array([place(i, line) for i, line in enumerate(lines)])
                mean, best = (np.array([line[key] for line in lines], float) for key in ("mean", "best"))
                rounds = np.array([line["round"] for line in lines])
                for k, number in enumerate(np.unique(rounds)):  # a curve each: other stages lie between two rounds
                    rows = np.flatnonzero(rounds == number)
                    rows = rows[:: -(-len(rows) // POINTS)]
                    marker = "o" if len(rows) == 1 else None
                    axis.plot(x[rows], mean[rows], color=colour, label=None if k else name, marker=marker)
                    axis.fill_between(x[rows], mean[rows], best[rows], color=colour, alpha=0.16, linewidth=0)
                own = [i for i, line in enumerate(lines) if line.get("mean_of_mean") is not None]
                axis.plot(x[own], [lines[i]["mean_of_mean"] for i in own], "o", color=colour, markersize=4.5)
            axis.set(title=f"In {WORLDS[world]}", xlabel=xlabel, ylabel="return")
            axis.legend(frameon=False, loc="lower right")
        page.figure(figure)


# ---- does the dream say something about reality?


def _reality(page: Report, run: Run) -> None:
    checks = run.metrics("check")
    if not checks:
        return
    page.section(
        "Does the dream tell the truth?",
        "At a round's end every population is measured in both worlds. The rank correlation says whether the dream "
        "puts candidates in the order in which reality puts them: 1 is the same order, 0 says nothing; of 16 candidates, "
        "less than 0.5 may be chance. The alarm rings where it is 0 or less, or where the dream promises far more than "
        "reality pays: then controllers are exploiting the dream instead of learning to live in reality.",
    )
    if any("dream_mean" in line for line in checks):
        _correlations(page, [line for line in checks if "dream_mean" in line], run.metrics("candidate"))
    page.table(
        ["round", "population", "bred in", "real mean", "real std", "dream mean", "rank correlation", "alarm"],
        [
            [
                line["round"] + 1, line["population"], line["world"],
                line["real_mean"], line["real_std"], line.get("dream_mean", "no dream yet"),
                round(float(line["rank_correlation"]), 2) if "dream_mean" in line else "",
                "⚠ exploits the dream" if line.get("alarm") else "",
            ]
            for line in sorted(checks, key=lambda line: (line["round"], line["population"]))
        ],
        "Returns of the mean of each population's distribution.",
    )  # fmt: skip


def _correlations(page: Report, checks: list[Line], candidates: list[Line]) -> None:
    """Left, where there are any: candidates by dream and real return. Right: rank correlation by round, with alarms."""
    with chart_style():
        figure, axes = _figure(2 if candidates else 1)
        if candidates:
            rounds = _groups(candidates, "round")
            for (number, lines), colour in zip(rounds.items(), _colours(len(rounds)), strict=True):
                x, y = [line["dream"] for line in lines], [line["real"] for line in lines]
                axes[0].plot(
                    x, y, "o", markersize=4, alpha=0.6, markeredgewidth=0, color=colour, label=f"round {number + 1}"
                )
            axes[0].set(
                title="Candidates in both worlds", xlabel="return in the dream", ylabel="return in the real world"
            )
            axes[0].legend(frameon=False)
        groups = _groups(checks, "population")
        for (name, lines), colour in zip(groups.items(), _colours(len(groups)), strict=True):
            x, y = [line["round"] + 1 for line in lines], [line["rank_correlation"] for line in lines]
            axes[-1].plot(x, y, "o-", color=colour, label=name, markersize=5)
        rung = [line for line in checks if line["alarm"]]
        x, y = [line["round"] + 1 for line in rung], [line["rank_correlation"] for line in rung]
        axes[-1].plot(x, y, "X", color=ALARM, markersize=11, label="alarm" if rung else None)
        axes[-1].axhspan(-1.05, 0, color=ALARM, alpha=0.07, linewidth=0)
        axes[-1].set(
            title="Rank correlation of dream and reality", xlabel="round", ylabel="Spearman's ρ", ylim=(-1.05, 1.05)
        )
        axes[-1].set_xticks(sorted({line["round"] + 1 for line in checks}))
        axes[-1].legend(frameon=False, loc="lower left")
        page.figure(figure)


# ---- V and M


def _vision(page: Report, run: Run) -> None:
    lines = run.metrics("vision")
    pictures = sorted((run.path / "media").glob("reconstructions*.png"))
    if not lines and not pictures:
        return
    page.section("V, the eye", "A variational autoencoder: what it keeps of a frame is all that the controller sees.")
    for picture in pictures:
        page.image(picture, "Frames of the data (above) and what V makes of them (below).")
    _losses(page, lines, {"recon": "reconstruction error", "kl": "KL, nats"})


def _memory(page: Report, run: Run) -> None:
    lines = run.metrics("memory")
    if not lines:
        return
    page.section(
        "M, the memory", "An LSTM with mixture densities: it predicts the next latent, the reward and the end."
    )
    _losses(
        page, lines, {"nll": "negative log-likelihood, nats per latent", "reward_mse": "squared error of the reward"}
    )


def _losses(page: Report, lines: list[Line], names: Mapping[str, str]) -> None:
    """A figure with one panel for each metric that the lines have, one curve for each fit."""
    names = {key: name for key, name in names.items() if any(key in line for line in lines)}
    if not names:
        return
    fits: dict[tuple[int, int], list[Line]] = defaultdict(list)
    for line in lines:
        fits[line.get("round", 0), line.get("member", 0)].append(line)
    several = len({member for _, member in fits}) > 1
    with chart_style():
        figure, axes = _figure(len(names))
        for axis, (key, name) in zip(axes, names.items(), strict=True):
            for (number, member), colour in zip(fits, _colours(len(fits)), strict=True):
                own = [line for line in fits[number, member] if key in line]
                thin = slice(None, None, max(1, -(-len(own) // POINTS)))
                x = [line["step"] - fits[number, member][0]["step"] for line in own][thin]
                label = f"round {number + 1}" + (f", member {member + 1}" if several else "")
                axis.plot(
                    x, [line[key] for line in own][thin], color=colour, label=label, marker="o" if len(x) == 1 else None
                )
            axis.set(title=name[0].upper() + name[1:], xlabel="training step")
            if len(fits) > 1:
                axis.legend(frameon=False)
        page.figure(figure)


# ---- time and provenance


def _time(page: Report, run: Run) -> None:
    """Seconds of each stage, what it did in them, and how fast."""
    seconds: dict[str, float] = defaultdict(float)
    for line in run.metrics("stage"):
        seconds[line["name"]] += float(line["seconds"])
    if not seconds:
        return
    page.section("Where the time went")
    total = sum(seconds.values())
    rows = []
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        rows.append(
            [name, show_seconds(spent), f"{100 * spent / max(total, 1e-9):.0f}%", "; ".join(_work(run, name, spent))]
        )
    page.table(
        ["stage", "time", "share", "work and speed"], rows, f"All stages: {show_seconds(total)}. {_outside(run)}"
    )
    with chart_style():
        figure, axes = _figure(height=0.9)
        left = 0.0
        for (name, spent), colour in zip(seconds.items(), _colours(len(seconds)), strict=True):
            axes[0].barh(0, spent / 60, left=left / 60, color=colour, label=name)
            left += spent
        axes[0].set(yticks=[], xlabel="minutes, all rounds together")
        axes[0].spines["left"].set_visible(False)
        axes[0].grid(False)
        figure.legend(loc="outside upper left", ncols=len(seconds), frameon=False)
        page.figure(figure)


def _told(score: Mapping[str, Any]) -> str:
    """The environment's own conditions, in words; nothing where it has none."""
    told = ", ".join(f"{name} {value}" for name, value in score.get("conditions", {}).items())
    return f"Conditions: {told}. " if told else ""


def _outside(run: Run) -> str:
    """How much of the cores' time went to anything but units of work: Ray, files, CMA-ES, waiting for the slowest."""
    lines = [line for line in run.metrics("stage") if "core_seconds" in line]
    offered = sum(line["seconds"] * line["cores"] for line in lines)
    if not offered:
        return ""
    outside = 1 - sum(line["core_seconds"] for line in lines) / offered
    return f"Of the cores' time, {100 * outside:.1f}% was not the work of environment, V, M and C."


def _work(run: Run, stage: str, spent: float) -> Iterable[str]:
    """What a stage did, in words: counts and rates."""
    units = {"collect": "env steps", "evolve-real": "real env steps", "evolve-dream": "dream steps"}
    for name in (stage, f"{stage}-real", f"{stage}-dream"):
        if name in units and (steps := sum(int(line["env_steps"]) for line in run.metrics(name))):
            yield f"{steps:,} {units[name]}, {steps / max(spent, 1e-9):,.0f}/s"
    for key in ("frames_per_s", "transitions_per_s"):
        rates = [line[key] for line in run.metrics(stage) if line.get(key)]
        if rates:
            yield f"{np.median(rates):,.0f} {key.removesuffix('_per_s')}/s while training"


def _provenance(page: Report, run: Run) -> None:
    provenance = run.provenance()
    page.section("How it was made")
    machine = provenance.get("machine", {})
    page.facts(
        {
            "command": " ".join(provenance.get("command", [])),
            "version": provenance.get("version"),
            "commit": provenance.get("commit"),
            "machine": ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None),
            "libraries": ", ".join(f"{key} {value}" for key, value in provenance.get("versions", {}).items() if value),
            "seeds": ", ".join(f"{key} {value}" for key, value in provenance.get("seeds", {}).items()),
            "started": ", ".join(start["time"] for start in provenance["started"]),
        }
    )
    page.details("The whole config", json.dumps(to_dict(run.config), indent=2))


# ---- helpers


def _clock(run: Run) -> Callable[[Line], float]:
    """Seconds of work before a line: time since the first start (or line, where stages were copied), without the pauses before starts."""
    starts = sorted(datetime.fromisoformat(start["time"]).timestamp() for start in run.provenance()["started"])
    times = np.array(sorted(line["time"] for line in run.metrics()))
    began = min([*starts[:1], *times[:1]])
    pauses = []
    for start in starts:
        if start > began:
            before = times[times < start]
            pauses.append((start, start - (before[-1] if len(before) else began)))

    def clock(line: Line) -> float:
        return max(0.0, line["time"] - began - sum(length for start, length in pauses if start <= line["time"]))

    return clock


def _groups(lines: Iterable[Line], key: str) -> dict[Any, list[Line]]:
    """Lines by the value of a key, in the order in which the values first come."""
    groups: dict[Any, list[Line]] = {}
    for line in lines:
        groups.setdefault(line[key], []).append(line)
    return groups


def _figure(columns: int = 1, height: float = 3.2) -> tuple[Any, Sequence[Any]]:
    """A matplotlib figure as wide as the page, and its axes in a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
