"""What commands say: one JSON document on stdout, tables for people, and the progress of a run.

with json_on_stdout(as_json) as emit:      # all else that is printed meanwhile, by libraries as well, goes to stderr
    emit({"run": "..."})
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .logs import in_json, say

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_LOOKS = 0.5
NOT_VALUES = ("time", "stage", "step", "at", "total", "event")


def json_text(document: Any) -> str:
    """Strict JSON: numbers that are not finite become null."""
    return json.dumps(json_finite(document), indent=1, ensure_ascii=False)


def json_finite(value: Any) -> Any:
    """A tree of values with None for every number that is not finite, and text for paths."""
    if isinstance(value, Mapping):
        return {str(key): json_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


@contextmanager
def json_on_stdout(enabled: bool) -> Iterator[Callable[[Any], None]]:
    """Yields a function that prints a JSON document on the real stdout (or does nothing, if not enabled).

    While enabled, Python's and the process's stdout lead to stderr, so that nothing else can reach the real one.
    """
    if not enabled:
        yield lambda document: None
        return
    sys.stdout.flush()
    before, real = sys.stdout, os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    documents: list[str] = []
    try:
        yield lambda document: documents.append(json_text(document))
    finally:
        sys.stdout = before
        os.dup2(real, 1)
        os.close(real)
        for document in documents:
            print(document, flush=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A plain table on stdout; numbers stand to the right."""
    cells = [[show(cell) for cell in row] for row in rows]
    widths = [max([len(column), *(len(row[i]) for row in cells)]) for i, column in enumerate(columns)]
    numeric = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(columns))]
    for row in [list(columns), *cells]:
        padded = [c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True)]
        print("  ".join(padded).rstrip())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text == "-"
    return True


def show(value: Any) -> str:
    """A value as people read it: four digits, no quotes."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(show(item) for item in value)
    return str(value)


def show_seconds(seconds: float) -> str:
    """75 -> "1m 15s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


class _Stage:
    """What is known of one stage's progress since this process began to look."""

    def __init__(self, line: Mapping[str, Any]):
        self.first_step, self.first_time = line.get("at", line["step"]), line["time"]
        self.last_said = 0.0
        self.update(line)

    def update(self, line: Mapping[str, Any]) -> None:
        self.step, self.time = line.get("at", line["step"]), line["time"]
        self.total = line.get("total", getattr(self, "total", None))
        values = {key: value for key, value in line.items() if key not in NOT_VALUES}
        self.values = values or getattr(self, "values", {})

    @property
    def rate(self) -> float | None:
        """Steps a second."""
        seconds = self.time - self.first_time
        return (self.step - self.first_step) / seconds if seconds > 0 and self.step > self.first_step else None

    def text(self) -> str:
        """The step, rate, time left and values, on one line."""
        parts = [f"{self.step}/{self.total}" if self.total else str(self.step)]
        if self.rate:
            parts.append(f"{show(self.rate)}/s")
            if self.total:
                parts.append(f"{show_seconds(max(0, self.total - self.step) / self.rate)} left")
        return "  ".join(parts + [f"{key} {show(value)}" for key, value in self.values.items()])


class Progress:
    """Follows a run's metrics.jsonl in a thread, and shows it on stderr while the `with` block lasts.

    A stage begins with its first line, or one with event="begin"; it ends with a line with event="end", with a step
    that reaches `total`, or with the block. On a terminal each stage has a bar; elsewhere plain lines come, a few
    seconds apart.
    """

    def __init__(self, metrics: Path):
        self.metrics = metrics
        self.offset = metrics.stat().st_size if metrics.exists() else 0
        self.stages: dict[str, _Stage] = {}
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self.display = _Bars() if sys.stderr.isatty() and not in_json() else _Lines()

    def __enter__(self) -> Progress:
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.thread.join(timeout=5)

    def _follow(self) -> None:
        try:
            while not self.stop.wait(SECONDS_BETWEEN_LOOKS):
                self._look()
            self._look()
        finally:
            self.display.close(self.stages)

    def _look(self) -> None:
        try:
            with open(self.metrics, "rb") as file:
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        for text in whole.splitlines():
            try:
                line = json.loads(text)
                self._take(line)
            except (ValueError, KeyError, TypeError):
                continue

    def _take(self, line: Mapping[str, Any]) -> None:
        name, event = line["stage"], line.get("event")
        stage = self.stages.get(name)
        if stage is None or event == "begin":
            self.stages[name] = stage = _Stage(line)
            self.display.begin(name, stage)
        else:
            stage.update(line)
        if event == "end" or (stage.total and stage.step >= stage.total):
            self.display.end(name, stage)
            del self.stages[name]
        else:
            self.display.step(name, stage)


class _Lines:
    """Plain lines on stderr."""

    def say(self, name: str, text: str, stage: _Stage | None = None) -> None:
        fields = {} if stage is None else {"step": stage.step, "total": stage.total, **stage.values}
        say("progress", f"{time.strftime('%H:%M:%S')}  {name:<14} {text}", stage=name, **fields)

    def begin(self, name: str, stage: _Stage) -> None:
        self.say(name, "begins" + (f", {stage.total} steps" if stage.total else ""))
        stage.last_said = time.monotonic()

    def step(self, name: str, stage: _Stage) -> None:
        if time.monotonic() - stage.last_said >= SECONDS_BETWEEN_LINES:
            self.say(name, stage.text(), stage)
            stage.last_said = time.monotonic()

    def end(self, name: str, stage: _Stage) -> None:
        self.say(name, f"done      {stage.text()}", stage)

    def close(self, stages: Mapping[str, _Stage]) -> None:
        for name, stage in stages.items():
            self.say(name, stage.text(), stage)


class _Bars:
    """A bar for each stage that is under way, and a line for each that is done."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False),
        )
        self.bars = RichProgress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4)
        self.tasks: dict[str, Any] = {}
        self.bars.start()

    def begin(self, name: str, stage: _Stage) -> None:
        if name in self.tasks:
            self.bars.remove_task(self.tasks.pop(name))
        self.tasks[name] = self.bars.add_task(name, total=stage.total, completed=stage.step, text=stage.text())

    def step(self, name: str, stage: _Stage) -> None:
        self.bars.update(self.tasks[name], total=stage.total, completed=stage.step, text=stage.text())

    def end(self, name: str, stage: _Stage) -> None:
        self.bars.remove_task(self.tasks.pop(name))
        self.bars.console.print(f"{name:<14} done  {stage.text()}", markup=False, highlight=False)

    def close(self, stages: Mapping[str, _Stage]) -> None:
        self.bars.stop()
