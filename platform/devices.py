"""Which device and precision torch works in, and the small protocol by which work asks for time on a device.

Nothing falls back silently: a name that was given and cannot be had is an error; what `auto` found is in provenance.
"""

from __future__ import annotations

import functools
import math
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from .errors import EnvironmentMissing, UsageError, did_you_mean

if TYPE_CHECKING:
    import torch

Priority = Literal["interactive", "dream", "train", "batch"]
PRIORITIES: tuple[str, ...] = get_args(Priority)  # most urgent first
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "bf16", "fp32")
CONTROL_GROUPS = Path("/sys/fs/cgroup")  # where Linux says what a container may use


def check_priority(priority: str) -> None:
    """UsageError where it is none of `PRIORITIES`."""
    if priority not in PRIORITIES:
        raise UsageError(f"Unknown priority '{priority}'. {did_you_mean(priority, PRIORITIES)}")


def num_cores(groups: Path = CONTROL_GROUPS) -> int:
    """Cores that this process may use: of its affinity, and of its container's share of time, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = 0, 0
    with suppress(OSError, ValueError):  # version 2 says "max 100000" where there is no limit
        quota, period = map(int, (groups / "cpu.max").read_text(encoding="ascii").split())
    with suppress(OSError, ValueError):
        quota, period = (
            int((groups / "cpu" / f"cpu.cfs_{key}_us").read_text(encoding="ascii")) for key in ("quota", "period")
        )
    return min(cores, math.ceil(quota / period)) if quota > 0 and period > 0 else cores


def memory_bytes(groups: Path = CONTROL_GROUPS) -> int:
    """Bytes of memory that this process may use: the machine's, or its container's where that has fewer."""
    least = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            least = min(least, int((groups / name).read_text(encoding="ascii")))
    return least


@functools.cache
def cpu_model() -> tuple[str, frozenset[str]]:
    """The CPU's name, and its feature flags where the system tells them."""
    name, flags = platform.processor() or platform.machine(), frozenset[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return name, flags
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            return name, frozenset(value.split())
    return name, flags


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware; without it bf16 is slower than fp32."""
    return bool(cpu_model()[1] & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


def pick_device(name: str = "auto") -> torch.device:
    """The torch device called `name` (auto, cpu, cuda, cuda:N, mps); auto prefers cuda, then mps, then cpu.

    Raises:
        UsageError: not the name of a device.
        EnvironmentMissing: this machine, or this torch, does not have it.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in DEVICES or (index and not index.isdigit()):
        raise UsageError(f"Unknown device '{name}'. {did_you_mean(name, DEVICES)}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise EnvironmentMissing(
            f"Device '{name}' asked for, but torch sees {torch.cuda.device_count()} CUDA devices here."
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise EnvironmentMissing(f"Device '{name}' asked for, but torch has no MPS here.")
    return torch.device(name)


def pick_precision(name: str = "auto", device: torch.device | str | None = None) -> torch.dtype:
    """The dtype of heavy arithmetic: bf16 where the device has units for it, else fp32. None means `pick_device()`."""
    import torch

    if name not in PRECISIONS:
        raise UsageError(f"Unknown precision '{name}'. {did_you_mean(name, PRECISIONS)}")
    if name == "auto":
        kind = torch.device(device if device is not None else pick_device()).type
        has_units = kind == "cpu" and cpu_has_bf16()
        if kind == "cuda":
            has_units = torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if has_units else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def describe() -> dict[str, Any]:
    """Device, precision and machine as JSON values, for provenance and `oneira doctor`."""
    import torch

    device = pick_device()
    return {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()[0],
        "precision": "bf16" if pick_precision("auto", device) is torch.bfloat16 else "fp32",
        "cpu": cpu_model()[0],
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "cuda_devices": torch.cuda.device_count(),
    }


class Lease(Protocol):
    """The right to use a device for a while."""

    def step(self) -> None:
        """Called between steps of the work: may make it wait, or raise `Interrupted`."""
        ...


class Device(Protocol):
    """Something that grants time on a torch device."""

    @property
    def torch_device(self) -> torch.device: ...

    def lease(
        self, *, bytes: int = 0, priority: Priority = "train", deadline: float | None = None
    ) -> AbstractContextManager[Lease]:
        """Asks for the device. `bytes` of its memory are needed; `deadline` is in seconds from now."""
        ...


class LocalLease:
    """A lease that never makes anyone wait."""

    def step(self) -> None:
        return None


class LocalDevice:
    """The default: this process has the device to itself, every lease is granted at once."""

    def __init__(self, name: str = "auto"):
        self.name = name

    @functools.cached_property
    def torch_device(self) -> torch.device:
        return pick_device(self.name)

    @contextmanager
    def lease(
        self, *, bytes: int = 0, priority: Priority = "train", deadline: float | None = None
    ) -> Iterator[LocalLease]:
        check_priority(priority)
        yield LocalLease()


_granter: ContextVar[Callable[[str], Device]] = ContextVar("granter", default=LocalDevice)


def device_here(name: str = "auto") -> Device:
    """The device called `name` for work in this process: its own, or one whose time the process's host grants."""
    return _granter.get()(name)


@contextmanager
def granted_by(granter: Callable[[str], Device]) -> Iterator[None]:
    """Within the block `granter` makes what `device_here` gives: for hosts of work, which say who grants its time."""
    token = _granter.set(granter)
    try:
        yield
    finally:
        _granter.reset(token)
