"""RBM on digits against scikit-learn's BernoulliRBM: same size, batch and epochs, both with persistent chains.

    python benchmarks/rbm.py                     about one minute on two cores

Prints the pseudo-log-likelihood of the test digits (nats, exact for both, higher is better). Each is trained at four learning
rates and its best one counts, so that neither suffers from the other's. The bar is equal or better.
"""

import argparse
import time

import torch
from sklearn.neural_network import BernoulliRBM

from oneira.generative.datasets import DataConfig, batches, first_rows, load_data
from oneira.generative.rbm import RBM, RBMConfig
from oneira.generative.training import TrainSettings, fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--hidden", type=int, default=128)
    given = parser.parse_args()
    data, batch = load_data(DataConfig(name="digits")), 32
    rows = data.size("train")
    ruler = RBM(RBMConfig(hidden=given.hidden), data.space)
    train, test = (ruler.shares(torch.as_tensor(first_rows(data, split, 10**6)["x"])) for split in ("train", "test"))
    found: dict[str, dict[float, float]] = {"ours": {}, "scikit-learn": {}}
    for lr in (3e-3, 1e-2, 3e-2, 1e-1):
        torch.manual_seed(0)
        began = time.perf_counter()
        settings = TrainSettings(
            steps=given.epochs * (rows // batch), batch_size=batch, lr=lr, clip=0, precision="fp32"
        )
        model = fit(RBM(RBMConfig(hidden=given.hidden, chains=batch), data.space), batches(data, batch, 0), settings)
        found["ours"][lr] = float(model.pseudo_log_likelihood(test).mean())
        print(f"ours, lr {lr:g}: {found['ours'][lr]:.2f} nats, {time.perf_counter() - began:.1f} s")
    for lr in (0.05, 0.1, 0.3, 1.0):
        began = time.perf_counter()
        theirs = BernoulliRBM(
            given.hidden, learning_rate=lr, batch_size=batch, n_iter=given.epochs, random_state=0
        ).fit(train.numpy())
        with torch.no_grad():
            ruler.weight.copy_(torch.from_numpy(theirs.components_.T))
            ruler.hidden.copy_(torch.from_numpy(theirs.intercept_hidden_))
            ruler.visible.copy_(torch.from_numpy(theirs.intercept_visible_))
        found["scikit-learn"][lr] = float(ruler.pseudo_log_likelihood(test).mean())
        print(f"scikit-learn, lr {lr:g}: {found['scikit-learn'][lr]:.2f} nats, {time.perf_counter() - began:.1f} s")
    best = {name: max(values.values()) for name, values in found.items()}
    print(
        f"ours {best['ours']:.2f}, scikit-learn {best['scikit-learn']:.2f}: {best['ours'] - best['scikit-learn']:+.2f} nats"
    )


if __name__ == "__main__":
    main()
