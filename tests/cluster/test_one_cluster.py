"""One cluster, one scheduler: a submitted training, a dream and a server of pictures side by side, by the commands that users type."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

HOST = """
import sys
from oneira.cluster.connection import connect
print(connect(jobs=True).address, flush=True)
sys.stdin.readline()
"""
DREAM = """
import sys
import time
from pathlib import Path
import numpy as np
import torch
from oneira.agents.controller import ControllerConfig
from oneira.agents.fitness import dream_unit
from oneira.agents.memory import MDNRNN, MemoryConfig
from oneira.agents.worldmodel import pack
from oneira.cluster.executor import RayExecutor
from oneira.generative.vae import VAE, VAEConfig

memory = MDNRNN(MemoryConfig(hidden=24, reward_input=False)).eval()
model = pack("carracing", VAE(VAEConfig(width=8)).eval(), [memory], ControllerConfig(memory=24))
model["starts"] = {name: np.zeros((4, size), np.float32) for name, size in (("z", 32), ("h", 24), ("c", 24))}
model["starts"]["reward_prev"] = np.zeros(4, np.float32)
unit = {"params": np.zeros((4, 171), np.float32), "seed": 1, "rollouts": 8, "horizon": 300, "tau": 1.0, "stuck": 0}
with RayExecutor() as executor:
    shared, dreamt = executor.share(model), set()
    while not Path(sys.argv[1]).exists():
        found = executor.submit(dream_unit, shared, {**unit, "lost_cost": 0.0}).result()
        dreamt.add(found["returns"].tobytes())
        time.sleep(1)  # dreams go before training: without an end they would leave it half a second in fifteen
    print(len(dreamt))
"""
STEPS = 2000
TRAIN = ("realnvp-moons", "--smoke", "--set", f"training.steps={STEPS}")


class Place:
    """A local cluster that takes jobs, started by a process of its own, and the command line beside it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment |= {"ONEIRA_HOME": str(folder / "home"), "PYTHONUNBUFFERED": "1"}
        self.environment["PYTHONPATH"] = str(Path(__file__).parent)
        self.started = []
        self.host = self.start([sys.executable, "-c", HOST], stdin=subprocess.PIPE)
        self.address = self.host.stdout.readline().strip()

    def start(self, command, **options):
        process = subprocess.Popen(
            command, env=self.environment, cwd=self.folder, stdout=subprocess.PIPE, text=True, **options
        )
        self.started.append(process)
        return process

    def oneira(self, *arguments):
        words = [sys.executable, "-m", "oneira.platform.cli", *arguments]
        done = subprocess.run(words, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def close(self):
        family = psutil.Process(self.host.pid).children(recursive=True)
        for process in self.started[1:]:
            process.kill()
        self.host.stdin.close()
        self.host.wait(timeout=60)
        for left in psutil.wait_procs(family, timeout=20)[1]:
            left.kill()


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path)
    yield made
    made.close()


def draw(url, seed, prompt="a red circle", n=1):
    body = json.dumps({"prompt": prompt, "seed": seed, "n": n}).encode()
    request = urllib.request.Request(f"{url}/v1/images/generations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["data"][0]["b64_json"]


def watch(url):
    with urllib.request.urlopen(f"{url}/v1/devices") as answer:
        return json.load(answer)


def priorities(report):
    return {lease["priority"] for device in report["devices"] for lease in device["leases"]}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_a_dream_and_a_server_share_the_device_and_the_run_is_the_same_to_the_byte(place):
    serve = ("serve", "--loader", "tiny:load", "--model", "patient", "--port", "0", "--address", place.address)
    server = place.start([sys.executable, "-m", "oneira.platform.cli", *serve])
    url = re.search(r"http://\S+", server.stdout.readline())[0]
    before = [draw(url, seed) for seed in range(2)]
    dream = place.start([sys.executable, "-c", DREAM, str(place.folder / "enough")])
    job = place.oneira("submit", "train", *TRAIN, "--run", str(place.folder / "shared")).split()[0]
    seen, shown, pictures, end = set(), set(), 0, time.monotonic() + 700
    while not (place.folder / "shared" / "model" / "model.safetensors").exists():
        assert time.monotonic() < end, place.oneira("jobs", "logs", job)
        assert [draw(url, seed) for seed in range(2)] == before
        pictures += 2
        seen |= priorities(watch(url))
        if not shown and {"train", "dream"} <= seen:
            report = json.loads(place.oneira("devices", "--json"))["cluster"]["scheduler"]
            shown = priorities(report)
        time.sleep(1)  # a command that is polled takes the cores from Ray's workers, which are nice to others
    scheduler = watch(url)
    (place.folder / "enough").touch()
    assert int(dream.communicate(timeout=120)[0]) == 1  # every time the same dream
    while (row := json.loads(place.oneira("jobs", "status", job, "--json")))["state"] != "done":
        assert row["state"] == "running" and time.monotonic() < end, row
        time.sleep(2)
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=60) == 0
    assert {"train", "dream"} <= seen and "train" in shown and pictures >= 4
    assert scheduler["counts"]["pauses"] >= 2 and scheduler["waits"]["interactive"]["leases"] >= pictures
    place.oneira("train", *TRAIN, "--run", str(place.folder / "alone"), "--executor", "serial")
    weights = [(place.folder / run / "model" / "model.safetensors").read_bytes() for run in ("shared", "alone")]
    assert weights[0] == weights[1]


SOAK_SECONDS = float(os.environ.get("ONEIRA_SOAK_SECONDS", 1800))
PROMPTS = 100  # that come round: the caches are full before the first look
WINDOW = 1 / 6  # of the soak: how long the beginning and the end are looked at; as long again is warm-up


def leave(url):
    """Asks for a stream of pictures, and goes before the first has come."""
    host, port = url.rpartition("/")[2].split(":")
    body = json.dumps({"prompt": "a blue ring", "stream": True, "steps": 50}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as wire:
        wire.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(0.1)


def footprint(roots):
    """{what a process is: (processes, file descriptors, bytes of anonymous memory)} of processes and all they started."""
    found = {}
    for root in roots:
        for process in [root, *root.children(recursive=True)]:
            try:
                words = process.cmdline()
                place = Path("/proc") / str(process.pid)
                descriptors = len(os.listdir(place / "fd"))
                lines = (place / "smaps_rollup").read_text().splitlines()
            except (psutil.Error, OSError):  # it ended meanwhile
                continue
            kind = next((word for word in ("gcs_server", "raylet", "dashboard") if word in " ".join(words[:3])), None)
            kind = kind or (re.split("[:.]", words[0])[2] if words and words[0].startswith("ray::") else "python")
            size = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:"))
            processes, before, memory = found.get(kind, (0, 0, 0))
            found[kind] = (processes + 1, before + descriptors, memory + size)
    return found


def growth(looks, which):
    """How much larger the median of the last looks is than that of the first, as a share."""
    count = max(1, len(looks) // 4)
    first, last = (sorted(look[which] for look in part)[count // 2] for part in (looks[:count], looks[-count:]))
    return last / first - 1


@pytest.mark.slow
@pytest.mark.timeout(SOAK_SECONDS + 600)
def test_serving_and_training_for_half_an_hour_take_no_more(place, capsys):
    """Of Oneira's own processes; Ray's daemons keep books of what they did, and are shown."""
    serve = ("serve", "--loader", "tiny:load", "--model", "tiny", "--port", "0", "--address", place.address)
    server = place.start([sys.executable, "-m", "oneira.platform.cli", *serve])
    url = re.search(r"http://\S+", server.stdout.readline())[0]
    train = ("realnvp-moons", "--set", "training.steps=100000000", "--run", str(place.folder / "long"))
    job = place.oneira("submit", "train", *train).split()[0]
    right, pictures, looks = [draw(url, seed) for seed in range(2)], 0, []
    began = time.monotonic()
    while (passed := time.monotonic() - began) < SOAK_SECONDS:
        turn = pictures % PROMPTS
        draw(url, turn + 10, f"picture {turn} of a row", n=1 + turn % 3)
        pictures += 1
        if pictures % 5 == 0:
            leave(url)
            with urllib.request.urlopen(f"{url}/metrics") as answer:
                assert b"oneira_requests_total" in answer.read()
        if pictures % 20 == 0:
            assert [draw(url, seed) for seed in range(2)] == right
        if passed > WINDOW * SOAK_SECONDS and (not looks or passed - looks[-1][0] > 10):
            looks.append((passed, footprint([psutil.Process(place.host.pid), psutil.Process(server.pid)])))
        time.sleep(0.5)
    assert json.loads(place.oneira("jobs", "status", job, "--json"))["state"] == "running"
    steps = [json.loads(line)["step"] for line in (place.folder / "long" / "metrics.jsonl").read_text().splitlines()]
    place.oneira("jobs", "stop", job)
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=60) == 0
    kinds = sorted(set.intersection(*(set(look) for _, look in looks)))
    daemons = {"gcs_server", "raylet", "dashboard", "DashboardAgent", "RuntimeEnvAgent", "IDLE"}
    with capsys.disabled():
        print(f"\n{pictures} pictures, {steps[-1]} steps of training, {len(looks)} looks")
        for kind in kinds:
            rows = [look[kind] for _, look in looks]
            print(f"{kind:<28} {rows[-1][0]} processes, descriptors {rows[0][1]} to {rows[-1][1]} ({growth(rows, 1):+.2%}), "
                  f"memory {rows[0][2] / 2**20:.1f} to {rows[-1][2] / 2**20:.1f} MiB ({growth(rows, 2):+.2%})")  # fmt: skip
    for kind in [kind for kind in kinds if kind not in daemons]:
        rows = [look[kind] for _, look in looks]
        assert {row[0] for row in rows} == {rows[0][0]}, f"a process of {kind} ended, or one more began"
        assert growth(rows, 1) <= 0.01, kind
        assert growth(rows, 2) <= max(0.01, 2 * 2**20 / rows[0][2]), kind  # of small ones, two MiB
    assert steps[-1] > steps[len(steps) // 2] > 0
