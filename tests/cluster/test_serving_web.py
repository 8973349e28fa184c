"""The HTTP interface over a real engine, without Ray: OpenAI's shapes, wrong requests, a full line, the key."""

import asyncio
import base64
import hashlib
import http.server
import io
import json
import re
import struct
import threading
import time
import zlib

import httpx2
import numpy as np
import pytest
from PIL import Image

from oneira.cluster.deploy.dashboard import dashboard
from oneira.cluster.scheduling.client import Busy
from oneira.cluster.scheduling.scheduler import Scheduler
from oneira.cluster.serving import engine as engine_module
from oneira.cluster.serving import running
from oneira.cluster.serving.application import must_live
from oneira.cluster.serving.engine import Engine
from oneira.cluster.serving.line import Line
from oneira.cluster.serving.models import load_models
from oneira.cluster.serving.pacing import Pace
from oneira.cluster.serving.pictures import Shelf
from oneira.cluster.serving.service import Service
from oneira.cluster.serving.watching import metrics_of
from oneira.platform.errors import ClusterError, Interrupted, UsageError

GENERATE, EDIT, VARY = "/v1/images/generations", "/v1/images/edits", "/v1/images/variations"
BLEND, EMBED = "/v1/images/interpolations", "/v1/embeddings"


class Site:
    """The app with a client that calls it directly, in one event loop."""

    def __init__(self, loader, name="tiny", key=None, seen=None, **line):
        """seen: the scheduler's report, None where it is silent."""
        from oneira.cluster.serving.web import make_app

        async def watch():
            return seen

        self.loop = asyncio.new_event_loop()
        models = load_models([name], loader)
        [(name, self.stages)] = models.items()

        async def begin():
            self.engine = Engine(models, threads=1)
            self.service = Service(self.engine, {name: [stage.name for stage in self.stages]}, Line(**line))
            self.app = make_app(self.service, key, watch)
            await self.service.begin()

        self.loop.run_until_complete(begin())
        transport = httpx2.ASGITransport(self.app)  # which raises what the app does not answer
        self.client = httpx2.AsyncClient(transport=transport, base_url="http://localhost")

    def ask(self, method, path, **options):
        return self.loop.run_until_complete(self.client.request(method, path, **options))

    def post(self, path, **options):
        return self.ask("POST", path, **options)

    def close(self):
        self.loop.run_until_complete(self.engine.close())
        self.loop.close()


@pytest.fixture(scope="module")
def site(tiny):
    made = Site(tiny)
    yield made
    made.close()


def png(side=32, alpha=None, **options):
    array = np.random.default_rng(0).integers(0, 256, (side, side, 3 if alpha is None else 4), np.uint8)
    if alpha is not None:
        array[..., 3] = alpha
    file = io.BytesIO()
    Image.fromarray(array).save(file, options.pop("kind", "png"), **options)
    return file.getvalue()


def bomb(side=50_000):
    """A small PNG whose header promises a picture of 50,000 pixels a side."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")
    )


def picture(entry):
    return np.array(Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))))


def test_pictures_follow_seed_size_and_number(site):
    asked = {"prompt": "a red circle", "seed": 5, "n": 2, "steps": 2}
    first, again = (site.post(GENERATE, json=asked).json()["data"] for _ in range(2))
    assert [entry["b64_json"] for entry in first] == [entry["b64_json"] for entry in again]
    other = site.post(GENERATE, json=asked | {"seed": 6, "n": 1}).json()["data"]
    assert np.array_equal(picture(other[0]), picture(first[1])) and not np.array_equal(
        picture(first[0]), picture(first[1])
    )
    assert picture(first[0]).shape == (128, 128, 3)
    small = site.post(GENERATE, json=asked | {"size": "64x64", "output_format": "webp"}).json()
    assert picture(small["data"][0]).shape == (64, 64, 3) and small["output_format"] == "webp"


def test_an_address_gives_the_picture(site):
    answer = site.post(GENERATE, json={"prompt": "a", "response_format": "url", "output_format": "jpeg"}).json()
    got = site.ask("GET", answer["data"][0]["url"])
    assert got.headers["content-type"] == "image/jpeg" and Image.open(io.BytesIO(got.content)).size == (128, 128)


def test_an_address_dies_after_its_time_and_the_oldest_makes_room():
    shelf = Shelf(seconds=0.0)
    assert shelf.get(shelf.put(b"x", "png")) is None
    shelf = Shelf(most=3)
    old, new = shelf.put(b"ab", "png"), shelf.put(b"cd", "png")
    assert shelf.get(old) is None and shelf.get(new) == (b"cd", "png")


def test_an_edit_changes_only_what_is_transparent(site):
    alpha = np.full((128, 128), 255, np.uint8)
    alpha[:64] = 0
    original = png(128)
    files = {"image": ("a.png", original), "mask": ("m.png", png(128, alpha=alpha))}
    answer = site.post(EDIT, data={"prompt": "a blue square", "seed": "1"}, files=files).json()
    before, after = np.array(Image.open(io.BytesIO(original))), picture(answer["data"][0])
    assert np.array_equal(before[64:], after[64:]) and not np.array_equal(before[:64], after[:64])


def test_a_variation_needs_no_prompt_and_follows_the_picture(site):
    data = {"seed": "3", "n": "2"}
    one = site.post(VARY, data=data, files={"image": ("a.png", png(64))}).json()["data"]
    two = site.post(VARY, data=data, files={"image": ("a.jpg", png(96, kind="jpeg"))}).json()["data"]
    assert len(one) == 2 and one[0] != two[0]


def test_embeddings_as_numbers_and_as_base64_agree(site):
    asked = {"model": "tiny", "input": ["a red circle", "two blue squares"]}
    numbers = site.post(EMBED, json=asked).json()
    coded = site.post(EMBED, json=asked | {"encoding_format": "base64"}).json()
    for one, two in zip(numbers["data"], coded["data"], strict=True):
        assert np.frombuffer(base64.b64decode(two["embedding"]), "<f4").tolist() == pytest.approx(one["embedding"])
    assert numbers["usage"]["prompt_tokens"] == len("a red circle") + len("two blue squares")
    many = site.post(EMBED, json={"model": "tiny", "input": [f"text {i}" for i in range(100)]}).json()
    assert [entry["index"] for entry in many["data"]] == list(range(100))


def test_interpolation_begins_and_ends_where_asked(site):
    picture_url = "data:image/png;base64," + base64.b64encode(png(64)).decode()
    asked = {"from": "a red circle", "to": picture_url, "frames": 4, "seed": 2}
    frames = site.post(BLEND, json=asked).json()["data"]
    start = site.post(GENERATE, json={"prompt": "a red circle", "seed": 2}).json()["data"][0]
    assert len(frames) == 4
    assert np.abs(picture(frames[0]).astype(int) - picture(start)).max() <= 1
    assert len({frame["b64_json"] for frame in frames}) == 4


def events(text):
    lines = [part.split("\n") for part in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in lines]


def test_a_stream_gives_the_decoders_picture_then_the_whole(site):
    answer = site.post(GENERATE, json={"prompt": "a", "stream": True, "partial_images": 2, "seed": 9})
    partial, whole = events(answer.text)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert partial[0] == "image_generation.partial_image" == partial[1]["type"] and picture(partial[1]).shape[0] == 64
    assert whole[0] == "image_generation.completed" and whole[1]["usage"]["input_tokens"] == 1
    plain = site.post(GENERATE, json={"prompt": "a", "seed": 9}).json()["data"][0]
    assert np.array_equal(picture(plain), picture(whole[1]))
    [only] = events(site.post(GENERATE, json={"prompt": "a", "stream": True}).text)
    assert only[0] == "image_generation.completed"


def test_metrics_health_models_and_the_document(site):
    site.post(GENERATE, json={"prompt": "a"})
    text = site.ask("GET", "/metrics").text
    for name in (
        "oneira_requests_total",
        "oneira_request_seconds_bucket",
        "oneira_queue 0.0",
        "oneira_batch_rows_bucket",
    ):
        assert name in text
    assert 'oneira_steps_total{model="tiny",stage="decoder"}' in text
    assert site.ask("GET", "/healthz").json() == {"status": "ready"}
    assert [model["id"] for model in site.ask("GET", "/v1/models").json()["data"]] == ["tiny"]
    assert site.ask("GET", "/v1/models/tiny").json()["object"] == "model"
    paths = site.ask("GET", "/openapi.json").json()["paths"]
    assert "prompt" in paths[GENERATE]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]


def scheduler_report():
    """Of a device with one lease that runs, one that is paused, one that waits, a model, and one that was sent away."""
    now = [0.0]
    scheduler = Scheduler(lambda: now[0])
    scheduler.add_device("node/cpu", memory=1000, slots=2)
    scheduler.add_model("old", 500)
    scheduler.add_model("new", 600)
    scheduler.release(scheduler.ask("server", "interactive", model="old"))
    train = scheduler.ask("run", "train", slots=2, bytes=100)
    now[0] = 10.0
    scheduler.ask("server", "interactive", slots=2, model="new", bytes=50)
    scheduler.pause(train)
    scheduler.moved("old", "node/cpu")
    scheduler.ask("dream", "dream")
    return scheduler.report()


def test_the_scheduler_is_shown_as_rows_as_json_and_as_a_page(tiny):
    site = Site(tiny, seen=scheduler_report())
    try:
        rows = site.ask("GET", "/metrics").text.splitlines()
        for row in (
            'oneira_device_memory_bytes{device="node/cpu"} 1000.0',
            'oneira_device_resident_bytes{device="node/cpu"} 600.0',
            'oneira_device_working_bytes{device="node/cpu"} 150.0',
            'oneira_device_slots_taken{device="node/cpu"} 2.0',
            'oneira_resident_bytes{device="node/cpu",model="new"} 600.0',
            'oneira_leases{device="node/cpu",priority="interactive",state="running"} 1.0',
            'oneira_leases{device="node/cpu",priority="train",state="paused"} 1.0',
            'oneira_leases{device="node/cpu",priority="dream",state="waiting"} 1.0',
            'oneira_lease_wait_seconds_count{priority="interactive"} 2.0',
            "oneira_lease_pauses_total 1.0",
            "oneira_model_evictions_total 1.0",
        ):
            assert row in rows
        assert site.ask("GET", "/v1/devices").json()["counts"]["moves"] == 1
        page = site.ask("GET", "/devices")
        assert page.headers["content-type"].startswith("text/html") and "//" not in page.text.replace("<!--", "")
        for tag, rule in (("script", "script-src"), ("style", "style-src")):
            inside = page.text.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
            digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
            assert f"{rule} 'sha256-{digest}'" in page.headers["content-security-policy"]
    finally:
        site.close()


def test_a_silent_scheduler_stops_no_metrics(site):
    assert site.ask("GET", "/v1/devices").json()["error"]["code"] == "no_scheduler"
    answer = site.ask("GET", "/metrics")
    assert answer.status_code == 200 and "oneira_device" not in answer.text


GOOD = {"prompt": "a red circle"}
WRONG_JSON = [
    (GENERATE, {}, 400, "prompt", "missing"),
    (GENERATE, {"prompt": "  "}, 400, "prompt", "empty"),
    (GENERATE, {"prompt": ""}, 400, "prompt", ""),
    (GENERATE, {"prompt": "a" * 1001}, 400, "prompt", "1000"),
    (GENERATE, {"prompt": "a\x00b"}, 400, "prompt", "U+0000"),
    (GENERATE, {"prompt": 7}, 400, "prompt", "string"),
    (GENERATE, {"prompt": "unknown purple"}, 400, None, "refuses"),
    (GENERATE, GOOD | {"n": 0}, 400, "n", "1"),
    (GENERATE, GOOD | {"n": 10**9}, 400, "n", "10"),
    (GENERATE, GOOD | {"n": "2"}, 400, "n", "integer"),
    (GENERATE, GOOD | {"n": True}, 400, "n", "integer"),
    (GENERATE, GOOD | {"size": "100x100"}, 400, "size", "128x128"),
    (GENERATE, GOOD | {"size": "999999x999999"}, 400, "size", "64x64"),
    (GENERATE, GOOD | {"model": "tinny"}, 404, "model", "Did you mean 'tiny'"),
    (GENERATE, GOOD | {"sede": 1}, 400, "sede", "Did you mean 'seed'"),
    (GENERATE, GOOD | {"seed": -1}, 400, "seed", "0"),
    (GENERATE, GOOD | {"seed": 2**63}, 400, "seed", ""),
    (GENERATE, GOOD | {"steps": 0}, 400, "steps", "1"),
    (GENERATE, GOOD | {"steps": 200}, 400, None, "1 to 100"),
    (GENERATE, GOOD | {"guidance": 1e9}, 400, "guidance", "50"),
    (GENERATE, GOOD | {"response_format": "gif"}, 400, "response_format", "b64_json"),
    (GENERATE, GOOD | {"stream": True, "response_format": "url"}, 400, "stream", "b64_json"),
    (GENERATE, GOOD | {"partial_images": 2}, 400, "partial_images", "stream"),
    (GENERATE, [1, 2], 400, None, "body"),
    (EMBED, {"model": "tiny", "input": []}, 400, "input", ""),
    (EMBED, {"model": "tiny", "input": [1, 2]}, 400, "input", ""),
    (EMBED, {"model": "tiny", "input": "a", "dimensions": 3}, 400, "dimensions", "16"),
    (BLEND, {"from": "a", "to": "data:image/png;base64,AAAA"}, 400, "to", "read"),
    (BLEND, {"from": "a", "to": "data:image/png,AAAA"}, 400, "to", "base64"),
    (BLEND, {"from": "a\x00", "to": "b"}, 400, "from", "U+0000"),
    (BLEND, {"from": "a", "to": "b", "frames": 1}, 400, "frames", "2"),
]  # fmt: skip


@pytest.mark.parametrize("path, document, status, param, word", WRONG_JSON)
def test_wrong_requests_name_what_is_wrong(site, path, document, status, param, word):
    steps = sum(len(stage.batches) for stage in site.stages[1:])
    must_be(site.post(path, json=document), status, param, word)
    assert sum(len(stage.batches) for stage in site.stages[1:]) == steps  # nothing was drawn


def must_be(answer, status, param, word):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == param and word in error["message"]


BODIES = [
    b"",
    b"{",
    b"\xff\xfe",
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "guidance": NaN}',
    b"[" * 100_000,
    b"null",
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_a_body_that_is_no_json(site, body):
    answer = site.post(GENERATE, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


WRONG_FORMS = [
    ({}, {"image": png(32)}, "prompt", "missing"),
    ({"prompt": "a"}, {"mask": png(32, alpha=0)}, "image", "missing"),
    ({"prompt": "a"}, {"image": b"no picture"}, "image", "read"),
    ({"prompt": "a"}, {"image": b""}, "image", "read"),
    ({"prompt": "a"}, {"image": bomb()}, "image", "pixels"),
    ({"prompt": "a"}, {"image": png(32), "mask": bomb()}, "image", "pixels"),
    ({"prompt": "a"}, {"image": png(32)[:200]}, "image", "read"),
    ({"prompt": "a"}, {"image": png(32), "mask": png(16, alpha=0)}, "image", "16x16"),
    ({"prompt": "a"}, {"image": png(32), "mask": png(32)}, "image", "transparent"),
    ({"prompt": "a"}, {"image": png(32, kind="gif"), "mask": png(32, alpha=0)}, "image", "read"),
    ({"prompt": "a", "n": "many"}, {"image": png(32, alpha=0)}, "n", "integer"),
    ({"prompt": "a", "prompts": "b"}, {"image": png(32, alpha=0)}, "prompts", "Did you mean 'prompt'"),
    ({"prompt": "a", "image": "text"}, {"mask": png(32)}, "image", "file"),
    ({"prompt": "a"}, {"image": png(32, alpha=0), "markup": png(32)}, "markup", "file"),
]


@pytest.mark.parametrize("fields, files, param, word", WRONG_FORMS)
def test_wrong_forms_name_what_is_wrong(site, fields, files, param, word):
    must_be(site.post(EDIT, data=fields, files={name: (name, data) for name, data in files.items()}), 400, param, word)


def test_what_is_no_form_has_another_address_or_is_too_large(site):
    assert site.post(EDIT, json=GOOD).status_code == 415
    assert site.post(GENERATE, data=GOOD).status_code == 415
    form = {"content-type": "multipart/form-data; boundary=x"}
    assert site.post(VARY, content=b"--y\r\nnothing", headers=form).status_code == 400
    assert site.post(VARY, content=b"", headers={"content-type": "multipart/form-data"}).status_code == 400
    assert site.post("/v1/images/paintings", json=GOOD).status_code == 404
    assert site.ask("GET", GENERATE).status_code == 405
    assert site.ask("GET", "/v1/models/none").json()["error"]["code"] == "model_not_found"
    assert site.post(GENERATE, json={"prompt": "a" * (1 << 20)}).status_code == 413

    async def parts():
        for _ in range(40):
            yield b" " * (1 << 15)

    assert site.post(GENERATE, content=parts(), headers={"content-type": "application/json"}).status_code == 413


def test_the_key_is_asked_for_everywhere_but_at_the_door(tiny):
    site = Site(tiny, key="secret")
    try:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            answer = site.post(GENERATE, json=GOOD, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert site.ask("GET", "/v1/devices").status_code == 401 and site.ask("GET", "/devices").status_code == 200
        assert site.ask("GET", "/metrics").status_code == 401 and site.ask("GET", "/healthz").status_code == 200
        assert site.post(GENERATE, json=GOOD, headers={"Authorization": "Bearer secret"}).status_code == 200
    finally:
        site.close()


def test_a_full_line_answers_429_and_a_stopped_server_503(tiny):
    site = Site(tiny, "patient", places=1, limit=1)
    try:

        async def ask(count):
            posts = (site.client.post(GENERATE, json={"prompt": "a", "steps": 2}) for _ in range(count))
            return await asyncio.gather(*posts)

        answers = site.loop.run_until_complete(ask(4))
        assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429]
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1 and refused.json()["error"]["code"] == "queue_full"
        line = site.service.line
        line.taken, line.limit = line.places, 0
        for path in (EDIT, VARY):  # before a picture is read, which may be large, or none
            answer = site.post(path, data={"prompt": "a"} if path == EDIT else {}, files={"image": ("a.png", b"none")})
            assert answer.status_code == 429, answer.text
        line.taken, line.limit = 0, 1
        assert site.post(VARY, files={"image": ("a.png", b"none")}).status_code == 400
        site.service.stop()
        for answer in (site.post(GENERATE, json=GOOD), site.ask("GET", "/healthz")):
            assert answer.status_code == 503 and "retry-after" in answer.headers
    finally:
        site.close()


def ends_the_thread(plans):
    raise SystemExit("the thread is told to end")


def breaks_the_device(plans):
    import torch

    raise torch.AcceleratorError("an illegal memory access was encountered")


@pytest.mark.parametrize("step", [ends_the_thread, breaks_the_device])
def test_a_dead_engine_is_told_and_nobody_waits_for_it(tiny, step):
    site = Site(tiny)
    try:
        assert site.ask("GET", "/healthz").status_code == 200
        must_live(site.engine)
        site.stages[2].step = step
        assert site.post(GENERATE, json=GOOD).status_code >= 500
        for answer in (site.ask("GET", "/healthz"), site.post(GENERATE, json=GOOD)):
            assert answer.status_code == 503 and "retry-after" in answer.headers
        with pytest.raises(ClusterError, match=r"dead: (SystemExit|AcceleratorError)"):
            must_live(site.engine)
    finally:
        site.close()


def test_an_engine_whose_step_does_not_end_is_dead(tiny, monkeypatch):
    monkeypatch.setattr(engine_module, "STUCK_SECONDS", 0.2)
    site, end = Site(tiny), threading.Event()
    try:
        site.stages[2].step = lambda plans: end.wait(60)
        with pytest.raises(TimeoutError):
            site.loop.run_until_complete(asyncio.wait_for(site.client.post(GENERATE, json=GOOD), 0.5))
        assert site.ask("GET", "/healthz").status_code == 503 and "not ended" in site.engine.dead
        site.loop.run_until_complete(asyncio.wait_for(site.engine.close(), 5))  # does not wait for it
    finally:
        end.set()
        site.close()


def test_requests_have_ids_in_answers_and_logs(site, monkeypatch, capsys):
    monkeypatch.setenv("ONEIRA_LOG", "json")
    own = site.ask("GET", "/v1/models").headers["x-request-id"]
    site.ask("GET", "/v1/models", headers={"x-request-id": "abc-1"})
    site.ask("GET", "/nothing", headers={"x-request-id": 'forged"\u00e9'.encode("latin-1")})
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["request"] for line in lines[:2]] == [own, "abc-1"] and own != lines[2]["request"]
    assert "forged" not in lines[2]["request"]
    assert [(line["event"], line["route"], line["status"]) for line in lines] == [
        ("request", "/v1/models", 200),
        ("request", "/v1/models", 200),
        ("request", "other", 404),
    ]


def test_a_server_that_stays_ill_is_given_up(monkeypatch):
    """A real one that is well for a while, stumbles once, and then says 503 for ever."""
    answers = iter([200, 503, 200, *[503] * 100_000])

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(next(answers))
            self.end_headers()

        def log_message(self, *_):
            pass

    monkeypatch.setattr(running, "SECONDS_BETWEEN_LOOKS", 0.01)
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ClusterError, match="not been healthy"):
            running.Server(f"http://127.0.0.1:{server.server_port}").watch(seconds=0.3)
        server.shutdown()
    assert next(answers) == 503
    assert not running.is_healthy(f"http://127.0.0.1:{server.server_port}")


def test_the_dashboard_shows_all_that_is_exported_and_nothing_else(site):
    seen = metrics_of(scheduler_report()).decode()
    board = json.loads(dashboard())
    used = {
        name for panel in board["panels"] for at in panel["targets"] for name in re.findall(r"oneira_\w+", at["expr"])
    }
    labels = {
        name
        for panel in board["panels"]
        for at in panel["targets"]
        for found in re.findall(r"by \(([^)]*)\)|\{(\w+)=", at["expr"])
        for name in re.findall(r"\w+", " ".join(found))
    }
    site.post(GENERATE, json=GOOD)
    text = site.ask("GET", "/metrics").text + seen
    exported = {name for name in re.findall(r"^(oneira_\w+?)[{ ]", text, re.M) if not name.endswith("_created")}
    assert used <= exported, used - exported
    families = [{re.sub(r"_(bucket|sum|count|total)$", "", name) for name in names} for names in (used, exported)]
    assert families[0] == families[1]
    assert labels <= set(re.findall(r'[{,](\w+)="', text))
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]}
    assert len(places) == len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


@pytest.mark.parametrize(
    ("error", "status"),
    [(Busy("full", 3.0), 429), (Interrupted("x"), 503), (ClusterError("x"), 500), (KeyError("x"), 500)],
)
def test_whatever_a_stage_raises_is_answered_named_and_counted_as_it_is(site, monkeypatch, error, status):
    async def fail(*_, **__):
        raise error

    monkeypatch.setattr(site.service, "draw", fail)
    answer = site.post(GENERATE, json=GOOD, headers={"X-Request-ID": "mine"})
    assert answer.status_code == status and "error" in answer.json()
    assert site.post(GENERATE, json=GOOD).headers["x-request-id"]
    text = site.ask("GET", "/metrics").text
    assert f'oneira_requests_total{{route="{GENERATE}",status="{status}"}}' in text


def test_a_client_that_goes_while_it_sends_is_counted_as_gone(site):
    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    def gone():
        found = re.findall(
            rf'oneira_requests_total\{{route="{GENERATE}",status="499"\}} (\S+)', site.ask("GET", "/metrics").text
        )
        return float(found[0]) if found else 0.0

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"100")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": GENERATE,
        "query_string": b"",
        "headers": headers,
        "http_version": "1.1",
    }
    before = gone()
    site.loop.run_until_complete(site.app(scope | {"scheme": "http", "server": ("localhost", 80)}, receive, send))
    assert gone() == before + 1


# Deadlines ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow_site(tiny):
    """A step takes 50 ms; what requests take is measured."""
    made = Site(tiny, "patient")
    assert made.post(GENERATE, json=GOOD | {"steps": 4}).status_code == 200
    yield made
    made.close()


def by(milliseconds):
    return {"X-Deadline-Ms": str(milliseconds)}


@pytest.mark.parametrize(
    "value", ["", "0", "-1", "1.5", "soon", "3600001", "9" * 30, "0000000001" + "9" * 20, "1" * 400]
)
def test_a_deadline_is_a_number_of_milliseconds(slow_site, value):
    answer = slow_site.post(GENERATE, json=GOOD, headers=by(value))
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_deadline"


@pytest.mark.parametrize("more", [{}, {"stream": True}])
def test_who_asks_for_more_than_its_deadline_allows_is_refused_at_once(slow_site, more):
    decoder = slow_site.stages[2]
    before, began = len(decoder.batches), time.perf_counter()
    answer = slow_site.post(GENERATE, json=GOOD | {"steps": 40} | more, headers=by(2000))
    assert answer.status_code == 429 and time.perf_counter() - began < 1
    assert answer.json()["error"]["code"] == "deadline" and int(answer.headers["retry-after"]) >= 1
    assert len(decoder.batches) == before and slow_site.service.line.taken == 0
    assert slow_site.post(GENERATE, json=GOOD | {"steps": 4} | more, headers=by(60_000)).status_code == 200


def test_a_guess_scales_only_the_stages_that_make_as_many_steps_as_they_are_asked_for():
    pace = Pace()
    assert pace.seconds("m", "decoder", (30, 1)) == 0
    for stage, steps in (("text", 1), ("decoder", 4), ("upsampler", 1)):
        pace.measure("m", stage, (4, 1), 0.4, steps)
    assert [pace.seconds("m", stage, (40, 1)) for stage in ("text", "decoder", "upsampler")] == [0.4, 4.0, 0.4]
    pace.measure("m", "decoder", (None, 1), 0.6, 15)  # of its own number of steps
    assert pace.seconds("m", "decoder", (40, 1)) == 0.6 and pace.seconds("m", "decoder", (4, 1)) == 0.4


def test_what_never_ends_in_time_is_known_to_take_longer():
    pace = Pace()
    pace.took_longer("m", [], (4, 1), 2.0)
    pace.took_longer("m", ["text", "decoder"], (4, 1), 2.0)
    assert pace.seconds("m", "text", (4, 1)) == 0 and pace.seconds("m", "decoder", (4, 1)) == 2.0
    pace.measure("m", "text", (4, 1), 0.5, 1)
    pace.took_longer("m", ["text", "decoder"], (4, 1), 3.0)
    pace.took_longer("m", ["text", "decoder"], (4, 1), 1.0)  # nothing new
    assert pace.seconds("m", "text", (4, 1)) == 0.5 and pace.seconds("m", "decoder", (4, 1)) == 2.5
    assert pace.seconds("m", "decoder", (8, 1)) == 2.5  # nobody knows whether it obeys


def test_what_is_refused_for_a_busy_hour_is_not_refused_for_ever():
    pace = Pace()
    pace.doubt("m", "decoder", (4, 1))  # of nothing
    pace.measure("m", "decoder", (4, 1), 10.0, 4)
    refused = 0
    while pace.seconds("m", "decoder", (4, 1)) > 2.0:
        pace.doubt("m", "decoder", (4, 1))
        refused += 1
    assert 10 < refused < 20 and pace.seconds("m", "decoder", (8, 1)) == 2 * pace.seconds("m", "decoder", (4, 1))


def test_the_first_picture_of_a_server_is_no_measure(tiny):
    site = Site(tiny, "patient")
    try:
        assert site.service._pace.seconds("patient", "decoder", (None, 1)) == 0
    finally:
        site.close()


def test_only_the_stages_that_an_answer_needs_count(slow_site):
    words = {"model": "patient", "input": ["a"]}
    assert slow_site.post(EMBED, json=words).status_code == 200
    assert slow_site.post(EMBED, json=words | {"input": ["b"]}, headers=by(150)).status_code == 200


def test_who_waits_in_line_in_vain_is_refused(slow_site):
    line = slow_site.service.line
    line.taken, line._seconds, before = line.places, 5.0, line._seconds
    try:
        answer = slow_site.post(GENERATE, json=GOOD | {"steps": 4}, headers=by(4000))
    finally:
        line.taken, line._seconds = 0, before
    assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 3


def test_what_takes_longer_than_expected_ends_at_its_deadline(slow_site, monkeypatch):
    monkeypatch.setattr(slow_site.service, "_pace", Pace())  # nothing was measured
    began = time.perf_counter()
    answer = slow_site.post(GENERATE, json=GOOD | {"steps": 100}, headers=by(400))
    assert answer.status_code == 429 and 0.3 < time.perf_counter() - began < 2
    assert slow_site.engine.under_way == slow_site.service.line.taken == slow_site.service.line.waiting == 0


def test_the_document_says_what_a_deadline_is(site):
    paths = site.ask("GET", "/openapi.json").json()["paths"]
    named = [
        path for path, of in paths.items() if "post" in of and of["post"]["parameters"][0]["name"] == "X-Deadline-Ms"
    ]
    assert named == [path for path, of in paths.items() if "post" in of]


@pytest.mark.parametrize(
    ("cpus", "gpus", "replicas", "most"), [(2, 0, 1, 1), (16, 0, 1, 8), (4, 3, 1, 3), (2, 0, 5, 5)]
)
def test_the_ingress_of_many_replicas_lets_in_work_for_all_of_them(monkeypatch, cpus, gpus, replicas, most):
    from oneira.cluster.serving import application

    monkeypatch.setattr(application, "needed_kinds", lambda models: ["text", "decoder"])
    serving = application.Serving(models=["m"], loader="", rows=4, replicas=replicas)
    bound = application.build(serving, "split", cpus, gpus)._bound_deployment
    assert bound.init_args[2] == 4 * most
    host = bound.init_args[1]["decoder"]._bound_deployment
    assert host._deployment_config.autoscaling_config.max_replicas == most
    assert host._deployment_config.autoscaling_config.target_ongoing_requests == 4


def test_the_server_of_a_cluster_elsewhere_is_reached_at_its_head():
    from oneira.cluster.serving.running import _reached_at

    assert (
        _reached_at("127.0.0.1", "10.0.0.1", "10.0.0.1")
        == "127.0.0.1"
        == _reached_at("0.0.0.0", "10.0.0.1", "10.0.0.1")
    )
    assert _reached_at("0.0.0.0", "10.0.0.1", "10.0.0.2") == "10.0.0.1"
    assert _reached_at("gpu.example.org", "10.0.0.1", "10.0.0.2") == "gpu.example.org"
    with pytest.raises(UsageError, match=r"10\.0\.0\.1.*--host 0\.0\.0\.0"):
        _reached_at("127.0.0.1", "10.0.0.1", "10.0.0.2")
