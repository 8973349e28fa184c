"""Holes that others had, one test each: Oneira has none of them. docs/SECURITY.md lists the holes and where they were.

Holes of the HTTP interface are tried on the app itself, over a stage that does nothing; those of files on real files.
"""

from __future__ import annotations

import ast
import asyncio
import json
import secrets
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from oneira.platform.errors import DataError, OneiraError, UsageError

TOP = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("platform", "generative", "agents", "multimodal", "cluster")
    for path in (TOP / folder).rglob("*.py")
]
GENERATE, EDIT, VARY, BLEND = (
    f"/v1/images/{name}" for name in ("generations", "edits", "variations", "interpolations")
)


class Stage:
    """Counts what it is asked to do, and draws a black picture."""

    def __init__(self, name):
        self.name, self.planned = name, 0

    def plan(self, request, state):
        from oneira.multimodal.stages import Plan

        self.planned += 1
        found = {"text_embedding": np.zeros(4, np.float32), "text_mask": np.ones(1, bool)}
        return Plan(done=True, found={**found, "picture": np.zeros((64, 64, 3), np.uint8)})

    def step(self, plans):
        raise AssertionError("every plan was done at once")


class Site:
    """The app over one such stage."""

    def __init__(self, key=None):
        import httpx2

        from oneira.cluster.serving.engine import Engine
        from oneira.cluster.serving.service import Service
        from oneira.cluster.serving.web import make_app

        self.loop, self.stage = asyncio.new_event_loop(), Stage("text")

        async def begin():
            self.engine = Engine({"m": [self.stage]}, threads=1)
            self.service = Service(self.engine, {"m": ["text"]})
            await self.service.begin()
            transport = httpx2.ASGITransport(make_app(self.service, key), raise_app_exceptions=False)
            self.client = httpx2.AsyncClient(transport=transport, base_url="http://localhost:8000")

        self.loop.run_until_complete(begin())

    def ask(self, method, path, **options):
        return self.loop.run_until_complete(self.client.request(method, path, **options))

    def close(self):
        self.loop.run_until_complete(self.engine.close())
        self.loop.close()


@pytest.fixture(scope="module")
def site():
    pytest.importorskip("ray")
    made = Site()
    yield made
    made.close()


# ---- the HTTP interface


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/../../../../etc/passwd", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/v1/images/files/..%2f..%2fetc%2fpasswd", "/v1/images/files/%2fetc%2fpasswd", "/v1/models/file%3A%2F%2F%2Fetc%2Fpasswd",
    ],
)  # fmt: skip
def test_a_name_in_an_address_is_no_path(site, path):
    answer = site.ask("GET", path)
    assert answer.status_code == 404 and b"root:" not in answer.content


@pytest.mark.parametrize("model", ["../../etc", "/etc/passwd", "https://example.org/model", "m\x00", "m" * 10_000])
def test_a_model_in_a_request_is_one_of_those_served(site, model):
    assert site.ask("POST", GENERATE, json={"prompt": "a", "model": model}).status_code in (400, 404)


@pytest.mark.parametrize(
    "path, document",
    [
        (GENERATE, {"prompt": "a", "n": 10**9}), (GENERATE, {"prompt": "a", "n": 10**400}), (GENERATE, {"prompt": "a", "n": 1e308}),
        (GENERATE, {"prompt": "a", "steps": 10**9}), (GENERATE, {"prompt": "a", "size": "99999999x99999999"}),
        (GENERATE, {"prompt": "a", "partial_images": 10**6, "stream": True}), (GENERATE, {"prompt": "a " * 200_000}),
        (BLEND, {"from": "a", "to": "b", "frames": 10**9}), ("/v1/embeddings", {"model": "m", "input": ["a"] * 100_000}),
        ("/v1/embeddings", {"model": "m", "input": "a", "dimensions": 10**12}),
    ],
)  # fmt: skip
def test_a_huge_number_is_refused_before_anything_is_made(site, path, document):
    planned = site.stage.planned
    assert site.ask("POST", path, json=document).status_code in (400, 413)
    assert site.stage.planned == planned


def png(side, *chunks):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes((3 * side + 1) * side) if side < 100 else b""))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunk(*c) for c in chunks) + body + chunk(b"IEND", b"")
    )


BOMBS = {
    "pixels": png(60_000),
    "text": png(32, (b"zTXt", b"k\0\0" + zlib.compress(bytes(200 << 20)))),
    "profile": png(32, (b"iCCP", b"k\0\0" + zlib.compress(bytes(200 << 20)))),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_picture_that_swells_is_refused_or_costs_nothing(site, kind):
    import tracemalloc

    tracemalloc.start()
    answer = site.ask("POST", VARY, files={"image": ("a.png", BOMBS[kind])})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert answer.status_code in (200, 400) and peak < 100 << 20


def test_our_own_limit_of_pixels_is_below_pillows(site):
    answer = site.ask("POST", VARY, files={"image": ("a.png", png(5000))})
    assert answer.status_code == 400 and "5000x5000" in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "PDF"])
def test_only_three_formats_of_pictures_are_read(site, kind):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, kind)
    answer = site.ask("POST", VARY, files={"image": ("a.png", file.getvalue())})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "image"


def test_no_address_is_fetched_for_a_client(site):
    """An address is a prompt like any other text, or is refused where a file must be."""
    fields = {"prompt": "a", "image": "http://169.254.169.254/latest/meta-data"}
    assert site.ask("POST", EDIT, data=fields, files={"mask": ("m.png", png(32))}).status_code == 400
    for url in ("data:text/html;base64,PGI+", "data:image/svg+xml;base64,PHN2Zy8+"):
        assert site.ask("POST", BLEND, json={"from": url, "to": "b"}).status_code == 400


def test_pictures_that_go_out_tell_nothing_of_those_that_came_in():
    import io

    from PIL import Image

    from oneira.cluster.serving.pictures import read_picture, write_picture

    exif = Image.Exif()
    exif[0x8825] = {1: "N"}  # where it was taken
    exif[0x010E] = "secret"
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "jpeg", exif=exif)
    for kind in ("png", "jpeg", "webp"):
        written = write_picture(read_picture(file.getvalue(), 64)[0], kind)
        again = Image.open(io.BytesIO(written))
        assert b"secret" not in written and not again.getexif() and "exif" not in again.info


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1:8000", ""])
def test_a_name_that_was_bound_anew_to_this_machine_is_refused(site, host):
    """DNS rebinding: the page's own name leads to 127.0.0.1, and the browser sends that name as Host."""
    for method, path in (("GET", "/v1/models"), ("POST", GENERATE), ("GET", "/metrics")):
        assert site.ask(method, path, headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "[::1]:8000", "127.0.0.1"])
def test_loopback_names_are_answered(site, host):
    assert site.ask("GET", "/v1/models", headers={"Host": host}).status_code == 200
    assert site.ask("GET", "/v1/models", headers={"Host": host, "Origin": f"http://{host}"}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000"])
def test_a_page_of_another_site_cannot_post_a_form(site, origin):
    planned = site.stage.planned
    answer = site.ask("POST", VARY, files={"image": ("a.png", png(32))}, headers={"Origin": origin})
    assert answer.status_code == 403 and site.stage.planned == planned


def test_the_key_is_compared_in_constant_time(monkeypatch):
    pytest.importorskip("ray")
    compared, real = [], secrets.compare_digest

    def compare(a, b):
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(secrets, "compare_digest", compare)
    site = Site(key="right")
    try:
        for given, status in (("Bearer right", 200), ("Bearer righ", 401), ("Bearer ä", 401), ("right", 401)):
            headers = {"Authorization": given.encode("latin-1")}
            assert site.ask("GET", "/v1/models", headers=headers).status_code == status
    finally:
        site.close()
    assert len(compared) == 4 and all(b == b"right" for _, b in compared)


def test_what_strangers_ask_for_does_not_grow_the_metrics(site):
    site.ask("GET", "/nothing")
    before = len(site.ask("GET", "/metrics").content.splitlines())
    for i in range(200):
        site.ask("GET", f"/nothing/{i}")
        site.ask("GET", f"/v1/models/none-{i}")
        site.ask("GET", f"/v1/images/files/none-{i}.png")
    after = len(site.ask("GET", "/metrics").content.splitlines())
    assert after - before < 60


def test_the_shelf_of_pictures_is_bounded():
    from oneira.cluster.serving.pictures import Shelf

    shelf = Shelf(most=1000)
    names = [shelf.put(bytes(100), "png") for _ in range(1000)]
    assert sum(shelf.get(name) is not None for name in names) <= 10


# ---- files that others wrote

# What a pickle that runs a command looks like: it would make the file "struck" where it is loaded.
PICKLE = b"cposix\nsystem\n(S'touch struck'\ntR."


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "struck").exists()


def realnvp_card(**changes):
    from oneira.generative.realnvp import RealNVP
    from oneira.generative.spaces import Space
    from oneira.platform.config import to_dict

    space = Space(kind="points", shape=(2,))
    return {"kind": "realnvp", "config": to_dict(RealNVP.Config()), "space": to_dict(space)} | changes


@pytest.mark.parametrize(
    "weights", [PICKLE, b"PK\x03\x04" + PICKLE, b"\xff" * 8 + PICKLE, struct.pack("<Q", 2**62) + b"{}", b""]
)
def test_pickled_weights_are_never_unpickled(here, weights):
    from oneira.generative.models import load_model
    from oneira.multimodal.networks import load_network

    (here / "model.json").write_text(json.dumps(realnvp_card()))
    for name in ("model.safetensors", "model.pt", "pytorch_model.bin", "diffusion_pytorch_model.safetensors"):
        (here / name).write_bytes(weights)
    with pytest.raises(DataError):
        load_model(here)
    small = {"block_out_channels": [8], "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 8}
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    (here / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **small, **blocks}))
    with pytest.raises(DataError):
        load_network(here, "UNet2DModel")


@pytest.mark.parametrize(
    "card",
    [
        {"kind": "os:system"}, {"kind": "../../evil"}, {"kind": ["realnvp"]}, {"kind": None}, {"config": {"__class__": "os"}},
        {"config": {"__reduce__": ["os.system", "touch struck"]}}, {"config": 7}, {"config": None}, {"space": {"kind": "points"}},
    ],
)  # fmt: skip
def test_a_model_card_names_no_code(here, card):
    from oneira.generative.models import load_model

    (here / "model.json").write_text(json.dumps(realnvp_card(**card)))
    with pytest.raises(OneiraError):
        load_model(here)


@pytest.mark.parametrize("text", ["[" * 100_000, "null", "[]", '{"kind": "realnvp"}', "\x00", "{" * 5])
def test_a_model_card_may_be_anything(here, text):
    from oneira.generative.models import load_model

    (here / "model.json").write_text(text)
    with pytest.raises(DataError):
        load_model(here)


@pytest.mark.parametrize("name", ["os.system", "subprocess:Popen", "../evil.Evil", ["evil", "Evil"], None])
def test_a_folder_of_diffusers_names_no_class_of_its_own(here, name):
    """model_index.json and config.json name classes, and diffusers' own loader imports what they name."""
    from oneira.multimodal.networks import load_network
    from oneira.multimodal.text_to_image import load_text_to_image

    (here / "evil.py").write_text("open('struck', 'w')")
    (here / "model_index.json").write_text(json.dumps({"_class_name": name, "unet": ["evil", "Evil"]}))
    (here / "config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(DataError):
        load_network(here, "UNet2DModel")
    with pytest.raises(DataError):
        load_text_to_image(here)


@pytest.mark.parametrize(
    "part", [{"hf_model_name": "evil/model"}, {"timm_model_name": "evil", "timm_model_pretrained": True}]
)
def test_a_folder_of_open_clip_fetches_nothing(here, part):
    from oneira.multimodal.clip import Clip

    card = {"model_cfg": {"embed_dim": 8, "vision_cfg": {"layers": 1, **part}, "text_cfg": {"context_length": 8}}}
    (here / "open_clip_config.json").write_text(json.dumps(card))
    with pytest.raises(DataError, match="from elsewhere"):
        Clip.load(here)


@pytest.mark.parametrize(
    "text",
    [
        'preset = "os:system"', 'preset = "../../evil"', 'preset = "realnvp-moons"\nseed = "!!python/object/apply:os.system [touch struck]"',
        'preset = "realnvp-moons"\n["__class__"]\nx = 1', "!!python/object/apply:os.system ['touch struck']", "preset = 1",
    ],
)  # fmt: skip
def test_a_settings_file_makes_no_objects(here, text):
    from oneira.platform.config import read_toml

    (here / "mine.toml").write_text(text)
    with pytest.raises(UsageError):
        read_toml(here / "mine.toml")


def test_a_run_that_was_tampered_with_is_refused(here):
    from oneira.platform.runs import Run

    for document in (
        {"preset": "os:system", "smoke": False, "config": {}},
        {"preset": "../x", "smoke": 0, "config": {}},
        [],
        3,
    ):
        (here / "config.json").write_text(json.dumps(document))
        with pytest.raises(OneiraError):
            Run.open(here)


@pytest.mark.parametrize("name", ["../run", "/etc/passwd", "a/../../b", "..", "a\x00b"])
def test_a_checkpoint_s_name_leads_nowhere(tmp_path, name):
    from oneira.platform.checkpoints import Checkpoints

    with pytest.raises(UsageError):
        Checkpoints(tmp_path / "checkpoints").save(name, {}, {})
    assert not list(tmp_path.iterdir())


def test_arrays_of_objects_are_refused(here):
    from oneira.generative.datasets import DataConfig, array

    head = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    (here / "rows.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + PICKLE)
    with pytest.raises(DataError):
        array(DataConfig(name="array", path=str(here / "rows.npy")))


def imported(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def test_one_file_reads_parquet():
    """Metadata may name extension types, which ray.data and pyarrow before 14.0.1 unpickle when a file is opened."""
    banned = ("pyarrow", "pandas", "ray.data", "polars", "datasets")
    for path in SOURCES:
        if path.parts[-2:] == ("generative", "hub.py"):
            continue
        assert not [name for name in imported(path) if any(f"{name}.".startswith(f"{b}.") for b in banned)], path


def test_a_parquet_file_that_names_code_runs_none(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    from oneira.generative.datasets import DataConfig
    from oneira.generative.hub import hub

    trap = tmp_path / "trap"
    call = f"cos\nmkdir\n(S'{trap}'\ntR.".encode()  # what unpickling it would do: os.mkdir(trap)
    named = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": call}
    field = pa.field("text", pa.string(), metadata=named)
    pq.write_table(
        pa.table({"text": ["one two", "two three"] * 20}, schema=pa.schema([field])), tmp_path / "train.parquet"
    )
    try:
        hub(DataConfig(name="hub", path=str(tmp_path)))
    except DataError:
        pass  # a type that is not known may be refused
    assert not trap.exists()
    trap.mkdir()
    with pytest.raises(FileExistsError):
        _unpickled(call)  # the trap is one: whoever unpickles it runs it


def _unpickled(data):
    from pickle import loads

    return loads(data)


def test_every_cache_has_a_bound():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            words = ast.unparse(node) if isinstance(node, (ast.Call, ast.Attribute, ast.Name)) else ""
            assert words not in ("functools.cache", "cache") or "import cache" not in path.read_text(), path
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("lru_cache", "functools.lru_cache"):
                bound = [keyword.value for keyword in node.keywords if keyword.arg == "maxsize"] or node.args
                assert bound and isinstance(bound[0], ast.Constant) and bound[0].value, f"{path}:{node.lineno}"
