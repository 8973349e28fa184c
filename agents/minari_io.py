"""Rollouts to and from Minari, Farama's format for offline data. Local folders only; nothing here reaches the network.

    export_minari(store, "oneira/carracing-random-v0")         # then minari.load_dataset("oneira/carracing-random-v0")
    import_minari("D4RL/some/dataset-v0", folder)              # any local data set of uint8 image observations

Frames are stored raw: Minari's default is JPEG, which would change them. Shards and what they say of themselves travel
in the data set's metadata under "oneira_shards", so a store that goes out and comes back is the same, byte by byte.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from oneira.platform.errors import DataError, EnvironmentMissing, UsageError

from .environments import WORLDS
from .rollouts import Episode, RolloutStore

SHARDS_KEY = "oneira_shards"


def export_minari(
    store: RolloutStore, dataset_id: str, *, root: Path | None = None, author: str = "oneira", description: str = ""
) -> Path:
    """Write every episode of `store` as the Minari data set `dataset_id`, one episode in memory at a time.

    Args:
        dataset_id: "(namespace/)name-vN".
        root: Minari's folder of data sets; None for its own default (MINARI_DATASETS_PATH or ~/.minari/datasets).
    Returns:
        The data set's folder.
    Raises:
        UsageError: a malformed id, or one that exists. DataError: an empty store. EnvironmentMissing: no minari.
    """
    minari = _minari()
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.dataset.minari_storage import MinariStorage

    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError) as error:
        raise UsageError(f"'{dataset_id}' is no Minari id; it has the form (namespace/)name-v0.") from error
    final = _root(root) / dataset_id
    if final.exists():
        raise UsageError(f"The Minari data set {final} exists already; choose another name or version.")
    if not store.shards:
        raise DataError(f"{store.folder} holds no shard to export.")
    metas = {shard: store.meta(shard) for shard in store.shards}
    temporary = final.parent / f".{final.name}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    spec = _env_spec(metas)
    storage = MinariStorage.new(
        temporary / "data",
        observation_space=gymnasium.spaces.Box(0, 255, store.frames(np.zeros(1, np.int64)).shape[1:], np.uint8),
        action_space=_action_space(metas, spec, store.actions.shape[1]),
        env_spec=spec,
        jpeg_encoding=False,
    )
    storage.update_metadata(
        {
            "dataset_id": dataset_id,
            "minari_version": minari.__version__,
            "author": {author},
            "algorithm_name": ", ".join(sorted({str(meta.get("policy", "unknown")) for meta in metas.values()})),
            "description": description or _description(metas),
            SHARDS_KEY: [
                {"name": shard, "episodes": sum(e.shard == shard for e in store.episodes()), "meta": metas[shard]}
                for shard in store.shards
            ],
        }
    )
    whole = isinstance(storage.action_space, gymnasium.spaces.Discrete)
    storage.update_episodes(_buffer(store, episode, whole) for episode in store.episodes())
    temporary.rename(final)
    return final


def import_minari(
    source: str | Path,
    folder: Path | str,
    *,
    root: Path | None = None,
    preprocess: Callable[[np.ndarray], np.ndarray] | None = None,
    episodes_per_shard: int = 16,
) -> RolloutStore:
    """Read a local Minari data set into a new rollout store at `folder`.

    Args:
        source: the id of a data set under `root`, or the path of its folder.
        preprocess: uint8 [T+1, H, W, 3] -> uint8 [T+1, H', W', 3] for each episode, e.g. `preprocess_carracing`.
        episodes_per_shard: for data sets that Oneira did not write; its own keep their shards.
    Raises:
        DataError: no such data set, or its observations are no uint8 images or its actions neither Box nor Discrete.
    """
    _minari()
    from minari.dataset.minari_storage import MinariStorage

    data = (Path(source) if Path(source).is_dir() else _root(root) / source) / "data"
    try:
        raw = MinariStorage.read_raw_metadata(data)
        if not {"observation_space", "action_space"} <= raw.keys():
            # Minari would build the environment that the file names, that is, import a module of the file's choice
            raise DataError(f"The Minari data set {data} does not record its spaces.")
        storage = MinariStorage.read(data)
    except (ValueError, KeyError, OSError) as error:
        raise DataError(f"{source} is no readable Minari data set under {data.parent}: {error}.") from error
    if isinstance(storage.action_space, gymnasium.spaces.Dict | gymnasium.spaces.Tuple):
        raise DataError(f"Actions of {source} are {storage.action_space}; only Box and Discrete can be imported.")
    store = RolloutStore(folder)
    episodes = _episodes(storage)
    for name, count, meta in _plan(raw, str(source), episodes_per_shard):
        with store.writer(name, **meta) as writer:
            for episode in islice(episodes, count):
                frames = episode["observations"]
                if not (isinstance(frames, np.ndarray) and frames.dtype == np.uint8 and frames.ndim == 4):
                    raise DataError(f"Observations of {source} are not uint8 images [T+1, H, W, 3].")
                writer.add_episode(
                    preprocess(frames) if preprocess else frames,
                    np.asarray(episode["actions"], np.float32).reshape(len(episode["rewards"]), -1),
                    np.asarray(episode["rewards"], np.float32),
                    terminated=bool(episode["terminations"][-1]),
                    truncated=bool(episode["truncations"][-1]),
                    seed=episode["seed"],
                )
    return store


def _minari() -> Any:
    try:
        import h5py  # noqa: F401 - Minari's storage needs it
        import minari
    except ImportError as error:
        raise EnvironmentMissing("Minari is not installed: pip install 'oneira[minari]'.") from error
    return minari


def _root(root: Path | None) -> Path:
    from minari.storage.datasets_root_dir import get_dataset_path

    return Path(root) if root is not None else get_dataset_path()


def _buffer(store: RolloutStore, episode: Episode, whole: bool) -> Any:
    """The episode as Minari writes it; `whole`: actions are numbers, int64 [T]."""
    from minari.data_collector import EpisodeBuffer

    steps = slice(episode.first_step, episode.first_step + episode.length)
    return EpisodeBuffer(
        seed=None if episode.seed < 0 else episode.seed,
        observations=store.frames(np.arange(episode.first_frame, episode.first_frame + episode.length + 1)),
        actions=store.actions[steps, 0].astype(np.int64) if whole else store.actions[steps],
        rewards=store.rewards[steps],
        terminations=store.terminated[steps],
        truncations=store.truncated[steps],
    )


def _episodes(storage: Any) -> Iterator[dict[str, Any]]:
    """Episodes in order, each with its seed, or -1."""
    indices = range(storage.total_episodes)
    for episode, meta in zip(storage.get_episodes(indices), storage.get_episode_metadata(indices), strict=True):
        seed = meta.get("seed")
        yield {**episode, "seed": -1 if seed is None else int(seed)}


def _plan(raw: dict[str, Any], source: str, per_shard: int) -> list[tuple[str, int, dict[str, Any]]]:
    """(name, episodes, meta) of the shards to write: those that were exported, or as a foreign data set is cut."""
    if SHARDS_KEY in raw:
        try:
            return [(str(s["name"]), int(s["episodes"]), {**s["meta"]}) for s in raw[SHARDS_KEY]]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"'{SHARDS_KEY}' of {source} is damaged: {error}.") from error
    total = int(raw["total_episodes"])
    meta = {"policy": str(raw.get("algorithm_name", "unknown")), "minari": str(raw.get("dataset_id", source))}
    return [
        (f"minari-{start // per_shard:05d}", min(per_shard, total - start), meta)
        for start in range(0, total, per_shard)
    ]


def _env_spec(metas: dict[str, dict[str, Any]]) -> gymnasium.envs.registration.EnvSpec | None:
    """The spec of the one registered environment that all shards come from."""
    ids = {str(meta.get("env_id")) for meta in metas.values()}
    env_id = ids.pop()
    return gymnasium.spec(env_id) if not ids and env_id in gymnasium.registry else None


def _action_space(
    metas: dict[str, dict[str, Any]], spec: gymnasium.envs.registration.EnvSpec | None, width: int
) -> gymnasium.Space:
    ids = {meta.get("env_id") for meta in metas.values()}
    for world in (make() for make in WORLDS.values()):
        if ids == {world.env_id} and world.discrete:
            return gymnasium.spaces.Discrete(world.action_size)
    if spec is not None:
        env = gymnasium.make(spec)
        space = env.action_space
        env.close()
        if isinstance(space, gymnasium.spaces.Box) and space.shape == (width,):
            return space
    return gymnasium.spaces.Box(-np.inf, np.inf, (width,), np.float32)


def _description(metas: dict[str, dict[str, Any]]) -> str:
    preprocessing = sorted({str(meta.get("preprocessing", "none")) for meta in metas.values()})
    return f"Rollouts written by Oneira. Preprocessing of the frames: {'; '.join(preprocessing)}."
