from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from oneira.platform import runs as module
from oneira.platform.errors import ConfigError, DataError, UsageError
from oneira.platform.runs import Run, require_same_config

TOY = Path(__file__).parent / "toy"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.syspath_prepend(str(TOY))
    monkeypatch.chdir(tmp_path)
    import oneira_toy

    return oneira_toy


def test_a_run_is_found_by_path_and_by_name(toy, tmp_path: Path) -> None:
    config = toy.Toy(seed=9, count=toy.Counting(to=3))
    made = Run.create(tmp_path / "runs/mine", "toy", config, ["oneira", "train"], smoke=True)
    for where in ("mine", "runs/mine", tmp_path / "runs/mine", "./runs/mine"):
        opened = Run.open(where)
        assert (opened.path, opened.preset, opened.config, opened.smoke) == (made.path, "toy", config, True)
    document = json.loads((made.path / "config.json").read_text())
    assert document["preset"] == "toy" and document["smoke"] is True and document["config"]["count"]["to"] == 3
    with pytest.raises(UsageError, match=r"no run 'mini'\. Did you mean 'mine'"):
        Run.open("mini")


def test_provenance_says_on_what_it_ran(toy, tmp_path: Path) -> None:
    run = Run.create("r", "toy", toy.Toy(), ["oneira", "train", "toy"])
    run.mark_started(["oneira", "resume", "r"])
    found = run.provenance()
    assert found["command"] == ["oneira", "train", "toy"] and found["seeds"] == {"seed": 1}
    assert [start["command"][1] for start in found["started"]] == ["train", "resume"]
    assert {"cpu", "cores", "memory_gib", "device", "precision", "threads"} <= set(found["machine"])
    assert found["versions"]["python"] == sys.version.split()[0]
    assert all(found["versions"][name] for name in ("torch", "gymnasium", "numba", "numpy"))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"preset": "toy"}', '{"preset": "absent", "smoke": false, "config": {}}']
)
def test_foreign_and_broken_folders_are_refused(toy, tmp_path: Path, content: str) -> None:
    (tmp_path / "runs/x").mkdir(parents=True)
    with pytest.raises(DataError, match="not a run"):
        Run.open("x")
    (tmp_path / "runs/x/config.json").write_text(content)
    with pytest.raises(DataError):
        Run.open("x")


def test_a_new_run_does_not_touch_other_things(toy, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("x")
    with pytest.raises(DataError, match="not a run"):
        Run.create(tmp_path / "full", "toy", toy.Toy())
    with pytest.raises(DataError, match="not a run"):
        Run.create(tmp_path / "full/thesis.tex", "toy", toy.Toy())
    run = Run.create(tmp_path / "new", "toy", toy.Toy())
    with pytest.raises(DataError, match="already holds a run"):
        Run.create(run.path, "toy", toy.Toy())


def test_another_config_is_shown(toy) -> None:
    run = Run.create("r", "toy", toy.Toy())
    require_same_config(run, "toy", toy.Toy())
    with pytest.raises(ConfigError, match="seed: 1 in the run, 2 asked for"):
        require_same_config(run, "toy", toy.Toy(seed=2))
    with pytest.raises(ConfigError, match="preset: 'toy' in the run, 'other' asked for"):
        require_same_config(run, "other", toy.Toy())


def test_metrics_of_a_killed_and_resumed_run(toy) -> None:
    run = Run.create("r", "toy", toy.Toy())
    run.log("fit", 1, loss=1.0)
    run.log("fit", 2, loss=np.float32(0.5), kind="a")
    run.log("evolve", 1, best=np.int64(3))
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"time": 1, "stage": "fit", "st')  # killed here
    again = Run.open("./r")
    again.log("fit", 2, loss=0.25)
    again.log("fit", 3, loss=float("nan"))
    assert [(line["step"], line["loss"]) for line in again.metrics("fit")][:2] == [(1, 1.0), (2, 0.25)]
    assert [line["stage"] for line in again.metrics()] == ["fit", "fit", "evolve", "fit"]
    assert again.metrics("evolve")[0]["best"] == 3 and Run.open("./r").metrics("none") == []
    with pytest.raises(TypeError, match="list"):
        run.log("fit", 4, loss=[1])


def test_tensorboard_reads_what_was_logged(toy) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run.create("r", "toy", toy.Toy())
    for step in range(4):
        run.log("fit", step, loss=1.0 / (step + 1), total=4)
    run.export_tensorboard()
    events = EventAccumulator(str(run.export_tensorboard())).Reload()
    assert events.Tags()["scalars"] == ["fit/loss"]
    assert [event.step for event in events.Scalars("fit/loss")] == [0, 1, 2, 3]
    assert [event.value for event in events.Scalars("fit/loss")] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])


def test_places_are_made(toy) -> None:
    run = Run.create("r", "toy", toy.Toy())
    run.media("real/drive.mp4").write_bytes(b"")
    run.data("latents").mkdir()
    assert run.media("real/drive.mp4").parent.name == "real"


def test_two_runs_in_the_same_second_have_different_names(toy) -> None:
    first = Run.create(module.new_path("toy"), "toy", toy.Toy())
    second = Run.create(module.new_path("toy"), "toy", toy.Toy())
    assert first.path != second.path
    assert {run.name for run in (first, second)} == {folder.name for folder in module.runs_folder()}


def test_the_commit_of_a_foreign_checkout_is_not_taken_for_ours(tmp_path: Path, monkeypatch) -> None:
    def checkout(folder: Path) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()

    place = tmp_path / "site" / "oneira" / "platform" / "runs.py"
    place.parent.mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(place))
    checkout(tmp_path)
    foreign = module.source()
    assert foreign["version"] == module.versions()["oneira"] and foreign["commit"] is foreign["changed"] is None
    mine = checkout(tmp_path / "site" / "oneira")
    assert (module.source()["commit"], module.source()["changed"]) == (mine, False)


def test_a_run_of_others_that_may_only_be_read_is_listed(toy, monkeypatch) -> None:
    run = Run.create("r", "toy", toy.Toy())

    def refuse(path: Path, tries: int) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "_lock", refuse)
    assert run.state() == "unknown"
    run.write_summary({})
    assert run.state() == "done"


def test_every_start_says_on_which_machine_and_in_which_precision(toy) -> None:
    run = Run.create("r", "toy", toy.Toy())
    run.mark_started(["oneira", "resume", "r"])
    starts = run.provenance()["started"]
    assert len(starts) == 2 and all(start["machine"]["precision"] in ("bf16", "fp32") for start in starts)
    from oneira.platform.presets import load_preset

    moons = Run.create("m", "realnvp-moons", load_preset("realnvp-moons"))  # whose training is set to fp32
    assert moons.provenance()["machine"]["precision"] == "fp32"


def test_what_a_killed_process_left_is_removed(toy) -> None:
    run = Run.create("r", "toy", toy.Toy())
    for name in (".model-0a1b", ".tensorboard-7"):
        (run.path / name).mkdir()
    run.media("a.png")
    run.clean()
    assert {place.name for place in run.path.iterdir() if place.is_dir()} == {"media"}
