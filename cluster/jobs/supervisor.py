"""The actor that submits again what died. There is one a cluster, and it may die as well.

A job of Ray runs once and ends with its node. Oneira's job is a row of these: its attempts `ID.1`, `ID.2`, ..., each the same
command, which goes on from the run's last checkpoint. What the supervisor knows is what the Jobs API lists, so a new
one goes on where the old one was, and two of them submit one attempt once: Ray takes each name once only.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

NAME = "supervisor"
SECONDS_BETWEEN_LOOKS = 1.0
LONGEST_PAUSE = 30.0  # seconds between the end of an attempt and the next
FINAL_CODES = (
    0,
    2,
    3,
)  # of Oneira's commands: done, wrong usage, bad data. Another try changes none; 4 may be the cluster
JOB, ATTEMPT, ATTEMPTS, COMMAND = "oneira_job", "oneira_attempt", "oneira_attempts", "oneira_command"  # metadata
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One of Ray's jobs, which is an attempt of one of ours. Times are seconds since 1970."""

    job: str
    number: int
    attempts: int
    arguments: tuple[str, ...]
    status: str  # Ray's: PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED
    started: float | None
    ended: float | None
    code: int | None
    message: str
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def submission(self) -> str:
        return f"{self.job}.{self.number}"

    @property
    def again(self) -> bool:
        """Whether another attempt follows."""
        return self.status == "FAILED" and self.code not in FINAL_CODES and self.number < self.attempts

    @property
    def due(self) -> float:
        """When the next attempt is to be submitted; they come less and less often."""
        return (self.ended or 0.0) + min(2.0 ** (self.number - 1), LONGEST_PAUSE)


def read_attempts(details: Iterable[Any]) -> dict[str, list[Attempt]]:
    """{our job: its attempts, oldest first} of what the Jobs API lists; jobs of others are passed over."""
    found: dict[str, list[Attempt]] = {}
    for detail in details:
        metadata = detail.metadata or {}
        with suppress(KeyError, ValueError, TypeError):
            attempt = Attempt(
                job=metadata[JOB], number=int(metadata[ATTEMPT]), attempts=int(metadata[ATTEMPTS]),
                arguments=tuple(json.loads(metadata[COMMAND])), status=str(getattr(detail.status, "value", detail.status)),
                started=_seconds(detail.start_time), ended=_seconds(detail.end_time), code=detail.driver_exit_code,
                message=detail.message or "", environment=detail.runtime_env or {},
            )  # fmt: skip
            if detail.submission_id == attempt.submission:
                found.setdefault(attempt.job, []).append(attempt)
    return {job: sorted(attempts, key=lambda attempt: attempt.number) for job, attempts in sorted(found.items())}


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def submit_attempt(
    client: Any, job: str, number: int, attempts: int, arguments: Iterable[str], environment: Any
) -> str:
    """Submits one attempt and returns its name. Raises RuntimeError where that name is taken, as Ray does."""
    from .entry import ENTRYPOINT

    metadata = {JOB: job, ATTEMPT: str(number), ATTEMPTS: str(attempts), COMMAND: json.dumps(list(arguments))}
    return client.submit_job(
        entrypoint=ENTRYPOINT, submission_id=f"{job}.{number}", runtime_env=dict(environment), metadata=metadata
    )


def look(client: Any, now: float) -> list[str]:
    """Submits again what died and is due; returns the names of what was submitted."""
    submitted = []
    for attempts in read_attempts(client.list_jobs()).values():
        last = attempts[-1]
        if last.again and now >= last.due:
            with suppress(RuntimeError):  # another supervisor was faster
                following = last.number + 1
                submitted.append(
                    submit_attempt(client, last.job, following, last.attempts, last.arguments, last.environment)
                )
    return submitted


class Supervisor:
    """The actor. Its loop begins when it is made, so that it goes on by itself after Ray has started it again."""

    def __init__(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def pid(self) -> int:
        """Of the actor's process."""
        return os.getpid()

    def _watch(self) -> None:
        client = None
        while True:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            try:
                client = client or _inside_client()
                look(client, time.time())
            except Exception as error:  # the head may be away for a while
                print(f"supervisor: {type(error).__name__}: {error}", flush=True)
                client = None


def _inside_client() -> Any:
    import ray

    from .client import client_at, url_from_head

    return client_at(url_from_head(ray.get_runtime_context().gcs_address))


def ensure_supervisor() -> Any:
    """The cluster's supervisor, started if there is none. It stays when the job that started it ends, and is started again
    where its process or node dies."""
    import ray

    from ..connection import NAMESPACE

    options: dict[str, Any] = {"name": NAME, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    return ray.remote(Supervisor).options(num_cpus=0, max_restarts=-1, **options).remote()
