"""Games of ViZDoom that leave nothing behind: no file in the working directory, and no process after their owner, however it ends.

ViZDoom starts a game as a child process. Left alone the child writes `_vizdoom.ini` and `_vizdoom/` into the working directory, and when
its owner is killed (SIGKILL, a crash) it waits for orders for ever. So every game runs in a folder of its own under one temporary folder
of the owner, and a guard, one small shell for each owning process, waits on a pipe that only the owner holds open: when that closes,
the guard ends the games that are still there and removes the folder and their shared memory. The guard has a session of its own, so
that a Ctrl-C on the terminal does not reach it, and is nobody's child, because Ray kills the children of its workers first. The games
ignore Ctrl-C: their owner closes them.

ViZDoom waits for a game's answer without end. Calls are therefore watched: a game that stands still (stopped, or a fork that never became
the game) is ended after `PATIENCE` seconds in one call. ViZDoom tells that as a death, and in a start by taking the process down.
"""

from __future__ import annotations

import atexit
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import psutil

from oneira.platform.errors import EnvironmentMissing

PATIENCE = 60.0
"""Seconds that one call of a game may last; a start takes 0.2 s, a step less than a millisecond, on a busy machine ten times that."""

SHARED = ("ViZDoomMQCtr", "ViZDoomMQDoom", "ViZDoomSM")  # what a game's shared memory is called, before its own name

# What runs in place of the game: it enters the game's folder and writes down who it is, then becomes the game.
_LAUNCH = """#!/bin/sh
trap '' INT
cd "${{0%/*}}" || exit 1
echo $$ > pid
before=
for word; do
  if [ "$before" = +viz_instance_id ]; then echo "$word" > instance; fi
  before=$word
done
exec {game} "$@"
"""

# The guard: $1 is the owner's folder. A process is only ended where its command line names that folder, since numbers come back.
_GUARD = """
exec 3<&0
(
trap '' INT TERM HUP
sweep() {
  for game in "$1"/*/; do
    if [ -f "$game/pid" ]; then
      pid=$(cat "$game/pid")
      if ps -ww -o args= -p "$pid" 2> /dev/null | grep -qF "$1"; then kill -9 "$pid"; fi
    fi
    if [ -f "$game/instance" ]; then
      name=$(cat "$game/instance")
      rm -f "/dev/shm/ViZDoomMQCtr$name" "/dev/shm/ViZDoomMQDoom$name" "/dev/shm/ViZDoomSM$name"
    fi
  done
}
cat <&3 > /dev/null
sweep "$1"
if [ -n "$(ls "$1")" ]; then sleep 1; sweep "$1"; fi
rm -rf "$1"
) &
"""


class _Owner:
    """This process's folder of games, and the guard over it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="oneira-doom-"))
        self.numbers = count()
        self.executable = Path(require_vizdoom().__file__).with_name("vizdoom")
        try:
            _require_running(self.executable, self.folder)
        except EnvironmentMissing:
            self.folder.rmdir()
            raise
        self.guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "oneira-doom-guard", str(self.folder)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd="/",
        )  # fmt: skip
        self.guard.wait()  # for the shell that leaves the guard behind
        threading.Thread(target=_watch, args=(self.folder,), name="doom-watch", daemon=True).start()

    def release(self) -> None:
        """Close the pipe: what is left of the games ends."""
        assert self.guard.stdin is not None
        self.guard.stdin.close()


def _require_running(executable: Path, folder: Path) -> None:
    """Start the game for a moment, by itself: where it cannot run, ViZDoom would take this whole process down.

    Raises:
        EnvironmentMissing: it does not run, for want of a library for example.
    """
    words = [
        str(executable),
        "-norun",
        "-nosound",
        "+viz_noxserver",
        "1",
        "+viz_window_hidden",
        "1",
        "+viz_noconsole",
        "1",
    ]
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentMissing(f"ViZDoom's game does not run: {error}") from error
    finally:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    if done.returncode in (126, 127) or done.returncode < 0:
        raise EnvironmentMissing(f"ViZDoom's game does not run (exit {done.returncode}): {done.stderr.strip()[:500]}")


_owner: _Owner | None = None


class Watched:
    """Around one call of the game of `folder`: a call longer than `PATIENCE` is one that stands still, and its game is ended."""

    calls: ClassVar[set[Watched]] = set()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ended = False

    def __enter__(self) -> Watched:
        self.since = time.monotonic()
        self.calls.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.calls.discard(self)


def _watch(owned: Path) -> None:
    while owned.is_dir():
        time.sleep(min(PATIENCE / 4, 5))
        for call in list(Watched.calls):
            if time.monotonic() - call.since > PATIENCE:
                call.ended = True
                end(call.folder)


def end(folder: Path) -> None:
    """Kill the game of a folder; where it has not even written who it is, the copies of this process that forks left behind."""
    with suppress(psutil.Error, ValueError):
        if (folder / "pid").is_file():
            game = psutil.Process(int((folder / "pid").read_text()))
            if any(str(folder.parent) in word for word in game.cmdline()):
                game.kill()
            return
        us = psutil.Process()
        for child in us.children():
            if child.cmdline() == us.cmdline() and time.time() - child.create_time() > PATIENCE:
                child.kill()


def _forked() -> None:
    """A forked child owns no games, and must not hold the pipe of those of its parent."""
    global _owner
    Watched.calls.clear()
    if _owner is not None:
        assert _owner.guard.stdin is not None
        os.close(_owner.guard.stdin.fileno())
        _owner = None


os.register_at_fork(after_in_child=_forked)


@atexit.register
def _release() -> None:
    if _owner is not None:
        _owner.release()


def require_vizdoom() -> Any:
    """The module `vizdoom`.

    Raises:
        EnvironmentMissing: it is not installed.
    """
    try:
        import vizdoom
    except ImportError as error:
        raise EnvironmentMissing(f"DoomTakeCover needs ViZDoom: pip install 'oneira[doom]' ({error})") from error
    return vizdoom


def confine(game: Any) -> Path:
    """Give a `DoomGame` that has not been started a folder of its own, and put it under guard.

    Returns:
        The folder, to be removed with `remove` once the game is closed.
    """
    global _owner
    if _owner is None:
        _owner = _Owner()
    folder = _owner.folder / f"{next(_owner.numbers):06d}"
    folder.mkdir()
    launch = folder / "game"
    launch.write_text(_LAUNCH.format(game=shlex.quote(str(_owner.executable))), encoding="utf-8")
    launch.chmod(0o700)
    game.set_doom_config_path(str(folder / "settings.ini"))
    game.set_vizdoom_path(str(launch))
    return folder


def remove(folder: Path) -> None:
    """Remove a closed game's folder, and the shared memory that a game which was killed leaves behind."""
    with suppress(OSError):
        name = (folder / "instance").read_text(encoding="utf-8").strip()
        for kind in SHARED if name else ():
            Path(f"/dev/shm/{kind}{name}").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
