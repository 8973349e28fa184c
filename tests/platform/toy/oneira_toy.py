"""Somebody else's package: adds a preset and commands through entry points, and trains in milliseconds, without torch.

It counts upwards on the executor, commits each count as a checkpoint, and can be told to stop, to fail or to wait.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import oneira.platform.errors as errors


@dataclass(frozen=True, kw_only=True)
class Counting:
    to: int = 5
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.to < 1:
            raise errors.ConfigError(f"to is {self.to}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class Toy:
    seed: int = 1
    fail: str = ""
    count: Counting = field(default_factory=Counting)

    def smoke(self) -> Toy:
        return replace(self, count=replace(self.count, to=2))

    def train(self, run, executor) -> dict:
        store = run.checkpoints
        begin = store.load("count").meta["n"] if store.exists("count") else 0
        for n in range(begin, self.count.to):
            if self.fail == "exit" and n == 3:
                raise SystemExit(1)
            if self.fail and self.fail != "exit":
                raise getattr(errors, self.fail, ValueError)("as was asked for\nsecond line")
            total = sum(executor.map(square, executor.share({"plus": self.seed}), range(n + 1)))
            store.save("count", {}, {"n": n + 1, "total": total}, step=n + 1)
            run.log("count", n + 1, total=self.count.to, value=total)
            time.sleep(self.count.seconds)
        print("a library that talks", flush=True)
        os.system("echo a program that talks")
        return {"total": store.load("count").meta["total"], "from": begin, "never": float("nan")}

    def report(self, run) -> Path:
        from oneira.platform.report import Report

        page = Report(run.preset)
        page.section("Counting")
        page.chart({"value": zip(*[(line["step"], line["value"]) for line in run.metrics("count")], strict=True)})
        return page.write(run.report_path)


def square(shared: dict, n: int) -> int:
    return n * n + shared["plus"]


def toy() -> Toy:
    return Toy()


def needs_more() -> Toy:
    import a_module_that_is_absent

    return a_module_that_is_absent


def register(app) -> None:
    @app.command()
    def greet(name: str) -> None:
        """Says hello."""
        print(f"hello {name}")
