"""Lines for people, and the same lines for machines."""

from __future__ import annotations

import json

import pytest

from oneira.platform import logs
from oneira.platform.checkpoints import warn
from oneira.platform.cli import run_command
from oneira.platform.console import Progress


@pytest.fixture
def lines(monkeypatch, capsys):
    monkeypatch.setenv("ONEIRA_LOG", "json")
    monkeypatch.setenv("ONEIRA_JOB_ID", "train-1")
    monkeypatch.setattr(logs, "about", {"run": "mine"})
    return lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_every_line_says_which_job_and_run_it_is_about(lines):
    warn("a checkpoint is damaged")
    assert run_command(["resume", "no-such-run"]) == 2
    warning, error = lines()
    assert (warning["event"], warning["job"], warning["run"]) == ("warning", "train-1", "mine")
    assert error["event"] == "error" and error["exit_code"] == 2 and "no-such-run" in error["message"]


def test_progress_has_its_numbers_as_numbers(lines, tmp_path):
    file = tmp_path / "metrics.jsonl"
    with Progress(file):
        stage = {"stage": "fit", "total": 2}
        file.write_text(
            "".join(json.dumps({"time": t, "step": t, "loss": float("nan"), **stage}) + "\n" for t in (1, 2))
        )
    last = lines()[-1]
    assert (last["event"], last["stage"], last["step"], last["total"], last["loss"]) == ("progress", "fit", 2, 2, None)


def test_people_get_plain_text(monkeypatch, capsys):
    monkeypatch.delenv("ONEIRA_LOG", raising=False)
    logs.say("warning", "plain", step=3)
    assert capsys.readouterr().err == "plain\n"


def test_odd_values_are_still_one_line_of_json():
    line = logs.json_line("x", text="two\nlines", number=float("inf"), thing=object(), missing=None)
    document = json.loads(line)
    assert (
        "\n" not in line and document["number"] is None and "missing" not in document and "object" in document["thing"]
    )
