"""Text to image whole: runs of tiny parts, put together, loaded, drawn with, scored; and the commands."""

import copy
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from oneira.generative.interpolation import slerp
from oneira.multimodal import load_text_to_image
from oneira.multimodal.assembling import assemble, folder_bytes
from oneira.multimodal.checker import Checker, CheckerConfig
from oneira.multimodal.decoder import Decoder, DecoderConfig
from oneira.multimodal.scenes import draw, sample
from oneira.multimodal.scoring import score_pictures, wilson
from oneira.multimodal.stages import PictureRequest, through
from oneira.multimodal.text_to_image import MODEL, ModelCard
from oneira.platform.errors import ConfigError, DataError, UsageError

CARD = ModelCard(prior_steps=2, decoder_steps=3, upsampler_steps=1, sizes=(32, 64))


@pytest.fixture(scope="module")
def folders(parts, tiny_clip, tmp_path_factory):
    """Where each part lies."""
    top = tmp_path_factory.mktemp("parts")
    for name, part in parts.items():
        (top / name).mkdir()
        part.save(top / name)
    return {"clip": str(tiny_clip), **{name: str(top / name) for name in parts}}


@pytest.fixture(scope="module")
def model(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("model") / "tiny"
    assemble(out, **{key: folders[key] for key in ("clip", "prior", "decoder", "upsampler")}, card=CARD)
    return out


@pytest.fixture(scope="module")
def pipe(model):
    return load_text_to_image(model)


def pixels(pictures):
    return [np.asarray(picture).astype(int) for picture in pictures]


def test_a_model_is_one_folder_of_half_precision(model):
    import safetensors.torch

    assert {path.name for path in model.iterdir()} == {"clip", "prior", "decoder", "upsampler", MODEL}
    for path in model.rglob("*.safetensors"):
        kinds = {value.dtype for value in safetensors.torch.load_file(path).values() if value.is_floating_point()}
        assert kinds == {torch.float16}, path
    assert folder_bytes(model) < 2e6


def test_pictures_from_prompts(pipe):
    pictures = pipe(["a red circle", "a blue star", "a red circle"], seed=3)
    assert [picture.size for picture in pictures] == [(64, 64)] * 3 and pipe.size == 64
    assert [stage.name for stage in pipe.stages] == ["text", "prior", "decoder", "upsampler-32", "upsampler-64"]
    first, _, third = pixels(pictures)
    assert np.abs(first - third).max() > 1  # seed 3 and seed 5
    assert np.abs(pixels(pipe(["a red circle"], seed=3))[0] - first).max() <= 1
    assert np.abs(pixels(pipe("a red circle", seed=5))[0] - third).max() <= 1
    assert np.abs(pixels(pipe("a red circle", seed=3, steps=2))[0] - first).max() > 1
    assert np.abs(pixels(pipe("a red circle", seed=3, guidance=5.0))[0] - first).max() > 1


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda pipe: pipe(["a", " "]), "prompt"), (lambda pipe: pipe(["a"], seed=-1), "seed"),
        (lambda pipe: pipe(["a"], steps=0), "steps"), (lambda pipe: pipe(["a"], seed=2**63), "seed"),
        (lambda pipe: pipe.interpolate("a", "b", frames=1), "frames"),
        (lambda pipe: pipe.variations(np.zeros((4, 4), np.uint8)), "picture"),
        (lambda pipe: pipe.edit(np.zeros((4, 4, 3), np.uint8), np.zeros((5, 5), bool), "a"), "mask"),
        (lambda pipe: pipe.text_difference(np.zeros((4, 4, 3), np.uint8), "a", "a"), "same"),
        (lambda pipe: pipe.text_difference(np.zeros((4, 4, 3), np.uint8), "red", "blue", strength=2), "strength"),
        (lambda pipe: pipe.conditioned("txet"), "text"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(pipe, call, word):
    with pytest.raises(UsageError, match=word):
        call(pipe)


def test_variations_edits_and_differences(pipe):
    picture = draw(sample(np.arange(1)), 64)[0]
    a, b = pixels(pipe.variations(picture, n=2))
    assert np.abs(a - b).max() > 1
    mask = np.zeros((64, 64), bool)
    mask[16:48, 16:48] = True
    (edited,) = pixels(pipe.edit(picture, mask, "a red circle"))
    assert np.array_equal(edited[~mask], picture[~mask]) and not np.array_equal(edited[mask], picture[mask])
    frames = pixels(pipe.text_difference(picture, "a red circle", "a blue star", frames=2))
    assert len(frames) == 2 and np.abs(frames[0] - frames[1]).max() > 1
    (still,) = pixels(pipe.text_difference(picture, "a red circle", "a blue star", frames=1, strength=0.0))
    assert np.abs(still - a).max() <= 1  # nothing of the way: a variation


def test_interpolations_begin_and_end_where_they_should(pipe):
    picture = pipe.variations(draw(sample(np.arange(1)), 64)[0])[0]
    frames = pixels(pipe.interpolate("a red circle", picture, frames=3, seed=2))
    start, end = pipe.embed(["a red circle", picture], seed=2)
    assert np.allclose(pipe.clip.embed_images(np.asarray(picture)[None])[0].numpy(), end, atol=1e-5)
    wanted = pixels(pipe.draw_embeddings([start, slerp(start, end, 0.5), end], seed=2))
    assert all(np.abs(x - y).max() <= 1 for x, y in zip(frames, wanted, strict=True))


def test_slerp_by_hand():
    a, b = np.array([1.0, 0, 0]), np.array([0, 1.0, 0])
    assert slerp(a, b, 1 / 3) == pytest.approx([math.cos(math.pi / 6), math.sin(math.pi / 6), 0], abs=1e-6)
    assert slerp(a, b, 0) == pytest.approx([1, 0, 0]) and slerp(a, b, 1) == pytest.approx([0, 1, 0], abs=1e-6)
    assert slerp(2 * a, 4 * b, 0.5) == pytest.approx(3 * np.array([1, 1, 0]) / math.sqrt(2), abs=1e-6)
    assert slerp(a, a, 0.3) == pytest.approx([1, 0, 0])
    assert np.isfinite(slerp(a, -a, 0.5)).all()


def test_the_prior_can_be_replaced(pipe):
    """The decoder then gets the text's embedding, or none; pictures of a variation keep theirs."""
    request = PictureRequest(prompt="a red circle", seed=1)
    found = {on: next(through(pipe.conditioned(on).stages, [request])) for on in ("prior", "text", "caption")}
    assert np.array_equal(found["text"]["image_embedding"], found["text"]["text_embedding"])
    assert "image_embedding" not in found["caption"]
    pictures = [state["picture"].astype(int) for state in found.values()]
    assert all(np.abs(pictures[i] - pictures[j]).max() > 1 for i, j in ((0, 1), (0, 2), (1, 2)))
    variation = PictureRequest(task="variation", picture=draw(sample(np.arange(1)), 64)[0])
    a, b = (next(through(pipe.conditioned(on).stages, [variation]))["picture"].astype(int) for on in ("prior", "text"))
    assert np.abs(a - b).max() <= 1


def test_an_autoregressive_prior_serves_as_well(folders, tmp_path):
    card = assemble(
        tmp_path / "m",
        clip=folders["clip"],
        prior=folders["ar"],
        decoder=folders["decoder"],
        card=replace(CARD, sizes=()),
    )
    assert card.prior == "autoregressive" and card.sizes == ()
    pipe = load_text_to_image(tmp_path / "m")
    assert pipe(["a red circle"])[0].size == (16, 16) and pipe.size == 16


# ---- folders


def test_parts_of_another_clip_are_refused(folders, tmp_path):
    (tmp_path / "decoder").mkdir()
    fitted = {"mean": torch.zeros(16), "std": torch.ones(16)}
    Decoder.new(DecoderConfig(size=16, widths=(8, 32)), embed=16, text_width=32, **fitted).save(tmp_path / "decoder")
    with pytest.raises(DataError, match="another CLIP"):
        assemble(tmp_path / "m", clip=folders["clip"], prior=folders["prior"], decoder=str(tmp_path / "decoder"))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("part", ["prior", "decoder"])
def test_parts_that_learnt_from_other_embeddings_are_refused(folders, parts, tmp_path, part):
    """Of the same shapes: another CLIP's."""
    other = copy.deepcopy(parts[part])
    with torch.no_grad():
        mean, std = (other.mean, other.std) if part == "decoder" else (other.network.clip_mean, other.network.clip_std)
        mean += 2 * std
    (tmp_path / part).mkdir()
    other.save(tmp_path / part)
    with pytest.raises(DataError, match=f"The {part}.*another CLIP"):
        assemble(
            tmp_path / "m",
            clip=folders["clip"],
            **{key: folders[key] for key in ("prior", "decoder")} | {part: str(tmp_path / part)},
        )


def test_sizes_must_follow_the_decoders(folders, tmp_path):
    with pytest.raises(DataError, match=r"128 pixels.*16"):
        assemble(tmp_path / "m", **{key: folders[key] for key in ("clip", "prior", "decoder", "upsampler")})


def test_a_model_of_another_kind_is_left_alone(folders, tmp_path):
    out = tmp_path / "vae"
    out.mkdir()
    (out / "model.json").write_text('{"kind": "vae"}')
    (out / "model.safetensors").write_bytes(b"learnt for hours")
    (tmp_path / "file").write_text("x")
    for place in (out, tmp_path / "file"):
        with pytest.raises(UsageError, match="something else"):
            assemble(place, clip=folders["clip"], prior=folders["prior"], decoder=folders["decoder"])
    assert (out / "model.safetensors").exists() and (tmp_path / "file").exists()


@pytest.mark.parametrize("guidance", [math.nan, math.inf, -1.0, 1e9])
def test_impossible_guidance_is_refused(pipe, guidance):
    with pytest.raises(UsageError, match="guidance"):
        pipe(["a red circle"], guidance=guidance)


def test_a_judge_is_asked_only_what_it_can_answer(tmp_path):
    from oneira.multimodal.commands import judge

    for wrong, word in (
        ({"prompts": 0}, "prompts"),
        ({"seed": -1}, "seed"),
        ({"out": tmp_path / "a" / "b.json"}, "folder"),
    ):
        with pytest.raises(UsageError, match=word):
            judge(checker="x", **{"model": "builtin", "prompts": 1, "seed": 0, "out": None, "as_json": False} | wrong)


def test_other_folders_are_left_alone(folders, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="something else"):
        assemble(tmp_path, clip=folders["clip"], prior=folders["prior"], decoder=folders["decoder"])
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("damage", ["card", "key", "part"])
def test_a_damaged_model_says_so_in_one_line(folders, tmp_path, damage):
    out = tmp_path / "m"
    assemble(out, clip=folders["clip"], prior=folders["prior"], decoder=folders["decoder"])
    if damage == "card":
        (out / MODEL).write_text("[1]")
    elif damage == "key":
        (out / MODEL).write_text('{"prior_step": 3}')
    else:
        (out / "decoder" / "config.json").unlink()
    with pytest.raises(DataError, match=str(out)) as error:
        load_text_to_image(out)
    assert "\n" not in str(error.value)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match="builtin"):
        load_text_to_image("bultin")
    with pytest.raises(DataError, match=MODEL):
        load_text_to_image(tmp_path)
    with pytest.raises(ConfigError, match="sizes"):
        ModelCard(sizes=(128, 200))


# ---- scores


def test_wilson_by_hand():
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4)
    assert wilson(0, 20) == pytest.approx([0, 0.1611], abs=1e-4)
    assert wilson(20, 20) == pytest.approx([0.8389, 1], abs=1e-4)


def test_scores_count_what_the_judge_reads(pipe, tmp_path):
    torch.manual_seed(0)
    checker = Checker(CheckerConfig(width=8, blocks=1)).eval()
    seen = []
    scores = score_pictures(
        pipe, checker, prompts=3, conditions=("prior", "caption"), progress=lambda *p: seen.append(p)
    )
    assert seen == [(k + 1, 12) for k in range(12)]
    assert scores.keys() == {"one object", "two objects", "conditions"}
    for kind in ("one object", "two objects"):
        assert scores[kind].keys() == {"prior", "caption", "true picture"}
        for found in scores[kind].values():
            assert found["everything"]["right"] <= min(value["right"] for value in found.values())
            assert all(value["of"] == 3 for value in found.values())
    json.dumps(scores)


@pytest.mark.parametrize("shift", [0, 1])
def test_a_pipeline_that_draws_the_scenes_is_right_and_one_that_mixes_them_up_is_not(shift):
    """The judge reads the truth off the bytes of a picture."""
    from types import SimpleNamespace

    from oneira.multimodal.scenes import UNSEEN, Reading, true_reading
    from oneira.multimodal.scoring import KINDS
    from oneira.multimodal.stages import Plan

    scenes = [sample(np.arange(40) + UNSEEN, split) for split in KINDS.values()]
    drawn = [draw(some, 16) for some in scenes]
    truths = {}
    for some, pictures in zip(scenes, drawn, strict=True):
        truth = vars(true_reading(some))
        truths |= {picture.tobytes(): {key: truth[key][k] for key in truth} for k, picture in enumerate(pictures)}
    kinds = iter(drawn)  # score_pictures takes one kind after the other

    class Draws:
        def __init__(self):
            self.pictures = next(kinds)

        def plan(self, request, state):
            return Plan(done=True, found={"picture": self.pictures[(request.seed - 7 + shift) % 40]})

    def read(pictures):
        rows = [truths[picture.tobytes()] for picture in pictures]
        return Reading(**{key: np.stack([row[key] for row in rows]) for key in rows[0]})

    pipe = SimpleNamespace(name="true", size=16, card=CARD, clip=SimpleNamespace(mean=torch.zeros(1)))
    pipe.conditioned = lambda on: SimpleNamespace(stages=[Draws()])
    scores = score_pictures(pipe, SimpleNamespace(read=read), prompts=40, seed=7, conditions=("prior",), rows=7)
    for kind in KINDS:
        assert all(value["share"] == 1 for value in scores[kind]["true picture"].values())
        assert all(
            value["share"] == 1 if shift == 0 else value["share"] < 0.2 for value in scores[kind]["prior"].values()
        )


def test_what_users_should_know_is_said_when_a_model_is_loaded(model, tmp_path, capsys):
    load_text_to_image(model)
    assert capsys.readouterr().err == ""
    shutil.copytree(model, tmp_path / "m")
    card = json.loads((tmp_path / "m" / MODEL).read_text()) | {"note": "It knows no shapes yet."}
    (tmp_path / "m" / MODEL).write_text(json.dumps(card))
    load_text_to_image(tmp_path / "m")
    assert capsys.readouterr().err == "oneira: note: It knows no shapes yet.\n"


# ---- commands


def oneira(*arguments):
    command = [sys.executable, "-m", "oneira.platform.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def test_generate_writes_what_python_draws(pipe, model, tmp_path):
    from PIL import Image

    out = tmp_path / "x.png"
    done = oneira("generate", "a red circle", "--model", model, "--seed", 3, "--n", 2, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["files"] == [str(tmp_path / "x-1.png"), str(tmp_path / "x-2.png")] and said["seeds"] == [3, 4]
    for place, picture in zip(said["files"], pixels(pipe(["a red circle"] * 2, seed=3)), strict=True):
        with Image.open(place) as written:
            assert np.abs(np.asarray(written).astype(int) - picture).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--n", "0"], "pictures"), (["--n", "1000000000"], "pictures"), (["--out", "x.txt"], ".png"),
        (["--out", "/nowhere/at/all/x.png"], "folder"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_before_anything_is_loaded(arguments, word, tmp_path):
    from oneira.multimodal.commands import generate

    values = {"prompt": "a", "out": tmp_path / "x.png", "model": "builtin", "n": 1}
    key, value = arguments[0].removeprefix("--"), arguments[1]
    values[key] = tmp_path / value if key == "out" else int(value)
    with pytest.raises(UsageError, match=word):
        generate(**values)
