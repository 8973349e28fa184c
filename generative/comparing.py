"""Scores and samples of several runs side by side, as a page and as a contact sheet: what `oneira compare` writes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oneira.platform.errors import DataError, UsageError
from oneira.platform.report import Report
from oneira.platform.runs import Run

from .classifier import Classifier
from .datasets import first_rows
from .finding import find_model
from .inception import Inception
from .learning import scores_of
from .models import load_model
from .scores import SAMPLES, classifier_scores, samples_per_second, to_tensors
from .settings import ModelRun, report_pictures, samples_picture

TIMED = 16  # samples
JUDGED, FEATURE = ("obeyed",), "feature_"  # scores that hang on a classifier
TEXTS = 3  # texts of a model that are shown


def describe_run(name: str, classifier: Classifier | Inception | None = None) -> dict[str, Any]:
    """What the page says of a run: JSON values. With a classifier, what samples score in its features as well.

    Raises:
        UsageError, DataError: there is no such run, it is of another kind, or it is not trained yet.
    """
    found = find_model(name)  # a preset's name means its newest trained run, as everywhere
    run = Run.open(found.parent if found is not None and found.name == "model" else name)
    if not isinstance(run.config, ModelRun):
        raise DataError(f"The run '{run.path}' is of '{run.preset}', which trains no generative model of one network.")
    if not scores_of(run).exists():
        raise DataError(f"The run '{run.path}' is not trained yet. Go on with it: oneira resume {name}")
    model = load_model(run.path)
    picture = samples_picture(run)
    scores = json.loads(scores_of(run).read_text(encoding="utf-8"))
    judge, note = run.config.classifier, ""
    if classifier is not None and model.can_sample:
        judge, scores = "", {key: value for key, value in scores.items() if key not in JUDGED and key[:8] != FEATURE}
        try:
            scores |= classifier_scores(model, first_rows(run.config.dataset(), "test", SAMPLES)["x"], classifier)
        except UsageError as error:
            note = str(error)
    return {
        "run": run.name, "path": str(run.path), "model": model.kind, "data": run.config.data.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_s": sum(line["seconds"] for line in run.metrics("stage") if line["name"] == "fit"),
        "samples_per_s": samples_per_second(model, TIMED, time.perf_counter) if model.can_sample else None,
        "scores": scores, "judge": judge, "note": note,
        "picture": str(picture) if picture else None,
        "texts": _texts(run, model) if model.space.kind == "text" else [],
    }  # fmt: skip


def _texts(run: Run, model: Any) -> list[str]:
    if model.can_sample:
        return model.sample(TEXTS, 0)
    return model.texts(to_tensors(first_rows(run.config.dataset(), "test", TEXTS)))


def panel_of(row: dict[str, Any]) -> tuple[str, Any, list[str]]:
    """What a contact sheet shows of what `describe_run` said: samples, or of a model without any what its report shows first."""
    picture = row["picture"]
    if picture is None and not row["texts"]:
        picture = next(iter(report_pictures(Run.open(row["path"])).values()), None)
    return row["run"], picture, row["texts"]


def comparison_page(rows: Sequence[dict[str, Any]], out: Path, classifier: str = "") -> Path:
    """Writes the page of what `describe_run` said of several runs (with the named classifier), and returns its path."""
    page = Report("Generative models", ", ".join(row["run"] for row in rows))
    scores = list(dict.fromkeys(key for row in rows for key in row["scores"]))
    facts = ["run", "model", "data", "parameters", "training_s", "samples_per_s"]
    page.section("Scores", "Of rows that were not used in training. Compare likelihoods on the same data only.")
    page.table(
        [*facts, *scores],
        [[row[key] for key in facts] + [row["scores"].get(key) for key in scores] for row in rows],
        "training_s: seconds; samples_per_s: a second; each as measured where it was trained or compared.",
    )
    if classifier:
        page.text(f"feature_..., obeyed: by the classifier {classifier}.")
    for row in rows:
        if row["note"]:
            page.text(f"{row['run']} is not judged: {row['note']}")
        if row["judge"]:
            page.text(
                f"feature_..., obeyed of {row['run']}: by the classifier {row['judge']} as it was when that run ended."
            )
    page.section("Samples", "Drawn with seed 0, not chosen.")
    page.images([(row["picture"], row["run"]) for row in rows if row["picture"]])
    for row in rows:
        for text in row["texts"]:
            page.details(row["run"], text)
    return page.write(out)
