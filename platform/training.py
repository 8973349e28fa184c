"""What `oneira train` and `oneira resume` do: from a preset and a folder to a trained run."""

from __future__ import annotations

import inspect
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from . import logs
from .config import override, read_toml
from .console import Progress
from .errors import EnvironmentMissing, Interrupted, UsageError
from .presets import load_entry_point, load_preset
from .runs import Run, new_path, place_of, require_same_config


def read_settings(texts: Sequence[str]) -> dict[str, str]:
    """["a.b=c"] -> {"a.b": "c"}."""
    settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set needs KEY=VALUE, but got {text!r}.")
        settings[key.strip()] = value
    return settings


def read_preset(name: str, settings: Mapping[str, str], smoke: bool) -> tuple[str, Any]:
    """(preset's name, config): the preset or TOML file, made tiny if asked, then the settings of the command line."""
    if name.endswith(".toml"):
        preset, config = read_toml(name)
    else:
        preset, config = name, load_preset(name)
    return preset, override(config.smoke() if smoke else config, settings)


def open_or_create(
    preset: str, config: Any, path: str | Path | None, command: Sequence[str], smoke: bool
) -> tuple[Run, bool]:
    """(run, whether it is new). Raises ConfigError when `path` holds a run with another config."""
    place = new_path(preset) if path is None else place_of(path)
    if not (place / "config.json").exists():
        return Run.create(place, preset, config, command, smoke), True
    run = Run.open(place)
    require_same_config(run, preset, config)
    return run, False


def find_executor(name: str, address: str | None) -> Any:
    """What makes the executor called `name`. Raises where there is none, and for an address that it does not take."""
    try:
        factory = load_entry_point("oneira.executors", "executor", name)
    except EnvironmentMissing as error:
        raise EnvironmentMissing(f"{error} (or give --executor serial, which needs no cluster)") from error
    if address and "address" not in inspect.signature(factory).parameters:
        raise UsageError(f"The executor '{name}' takes no --address.")
    return factory


def make_executor(name: str, address: str | None) -> Any:
    """The executor called `name`; `address` is that of a cluster, for those which take one."""
    factory = find_executor(name, address)
    return factory(address=address) if address else factory()


class _Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP came; a KeyboardInterrupt, so that no `except Exception` on the way swallows it."""


def _terminate(number: int, frame: object) -> None:
    raise _Terminated(signal.Signals(number).name)


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP end the work as Ctrl-C does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    _take_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _take_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminate)


def train(
    run: Run, executor: str, address: str | None, *, progress: bool = True, begun: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Trains a run from wherever it stands to its end, and returns its summary.

    Args:
        begun: called once it is sure that no other process trains this run.

    Raises:
        Interrupted: Ctrl-C or SIGTERM came; the message says how to go on.
        UsageError: another process trains this run, or there is no such executor.
    """
    logs.about["run"] = run.name
    with run.lock(), _signals_interrupt():
        try:
            begun()
            run.clean()
            with make_executor(executor, address) as workers:
                _take_signals()  # a cluster's library installs handlers of its own when it connects
                with Progress(run.path / "metrics.jsonl") if progress else nullcontext():
                    summary = run.config.train(run, workers) or {}
            report(run)
            run.write_summary(summary)
            return summary
        except (KeyboardInterrupt, SystemExit, Interrupted) as error:
            why = str(error) if isinstance(error, Interrupted) else "Interrupted."
            raise Interrupted(f"{why} Go on with: oneira resume {_short(run.path)}") from error


def _short(path: Path) -> str:
    """The run as one would type it."""
    return path.name if place_of(path.name) == path else str(path)


def report(run: Run) -> Path:
    """Writes the run's report and its TensorBoard files anew, and returns the report's path."""
    run.export_tensorboard()
    return run.config.report(run)
