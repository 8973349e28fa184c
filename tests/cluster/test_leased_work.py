"""Work that takes the cluster's leases: training gives way to requests and ends with the same bytes, dreams and games show."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from oneira.cluster.commands import devices
from oneira.generative.presets import realnvp_moons
from oneira.platform.devices import LocalDevice, device_here, granted_by
from oneira.platform.errors import Interrupted, UsageError
from oneira.platform.executor import SerialExecutor
from oneira.platform.runs import Run
from oneira.platform.training import train


@pytest.fixture(scope="module")
def device(ray_cluster):
    from oneira.cluster.scheduling.client import ClusterDevice

    return ClusterDevice("cpu")


def desk(method, *arguments):
    import ray

    from oneira.cluster.scheduling.actor import find_desk

    return ray.get(getattr(find_desk(), method).remote(*arguments), timeout=20)


def leases(**wanted):
    found = [lease for device in desk("report")["devices"] for lease in device["leases"]]
    return [lease for lease in found if all(lease[key] == value for key, value in wanted.items())]


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, leases()
        time.sleep(0.01)
    return found


def new_run(folder, steps):
    config = realnvp_moons().smoke()
    return Run.create(folder, "realnvp-moons", replace(config, training=replace(config.training, steps=steps)))


def hold(shared, unit):
    """A unit of work that makes steps until a file is there."""
    with device_here("cpu").lease(priority=unit["priority"]) as lease:
        while not Path(unit["until"]).exists():
            lease.step()
            time.sleep(0.005)
    return type(lease).__name__


def test_who_hosts_the_work_says_who_grants_its_time(tmp_path):
    class Mine(LocalDevice):
        pass

    with granted_by(Mine):
        assert isinstance(device_here("cpu"), Mine) and device_here("cpu").name == "cpu"
    assert type(device_here()) is LocalDevice
    assert SerialExecutor().submit(hold, None, {"priority": "dream", "until": str(tmp_path)}).result() == "LocalLease"


def test_units_on_workers_have_a_lease_of_their_cores(tmp_path, executor):
    unit = {"priority": "dream", "until": str(tmp_path / "end")}
    handle = executor.submit(hold, None, unit)
    [lease] = until(lambda: leases(priority="dream", state="running"))
    assert lease["slots"] == 1
    (tmp_path / "end").touch()
    assert handle.result() == "ClusterLease"


def test_a_request_pauses_training_at_its_next_step_and_no_byte_changes(tmp_path, executor, device):
    alone, paused = (new_run(tmp_path / name, steps=200) for name in ("alone", "paused"))
    with SerialExecutor() as serial:
        alone.config.train(alone, serial)
    before, times = desk("report")["counts"]["pauses"], 0
    training = threading.Thread(target=lambda: paused.config.train(paused, executor))
    training.start()
    until(lambda: leases(priority="train", state="running"))
    while training.is_alive() and times < 5:
        with device.lease(priority="interactive") as lease:
            lease.step()
            if times < 3:
                assert not leases(priority="train", state="running")
                lines = len(paused.metrics("fit"))
                time.sleep(0.3)
                assert len(paused.metrics("fit")) == lines  # it does stand still
        times += 1
        time.sleep(0.1)
    training.join()
    assert times >= 3 and desk("report")["counts"]["pauses"] >= before + 2
    found = [(run.path / "model" / "model.safetensors").read_bytes() for run in (alone, paused)]
    assert found[0] == found[1]


def test_training_whose_lease_is_cancelled_frees_the_device_and_can_be_resumed(tmp_path, executor, device):
    run = new_run(tmp_path / "run", steps=20_000)
    ended = []

    def begin():
        try:
            run.config.train(run, executor)
        except Interrupted as error:
            ended.append(error)

    training = threading.Thread(target=begin)
    training.start()
    [lease] = until(lambda: leases(priority="train", state="running"))
    until(lambda: run.checkpoints.exists("fit"))
    devices(cancel=lease["id"])
    began = time.monotonic()
    with device.lease(priority="batch"):  # which passes nobody
        assert time.monotonic() - began < 2
    training.join(timeout=30)
    assert "cancelled" in str(ended[0])
    with pytest.raises(UsageError, match="no lease 1000000"):
        devices(cancel=1_000_000)


def test_the_command_says_how_to_go_on_when_its_lease_is_cancelled(tmp_path, monkeypatch):
    def cancelled(config, run, executor):
        raise Interrupted("The lease of the device was cancelled.")

    run = new_run(tmp_path / "run", steps=1)
    monkeypatch.setattr(type(run.config), "train", cancelled)
    with pytest.raises(Interrupted, match=r"was cancelled\. Go on with: oneira resume .*run"):
        train(run, "serial", None, progress=False)
