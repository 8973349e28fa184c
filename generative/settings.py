"""Configs of this package's runs: which model learns which data, and how it is measured.

RealNVPRun = run_of(RealNVP)                  # its config class: seed, data, model, training, checks
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from oneira.platform.errors import ConfigError, DataError, UsageError
from oneira.platform.presets import preset_names

from .classifier import Classifier
from .datasets import DataConfig, Dataset, Rows, batches, first_rows, load_data
from .finding import CARD, WEIGHTS, find_model
from .inception import Inception, is_inception
from .learning import learn, lesson_report, scores_of, seed_of, smoke_of
from .models import GenerativeModel, load_model
from .scores import mean_nats, score_model, to_tensors
from .spaces import write_samples
from .training import TrainSettings

SHOWN = 64  # samples of a report
PICTURED = 500  # test rows that a model's own pictures are made of


@dataclass(frozen=True, kw_only=True)
class ModelRun:
    """One generative model on one data set. checks: rows of each score, at most. classifier: a trained run of a classifier of
    these data, in whose features samples are scored as well; "" = none. workers: processes that share each batch and average
    their gradients, which needs a cluster's executor; 1: one process does it all.

    The class of a family's runs, which `run_of` makes, has a field `model` of the family's own `Config` more.
    """

    network: ClassVar[Any]

    seed: int = 0
    data: DataConfig
    training: TrainSettings
    checks: int = 2000
    classifier: str = ""
    workers: int = 1

    def __post_init__(self) -> None:
        if self.checks < 1:
            raise ConfigError(f"checks is {self.checks}; it must be at least 1.")
        if self.workers < 1 or self.training.batch_size % self.workers:
            raise ConfigError(
                f"workers is {self.workers}; it must be at least 1 and divide the batch of {self.training.batch_size} rows."
            )
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must not be negative.")
        # Workers, and whoever resumes, may work in other folders.
        data, judge = Path(self.data.path).expanduser(), Path(self.classifier).expanduser()
        if self.data.path and data.exists():
            object.__setattr__(self, "data", replace(self.data, path=str(data.absolute())))
        if self.classifier and self.classifier not in preset_names():
            folder = judge if is_inception(judge) else find_model(self.classifier)
            object.__setattr__(self, "classifier", self.classifier if folder is None else str(folder.absolute()))

    def smoke(self) -> Any:
        training = smoke_of(self.training)
        return replace(self, training=replace(training, validate_every=10 if training.validate_every else 0), checks=64)

    def train(self, run: Any, executor: Any) -> dict[str, Any]:
        if self.classifier and not scores_of(run).exists():  # before hours of training, not after
            self._check_classifier()
        return learn(self, run, executor)

    def _check_classifier(self) -> None:
        """Raises UsageError or DataError where it cannot judge what this model draws."""
        space = self.dataset().space
        found = load_classifier(self.classifier).reading(space)
        told = getattr(getattr(self, "model", None), "conditional", False) and isinstance(found, Classifier)
        classes = found.space.classes if found.space else None
        if told and classes != space.classes:
            raise UsageError(f"The classifier tells {classes} classes apart; these data have {space.classes}.")

    def report(self, run: Any) -> Path:
        subtitle = f"{self.network.kind} on {self.data.name}"
        if not (run.path / "model" / CARD).exists():
            return lesson_report(run, subtitle)
        return lesson_report(run, subtitle, report_pictures(run), alarms_of(run))

    def dataset(self) -> Dataset:
        return _data_of(self.data)

    def build(self) -> GenerativeModel:
        return self.network(getattr(self, "model"), self.dataset().space)  # noqa: B009 (subclasses declare it)

    def batches(self) -> Callable[[int], Rows]:
        return batches(self.dataset(), self.training.batch_size, seed_of(self.seed, "batches"))

    def validate(self, model: GenerativeModel) -> float:
        """The mean loss over rows of "validation", with noise that is the same at each time."""
        return mean_nats(model, first_rows(self.dataset(), "validation", self.checks))

    def score(self, model: GenerativeModel) -> dict[str, float]:
        return score_model(
            model, self.dataset(), self.checks, load_classifier(self.classifier) if self.classifier else None
        )


def load_classifier(name: str) -> Classifier | Inception:
    """The classifier of a run, or the Inception in a folder. Raises UsageError where the name is another model's."""
    if is_inception(name):
        return Inception(name)
    model = load_model(name)
    if not isinstance(model, Classifier):
        raise UsageError(
            f"'{name}' is a model of kind '{model.kind}'; a classifier is needed, such as a run of cnn-digits."
        )
    return model


def version_of(name: str) -> str:
    """What tells one trained classifier from another: the first digits of its weights' SHA-256."""
    with ((find_model(name) or Path(name)) / WEIGHTS).open("rb") as file:
        return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:12]}"


_data_of = functools.lru_cache(maxsize=2)(load_data)


@functools.cache
def run_of(network: type[GenerativeModel]) -> Any:
    """The config class of runs that train this model: a `ModelRun` with `model`, of the model's own `Config`."""
    return make_dataclass(
        f"{network.__name__}Run", [("model", network.Config, field(default_factory=network.Config))],
        bases=(ModelRun,), namespace={"network": network, "__module__": __name__}, frozen=True, kw_only=True,
    )  # fmt: skip


def report_pictures(run: Any) -> dict[str, Any]:
    """What a report shows of a trained run: its samples, and what its family shows of test rows."""
    sampled = samples_picture(run)
    found: dict[str, Any] = {"samples, drawn with seed 0, not chosen": sampled} if sampled else {}
    try:
        rows = first_rows(run.config.dataset(), "test", PICTURED)
    except DataError:  # the user's files are no longer there; the model works without them
        return found
    return found | load_model(run.path).pictures(to_tensors(rows))


def alarms_of(run: Any) -> list[str]:
    """What is to be warned of in a trained run, once it has scores."""
    place = scores_of(run)
    return load_model(run.path).alarms(json.loads(place.read_text(encoding="utf-8"))) if place.exists() else []


def samples_picture(run: Any) -> Path | None:
    """A picture of a trained run's samples, made once; None of a model whose samples are no pictures."""
    place = run.media("samples.png")
    if place.exists():
        return place
    model = load_model(run.path)
    if model.space.kind == "text" or not model.can_sample:
        return None
    count = SHOWN if model.space.kind == "pictures" else 4 * SHOWN
    write_samples(model.sample(count, 0), model.space, place)
    return place
