"""A unit of work that takes memory until Ray's monitor kills its process: a program of its own, for the monitor's limit is a cluster's.

RAY_memory_usage_threshold=SHARE python greedy.py FOLDER     # prints one JSON document
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def take(shared: Any, unit: int) -> int:
    """Unit 3 takes 8 GiB, the first time; the others nothing. Whose process it was."""
    first = Path(shared["folder"]) / "taken"
    if unit == 3 and not first.exists():
        first.write_text(str(os.getpid()))
        taken = [bytearray(os.urandom(1 << 20) * 128) for _ in range(64)]
        time.sleep(60)
        raise AssertionError(f"nobody minds {len(taken)} times 128 MiB")
    time.sleep(0.1)
    return os.getpid()


def main(folder: str) -> None:
    from oneira.cluster import disconnect
    from oneira.cluster import executor as module

    module.SLOW_SECONDS = 1000.0  # nobody is helped for being slow
    with module.RayExecutor() as executor:
        pids = list(executor.map(take, executor.share({"folder": folder}), range(6)))
    print(json.dumps({"first": int((Path(folder) / "taken").read_text()), "then": pids[3]}))
    disconnect()


if __name__ == "__main__":
    main(sys.argv[1])
