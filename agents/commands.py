"""The commands of this package: `oneira evaluate` and `oneira record`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(evaluate)
    app.command()(record)


def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its name in runs/.")],
    world: Annotated[str, typer.Option(help="real: the reference environment. dream: the run's own dream.")] = "real",
    stage: Annotated[str, typer.Option(help="Which controller: best, dream or real.")] = "best",
    episodes: Annotated[int, typer.Option(help="How many.")] = 100,
    seed: Annotated[int, typer.Option(help="The first seed; the others follow.")] = 2**30,
    executor: Annotated[str, typer.Option(help="ray or serial.")] = "ray",
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Score a run's controller on episodes never used in training."""
    from oneira.platform.checkpoints import json_bytes, write_replacing
    from oneira.platform.console import json_on_stdout
    from oneira.platform.errors import UsageError, did_you_mean
    from oneira.platform.runs import Run
    from oneira.platform.training import make_executor

    from .agent import agent_tree
    from .evaluation import evaluate_dream, evaluate_reference, reported_seeds
    from .evolving import TRAINING_SEEDS

    if world not in ("real", "dream"):
        raise UsageError(f"unknown world '{world}'. {did_you_mean(world, ('real', 'dream'))}")
    seeds = reported_seeds(episodes, seed)
    if world == "real" and seed < TRAINING_SEEDS:
        print(
            f"note: training draws its tracks from [0, {TRAINING_SEEDS}); this score may be of some of them",
            file=sys.stderr,
        )
    with json_on_stdout(as_json) as emit:
        opened = Run.open(run)
        tree = agent_tree(opened, stage)
        if world == "dream":
            score = evaluate_dream(opened, tree, seeds, stage=stage, tau=tree["tau"])
        else:
            with make_executor(executor, address) as workers:
                score = evaluate_reference(tree, seeds, workers, world=opened.config.world, stage=stage)
        place = opened.path / "evaluations" / f"{world}-{stage}-{seed}-{episodes}.json"
        place.parent.mkdir(exist_ok=True)
        write_replacing(place, json_bytes(score))
        emit(score)
        spread = (
            ""
            if score["std"] is None
            else f" ± {score['std']:.1f} (95% CI {score['ci95'][0]:.1f} to {score['ci95'][1]:.1f})"
        )
        print(f"{score['env_id']}, {score['episodes']} episodes from seed {seed}: {score['mean']:.1f}{spread}")


def record(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its name in runs/.")],
    out: Annotated[Path, typer.Option(help="The MP4 to write.")],
    world: Annotated[str, typer.Option(help="real, dream, or both side by side.")] = "both",
    seed: Annotated[int, typer.Option(help="Of the track and the dream.")] = 2**30,
) -> None:
    """Film a run's controller."""
    from oneira.platform.runs import Run

    from .showing import film

    frames = film(Run.open(run), out, world=world, seed=seed)
    print(f"{out}: {frames} frames")
