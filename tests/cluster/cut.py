"""Two nodes with addresses of their own, and evolution over them while the network between them is cut.

    unshare --net python cut.py SECONDS      # prints one JSON document

The head with one CPU is in this process's network namespace, the other node in another one: a pair of virtual Ethernet devices joins
them. A cut sets this side's device down and, after so many seconds, up again. All of it goes with the processes.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from typing import Any

from nodes import bred

HEAD, NODE = "198.51.100.1", "198.51.100.2"  # of a block that is meant for documentation


def ip(*words: str, inside: list[str] | None = None) -> None:
    subprocess.run([*(inside or []), "ip", *words], check=True, capture_output=True)


def ray_start(*words: str, inside: list[str] | None = None) -> subprocess.Popen[bytes]:
    command = [*(inside or []), sys.executable, "-m", "ray.scripts.scripts", "start"]
    store = ["--num-cpus=1", f"--object-store-memory={100 << 20}", "--disable-usage-stats", "--block"]
    return subprocess.Popen([*command, *words, *store], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def until_there(executor: Any, nodes: int) -> None:
    """Waits until so many nodes are alive."""
    end = time.monotonic() + 120
    while len(executor._cpus_of_nodes()) < nodes:
        assert time.monotonic() < end, "the node does not join"
        time.sleep(0.2)


def main(seconds: float) -> None:
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    other = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
    time.sleep(0.5)
    inside = ["nsenter", f"--target={other.pid}", "--net"]
    started = [other]
    try:
        ip("link", "add", "here", "type", "veth", "peer", "name", "there")
        ip("link", "set", "there", "netns", str(other.pid))
        for name, mine, theirs, where in (("here", HEAD, NODE, None), ("there", NODE, HEAD, inside)):
            ip("link", "set", "lo", "up", inside=where)
            ip("address", "add", f"{mine}/30", "dev", name, inside=where)
            ip("link", "set", name, "up", inside=where)
            ip("route", "add", "default", "via", theirs, inside=where)
        started.append(ray_start("--head", f"--node-ip-address={HEAD}", "--port=6379", "--include-dashboard=false"))
        time.sleep(8)
        join = [f"--address={HEAD}:6379", f"--node-ip-address={NODE}"]
        started.append(ray_start(*join, inside=inside))
        print(json.dumps(evolved(seconds)))
    finally:
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            process.wait(timeout=60)


def evolved(seconds: float) -> dict[str, Any]:
    from oneira.cluster import connection, executor

    connection.connect(f"{HEAD}:6379")
    until_there(executor, 2)
    executor.NODES_SECONDS = 0.5
    with executor.RayExecutor(f"{HEAD}:6379") as workers:

        def cut() -> None:
            ip("link", "set", "here", "down")
            time.sleep(seconds)
            ip("link", "set", "here", "up")
            ip("route", "add", "default", "via", NODE)

        class Cut:
            """The executor; after ten answers the network is cut."""

            answers, thread = 0, threading.Thread(target=cut)

            def __getattr__(self, name: str) -> Any:
                return getattr(workers, name)

            def wait(self, handles: Any) -> Any:
                self.answers += 1
                if self.answers == 10:
                    self.thread.start()
                return workers.wait(handles)

        began = time.monotonic()
        digest, spent = bred(Cut()), time.monotonic() - began
        Cut.thread.join()
        found = {"digest": digest, "seconds": spent, "nodes": len(executor._cpus_of_nodes()), "again": bred(workers)}
    connection.disconnect()
    return found


if __name__ == "__main__":
    main(float(sys.argv[1]))
