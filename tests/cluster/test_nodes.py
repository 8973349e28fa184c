"""Several nodes, each a real raylet: results do not depend on how many there are, nor on who joins, leaves or dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def evolution(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["ONEIRA_HOME"] = str(tmp_path_factory.mktemp("home"))

    def over(nodes, deaths=0, naps=0):
        program = Path(__file__).with_name("nodes.py")
        words = [sys.executable, str(program), str(nodes), str(deaths), str(naps)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stderr
        [found] = [line for line in done.stdout.splitlines() if line.startswith("{")]  # Ray writes there as well
        return json.loads(found)

    return over


@pytest.fixture(scope="module")
def alone(evolution):
    return evolution(0)["digest"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_evolution_is_the_same_on_any_number_of_nodes(evolution, alone, nodes, capsys):
    found = evolution(nodes, naps=60)
    with capsys.disabled():
        print(f"\n{nodes} nodes: overhead of scheduling {found['overhead']:.1%} of the work")
    assert found["digest"] == alone and found["workers"] == nodes
    assert found["overhead"] <= 0.05


@pytest.mark.parametrize("deaths", [2, pytest.param(10, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_nodes_that_die_and_others_that_join_change_no_byte(evolution, alone, deaths, capsys):
    found = evolution(2, deaths)
    with capsys.disabled():
        print(f"\n{found['deaths']} nodes died: {found['seconds']:.0f} s, 0 differing bytes")
    assert found["deaths"] == deaths and found["digest"] == alone
