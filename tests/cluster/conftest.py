"""One Ray for all tests, started only if a test asks for it, under a home of its own."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory):
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]
    os.environ["ONEIRA_HOME"] = str(tmp_path_factory.mktemp("oneira-home"))

    from oneira.cluster import connect, disconnect

    cluster = connect()
    yield cluster
    disconnect()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def executor(ray_cluster):
    from oneira.cluster.executor import RayExecutor

    with RayExecutor() as made:
        yield made


@pytest.fixture(scope="session")
def tiny():
    """The loader of the tiny model, importable by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield "tiny:load"


class Serving:
    """The command `oneira serve`, until its `url` answers."""

    def __init__(self, home, *arguments):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"ONEIRA_HOME": str(home), "PYTHONPATH": str(Path(__file__).parent), "PYTHONUNBUFFERED": "1"}
        environment.pop("ONEIRA_API_KEY", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "oneira.platform.cli", "serve", "--loader", "tiny:load", "--port", "0", *arguments],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        first = self.process.stdout.readline()
        found = re.search(r"https?://\S+", first)
        if not found:
            self.process.kill()
            raise AssertionError(first + self.process.stderr.read())
        self.url, self.curl = found[0], self.process.stdout.readline()
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        self.process.wait(timeout=60)
        _, alive = psutil.wait_procs(self.family, timeout=20)
        for left in alive:
            left.kill()
        return self.process.returncode, alive


@pytest.fixture(scope="session")
def serving():
    """serving(home, *arguments) starts `oneira serve` with the tiny models as users do."""
    return Serving
