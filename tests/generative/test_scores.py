"""Scores by hand and against closed forms."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from oneira.generative.classifier import Classifier, ClassifierConfig
from oneira.generative.datasets import Arrays
from oneira.generative.models import GenerativeModel
from oneira.generative.scores import (
    auroc,
    classifier_scores,
    coverage,
    frechet_distance,
    kernel_distance,
    likelihood_scores,
    mixed_up,
    precision_recall,
    sample_scores,
    score_model,
)
from oneira.generative.settings import load_classifier
from oneira.generative.spaces import Space
from oneira.platform.errors import ConfigError, DataError, UsageError

RNG = np.random.default_rng(0)


def test_frechet_distance_of_known_normals():
    # Exactly whitened rows, then scaled: |m|^2 + sum (s_a - s_b)^2 with diagonal covariances.
    x = RNG.normal(size=(500, 3))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    found = frechet_distance(x * [1, 2, 3], x * [2, 2, 1] + [1, 0, 2])
    assert found == pytest.approx(5 + 1 + 0 + 4, rel=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    turn = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
    assert frechet_distance(x * [1, 2, 3] @ turn, x * [2, 2, 1] @ turn) == pytest.approx(5, rel=1e-6)


def test_frechet_distance_of_more_features_than_rows():
    """Pixels of a picture: as scipy's square root of the product of covariances gives it, and without a matrix of them."""
    from scipy.linalg import sqrtm

    for shapes in (((40, 60), (30, 60)), ((200, 10), (30, 10)), ((5, 10), (200, 10))):
        a, b = (RNG.normal(size=shape) for shape in shapes)
        covariances = [np.cov(x, rowvar=False) for x in (a, b)]
        cross = np.trace(sqrtm(covariances[0] @ covariances[1] + 1e-12 * np.eye(a.shape[1]))).real
        wanted = np.square(a.mean(0) - b.mean(0)).sum() + sum(map(np.trace, covariances)) - 2 * cross
        assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-3)
    large = RNG.normal(size=(20, 200_000))  # whose covariance would be 320 GB
    assert frechet_distance(large, large + 0.1) == pytest.approx(2000, rel=1e-6)


def test_kernel_distance_by_hand():
    a, b = np.array([[0.0], [1.0]]), np.array([[2.0], [3.0]])
    # k(x, y) = (x y + 1)^3: within a 1, within b 343, between (1 + 1 + 27 + 64) / 4
    assert kernel_distance(a, b) == pytest.approx(1 + 343 - 2 * 93 / 4)
    same = [kernel_distance(RNG.normal(size=(60, 4)), RNG.normal(size=(60, 4))) for _ in range(30)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 30**0.5, "unbiased: 0 on average for the same distribution"


def test_precision_recall_and_coverage_by_hand():
    true = np.array([[0.0], [1.0], [2.0], [3.0], [10.0]])
    drawn = np.array([[0.5], [2.5], [3.2], [3.4], [50.0]])
    # radii to the 1st neighbour, true: 1 1 1 1 7; drawn: 2 .7 .2 .2 46.6
    assert precision_recall(true, drawn, k=1) == (4 / 5, 5 / 5)
    assert coverage(true, drawn, k=1) == pytest.approx(5 / 5)
    assert coverage(true, np.array([[0.5], [50.0]]), k=1) == pytest.approx(2 / 5)


def test_few_rows_have_fewer_scores():
    keys = [set(sample_scores(RNG.normal(size=(n, 2)), RNG.normal(size=(n, 2)))) for n in (1, 2, 5, 6)]
    assert keys[0] == set() and keys[1] == keys[2] == {"frechet", "kernel"} and len(keys[3]) == 5


def test_mixed_up_rows_keep_every_number():
    x = torch.arange(60.0).reshape(20, 3)
    mixed = mixed_up(x, torch.Generator().manual_seed(0))
    assert all(torch.equal(mixed[:, k].sort().values, x[:, k]) for k in range(3))
    assert ((mixed - mixed[:, :1]) != (x - x[:, :1])).any(1).float().mean() > 0.5


def test_auroc_by_hand():
    assert auroc(np.array([3.0, 1.0]), np.array([0.0, 1.0])) == pytest.approx((1 + 1 + 1 + 0.5) / 4)


def test_scores_tell_apart_what_they_should():
    true, good = RNG.normal(size=(400, 2)), RNG.normal(size=(400, 2))
    narrow, off = 0.1 * RNG.normal(size=(400, 2)), RNG.normal(size=(400, 2)) + 3
    best, few, far = (sample_scores(true, drawn) for drawn in (good, narrow, off))
    assert best["coverage"] > 0.8 and best["precision"] > 0.8 and best["recall"] > 0.8
    assert few["precision"] > 0.9 and few["recall"] < 0.1 and few["coverage"] < 0.4, (
        "one mode only: precise, without range"
    )
    assert (
        far["precision"] < 0.3
        and far["frechet"] > 10 > 0.2 > best["frechet"]
        and far["kernel"] > 10 * abs(best["kernel"])
    )


def test_a_classifier_sees_whether_labels_are_obeyed():
    space = Space(kind="pictures", shape=(4, 4, 1), levels=2, classes=2)
    x = np.zeros((60, 4, 4, 1), np.uint8)
    x[::2, :2], x[1::2, 2:] = 1, 1  # label 0: the upper half
    x[np.arange(60), RNG.integers(0, 4, 60), RNG.integers(0, 4, 60)] ^= 1  # not all alike

    class Reads(Classifier):
        def features(self, x):
            return torch.stack([x[:, :2].float().mean((1, 2, 3)), x[:, 2:].float().mean((1, 2, 3))], 1)

        def predict(self, x):
            return self.features(x).argmax(1)

    class Repeats(Fair):
        def sample(self, n, seed, labels=None):
            return torch.as_tensor(x)[torch.arange(n) if labels is None else labels]

    reads, model = Reads(ClassifierConfig(width=2), space), Repeats(SimpleNamespace(conditional=True), space)
    scores = classifier_scores(model, x, reads)
    assert scores["obeyed"] == 1.0 and scores["feature_frechet"] < 0.1
    plain = classifier_scores(Repeats(SimpleNamespace(), space), x, reads)
    assert "obeyed" not in plain and plain["feature_coverage"] == 1.0
    with pytest.raises(UsageError, match="reads pictures"):
        classifier_scores(Repeats(None, Space(kind="pictures", shape=(2, 2, 1), levels=2)), x, reads)


class Fair(GenerativeModel):
    """Says that every level of every pixel, or every token, is as likely."""

    kind = "fair"

    def loss(self, batch, generator):
        return torch.zeros(()), {}

    def log_prob(self, x):
        places = self.space.dims if self.space.kind == "pictures" else (x[:, 1:] != 0).sum(1)
        return torch.zeros(len(x)) - places * math.log(self.space.levels)


def test_likelihoods_in_their_customary_units():
    pictures = Space(kind="pictures", shape=(2, 2, 1), levels=16)
    rows = {"x": np.zeros((6, 2, 2, 1), np.uint8)}
    assert likelihood_scores(Fair(None, pictures), rows) == {"bits_per_dim": pytest.approx(4)}
    tokens = {"x": np.array([[1, 5, 2, 0], [1, 5, 5, 2]])}
    assert likelihood_scores(Fair(None, Space(kind="text", shape=(4,), levels=50)), tokens) == {
        "perplexity": pytest.approx(50)
    }
    data = Arrays.divide(pictures, {"x": np.zeros((40, 2, 2, 1), np.uint8)})
    assert score_model(Fair(None, pictures), data, 10) == {"bits_per_dim": pytest.approx(4)}, (
        "it cannot be sampled from"
    )


def test_inception_where_its_weights_are_there(tmp_path):
    from torchvision.models import Inception3

    (tmp_path / "config.json").write_text('{"architecture": "inception_v3"}')
    with pytest.raises(DataError, match="cannot be read"):
        load_classifier(str(tmp_path))
    torch.manual_seed(0)
    theirs = Inception3(transform_input=False, init_weights=False).eval()  # with the head that training has
    weights = {key: value.contiguous() for key, value in theirs.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    reader = load_classifier(str(tmp_path))
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 299, 299, 3)).astype(np.uint8))
    theirs.fc = torch.nn.Identity()
    with torch.no_grad():
        wanted = theirs(x.permute(0, 3, 1, 2) / 127.5 - 1)
    found = reader.reading(Space(kind="pictures", shape=(299, 299, 3), levels=256)).features(x)
    assert found.shape == (2, 2048) and torch.allclose(found, wanted, atol=1e-4)
    small = reader.reading(Space(kind="pictures", shape=(8, 8, 1), levels=17))
    assert small.features(torch.zeros(1, 8, 8, 1, dtype=torch.uint8)).shape == (1, 2048)
    with pytest.raises(ConfigError):
        reader.reading(Space(kind="points", shape=(2,)))
    del weights["Mixed_5b.branch1x1.conv.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="other weights"):
        load_classifier(str(tmp_path))
