"""The scheduler on a real Ray: leases that stay, pauses that change no byte, deaths of clients and of the scheduler itself."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn

from oneira.generative.training import TrainSettings, fit
from oneira.platform.devices import LocalDevice
from oneira.platform.errors import ClusterError, Interrupted


@pytest.fixture(scope="module")
def device(ray_cluster):
    from oneira.cluster.scheduling.client import ClusterDevice

    return ClusterDevice("cpu")


def report():
    import ray

    from oneira.cluster.scheduling.actor import find_desk

    return ray.get(find_desk(start=False).report.remote(), timeout=20)


def leases():
    return [lease for device in report()["devices"] for lease in device["leases"]]


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, leases()
        time.sleep(0.05)


@pytest.fixture
def stranger(ray_cluster):
    """Another process with a lease of its own."""
    import ray

    class Stranger:
        def hold(self, priority):
            from oneira.cluster.scheduling.client import ClusterDevice

            self.block = ClusterDevice("cpu").lease(priority=priority)
            self.lease = self.block.__enter__()
            return os.getpid()

        def step(self):
            self.lease.step()

    actor = ray.remote(Stranger).options(num_cpus=0).remote()
    yield actor
    ray.kill(actor)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(8, 8)

    def loss(self, batch, generator):
        noise = torch.randn(batch.shape, generator=generator)
        time.sleep(0.005)
        return (self.body(batch + noise) - batch).square().mean(), {}


def batch_at(step):
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(step))


def test_blocks_in_a_row_share_one_lease_and_steps_ask_nobody(device):
    with device.lease(priority="batch"):
        before = report()["counts"]["grants"]
    for _ in range(5):
        with device.lease(priority="dream", bytes=1000) as lease:
            for _ in range(10):
                lease.step()
    assert report()["counts"]["grants"] == before + 1
    until(lambda: not leases())  # after a while it goes by itself


def test_training_that_is_paused_ends_with_the_same_bytes(device):
    settings = TrainSettings(steps=200, batch_size=16, precision="fp32")
    alone = fit(Net(), batch_at, settings, device=LocalDevice("cpu")).state_dict()
    pauses, found = report()["counts"]["pauses"], {}
    training = threading.Thread(target=lambda: found.update(fit(Net(), batch_at, settings, device=device).state_dict()))
    training.start()
    until(lambda: leases())
    times = 0
    while training.is_alive():
        with device.lease(priority="interactive") as lease:
            running = [lease["priority"] for lease in leases() if lease["state"] == "running"]
            assert running == ["interactive"]
            lease.step()
        times += 1
        time.sleep(0.2)
    training.join()
    assert report()["counts"]["pauses"] > pauses and times >= 2
    assert all(torch.equal(alone[key], found[key]) for key in alone)


def test_the_devices_command_shows_who_has_what(device, capsys):
    from oneira.cluster.commands import devices, survey

    with device.lease(priority="dream", bytes=int(2e9)):
        devices(address=None, as_json=False)
        [cpu] = survey()["cluster"]["scheduler"]["devices"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "dream of" in line]
    assert len(lines) == 1 and "running" in lines[0] and "2.00 GB" in lines[0]
    assert cpu["slots_taken"] == cpu["slots"] and cpu["used"] >= 2e9


def test_a_process_that_ends_in_order_gives_back_at_once_and_says_nothing(ray_cluster, device):
    script = (
        "from oneira.cluster import connect, disconnect\n"
        "from oneira.cluster.scheduling.client import ClusterDevice\n"
        "connect()\n"
        "with ClusterDevice('cpu').lease(priority='train') as lease:\n    lease.step()\n"
        "disconnect()\n"
        "print('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")
    assert not leases()


def test_what_is_cancelled_stops_at_its_next_step_and_what_is_too_large_is_refused(device):
    import ray

    from oneira.cluster.scheduling.actor import find_desk

    desk = find_desk(start=False)
    with pytest.raises(Interrupted), device.lease(priority="train") as lease:
        [shown] = [shown for shown in leases() if shown["priority"] == "train" and shown["state"] == "running"]
        assert ray.get(desk.cancel.remote(shown["id"]))
        while True:
            lease.step()
            time.sleep(0.01)
    assert not ray.get(desk.cancel.remote(10**9))
    with pytest.raises(ClusterError, match="no device is large enough"), device.lease(bytes=2**60):
        pass


def test_what_a_dead_client_held_is_back_within_five_seconds(device, stranger):
    import ray

    from oneira.cluster.scheduling.client import Busy

    pid = ray.get(stranger.hold.remote("interactive"), timeout=60)
    until(lambda: any(str(pid) in lease["client"] for lease in leases()))
    with pytest.raises(Busy), device.lease(priority="batch", deadline=0.5):
        pass
    os.kill(pid, 9)
    began = time.monotonic()
    with device.lease(priority="batch"):
        assert time.monotonic() - began < 5
    assert not any(str(pid) in lease["client"] for lease in leases())


def test_a_scheduler_that_dies_comes_back_and_knows_who_has_what(device, stranger):
    import ray

    from oneira.cluster.scheduling.actor import find_desk

    pid = ray.get(stranger.hold.remote("train"), timeout=60)
    ray.kill(find_desk(start=False), no_restart=False)
    began = time.monotonic()
    until(lambda: _says(lambda: any(str(pid) in lease["client"] and lease["state"] == "running" for lease in leases())))
    assert time.monotonic() - began < 5
    got = threading.Event()

    def interactive():
        with device.lease(priority="interactive"):
            got.set()

    asking = threading.Thread(target=interactive)
    asking.start()
    assert not got.wait(4)  # longer than the scheduler takes to grant again: it is not given twice
    paused = stranger.step.remote()  # returns when it has the device again
    assert got.wait(5)
    asking.join()
    ray.get(paused, timeout=10)


def test_a_process_joins_also_where_the_scheduler_has_just_died(device, monkeypatch):
    from ray.exceptions import RayActorError

    from oneira.cluster.scheduling import client

    found, tries = client.find_desk, []

    class Dead:
        class join:
            @staticmethod
            def remote(*arguments):
                tries.append(arguments)
                raise RayActorError

    monkeypatch.setattr(client, "find_desk", lambda: Dead if len(tries) < 2 else found())
    monkeypatch.setattr(client, "_sessions", {})
    with client.ClusterDevice("cpu").lease(priority="batch"):
        assert len(tries) == 2 and any(lease["priority"] == "batch" for lease in leases())
    client._session().close()


def _says(condition):
    try:
        return condition()
    except Exception:  # it is not back yet
        return False
