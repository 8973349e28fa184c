"""One Ray for all tests, started only if a test asks for it, under a home of its own."""

import os
from pathlib import Path

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
