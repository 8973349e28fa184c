"""Models by name: taken in, listed, described, given away, drawn with; and fetched from a hub on this machine's loopback."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from oneira.multimodal import load_text_to_image
from oneira.multimodal.commands import register
from oneira.platform import cli

from . import foreign

UNREAD = ["unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    folder = foreign.stable_diffusion(tmp_path_factory.mktemp("public") / "stable")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04would run code")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.with_name("diffusion_pytorch_model.fp16.safetensors").write_bytes(weights.read_bytes())
    return folder


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "app", typer.Typer())
    register(cli.app)


def said(capsys, *arguments, code=0):
    capsys.readouterr()
    assert cli.run_command(["models", *arguments, "--json"]) == code
    out, err = capsys.readouterr()
    return json.loads(out) if code == 0 else err.strip().split("\n")[-1]


def test_a_model_is_taken_in_and_its_name_is_enough(tmp_path, capsys):
    whole = foreign.stable_diffusion(tmp_path / "whole")
    taken = said(capsys, "import", str(whole), "--name", "mine")
    assert taken["kind"] == "StableDiffusionPipeline" and taken["left_out"] == []
    built, row = said(capsys, "list")["models"]
    assert (built["name"], built["source"]) == ("builtin", "builtin")
    assert (row["name"], row["source"], row["kind"]) == ("mine", "models", "StableDiffusionPipeline")
    by_name, by_path = (load_text_to_image(name)(["a red star"], seed=1, steps=2)[0] for name in ("mine", whole))
    assert np.array_equal(np.asarray(by_name), np.asarray(by_path))
    assert load_text_to_image("mine").name == "mine"


def test_its_parts_are_counted_without_loading_them(capsys):
    from diffusers import UNet2DConditionModel

    whole = foreign.stable_diffusion(Path("whole"))
    shown = said(capsys, "show", str(whole))
    unet = UNet2DConditionModel.from_pretrained(whole / "unet")
    by_name = {part["name"]: part for part in shown["parts"]}
    assert set(by_name) == {"text_encoder", "unet", "vae"}
    assert by_name["unet"]["parameters"] == sum(p.numel() for p in unet.parameters()) and by_name["unet"][
        "precision"
    ] == ["F32"]
    assert shown["card"]["_class_name"] == "StableDiffusionPipeline"


def test_what_could_run_code_stays_outside(stable, capsys):
    assert said(capsys, "import", str(stable))["left_out"] == UNREAD
    assert not list(Path("models").rglob("*.bin")) and (Path("models/stable/unet/config.json")).is_file()
    assert said(capsys, "show", str(stable))["leftovers"] == UNREAD


def test_a_clip_goes_out_in_its_own_format_and_comes_back(tiny_clip, capsys):
    import open_clip

    said(capsys, "import", str(tiny_clip), "--name", "seer")
    said(capsys, "export", "seer", "out")
    assert {path.name for path in Path("out").iterdir()} == {path.name for path in tiny_clip.iterdir()}
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{Path('out').absolute()}")
    from oneira.multimodal.embedding import load_clip

    ours, theirs = load_clip("seer").network.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(theirs[key], value) for key, value in ours.items())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["show", "absent"], 2, "no model 'absent'"),
        (["show", "."], 3, "is no model"),
        (["import", "whole", "--name", "../up"], 2, "no name of a model"),
        (["import", "whole", "--name", "taken"], 2, "already"),
        (["export", "taken", "whole"], 2, "is there already"),
        (["show", "damaged"], 3, "no safetensors file"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, code, words, tiny_clip):
    from oneira.platform.store import copy

    for name in ("whole", "models/taken", "damaged"):
        copy(tiny_clip, Path(name))
    next(Path("damaged").glob("*.safetensors")).write_bytes(b"\xff" * 100)
    line = said(capsys, *arguments, code=code)
    assert line.startswith("oneira: ") and words in line
    assert {path.name for path in Path("models").iterdir()} == {"taken"}


# ---- the hub


@pytest.fixture
def hub(stable, monkeypatch, tmp_path):
    """A hub with one model, OWNER/NAME "them/stable", on the loopback. Yields the paths that were asked for."""
    files = {str(path.relative_to(stable)): path.read_bytes() for path in stable.rglob("*") if path.is_file()}
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            asked.append(self.path)
            name = self.path.partition(f"/them/stable/resolve/{COMMIT}/")[2]
            if self.path.startswith(f"/api/models/them/stable/tree/{COMMIT}"):
                rows = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files]
                content, tag = json.dumps(rows).encode(), "x"
            elif self.path.startswith("/api/models/them/stable"):
                listing = {"id": "them/stable", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                content, tag = json.dumps(listing).encode(), "x"
            elif name in files:
                content, tag = files[name], hashlib.sha256(files[name]).hexdigest()
            else:
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            for key, value in {
                "Content-Length": str(len(content)),
                "ETag": f'"{tag}"',
                "X-Repo-Commit": COMMIT,
            }.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_name_of_the_hub_is_fetched_without_what_could_run(hub, stable, capsys):
    pipe = load_text_to_image("them/stable")
    assert pipe.name == "stable" and pipe(["a red star"], seed=0, steps=1)[0].size == (16, 16)
    assert any(path.endswith("unet/config.json") for path in hub)
    assert not [path for path in hub if path.endswith((".bin", ".fp16.safetensors"))]
    assert said(capsys, "import", "them/stable")["name"] == "stable"
    assert (Path("models") / "stable" / "model_index.json").is_file() and not list(Path("models").rglob("*.bin"))


def test_a_hub_that_is_not_there_or_has_no_such_model(hub, capsys):
    assert "cannot be fetched" in said(capsys, "show", "them/other", code=3)
