"""Twenty models and memory for four: how many requests are answered in time at twice the load one device can carry.

    python benchmarks/multiplexing.py [--seconds 60] [--seeds 2] [--overload 2]

Both sides are a Serve application with one replica on a real local Ray, asked over HTTP by clients who come by chance and do not
wait for each other. A request is in time within 3 times its unloaded length. Ours is `oneira serve`, told of each request's
deadline. The peer is Serve's own multiplexing, which keeps four models, of any size, and lets the one used longest ago go: with
Serve's defaults, and with the best of several limits to its queue. Steps and loading only wait, as a host waits for an accelerator,
and a step of several rows takes as long as these one after another: so batching gives nobody an advantage, and the figures are
those of who is let in and what is kept. Models, requests and lengths follow from the seed (`simulator.zipf_models`); a thousandth
of the bytes, twice the seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from oneira.cluster.scheduling.residency import WARM_BYTES_PER_SECOND
from oneira.cluster.scheduling.simulator import ON_TIME, SimulatedModel, poisson, zipf_models
from oneira.multimodal.stages import PictureRequest, Plan

MODELS, KEPT, STEPS = 20, 4, 20
SMALLER, SLOWER = 1e-3, 2.0  # bytes and seconds of the simulator's models, times these
LIMITS = (1, 2, 4)  # of the peer's queue; Serve takes no 0
WARM_UP = 15.0  # seconds that are not counted
REACH = 1.5


def models(seed: int) -> list[SimulatedModel]:
    return [
        SimulatedModel(m.name, int(m.bytes * SMALLER), m.seconds * SLOWER, m.share)
        for m in zipf_models(MODELS, seed=seed)
    ]


def bring(model: SimulatedModel) -> nn.Parameter:
    """Its weights, after as long as they would take."""
    time.sleep(model.bytes / (WARM_BYTES_PER_SECOND * SMALLER) * SLOWER)
    return nn.Parameter(torch.empty(model.bytes // 4))


# Ours ---------------------------------------------------------------------------------------------------------------


class Weights(nn.Module):
    def __init__(self, values: nn.Parameter) -> None:
        super().__init__()
        self.values = values


class Text:
    """Costs nothing."""

    name = "text"

    def plan(self, request: PictureRequest, state: Mapping[str, Any]) -> Plan:
        return Plan(done=True, found={"text_embedding": np.zeros(4, np.float32)})

    def step(self, plans: Sequence[Plan]) -> None:
        raise AssertionError("a plan is done when it is made")


class Drawing:
    name = "decoder"

    def __init__(self, model: SimulatedModel) -> None:
        self.network, self.seconds = Weights(bring(model)), model.seconds / STEPS

    def plan(self, request: PictureRequest, state: Mapping[str, Any]) -> Plan:
        return Plan(steps=STEPS)

    def step(self, plans: Sequence[Plan]) -> None:
        time.sleep(self.seconds * len(plans))
        for plan in plans:
            plan.step += 1
            if plan.step == STEPS:
                plan.found, plan.done = {"picture": np.zeros((64, 64, 3), np.uint8)}, True


class Model:
    def __init__(self, model: SimulatedModel) -> None:
        self.name, self.stages = model.name, [Text(), Drawing(model)]


def load(name: str) -> Model:
    """The loader that `oneira serve` is given: "m3" of the seed in the environment."""
    return Model(models(int(os.environ["MULTIPLEXING_SEED"]))[int(name[1:])])


# The peer -----------------------------------------------------------------------------------------------------------


def peer(limit: int) -> None:
    """Runs until it is ended. limit: requests that may wait; -1 for any number, which is Serve's default."""
    import asyncio

    from ray import serve

    from oneira.cluster import connect

    @serve.deployment(max_queued_requests=limit, ray_actor_options={"num_cpus": 0.1})
    class Multiplexed:
        def __init__(self) -> None:
            self.device = asyncio.Lock()
            self.models = {model.name: model for model in models(int(os.environ["MULTIPLEXING_SEED"]))}

        @serve.multiplexed(max_num_models_per_replica=KEPT)
        async def get_model(self, name: str) -> nn.Parameter:
            return await asyncio.to_thread(bring, self.models[name])

        async def __call__(self, request: Any) -> str:
            name = serve.get_multiplexed_model_id()
            await self.get_model(name)
            async with self.device:
                for _ in range(STEPS):
                    await asyncio.sleep(self.models[name].seconds / STEPS)
            return "done"

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    connect()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Multiplexed.bind(), route_prefix="/")
    print(f"http://127.0.0.1:{port}/", flush=True)
    threading.Event().wait()


# The clients --------------------------------------------------------------------------------------------------------


class Server:
    """A command that serves, as long as the block lasts."""

    def __init__(self, command: Sequence[str], seed: int) -> None:
        here = str(Path(__file__).parent)
        self._home = tempfile.TemporaryDirectory()
        env = {
            "ONEIRA_HOME": self._home.name,
            "MULTIPLEXING_SEED": str(seed),
            "PYTHONPATH": here,
            "PYTHONUNBUFFERED": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, text=True, env={**os.environ, **env}
        )

    def __enter__(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(r"http://\S+", line):
                threading.Thread(target=self.process.stdout.read, daemon=True).start()
                return found[0]
        raise SystemExit("the server did not start")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)
        self._home.cleanup()


def ask_ours(url: str, model: SimulatedModel, number: int) -> None:
    body = json.dumps({"model": model.name, "prompt": f"{number}", "size": "64x64"}).encode()
    deadline = str(max(1, round(1000 * ON_TIME * model.seconds)))
    headers = {"Content-Type": "application/json", "X-Deadline-Ms": deadline}
    urllib.request.urlopen(urllib.request.Request(f"{url}/v1/images/generations", body, headers), timeout=120).read()


def ask_peer(url: str, model: SimulatedModel, number: int) -> None:
    headers = {"serve_multiplexed_model_id": model.name}
    urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=300).read()


def play(url: str, ask: Any, seed: int, rate: float, seconds: float) -> dict[str, float]:
    """Sends requests when they come. Goodput a second; shares that were answered late, and refused or failed."""
    requests = poisson(models(seed), rate=rate, seconds=seconds + WARM_UP, seed=seed)
    found: list[str] = []

    def one(number: int, request: Any) -> None:
        began = time.perf_counter()
        try:
            ask(url, request.model, number)
            in_time = time.perf_counter() - began <= ON_TIME * request.model.seconds
            outcome = "good" if in_time else "late"
        except urllib.error.HTTPError as error:
            outcome = "refused" if error.code in (429, 503) else f"failed with {error.code}"
        except OSError as error:
            outcome = f"failed: {type(error).__name__}"
        if request.at >= WARM_UP:
            found.append(outcome)

    threads, began = [], time.perf_counter()
    for number, request in enumerate(requests):
        time.sleep(max(0.0, began + request.at - time.perf_counter()))
        threads.append(threading.Thread(target=one, args=(number, request)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    shares = {outcome: found.count(outcome) / len(found) for outcome in sorted(set(found))}
    return {"goodput": found.count("good") / (requests[-1].at - WARM_UP), **shares}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--overload", type=float, default=2.0)
    parser.add_argument("--only", choices=("ours", "peer"), help="one side alone")
    parser.add_argument("--serve-peer", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve_peer is not None:
        return peer(options.serve_peer)
    ratios = []
    for seed in range(options.seeds):
        fleet = models(seed)
        capacity = 1 / sum(model.share * model.seconds for model in fleet)
        rate = options.overload * capacity
        print(f"seed {seed}: the device carries {capacity:.2f} requests/s, {rate:.2f} come", flush=True)
        best = {"ours": 0.0, "peer": 0.0}
        memory = f"{KEPT * statistics.mean(model.bytes for model in fleet) / 1e9:.6f}"
        ours = [
            "-m",
            "oneira.platform.cli",
            "serve",
            "--port",
            "0",
            "--memory",
            memory,
            "--loader",
            "multiplexing:load",
        ]
        sides = [("ours", "deadlines", [*ours, *(word for model in fleet for word in ("--model", model.name))])]
        sides += [
            (
                "peer",
                "any number waits" if limit < 0 else f"{limit} wait at most",
                [__file__, "--serve-peer", str(limit)],
            )
            for limit in (-1, *LIMITS)
        ]
        for side, how, command in sides:
            if options.only in (None, side):
                with Server(command, seed) as url:
                    outcome = play(url, ask_ours if side == "ours" else ask_peer, seed, rate, options.seconds)
                best[side] = max(best[side], outcome["goodput"])
                rest = ", ".join(f"{name} {share:.1%}" for name, share in outcome.items() if name != "goodput")
                print(f"  {side}, {how}: {outcome['goodput']:.2f}/s in time, {outcome['goodput'] / capacity:.2f} of capacity ({rest})", flush=True)  # fmt: skip
        if best["peer"]:
            ratios.append(best["ours"] / best["peer"])
    if ratios:
        print(f"goodput at {options.overload:g}x: {statistics.median(ratios):.2f}x the peer's best ({REACH:g}x asked; median of {len(ratios)} seeds)")  # fmt: skip


if __name__ == "__main__":
    main()
