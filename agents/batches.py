"""Batches for V and M from a rollout store: pure functions of (seed, step), so that a resumed fit sees the same ones.

Legend: B batch, L window length in steps, E episodes, Z latent, A action.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from oneira.platform.errors import DataError

from .rollouts import FrameArrays, RolloutStore


def frame_batches(store: RolloutStore, *, batch_size: int, seed: int) -> Callable[[int], np.ndarray]:
    """frame_batch(step) -> uint8 [B, H, W, 3] for V: frames drawn uniformly, with replacement."""
    count = store.num_frames
    if not count:
        raise DataError(f"{store.folder} holds no frames to train on.")

    def frame_batch(step: int) -> np.ndarray:
        return store.frames(np.random.default_rng([seed, step]).integers(0, count, batch_size))

    return frame_batch


def sequence_batches(
    store: RolloutStore, digest: str, *, length: int, batch_size: int, seed: int, newest: str = "", fresh: float = 0.0
) -> Callable[[int], dict[str, np.ndarray]]:
    """sequence_batch(step) for M, from the latents of V's digest; all float32, 0 where padded.

    The share `fresh` of a batch comes from shards whose names begin with `newest`, the rest from everything.

    Returns a function to: mu, logvar [B, L+1, Z]; action [B, L, A]; reward, done, valid [B, L]. done is `terminated`: a
    time limit says nothing about the world. valid is 0 after the end of the episode, where a window is longer than what
    is left of it.
    """
    windows, latents = Windows.of(store, length), store.latents(digest)
    latents.require_complete()
    own = windows.numbers([e.shard.startswith(newest) for e in store.episodes()]) if fresh else np.zeros(0, np.int64)
    num_fresh = round(fresh * batch_size) if len(own) else 0

    def sequence_batch(step: int) -> dict[str, np.ndarray]:
        generator = np.random.default_rng([seed, step])
        drawn = generator.integers(0, len(windows), batch_size)
        if num_fresh:
            drawn[:num_fresh] = own[generator.integers(0, len(own), num_fresh)]
        return _window_batch(store, windows, latents, drawn)

    return sequence_batch


@dataclass(frozen=True, kw_only=True)
class Windows:
    """All windows of `length` steps: they begin at any step of an episode, and the last ones reach beyond its end.

    An episode of T steps is drawn from T + L - 1 places, of which the L that begin at or before its first step are the
    one window at its start: that window is L times as likely as any other, since every dream begins there.
    """

    length: int
    first_steps: np.ndarray  # int64 [E]
    first_frames: np.ndarray  # int64 [E]
    lengths: np.ndarray  # int64 [E]

    def __post_init__(self) -> None:
        if self.length < 1 or not len(self.lengths):
            raise DataError(f"Windows need a length >= 1 and an episode; got {self.length} and {len(self.lengths)}.")

    @classmethod
    def of(cls, store: RolloutStore, length: int) -> Windows:
        """The windows of a store as it is now; shards added later do not change them."""
        episodes = store.episodes()
        return cls(
            length=length,
            first_steps=np.array([e.first_step for e in episodes], np.int64),
            first_frames=np.array([e.first_frame for e in episodes], np.int64),
            lengths=np.array([e.length for e in episodes], np.int64),
        )

    def __len__(self) -> int:
        return int((self.lengths + self.length - 1).sum())

    def numbers(self, of: Sequence[bool]) -> np.ndarray:
        """The numbers int64 of all windows of some episodes; `of` [E] says of which."""
        return np.flatnonzero(np.repeat(np.asarray(of, bool), self.lengths + self.length - 1))

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Window numbers [n] in [0, len) -> (episode [n], step within the episode [n] at which it begins)."""
        ends = np.cumsum(self.lengths + self.length - 1)
        episode = np.searchsorted(ends, indices, side="right")
        place = indices - (ends[episode] - self.lengths[episode])
        return episode, np.maximum(place, 0)


def _window_batch(
    store: RolloutStore, windows: Windows, latents: FrameArrays, drawn: np.ndarray
) -> dict[str, np.ndarray]:
    """The windows of those numbers [B]; see `sequence_batches`."""
    episode, offset = windows.locate(drawn)
    first_step, length = windows.first_steps[episode], windows.lengths[episode]
    t_BL = offset[:, None] + np.arange(windows.length)
    valid_BL = t_BL < length[:, None]
    step_BL = first_step[:, None] + np.where(valid_BL, t_BL, 0)
    frame_t = offset[:, None] + np.arange(windows.length + 1)
    inside = frame_t <= length[:, None]
    frames = windows.first_frames[episode][:, None] + np.where(inside, frame_t, 0)
    batch = {
        key: rows.reshape(*frames.shape, -1) * inside[..., None]
        for key, rows in latents.gather(frames.reshape(-1)).items()
    }
    return {
        **batch,
        "action": store.actions[step_BL] * valid_BL[..., None],
        "reward": store.rewards[step_BL] * valid_BL,
        "done": (store.terminated[step_BL] & valid_BL).astype(np.float32),
        "valid": valid_BL.astype(np.float32),
    }
