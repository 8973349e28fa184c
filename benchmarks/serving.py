"""Serving against calling: latency of a picture over HTTP, throughput of many clients, start and memory of the server.

    python benchmarks/serving.py [--model builtin] [--loader MODULE:FUNCTION] [--pictures 20]

The peer of a latency is the same stages called in one process without a server, in the same run; that of eight clients is one
client. Figures are medians after a warm-up. Ratios are what counts: over 1.0x means slower than the peer (latency), or faster
(throughput).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

CLIENTS = 8
PROMPT = "a red circle"


class Command:
    """`oneira serve`, from start to stop. `seconds`: from start to the end of the first picture."""

    def __init__(self, model: str, loader: str, layout: str, home: str) -> None:
        began = time.perf_counter()
        command = [sys.executable, "-m", "oneira.platform.cli", "serve", "--model", model, "--loader", loader]
        self.home = home
        self.process = subprocess.Popen(
            [*command, "--layout", layout, "--port", "0"], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "ONEIRA_HOME": home, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        assert self.process.stdout is not None
        found = re.search(r"http://\S+", self.process.stdout.readline())
        assert found, "the server did not start"
        self.url = found[0]
        self.draw(0)
        self.seconds = time.perf_counter() - began

    def draw(self, seed: int) -> None:
        body = json.dumps({"prompt": PROMPT, "seed": seed}).encode()
        request = urllib.request.Request(
            f"{self.url}/v1/images/generations", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.load(answer)["data"]

    def anonymous(self) -> int:
        """Bytes of anonymous memory of all processes with this server's home."""
        total = 0
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if f"ONEIRA_HOME={self.home}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    lines = (process / "smaps_rollup").read_text().splitlines()
                    total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:"))
            except OSError:
                continue
        return total

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)


def direct(model: str, loader: str) -> Callable[[int], None]:
    """Draws one picture in this process, and writes it as the server does."""
    import torch

    from oneira.cluster.serving.models import load_models
    from oneira.cluster.serving.pictures import write_picture
    from oneira.multimodal.stages import PictureRequest, through

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    [stages] = load_models([model], loader).values()

    def draw(seed: int) -> None:
        [state] = through(stages, [PictureRequest(prompt=PROMPT, seed=seed)])
        write_picture(state["picture"])

    return draw


def latencies(ways: Sequence[Callable[[int], None]], pictures: int) -> list[float]:
    """Median seconds of a picture by each way. They take turns, so that a machine which others slow down slows all of them."""
    seconds: list[list[float]] = [[] for _ in ways]
    for seed in range(pictures + 2):
        for way, taken in zip(ways, seconds, strict=True):
            began = time.perf_counter()
            way(seed)
            taken.append(time.perf_counter() - began)
    return [statistics.median(taken[2:]) for taken in seconds]


def throughput(draw: Callable[[int], None], pictures: int, clients: int) -> float:
    """Pictures a second of so many clients, each of which asks again as soon as it is answered."""
    seeds = iter(range(pictures * clients))
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                seed = next(seeds, None)
            if seed is None:
                return
            draw(seed)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return pictures * clients / (time.perf_counter() - began)


def main(argv: Sequence[str] | None = None) -> None:
    from oneira.cluster.serving.models import LOADER

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--loader", default=LOADER)
    parser.add_argument("--pictures", type=int, default=20)
    options = parser.parse_args(argv)
    draw = direct(options.model, options.loader)
    for layout in ("fused", "split"):
        with tempfile.TemporaryDirectory() as home:
            server = Command(options.model, options.loader, layout, home)
            try:
                peer, ours = latencies([draw, server.draw], options.pictures)
                one = throughput(server.draw, options.pictures, 1)
                many = throughput(server.draw, options.pictures, CLIENTS)
                print(f"{layout:<8} {ours:.3f} s a picture (p50), direct {peer:.3f}: {ours / peer:.2f}x")
                print(f"{'':<8} {many:.2f} pictures/s of {CLIENTS} clients, {one:.2f} of one: {many / one:.2f}x")
                print(
                    f"{'':<8} start to first picture {server.seconds:.1f} s; {server.anonymous() / 1e9:.2f} GB anonymous"
                )
            finally:
                server.stop()


if __name__ == "__main__":
    main()
