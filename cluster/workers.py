"""The actor that runs units of work in a process of its own. It imports no Ray: the executor makes an actor of it.

A unit's function arrives as "module:qualname". A module that this process cannot import by name (a script's `__main__`,
a test file) is asked for once: the executor then sends the function itself, by Ray's transport.
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

from oneira.platform.devices import Device, LocalDevice, granted_by, num_cores
from oneira.platform.executor import copy_tree

SHARED_KEPT = 2  # shared values held at once; what a stage shares is read by many units in a row

DONE, FAILED, UNKNOWN_FUNCTION, NO_MEMORY = "done", "failed", "unknown function", "no memory"


class Worker:
    """Runs one unit at a time, with a fixed number of torch threads."""

    def __init__(self, threads: int, device: Callable[..., Device] | None = None) -> None:
        """`threads`: torch threads; 0 means all cores that this process may use.
        device: made as device(name, cores=threads), who grants time to units; None: they take it.
        """
        self.threads, self._device = threads or num_cores(), device
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
            os.environ[name] = str(self.threads)
        import torch

        torch.set_num_threads(self.threads)
        self._functions: dict[str, Callable] = {}
        self._shared: OrderedDict[str, Any] = OrderedDict()

    def run(self, name: str, code: list, shared: list, unit: Any, threads: int) -> tuple[str, Any, str, float]:
        """Run `name(shared value, unit)`.

        Args:
            name: "module:qualname".
            code: empty, or the reference to the function itself.
            shared: empty, or the reference to the shared value. In a list, so that Ray leaves fetching it to us.
            threads: torch threads for this unit, 0 for the worker's own number.

        Returns:
            (DONE, the value, what was written to stderr, core-seconds of the function), (FAILED, (error type, message, traceback),
            stderr, 0), (NO_MEMORY, what could not be had, stderr, 0), or (UNKNOWN_FUNCTION, None, "", 0).
        """
        said = io.StringIO()
        try:
            function = self._find(name, code)
            if function is None:
                return UNKNOWN_FUNCTION, None, "", 0.0
            self._set_threads(threads or self.threads)
            arguments = self._fetch(shared), copy_tree(unit)
            granter = functools.partial(self._device, cores=threads or self.threads) if self._device else LocalDevice
            began = time.perf_counter()
            with redirect_stderr(said), granted_by(granter):
                value = function(*arguments)
            return DONE, value, said.getvalue(), (time.perf_counter() - began) * (threads or self.threads)
        except BaseException as error:
            if _is_of_memory(error):
                return NO_MEMORY, str(error), said.getvalue(), 0.0
            kind = f"{type(error).__module__}:{type(error).__qualname__}"
            return FAILED, (kind, str(error), traceback.format_exc()), said.getvalue(), 0.0

    def _find(self, name: str, code: list) -> Callable | None:
        if name not in self._functions:
            found = _fetch(code[0]) if code else _import(name)
            if found is None:
                return None
            self._functions[name] = found
        return self._functions[name]

    def _fetch(self, shared: list) -> Any:
        if not shared:
            return None
        key = shared[0].hex()
        if key not in self._shared:
            self._shared[key] = _fetch(shared[0])
            while len(self._shared) > SHARED_KEPT:
                self._shared.popitem(last=False)
        self._shared.move_to_end(key)
        return self._shared[key]

    def _set_threads(self, threads: int) -> None:
        import torch

        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _is_of_memory(error: BaseException) -> bool:
    """Whether memory was short: numpy's, Python's, a device's, or torch's of a CPU, which is a plain RuntimeError."""
    import torch

    cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    return cpu or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def _fetch(reference: Any) -> Any:
    return sys.modules["ray"].get(reference)


def _import(name: str) -> Callable | None:
    """The function named "module:qualname", or None where this process cannot import it."""
    module, _, qualname = name.partition(":")
    if module == "__main__":
        return None
    try:
        found: Any = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ModuleNotFoundError, AttributeError) as error:
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and not f"{module}.".startswith(f"{missing}."):
            raise  # the module is there and misses one of its own imports
        return None
    return found
