"""A trained diffusion model, sampled by DDIM in 20 steps against DDPM in 1,000: how far from true pictures each is.

    oneira train cnn-digits --run runs/cnn-digits && oneira train ddpm-digits --run runs/ddpm-digits
    python benchmarks/diffusion.py runs/ddpm-digits --classifier runs/cnn-digits

Prints the Frechet distance to the test rows in the classifier's features, of as many samples by each, and their ratio; the bar is
1.3. "true" is the distance of as many training rows, which no sampler need be below.
"""

import argparse
import time

import torch

from oneira.generative.datasets import first_rows
from oneira.generative.models import load_model
from oneira.generative.scores import frechet_distance
from oneira.generative.settings import load_classifier
from oneira.platform.runs import Run

SAMPLERS = (("ddim", 20), ("dpm++", 20), ("ddpm", 20), ("ddpm", 1000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run of a ddpm preset")
    parser.add_argument("--classifier", required=True, help="a run of a classifier of the same data")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    model = load_model(given.run)
    reader = load_classifier(given.classifier).reading(model.space)
    data = Run.open(given.run).config.dataset()

    def features(x):
        return torch.cat([reader.features(part) for part in torch.as_tensor(x).split(250)]).cpu().double().numpy()

    test = features(first_rows(data, "test", 10_000)["x"])
    distances = {"true": frechet_distance(test, features(first_rows(data, "train", given.samples)["x"]))}
    print(f"true: Frechet distance {distances['true']:.3f}")
    for sampler, steps in SAMPLERS:
        began = time.perf_counter()
        drawn = model.sample(given.samples, given.seed, sampler=sampler, steps=steps)
        seconds = time.perf_counter() - began
        name = f"{sampler}, {steps} steps"
        distances[name] = frechet_distance(test, features(drawn))
        print(f"{name}: Frechet distance {distances[name]:.3f}; {given.samples / seconds:.1f} samples/s", flush=True)
    ratio = distances["ddim, 20 steps"] / distances["ddpm, 1000 steps"]
    print(f"DDIM at 20 steps / DDPM at 1,000: {ratio:.2f}")


if __name__ == "__main__":
    main()
