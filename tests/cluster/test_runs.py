"""A whole run over Ray gives the bytes that it gives without, whatever is killed, stopped or frozen meanwhile."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import time

import psutil
import pytest


class Chaos:
    """A training over Ray, and what is done to it. Each start is a command of its own, under a home of its own."""

    def __init__(self, command, folder):
        self.folder, self.command, self.driver = folder, command, None
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment |= {"ONEIRA_HOME": str(folder.parent / "home")}
        self.seconds_to_end: list[float] = []

    def start(self):
        if (self.folder / "config.json").exists():
            words = self.command(None, "resume", str(self.folder))
        else:
            words = ["ray" if word == "serial" else word for word in self.command(self.folder)]
        self.driver = subprocess.Popen(
            words, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def lines(self):
        try:
            return len((self.folder / "metrics.jsonl").read_bytes().splitlines())
        except FileNotFoundError:
            return 0

    def work(self, lines, seconds=280):
        """Waits for so many lines more in the metrics. Whether the driver still runs then."""
        wanted, end = self.lines() + lines, time.monotonic() + seconds
        while self.lines() < wanted and self.driver.poll() is None:
            assert time.monotonic() < end, "no progress"
            time.sleep(0.01)
        return self.driver.poll() is None

    def workers(self):
        found = []
        for process in psutil.Process(self.driver.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.name().startswith("ray::Worker"):
                    found.append(process)
        return found

    def to_cluster(self, name):
        """Kills the cluster's processes of that name, and waits for what the driver makes of it. Its exit code."""
        family = psutil.Process(self.driver.pid).children(recursive=True)
        began = time.monotonic()
        for process in family:
            if process.name() == name:
                process.kill()
        self.driver.communicate(timeout=800)
        self.seconds_to_end.append(time.monotonic() - began)
        psutil.wait_procs(family, timeout=60)
        return self.driver.returncode

    def to_worker(self, number, chance):
        """Sends the signal to one of the workers, the trainer among them. Whether there was one."""
        workers = self.workers()
        with contextlib.suppress(psutil.Error, IndexError):
            chance.choice(workers).send_signal(number)
        return bool(workers)

    def to_driver(self, number):
        """Sends the signal to the driver, waits for its end, and gives its exit code."""
        family = psutil.Process(self.driver.pid).children(recursive=True)
        began = time.monotonic()
        self.driver.send_signal(number)
        self.driver.communicate(timeout=120)
        self.seconds_to_end.append(time.monotonic() - began)
        psutil.wait_procs(family, timeout=60)  # what is left of a cluster would share the cores with the next
        return self.driver.returncode

    def finish(self):
        """To the end. Ray gives up a start after 30 s, which a loaded machine may need: then once more, as a user would."""
        _, problems = self.driver.communicate(timeout=800)
        if "timed out during startup" in problems:
            self.start()
            _, problems = self.driver.communicate(timeout=800)
        assert self.driver.returncode == 0, problems


@pytest.fixture
def chaos_in(command):
    """chaos_in(folder) is a `Chaos` there; what it has started ends with the test."""
    made = []

    def make(folder):
        made.append(Chaos(command, folder))
        return made[-1]

    yield make
    for chaos in made:
        if chaos.driver is not None and chaos.driver.poll() is None:
            chaos.driver.kill()


def kept(folder):
    """sha256 of all that the run's checkpoints hold: weights, CMA-ES state, optimizers, generators of random numbers.

    Of each the last one: how often evolution saves in between is a matter of the clock.
    """
    last = {path.name.partition("@")[0]: path for path in sorted((folder / "checkpoints").glob("*@*"))}
    files = [file for path in last.values() for file in sorted(path.iterdir())]
    return {f"{file.parent.name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_run_over_ray_has_the_same_bytes_as_one_without_whoever_is_killed(undisturbed, chaos_in, tmp_path):
    chaos, chance = chaos_in(tmp_path / "run"), random.Random(0)
    chaos.start()
    assert chaos.work(3) and chaos.to_worker(signal.SIGKILL, chance)
    assert chaos.work(3) and chaos.to_driver(signal.SIGKILL) == -signal.SIGKILL
    chaos.start()
    assert chaos.work(2) and chaos.to_driver(signal.SIGTERM) == 75
    chaos.start()
    chaos.finish()
    assert kept(tmp_path / "run") == kept(undisturbed[0])


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_sigterm_ends_a_run_over_ray_within_ten_seconds(undisturbed, chaos_in, tmp_path):
    chaos = chaos_in(tmp_path / "run")
    for lines in (1, 3, 3):
        chaos.start()
        assert chaos.work(lines) and chaos.to_driver(signal.SIGTERM) == 75
    chaos.start()
    chaos.finish()
    assert max(chaos.seconds_to_end) < 10, chaos.seconds_to_end
    assert kept(tmp_path / "run") == kept(undisturbed[0])


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_head_dies_and_the_run_goes_on_under_another(undisturbed, chaos_in, tmp_path, capsys):
    """Its two processes in turn: who knows the cluster, and the node's own. Ray ends the driver (1), or the driver gives up (4)."""
    chaos = chaos_in(tmp_path / "run")
    for name in ("gcs_server", "raylet"):
        chaos.start()
        assert chaos.work(3) and chaos.to_cluster(name) in (1, 4)
    chaos.start()
    chaos.finish()
    with capsys.disabled():
        print(f"\nthe driver ended after {[round(seconds) for seconds in chaos.seconds_to_end]} s")
    assert max(chaos.seconds_to_end) < 120 and kept(tmp_path / "run") == kept(undisturbed[0])


@pytest.mark.slow
@pytest.mark.timeout(3500)
def test_twenty_kills_change_no_byte(undisturbed, chaos_in, tmp_path, capsys):
    """Drivers and workers by chance, at moments by chance. Where a run is done before its time, the next one goes on."""
    chance, kills, rounds = random.Random(7), {"worker": 0, "driver": 0}, 0
    while sum(kills.values()) < 20:
        folder, rounds = tmp_path / f"run-{rounds}", rounds + 1
        chaos = chaos_in(folder)
        chaos.start()
        while sum(kills.values()) < 20 and chaos.work(chance.randint(1, 3)):
            time.sleep(chance.random() * 0.5)
            if chance.random() < 0.5:
                kills["worker"] += chaos.to_worker(signal.SIGKILL, chance)
            elif chaos.driver.poll() is None:
                kills["driver"] += chaos.to_driver(signal.SIGKILL) == -signal.SIGKILL
                chaos.start()
        chaos.finish()
        assert kept(folder) == kept(undisturbed[0])
    with capsys.disabled():
        print(f"\n20 kills ({kills}) in {rounds} runs: 0 differing bytes")
