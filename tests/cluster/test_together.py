"""Groups of processes by Ray Train: a real Ray, a real group."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from oneira.generative.models import load_model
from oneira.generative.realnvp import RealNVPConfig
from oneira.platform.errors import ConfigError, DataError, UsageError
from oneira.platform.executor import SerialExecutor
from oneira.platform.presets import load_preset
from oneira.platform.runs import Run


def add_up(shared, unit):
    """The sum of the ranks, by the group itself. Unit: die (a file that is made when the second dies), fail."""
    import torch
    import torch.distributed as dist

    if dist.get_rank() == 1 and unit.get("die") and not Path(unit["die"]).exists():
        Path(unit["die"]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if dist.get_rank() == 1 and unit.get("fail"):
        raise DataError("row 7 is missing")
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    return {"total": float(total), "size": dist.get_world_size(), "rank": dist.get_rank()}


@pytest.fixture
def importable(monkeypatch):
    """The functions of this file, importable by name in workers."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import test_together

    return test_together.add_up


def test_a_preset_trains_on_two_workers(executor, tmp_path):
    config = replace(load_preset("realnvp-moons").smoke(), model=RealNVPConfig(couplings=2, width=8), workers=2)
    run = Run.create(tmp_path / "run", "realnvp-moons", config)
    assert run.config.train(run, executor)["log_likelihood"] > -10
    assert load_model(run.path).sample(3, 0).shape == (3, 2)
    assert [line["step"] for line in run.metrics("fit")] == [5, 10, 15, 20], "one process logs"


def test_a_death_begins_again_and_a_failure_is_told(executor, importable, tmp_path):
    found = executor.together(importable, {"die": str(tmp_path / "died")}, 2)
    assert found == {"total": 1.0, "size": 2, "rank": 0} and (tmp_path / "died").exists()
    with pytest.raises(DataError, match="row 7"):
        executor.together(importable, {"fail": True}, 2)


def test_without_a_cluster_it_says_so():
    with pytest.raises(UsageError, match="--executor ray"):
        SerialExecutor().together(add_up, {}, 2)
    with pytest.raises(ConfigError, match="divide"):
        replace(load_preset("realnvp-moons"), workers=3)
