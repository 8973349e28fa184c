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

    def over(*arguments, program="nodes.py", within=()):
        words = [*within, sys.executable, str(Path(__file__).with_name(program)), *map(str, arguments)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stderr
        [found] = [line for line in done.stdout.splitlines() if line.startswith("{")]  # Ray writes there as well
        return json.loads(found)

    return over


@pytest.fixture(scope="module")
def alone(evolution):
    return evolution(0, 0, 0)["digest"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_evolution_is_the_same_on_any_number_of_nodes(evolution, alone, nodes, capsys):
    found = evolution(nodes, 0, 60)
    with capsys.disabled():
        print(f"\n{nodes} nodes: overhead of scheduling {found['overhead']:.1%} of the work")
    assert found["digest"] == alone and found["workers"] == nodes
    assert found["overhead"] <= 0.05


@pytest.mark.parametrize("deaths", [2, pytest.param(10, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_nodes_that_die_and_others_that_join_change_no_byte(evolution, alone, deaths, capsys):
    found = evolution(2, deaths, 0)
    with capsys.disabled():
        print(f"\n{found['deaths']} nodes died: {found['seconds']:.0f} s, 0 differing bytes")
    assert found["deaths"] == deaths and found["digest"] == alone


def may_make_networks():
    """Whether this user may have a network namespace with a virtual device of its own."""
    try:
        words = ["unshare", "--net", "ip", "link", "add", "here", "type", "veth", "peer", "name", "there"]
        return subprocess.run(words, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("seconds", "nodes"), [(5, 2), (90, 1)])
def test_a_network_that_is_cut_changes_no_byte(evolution, alone, seconds, nodes, capsys):
    """After 5 s the other node is still there; after 90 s the cluster has given it up, and the rest does its work."""
    if not may_make_networks():
        pytest.skip("no network namespaces: not root, or no unshare and ip")
    found = evolution(seconds, program="cut.py", within=("unshare", "--net"))
    with capsys.disabled():
        print(f"\n{seconds} s without network: {found['seconds']:.0f} s, {found['nodes']} nodes, 0 differing bytes")
    assert found["digest"] == found["again"] == alone and found["nodes"] == nodes
