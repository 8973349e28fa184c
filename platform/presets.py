"""Presets: named functions that return a complete config, found through the entry points of every installed package.

    [project.entry-points."oneira.presets"]
    my-preset = "my_package.presets:my_preset"

A preset's config is a frozen dataclass with the methods of `PresetConfig`.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from .errors import EnvironmentMissing, UsageError, did_you_mean

if TYPE_CHECKING:
    from .executor import Executor
    from .runs import Run

# True while the command line collects the commands of all packages. A package may then put off what is costly in its
# `__init__` (such as importing a library only to register something with it), so that `oneira --help` answers at once.
collecting_commands = False


class PresetConfig(Protocol):
    """What `oneira train` asks of the config that a preset returns."""

    def smoke(self) -> Self:
        """The same work with every stage tiny."""
        ...

    def train(self, run: Run, executor: Executor) -> dict[str, Any]:
        """All stages, from wherever the run stands; returns a summary of JSON values."""
        ...

    def report(self, run: Run) -> Path:
        """Writes `report.html` into the run's folder and returns its path."""
        ...


def find_entry_points(group: str) -> dict[str, EntryPoint]:
    """Every entry point of a group by its name, in alphabetical order."""
    return {point.name: point for point in sorted(entry_points(group=group), key=lambda point: point.name)}


def load_entry_point(group: str, kind: str, name: str) -> Any:
    """The object behind an entry point.

    Raises:
        UsageError: no such name; the message gives the nearest.
        EnvironmentMissing: a package that it needs is not installed.
    """
    points = find_entry_points(group)
    if not isinstance(name, str) or name not in points:  # a file may say anything
        raise UsageError(f"Unknown {kind} '{name}'. {did_you_mean(str(name), points)}")
    try:
        return points[name].load()
    except ModuleNotFoundError as error:
        raise EnvironmentMissing(
            f"The {kind} '{name}' needs the Python module '{error.name}', which is not installed: "
            f"pip install {(error.name or name).partition('.')[0]}"
        ) from error


def preset_names() -> list[str]:
    """All names that `oneira train` knows, sorted."""
    return list(find_entry_points("oneira.presets"))


def load_preset(name: str) -> Any:
    """The complete config of the preset `name`. Raises `UsageError` for an unknown one."""
    return load_entry_point("oneira.presets", "preset", name)()
