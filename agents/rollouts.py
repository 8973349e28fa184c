"""Rollouts on disk: episodes of frames, actions and rewards in shards, read by V and M without filling the memory.

    FOLDER/NAME/                 one shard, written once (shards.py): any number of whole episodes
        frames.npy       uint8   [F, H, W, 3]   one frame more per episode than actions: the one after the last action
        actions.npy      float32 [N, A]
        rewards.npy      float32 [N]
        terminated.npy   bool    [N]            the world ended the episode; never merged with
        truncated.npy    bool    [N]            the time limit did
        starts.npy       int64   [E + 1]        where in N each episode starts, and N; in F it starts at starts[e] + e
        seeds.npy        int64   [E]            the seed each episode was reset with, -1 where there is none
        meta.json                               policy, env_id, preprocessing, ... and sizes and sha256 of the arrays
    FOLDER/KIND@DIGEST/NAME/     arrays with one row per frame of shard NAME, computed by the checkpoint of that digest:
        mu.npy, logvar.npy       [F, Z]         kind "latents", by V
        h.npy, c.npy             [F, H]         kind "states", by M: the state in which M stands when it sees that frame

Legend: F frames, N steps, E episodes, Z latent, A action. Batches for training are drawn by batches.py.
Shards count in the order of their names. Frame and step numbers are global: over all shards in that order.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from oneira.platform.errors import DataError, did_you_mean

from .shards import FolderWriter, Mappings, checked_name, read_array, read_meta, remove_parts, verify_folder

CHUNK = 2048  # frames read at once where all are read


@dataclass(frozen=True, kw_only=True)
class Episode:
    """Where one episode lies, and what it gave: steps from first_step on, one frame more from first_frame on."""

    shard: str
    first_step: int
    first_frame: int
    length: int
    seed: int
    reward_sum: float
    terminated: bool
    truncated: bool


class ShardWriter:
    """Writes one shard, episode by episode: a context manager that commits at its end; an exception leaves nothing."""

    def __init__(self, final: Path, meta: Mapping[str, Any], committed: Callable[[], None]) -> None:
        self._folder = FolderWriter(final)
        self._meta = dict(meta)
        self._committed = committed
        self._starts = [0]
        self._seeds: list[int] = []

    def add_episode(
        self,
        frames: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        *,
        terminated: bool,
        truncated: bool,
        seed: int = -1,
    ) -> None:
        """Append one episode of T >= 1 steps.

        Args:
            frames: uint8 [T + 1, H, W, 3]. actions: float [T, A]. rewards: float [T].
            terminated, truncated: how it ended, after its last step (both False: it was cut off by the collector).
        """
        length = len(rewards)
        if length < 1 or len(frames) != length + 1 or len(actions) != length or frames.ndim != 4 or actions.ndim != 2:
            got = f"{frames.shape}, {actions.shape} and {rewards.shape}"
            raise DataError(f"An episode is frames [T+1, H, W, 3], actions [T, A], rewards [T] with T >= 1; got {got}.")
        if frames.dtype != np.uint8:
            raise DataError(f"Frames are uint8 [0, 255]; got {frames.dtype}.")
        last = np.arange(length) == length - 1
        self._folder.append("frames", frames)
        self._folder.append("actions", np.asarray(actions, np.float32))
        self._folder.append("rewards", np.asarray(rewards, np.float32))
        self._folder.append("terminated", last & bool(terminated))
        self._folder.append("truncated", last & bool(truncated))
        self._starts.append(self._starts[-1] + length)
        self._seeds.append(int(seed))

    def close(self) -> None:
        """Commit the shard. DataError where it has no episode."""
        if not self._seeds:
            self._folder.abandon()
            raise DataError(f"Shard {self._folder.final.name} has no episode.")
        self._folder.append("starts", np.asarray(self._starts, np.int64))
        self._folder.append("seeds", np.asarray(self._seeds, np.int64))
        self._folder.commit(self._meta)
        self._committed()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._folder.abandon()


class RolloutStore:
    """A folder of shards. Several processes may read it and each write shards of its own.

    Args:
        folder: made by the first shard. Shards that other processes add are seen after `refresh()`.
        select: names of the shards to see, by a function; all by default.
    """

    def __init__(self, folder: Path | str, select: Callable[[str], bool] = lambda name: True) -> None:
        self.folder = Path(folder)
        self._select = select
        self._maps = Mappings()
        self._metas: dict[str, dict[str, Any]] = {}
        self._small: dict[str, dict[str, np.ndarray]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the list of shards and their small arrays again (about 25 bytes a step; the frames stay on disk)."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        names = sorted(p.name for p in found if _is_shard(p) and self._select(p.name))
        for name in set(names) - set(self._metas):  # a shard never changes, so only new ones are read
            self._metas[name] = read_meta(self.folder / name)
            self._small[name] = {key: read_array(self.folder / name / f"{key}.npy") for key in _SMALL}
            _check(self.folder / name, self._small[name], self._metas[name])
        self._metas = {name: self._metas[name] for name in names}
        arrays = [self._small[name] for name in names]
        self.actions = _joined(arrays, "actions", np.zeros((0, 0), np.float32))
        self.rewards = _joined(arrays, "rewards", np.zeros(0, np.float32))
        self.terminated = _joined(arrays, "terminated", np.zeros(0, bool))
        self.truncated = _joined(arrays, "truncated", np.zeros(0, bool))
        steps = [int(a["starts"][-1]) for a in arrays]
        counts = [int(a["starts"][-1]) + len(a["seeds"]) for a in arrays]
        self._frame_bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._episodes = self._index(names, arrays, np.concatenate([[0], np.cumsum(steps)]).astype(np.int64))

    def _index(self, names: list[str], arrays: list[dict[str, np.ndarray]], bounds: np.ndarray) -> list[Episode]:
        episodes = []
        for shard, (name, array) in enumerate(zip(names, arrays, strict=True)):
            starts = array["starts"]
            for e, seed in enumerate(array["seeds"]):
                begin, end = int(starts[e]), int(starts[e + 1])
                episodes.append(
                    Episode(
                        shard=name,
                        first_step=int(bounds[shard]) + begin,
                        first_frame=int(self._frame_bounds[shard]) + begin + e,
                        length=end - begin,
                        seed=int(seed),
                        reward_sum=float(array["rewards"][begin:end].sum(dtype=np.float64)),
                        terminated=bool(array["terminated"][end - 1]),
                        truncated=bool(array["truncated"][end - 1]),
                    )
                )
        return episodes

    # --- what there is

    @property
    def shards(self) -> list[str]:
        """Names of the shards, in their order."""
        return list(self._metas)

    @property
    def num_frames(self) -> int:
        return int(self._frame_bounds[-1])

    @property
    def num_steps(self) -> int:
        return len(self.rewards)

    def episodes(self) -> list[Episode]:
        return list(self._episodes)

    def meta(self, shard: str) -> dict[str, Any]:
        """What the shard was written with: policy, env_id, preprocessing, ..."""
        return {key: value for key, value in self._metas[self._known(shard)].items() if key != "files"}

    def verify(self) -> None:
        """Read everything and compare it with the digests; DataError names the first damaged file."""
        for shard in self.shards:
            verify_folder(self.folder / shard)

    def _known(self, shard: str) -> str:
        if shard not in self._metas:
            raise DataError(f"No shard '{shard}' in {self.folder}. {did_you_mean(shard, self.shards)}")
        return shard

    # --- writing

    def writer(self, shard: str, /, **meta: Any) -> ShardWriter:
        """Begin a shard. `meta`: JSON values that say where it comes from: policy, env_id, preprocessing, ..."""
        return ShardWriter(self.folder / checked_name(shard), meta, self.refresh)

    def clean(self) -> None:
        """Remove half-written shards and arrays. Only while nobody writes."""
        remove_parts(self.folder)
        for derived in self.folder.glob("*@*"):
            remove_parts(derived)

    # --- reading frames

    def frames(self, indices: np.ndarray) -> np.ndarray:
        """The frames of those global numbers [n], in the order asked for: uint8 [n, H, W, 3]."""
        return self._gather("frames", self.folder, np.asarray(indices, np.int64))

    def chunks(self, shard: str) -> Iterator[np.ndarray]:
        """All frames of one shard in order, CHUNK at a time: what an encode stage walks over."""
        path = self.folder / self._known(shard) / "frames.npy"
        for start in range(0, self._maps.rows(path), CHUNK):
            yield self._maps.slice(path, start, start + CHUNK)

    def _gather(self, array: str, root: Path, indices: np.ndarray) -> np.ndarray:
        """Rows of one per-frame array by global frame number; each shard is visited once, and forwards."""
        if not len(self._metas):
            raise DataError(f"{self.folder} holds no shard.")
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.num_frames:
            raise DataError(f"Frame numbers lie in [0, {self.num_frames}); got {indices.min()} .. {indices.max()}.")
        order = np.argsort(indices, kind="stable")
        ordered = indices[order]
        cuts = np.searchsorted(ordered, self._frame_bounds)
        out: np.ndarray | None = None
        for shard, name in enumerate(self._metas):
            for begin in range(cuts[shard], cuts[shard + 1], CHUNK):
                end = min(begin + CHUNK, cuts[shard + 1])
                rows = self._maps.take(root / name / f"{array}.npy", ordered[begin:end] - self._frame_bounds[shard])
                out = np.empty((len(indices), *rows.shape[1:]), rows.dtype) if out is None else out
                out[order[begin:end]] = rows
        if out is None:
            return self._maps.slice(root / self.shards[0] / f"{array}.npy", 0, 0)
        return out

    # --- arrays computed from the frames

    def put_latents(self, shard: str, digest: str, mu: np.ndarray, logvar: np.ndarray) -> None:
        """Keep V's posterior for every frame of a shard, unless it is kept: mu, logvar float16 or float32 [F, Z]."""
        self._put("latents", shard, digest, {"mu": mu, "logvar": logvar})

    def latents(self, digest: str) -> FrameArrays:
        """The kept posteriors of the V with that digest: `gather(frame numbers)` -> {"mu", "logvar"}."""
        return FrameArrays(self, "latents", digest)

    def put_states(self, shard: str, digest: str, h: np.ndarray, c: np.ndarray) -> None:
        """Keep M's LSTM state at every frame of a shard: h, c float16 or float32 [F, H]: where dreams may start."""
        self._put("states", shard, digest, {"h": h, "c": c})

    def states(self, digest: str) -> FrameArrays:
        """The kept states of the M with that digest: `gather(frame numbers)` -> {"h", "c"}."""
        return FrameArrays(self, "states", digest)

    def _put(self, kind: str, shard: str, digest: str, arrays: dict[str, np.ndarray]) -> None:
        count = int(np.diff(self._frame_bounds)[self.shards.index(self._known(shard))])
        for name, array in arrays.items():
            if len(array) != count or array.ndim != 2 or array.dtype not in (np.float16, np.float32):
                got = f"{array.dtype} {array.shape}"
                raise DataError(f"'{name}' of shard {shard} is float16 or float32 [{count}, n]; got {got}.")
        final = self.folder / f"{kind}@{checked_name(digest, 'digest')}" / shard
        if final.exists():
            return
        writer = FolderWriter(final)
        for name, array in arrays.items():
            writer.append(name, array)
        writer.commit({"digest": digest})

    def drop_derived(self, *keep: str) -> None:
        """Remove the latents and states of every digest that is not in `keep`."""
        for derived in self.folder.glob("*@*"):
            if derived.name.partition("@")[2] not in keep:
                self._maps.close()
                shutil.rmtree(derived)


class FrameArrays:
    """Arrays kept beside the shards, one row per frame, of one kind and digest."""

    _NAMES: ClassVar = {"latents": ("mu", "logvar"), "states": ("h", "c")}

    def __init__(self, store: RolloutStore, kind: str, digest: str) -> None:
        self._store = store
        self._root = store.folder / f"{kind}@{checked_name(digest, 'digest')}"
        self._kind = kind

    def missing(self) -> list[str]:
        """Shards that an encode stage still has to do."""
        return [shard for shard in self._store.shards if not (self._root / shard).is_dir()]

    def require_complete(self) -> None:
        if missing := self.missing():
            raise DataError(f"Shards of {self._store.folder} without {self._kind}: {', '.join(missing)}.")
        for shard in self._store.shards:
            read_meta(self._root / shard)

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of those global frame numbers [n]: {name: float32 [n, width]}."""
        rows = np.asarray(indices, np.int64)
        return {
            name: self._store._gather(name, self._root, rows).astype(np.float32) for name in self._NAMES[self._kind]
        }


_SMALL = ("actions", "rewards", "terminated", "truncated", "starts", "seeds")


def _is_shard(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".") and "@" not in path.name


def _joined(arrays: list[dict[str, np.ndarray]], key: str, empty: np.ndarray) -> np.ndarray:
    return np.concatenate([array[key] for array in arrays]) if arrays else empty


def _check(folder: Path, array: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """DataError where the arrays of a shard do not fit each other."""
    starts, steps = array["starts"], len(array["rewards"])
    fits = (
        len(starts) == len(array["seeds"]) + 1
        and len(starts) > 1
        and starts[0] == 0
        and starts[-1] == steps
        and bool((np.diff(starts) > 0).all())
        and all(len(array[key]) == steps for key in ("actions", "terminated", "truncated"))
        and "frames.npy" in meta["files"]
    )
    if not fits:
        raise DataError(f"The arrays of {folder} do not belong together.")
