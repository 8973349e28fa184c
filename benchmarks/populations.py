"""Dream steps a second of several populations on one pool of workers, against one population alone on the same pool.

    python benchmarks/populations.py RUN                  # a trained run that dreams; 5 against 1, alternating, medians

Both evolve in RUN's last dream for the same number of generations in all, with the settings of RUN's last dreaming population. One alone
leaves workers idle at the end of every generation, until its last answer is in; several fill that time.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--populations", type=int, default=5)
    parser.add_argument("--generations", type=int, default=1, help="of each of several; one alone has as many in all")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    from oneira.agents.evolving import evolve
    from oneira.agents.stages import packed_model
    from oneira.cluster.executor import RayExecutor
    from oneira.platform.runs import Run

    source = Run.open(arguments.run)
    config, last = source.config, len(source.config.rounds) - 1
    model = next(p for p in reversed(config.rounds[last].populations) if p.world == "dream")

    def speed(executor: Any, shared: Any, count: int, generations: int) -> float:
        names = [f"dream-{i}" for i in range(count)]
        populations = tuple(
            replace(
                model, name=n, generations=generations, check_every=10**6, evolution=replace(model.evolution, seed=i)
            )
            for i, n in enumerate(names)
        )
        plan = replace(config, rounds=(replace(config.rounds[0], populations=populations, segments=1),))
        with tempfile.TemporaryDirectory() as folder:
            run = Run.create(Path(folder) / "run", "benchmark", plan)
            began = time.perf_counter()
            evolve(plan, 0, run, executor, shared, {})
            seconds = time.perf_counter() - began
            return sum(int(line["env_steps"]) for line in run.metrics("evolve-dream")) / seconds

    total = arguments.populations * arguments.generations
    with RayExecutor() as executor:
        shared = executor.share(packed_model(source, config, f"{last:02d}-memory"))
        speed(executor, shared, 1, 1)  # starts the workers
        pairs = [
            (speed(executor, shared, arguments.populations, arguments.generations), speed(executor, shared, 1, total))
            for _ in range(arguments.repeats)
        ]
    several, alone = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{arguments.populations} populations together  {several:>10,.0f} dream steps/s")
    print(f"one alone               {alone:>10,.0f} dream steps/s")
    print(
        f"ratio                   {ratio:>10.2f}   ({min(a / b for a, b in pairs):.2f} to {max(a / b for a, b in pairs):.2f})"
    )


if __name__ == "__main__":
    main()
