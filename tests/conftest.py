"""Shared by all tests: they leave the user's own Oneira alone; and one tiny whole run for those that want one."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_home(tmp_path_factory: pytest.TempPathFactory):
    """A home of the tests' own; whatever a command records there is not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONEIRA_HOME", str(tmp_path_factory.mktemp("oneira-home")))
        patch.setenv("MPLBACKEND", "agg")
        yield


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """Children that tests interrupt must hear it: a shell that runs the tests in the background has SIGINT ignored, and they inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


TINY = ["check_episodes=0", "film_steps=0", "checks=2", "starts=16", "window=16"]


def command(folder, *more):
    settings = [part for text in TINY for part in ("--set", text)]
    start = ["train", "carracing-quick", "--smoke", "--executor", "serial", "--run", str(folder), *settings]
    return [sys.executable, "-m", "oneira.platform.cli", *(more or start)]


def weights(folder):
    """sha256 of every tensor file of a run's checkpoints."""
    files = sorted((folder / "checkpoints").glob("*/tensors.safetensors"))
    return {f.parent.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def fingerprint(run):
    """sha256 of every file that a run which trains one network keeps."""
    files = sorted(
        file
        for part in ("checkpoints", "model", "evaluations")
        for file in (run.path / part).rglob("*")
        if file.is_file()
    )
    return {str(file.relative_to(run.path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(name="command")
def command_fixture():
    """command(folder) trains the tiny run there; command(folder, "evaluate", ...) is any other command line."""
    return command


@pytest.fixture(name="weights")
def weights_fixture():
    return weights


@pytest.fixture(name="fingerprint")
def fingerprint_fixture():
    return fingerprint


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    started = time.monotonic()
    done = subprocess.run(command(folder), capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    return folder, time.monotonic() - started
