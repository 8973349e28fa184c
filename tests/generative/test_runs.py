"""Runs of generative models: whole, stopped and resumed, found again by name, sampled and compared through the commands."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from typer import Typer
from typer.testing import CliRunner

from oneira.generative.checking import check_model
from oneira.generative.classifier import Classifier, ClassifierConfig
from oneira.generative.commands import register
from oneira.generative.comparing import describe_run
from oneira.generative.datasets import first_rows
from oneira.generative.gan import GANConfig
from oneira.generative.learning import trained
from oneira.generative.models import load_model, read_model
from oneira.generative.pixelcnn import PixelCNNConfig
from oneira.generative.presets import __doc__ as listed
from oneira.generative.rbm import RBMConfig
from oneira.generative.realnvp import RealNVPConfig
from oneira.generative.settings import ModelRun
from oneira.platform.config import from_dict, to_dict
from oneira.platform.errors import DataError, UsageError
from oneira.platform.executor import SerialExecutor
from oneira.platform.presets import find_entry_points, load_preset
from oneira.platform.runs import Run

SMALL = {
    "realnvp-moons": RealNVPConfig(couplings=2, width=8),
    "pixelcnn-digits": PixelCNNConfig(width=8, blocks=1),  # stops early
    "cgan-digits": GANConfig(z=4, width=4, conditional=True),  # two players
    "rbm-digits": RBMConfig(hidden=8, chains=8, sweeps=5),  # a buffer that goes on
}
EVERY = pytest.mark.parametrize("preset", SMALL)
OURS = [
    name for name, point in find_entry_points("oneira.presets").items() if point.value.startswith("oneira.generative.")
]


def start(folder, preset):
    run = Run.create(folder, preset, replace(load_preset(preset).smoke(), model=SMALL[preset]))
    with SerialExecutor() as executor:
        return run, run.config.train(run, executor)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(preset): the run of a preset that nothing disturbed, and its summary."""
    return cache(lambda preset: start(tmp_path_factory.mktemp("whole") / preset, preset))


@EVERY
def test_a_run_leaves_a_model_scores_and_a_report(whole, preset):
    run, summary = whole(preset)
    scores = json.loads((run.path / "evaluations" / "scores.json").read_text())
    assert scores.items() <= summary.items() and {"frechet", "coverage"} <= scores.keys()
    assert np.isfinite(list(scores.values())).all()
    assert run.config.report(run).stat().st_size > 5000 and (run.path / "media" / "samples.png").exists()
    a, b = load_model(run.path), trained(run)
    assert torch.equal(a.sample(3, 0), b.sample(3, 0)) and not a.training
    check_model(a, first_rows(run.config.dataset(), "test", 6))


@EVERY
@pytest.mark.parametrize("moment", ["fit 5", "fit 15", "stage 0", "stage 1"])
def test_a_stopped_run_continues_to_the_same_bytes(whole, fingerprint, preset, moment, tmp_path, monkeypatch):
    log = Run.log

    def stop(self, stage, step, **values):
        if f"{stage} {step}" == moment:
            raise KeyboardInterrupt
        log(self, stage, step, **values)

    monkeypatch.setattr(Run, "log", stop)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "run", preset)
    monkeypatch.undo()
    run = Run.open(tmp_path / "run")
    with SerialExecutor() as executor:
        run.config.train(run, executor)
    assert fingerprint(run) == fingerprint(whole(preset)[0])


@pytest.mark.parametrize("preset", OURS)
def test_every_preset_is_whole(preset):
    config = load_preset(preset)
    assert isinstance(config, ModelRun) and f"{preset} " in listed.replace(",", " ").replace("\n", " ")
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config
    assert config.smoke().training.steps <= 20
    assert config.training.save_every > 0, "a run that is killed loses what is not saved"


def test_models_are_found_by_name(whole, tmp_path, monkeypatch):
    run, _ = whole("realnvp-moons")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="oneira train realnvp-moons"):
        load_model("realnvp-moons")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(run.path)
    a = load_model("realnvp-moons").sample(2, 0)
    for name in ("mine", "runs/mine", run.path / "model", str(run.path)):
        assert torch.equal(load_model(name).sample(2, 0), a)
    with pytest.raises(UsageError, match="realnvp-moons"):
        load_model("realnvp-moon")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        load_model(tmp_path / "empty")


def test_damaged_folders_are_refused(whole, tmp_path):
    run, _ = whole("realnvp-moons")
    for name in ("model.json", "model.safetensors"):
        (tmp_path / name).write_bytes((run.path / "model" / name).read_bytes())
    card = json.loads((tmp_path / "model.json").read_text())
    for change, said in (
        ({"kind": "realnvq"}, "realnvp"), ({"config": {"width": 9}}, "cannot be read"), ({"space": {}}, "cannot be read"),
    ):  # fmt: skip
        (tmp_path / "model.json").write_text(json.dumps(card | change))
        with pytest.raises((DataError, UsageError), match=said):
            read_model(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(DataError, match="holds no model"):
        read_model(tmp_path)


@pytest.fixture
def command():
    app = Typer()
    register(app)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_samples_are_written(whole, command, tmp_path):
    run, _ = whole("realnvp-moons")
    done = command("sample", run.path, "--n", 5, "--seed", 3, "--out", tmp_path / "a.npy", "--json")
    assert done.exit_code == 0, done.output
    assert np.array_equal(np.load(tmp_path / "a.npy"), load_model(run.path).sample(5, 3).numpy())
    assert command("sample", run.path, "--out", tmp_path / "a.png").exit_code == 0
    assert isinstance(command("sample", run.path, "--out", tmp_path / "a.txt").exception, UsageError)
    assert isinstance(command("sample", run.path, "--n", 0, "--out", tmp_path / "a.png").exception, UsageError)


def test_runs_are_compared(whole, command, tmp_path, monkeypatch):
    names = [str(whole(preset)[0].path) for preset in SMALL]
    done = command("compare", *names, "--out", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png") == 4 and all(
        word in page for word in ("log_likelihood", "bits_per_dim", "frechet")
    )
    done = command("compare", *names, "--out", tmp_path / "page.html", "--sheet", tmp_path / "sheet.png")
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "sheet.png") as sheet:
        panels = np.array(sheet.convert("L"))[30:, 12:]  # the first is of points, the second of digits
    assert (panels[:224, :224] < 200).any() and (panels[:224, 236:460] < 200).any()
    judge = tmp_path / "judge"
    judge.mkdir()
    Classifier(ClassifierConfig(width=8), load_model(names[1]).space).save(judge)
    done = command("compare", *names[:2], "--out", tmp_path / "page.html", "--classifier", judge)
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page.html").read_text()
    assert "feature_frechet" in page and page.count("is not judged") == 1, "points are no pictures"
    wrong = command("compare", *names, "--sheet", tmp_path / "sheet.jpg")
    assert isinstance(wrong.exception, UsageError) and "png" in str(wrong.exception)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(names[0], tmp_path / "runs" / "realnvp-moons-1")
    assert describe_run("realnvp-moons")["run"] == "realnvp-moons-1", "a preset's newest trained run"
    row = describe_run(names[0])
    assert (
        row["samples_per_s"] > 0
        and row["training_s"] > 0
        and row["parameters"] == sum(p.numel() for p in load_model(names[0]).parameters())
    )
    other = Run.create(tmp_path / "other", "carracing-quick", load_preset("carracing-quick"))
    with pytest.raises(DataError, match="no generative model"):
        describe_run(str(other.path))
    fresh = Run.create(tmp_path / "fresh", "realnvp-moons", load_preset("realnvp-moons"))
    with pytest.raises(DataError, match="not trained yet"):
        describe_run(str(fresh.path))


def test_a_classifier_that_cannot_judge_is_refused_before_the_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = replace(load_preset("cgan-digits").smoke(), model=SMALL["cgan-digits"])
    for name, classes, word in (("gone", None, "gone"), ("few", 7, "7 classes")):
        if classes:
            (tmp_path / name).mkdir()
            space = replace(config.dataset().space, classes=classes)
            Classifier(ClassifierConfig(width=8), space).save(tmp_path / name)
        run = Run.create(tmp_path / f"run-{name}", "cgan-digits", replace(config, classifier=name))
        with SerialExecutor() as executor, pytest.raises(UsageError, match=word):
            run.config.train(run, executor)
        assert not run.metrics()


def test_paths_of_a_config_mean_the_same_from_everywhere(whole, tmp_path, monkeypatch):
    for place in ("photos", "runs/other", "judge"):
        (tmp_path / place).mkdir(parents=True)
    run, _ = whole("realnvp-moons")
    shutil.copytree(run.path, tmp_path / "runs" / "judge")
    monkeypatch.chdir(tmp_path)
    config = load_preset("vae-scenes")
    config = replace(config, classifier="judge", data=replace(config.data, name="images", path="photos"))
    assert config.data.path == str(tmp_path / "photos")
    assert config.classifier == str(tmp_path / "runs" / "judge" / "model"), "a folder that is no model is passed over"
    kept = replace(config, classifier="cnn-digits", data=replace(config.data, path="other"))
    assert (kept.classifier, kept.data.path) == ("cnn-digits", "other"), "names stay, and data are no runs"


def test_a_run_that_cannot_be_read_does_not_hide_others(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, _ = whole("realnvp-moons")
    shutil.copytree(run.path, tmp_path / "runs" / "good")
    shutil.copytree(run.path, tmp_path / "runs" / "newer")
    card = json.loads((tmp_path / "runs" / "newer" / "config.json").read_text())
    card |= {"preset": "of-a-package-that-is-gone", "config": {"no": "such key"}}
    (tmp_path / "runs" / "newer" / "config.json").write_text(json.dumps(card))
    assert torch.equal(load_model("realnvp-moons").sample(2, 0), load_model(run.path).sample(2, 0))


def test_a_stage_that_was_interrupted_counts_all_of_its_time(tmp_path):
    from oneira.generative.learning import _timed

    run = Run.create(tmp_path / "run", "realnvp-moons", load_preset("realnvp-moons"))
    for error in (KeyboardInterrupt, None):
        with pytest.raises(KeyboardInterrupt) if error else nullcontext(), _timed(run, "fit", 0):
            time.sleep(0.05)
            if error:
                raise error
    [line] = run.metrics("stage")
    assert 0.1 <= line["seconds"] < 1
