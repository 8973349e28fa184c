"""Jobs without a cluster: the wheel, what is refused before it is sent, and what is submitted again."""

from __future__ import annotations

import base64
import csv
import hashlib
import http.server
import io
import itertools
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from oneira.cluster.jobs import client, supervisor, wheel
from oneira.cluster.jobs.entry import ENTRYPOINT, with_files
from oneira.platform.errors import ClusterError, ConfigError, UsageError

# --- the wheel -------------------------------------------------------------------------------------------------------


def test_the_wheel_is_named_after_its_content_and_the_same_files_give_the_same_bytes(tmp_path, monkeypatch):
    one, two = wheel.build_wheel(tmp_path / "a"), wheel.build_wheel(tmp_path / "b")
    assert one.name == two.name and one.read_bytes() == two.read_bytes()
    files = wheel.code_files()
    monkeypatch.setattr(wheel, "code_files", lambda: {**files, "oneira/platform/errors.py": b"changed"})
    assert wheel.build_wheel(tmp_path / "a").name != one.name


def test_the_wheel_records_every_file_and_can_be_imported(tmp_path):
    path = wheel.build_wheel(tmp_path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        info = f"{path.name.removesuffix('-py3-none-any.whl')}.dist-info"
        recorded = {row[0]: row[1] for row in csv.reader(io.StringIO(archive.read(f"{info}/RECORD").decode()))}
        assert set(recorded) == set(names)
        for name in set(names) - {f"{info}/RECORD"}:
            digest = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).rstrip(b"=").decode()
            assert recorded[name] == f"sha256={digest}"
        assert b"Requires-Dist" not in archive.read(f"{info}/METADATA")
        assert b"carracing-quick" in archive.read(f"{info}/entry_points.txt")
        assert not [name for name in names if "__pycache__" in name or "platform/__init__" in name]
        archive.extractall(tmp_path / "there")
    script = "import oneira.platform.errors as e, oneira.cluster.jobs.entry as j; print(e.__file__, j.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "there")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert all(place.startswith(str(tmp_path / "there")) for place in done.stdout.split())


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, word",
    [
        ([], "Nothing to submit"), (["trian", "x"], "Did you mean 'train'"), (["submit", "train"], "cannot be a job"),
        (["serve"], "cannot be a job"), (["train"], "preset"), (["train", "carracing-quik"], "Did you mean 'carracing-quick'"),
        (["train", "carracing-quick", "--sett", "a=1"], "--sett"), (["train", "carracing-quick", "--set", "a"], "KEY=VALUE"),
        (["train", "carracing-quick; rm -rf /"], "Unknown preset"), (["train", "--help"], "only prints help"),
        (["resume"], "run"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_refused_before_anything_is_sent(arguments, word):
    with pytest.raises(UsageError) as caught:
        client.prepare(arguments)
    assert word.lower() in str(caught.value).lower()


def test_a_wrong_setting_is_refused_too():
    with pytest.raises(ConfigError, match="Unknown key"):
        client.prepare(["train", "carracing-quick", "--set", "nothing=1"])


def test_all_attempts_of_a_training_share_one_run():
    arguments = client.prepare(["train", "carracing-quick", "--smoke"])
    assert arguments[:4] == ("train", "carracing-quick", "--smoke", "--run") and arguments[4].startswith(
        "carracing-quick-2"
    )
    assert client.prepare(["train", "carracing-quick", "--run", "mine"]) == (
        "train",
        "carracing-quick",
        "--run",
        "mine",
    )
    assert client.prepare(["resume", "mine"]) == ("resume", "mine")


def test_a_file_of_settings_travels_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = 'preset = "realnvp-moons"\nseed = 3\n'
    (tmp_path / "moons.toml").write_text(text)
    arguments = client.prepare(["train", "moons.toml", "--smoke"])
    files = client._files(arguments)
    assert files == {"moons.toml": text}
    assert client._files(("models", "list")) == {} == client._files(("train", "realnvp-moons"))
    there = with_files(arguments, files)
    place = Path(there[1])
    assert place.is_absolute() and place.parent != tmp_path and place.name == "moons.toml"
    assert place.read_text() == text and [there[0], "moons.toml", *there[2:]] == list(arguments)
    (tmp_path / "moons.toml").write_text(text + "# long\n" * 10_000)
    with pytest.raises(UsageError, match="70034"):
        client._files(arguments)


@pytest.mark.parametrize(
    "words", [("train", "carracing-quick"), ("train", "../My Presets/ä;$(x).toml"), ("runs",), ("train", "x" * 300)]
)
def test_an_id_is_short_and_harmless(words):
    assert client.NAME.fullmatch(client.name_of(words))
    assert client.name_of(words) != client.name_of(words)


@pytest.mark.parametrize("job", ["../../api/version", "a/b", "a b", "", "A", "a.1", "a?x=1", "a" * 200])
def test_an_id_leads_nowhere_else(job):
    with pytest.raises(UsageError, match="no job's id"):
        client.find_job(job, "http://127.0.0.1:1")


@pytest.mark.parametrize(
    "address", ["http://ray.example.org:8265", "http://10.0.0.1:8265", "http://127.0.0.1.example.org:8265"]
)
def test_the_token_is_never_sent_in_clear_text(address):
    with pytest.raises(UsageError, match="without TLS"):
        client.find_url(address)


@pytest.mark.parametrize(
    "address", ["ftp://127.0.0.1:1", "https://", "http://user:password@127.0.0.1:1", "ray://127.0.0.1:10001"]
)
def test_an_address_of_something_else_is_refused(address):
    with pytest.raises(UsageError, match="no address"):
        client.find_url(address)


def test_nothing_listens_there():
    with pytest.raises(ClusterError, match="No Jobs API answers"):
        client.submit(["runs"], address="http://127.0.0.1:9")


@pytest.fixture
def answering():
    """A server that answers every request with the status it is given, and keeps the requests."""
    servers = []

    def start(status):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.server.seen.append((self.path, dict(self.headers)))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(b"[]")

            def log_message(self, *arguments):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.seen = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server, f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_cluster_that_takes_jobs_from_anybody_gets_none(answering):
    """ShadowRay: the request that finds out bears no token, and nothing follows it."""
    server, url = answering(200)
    with pytest.raises(ClusterError, match="from anybody"):
        client.submit(["runs"], address=url)
    assert len(server.seen) == 1 and "authorization" not in {name.lower() for name in server.seen[0][1]}


def test_a_server_that_is_no_cluster(answering):
    with pytest.raises(ClusterError, match="answers 404"):
        client.submit(["runs"], address=answering(404)[1])


# --- what is submitted again -----------------------------------------------------------------------------------------


class Cluster:
    """Ray's Jobs API, as far as the supervisor uses it: names are taken once."""

    def __init__(self):
        self.jobs = {}

    def submit_job(self, *, entrypoint, submission_id, runtime_env, metadata):
        if submission_id in self.jobs:
            raise RuntimeError("taken")
        assert entrypoint == ENTRYPOINT
        self.jobs[submission_id] = SimpleNamespace(
            submission_id=submission_id, status="RUNNING", metadata=metadata, runtime_env=runtime_env,
            start_time=len(self.jobs) * 1000, end_time=None, driver_exit_code=None, message=None,
        )  # fmt: skip
        return submission_id

    def list_jobs(self):
        return list(self.jobs.values())

    def end(self, name, status, code=None, at=0):
        job = self.jobs[name]
        job.status, job.driver_exit_code, job.end_time = status, code, at * 1000


@pytest.fixture
def cluster():
    made = Cluster()
    supervisor.submit_attempt(made, "j", 1, 4, ["train", "a b; c"], {"env_vars": {"X": "1"}})
    return made


@pytest.mark.parametrize("code", [-9, 1, 4, 75, 137, None])
def test_what_died_is_submitted_again_as_it_was(cluster, code):
    cluster.end("j.1", "FAILED", code, at=100)
    assert supervisor.look(cluster, 100.5) == []  # not at once
    assert supervisor.look(cluster, 101) == ["j.2"]
    one, two = cluster.jobs["j.1"], cluster.jobs["j.2"]
    assert two.runtime_env == one.runtime_env and json.loads(two.metadata["oneira_command"]) == ["train", "a b; c"]
    assert supervisor.look(cluster, 200) == []  # it runs


@pytest.mark.parametrize(
    "status, code", [("FAILED", 2), ("FAILED", 3), ("SUCCEEDED", 0), ("STOPPED", None), ("STOPPED", -15)]
)
def test_what_ended_on_purpose_is_not(cluster, status, code):
    cluster.end("j.1", status, code)
    assert supervisor.look(cluster, 1e9) == []


def test_attempts_come_less_often_and_have_an_end(cluster):
    for number, pause in ((1, 1), (2, 2), (3, 4)):
        cluster.end(f"j.{number}", "FAILED", -9, at=1000)
        assert supervisor.look(cluster, 1000 + pause - 0.1) == []
        assert supervisor.look(cluster, 1000 + pause) == [f"j.{number + 1}"]
    cluster.end("j.4", "FAILED", -9, at=1000)
    assert supervisor.look(cluster, 1e9) == []


def test_two_supervisors_submit_an_attempt_once(cluster):
    cluster.end("j.1", "FAILED", -9)
    seen = cluster.list_jobs()
    late = SimpleNamespace(
        list_jobs=lambda: seen, submit_job=cluster.submit_job
    )  # has looked before the other submitted
    assert supervisor.look(cluster, 100) == ["j.2"] and supervisor.look(late, 100) == []
    assert sorted(cluster.jobs) == ["j.1", "j.2"]


def test_jobs_of_others_are_left_alone(cluster):
    for i, metadata in enumerate(
        [{}, None, {"oneira_job": "j"}, {**cluster.jobs["j.1"].metadata, "oneira_attempt": "x"}]
    ):
        cluster.jobs[f"other-{i}"] = SimpleNamespace(
            **{**vars(cluster.jobs["j.1"]), "submission_id": f"other-{i}", "metadata": metadata}
        )
        cluster.end(f"other-{i}", "FAILED", -9)
    cluster.jobs["stranger"] = SimpleNamespace(
        **{**vars(cluster.jobs["j.1"]), "submission_id": "stranger"}
    )  # says it is ours
    assert list(supervisor.read_attempts(cluster.list_jobs())) == ["j"]
    assert len(supervisor.read_attempts(cluster.list_jobs())["j"]) == 1 and supervisor.look(cluster, 1e9) == []


def test_states_and_codes_as_people_read_them(cluster):
    def state(status, code=None, now=10.0):
        cluster.end("j.1", status, code)
        attempts = supervisor.read_attempts(cluster.list_jobs())["j"]
        said = client.state_of(attempts, now)
        return said, client.exit_code(said, attempts)

    assert state("PENDING")[0] == "pending" and state("RUNNING")[0] == "running"
    assert state("SUCCEEDED", 0) == ("done", 0) and state("FAILED", 3) == ("failed", 3)
    assert state("FAILED", -9)[0] == "restarting" and state("STOPPED", -15) == ("stopped", 1)
    assert state("FAILED", None, now=1000) == ("failed", 1)  # there is no supervisor that would submit it again


def test_who_follows_a_job_bears_a_bad_answer(monkeypatch):
    clock, answers = [0.0], iter([ClusterError("x"), ClusterError("x"), "there"])
    monkeypatch.setattr(client.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(client.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))

    def ask():
        if isinstance(answer := next(answers, ClusterError("gone")), Exception):
            raise answer
        return answer

    assert client._patiently(ask) == "there" and clock[0] == 2
    with pytest.raises(ClusterError, match="gone"):
        client._patiently(ask)
    assert 60 < clock[0] - 2 < 65


def test_every_end_of_every_attempt_leads_to_an_end():
    """All histories of three attempts: the supervisor stops, and never has two attempts of one job under way."""
    ends = [("SUCCEEDED", 0), ("FAILED", 2), ("FAILED", -9), ("FAILED", None), ("STOPPED", None)]
    for history in itertools.product(ends, repeat=3):
        cluster = Cluster()
        supervisor.submit_attempt(cluster, "j", 1, 3, ["runs"], {})
        for now, (status, code) in enumerate(history):
            running = [name for name, job in cluster.jobs.items() if job.status == "RUNNING"]
            assert len(running) <= 1
            for name in running:
                cluster.end(name, status, code, at=now * 100)
            supervisor.look(cluster, now * 100 + 50)
        died = next((i for i, end in enumerate(history) if end not in (("FAILED", -9), ("FAILED", None))), 2)
        assert len(cluster.jobs) == died + 1
