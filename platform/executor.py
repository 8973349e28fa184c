"""The one seam between the stages of a run and the machines that do their work.

A stage gives an executor units of work: a module-level function, a value shared by many units, and a small unit. All
three cross processes, so values are trees of plain things and arrays, never live modules. `SerialExecutor` does the
work in this process and keeps the same rules (arguments are copied when given, shared arrays are read-only), so that a
stage cannot tell it from another.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Protocol, Self

import numpy as np

from .devices import num_cores
from .errors import OneiraError, UsageError

# dict (with str keys) / list / tuple of Trees, str, int, float, bool, None, np.ndarray
Tree = Any
Work = Callable[[Tree, Tree], Tree]


class Handle(Protocol):
    """A unit of work that was given away."""

    def result(self) -> Tree:
        """Waits for the result. Raises what the work raised: an `OneiraError` as itself, all else as RuntimeError."""
        ...


class Shared(Protocol):
    """A value that was put where every worker can read it."""


class Executor(Protocol):
    """Maps work over workers. `num_workers` hints how many units to keep under way; no result may depend on it.

    `core_seconds` counts what finished units have worked so far: the seconds of each times its threads.
    """

    num_workers: int
    core_seconds: float

    def share(self, value: Tree) -> Any:
        """Puts a value once, to be read by many units; its arrays arrive read-only."""
        ...

    def submit(self, function: Work, shared: Any | None, unit: Tree, *, threads: int = 1) -> Any:
        """Starts `function(shared value, unit)` with that many torch threads (0: all cores, on a worker of its own)."""
        ...

    def wait(self, handles: Collection[Any]) -> Any:
        """One of the handles, finished."""
        ...

    def map(self, function: Work, shared: Any | None, units: Iterable[Tree], *, threads: int = 1) -> Iterator[Tree]:
        """Results in the order of the units."""
        ...

    def together(self, function: Work, unit: Tree, count: int) -> Tree:
        """Runs `function(None, unit)` in `count` processes at once, which are one group of torch.distributed.

        Returns what the first of them returned. Where a process dies, all begin again.

        Raises:
            UsageError: this executor has no such processes.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def copy_tree(value: Tree, *, writeable: bool = True, path: str = "value") -> Tree:
    """A deep copy that shares nothing. Raises TypeError, naming the place, for what may not cross processes."""
    if value is None or isinstance(value, (str, bool, int, float, bytes)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError(
                f"{path} is an array of Python objects; only numbers, truth values and fixed texts cross processes."
            )
        copy = value.copy()
        copy.flags.writeable = writeable
        return copy
    if isinstance(value, dict):
        return {key: copy_tree(item, writeable=writeable, path=f"{path}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [copy_tree(item, writeable=writeable, path=f"{path}[{i}]") for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise TypeError(f"{path} is a {type(value).__name__}; only dict, list, tuple, scalars and arrays cross processes.")


def check_function(function: Work) -> None:
    """Raises TypeError unless other processes can import `function` by its name."""
    name = getattr(function, "__qualname__", "")
    if not name or "<" in name or getattr(function, "__module__", None) is None:
        raise TypeError(f"{function!r} must be a function at the top of a module: workers import it by its name.")


class UnitFailed(RuntimeError):
    """A unit of work raised what nobody expected.

    Args:
        what: the type and message of the worker's error. where: its traceback; the message ends with it.
    """

    def __init__(self, what: str, where: str) -> None:
        self.where = where.rstrip()
        super().__init__(f"A unit of work failed: {what}\n{self.where}")


def raise_from_worker(error: BaseException) -> None:
    """Raises a worker's exception here: an `OneiraError` as itself, others as `UnitFailed`."""
    if isinstance(error, OneiraError) or not isinstance(error, Exception):
        raise error
    where = "".join(traceback.format_exception(error))
    raise UnitFailed(f"{type(error).__name__}: {error}", where) from error


class _SerialShared:
    def __init__(self, value: Tree):
        self.value = copy_tree(value, writeable=False, path="shared")


class _SerialHandle:
    """Runs its work when first asked for the result."""

    def __init__(
        self, executor: SerialExecutor, function: Work, shared: _SerialShared | None, unit: Tree, threads: int
    ):
        self.executor = executor
        self.function, self.shared, self.unit, self.threads = function, shared, copy_tree(unit, path="unit"), threads
        self.done = False
        self.value: Tree = None
        self.error: Exception | None = None

    def run(self) -> None:
        import torch

        if self.done:
            return
        before, threads = torch.get_num_threads(), self.threads or num_cores()
        torch.set_num_threads(threads)
        began = time.perf_counter()
        try:
            self.value = self.function(None if self.shared is None else self.shared.value, self.unit)
        except Exception as error:
            self.error = error
        finally:
            torch.set_num_threads(before)
        self.executor.core_seconds += (time.perf_counter() - began) * threads
        self.done = True
        self.unit = self.shared = None

    def result(self) -> Tree:
        self.run()
        if self.error is not None:
            raise_from_worker(self.error)
        return self.value


class SerialExecutor:
    """Everything in this process, one unit after another, each run when its result is waited for."""

    num_workers = 1

    def __init__(self) -> None:
        self.core_seconds = 0.0

    def share(self, value: Tree) -> _SerialShared:
        return _SerialShared(value)

    def submit(self, function: Work, shared: _SerialShared | None, unit: Tree, *, threads: int = 1) -> _SerialHandle:
        check_function(function)
        return _SerialHandle(self, function, shared, unit, threads)

    def wait(self, handles: Collection[_SerialHandle]) -> _SerialHandle:
        if not handles:
            raise ValueError("wait() needs at least one handle")
        handle = next((handle for handle in handles if handle.done), next(iter(handles)))
        handle.run()
        return handle

    def map(
        self, function: Work, shared: _SerialShared | None, units: Iterable[Tree], *, threads: int = 1
    ) -> Iterator[Tree]:
        for handle in [self.submit(function, shared, unit, threads=threads) for unit in units]:
            yield handle.result()

    def together(self, function: Work, unit: Tree, count: int) -> Tree:
        raise UsageError(f"{count} workers need a cluster: --executor ray (a local one starts by itself).")

    def close(self) -> None:
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
