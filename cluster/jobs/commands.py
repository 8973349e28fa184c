"""`oneira submit` and `oneira jobs list|status|logs|stop`."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Annotated, Any

import typer

from oneira.platform.console import json_on_stdout, print_table
from oneira.platform.errors import UsageError

from .client import ATTEMPTS

jobs = typer.Typer(help="Look after what was submitted.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]
Address = Annotated[
    str | None, typer.Option(metavar="ADDR", help="https://HOST:PORT of the Jobs API, or HOST:PORT of the head.")
]
Id = Annotated[str, typer.Argument(metavar="ID", help="As `oneira jobs list` shows it.")]


def register(app: typer.Typer) -> None:
    """Adds `submit` and `jobs`."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
    app.command(context_settings=settings)(submit)
    app.add_typer(jobs, name="jobs")


def submit(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="COMMAND ARGS...", help="What stands behind `oneira`.")
    ] = None,
    address: Address = None,
    folder: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Where on the cluster it runs; all nodes see it. Default: this one."),
    ] = None,
    attempts: Annotated[int, typer.Option(min=1, max=1000, help="How often it is tried where it dies.")] = ATTEMPTS,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show its output until it ends, and end with its code.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Submit any command to a Ray cluster, where it goes on by itself and is tried again if it dies.

    Options of `submit` stand before the command. Without an address it goes to the local cluster; where none runs, one is
    started, and this command stays until the job is done.
    """
    from . import client

    words = [*(arguments or []), *context.args]
    with json_on_stdout(as_json) as emit:
        client.prepare(words)  # a wrong one must not start a cluster
        owned = _start_where_needed(address)
        try:
            job = client.submit(words, address=address, folder=folder, attempts=attempts)
            print(f"{job.id}", flush=True)
            print(f"Its output: oneira jobs logs {job.id} --follow", file=sys.stderr, flush=True)
            if owned or follow:
                for piece in job.follow():
                    print(piece, end="", file=sys.stderr if as_json else sys.stdout, flush=True)
            row = _row(job.id, job.attempts())
            emit(row)
        finally:
            if owned:
                from ..connection import disconnect

                disconnect()
    if (owned or follow) and row["exit_code"]:
        raise typer.Exit(row["exit_code"])


def _start_where_needed(address: str | None) -> bool:
    """Starts a local cluster that takes jobs, where no address is given and none runs. Whether it did."""
    import os

    from ..connection import connect, running

    if address or os.environ.get("RAY_ADDRESS") or running() is not None:
        return False
    print("No cluster is running here: starting one, which ends with this command.", file=sys.stderr, flush=True)
    connect(jobs=True)
    return True


def _row(job: str, attempts: list[Any]) -> dict[str, Any]:
    from .client import exit_code, state_of

    last, state = attempts[-1], state_of(attempts)
    return {
        "id": job,
        "command": ["oneira", *last.arguments],
        "state": state,
        "attempt": last.number,
        "attempts": last.attempts,
        "started": _time(attempts[0].started),
        "ended": None if state == "restarting" else _time(last.ended),
        "exit_code": None if state in ("pending", "running", "restarting") else exit_code(state, attempts),
        "message": " ".join(last.message.split())[:500],
    }


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds).isoformat(timespec="seconds")


@jobs.command("list")
def list_(address: Address = None, as_json: Json = False) -> None:
    """List the jobs that the cluster remembers."""
    from .client import list_jobs

    with json_on_stdout(as_json) as emit:
        rows = [_row(job, attempts) for job, attempts in list_jobs(address)]
        emit({"jobs": rows})
        columns = ["id", "state", "attempt", "started", "ended"]
        if rows:
            print_table(columns, [[row[column] for column in columns] for row in rows])
        else:
            print("There are no jobs. Submit one: oneira submit train carracing-quick")


@jobs.command()
def status(job: Id, address: Address = None, as_json: Json = False) -> None:
    """Show one job."""
    from .client import find_job

    with json_on_stdout(as_json) as emit:
        found = find_job(job, address)
        row = _row(found.id, found.attempts())
        emit(row)
        for key, value in row.items():
            print(f"{key}: {' '.join(value) if isinstance(value, list) else value}")


@jobs.command()
def logs(
    job: Id,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends.")] = False,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Print what a job has written."""
    from .client import find_job

    if follow and as_json:
        raise UsageError("--follow and --json exclude each other: one document has an end.")
    with json_on_stdout(as_json) as emit:
        found = find_job(job, address)
        if follow:
            for piece in found.follow():
                print(piece, end="", flush=True)
            return
        text = found.logs()
        emit({"id": found.id, "logs": text})
        print(text, end="")


@jobs.command()
def stop(job: Id, address: Address = None, as_json: Json = False) -> None:
    """End a job; it saves first, and `oneira resume` goes on with its run."""
    from .client import find_job

    with json_on_stdout(as_json) as emit:
        found = find_job(job, address)
        state = found.stop()
        print(f"{found.id}: {state}")
        emit({"id": found.id, "state": state})
