"""Runs that train one network on scenes: whole, interrupted and resumed, through the command line."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from oneira.generative.learning import seed_of, trained
from oneira.multimodal.ar_prior import ArPrior, ArPriorConfig
from oneira.multimodal.checker import Checker, CheckerConfig
from oneira.multimodal.clip import Clip, ClipConfig
from oneira.multimodal.decoder import Decoder, DecoderConfig
from oneira.multimodal.prior import Prior, PriorConfig
from oneira.multimodal.scenes import draw, sample
from oneira.multimodal.upsampler import Upsampler, UpsamplerConfig
from oneira.platform.errors import CheckpointError, DataError
from oneira.platform.executor import SerialExecutor
from oneira.platform.presets import load_preset
from oneira.platform.runs import Run

SMALL = {
    "scenes-clip": {"clip": ClipConfig(embed=32, image_size=32, vision="resnet", text_width=32, text_layers=1)},
    "scenes-checker": {"checker": CheckerConfig(width=8, blocks=1)},
    "scenes-prior": {"prior": PriorConfig(width=32, layers=1)},
    "scenes-prior-ar": {"prior": ArPriorConfig(width=32, layers=1, components=6, buckets=8)},
    "scenes-decoder": {"decoder": DecoderConfig(size=16, widths=(8, 32))},
    "scenes-upsampler": {"upsampler": UpsamplerConfig(size=32, widths=(8, 16))},
}  # fmt: skip
BEHIND_CLIP = ("scenes-prior", "scenes-prior-ar", "scenes-decoder")
PRESETS = pytest.mark.parametrize("preset", SMALL)


def small(preset, clip):
    config = load_preset(preset).smoke()
    given = {"clip": str(clip)} if preset in BEHIND_CLIP else {}
    return replace(config, training=replace(config.training, batch_size=8), checks=40, **SMALL[preset], **given)


def start(folder, preset, clip):
    run = Run.create(folder, preset, small(preset, clip))
    with SerialExecutor() as executor:
        return run, run.config.train(run, executor)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_clip):
    """whole(preset): the run of a preset that nothing disturbed, and its summary."""
    return cache(lambda preset: start(tmp_path_factory.mktemp(preset) / "run", preset, tiny_clip))


@PRESETS
def test_a_run_leaves_weights_scores_and_a_report(whole, preset):
    run, summary = whole(preset)
    assert run.checkpoints.names() == ["model"]
    scores = json.loads((run.path / "evaluations" / "scores.json").read_text())
    assert scores and scores.items() <= summary.items() and all(-1 <= value <= 1 for value in scores.values())
    assert run.config.report(run).stat().st_size > 5000
    assert [line["step"] for line in run.metrics("fit")] == [5, 10, 15, 20]


@PRESETS
def test_the_folder_holds_the_trained_network(whole, preset):
    run, _ = whole(preset)
    pictures = draw(sample(np.arange(6)), 32)
    if preset == "scenes-clip":
        a, b = (model.embed_images(pictures).numpy() for model in (trained(run), Clip.load(run.path / "model")))
        assert np.array_equal(a, b)
    elif preset == "scenes-checker":
        a, b = (model.read(pictures).x for model in (trained(run), Checker.load(run.path / "model")))
        assert np.array_equal(a, b)
    else:
        kinds = {
            "scenes-prior": Prior,
            "scenes-prior-ar": ArPrior,
            "scenes-decoder": Decoder,
            "scenes-upsampler": Upsampler,
        }
        a, b = (model.state_dict() for model in (trained(run), kinds[preset].load(run.path / "model")))
        assert a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a)


@PRESETS
@pytest.mark.parametrize("moment", ["fit 5", "fit 15", "fit 20", "stage 0", "stage 1"])
def test_a_stopped_run_continues_to_the_same_bytes(
    whole, fingerprint, preset, moment, tiny_clip, tmp_path, monkeypatch
):
    log = Run.log

    def stop(self, stage, step, **values):
        if f"{stage} {step}" == moment:
            raise KeyboardInterrupt
        log(self, stage, step, **values)

    monkeypatch.setattr(Run, "log", stop)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "run", preset, tiny_clip)
    monkeypatch.undo()
    run = Run.open(tmp_path / "run")
    with SerialExecutor() as executor:
        run.config.train(run, executor)
    assert fingerprint(run) == fingerprint(whole(preset)[0])


@PRESETS
def test_a_done_run_does_nothing_more(whole, fingerprint, preset):
    run, _ = whole(preset)
    before = len(run.metrics()), fingerprint(run)
    with SerialExecutor() as executor:
        run.config.train(run, executor)
    assert (len(run.metrics()), fingerprint(run)) == before


def test_weights_of_another_network_are_refused(whole, tmp_path):
    run, _ = whole("scenes-checker")
    other = Run.create(
        tmp_path / "other", "scenes-checker", replace(run.config, checker=CheckerConfig(width=16, blocks=1))
    )
    other.checkpoints.save("model", run.checkpoints.load("model").tensors, {})
    with pytest.raises(CheckpointError, match="another network"):
        trained(other)


@pytest.mark.parametrize("preset", BEHIND_CLIP)
def test_without_a_clip_nothing_is_trained(preset, tmp_path):
    run = Run.create(tmp_path / "run", preset, replace(load_preset(preset).smoke(), clip=str(tmp_path / "none")))
    with SerialExecutor() as executor, pytest.raises(DataError, match="--set clip=RUN"):
        run.config.train(run, executor)
    assert not run.metrics()


@PRESETS
def test_another_seed_learns_from_other_scenes(preset, tiny_clip):
    config = small(preset, tiny_clip)
    a, b, again = (replace(config, seed=seed).batches()(3) for seed in (0, 1, 0))
    for key in a:
        assert np.array_equal(a[key], again[key])
    assert not any(np.array_equal(a[key], b[key]) for key in a if "mask" not in key and key != "present")


def test_a_decoder_goes_on_from_another(whole, tmp_path):
    run, _ = whole("scenes-decoder")
    config = replace(run.config, init=str(run.path), seed=1)
    begun, kept = config.build().state_dict(), trained(run).state_dict()
    assert begun.keys() == kept.keys() and all((begun[key] == kept[key]).all() for key in kept)
    with pytest.raises(DataError, match="another shape"):
        replace(config, decoder=DecoderConfig(size=16, widths=(8, 64))).build()
    lost = Run.create(tmp_path / "run", "scenes-decoder", replace(config, init=str(tmp_path / "none")))
    with SerialExecutor() as executor, pytest.raises(DataError, match="no trained network"):
        lost.config.train(lost, executor)
    assert not lost.metrics()


def test_seeds_of_places_differ():
    seeds = {seed_of(run, stage, k) for run in range(5) for stage in ("weights", "words") for k in range(20)}
    assert len(seeds) == 200 and all(0 <= seed < 2**31 for seed in seeds)


def test_presets_train_from_the_command_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "oneira.platform.cli",
        "train",
        "scenes-checker",
        "--smoke",
        "--executor",
        "serial",
    ]
    settings = ["--set", "checker.width=8", "--set", "training.steps=2", "--run", str(tmp_path / "run"), "--json"]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "everything" in json.loads(done.stdout)["summary"]
