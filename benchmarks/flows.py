"""RealNVP on two moons against the same architecture in zuko: same data, batches, steps and optimizer.

    python benchmarks/flows.py                   about three minutes on two cores

Prints the test log-likelihood of both (nats, higher is better), and how many times as fast ours trains: the median of three
stretches of 300 steps, taken in turns after a warm-up. The bar is at most 0.02 nats below, at least 1.0 times as fast.
"""

import argparse
import statistics
import time

import torch
import zuko
from torch import nn

from oneira.generative.datasets import DataConfig, batches, first_rows, load_data
from oneira.generative.realnvp import RealNVP, RealNVPConfig
from oneira.generative.training import TrainSettings, fit


class Theirs(nn.Module):
    """zuko's flow with a loss as our loop asks for it."""

    def __init__(self, config: RealNVPConfig):
        super().__init__()
        self.flow = zuko.flows.RealNVP(2, transforms=config.couplings, hidden_features=[config.width] * config.depth)

    def loss(self, batch, generator):
        return -self.flow().log_prob(batch["x"]).mean() / 2, {}

    @torch.no_grad()
    def log_prob(self, x):
        return self.flow().log_prob(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8000)
    steps = parser.parse_args().steps
    data, config = load_data(DataConfig(name="moons")), RealNVPConfig()
    batch_at, test = batches(data, 256, 0), torch.as_tensor(first_rows(data, "test", 10_000)["x"])

    def make(kind: str) -> nn.Module:
        torch.manual_seed(0)
        return RealNVP(config, data.space) if kind == "ours" else Theirs(config)

    def settings(count: int) -> TrainSettings:
        return TrainSettings(steps=count, batch_size=256, lr=2e-3, ema=0.99, precision="fp32")

    seconds: dict[str, list[float]] = {"ours": [], "zuko": []}
    for turn in range(4):
        for kind, times in seconds.items():
            model, began = make(kind), time.perf_counter()
            fit(model, batch_at, settings(300))
            if turn:  # the first one warms up
                times.append(time.perf_counter() - began)
    found = {kind: float(fit(make(kind), batch_at, settings(steps)).log_prob(test).mean()) for kind in seconds}
    speed = {kind: 300 / statistics.median(times) for kind, times in seconds.items()}
    for kind in seconds:
        print(f"{kind}: test log-likelihood {found[kind]:.4f} nats after {steps} steps; {speed[kind]:.0f} steps/s")
    print(
        f"ours - zuko: {found['ours'] - found['zuko']:+.4f} nats; speed ours / zuko: {speed['ours'] / speed['zuko']:.2f}"
    )


if __name__ == "__main__":
    main()
