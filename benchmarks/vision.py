"""V: frames per second in training and in encoding, against the paper's VAE in fp32 as it is usually written.

    python benchmarks/vision.py           # all cores for training, one thread for encoding

All kinds train through the same `fit`, on the same cores, in turns; the first steps of each turn are warm-up. Encoding
takes batches of 128 frames as uint8 and gives mu and logvar: `fast_encoder` against the paper's `VAE.encode` in fp32.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from oneira.generative.training import TrainSettings, fit
from oneira.generative.vae import VAE, VAEConfig, fast_encoder
from oneira.platform.devices import num_cores

PEER = "paper, fp32"
FAST = "fast, bf16"
KINDS: dict[str, tuple[Any, Any, bool]] = {  # kind, precision, channels_last
    PEER: ("paper", "fp32", False),
    "paper, bf16 channels_last": ("paper", "bf16", True),
    FAST: ("fast", "bf16", False),
}
WARMUP = 3  # steps


def step_seconds(model: VAE, frames: Tensor, settings: TrainSettings) -> list[float]:
    """Seconds of every step after the warm-up. A step is what lies between two batches."""
    times: list[float] = []

    def batch_at(step: int) -> Tensor:
        times.append(time.perf_counter())
        generator = torch.Generator().manual_seed(step)
        return frames[torch.randint(len(frames), (settings.batch_size,), generator=generator)]

    fit(model, batch_at, settings)
    return [after - before for before, after in pairwise(times)][WARMUP:]


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def train_rates(frames: Tensor, batch_size: int, rounds: int) -> dict[str, float]:
    """Frames per second of each kind: the median step of all its turns."""
    steps: dict[str, list[float]] = {name: [] for name in KINDS}
    models = {name: VAE(VAEConfig(kind=kind)) for name, (kind, _, _) in KINDS.items()}
    for _ in range(rounds):
        for name, (kind, precision, channels_last) in KINDS.items():
            count = WARMUP + (30 if kind == "fast" else 4)
            settings = TrainSettings(
                steps=count, batch_size=batch_size, precision=precision, channels_last=channels_last, lr=1e-4
            )
            steps[name] += step_seconds(models[name], frames, settings)
    return {name: batch_size / statistics.median(times) for name, times in steps.items()}


@torch.no_grad()
def encode_rates(frames: Tensor, repeats: int) -> dict[str, float]:
    batch = frames[:128]
    functions = {PEER: VAE(VAEConfig(kind="paper")).encode, FAST: fast_encoder(VAE(VAEConfig()))}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + WARMUP):
        for name, function in functions.items():
            function(batch)  # the other one has just emptied the caches
            times[name].append(seconds(lambda function=function: function(batch)))
    return {name: len(batch) / statistics.median(t[WARMUP:]) for name, t in times.items()}


def show(title: str, rates: dict[str, float]) -> None:
    print(title)
    for name, rate in rates.items():
        print(f"  {name:28s} {rate:>10,.0f} frames/s   ratio {rate / rates[PEER]:>8.1f}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=100, help="of training; the paper's code uses 100")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each kind trains")
    parser.add_argument("--repeats", type=int, default=15, help="of encoding a batch")
    parser.add_argument("--threads", type=int, default=num_cores(), help="for training")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (1024, 64, 64, 3), dtype=torch.uint8)  # rates do not depend on what is on them
    torch.set_num_threads(options.threads)
    rates = train_rates(frames, options.batch_size, options.rounds)
    show(f"training, {options.threads} threads, batches of {options.batch_size}", rates)
    torch.set_num_threads(1)
    show("encoding, 1 thread, batches of 128", encode_rates(frames, options.repeats))
    return 0


if __name__ == "__main__":
    sys.exit(main())
