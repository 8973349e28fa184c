"""Dream steps per second on one thread, against the machine's own bf16 matrix-product limit measured in the same run.

    python benchmarks/dream.py            # 64 candidates x 16 rollouts, z 32, hidden 256, 5 mixtures, linear controller

One imagined step is two products, [B, z+h+a+r] x [.., 4 hidden] and [B, hidden] x [hidden, 3 mixtures z]. The limit is
the rate at which torch multiplies exactly these shapes in bf16 and does nothing else; the ratio is what sampling, the
LSTM's pointwise part and the controller leave of it. They alternate, after a warm-up; medians are reported.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from oneira.agents.dreaming import DreamModel
from oneira.agents.memory import MDNRNN, MemoryConfig


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def products(config: MemoryConfig, rows: int) -> Callable[[], None]:
    """The two products of one step, operands and results allocated once."""
    columns = config.inputs + config.hidden
    shapes = {"x": (rows, columns), "gates": (columns, 4 * config.hidden), "h": (rows, config.hidden)}
    shapes |= {"mixture": (config.hidden, 3 * config.mixtures * config.z)}
    a = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    out = [torch.empty(rows, a[name].shape[1], dtype=torch.bfloat16) for name in ("gates", "mixture")]

    def multiply() -> None:
        torch.mm(a["x"], a["gates"], out=out[0])
        torch.mm(a["h"], a["mixture"], out=out[1])

    return multiply


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--members", type=int, default=1)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = MemoryConfig()
    rows = options.candidates * options.rollouts
    model = DreamModel([MDNRNN(config) for _ in range(options.members)], config)
    weights = 0.1 * torch.randn(options.candidates, config.z + config.hidden, config.action)
    sizes = {"z": (config.z,), "h": (config.hidden,), "c": (config.hidden,), "reward_prev": ()}
    starts = {name: np.zeros((options.rollouts, *size), np.float32) for name, size in sizes.items()}
    multiply = products(config, rows)

    def dream() -> None:
        model.rollout(
            starts,
            lambda f: torch.tanh(torch.bmm(f, weights)),
            options.steps,
            candidates=options.candidates,
            termination="never",
        )

    def limit() -> None:
        for _ in range(options.steps):
            multiply()

    dream(), limit()
    pairs = [(seconds(dream), seconds(limit)) for _ in range(options.repeats)]
    work = rows * options.steps
    dreamt, bound = (work / statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    flops = 2 * config.hidden * (4 * (config.inputs + config.hidden) + 3 * config.mixtures * config.z)
    print(f"{options.candidates} candidates x {options.rollouts} rollouts, {options.members} member(s), one thread")
    print(f"dream steps with controller   {dreamt:>10,.0f} /s")
    print(f"bf16 products alone (limit)   {bound:>10,.0f} /s   ({bound * flops / 1e9:.0f} GFLOPS)")
    print(f"ratio                         {ratio:>10.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
