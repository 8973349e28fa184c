"""Shared by all tests: they leave the user's own Oneira alone."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_home(tmp_path_factory: pytest.TempPathFactory):
    """A home of the tests' own; whatever a command records there is not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONEIRA_HOME", str(tmp_path_factory.mktemp("oneira-home")))
        patch.setenv("MPLBACKEND", "agg")
        yield
