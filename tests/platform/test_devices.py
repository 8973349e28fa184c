from __future__ import annotations

import pytest
import torch

from oneira.platform.devices import (
    LocalDevice,
    cpu_has_bf16,
    describe,
    memory_bytes,
    num_cores,
    pick_device,
    pick_precision,
)
from oneira.platform.errors import EnvironmentMissing, UsageError


def test_names_of_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(UsageError, match="Did you mean 'cuda'"):
        pick_device("cudaa")
    with pytest.raises(UsageError):
        pick_device("cuda:x")
    with pytest.raises(EnvironmentMissing, match="cuda:99"):
        pick_device("cuda:99")


def test_precision_follows_the_hardware_unless_named() -> None:
    cpu = torch.device("cpu")
    assert pick_precision("auto", cpu) == (torch.bfloat16 if cpu_has_bf16() else torch.float32)
    assert pick_precision("fp32", cpu) == torch.float32 and pick_precision("bf16", cpu) == torch.bfloat16
    with pytest.raises(UsageError, match="Did you mean 'bf16'"):
        pick_precision("bf61", cpu)


def test_a_local_lease_is_granted_at_once() -> None:
    device = LocalDevice("cpu")
    with device.lease(bytes=2**40, priority="batch", deadline=0.0) as lease:
        lease.step()
    assert device.torch_device == torch.device("cpu")
    with pytest.raises(UsageError, match="Did you mean 'dream'"), device.lease(priority="dreams"):  # type: ignore[arg-type]
        pass


def test_describe_names_what_auto_picks() -> None:
    assert describe()["device"] == str(pick_device()) and describe()["cores"] >= 1


def test_a_containers_limits_count(tmp_path):
    cores, memory = num_cores(tmp_path), memory_bytes(tmp_path)
    assert cores >= 1 and memory > 1 << 28
    for written in ("max 100000\n", "nonsense", "-1 100000"):
        (tmp_path / "cpu.max").write_text(written)
        assert num_cores(tmp_path) == cores
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert num_cores(tmp_path) == 1, "half a core"
    (tmp_path / "cpu.max").write_text(f"{1000 * 100000} 100000\n")
    assert num_cores(tmp_path) == cores
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_bytes(tmp_path) == memory
    (tmp_path / "memory.max").write_text("1000000\n")
    assert memory_bytes(tmp_path) == 1_000_000
    first = tmp_path / "first"  # the older layout
    for name, value in (
        ("cpu/cpu.cfs_quota_us", 80_000),
        ("cpu/cpu.cfs_period_us", 100_000),
        ("memory/memory.limit_in_bytes", 7),
    ):
        (first / name).parent.mkdir(parents=True, exist_ok=True)
        (first / name).write_text(f"{value}\n")
    assert num_cores(first) == 1 and memory_bytes(first) == 7
