"""What a job runs on the cluster: an Oneira command, given as an argument vector in the environment, so that no shell reads it."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ENTRYPOINT = "exec python -m oneira.cluster.jobs.entry"  # all that the shell of Ray's Jobs API ever sees
# {"arguments": [...], "folder": where the command runs, "head": HOST:PORT or null, "files": {argument: text}}
VARIABLE = "ONEIRA_JOB"


def main() -> None:
    """Sees to it that a supervisor watches, then is the command `oneira`, in the folder of the job."""
    job = json.loads(os.environ[VARIABLE])
    if job.get("head"):  # Ray names the cluster that was started last on this machine, which may be another
        os.environ["RAY_ADDRESS"] = job["head"]
    from ..connection import connect
    from .supervisor import ensure_supervisor

    connect()
    ensure_supervisor()  # before anything that may fail: it is what tries again
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    sys.argv = ["oneira", *with_files(job["arguments"], job.get("files", {}))]
    from oneira.platform.cli import main as command

    command()


def with_files(arguments: Sequence[str], files: Mapping[str, str]) -> list[str]:
    """The arguments, with paths on this machine in the place of those that name a file of the submitter's."""
    paths = {}
    for argument, text in files.items():
        place = Path(tempfile.mkdtemp(prefix="oneira-job-")) / Path(argument).name
        place.write_text(text, encoding="utf-8")
        paths[argument] = str(place)
    return [paths.get(argument, argument) for argument in arguments]


if __name__ == "__main__":
    main()
