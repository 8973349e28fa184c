"""`oneira serve` as users start it, over a real socket, through the official client unchanged; and that it leaves nothing behind."""

import base64
import io
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from oneira.cluster.serving.models import load_models
from oneira.cluster.serving.residency import size_of

PAUSED = {"steps": 100}  # of 50 ms each, for "patient"


@pytest.fixture(scope="module")
def server(tmp_path_factory, serving, tiny):
    """With memory for one of its two models."""
    memory = 1.5e-9 * size_of(load_models(["tiny"], tiny)["tiny"])
    models = ("--model", "tiny", "--model", "patient")
    command = serving(tmp_path_factory.mktemp("home"), *models, "--memory", f"{memory:.9f}")
    yield command
    code, alive = command.stop()
    assert code == 0 and not alive


@pytest.fixture(scope="module")
def client(server):
    import openai

    return openai.OpenAI(api_key="any", base_url=f"{server.url}/v1", max_retries=0, timeout=120)


def picture(text):
    return np.array(Image.open(io.BytesIO(base64.b64decode(text))))


def png(alpha=None):
    array = np.random.default_rng(1).integers(0, 256, (64, 64, 4), np.uint8)
    array[..., 3] = 255
    if alpha is not None:
        array[:32, :, 3] = alpha
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return file.getvalue()


def test_generations(client, server):
    answer = client.images.generate(model="tiny", prompt="a red circle", n=2, size="128x128", extra_body={"seed": 4})
    assert [picture(image.b64_json).shape for image in answer.data] == [(128, 128, 3)] * 2
    address = client.images.generate(prompt="a red circle", size="64x64", response_format="url").data[0].url
    assert address.startswith(server.url)
    with urllib.request.urlopen(address) as file:
        assert Image.open(io.BytesIO(file.read())).size == (64, 64)


def test_a_stream(client):
    events = list(client.images.generate(model="tiny", prompt="a", stream=True, partial_images=1))
    assert [event.type for event in events] == ["image_generation.partial_image", "image_generation.completed"]
    assert [picture(event.b64_json).shape[0] for event in events] == [64, 128]
    assert events[0].partial_image_index == 0 and events[1].usage.total_tokens == 1
    edit = client.images.edit(model="tiny", image=png(), mask=png(0), prompt="a", stream=True, partial_images=1)
    assert [event.type for event in edit] == ["image_edit.partial_image", "image_edit.completed"]


def test_edits_and_variations(client):
    edit = client.images.edit(model="tiny", image=png(), mask=("mask.png", png(0)), prompt="a blue square", n=2)
    many = client.images.edit(model="tiny", image=[png(0)], prompt="a blue square")
    vary = client.images.create_variation(image=png(), model="tiny", size="64x64")
    assert [len(answer.data) for answer in (edit, many, vary)] == [2, 1, 1]
    assert picture(vary.data[0].b64_json).shape == (64, 64, 3)


def test_models_and_embeddings(client, server):
    assert [model.id for model in client.models.list()] == ["tiny", "patient"]
    for model, other in (("tiny", "patient"), ("patient", "tiny")):
        evictions = metric(server, "oneira_model_evictions_total")
        client.images.generate(model=model, prompt="a", size="64x64", extra_body={"steps": 1})
        assert (client.models.retrieve(model).state, client.models.retrieve(other).state) == ("hot", "cold")
    assert metric(server, "oneira_model_evictions_total") == evictions + 1
    with urllib.request.urlopen(f"{server.url}/v1/devices") as answer:
        [device] = json.load(answer)["devices"]
    assert [resident["model"].partition("@")[0] for resident in device["residents"]] == ["patient"]
    coded = client.embeddings.create(model="tiny", input=["a", "b"])
    plain = client.embeddings.create(model="tiny", input=["a", "b"], encoding_format="float")
    assert coded.data[1].embedding == pytest.approx(plain.data[1].embedding) and len(coded.data[0].embedding) == 16


def test_mistakes_are_the_clients_own_exceptions(client):
    import openai

    with pytest.raises(openai.NotFoundError, match="Did you mean 'tiny'"):
        client.images.generate(model="tinny", prompt="a")
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(model="tiny", prompt="a", n=11)
    assert caught.value.param == "n"
    began = time.monotonic()
    with pytest.raises(openai.RateLimitError, match="by its deadline") as late:
        hurry = {"extra_headers": {"X-Deadline-Ms": "900"}}
        client.images.generate(model="patient", prompt="in time", extra_body=PAUSED, **hurry)
    assert time.monotonic() - began < 3 and int(late.value.response.headers["retry-after"]) >= 1


def metric(server, name):
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        found = [line for line in answer.read().decode().splitlines() if line.startswith(name)]
    return float(found[0].rpartition(" ")[2])


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_is_forgotten(client, server, stream):
    import openai

    impatient = client.with_options(timeout=1.5)
    with pytest.raises(openai.APITimeoutError):
        for _ in impatient.images.generate(model="patient", prompt="a", stream=stream, n=2, extra_body=PAUSED):
            raise AssertionError("it cannot be done yet")
    end = time.monotonic() + 2.5  # alone it would take at least 10 s
    while metric(server, "oneira_under_way"):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_curl_line_works(server):
    done = subprocess.run(["sh", "-c", server.curl], capture_output=True, text=True, timeout=60)
    assert '"b64_json"' in done.stdout, done.stderr


def test_sigterm_finishes_what_is_under_way_and_takes_nothing_new(serving, tmp_path, monkeypatch):
    monkeypatch.setenv("ONEIRA_LOG", "json")
    command = serving(tmp_path, "--model", "patient")
    logs = Path(json.loads((tmp_path / "cluster" / "local.json").read_text())["session"]) / "logs"
    body = json.dumps({"prompt": "a", "steps": 60}).encode()
    asked = urllib.request.Request(
        f"{command.url}/v1/images/generations", body, {"Content-Type": "application/json", "X-Request-ID": "mine-1"}
    )
    answers = []

    def ask():
        with urllib.request.urlopen(asked, timeout=120) as answer:
            answers.append((answer.status, answer.headers.get_all("x-request-id"), json.loads(answer.read())))

    asking = threading.Thread(target=ask)
    try:
        asking.start()
        while not metric(command, "oneira_under_way"):
            time.sleep(0.05)
    finally:
        command.process.send_signal(signal.SIGTERM)
    refused = until_refused(
        urllib.request.Request(asked.full_url, b'{"prompt": "a", "steps": 1}', {"Content-Type": "application/json"})
    )
    code, alive = command.stop(0)
    asking.join()
    [(status, names, answer)] = answers
    assert (status, names) == (200, ["mine-1"]) and picture(answer["data"][0]["b64_json"]).shape == (128, 128, 3)
    assert refused.code == 503 and refused.headers["retry-after"] and refused.headers["x-request-id"]
    assert code == 0 and not alive
    said = [
        json.loads(line)
        for file in logs.glob("worker-*.err")
        for line in file.read_text().splitlines()
        if '"request"' in line
    ]
    assert ("mine-1", 200) in {(line.get("request"), line.get("status")) for line in said}


def until_refused(request):
    while True:
        try:
            urllib.request.urlopen(request, timeout=30).close()
        except urllib.error.HTTPError as error:
            return error


@pytest.fixture
def certificate(tmp_path):
    """A certificate of this machine's loopback address that nobody has signed, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    files = tmp_path / "certificate.pem", tmp_path / "key.pem"
    words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    more = ["-addext", "subjectAltName=IP:127.0.0.1", "-out", files[0], "-keyout", files[1]]
    subprocess.run([openssl, *words, *more], check=True, capture_output=True)
    return files


def test_with_a_certificate_it_speaks_tls_alone(serving, tmp_path, certificate):
    command = serving(
        tmp_path, "--model", "tiny", "--host", "0.0.0.0", "--key-file", str(certificate[1]),  # any text is a key
        "--tls-cert", str(certificate[0]), "--tls-key", str(certificate[1]),
    )  # fmt: skip
    try:
        trusted = ssl.create_default_context(cafile=certificate[0])
        with urllib.request.urlopen(f"{command.url}/healthz", context=trusted) as answer:
            assert command.url.startswith("https://127.0.0.1:") and answer.status == 200
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{command.url}/v1/models", context=trusted)
        with pytest.raises(OSError):
            urllib.request.urlopen(command.url.replace("https", "http") + "/healthz", timeout=10)
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            urllib.request.urlopen(f"{command.url}/healthz")
    finally:
        code, alive = command.stop()
    assert code == 0 and not alive


@pytest.mark.slow
def test_the_split_layout_does_the_same(serving, tmp_path):
    import openai

    command = serving(tmp_path, "--model", "tiny", "--layout", "split")
    try:
        client = openai.OpenAI(api_key="any", base_url=f"{command.url}/v1", max_retries=0, timeout=120)
        events = list(client.images.generate(model="tiny", prompt="a", stream=True, partial_images=1))
        assert [picture(event.b64_json).shape[0] for event in events] == [64, 128]
        with pytest.raises(openai.BadRequestError, match="refuses"):
            client.images.generate(model="tiny", prompt="unknown purple")
    finally:
        code, alive = command.stop(signal.SIGINT)
    assert code == 0 and not alive


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["--host", "0.0.0.0"], 2, "ONEIRA_API_KEY"),
        (["--host", "0.0.0.0", "--key-file", __file__], 2, "--tls-cert"),
        (["--tls-cert", "/no/such/file"], 2, "--tls-key"),
        (["--tls-cert", "/no/such/file", "--tls-key", "/no/such/file"], 2, "/no/such/file"),
        (["--tls-cert", __file__, "--tls-key", __file__], 2, "PEM"),
        (["--layout", "fussed"], 2, "Did you mean 'fused'"),
        (["--replicas", "2"], 2, "'split'"),
        (["--key-file", "/no/such/file"], 2, "/no/such/file"),
    ],
)
def test_wrong_commands_are_refused_before_anything_starts(arguments, code, words, tmp_path):
    environment = {**os.environ, "ONEIRA_HOME": str(tmp_path)}
    environment.pop("ONEIRA_API_KEY", None)
    command = [sys.executable, "-m", "oneira.platform.cli", "serve", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == code and words in done.stderr and not (tmp_path / "cluster").exists()


def test_a_model_that_is_not_there_is_told_as_itself(tmp_path):
    """The replica that looks for it is another process; what it says must reach the one who typed the command."""
    command = [sys.executable, "-m", "oneira.platform.cli", "serve", "--model", str(tmp_path / "none"), "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        command, env=environment | {"ONEIRA_HOME": str(tmp_path)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "There is no model" in done.stderr.splitlines()[-1]


def counted(server):
    """{route: {status: requests}} by the server's own count."""
    text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    found = {}
    for route, status, count in re.findall(r'oneira_requests_total\{route="(.*?)",status="(.*?)"\} (\S+)', text):
        found.setdefault(route.replace(":path", ""), {})[status] = int(float(count))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("examples", [30, pytest.param(1000, marks=pytest.mark.timeout(7200))])
def test_no_request_makes_the_server_fail(server, tmp_path, capsys, examples):
    """schemathesis, with right and wrong requests of every route of the server's own document."""
    report, before = tmp_path / "report.txt", counted(server)
    with open(report, "w") as file:
        done = subprocess.run(
            [Path(sys.executable).with_name("schemathesis"), "run", f"{server.url}/openapi.json", "--mode", "all",
             "--checks", "not_a_server_error", "--max-examples", str(examples), "--seed", "1",
             "--phases", "examples,coverage,fuzzing,stateful"],
            stdout=file, stderr=subprocess.STDOUT, cwd=tmp_path, timeout=7000,
        )  # fmt: skip
    assert done.returncode == 0, report.read_text()[-4000:]
    after = {
        route: {status: n - before.get(route, {}).get(status, 0) for status, n in statuses.items()}
        for route, statuses in counted(server).items()
    }
    assert not [route for route, statuses in after.items() for status, n in statuses.items() if status[0] == "5" and n]
    paths = json.loads(urllib.request.urlopen(f"{server.url}/openapi.json").read())["paths"]
    sums = {path: sum(after.get(path, {}).values()) for path in paths}
    if examples > 30:
        with capsys.disabled():
            print("", *(f"{path}: {sums[path]} {after.get(path)}" for path in paths), sep="\n")
    assert min(sums.values()) >= 1
