"""Public models: pictures equal to those of diffusers' own pipelines, and what a folder may not be."""

from __future__ import annotations

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from oneira.generative.diffusion import noise_of
from oneira.generative.learning import seed_of
from oneira.multimodal import load_text_to_image
from oneira.platform.errors import DataError, UsageError

from . import foreign

PROMPTS = ["a red circle", "two blue squares above a star that is far too long to be read as a whole"]


def largest_difference(ours, theirs):
    return max(
        np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(ours, theirs, strict=True)
    )  # fmt: skip


def latents_of(seeds, shape):
    return torch.stack([noise_of(seed_of(seed, "decoder"), 0, shape) for seed in seeds])


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **SD),
    "old": lambda: diffusers.DDIMScheduler(**SD),
    "ddim-v": lambda: diffusers.DDIMScheduler(
        clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing", **SD
    ),
    "dpm++": lambda: diffusers.DPMSolverMultistepScheduler(**SD),
    "pndm": foreign.pndm,
    "euler": lambda: diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **SD),
}


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    return foreign.stable_diffusion(tmp_path_factory.mktemp("public") / "stable")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_stable_diffusion_draws_what_diffusers_draws(stable, tmp_path, name):
    folder = shutil.copytree(stable, tmp_path / "m")
    SCHEDULERS[name]().save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(SCHEDULERS[name]()).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    if name in ("pndm", "euler"):
        theirs.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    pipe = load_text_to_image(folder)
    for steps, guidance in ((4, 7.5), (5, 1.0)):
        found = pipe(PROMPTS, seed=3, steps=steps, guidance=guidance)
        wanted = theirs(
            PROMPTS, num_inference_steps=steps, guidance_scale=guidance, latents=latents_of([3, 4], (4, 8, 8))
        ).images
        assert found[0].size == (16, 16) and largest_difference(found, wanted) <= 1
        assert np.asarray(found[0]).std() > 5  # something is drawn
    assert pipe.name == "m"


def test_what_replaces_a_sampler_is_said(stable):
    [note] = load_text_to_image(stable).notes
    assert "PNDMScheduler is replaced by DPM-Solver++" in note


def test_an_edit_keeps_what_is_outside_of_the_mask(stable):
    pipe = load_text_to_image(stable)
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    mask = np.zeros((16, 16), bool)
    mask[:8] = True
    [found] = pipe.edit(picture, mask, "a red star", steps=4, seed=1)
    assert np.array_equal(np.asarray(found)[8:], picture[8:]) and not np.array_equal(np.asarray(found)[:8], picture[:8])
    other = picture.copy()
    other[8:] = 255 - other[8:]
    [changed] = pipe.edit(other, mask, "a red star", steps=4, seed=1)
    assert not np.array_equal(np.asarray(found)[:8], np.asarray(changed)[:8])  # it sees what is around
    with pytest.raises(UsageError, match=r"Stable Diffusion has no 'variation'. Allowed: generate, edit"):
        pipe.variations(Image.fromarray(picture))


# ---- folders that are none


def damaged(kind):
    def change(folder):
        index = json.loads((folder / "model_index.json").read_text())
        if kind == "pickle":
            (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/diffusion_pytorch_model.bin")
        elif kind == "no weights":
            (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
        elif kind == "no part":
            shutil.rmtree(folder / "text_encoder")
        elif kind == "no tokenizer":
            for path in (folder / "tokenizer").iterdir():
                path.unlink()
        elif kind == "cut weights":
            path = folder / "unet/diffusion_pytorch_model.safetensors"
            path.write_bytes(path.read_bytes()[:5000])
        elif kind == "other weights":
            shutil.copy(
                folder / "vae/diffusion_pytorch_model.safetensors", folder / "unet/diffusion_pytorch_model.safetensors"
            )
        elif kind == "no json":
            (folder / "model_index.json").write_text("{")
        elif kind == "scheduler":
            config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
            (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config | {"beta_schedule": "sine"}))
        elif kind == "karras":
            config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
            (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config | {"use_karras_sigmas": True}))
        else:
            key, value = kind
            index[key] = value
            (folder / "model_index.json").write_text(json.dumps(index))

    return change


DAMAGED = {
    "pickle": "diffusion_pytorch_model.bin' is no safetensors",
    "no weights": r"vae' lacks the weights",
    "no part": r"text_encoder/config.json' cannot be read",
    "no tokenizer": "lacks the files of a CLIPTokenizer",
    "cut weights": "holds no UNet2DConditionModel",
    "other weights": "UNet2DConditionModel",
    "no json": "model_index.json' cannot be read",
    "scheduler": "beta_schedule is 'sine'",
    "karras": "use_karras_sigmas is set",
    ("unet", ("my_code", "MyUNet")): "'unet' is of class 'MyUNet', which is not on the list",
    ("unet", ("diffusers", "AutoencoderKL")): "'unet' is of class 'AutoencoderKL'. Allowed: UNet2DConditionModel",
    ("extra", ("os", "system")): "'extra' is of class 'system'",
    ("vae", (None, None)): "lacks the part 'vae'",
    ("_class_name", "StableDifusionPipeline"): "Did you mean 'StableDiffusionPipeline'",
}


@pytest.mark.parametrize("kind", DAMAGED, ids=str)
def test_a_folder_that_is_no_model_is_told_in_one_line(stable, tmp_path, kind):
    folder = shutil.copytree(stable, tmp_path / "m")
    damaged(kind)(folder)
    with pytest.raises(DataError, match=DAMAGED[kind]) as told:
        load_text_to_image(folder)(["a"], steps=1)
    assert "\n" not in str(told.value)


def test_a_file_of_weights_is_no_model(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(DataError, match="is a file; a model is a folder"):
        load_text_to_image(tmp_path / "model.ckpt")


def test_code_beside_a_model_is_never_run(stable, tmp_path):
    folder = shutil.copytree(stable, tmp_path / "m")
    trap = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    for name in ("pipeline.py", "unet/my_unet.py", "text_encoder/modeling.py"):
        (folder / name).write_text(trap)
    for name in ("unet", "text_encoder"):
        config = json.loads((folder / name / "config.json").read_text())
        config["auto_map"] = {"AutoModel": "modeling.Model", "AutoConfig": "modeling.Config"}
        (folder / name / "config.json").write_text(json.dumps(config))
    load_text_to_image(folder)(["a"], steps=1)
    assert not (tmp_path / "ran").exists()
