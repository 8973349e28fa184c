"""`oneira doctor`: what works on this machine, and what to install for the rest."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from .presets import find_entry_points


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at. `required` ones make the command exit with 4 when they fail."""

    name: str
    ok: bool
    detail: str
    install: str | None = None
    required: bool = True


def check_all() -> list[Check]:
    """All checks, in the order in which a person would fix them. Imports what it checks, so it takes seconds."""
    checks = [_python(), _machine()]
    for module, package, required, use in MODULES:
        checks.append(_module(module, package, required, use))
    checks += [_carracing(), _video()]
    for group in ("oneira.commands", "oneira.presets", "oneira.executors"):
        checks += [_entry_point(group, name, point) for name, point in find_entry_points(group).items()]
    return checks


# (module, what to install, required, what for)
MODULES = (
    ("torch", "torch", True, "all models"),
    ("gymnasium", "gymnasium[box2d]", True, "environments"),
    ("numba", "numba", True, "fast simulators"),
    ("cv2", "opencv-python-headless", True, "frames"),
    ("cma", "cma", True, "evolution"),
    ("safetensors", "safetensors", True, "checkpoints"),
    ("matplotlib", "matplotlib", True, "reports"),
    ("tensorboard", "tensorboard", True, "curves"),
    ("ray", "'ray[default,serve]>=2.56'", False, "clusters; without it use --executor serial"),
    ("minari", "'oneira[minari]'", False, "exchange of rollouts"),
    ("vizdoom", "'oneira[doom]'", False, "DoomTakeCover"),
)


def _tried(name: str, look: Callable[[], str], install: str | None, required: bool = True) -> Check:
    try:
        return Check(name=name, ok=True, detail=look(), required=required)
    except Exception as error:  # whatever is wrong with a library, the doctor names it and goes on
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return Check(name=name, ok=False, detail=text, install=install, required=required)


def _python() -> Check:
    detail = sys.version.split()[0]
    return Check(name="python", ok=sys.version_info >= (3, 11), detail=detail, install="Python 3.11 or newer")


def _machine() -> Check:
    def look() -> str:
        from .devices import describe
        from .runs import memory_gib

        found = describe()
        free = shutil.disk_usage(os.curdir).free / 2**30
        return (
            f"{found['device']} ({found['device_name']}), {found['precision']}, {found['cores']} cores, "
            f"{memory_gib()} GiB memory, {free:.0f} GiB free on disk"
        )

    return _tried("device", look, "pip install torch")


def _module(module: str, package: str, required: bool, use: str) -> Check:
    def look() -> str:
        loaded = importlib.import_module(module)
        return f"{getattr(loaded, '__version__', None) or metadata.version(module)} ({use})"

    return _tried(module, look, f"pip install {package}", required)


def _carracing() -> Check:
    def look() -> str:
        import gymnasium

        environment = gymnasium.make("CarRacing-v3")
        try:
            frame, _ = environment.reset(seed=0)
        finally:
            environment.close()
        return f"CarRacing-v3 gives frames {frame.shape}"

    return _tried("carracing", look, "pip install 'gymnasium[box2d]'")


def _video() -> Check:
    def look() -> str:
        import imageio_ffmpeg

        return f"ffmpeg {imageio_ffmpeg.get_ffmpeg_version()}"

    return _tried("video", look, "pip install 'imageio[ffmpeg]'")


def _entry_point(group: str, name: str, point: Any) -> Check:
    def look() -> str:
        point.load()
        return point.value

    return _tried(f"{group.rpartition('.')[2]}: {name}", look, "the package that this part needs", required=False)
