"""One device for training and requests: what each costs the other, on a real local Ray with a process for each.

    python benchmarks/sharing.py [--seconds 60] [--parts batching sharing cancelling]

A step of training takes 50 ms, one of a request 10 ms, and both only wait, as a host waits for an accelerator: so the figures
are the scheduler's and the engine's, whatever else the machine's cores do. Each is compared with the same without the other, in
the same run. Batching: a step of r rows takes 20 + r ms; the peer answers whole batches of requests (`request level`): rows that
are done leave its steps, but nobody joins and nobody is answered before the last.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from oneira.cluster.serving.engine import Engine
from oneira.multimodal.stages import PictureRequest, Plan

TRAIN_STEP, REQUEST_STEP, REQUEST_STEPS = 0.05, 0.01, 10
SERVED = 0.2  # of the time
P99_LIMIT, KEPT_LIMIT, BATCH_LIMIT, LOW_LIMIT = 1.3, 0.74, 1.4, 1.05
CLIENTS, MIXED = 8, (5, 10, 20, 40)
ROUNDS = 4
PARTS = ("batching", "sharing", "cancelling")


@dataclass(kw_only=True)
class Count(Plan):
    left: int


class Waiting:
    """A stage whose steps take `fixed` seconds and `each` more a row."""

    name = "decoder"

    def __init__(self, fixed: float, each: float = 0.0) -> None:
        self.fixed, self.each = fixed, each

    def plan(self, request: PictureRequest, state: Mapping[str, Any]) -> Count:
        return Count(left=request.steps or 1)

    def step(self, plans: Sequence[Count]) -> None:
        time.sleep(self.fixed + self.each * len(plans))
        for plan in plans:
            plan.left -= 1
            plan.done = plan.left == 0


class Trainer:
    """A process that trains."""

    def train(self, seconds: float) -> float:
        """Steps a second. Ends early where its lease is cancelled."""
        from oneira.cluster.scheduling.client import ClusterDevice
        from oneira.platform.errors import Interrupted

        steps, began = 0, time.perf_counter()
        with suppress(Interrupted), ClusterDevice("cpu").lease(priority="train") as lease:
            while time.perf_counter() - began < seconds:
                lease.step()
                time.sleep(TRAIN_STEP)
                steps += 1
        return steps / (time.perf_counter() - began)


async def requests(engine: Engine, seconds: float, seed: int) -> list[float]:
    """Latencies of requests one after another, with pauses between so that `SERVED` of the time is theirs."""
    rng, found, end = random.Random(seed), [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        await engine.run("m", "decoder", PictureRequest(steps=REQUEST_STEPS), {})
        found.append(time.perf_counter() - began)
        await asyncio.sleep(REQUEST_STEP * REQUEST_STEPS * (1 / SERVED - 1) * rng.uniform(0.5, 1.5))
    return found


def sharing(seconds: float) -> None:
    import ray

    from oneira.cluster.scheduling.client import ClusterDevice

    trainer = ray.remote(Trainer).options(num_cpus=0).remote()
    ray.get(trainer.train.remote(0.5))  # everybody has started
    part = seconds / ROUNDS

    async def serve(during: Any) -> tuple[list[float], Any]:
        engine = Engine({"m": [Waiting(REQUEST_STEP)]}, threads=1, device=ClusterDevice("cpu"))
        await engine.run("m", "decoder", PictureRequest(steps=1), {})
        reference = during()
        latencies = await requests(engine, part, seed=len(rates))
        await engine.close()
        return latencies, reference

    alone, shared, rates = [], [], []
    for _ in range(ROUNDS):  # in turns, so that what else the machine does is the same for both
        alone += asyncio.run(serve(lambda: None))[0]
        undisturbed = ray.get(trainer.train.remote(part))
        latencies, reference = asyncio.run(serve(lambda: trainer.train.remote(part)))
        shared += latencies
        rates.append((undisturbed, ray.get(reference)))
    undisturbed = statistics.mean(rate for rate, _ in rates)
    kept = statistics.mean(rate for _, rate in rates) / undisturbed
    p99 = [float(np.quantile(latencies, 0.99)) for latencies in (alone, shared)]
    p50 = [statistics.median(latencies) for latencies in (alone, shared)]
    limit = P99_LIMIT * p99[0] + TRAIN_STEP
    print(
        f"requests of {REQUEST_STEPS} steps of {REQUEST_STEP * 1e3:.0f} ms, training steps of {TRAIN_STEP * 1e3:.0f} ms"
    )
    print(f"  alone            p50 {p50[0] * 1e3:.1f} ms, p99 {p99[0] * 1e3:.1f} ms ({len(alone)} requests)")
    print(f"  beside training  p50 {p50[1] * 1e3:.1f} ms, p99 {p99[1] * 1e3:.1f} ms ({len(shared)} requests): "
          f"{(p99[1] - TRAIN_STEP) / p99[0]:.2f}x + one step; {p99[1] / limit:.2f}x the limit; "
          f"the longest {', '.join(f'{seconds * 1e3:.0f}' for seconds in sorted(shared)[-3:])} ms")  # fmt: skip
    served = len(shared) * REQUEST_STEPS * REQUEST_STEP / seconds
    print(f"  training keeps {kept:.1%} of {undisturbed:.1f} steps/s while {served:.1%} of the time is served: "
          f"{kept / (1 - served):.2f} of what is left; {kept / KEPT_LIMIT:.2f}x the limit")  # fmt: skip


def cancelling(times: int) -> None:
    """From a lease's being taken back to the device's being somebody else's."""
    import ray

    from oneira.cluster.scheduling.actor import find_desk
    from oneira.cluster.scheduling.client import ClusterDevice

    desk, device, found = find_desk(), ClusterDevice("cpu"), []
    trainer = ray.remote(Trainer).options(num_cpus=0).remote()
    for _ in range(times):
        running = trainer.train.remote(60)
        lease = None
        while lease is None:
            leases = [lease for one in ray.get(desk.report.remote())["devices"] for lease in one["leases"]]
            lease = next((one for one in leases if one["priority"] == "train" and one["state"] == "running"), None)
            time.sleep(0.1)
        time.sleep(random.uniform(0.2, 0.3))
        began = time.perf_counter()
        ray.get(desk.cancel.remote(lease["id"]))
        with device.lease(priority="batch", bytes=len(found) + 1):  # which takes the device from nobody
            found.append(time.perf_counter() - began)
        ray.get(running)
    print(f"cancelled training frees the device after {statistics.median(found) * 1e3:.0f} ms, at most {max(found) * 1e3:.0f} ms "
          f"({times} times): {max(found) / TRAIN_STEP:.2f} steps")  # fmt: skip


async def clients(ask: Callable[[int], Awaitable[Any]], count: int, seconds: float) -> tuple[float, float]:
    """(requests answered a second, mean latency) of clients that ask again as soon as they are answered."""
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def client(seed: int) -> None:
        rng = random.Random(seed)
        while time.perf_counter() < end:
            began = time.perf_counter()
            await ask(rng.choice(MIXED))
            latencies.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(client(seed) for seed in range(count)))
    return len(latencies) / (time.perf_counter() - began), statistics.mean(latencies)


class RequestLevel:
    """The peer: takes all that wait, makes their steps together, answers them together."""

    def __init__(self, stage: Waiting) -> None:
        self.stage = stage
        self.waiting: list[tuple[int, asyncio.Future]] = []
        self.task: asyncio.Task | None = None

    async def ask(self, steps: int) -> None:
        answer = asyncio.get_running_loop().create_future()
        self.waiting.append((steps, answer))
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self._work())
        await answer

    async def _work(self) -> None:
        while self.waiting:
            await asyncio.sleep(0)
            batch, self.waiting = self.waiting, []
            plans = [self.stage.plan(PictureRequest(steps=steps), {}) for steps, _ in batch]
            while left := [plan for plan in plans if not plan.done]:
                await asyncio.to_thread(self.stage.step, left)
            for _, answer in batch:
                answer.set_result(None)


def batching(seconds: float) -> None:
    async def main() -> None:
        stage = Waiting(0.02, 0.001)
        engine = Engine({"m": [stage]}, threads=1)

        async def step_level(steps: int) -> None:
            await engine.run("m", "decoder", PictureRequest(steps=steps), {})

        async def direct(steps: int) -> None:
            plan = stage.plan(PictureRequest(steps=steps), {})
            while not plan.done:
                await asyncio.to_thread(stage.step, [plan])

        await step_level(2)
        ours, latency = await clients(step_level, CLIENTS, seconds)
        theirs, their_latency = await clients(RequestLevel(stage).ask, CLIENTS, seconds)
        print(f"{CLIENTS} clients, {MIXED} steps: step level {ours:.2f}/s (mean {latency:.2f} s), request level {theirs:.2f}/s "
              f"(mean {their_latency:.2f} s): {ours / theirs:.2f}x; {ours / theirs / BATCH_LIMIT:.2f}x the limit")  # fmt: skip
        (_, low), (_, none) = await clients(step_level, 1, seconds), await clients(direct, 1, seconds)
        print(f"one client: mean {low:.3f} s, without batching {none:.3f} s: {low / none:.3f}x; limit {LOW_LIMIT}x")
        await engine.close()

    asyncio.run(main())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="Of each measurement.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args(argv)
    from oneira.cluster import connect, disconnect

    if "batching" in options.parts:
        batching(options.seconds)
    connect()
    if "sharing" in options.parts:
        sharing(options.seconds)
    if "cancelling" in options.parts:
        cancelling(20)
    disconnect()


if __name__ == "__main__":
    main()
