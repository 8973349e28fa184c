"""A run that trains one network: fit, keep, score, report. What `train` of such a run's config calls.

run/checkpoints/fit@STEP     the state of training, gone at the end
run/checkpoints/model@0      the weights
run/model/                   the same as a folder in the public format
run/evaluations/scores.json  what it reaches on data that it was not trained on
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from oneira.platform.checkpoints import json_bytes, sync, write_replacing
from oneira.platform.config import to_dict
from oneira.platform.errors import CheckpointError, DataError, Interrupted
from oneira.platform.executor import Executor
from oneira.platform.report import Report
from oneira.platform.runs import Run

from .parallel import rank_and_size
from .training import TrainSettings, fit


class Lesson(Protocol):
    """The config of a run that trains one network."""

    @property
    def seed(self) -> int: ...

    @property
    def training(self) -> TrainSettings: ...

    def build(self) -> Any:
        """The untrained network, with `save(folder)`; its weights come from torch's global generator."""
        ...

    def batches(self) -> Callable[[int], Any]:
        """The batch of each step, a pure function of the step."""
        ...

    def score(self, model: Any) -> dict[str, float]:
        """What the trained network reaches on data it has not seen."""
        ...


def learn(config: Lesson, run: Run, executor: Executor) -> dict[str, Any]:
    """Does what is missing of a run. Returns its scores, and the seconds that its stages took."""
    if not run.checkpoints.exists("model"):
        with _timed(run, "fit", 0):
            unit, workers = {"run": str(run.path)}, getattr(config, "workers", 1)
            if workers > 1:
                executor.together(fit_unit, unit, workers)
            else:
                executor.submit(fit_unit, None, unit, threads=0).result()
    if run.checkpoints.exists("fit"):
        run.checkpoints.delete("fit")
    place = scores_of(run)
    if not place.exists():
        with _timed(run, "score", 1):
            scores = executor.submit(score_unit, None, {"run": str(run.path)}, threads=0).result()
        place.parent.mkdir(exist_ok=True)
        write_replacing(place, json_bytes(scores))
    scores = json.loads(place.read_text(encoding="utf-8"))
    return {**scores, "seconds": sum(line["seconds"] for line in run.metrics("stage"))}


def scores_of(run: Run) -> Path:
    """Where a run's scores are."""
    return run.path / "evaluations" / "scores.json"


@contextmanager
def _timed(run: Run, name: str, step: int) -> Iterator[None]:
    """Logs what a stage took, also of one that was interrupted: whoever goes on with it adds to that."""
    before = sum(line["seconds"] for line in run.metrics("stage") if line["step"] == step)
    began = time.perf_counter()

    def log() -> None:
        run.log("stage", step, name=name, seconds=before + time.perf_counter() - began)

    try:
        yield
    except (KeyboardInterrupt, Interrupted):
        with suppress(DataError):  # a full disk does not hide why it ends
            log()
        raise
    log()


def fit_unit(shared: Any, unit: dict[str, Any]) -> dict[str, Any]:
    """Trains the network of a run, alone or with the others of its group, and keeps it. Unit: run (its path)."""
    run = Run.open(unit["run"])
    config: Lesson = run.config
    torch.manual_seed(seed_of(config.seed, "weights"))
    model = config.build()
    batch_size = config.training.batch_size
    log = _logger(run, config.training.steps, batch_size)
    validate = getattr(config, "validate", None)  # only some lessons stop early
    model = fit(
        model, config.batches(), config.training, checkpoints=run.checkpoints, name="fit", log=log, validate=validate
    )
    if rank_and_size()[0] == 0:
        write_folder(run.path / "model", model.save)
        run.checkpoints.save("model", model.state_dict(), {})
    return {}


def score_unit(shared: Any, unit: dict[str, Any]) -> dict[str, float]:
    """Measures the network of a run. Unit: run (its path)."""
    run = Run.open(unit["run"])
    return run.config.score(trained(run))


def trained(run: Run) -> Any:
    """The network of a run, in eval mode. Raises CheckpointError when it is not trained yet or of another shape."""
    kept = run.checkpoints.load("model")
    model = run.config.build()
    try:
        model.load_state_dict(kept.tensors)
    except RuntimeError as error:
        raise CheckpointError(f"The weights in '{run.path}' are of another network: {error}") from error
    return model.eval()


def smoke_of(settings: TrainSettings) -> TrainSettings:
    """The same training, tiny."""
    return replace(
        settings, steps=min(settings.steps, 20), batch_size=min(settings.batch_size, 32), save_every=10, log_every=5
    )


def seed_of(seed: int, *place: int | str) -> int:
    """A seed in [0, 2^31) for one place of a run: (run's seed, stage, ...)."""
    words = [part if isinstance(part, int) else int.from_bytes(part.encode(), "little") for part in place]
    return int(np.random.SeedSequence((seed, *words)).generate_state(1)[0] >> 1)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Has `write` fill a new folder, and puts it in the place of `folder`, whole."""
    writing = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    writing.mkdir(parents=True)
    try:
        write(writing)
        for path in (*writing.rglob("*"), writing):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        writing.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise


def _logger(run: Run, steps: int, batch_size: int) -> Callable[..., None]:
    last = [time.perf_counter(), 0]

    def log(step: int, **values: float) -> None:
        now = time.perf_counter()
        speed = {"rows_per_s": (step - last[1]) * batch_size / max(now - last[0], 1e-9)} if last[1] else {}
        last[:] = [now, step]
        run.log("fit", step, total=steps, **values, **speed)

    return log


def lesson_report(
    run: Run, subtitle: str, pictures: Mapping[str, Any] | None = None, alarms: Sequence[str] = ()
) -> Path:
    """Writes a run's report.html from what it holds by now, with pictures {caption: file or array} and what is to be warned of.

    Returns its path.
    """
    page = Report(run.name, f"{run.preset}: {subtitle}")
    page.section("Scores", "On data that was not used in training.")
    for alarm in alarms:
        page.text(f"⚠ {alarm}")
    if scores_of(run).exists():
        page.tiles(json.loads(scores_of(run).read_text(encoding="utf-8")))
    else:
        page.text("This run is not trained yet: `oneira resume` goes on with it.")
    if pictures:
        page.section("Pictures")
        for caption, picture in pictures.items():
            small = isinstance(picture, np.ndarray) and picture.shape[1] <= 320
            page.image(picture, caption, scale=max(1, 640 // picture.shape[1]) if small else 1)
    lines = run.metrics("fit")
    if lines:
        page.section("Training")
        for key in dict.fromkeys(
            key for line in lines for key in line if key not in ("time", "stage", "step", "total", "lr")
        ):
            kept = [line for line in lines if key in line]
            page.chart({key: ([line["step"] for line in kept], [line[key] for line in kept])}, title=key, xlabel="step")
    page.section("Conditions")
    machine = run.provenance()["machine"]
    page.facts({key: machine[key] for key in ("device_name", "precision", "cores")})
    page.details("Config", json.dumps(to_dict(run.config), indent=1))
    return page.write(run.report_path)
