"""A Ray cluster of several nodes on this machine, and evolution over it: a program of its own, so that nothing of it is left.

    python nodes.py NODES DEATHS NAPS      # prints one JSON document

Each node is a raylet with one CPU, its workers and its part of the object store. A death is a SIGKILL of the raylet; a new node
joins then. `digest` is of the populations' whole state; `overhead` is of units of work that only sleep, NAPS for each node, so that
it does not count how the machine shares its cores: what the whole took, over what the units took, less one.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAP = 0.25  # seconds
QUICKLY = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


def nap(shared: Any, unit: float) -> float:
    time.sleep(unit)
    return unit


def config_of_evolution() -> Any:
    from dataclasses import replace

    from oneira.agents.presets import carracing_quick

    small = carracing_quick().smoke()
    plan = small.rounds[1]
    populations = tuple(replace(p, generations=12, horizon=20) for p in plan.populations)
    return replace(small, rounds=(small.rounds[0], replace(plan, segments=1, populations=populations)))


def bred(executor: Any) -> str:
    """sha256 of the whole state of two populations bred in a dream and in the twin of the real world."""
    import numpy as np

    from oneira.agents.evolving import evolve
    from oneira.agents.stages import drawn_model
    from oneira.platform.runs import Run

    config = config_of_evolution()
    tree, rng = drawn_model(config), np.random.default_rng(0)
    sizes = {"z": config.memory.z, "h": config.memory.hidden, "c": config.memory.hidden}
    tree["starts"] = {name: rng.standard_normal((8, size)).astype(np.float32) for name, size in sizes.items()}
    tree["starts"]["reward_prev"] = np.zeros(8, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "run", "carracing-quick", config)
        populations = evolve(config, 1, run, executor, executor.share(tree), {})
    digest = hashlib.sha256()
    for name, population in sorted(populations.items()):
        arrays, meta = population.state()
        digest.update(json.dumps([name, meta], sort_keys=True).encode())
        for key, array in sorted(arrays.items()):
            digest.update(key.encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def main(nodes: int, deaths: int, naps: int) -> None:
    from oneira.platform.executor import SerialExecutor

    if not nodes:
        print(json.dumps({"digest": bred(SerialExecutor())}))
        return
    from oneira.cluster import connection, executor

    connection.use_local_settings()
    from ray.cluster_utils import Cluster

    executor.NODES_SECONDS = 0.5
    store = {"object_store_memory": 100 << 20}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": QUICKLY, **store}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    others = [cluster.add_node(num_cpus=1, **store) for _ in range(nodes)]
    with executor.RayExecutor(cluster.address) as workers:
        list(workers.map(nap, None, [0.01] * (4 * nodes)))  # all have begun
        began = time.monotonic()
        list(workers.map(nap, None, [NAP] * (naps * nodes)))
        overhead = (time.monotonic() - began) / (NAP * naps) - 1 if naps else None

        class Chaos:
            """The executor, and after every few answers a node dies and another joins."""

            answers, left = 0, deaths

            def __getattr__(self, name: str) -> Any:
                return getattr(workers, name)

            def wait(self, handles: Any) -> Any:
                self.answers += 1
                if self.left and self.answers % 5 == 0:
                    self.left -= 1
                    cluster.remove_node(others.pop(0), allow_graceful=False)
                    others.append(cluster.add_node(num_cpus=1, **store))
                return workers.wait(handles)

        chaos = Chaos()
        began = time.monotonic()
        found = {"digest": bred(chaos), "seconds": time.monotonic() - began, "deaths": deaths - chaos.left}
        print(json.dumps({**found, "overhead": overhead, "workers": workers.num_workers}))
    connection.disconnect()
    cluster.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
