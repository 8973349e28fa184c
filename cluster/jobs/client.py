"""Submit Oneira's commands to a Ray cluster as jobs, and look after them. It speaks HTTP to Ray's Jobs API and joins nothing.

job = submit(["train", "carracing-hour"], address="https://ray.example.org")
job.state(), job.logs(), job.stop()
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from oneira.platform.errors import ClusterError, OneiraError, UsageError, did_you_mean

from .supervisor import ENDED, Attempt, read_attempts, submit_attempt

ATTEMPTS = 6
STOP_SECONDS = 12  # that a job has to save and end before it is killed
PATIENCE_SECONDS = 60.0  # for which whoever follows a job asks again where the Jobs API fails
OVERDUE_SECONDS = 180.0  # after which nobody is expected to submit an attempt that was due
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,99}")
STATES = {"PENDING": "pending", "RUNNING": "running", "SUCCEEDED": "done", "FAILED": "failed", "STOPPED": "stopped"}
MOST_FILE = 50_000  # characters; it travels in a variable of the environment
NOT_AS_JOBS = ("submit", "jobs", "serve")


T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One of our jobs on a cluster."""

    id: str
    url: str

    def attempts(self) -> list[Attempt]:
        """Oldest first. Raises UsageError when the cluster knows no such job."""
        known = read_attempts(_asked(self.url, lambda client: client.list_jobs()))
        if self.id not in known:
            raise UsageError(f"There is no job '{self.id}' at {self.url}. {_hint(self.id, known)}")
        return known[self.id]

    def state(self) -> str:
        """pending, running, restarting (it died and is submitted again), done, failed or stopped."""
        return state_of(self.attempts())

    def logs(self) -> str:
        """What all attempts have written so far."""
        return "".join(_log(self.url, attempt) for attempt in self.attempts())

    def follow(self) -> Iterator[str]:
        """Pieces of the logs as they come, until the job has ended."""
        seen: dict[int, int] = {}
        told: set[int] = set()  # attempts that had ended when their log was read
        attempts = self.attempts()  # a wrong address or token is said at once
        while True:
            began = time.monotonic()
            for attempt in attempts:
                if attempt.number in told:
                    continue
                text = _log(self.url, attempt)
                if attempt.status in ENDED:
                    told.add(attempt.number)
                start = seen.get(attempt.number, 0)
                if len(text) > start:
                    seen[attempt.number] = len(text)
                    yield text[start:]
            if state_of(attempts) in ("done", "failed", "stopped"):
                return
            time.sleep(max(0.5, 5 * (time.monotonic() - began)))  # a log comes whole each time: a long one less often
            attempts = _patiently(self.attempts)

    def stop(self, seconds: float = 90.0) -> str:
        """Ends the job, which may save first, and returns its state. Raises ClusterError when it does not end in time."""
        end = time.monotonic() + seconds
        while (state := self.state()) in ("pending", "running", "restarting"):
            last = self.attempts()[-1]
            if last.status not in ENDED:
                _asked(self.url, lambda client, name=last.submission: client.stop_job(name))  # type: ignore[misc]
            if time.monotonic() > end:
                raise ClusterError(f"The job '{self.id}' is still {state} after {seconds:.0f} s.")
            time.sleep(0.3)
        return state

    def wait(self) -> int:
        """Waits for the end; the exit code of the last attempt, 1 where there is none."""
        state = self.state()
        while state in ("pending", "running", "restarting"):
            time.sleep(0.5)
            state = _patiently(self.state)
        return exit_code(state, _patiently(self.attempts))


def exit_code(state: str, attempts: Sequence[Attempt]) -> int:
    """Of a command that waits for a job."""
    code = attempts[-1].code
    return 0 if state == "done" else code if code is not None and 0 < code < 256 else 1


def state_of(attempts: Sequence[Attempt], now: float | None = None) -> str:
    """What `Job.state` says at a time, seconds since 1970; None: now.

    A job that died before it could see to it that a supervisor watches (its node went, its wheel could not be installed) has
    nobody who submits it again: once that is overdue it has failed.
    """
    last = attempts[-1]
    now = time.time() if now is None else now
    if last.again and (last.ended is None or now < last.due + OVERDUE_SECONDS):
        return "restarting"
    return STATES.get(last.status, last.status.lower())


def _patiently(ask: Callable[[], T]) -> T:
    """What is asked for, also where the Jobs API fails for a while: whoever follows a job must not end with one bad answer."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return ask()
        except ClusterError:
            if time.monotonic() > end:
                raise
        time.sleep(1.0)


def submit(
    arguments: Sequence[str], *, address: str | None = None, folder: str | Path | None = None, attempts: int = ATTEMPTS
) -> Job:
    """Submits a command line of Oneira's, without the word `oneira`.

    Args:
        address: as for `find_url`.
        folder: where on the cluster the command runs and its `runs/` are; every node must see it. None: this one.
        attempts: how often it is tried where it dies. What has ended on purpose, or was stopped, is not tried again.

    Raises:
        UsageError: a command that is none or cannot be a job. ClusterError: no cluster, or one that lets anybody in.
    """
    if attempts < 1:
        raise UsageError(f"attempts is {attempts}; it must be at least 1.")
    arguments = prepare(arguments)
    url = find_url(address)
    _must_ask_for_a_token(url)
    job = name_of(arguments)
    from ..connection import home, running
    from .entry import VARIABLE
    from .wheel import build_wheel

    place = Path(folder or Path.cwd())
    if not place.is_absolute():
        raise UsageError(f"The folder '{place}' must be absolute: it is a place on the cluster.")
    record = running() or {}
    head = record.get("address") if url == f"http://{record.get('dashboard')}" else None
    document = json.dumps(
        {"arguments": list(arguments), "folder": str(place), "head": head, "files": _files(arguments)}
    )
    environment = {
        "py_modules": [str(build_wheel(home() / "wheels"))],
        "env_vars": {VARIABLE: document, "ONEIRA_JOB_ID": job, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
    }
    _asked(url, lambda client: submit_attempt(client, job, 1, attempts, arguments, environment))
    return Job(job, url)


def list_jobs(address: str | None = None) -> list[tuple[str, list[Attempt]]]:
    """(id, attempts) of all jobs of ours that the cluster remembers, oldest first."""
    known = read_attempts(_asked(find_url(address), lambda client: client.list_jobs()))
    return sorted(known.items(), key=lambda pair: pair[1][0].started or 0.0)


def find_job(job: str, address: str | None = None) -> Job:
    """A job by its id. Raises UsageError for what cannot be one."""
    if not NAME.fullmatch(job):
        raise UsageError(f"'{job[:100]}' is no job's id: small letters, digits and - only. See: oneira jobs list")
    return Job(job, find_url(address))


# --- the command line ------------------------------------------------------------------------------------------------


def prepare(arguments: Sequence[str]) -> tuple[str, ...]:
    """The arguments as they are submitted. A wrong command line is refused here, and `train` gets the run that its attempts share.

    Raises:
        UsageError: no command, an unknown one, one that cannot be a job, or a wrong option, preset or setting.
    """
    import typer

    from oneira.platform import cli

    group: Any = typer.main.get_command(cli.app)
    known = sorted(set(group.commands) - set(NOT_AS_JOBS))
    if not arguments:
        raise UsageError(f"Nothing to submit. Allowed: {', '.join(known)}.")
    name, rest = arguments[0], list(arguments[1:])
    if name not in known:
        why = "cannot be a job" if name in NOT_AS_JOBS else "is no command"
        raise UsageError(f"'{name}' {why}. {did_you_mean(name, known)}")
    try:
        context = group.commands[name].make_context(name, list(rest), resilient_parsing=False)
    except typer.Exit:
        raise UsageError(f"'{name} {' '.join(rest)}' only prints help; run it here.") from None
    except Exception as error:
        if not hasattr(error, "format_message"):  # which the parser's own errors have
            raise
        raise UsageError(f"oneira {name}: {error.format_message()}") from None
    if name == "train":
        from oneira.platform.runs import new_path
        from oneira.platform.training import read_preset, read_settings

        given = context.params
        preset, _ = read_preset(given["preset"], read_settings(given["settings"] or []), given["smoke"])
        if given["run"] is None:
            rest += ["--run", f"{new_path(preset).name}-{secrets.token_hex(2)}"]
    return (name, *rest)


def _files(arguments: Sequence[str]) -> dict[str, str]:
    """What the command reads of this machine, which the cluster does not have: {argument: text} of `train FILE.toml`."""
    files = {}
    for argument in arguments[1:] if arguments[0] == "train" else ():
        if argument.endswith(".toml") and Path(argument).is_file():
            text = Path(argument).read_text(encoding="utf-8")
            if len(text) > MOST_FILE:
                raise UsageError(f"'{argument}' has {len(text)} characters; at most {MOST_FILE} travel with a job.")
            files[argument] = text
    return files


def name_of(arguments: Sequence[str]) -> str:
    """A new id, which says what it is: train-carracing-quick-20261125-093000-1f3a."""
    words = [word for word in arguments[:2] if not word.startswith("-")]
    what = re.sub(r"[^a-z0-9]+", "-", "-".join(Path(word).stem for word in words).lower()).strip("-")
    return f"{what[:60]}-{datetime.now().strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


# --- the cluster -----------------------------------------------------------------------------------------------------


def find_url(address: str | None = None) -> str:
    """The address of a cluster's Jobs API.

    Args:
        address: http(s)://HOST:PORT of it, or HOST:PORT of the head. None: RAY_ADDRESS, or the user's local cluster.

    Raises:
        ClusterError: nothing answers, or a local cluster runs without the Jobs API.
        UsageError: an address that would send the token in clear text over a network.
    """
    from .. import connection

    wanted = address or os.environ.get("RAY_ADDRESS") or None
    if wanted is None:
        record = connection.running()
        if record is None:
            raise ClusterError("No cluster is running here. Give its --address, or submit something: that starts one.")
        if not record.get("dashboard"):
            raise ClusterError(
                f"The local cluster of process {record['pid']} takes no jobs: it was started by another command. "
                "Wait for that, or give the --address of a cluster that does."
            )
        connection.use_local_settings()
        return f"http://{record['dashboard']}"
    if "://" not in wanted:
        return url_from_head(wanted)
    parts = urlsplit(wanted)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
        raise UsageError(
            f"'{wanted}' is no address of a Jobs API. Allowed: http://HOST:PORT, https://HOST:PORT, HOST:PORT."
        )
    url = f"{parts.scheme}://{parts.netloc}"
    _must_be_private(url)
    if connection.is_loopback(parts.hostname):
        connection.use_local_settings()
    return url


def url_from_head(head: str) -> str:
    """The address of the Jobs API that a cluster's head (HOST:PORT) knows of."""
    from .. import connection

    if connection.is_loopback(connection.host_of(head)):
        connection.use_local_settings()
    connection.must_answer(head)
    from ray.dashboard.utils import ray_address_to_api_server_url

    try:
        url = ray_address_to_api_server_url(head)
    except Exception as error:
        raise ClusterError(f"The cluster at {head} does not say where its Jobs API is: {error}") from error
    if url.rstrip("/") == "http:":
        raise ClusterError(f"The cluster at {head} takes no jobs: it was started without its dashboard.")
    _must_be_private(url)
    return url


def _must_be_private(url: str) -> None:
    """Refuses to send the token in clear text over a network, unless this process is on the cluster itself."""
    from .. import connection

    parts = urlsplit(url)
    inside = "RAY_RAYLET_PID" in os.environ  # in a process that Ray has started
    if parts.scheme == "http" and not inside and not connection.is_loopback(parts.hostname or ""):
        raise UsageError(
            f"{url} is reached without TLS, and the token would be read on the way. Allowed: https://, or a port forwarded to "
            f"this machine (ssh -L 8265:{parts.netloc} ..., kubectl port-forward), then --address http://127.0.0.1:8265."
        )


def _must_ask_for_a_token(url: str) -> None:
    """Raises ClusterError where the Jobs API lists its jobs to anybody: whoever reaches it owns the cluster (CVE-2023-48022)."""
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/api/jobs/"), timeout=10):
            pass
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return
        raise ClusterError(f"The Jobs API at {url} answers {error.code}.") from None
    except (OSError, ValueError) as error:
        raise ClusterError(f"No Jobs API answers at {url}: {getattr(error, 'reason', error)}.") from None
    raise ClusterError(
        f"The cluster at {url} takes jobs from anybody. Start it with RAY_AUTH_MODE=token; nothing was submitted."
    )


def client_at(url: str) -> Any:
    """Ray's own client. It would prefer RAY_ADDRESS to what it is told."""
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with _environment(RAY_API_SERVER_ADDRESS=url):
        return JobSubmissionClient(url)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _asked(url: str, question: Any) -> Any:
    """question(client), with what Ray raises as an error of ours in one line."""
    from ray.exceptions import AuthenticationError

    try:
        return question(client_at(url))
    except OneiraError:
        raise
    except AuthenticationError:
        raise ClusterError(
            f"The cluster at {url} refuses this user's token. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file with it."
        ) from None
    except (RuntimeError, OSError, ValueError) as error:
        line = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        raise ClusterError(f"The Jobs API at {url} failed: {line.strip()[:300]}") from error


def _log(url: str, attempt: Attempt) -> str:
    try:
        return _asked(url, lambda client: client.get_job_logs(attempt.submission))
    except ClusterError:  # with its node, or not begun
        return "" if attempt.status not in ENDED else f"(the log of {attempt.submission} is gone with its node)\n"


def _hint(job: str, known: Any) -> str:
    return did_you_mean(job, known) if known else "It has none of Oneira's."
