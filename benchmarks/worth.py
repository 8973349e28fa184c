"""What dreams are worth: the same preset with populations in both worlds and in the real one alone, score over wall time.

    python benchmarks/worth.py --seeds 0 1 2 --runs worth      # pairs of runs, one after another; minutes each

A run that is there already is read, not made again. The score is that of the real population's mean on tracks of the twin: at its
checks while it evolves (16 tracks, the same each time), and at the end of the run (`checks` tracks). Times are of the whole run so far.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

MARKS = (500.0, 700.0, 800.0)


def variant(preset: str, seed: int, both: bool) -> Any:
    """The preset with this seed, without its closing score and film, and without its dreaming populations if not `both`."""
    from oneira.platform.presets import load_preset

    config = load_preset(preset)
    rounds = tuple(
        replace(plan, populations=tuple(p for p in plan.populations if both or p.world == "real"))
        for plan in config.rounds
    )
    return replace(config, seed=seed, rounds=rounds, check_episodes=0, film_steps=0)


def curve(run: Any) -> tuple[list[tuple[float, float]], float]:
    """((seconds since the start, score) at every check of the real population, the final score)."""
    began = min(line["time"] for line in run.metrics())
    lines = [line for line in run.metrics("evolve-real") if line.get("mean_of_mean") is not None]
    points = [(line["time"] - began, line["mean_of_mean"]) for line in lines]
    last = [line for line in run.metrics("check") if line["world"] == "real"][-1]
    return [*points, (last["time"] - began, last["real_mean"])], last["real_mean"]


def first_time(points: list[tuple[float, float]], mark: float) -> float | None:
    return next((seconds for seconds, score in points if score >= mark), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="carracing-quick")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/worth"))
    arguments = parser.parse_args()
    from oneira.cluster.executor import RayExecutor
    from oneira.platform.runs import Run

    table = []
    with RayExecutor() as executor:
        for seed in arguments.seeds:
            for both in (True, False):
                folder = arguments.runs / f"{arguments.preset}-{seed}-{'both' if both else 'real'}"
                if not (folder / "config.json").exists():
                    Run.create(folder, arguments.preset, variant(arguments.preset, seed, both))
                run = Run.open(folder)
                run.config.train(run, executor)
                points, final = curve(run)
                row = {"seed": seed, "worlds": "both" if both else "real", "final": final, "seconds": points[-1][0]}
                row |= {f"s to {mark:.0f}": first_time(points, mark) for mark in MARKS}
                table.append(row)
                print(json.dumps(row), flush=True)
    for key in ("final", "seconds", *(f"s to {mark:.0f}" for mark in MARKS)):
        ours, theirs = ([row[key] for row in table if row["worlds"] == worlds] for worlds in ("both", "real"))
        pairs = [f"{a:.0f} / {b:.0f}" if a and b else f"{a} / {b}" for a, b in zip(ours, theirs, strict=True)]
        print(f"{key:10s} both / real alone: {', '.join(pairs)}")


if __name__ == "__main__":
    main()
