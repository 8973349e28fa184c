"""The device scheduler: how fast it decides, and what its decisions are worth against keeping a number of models.

    python benchmarks/scheduler.py [--requests 100000] [--seeds 3]

Fleet: 1,000 devices, 200 models, 5,000 requests a second, on one core; the
limits are 0.15 ms (mean) and 2 ms (p99) of processor time.
Goodput: requests answered within 3 times their unloaded latency, a second, at twice the load that the devices could
carry; 20 models of mixed size by Zipf's law, memory for four; simulated. The peer is Ray Serve's multiplexing (the least
recently used of four models goes), as it is by default and with the best of several limits to its queue. Ratios over
1.0x are ours. Leases: on a local Ray; the limit of a step is 0.2 ms.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from oneira.cluster.scheduling.simulator import CountedModels, Fleet, Ours, Request, poisson, simulate, zipf_models

MEAN_LIMIT, P99_LIMIT, STEP_LIMIT = 0.15e-3, 2e-3, 0.2e-3  # seconds
LIMITS = (0, 1, 4, 16, 64)  # of the peer's queue


def decisions(count: int) -> None:
    models = zipf_models(200, seed=0)
    mean = sum(model.share * model.seconds for model in models)
    scale = 0.8 * 1000 / (5000 * mean)  # of the seconds of a request, so that 80% of the devices are busy
    models = [type(m)(m.name, m.bytes, m.seconds * scale, m.share) for m in models]
    fleet = Fleet(1000, int(12e9), models)
    ours = Ours(fleet)
    gc.collect()
    gc.disable()
    outcome = simulate(ours, poisson(models, rate=5000, seconds=count / 5000, seed=1))
    gc.enable()
    times = np.array(ours.decisions)
    mean_time, p99 = times.mean(), np.quantile(times, 0.99)
    print(f"1,000 devices, 200 models, 5,000 requests/s: {len(times)} decisions, {outcome.loads} loads")
    print(f"  mean {mean_time * 1e3:.4f} ms: {mean_time / MEAN_LIMIT:.2f}x the limit")
    print(f"  p99  {p99 * 1e3:.4f} ms: {p99 / P99_LIMIT:.2f}x the limit; the longest {times.max() * 1e3:.2f} ms")
    print(f"  answered on time {outcome.goodput / 5000:.1%} of all")


def goodput(seeds: int, overload: float) -> None:
    rows = []
    for seed in range(seeds):
        models = zipf_models(20, seed=seed)
        fleet = Fleet(8, int(4 * statistics.mean(model.bytes for model in models)), models)
        requests = poisson(models, rate=overload * fleet.capacity(), seconds=120, seed=seed)

        def play(policy, requests=requests):
            return simulate(policy, [Request(r.at, r.model) for r in requests], warm_up=20)

        ours, default = play(Ours(fleet)), play(CountedModels(fleet, seed=seed))
        limited = {limit: play(CountedModels(fleet, most_waiting=limit, seed=seed)) for limit in LIMITS}
        limit = max(limited, key=lambda limit: limited[limit].goodput)
        rows.append([fleet.capacity(), ours.goodput, default.goodput, limited[limit].goodput])
        print(
            f"  seed {seed}: capacity {fleet.capacity():.1f}/s; ours {ours.goodput:.1f}/s (late {ours.late:.1%}, refused "
            f"{ours.refused:.1%}, {ours.loads} loads); peer {default.goodput:.1f}/s ({default.loads} loads), with at most "
            f"{limit} waiting {limited[limit].goodput:.1f}/s ({limited[limit].loads} loads)"
        )
    capacity, ours_, default_, best = np.median(rows, axis=0)
    print(
        f"goodput at {overload:g}x, of capacity: ours {ours_ / capacity:.2f}, peer {default_ / capacity:.2f}, with its best limit "
        f"{best / capacity:.2f}: {ours_ / best:.2f}x that (medians of {seeds} seeds)"
    )


def leases(count: int = 2000) -> None:
    """On a real local Ray, with nobody else who wants the device."""
    from oneira.cluster import connect, disconnect
    from oneira.cluster.scheduling.client import ClusterDevice

    def median(function: Callable[[int], None], times: int) -> float:
        seconds = []
        for i in range(times + 10):
            began = time.perf_counter()
            function(i)
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds[10:])

    def block(bytes: int) -> None:
        with device.lease(priority="interactive", bytes=bytes) as lease:
            lease.step()

    connect()
    device = ClusterDevice("cpu")
    with device.lease(priority="interactive") as lease:
        step = median(lambda _: [lease.step() for _ in range(1000)], 20) / 1000  # type: ignore[arg-type,return-value]
    stays, asks = median(lambda _: block(0), count), median(lambda i: block(i + 1), 50)
    print(f"an uncontended lease.step() {step * 1e3:.5f} ms: {step / STEP_LIMIT:.4f}x the limit")
    print(f"  a block whose lease stayed {stays * 1e3:.4f} ms, one that asks the scheduler {asks * 1e3:.2f} ms")
    disconnect()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    decisions(options.requests)
    for overload in (0.5, 1.0, 2.0):
        goodput(options.seeds, overload)
    leases()


if __name__ == "__main__":
    main()
