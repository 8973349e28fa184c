"""Videos: read back by ffmpeg, of the right codec, size and content; and real driving from the real environment."""

from __future__ import annotations

import subprocess
from itertools import islice
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest

from oneira.agents.recording import BACKGROUND, GAP, HEIGHT, LABEL, enlarge, real_frames, side_by_side, write_video
from oneira.platform.errors import DataError, UsageError


def read_video(path: Path) -> tuple[dict, np.ndarray]:
    with imageio.get_reader(path) as reader:
        return reader.get_meta_data(), np.stack([np.asarray(frame) for frame in reader])


def moving_square(count: int, size: int = 64, colour: tuple[int, int, int] = (220, 60, 40)) -> list[np.ndarray]:
    frames = np.full((count, size, size, 3), 90, np.uint8)
    for i, frame in enumerate(frames):
        frame[20:36, 2 * i : 2 * i + 16] = colour
    return list(frames)


def test_a_video_is_h264_and_comes_back(tmp_path: Path) -> None:
    frames = [enlarge(frame, 127) for frame in moving_square(20)]  # odd on purpose
    path = tmp_path / "deep" / "square.mp4"
    assert write_video(path, iter(frames), fps=25) == 20
    meta, read = read_video(path)
    assert (meta["codec"], meta["pix_fmt"].split("(")[0], meta["fps"]) == ("h264", "yuv420p", 25.0)
    assert read.shape == (20, 126, 126, 3)
    error = np.abs(read.astype(int) - np.stack(frames)[:, :126, :126].astype(int))
    assert error.mean() < 3 and np.median(error) <= 2
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "null", "-"]
    assert subprocess.run(command, capture_output=True, text=True).stderr == ""
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # a browser can start before it has all of it
    assert [p.name for p in path.parent.iterdir()] == ["square.mp4"]


def test_the_same_frames_make_the_same_file(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, moving_square(5))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_panels_stand_side_by_side_and_the_shorter_one_waits(tmp_path: Path) -> None:
    dream, real = moving_square(3), moving_square(6, 96, (40, 90, 220))
    frames = list(side_by_side([("dream", dream), ("reality", iter(real))]))
    assert len(frames) == 6
    assert frames[0].shape == (LABEL + HEIGHT + GAP, 3 * GAP + 2 * HEIGHT, 3)
    assert all(size % 2 == 0 for size in frames[0].shape[:2])
    for i, frame in enumerate(frames):
        left = frame[LABEL : LABEL + HEIGHT, GAP : GAP + HEIGHT]
        right = frame[LABEL : LABEL + HEIGHT, 2 * GAP + HEIGHT : 2 * GAP + 2 * HEIGHT]
        # nearest enlargement is undone by taking one pixel of each block
        np.testing.assert_array_equal(left[3::6, 3::6], dream[i] if i < 3 else dream[2] // 2)
        np.testing.assert_array_equal(right[2::4, 2::4], real[i])
        assert (frame[:LABEL] != BACKGROUND).any(axis=2).sum() > 50  # the labels are drawn
    write_video(tmp_path / "both.mp4", frames)
    assert read_video(tmp_path / "both.mp4")[1].shape == (6, *frames[0].shape)


def test_wrong_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end in \.mp4"):
        write_video(tmp_path / "drive.gif", moving_square(2))
    with pytest.raises(DataError, match="no frames"):
        write_video(tmp_path / "none.mp4", [])
    with pytest.raises(DataError, match="Frame 2 is uint8"):
        write_video(tmp_path / "mixed.mp4", [*moving_square(2), np.zeros((32, 32, 3), np.uint8)])
    with pytest.raises(DataError, match="'dream'"):
        list(side_by_side([("dream", [])]))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "taken.mp4").mkdir()
    with pytest.raises(DataError, match="Cannot write"):
        write_video(tmp_path / "taken.mp4", moving_square(2))
    with pytest.raises(DataError, match="Cannot write"):  # the encoder itself refuses: a full disk looks the same
        write_video(tmp_path / "huge.mp4", [np.zeros((2, 40_000, 3), np.uint8)])
    assert [p.name for p in tmp_path.iterdir()] == ["taken.mp4"]


class FullGas:
    def reset(self, num_envs: int, mask: np.ndarray | None = None) -> None:
        self.seen: list[np.ndarray] = []

    def act(self, frames: np.ndarray) -> np.ndarray:
        self.seen.append(frames[0].copy())
        return np.array([[0.0, 0.5, 0.0]], np.float32)


def test_reality_is_recorded_as_it_is_driven() -> None:
    agent = FullGas()
    observed = list(islice(real_frames(agent, 7, view="agent"), 12))
    np.testing.assert_array_equal(observed[:11], agent.seen)
    screen = list(islice(real_frames(FullGas(), 7), 12))
    assert screen[0].shape == (400, 600, 3) and (screen[0] != screen[-1]).any()
    assert enlarge(screen[0]).shape == (HEIGHT, 576, 3)
    with pytest.raises(UsageError):
        next(real_frames(agent, 7, view="sideways"))
