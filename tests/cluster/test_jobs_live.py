"""Jobs on a real Ray cluster on loopback, by the commands that users type."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

HOST = """
import sys
from oneira.cluster.connection import connect
print(connect(jobs=True).dashboard, flush=True)
sys.stdin.readline()
"""
TWICE = """
import sys
from ray.dashboard.modules.dashboard_sdk import SubmissionClient
from oneira.cluster import submit
sent, real = [], SubmissionClient._upload_package
SubmissionClient._upload_package = lambda self, uri, *rest, **more: (sent.append(uri), real(self, uri, *rest, **more))[1]
jobs = [submit(["runs", "--json"]) for _ in range(2)]
print(len(sent), *[job.wait() for job in jobs])
"""
TRAIN = ("train", "realnvp-moons", "--smoke", "--executor", "serial")


class Site:
    """A local cluster that takes jobs, under a home of its own, and the command line over it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment |= {"ONEIRA_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
        self.host = subprocess.Popen(
            [sys.executable, "-c", HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.environment, cwd=folder, text=True,
        )  # fmt: skip
        self.dashboard = self.host.stdout.readline().strip()
        assert self.dashboard.startswith("127.0.0.1:"), self.dashboard

    def run(self, *arguments, code=0, timeout=200):
        words = [sys.executable, "-m", "oneira.platform.cli", *arguments]
        done = subprocess.run(
            words, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    def json(self, *arguments, code=0):
        return json.loads(self.run(*arguments, "--json", code=code))

    def submit(self, *arguments):
        return self.run("submit", *arguments).split()[0]

    def until(self, job, *states, seconds=200):
        end = time.monotonic() + seconds
        while (row := self.json("jobs", "status", job))["state"] not in states:
            assert time.monotonic() < end and row["state"] in ("pending", "running", "restarting"), row
            time.sleep(0.3)
        return row

    def processes(self, word):
        """Of this cluster, whose command line has the word."""
        found = []
        for process in psutil.Process(self.host.pid).children(recursive=True):
            try:
                if any(word in part for part in process.cmdline()):
                    found.append(process)
            except psutil.Error:
                pass
        return found

    def training(self, seconds=200):
        """The process of the training, once it has written something down."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if list(self.folder.glob("runs/*/metrics.jsonl")):
                found = [p for p in self.processes("oneira.cluster.jobs.entry") if "python" in p.name()]
                if found:
                    return found[-1]
            time.sleep(0.05)
        raise AssertionError("no training began")

    def close(self):
        family = psutil.Process(self.host.pid).children(recursive=True)
        self.host.stdin.close()
        self.host.wait(timeout=60)
        for left in psutil.wait_procs(family, timeout=20)[1]:
            left.kill()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    made = Site(tmp_path_factory.mktemp("site"))
    yield made
    made.close()


def test_a_command_is_submitted_watched_and_its_output_read(site):
    job = site.submit("doctor", "--json")
    row = site.until(job, "done")
    assert row["command"] == ["oneira", "doctor", "--json"] and (row["attempt"], row["exit_code"]) == (1, 0)
    assert '"checks"' in site.run("jobs", "logs", job) and '"checks"' in site.run("jobs", "logs", job, "--follow")
    assert job in [row["id"] for row in site.json("jobs", "list")["jobs"]] and job in site.run("jobs", "list")


def test_the_code_is_sent_once_and_commands_that_end_on_purpose_run_once(site):
    words = [sys.executable, "-c", TWICE]
    done = subprocess.run(words, env=site.environment, cwd=site.folder, capture_output=True, text=True, timeout=200)
    uploads, *codes = done.stdout.split()
    assert int(uploads) <= 1 and codes == ["0", "0"], done.stdout + done.stderr
    job = site.submit("resume", "no-such-run")
    row = site.until(job, "failed")
    assert (row["attempt"], row["exit_code"]) == (1, 2) and "There is no run" in site.run("jobs", "logs", job)


def test_without_the_token_nobody_sees_or_submits_anything(site):
    for path in ("/api/jobs/", "/api/version", "/nodes?view=summary", "/api/packages/gcs/x.zip"):
        for headers, status in (({}, 401), ({"Authorization": "Bearer " + "0" * 64}, 403)):
            request = urllib.request.Request(f"http://{site.dashboard}{path}", headers=headers)
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(request, timeout=20)
            assert caught.value.code == status
    data = json.dumps({"entrypoint": "touch struck"}).encode()
    request = urllib.request.Request(
        f"http://{site.dashboard}/api/jobs/", data=data, headers={"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=20)
    assert caught.value.code == 401 and not (site.folder / "struck").exists()


def test_a_page_that_was_bound_anew_to_the_dashboard_submits_nothing(site):
    """DNS rebinding: a browser's request, even with the token in its cookie."""
    token = (site.folder / "home/cluster/token").read_text()
    headers = {
        "Host": "evil.example",
        "Origin": "http://evil.example",
        "Content-Type": "application/json",
        "Cookie": f"ray-authentication-token={token}",
    }
    data = json.dumps({"entrypoint": "touch struck"}).encode()
    request = urllib.request.Request(f"http://{site.dashboard}/api/jobs/", data=data, headers=headers)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=20)
    assert caught.value.code in (401, 403, 405) and not (site.folder / "struck").exists()


def test_wrong_ids_are_told(site):
    assert "no job 'nothing'" in site.run("jobs", "status", "nothing", code=2)
    assert "no job's id" in site.run("jobs", "stop", "../x", code=2)
    assert "exclude each other" in site.run("jobs", "logs", "x", "--follow", "--json", code=2)


@pytest.mark.slow
def test_a_killed_training_goes_on_and_a_stopped_one_does_not(site):
    job = site.submit(*TRAIN)
    os.kill(site.training().pid, signal.SIGKILL)
    row = site.until(job, "done")
    assert row["attempt"] == 2
    run = next(site.folder.glob("runs/realnvp-moons-*"))
    assert (run / "summary.json").exists() and len(json.loads((run / "provenance.json").read_text())["started"]) == 2
    patient = site.submit("train", "realnvp-moons", "--executor", "serial", "--run", "patient")
    site.until(patient, "running")
    assert site.json("jobs", "stop", patient)["state"] == "stopped"
    time.sleep(3)
    assert site.json("jobs", "status", patient)["state"] == "stopped"


@pytest.mark.slow
def test_the_supervisor_may_die_as_well(site):
    job = site.submit("train", "realnvp-moons", "--smoke", "--executor", "serial", "--run", "watched")
    for _ in range(2):
        for process in [site.training(), *site.processes("ray::Supervisor")]:
            process.kill()
        time.sleep(5)
    assert site.until(job, "done")["attempt"] >= 2
