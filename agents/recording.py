"""Videos of real and dreamed driving: H.264 in yuv420p with even sizes, which every browser plays.

    write_video("drive.mp4", side_by_side([("reality", real_frames(agent, seed=7)), ("dream", decoded_frames)]), fps=50)

Everything takes and gives iterables of uint8 frames [H, W, 3], one frame in memory at a time.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from oneira.platform.errors import DataError, UsageError

from .evaluation import Agent, reference_environment

HEIGHT = 384  # pixels of a panel: 4 * 96 and 6 * 64, so that both kinds of frames grow by a whole number
LABEL = 28  # pixels of the strip above a panel
GAP = 8  # pixels between panels
BACKGROUND = (24, 26, 30)
INK = (236, 236, 232)
FPS = 50  # CarRacing's physics runs at 50 steps a second


def write_video(path: Path | str, frames: Iterable[np.ndarray], *, fps: int = FPS) -> int:
    """Encode `frames` (uint8 [H, W, 3], all of one size; odd sizes lose their last row or column) as an MP4.

    The file appears under its name when it is whole.

    Returns:
        The number of frames written.
    Raises:
        UsageError: the name does not end in .mp4. DataError: no frames, frames of several sizes, or a full disk.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise UsageError(f"'{path.name}' must end in .mp4: videos are written in that format only.")
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise DataError(f"There are no frames to write to {path}.")
    height, width = first.shape[0] // 2 * 2, first.shape[1] // 2 * 2
    temporary = path.with_name(f".{path.stem}.part.mp4")
    path.parent.mkdir(parents=True, exist_ok=True)
    command = _encoder_command(width, height, fps, temporary)
    count = 0
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as encoder:
            assert encoder.stdin is not None
            try:
                for frame in chain([first], frames):
                    if frame.shape != first.shape or frame.dtype != np.uint8:
                        got = f"Frame {count} is {frame.dtype} {frame.shape}"
                        raise DataError(f"{got}; the first was uint8 {first.shape}.")
                    encoder.stdin.write(np.ascontiguousarray(frame[:height, :width]).data)
                    count += 1
            except BrokenPipeError:
                pass  # the encoder gave up; it says why below
            except BaseException:
                encoder.kill()
                raise
            _, said = encoder.communicate()
        if encoder.returncode:
            raise DataError(f"Cannot write {path}: {said.decode(errors='replace').strip()}")
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"Cannot write {path}: {error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _encoder_command(width: int, height: int, fps: int, path: Path) -> list[str]:
    """ffmpeg reading raw RGB frames from its standard input; the same frames make the same bytes."""
    from imageio_ffmpeg import get_ffmpeg_exe

    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-", "-an"]
    codec = ["-c:v", "libx264", "-crf", "20", "-preset", "veryfast", "-pix_fmt", "yuv420p"]
    container = ["-movflags", "+faststart", "-fflags", "+bitexact"]  # playable before all of it has arrived
    return [get_ffmpeg_exe(), "-y", "-v", "error", *source, *codec, *container, str(path)]


def real_frames(agent: Agent, seed: int, *, world: str = "carracing", view: str = "screen") -> Iterator[np.ndarray]:
    """One full episode of the reference environment, as it is driven.

    Args:
        agent: built, not a tree: `reset(1)`, then `act(frames [1, H, W, 3])`.
        view: "screen", Gymnasium's rendering for people, or "agent", the observations.
    """
    if view not in ("screen", "agent"):
        raise UsageError(f"A view is 'screen' or 'agent', not '{view}'.")
    env = reference_environment(world, "rgb_array")
    try:
        frame, _ = env.reset(seed=int(seed))
        agent.reset(1)
        over = False
        while not over:
            yield env.render() if view == "screen" else frame
            frame, _, terminated, truncated, _ = env.step(agent.act(frame[None])[0])
            over = terminated or truncated
    finally:
        env.close()


def enlarge(frame: np.ndarray, height: int = HEIGHT) -> np.ndarray:
    """uint8 [h, w, 3] -> [height, about w * height / h, 3]: whole pixels where frames grow by a whole number."""
    import cv2

    if frame.shape[0] == height:
        return frame
    width = round(frame.shape[1] * height / frame.shape[0])
    grows = cv2.INTER_NEAREST if height % frame.shape[0] == 0 else cv2.INTER_LINEAR
    method = grows if height > frame.shape[0] else cv2.INTER_AREA
    return cv2.resize(frame, (width, height), interpolation=method)


def side_by_side(panels: Sequence[tuple[str, Iterable[np.ndarray]]], *, height: int = HEIGHT) -> Iterator[np.ndarray]:
    """Several sources next to each other, each under its label; one that ends stays on its last frame, dimmed.

    Raises:
        DataError: a source without frames.
    """
    labels = [label for label, _ in panels]
    sources = [iter(frames) for _, frames in panels]
    shown: dict[int, np.ndarray] = {}
    over = [False] * len(panels)
    while True:
        for i, source in enumerate(sources):
            frame = None if over[i] else next(source, None)
            if frame is not None:
                shown[i] = enlarge(frame, height)
            elif i not in shown:
                raise DataError(f"There are no frames for '{labels[i]}'.")
            elif not over[i]:
                over[i], shown[i] = True, shown[i] // 2
        if all(over):
            return
        yield _composed(labels, [shown[i] for i in range(len(panels))])


def _composed(labels: Sequence[str], pictures: Sequence[np.ndarray]) -> np.ndarray:
    """One frame: panels in a row on a dark ground, labels above them; its sizes are even."""
    import cv2

    height = LABEL + pictures[0].shape[0] + GAP
    width = GAP + sum(picture.shape[1] + GAP for picture in pictures)
    canvas = np.empty((height + height % 2, width + width % 2, 3), np.uint8)
    canvas[:] = BACKGROUND
    left = GAP
    for label, picture in zip(labels, pictures, strict=True):
        canvas[LABEL : LABEL + picture.shape[0], left : left + picture.shape[1]] = picture
        cv2.putText(canvas, label, (left, LABEL - 9), cv2.FONT_HERSHEY_SIMPLEX, 0.5, INK, 1, cv2.LINE_AA)
        left += picture.shape[1] + GAP
    return canvas
