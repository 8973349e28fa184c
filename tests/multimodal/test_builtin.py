"""The weights that ship: their size and precision, and that they reach what their card says, on fewer pictures."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from oneira.multimodal.assembling import check_embeddings
from oneira.multimodal.checker import Checker
from oneira.multimodal.embedding import load_clip, square_clip
from oneira.multimodal.prior import Prior
from oneira.multimodal.scenes import UNSEEN, agreement, altered, draw, sample, true_reading
from oneira.multimodal.shelf import BUILTIN
from oneira.multimodal.upsampler import Upsampler
from oneira.platform.presets import load_preset


def test_they_are_of_half_precision_and_small():
    import safetensors.torch

    files = list(BUILTIN.rglob("*.safetensors"))
    assert len(files) >= 3 and sum(file.stat().st_size for file in files) <= 25e6
    kinds = {
        value.dtype
        for file in files
        for value in safetensors.torch.load_file(file).values()
        if value.is_floating_point()
    }
    assert kinds == {torch.float16}
    assert (BUILTIN / "README.md").is_file()


def test_clip_names_what_it_was_never_shown():
    scores = replace(load_preset("scenes-clip"), checks=300).score(load_clip("builtin"))
    assert scores["zero_shot_pairs"] >= 0.97 and scores["zero_shot_all"] >= 0.97 and scores["retrieval_combos"] >= 0.97


def test_the_prior_finds_the_pictures_of_captions():
    prior, clip = Prior.load(BUILTIN / "prior"), square_clip("builtin")
    check_embeddings(clip, {"prior": prior.clip_mean}, {"prior": BUILTIN / "prior", "clip": BUILTIN / "clip"})
    scores = replace(load_preset("scenes-prior"), clip="builtin", checks=60).score(prior)
    assert scores["cosine"] >= 0.95 * scores["ceiling"] and scores["ceiling"] > 0.9
    assert scores["unrelated"] <= 0.1


def test_the_upsampler_comes_nearer_than_bicubic():
    model = Upsampler.load(BUILTIN / "upsampler")
    run = replace(load_preset("scenes-upsampler"), checks=8)
    for size in (64, 128):
        scores = replace(run, upsampler=replace(run.upsampler, size=size)).score(model)
        assert scores["rms"] < 0.75 * scores["bicubic"]


@pytest.mark.parametrize("size", [64, 256])
def test_the_judge_reads_true_pictures(size):
    judge = Checker.load(BUILTIN / "checker")
    for split in ("pairs", "combos", "all"):
        scenes = sample(np.arange(200) + UNSEEN, split)
        assert agreement(scenes, judge.read(draw(scenes, size)))["everything"].mean() >= 0.99


def test_the_judge_sees_what_is_wrong():
    """One thing of each picture is another than its scene says."""
    scenes = sample(np.arange(200) + UNSEEN, "all")
    others = altered(scenes, 1)
    read, true = (
        agreement(scenes, r) for r in (Checker.load(BUILTIN / "checker").read(draw(others, 64)), true_reading(others))
    )
    assert true["everything"].mean() <= 0.1  # in some a change of places is none of what is judged
    assert np.mean(read["everything"] == true["everything"]) >= 0.99


@pytest.mark.parametrize("name", ["clip", "prior", "decoder", "upsampler"])
def test_they_can_be_named(name):
    from oneira.multimodal.assembling import part_folder
    from oneira.multimodal.embedding import clip_folder

    assert (clip_folder("builtin") if name == "clip" else part_folder("builtin", name)) == BUILTIN / name
