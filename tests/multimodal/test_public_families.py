"""Kandinsky 2.2, unCLIP and DeepFloyd IF: pictures equal to those of diffusers' own pipelines, noise for noise."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from oneira.generative.diffusion import noise_of
from oneira.generative.learning import seed_of
from oneira.multimodal import load_text_to_image
from oneira.multimodal.public import names
from oneira.multimodal.stages import PictureRequest
from oneira.platform.errors import DataError, UsageError

from . import foreign
from .test_public import PROMPTS, largest_difference

SEEDS = [3, 4]


def noise(name, place, *shape):
    return torch.stack([noise_of(seed_of(seed, *np.atleast_1d(name)), place, shape) for seed in SEEDS])


class Noise:
    """Our noise in the place of theirs: of each call to come, the stage's name and the place."""

    def __init__(self, patch, module, *calls):
        self.left = list(calls)
        patch.setattr(f"diffusers.{module}.randn_tensor", self)

    def __call__(self, shape, **settings):
        name, place = self.left.pop(0)
        return noise(name, place, *shape[1:])


def steps(name, count):
    return [(name, place + 1) for place in range(count)]


def quiet(kind, folder):
    made = kind.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def kandinsky(tmp_path_factory):
    return foreign.kandinsky(tmp_path_factory.mktemp("kandinsky"))


@pytest.fixture(scope="module")
def karlo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unclip") / "karlo"
    return folder, foreign.unclip(folder)


@pytest.fixture(scope="module")
def unclip(karlo):
    return karlo[0]


@pytest.fixture(scope="module")
def deepfloyd(tmp_path_factory):
    return foreign.deepfloyd(tmp_path_factory.mktemp("deepfloyd"))


def test_kandinsky_draws_what_diffusers_draws(kandinsky, monkeypatch):
    pipe = load_text_to_image(f"prior={kandinsky[0]},decoder={kandinsky[1]}")
    prior, decoder = (
        quiet(diffusers.KandinskyV22PriorPipeline, kandinsky[0]),
        quiet(diffusers.KandinskyV22Pipeline, kandinsky[1]),
    )
    left = Noise(monkeypatch, "schedulers.scheduling_unclip", *steps("prior", 4))
    drawn = Noise(monkeypatch, "schedulers.scheduling_ddpm", *steps("decoder", 5))
    found = prior(PROMPTS, num_inference_steps=5, guidance_scale=3.0, latents=noise("prior", 0, foreign.WIDTH))
    wanted = decoder(
        **found, num_inference_steps=5, guidance_scale=3.0, height=16, width=16, latents=noise("decoder", 0, 4, 8, 8)
    ).images  # fmt: skip
    assert not left.left and not drawn.left
    ours = pipe(PROMPTS, seed=3, steps=5, guidance=3.0)
    assert ours[0].size == (16, 16) and largest_difference(ours, wanted) <= 1
    assert np.asarray(ours[0]).std() > 5 and not np.array_equal(ours[0], ours[1]) and pipe.name == "decoder"


def test_kandinskys_variations_see_the_picture_as_diffusers_does(kandinsky):
    pipe = load_text_to_image(f"prior={kandinsky[0]},decoder={kandinsky[1]}")
    prior = quiet(diffusers.KandinskyV22PriorPipeline, kandinsky[0])
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    pixels = prior.image_processor(picture, input_data_format="channels_last", return_tensors="pt").pixel_values
    wanted = prior.image_encoder(pixels).image_embeds[0].detach()
    text = pipe.stages[0]
    plan = text.plan(PictureRequest(task="variation", picture=picture), {})
    text.step([plan])
    assert torch.allclose(torch.from_numpy(plan.found["image_embedding"]), wanted, atol=1e-5)
    one, two = pipe.variations(picture, n=2, steps=2)
    assert not np.array_equal(one, two)


def test_unclip_draws_what_diffusers_draws(karlo, monkeypatch):
    theirs = karlo[1]
    theirs.set_progress_bar_config(disable=True)
    calls = [*steps("prior", 4), *steps("decoder", 4), *steps("upsampler-32", 4)]
    left = Noise(monkeypatch, "schedulers.scheduling_unclip", *calls)
    wanted = theirs(
        PROMPTS, prior_num_inference_steps=5, decoder_num_inference_steps=5, super_res_num_inference_steps=5,
        prior_guidance_scale=3.0, decoder_guidance_scale=3.0, prior_latents=noise("prior", 0, foreign.WIDTH),
        decoder_latents=noise("decoder", 0, 3, 16, 16), super_res_latents=noise("upsampler-32", 0, 3, 32, 32),
    ).images  # fmt: skip
    assert not left.left
    ours = load_text_to_image(karlo[0])(PROMPTS, seed=3, steps=5, guidance=3.0)
    assert ours[0].size == (32, 32) and largest_difference(ours, wanted) <= 1
    assert np.asarray(ours[0]).std() > 5


def test_deepfloyd_draws_what_diffusers_draws(deepfloyd, monkeypatch):
    base, larger = quiet(diffusers.IFPipeline, deepfloyd[0]), quiet(diffusers.IFSuperResolutionPipeline, deepfloyd[1])
    start, up = "decoder", "upsampler-32"
    Noise(monkeypatch, "pipelines.deepfloyd_if.pipeline_if", (start, 0))
    Noise(monkeypatch, "pipelines.deepfloyd_if.pipeline_if_superresolution", (up, 0), ((up, "condition"), 0))
    left = Noise(monkeypatch, "schedulers.scheduling_ddpm", *steps(start, 3), *steps(up, 3))
    said = {"clean_caption": False, "num_inference_steps": 4, "output_type": "pt"}
    small = base(PROMPTS, guidance_scale=3.0, **said).images
    wanted = larger(PROMPTS, image=small, guidance_scale=4.0, **said | {"output_type": "pil"}).images
    assert not left.left
    ours = load_text_to_image(f"decoder={deepfloyd[0]},upsampler={deepfloyd[1]}")(
        PROMPTS, seed=3, steps=4, guidance=3.0
    )
    assert ours[0].size == (32, 32) and largest_difference(ours, wanted) <= 1
    assert np.asarray(ours[0]).std() > 5
    alone = load_text_to_image(deepfloyd[0])(PROMPTS, seed=3, steps=4, guidance=3.0)
    signed = np.asarray(alone[0], np.float32) / 127.5 - 1
    assert np.abs(signed - small[0].clamp(-1, 1).permute(1, 2, 0).numpy()).max() <= 1 / 127


def test_rows_of_one_batch_may_be_at_different_steps(unclip):
    pipe = load_text_to_image(unclip)
    requests = [
        PictureRequest(prompt="a", seed=1, steps=2),
        PictureRequest(prompt="b", seed=2, steps=6),
    ]
    together = pipe.draw(requests)
    for request, picture in zip(requests, together, strict=True):
        assert largest_difference(pipe.draw([request]), [picture]) <= 1


WRONG = [
    ("{prior}", UsageError, "is one of two folders of Kandinsky 2.2: write --model prior=PATH,decoder=PATH"),
    ("decoder={decoder}", UsageError, "is one of two folders"),
    ("prior={decoder},decoder={prior}", UsageError, "which is no prior"),
    ("prior={prior},decoder={unclip}", UsageError, "unCLIP takes no prior beside its decoder"),
    ("prior={prior},upsampler={upsampler}", UsageError, "No decoder is named"),
    ("prior={prior},prior={prior}", UsageError, "names 'prior' twice"),
    ("prior=nowhere,decoder={decoder}", DataError, "nowhere/model_index.json' cannot be read"),
    ("{upsampler}", UsageError, "decoder=PATH,upsampler=PATH"),
]


@pytest.mark.parametrize(("name", "error", "words"), WRONG, ids=range(len(WRONG)))
def test_parts_that_do_not_go_together_are_told(kandinsky, unclip, deepfloyd, name, error, words):
    places = {"prior": kandinsky[0], "decoder": kandinsky[1], "unclip": unclip, "upsampler": deepfloyd[1]}
    with pytest.raises(error, match=words):
        load_text_to_image(name.format(**places))


def test_a_name_for_a_process_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    assert names.absolute("m") == str(tmp_path / "m") and names.absolute("builtin") == "builtin"
    assert names.absolute("prior=a,b,decoder=m") == f"prior={tmp_path / 'a,b'},decoder={tmp_path / 'm'}"
