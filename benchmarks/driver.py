"""Results a second that one driver takes in, with 10,000 workers that cost nothing.

    python benchmarks/driver.py       # two populations of 10,000 candidates, one candidate a unit of work

The limit is the wish of 20,000 results a second on one core: 10,000 workers that answer once a second then leave it half idle. Seconds
are of the driver's processor time. "evolution" is asking and telling of CMA-ES and what a run writes, over an executor that costs
nothing; "executor" is the queue of the executor over Ray, with Ray itself replaced by a list of who has answered.
"""

import argparse
import random
import tempfile
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

WISH = 20_000


class Handle:
    def __init__(self, answer: dict[str, Any]) -> None:
        self.answer = answer

    def result(self) -> dict[str, Any]:
        return self.answer


class Workers:
    """An executor whose workers answer at once, in an order by chance."""

    def __init__(self, workers: int) -> None:
        self.num_workers, self.core_seconds, self.answered = workers, 0.0, 0
        self.busy: list[Handle] = []
        self.chance = random.Random(0)

    def share(self, value: Any) -> Any:
        return value

    def submit(self, function: Any, shared: Any, unit: dict[str, Any], *, threads: int = 1) -> Handle:
        params = unit["params"]
        episodes = len(unit["seeds"]) if "seeds" in unit else unit["rollouts"]
        returns = np.repeat(-np.square(params[:, :1]), episodes, 1)
        self.busy.append(Handle({"returns": returns, "env_steps": 1}))
        return self.busy[-1]

    def wait(self, handles: Any) -> Handle:
        place = self.chance.randrange(min(len(self.busy), self.num_workers))
        self.busy[place], self.busy[-1] = self.busy[-1], self.busy[place]
        self.answered += 1
        return self.busy.pop()


def evolution(workers: int, generations: int) -> float:
    """Results a second of processor time of two populations of so many candidates."""
    from oneira.agents.evolving import evolve
    from oneira.agents.presets import carracing_quick
    from oneira.platform.runs import Run

    config = carracing_quick()
    model = config.rounds[-1].populations[0]
    populations = tuple(
        replace(
            model, name=f"p{i}", unit=1, generations=generations, check_every=10**6,
            evolution=replace(model.evolution, popsize=workers, seed=i),
        )
        for i in range(2)
    )  # fmt: skip
    plan = replace(config, rounds=(replace(config.rounds[0], populations=populations, segments=1),))
    executor = Workers(workers)
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "run", "benchmark", plan)
        began = time.process_time()
        evolve(plan, 0, run, executor, None, {})
        return executor.answered / (time.process_time() - began)


class Method:
    """An actor's method: its references are numbers."""

    numbers = count()

    def remote(self, *arguments: Any) -> int:
        return next(self.numbers)


class Actor:
    run = Method()


def executor(workers: int, results: int, answers: int = 100) -> float:
    """Results a second of the executor's queue. `answers`: that have come whenever it looks."""
    import ray

    from oneira.cluster import executor as module

    def wait(sent: list[int], num_returns: int, timeout: float, fetch_local: bool) -> tuple[list[int], list[int]]:
        return sent[: min(num_returns, answers)], []

    def start(lane: Any) -> None:
        lane.actor = Actor()

    unit = {"params": np.zeros((1, 867), np.float32), "seeds": [1, 2, 3], "max_steps": 1000, "stuck": 50}
    answer = ("done", {"returns": np.zeros((1, 3), np.float32), "env_steps": 1}, "", 0.1)
    patches = {"wait": wait, "get": lambda reference: answer, "kill": lambda actor: None}
    with (
        mock.patch.multiple(ray, **patches), mock.patch.object(module, "connect"), mock.patch.object(module, "find_desk"),
        mock.patch.object(module, "_cpus_of_nodes", lambda: {"node": workers}), mock.patch.object(module._Lane, "start", start),
        module.RayExecutor() as made,
    ):  # fmt: skip
        pending = {made.submit(evolution, None, unit): i for i in range(workers)}
        began = time.process_time()
        for i in range(results):
            handle = made.wait(pending.keys())
            del pending[handle]
            handle.result()
            pending[made.submit(evolution, None, unit)] = i
        return results / (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=10_000)
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--results", type=int, default=50_000)
    arguments = parser.parse_args()
    rates = {
        "evolution": evolution(arguments.workers, arguments.generations),
        "executor": executor(arguments.workers, arguments.results),
    }
    for name, rate in rates.items():
        print(
            f"{name:<10} {rate:>10,.0f} results/s with {arguments.workers:,} workers   ({rate / WISH:.2f} of {WISH:,})"
        )


if __name__ == "__main__":
    main()
