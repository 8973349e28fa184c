"""One run, one folder: its config, provenance, metrics, checkpoints, data, pictures and report.

config.json       {"preset", "smoke", "config"}; what makes a folder a run, written first and never changed
provenance.json   command, version, commit, seeds, machine, library versions, and every time the run was started
metrics.jsonl     one JSON object a line: {"time", "stage", "step", ...}
checkpoints/  data/  media/  tensorboard/  report.html  summary.json
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from .checkpoints import Checkpoints, json_bytes, make_folder, plain, write_replacing
from .config import flatten, from_dict, to_dict
from .devices import describe
from .errors import ConfigError, DataError, UsageError, did_you_mean
from .presets import load_preset

RUNS = Path("runs")
MOST_SHOWN = 5  # differences of a config that an error names
LIBRARIES = (
    "oneira",
    "torch",
    "numpy",
    "gymnasium",
    "box2d",
    "numba",
    "cma",
    "ray",
    "opencv-python-headless",
    "vizdoom",
)


class Run:
    """A run's folder, open. Make one with `Run.create` or `Run.open`."""

    def __init__(self, path: Path, preset: str, config: Any, smoke: bool):
        self.path = path
        self.preset = preset
        self.config = config
        self.smoke = smoke
        self.checkpoints = Checkpoints(path / "checkpoints")
        self._metrics_descriptor: int | None = None

    @classmethod
    def create(
        cls, path: str | Path, preset: str, config: Any, command: Sequence[str] = (), smoke: bool = False
    ) -> Run:
        """Makes the folder of a new run.

        Raises:
            DataError: there is a run already, or a folder with other things in it.
        """
        path = Path(path).absolute()
        if (path / "config.json").exists():
            raise DataError(f"'{path}' already holds a run.")
        if path.exists() and (not path.is_dir() or any(not entry.name.startswith(".") for entry in path.iterdir())):
            raise DataError(f"'{path}' exists and is not a run; a new run needs a new or empty folder.")
        document = {"preset": preset, "smoke": smoke, "config": to_dict(config)}
        try:
            make_folder(path)
            write_replacing(path / "config.json", json_bytes(document))
        except OSError as error:
            raise DataError(f"Cannot make a run in '{path}': {error.strerror or error}.") from error
        run = cls(path, preset, config, smoke)
        run.mark_started(command)
        return run

    @classmethod
    def open(cls, path_or_name: str | Path) -> Run:
        """Opens a run by its folder's path, or by its name in `runs/`.

        Raises:
            UsageError: there is no such folder; the message gives the nearest name.
            DataError: the folder is not a run, or its config cannot be read.
        """
        path = find_run(path_or_name)
        try:
            document = json.loads((path / "config.json").read_text(encoding="utf-8"))
            preset, smoke, values = document["preset"], document["smoke"], document["config"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"'{path}' is not a run: its config.json cannot be read ({error}).") from error
        try:
            config = from_dict(type(load_preset(preset)), values)
        except UsageError as error:
            raise DataError(f"The config of the run '{path}' does not fit this version of Oneira: {error}") from error
        return cls(path, preset, config, smoke)

    @property
    def name(self) -> str:
        return self.path.name

    # ---- provenance

    def mark_started(self, command: Sequence[str]) -> None:
        """Adds a start to provenance.json, with the machine it is on; the first also writes down what is the same for all."""
        place, about = self.path / "provenance.json", self._describe()
        try:
            provenance = json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            provenance = {"command": list(command), **about, "started": []}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        start = {"time": now, "command": list(command), **source(), "machine": about["machine"]}
        provenance["started"].append(start)
        write_replacing(place, json_bytes(plain(provenance, "provenance")))

    def _describe(self) -> dict[str, Any]:
        settings, machine = flatten(to_dict(self.config)), describe()
        asked = [value for key, value in settings.items() if key.rpartition(".")[2] == "precision"]
        used = [machine["precision"] if value == "auto" else value for value in asked]
        return {
            "preset": self.preset,
            **source(),
            "seeds": {
                key: value for key, value in settings.items() if key.rpartition(".")[2].endswith(("seed", "seeds"))
            },
            "machine": {
                **machine,
                "precision": " and ".join(dict.fromkeys(used or [machine["precision"]])),
                "memory_gib": memory_gib(),
                "system": sys.platform,
            },
            "versions": {"python": sys.version.split()[0], **versions()},
        }

    def provenance(self) -> dict[str, Any]:
        """What provenance.json holds."""
        try:
            return json.loads((self.path / "provenance.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"'{self.path}/provenance.json' cannot be read: {error}") from error

    # ---- metrics

    def log(self, stage: str, step: int, **values: float | int | str) -> None:
        """Appends one line to metrics.jsonl.

        For the display of progress, `total=N` is the number of steps of the stage, and `at=n` how many of them are done
        where `step` itself does not say it (because it counts on over several rounds).
        """
        line = {"time": round(time.time(), 3), "stage": stage, "step": int(step)}
        line |= {key: _scalar(value) for key, value in values.items()}
        try:
            if self._metrics_descriptor is None:
                self._metrics_descriptor = _open_lines(self.path / "metrics.jsonl")
            data = json.dumps(line).encode() + b"\n"
            if os.write(self._metrics_descriptor, data) < len(data):
                raise OSError(28, "No space left on device")
        except OSError as error:
            raise DataError(f"Cannot write '{self.path}/metrics.jsonl': {error.strerror or error}.") from error

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """All lines, or one stage's, in the order written. Of lines with the same stage and step the later counts."""
        lines: dict[tuple[str, int], dict[str, Any]] = {}
        for line in read_lines(self.path / "metrics.jsonl"):
            if stage is None or line["stage"] == stage:
                lines[line["stage"], line["step"]] = line
        return list(lines.values())

    def export_tensorboard(self) -> Path:
        """Writes TensorBoard's event files from metrics.jsonl, anew, and returns their folder."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder, writing = self.path / "tensorboard", self.path / f".tensorboard-{os.getpid()}"
        shutil.rmtree(writing, ignore_errors=True)
        writer = EventFileWriter(str(writing))
        for line in self.metrics():
            values = [
                Summary.Value(tag=f"{line['stage']}/{key}", simple_value=value)
                for key, value in line.items()
                if key not in ("time", "step", "at", "total") and type(value) in (int, float)
            ]
            writer.add_event(Event(wall_time=line["time"], step=line["step"], summary=Summary(value=values)))
        writer.close()
        shutil.rmtree(folder, ignore_errors=True)
        writing.rename(folder)
        return folder

    # ---- places

    def media(self, name: str) -> Path:
        """The path of a picture or a video; its folder is made."""
        return self._place("media", name)

    def data(self, name: str) -> Path:
        """The path of data that the stages hand on; its folder is made."""
        return self._place("data", name)

    def _place(self, kind: str, name: str) -> Path:
        path = self.path / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Keeps what `train` returned; its being there says that the run is done."""
        write_replacing(self.path / "summary.json", json_bytes(plain(summary, "summary")))

    def summary(self) -> dict[str, Any] | None:
        """What `write_summary` kept, or None while the run is not done."""
        try:
            return json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise DataError(f"'{self.path}/summary.json' cannot be read: {error}") from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the one process that trains; the system releases it when that process dies, however it dies.

        Raises:
            UsageError: another process trains this run.
        """
        descriptor = _lock(self.path / ".lock", tries=10)
        if descriptor is None:
            raise UsageError(f"Another process is training the run '{self.path}'. Wait for it, or stop it first.")
        try:
            yield
        finally:
            os.close(descriptor)

    def clean(self) -> None:
        """Removes what a killed process left half-written. Only the process that trains may call it, before it begins."""
        self.checkpoints.clean()
        for place in self.path.glob(".*-*"):
            if place.is_dir():  # the lock and half-written files of a few bytes are none
                shutil.rmtree(place, ignore_errors=True)

    def drop_if_empty(self) -> None:
        """Removes the folder of a run that has begun and made nothing: no metrics, data or checkpoints."""
        if {place.name for place in self.path.iterdir()} <= {"config.json", "provenance.json", ".lock"}:
            shutil.rmtree(self.path)

    def state(self) -> str:
        """running, done or stopped; "unknown" of a run that one may only read, such as a colleague's."""
        try:
            descriptor = _lock(self.path / ".lock", tries=1)
        except OSError:  # no permission, or a file system that is only read
            return "done" if (self.path / "summary.json").exists() else "unknown"
        if descriptor is None:
            return "running"
        os.close(descriptor)
        return "done" if (self.path / "summary.json").exists() else "stopped"


def _lock(path: Path, tries: int) -> int | None:
    """An open descriptor that holds a POSIX lock (children do not inherit it), or None when another process has it."""
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    for attempt in range(tries):  # `oneira runs` takes the lock for an instant to see whether it is free
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            if attempt + 1 < tries:
                time.sleep(0.05)
    os.close(descriptor)
    return None


def _scalar(value: Any) -> float | int | str | bool | None:
    if hasattr(value, "item"):  # NumPy scalars and 0-d tensors
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a metric must be a number or a text, not {type(value).__name__}")


def _open_lines(path: Path) -> int:
    """Opens for appending, after ending a line that a killed process left half-written."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.write(descriptor, b"\n")
    return descriptor


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics file; half-written ones are passed over."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    for text in data.splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("stage"), str) and isinstance(line.get("step"), int):
            yield line


def runs_folder() -> list[Path]:
    """The runs in `runs/`, oldest first."""
    if not RUNS.is_dir():
        return []
    folders = [folder for folder in RUNS.iterdir() if (folder / "config.json").is_file()]
    return sorted(folders, key=lambda folder: ((folder / "config.json").stat().st_mtime, folder.name))


def preset_of(folder: Path) -> str | None:
    """The preset of a run, also of one whose config this version cannot read; None where it is no run."""
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["preset"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def place_of(path_or_name: str | Path) -> Path:
    """Where a run of that path or name is, or would be made: a bare name means a folder of `runs/`."""
    path = Path(path_or_name).expanduser()
    if (
        (path / "config.json").is_file()
        or path.is_absolute()
        or len(path.parts) > 1
        or str(path_or_name).startswith(".")
    ):
        return path.absolute()
    return (RUNS / path).absolute()


def find_run(path_or_name: str | Path) -> Path:
    """The folder of an existing run. Raises UsageError when there is none, DataError when it is no run."""
    path = place_of(path_or_name)
    if (path / "config.json").is_file():
        return path
    for other in (path, Path(path_or_name).absolute()):
        if other.exists():
            raise DataError(f"'{other}' is not a run: it has no config.json.")
    known = [folder.name for folder in runs_folder()]
    hint = did_you_mean(Path(path_or_name).name, known) if known else "There are no runs in 'runs/' yet."
    raise UsageError(f"There is no run '{path_or_name}'. {hint}")


def new_path(preset: str) -> Path:
    """runs/PRESET-YYYYMMDD-HHMMSS, not yet taken."""
    path = RUNS / f"{preset}-{datetime.now().strftime('%Y%m%d-%H%M%S')}"
    candidates = [path, *(path.with_name(f"{path.name}-{n}") for n in range(2, 100))]
    return next(candidate for candidate in candidates if not candidate.exists()).absolute()


def require_same_config(run: Run, preset: str, config: Any) -> None:
    """Raises ConfigError, showing the difference, unless the run was made with this preset and config."""
    from .config import difference

    differences = difference(run.config, config)
    if run.preset != preset:
        differences = {"preset": (run.preset, preset), **differences}
    if differences:
        first = list(differences.items())[:MOST_SHOWN]
        shown = "; ".join(f"{key}: {_short(old)} in the run, {_short(new)} asked for" for key, (old, new) in first)
        if len(differences) > len(first):
            shown += f"; and {len(differences) - len(first)} more"
        raise ConfigError(
            f"The run '{run.path}' has another config ({shown}). Give another --run, or the same settings."
        )


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def versions() -> dict[str, str | None]:
    """Versions of the libraries that a result depends on; None for what is not installed."""
    found: dict[str, str | None] = {}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = None
    return found


def memory_gib() -> float | None:
    """The machine's memory in GiB."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def source() -> dict[str, Any]:
    """Version of Oneira, and the commit when it runs from a git checkout of its own."""
    top = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(top), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Installed inside another project's checkout, the commit found would be that project's.
    own = git("rev-parse", "--show-toplevel") == str(top)
    changed = git("status", "--porcelain", "--untracked-files=no") if own else None
    return {
        "version": versions()["oneira"],
        "commit": git("rev-parse", "--verify", "HEAD") if own else None,
        "changed": None if changed is None else bool(changed),
    }
