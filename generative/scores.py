"""How good a generative model is: one set of scores for all families.

By likelihood, where a model has `log_prob`: nats of points, bits per dimension of pictures, perplexity per token of texts.
By samples, in some space of features: Frechet distance (Heusel et al. 2017), kernel distance (Binkowski et al. 2018, the
unbiased estimate with the kernel (x.y / d + 1)^3), precision and recall (Kynkaanniemi et al. 2019, k = 3), and coverage
(Naeem et al. 2020, k = 5). The features are the rows themselves: points, or pixels in [0, 1]. With a classifier that was
trained here, or Inception where its weights are there, the same is found in its features once more (`feature_frechet` and so
on), and of a conditional model how often the classifier sees the label that was asked for (`obeyed`).

Legend: N true rows, M samples, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .classifier import Classifier
from .datasets import Dataset, Rows, first_rows
from .inception import Inception
from .models import GenerativeModel
from .spaces import Space

CHUNK = 256  # rows that a model sees at a time
SAMPLES = 1000  # at most, of the scores by samples
SPREAD, NEIGHBOURS = (
    2,
    6,
)  # rows of either side that a spread needs at least, and what looks at the fifth neighbour of a row


def to_tensors(rows: Rows) -> dict[str, Tensor]:
    """Rows as tensors."""
    return {key: torch.as_tensor(value) for key, value in rows.items()}


@torch.no_grad()
def mean_nats(model: GenerativeModel, rows: Rows) -> float:
    """The mean of the model's loss over rows, weighted by their number, with a fixed seed of its noise."""
    total, count = 0.0, len(rows["x"])
    for start in range(0, count, CHUNK):
        part = {key: value[start : start + CHUNK].to(model.device) for key, value in to_tensors(rows).items()}
        loss, _ = model.loss(part, model.generator(start))
        total += float(loss) * len(part["x"])
    return total / count


def score_model(
    model: GenerativeModel, dataset: Dataset, checks: int, classifier: Classifier | Inception | None = None
) -> dict[str, float]:
    """Every score that the model and its space allow, on at most `checks` rows of the split "test"."""
    rows = first_rows(dataset, "test", checks)
    scores = dict(model.own_scores(to_tensors(rows)))
    if "log_prob" in model.abilities:
        scores |= likelihood_scores(model, rows)
    if model.can_sample and model.space.kind != "text":
        count = min(SAMPLES, len(rows["x"]))
        drawn = features_of(model.sample(count, 0), model.space)
        scores |= sample_scores(features_of(rows["x"][:count], model.space), drawn)
        if classifier is not None:
            scores |= classifier_scores(model, rows["x"][:count], classifier)
    return scores


def classifier_scores(model: Any, true: np.ndarray, network: Classifier | Inception) -> dict[str, float]:
    """The scores by samples in a network's features, of as many samples as true rows; with a classifier of ours also `obeyed`.

    Raises:
        UsageError: the classifier reads rows of another shape or number of levels.
    """
    classifier = network.reading(model.space)
    is_told = getattr(model.config, "conditional", False) and isinstance(classifier, Classifier)
    labels = torch.arange(len(true)) % max(1, model.space.classes)
    drawn = model.sample(len(true), 0, labels=labels) if is_told else model.sample(len(true), 0)
    features = [classifier.features(torch.as_tensor(x)).cpu().double().numpy() for x in (true, drawn)]
    scores = {f"feature_{key}": value for key, value in sample_scores(*features).items()}
    if is_told and isinstance(classifier, Classifier):
        scores["obeyed"] = float((classifier.predict(drawn).cpu() == labels).float().mean())
    return scores


def likelihood_scores(model: Any, rows: Rows) -> dict[str, float]:
    """The mean log-likelihood of rows, in the unit that is customary for their kind."""
    x = torch.as_tensor(rows["x"])
    parts = [model.log_prob(x[start : start + CHUNK]) for start in range(0, len(x), CHUNK)]
    nats = float(torch.cat(parts).double().mean())
    if model.space.kind == "points":
        return {"log_likelihood": nats}
    if model.space.kind == "pictures":
        return {"bits_per_dim": -nats / math.log(2) / model.space.dims}
    tokens = float((x[:, 1:] != 0).sum(1).double().mean())
    return {"perplexity": math.exp(-nats / tokens)}


def features_of(rows: Any, space: Space) -> np.ndarray:
    """Rows as features, float64 [N, D]: points as they are, pixels in [0, 1]."""
    found = np.asarray(rows, np.float64).reshape(len(rows), -1)
    return found / (space.levels - 1) if space.kind == "pictures" else found


def sample_scores(true: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """The scores of samples [M, D] against true rows [N, D]: those that so many rows allow."""
    scores, least = {}, min(len(true), len(drawn))
    if least >= SPREAD:
        scores = {"frechet": frechet_distance(true, drawn), "kernel": kernel_distance(true, drawn)}
    if least >= NEIGHBOURS:
        precision, recall = precision_recall(true, drawn)
        scores |= {"precision": precision, "recall": recall, "coverage": coverage(true, drawn)}
    return scores


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)): between normal distributions fitted to features [N, D], [M, D]."""
    means = a.mean(0), b.mean(0)
    # Of deviations X with S = X^T X the trace is the sum of squares, and tr (S_a S_b)^(1/2) the sum of the singular values of
    # X_a X_b^T: its sides are rows, of which there are thousands, where features may be all pixels of a picture. Where there are
    # fewer features than rows, the triangular factors of X stand for it.
    x_a, x_b = ((x - mean) / math.sqrt(len(x) - 1) for x, mean in zip((a, b), means, strict=True))
    f_a, f_b = (np.asarray(np.linalg.qr(x, mode="r")) if x.shape[0] > x.shape[1] else x for x in (x_a, x_b))
    cross = np.linalg.svd(f_a @ f_b.T, compute_uv=False).sum()
    return float(np.square(means[0] - means[1]).sum() + np.square(x_a).sum() + np.square(x_b).sum() - 2 * cross)


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The squared maximum mean discrepancy of features, unbiased, so that it may be a little below 0."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    n, m = len(a), len(b)
    within_a = (kernel(a, a).sum() - np.trace(kernel(a, a))) / (n * (n - 1))
    within_b = (kernel(b, b).sum() - np.trace(kernel(b, b))) / (m * (m - 1))
    return float(within_a + within_b - 2 * kernel(a, b).mean())


def precision_recall(true: np.ndarray, drawn: np.ndarray, k: int = 3) -> tuple[float, float]:
    """The shares of samples that lie among the true rows, and of true rows that lie among the samples.

    A point lies among others when it is within the distance of one of them to its k-th nearest other.
    """

    def share(points: np.ndarray, among: np.ndarray) -> float:
        return float((_distances(points, among) <= _radii(among, k)).any(1).mean())

    return share(drawn, true), share(true, drawn)


def coverage(true: np.ndarray, drawn: np.ndarray, k: int = 5) -> float:
    """The share of true rows that have a sample within the distance of their own k-th nearest true row."""
    return float((_distances(true, drawn).min(1) <= _radii(true, k)).mean())


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squared = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * a @ b.T
    return np.sqrt(squared.clip(min=0))


def _radii(points: np.ndarray, k: int) -> np.ndarray:
    return np.partition(_distances(points, points), k, axis=1)[:, k]  # place 0 is the point itself


def auroc(high: np.ndarray, low: np.ndarray) -> float:
    """The share of pairs in which the value of `high` [N] is above that of `low` [M]; equal ones count half."""
    return float(((high[:, None] > low[None]) + 0.5 * (high[:, None] == low[None])).mean())


def mixed_up(x: Tensor, generator: torch.Generator) -> Tensor:
    """Rows [N, ...] of which each number is that of another row: every number is as in the data, their company is not."""
    flat = x.flatten(1)
    order = torch.rand(flat.shape, generator=generator, device=generator.device).argsort(0)
    return flat.gather(0, order.to(x.device)).reshape(x.shape)


def unlike_score(model: Any, x: Tensor) -> dict[str, float]:
    """How often a model's `ood_score` puts a true row of x below one that `mixed_up` made: 0.5 is knowing nothing."""
    with torch.no_grad():
        low, high = model.ood_score(x), model.ood_score(mixed_up(x, model.generator(0)))
    return {"ood_auroc": auroc(high.cpu().numpy(), low.cpu().numpy())}


def samples_per_second(model: GenerativeModel, count: int, clock: Callable[[], float]) -> float:
    """How many rows a second `sample` gives, of `count` at once; the first call, of one row, warms up and does not count."""
    model.sample(1, 0)
    began = clock()
    model.sample(count, 1)
    return count / (clock() - began)
