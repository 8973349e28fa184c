"""What is said while work goes on: plain lines for people, or with ONEIRA_LOG=json one JSON object a line for collectors.

{"time": "2026-11-25T10:30:00.123+00:00", "event": "progress", "job": "train-...", "run": "carracing-quick", "stage": "evolve", ...}

`job` is ONEIRA_JOB_ID, where that is set; `run` is the run that this process trains.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from typing import Any

about: dict[str, str] = {}  # what every line of this process is about: {"run": name}


def in_json() -> bool:
    """Whether lines are JSON."""
    return os.environ.get("ONEIRA_LOG", "").lower() == "json"


def say(event: str, text: str, **fields: Any) -> None:
    """One line on stderr: `text`, or in JSON the event with its fields and `message`, which is the text."""
    if in_json():
        print(json_line(event, message=text, **fields), file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def json_line(event: str, **fields: Any) -> str:
    """The line in JSON. Fields that are None are left out; what JSON does not know becomes text."""
    from .console import json_finite

    job = os.environ.get("ONEIRA_JOB_ID")
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = {"time": now, "event": event, **({"job": job} if job else {}), **about}
    line |= {key: value for key, value in fields.items() if value is not None}
    return json.dumps(json_finite(line), ensure_ascii=False, default=str)
