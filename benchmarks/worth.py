"""What dreams are worth: the same preset with populations in both worlds and in the real one alone, score over wall time.

    python benchmarks/worth.py --seeds 0 1 2 --runs worth      # pairs of runs, one after another; minutes each
    python benchmarks/worth.py --seeds 0 1 2 --runs worth --beside RUN    # also a run that is there, of dreams alone say

A run that is there already is read, not made again. The score is that of the real population's mean on tracks of the twin: at its
checks while it evolves (16 tracks, the same each time), and at the end of the run (`checks` tracks); of a run without such a population
that of its best controller so far, at the check of each round. Times are of the whole run so far. Steps are those of the real world
(its twin) that the run learnt from, in collecting and in evolution; the last column of times is what it would have taken had each of
them cost what Gymnasium's own environment takes (`--rate` steps/s of the machine, see benchmarks/environment.py).
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


def curve(run: Any) -> list[tuple[float, int, float]]:
    """(seconds since the start, real steps learnt from, score) at every check."""
    began, steps, points = min(line["time"] for line in run.metrics()), 0, []
    drives = any(p.world == "real" for plan in run.config.rounds for p in plan.populations)
    best = -1000.0
    for line in sorted(run.metrics(), key=lambda line: line["time"]):
        if line["stage"] in ("collect", "evolve-real"):
            steps += int(line["env_steps"])
        if line["stage"] == "evolve-real" and line.get("mean_of_mean") is not None:
            points.append((line["time"] - began, steps, line["mean_of_mean"]))
        elif line["stage"] == "check" and line["world"] == ("real" if drives else "dream"):
            best = max(best, line["real_mean"])
            points.append((line["time"] - began, steps, line["real_mean"] if drives else best))
    return points


def row_of(run: Any, rate: float) -> dict[str, Any]:
    """What a run reached, and when."""
    points = curve(run)
    row: dict[str, Any] = {"final": points[-1][2], "seconds": points[-1][0], "steps": points[-1][1]}
    for mark in MARKS:
        seconds, steps, _ = next((point for point in points if point[2] >= mark), (None, None, None))
        row |= {f"s to {mark:.0f}": seconds, f"steps to {mark:.0f}": steps}
        row[f"s to {mark:.0f} at Gymnasium's speed"] = None if seconds is None else seconds + steps / rate
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="carracing-quick")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/worth"))
    parser.add_argument("--beside", type=Path, nargs="*", default=[])
    parser.add_argument("--rate", type=float, default=271.0)
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
                row = {"seed": seed, "worlds": "both" if both else "real", **row_of(run, arguments.rate)}
                table.append(row)
                print(json.dumps(row), flush=True)
    for key in [key for key in table[0] if key not in ("seed", "worlds")]:
        ours, theirs = ([row[key] for row in table if row["worlds"] == worlds] for worlds in ("both", "real"))
        pairs = ", ".join(f"{_said(a)} / {_said(b)}" for a, b in zip(ours, theirs, strict=True))
        print(f"{key:32s} both / real alone: {pairs}")
    for path in arguments.beside:
        for key, value in row_of(Run.open(path), arguments.rate).items():
            print(f"{key:32s} {path.name}: {_said(value)}")


def _said(value: float | None) -> str:
    return "never" if value is None else f"{value:,.0f}"


if __name__ == "__main__":
    main()
