"""The command line as a user has it: exit codes, stdout and stderr. The preset is another package's (`toy/`)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from oneira.platform.cli import run_command

TOY = Path(__file__).parent / "toy"


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "oneira.platform.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(TOY), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def oneira(folder: Path, *arguments: str, code: int = 0, **environment: str) -> tuple[str, str]:
    process = start(folder, *arguments, **environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, (process.returncode, out, err)
    return out, err


def test_help_names_all_commands_and_imports_nothing_heavy(tmp_path: Path) -> None:
    out, _ = oneira(tmp_path, "--help")
    for command in ("train", "resume", "report", "runs", "doctor", "greet"):
        assert f"\n  {command} " in out
    script = (
        "import sys\nfrom oneira.platform import cli\ncli.add_commands()\ncli.run_command(['--help'])\n"
        "heavy = {'torch', 'ray', 'numba', 'gymnasium', 'numpy', 'matplotlib', 'cv2', 'cma'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(TOY)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, capture_output=True)


def test_commands_of_other_packages_work_and_a_broken_one_takes_nothing_away(tmp_path: Path) -> None:
    assert oneira(tmp_path, "greet", "Ada")[0] == "hello Ada\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["trian"], 2, ["trian", "train"]),
        (["train"], 2, ["PRESET"]),
        (["train", "to"], 2, ["Unknown preset 'to'", "Did you mean 'toy'", " more."]),
        (["train", "toy", "--set", "count.two=3"], 2, ["count.two", "Did you mean 'to'"]),
        (["train", "toy", "--set", "count.to=x"], 2, ["count.to", "int", "'x'"]),
        (["train", "toy", "--set", "count.to=0"], 2, ["at least 1"]),
        (["train", "toy", "--set", "count"], 2, ["KEY=VALUE"]),
        (["train", "toy", "--executor", "seral"], 2, ["Unknown executor", "Did you mean 'serial'"]),
        (["train", "toy", "--executor", "serial", "--address", "auto"], 2, ["serial", "--address"]),
        (["train", "absent.toml"], 2, ["absent.toml"]),
        (["train", "needs-more"], 4, ["a_module_that_is_absent", "not installed"]),
        (["resume", "nothing"], 2, ["no run 'nothing'"]),
        (["resume", "."], 3, ["is not a run"]),
        (["train", "toy", "--executor", "serial", "--set", "fail=CheckpointError"], 3, ["as was asked for"]),
        (["train", "toy", "--executor", "serial", "--set", "fail=ClusterError"], 4, ["as was asked for"]),
        (["train", "toy", "--executor", "serial", "--set", "fail=ValueError"], 1, ["ValueError", "ONEIRA_DEBUG"]),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: list[str],
) -> None:
    monkeypatch.syspath_prepend(str(TOY))
    monkeypatch.chdir(tmp_path)
    assert run_command(arguments) == code
    out, err = capsys.readouterr()
    last = err.rstrip("\n").split("\n")[-1]
    assert out == "" and "Traceback" not in err
    assert last.startswith("oneira: ") and all(word in last for word in words), err
    # What made nothing leaves no run behind; after an error that nobody foresaw it may be looked at.
    assert any((tmp_path / "runs").glob("*")) == (code == 1)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    _, err = oneira(tmp_path, "train", "to", code=2, ONEIRA_DEBUG="1")
    assert "Traceback" in err and "UsageError" in err


def test_train_resume_report_runs_with_json(tmp_path: Path) -> None:
    train = ["train", "toy", "--executor", "serial", "--run", "mine", "--set", "seed=3", "--json"]
    out, err = oneira(tmp_path, *train)
    document = json.loads(out)
    assert document["summary"] == {"total": 45, "from": 0, "never": None} and document["preset"] == "toy"
    assert "a library that talks" in err and "a program that talks" in err  # kept away from stdout
    assert Path(document["run"]) == tmp_path / "runs" / "mine" and Path(document["report"]).is_file()

    assert json.loads(oneira(tmp_path, *train)[0])["summary"]["from"] == 5  # the same config goes on
    resumed = json.loads(oneira(tmp_path, "resume", "mine", "--executor", "serial", "--json")[0])
    assert resumed["summary"]["total"] == 45
    by_path = json.loads(oneira(tmp_path, "report", "runs/mine", "--json")[0])
    assert Path(by_path["report"]).read_text().startswith("<!doctype html>")
    (row,) = json.loads(oneira(tmp_path, "runs", "--json")[0])["runs"]
    expected = {"name": "mine", "preset": "toy", "state": "done", "stage": "count", "step": 5, "smoke": False}
    assert expected.items() <= row.items() and row["summary"]["total"] == 45
    assert "mine" in oneira(tmp_path, "runs")[0]
    provenance = json.loads((tmp_path / "runs/mine/provenance.json").read_text())
    assert provenance["seeds"] == {"seed": 3} and len(provenance["started"]) == 3
    assert list((tmp_path / "runs/mine/tensorboard").glob("events*"))


def test_another_config_on_an_existing_run_shows_the_difference(tmp_path: Path) -> None:
    oneira(tmp_path, "train", "toy", "--executor", "serial", "--run", "mine")
    _, err = oneira(tmp_path, "train", "toy", "--executor", "serial", "--run", "mine", "--set", "count.to=9", code=2)
    assert "count.to: 5 in the run, 9 asked for" in err


def test_toml_smoke_and_settings(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text('preset = "toy"\nseed = 4\n[count]\nto = 3\n')
    out, _ = oneira(tmp_path, "train", "my.toml", "--executor", "serial", "--json")
    assert json.loads(out)["summary"]["total"] == 0 + 1 + 4 + 3 * 4
    name = Path(json.loads(out)["run"]).name
    assert name.startswith("toy-2") and len(name) == len("toy-20000101-000000")
    out, _ = oneira(tmp_path, "train", "my.toml", "--smoke", "--executor", "serial", "--set", "seed=0", "--json")
    assert json.loads(out)["summary"]["total"] == 1
    (tmp_path / "bad.toml").write_text('preset = "toy"\n[count]\ntoo = 3\n')
    _, err = oneira(tmp_path, "train", "bad.toml", code=2)
    assert "bad.toml" in err and "Did you mean 'to'" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_exits_75_and_resume_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    process = start(
        tmp_path,
        "train",
        "toy",
        "--executor",
        "serial",
        "--run",
        "mine",
        "--set",
        "count.seconds=0.3",
        "--set",
        "count.to=8",
    )
    assert process.stderr is not None
    while "count" not in (line := process.stderr.readline()):
        assert line, "ended before it began to count"
    busy = oneira(tmp_path, "resume", "mine", "--executor", "serial", code=2)[1]
    assert "Another process" in busy
    assert json.loads(oneira(tmp_path, "runs", "--json")[0])["runs"][0]["state"] == "running"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "oneira resume mine" in err.strip().split("\n")[-1]
    assert json.loads(oneira(tmp_path, "runs", "--json")[0])["runs"][0]["state"] == "stopped"
    out, _ = oneira(tmp_path, "resume", "mine", "--executor", "serial", "--json")
    assert json.loads(out)["summary"]["from"] > 0 and json.loads(out)["summary"]["total"] == 140 + 8


def test_progress_off_a_terminal_is_plain_lines(tmp_path: Path) -> None:
    _, err = oneira(tmp_path, "train", "toy", "--executor", "serial")
    lines = [line.split("  ", 1)[1] for line in err.split("\n") if line[2:3] == ":"]
    assert lines[0].startswith("count") and "begins, 5 steps" in lines[0]
    assert "done" in lines[-1] and "5/5" in lines[-1] and "value 35" in lines[-1]


def test_doctor(tmp_path: Path) -> None:
    document = json.loads(oneira(tmp_path, "doctor", "--json")[0])
    assert document["ok"] and {"torch", "carracing", "presets: toy"} <= {check["name"] for check in document["checks"]}
    assert "oneira_toy_that_is_absent" in document["skipped"]["broken"]


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    command = f"'{sys.executable}' -m oneira.platform.cli runs | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr and done.stdout.split()[-1] == "0"


def test_a_workers_traceback_is_shown_above_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    from oneira.platform.cli import _explain
    from oneira.platform.executor import SerialExecutor

    with SerialExecutor() as executor, pytest.raises(RuntimeError) as caught:
        executor.submit(_breaks, None, {}).result()
    assert _explain(caught.value) == 1  # type: ignore[arg-type]
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "oneira: UnitFailed: A unit of work failed: KeyError: 'lost'"
    assert any("in _breaks" in line for line in lines[:-1])


def _breaks(shared: object, unit: object) -> object:
    raise KeyError("lost")
