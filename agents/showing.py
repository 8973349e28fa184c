"""Pictures and films of a run: what V keeps of a frame, and the same controller in the real world and in its dream."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from oneira.platform.errors import UsageError, did_you_mean
from oneira.platform.runs import Run

from .agent import load_agent
from .controller import Controller
from .dream import make_dream
from .environments import make_world
from .loading import dream_source
from .pipeline import newest
from .recording import real_frames, side_by_side, write_video
from .stages import packed_model, round_store
from .worldmodel import unpack

WORLDS = ("real", "dream", "both")


@torch.inference_mode()
def reconstructions(run: Run, count: int = 12) -> Path:
    """Frames of the run's data above what V makes of them, as media/reconstructions.png (2 rows of `count`, enlarged)."""
    import cv2

    model = unpack(packed_model(run, run.config, newest(run, "memory")))
    store = round_store(run, run.config, len(run.config.rounds) - 1)
    frames = store.frames(np.linspace(0, store.num_frames - 1, count).astype(np.int64))
    mu, _ = model.vision.encode(torch.from_numpy(frames))
    again = np.asarray(model.vision.decode(mu))
    sheet = np.concatenate([np.concatenate(list(frames), 1), np.concatenate(list(again), 1)], 0)
    path = run.media("reconstructions.png")
    cv2.imwrite(str(path), cv2.resize(sheet[..., ::-1], None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST))
    return path


def dream_frames(run: Run, seed: int, steps: int = 1000) -> Iterator[np.ndarray]:
    """The run's controller in its dream, at the temperature it was bred at: uint8 [64, 64, 3] for each step until the dream ends."""
    agent = load_agent(run)
    controller = Controller(run.config.controller)
    source = dream_source(run, agent.tree["memory"])
    env = make_dream(source, num_envs=1, obs="latent", tau=agent.tree["tau"], seed=seed)
    env.reset(seed=seed)
    for _ in range(steps):
        yield source.decode(env.features("z"))[0]
        known = env.features(run.config.controller.features)
        _, _, terminated, truncated, _ = env.step(controller.act_numpy(agent.params, known))
        if terminated[0] or truncated[0]:
            return


def film(run: Run, path: Path, *, world: str = "both", seed: int = 0, steps: int = 1000) -> int:
    """Write an MP4 of an episode, at most `steps` long. Returns the number of frames.

    Raises:
        UsageError: an unknown world.
    """
    if world not in WORLDS:
        raise UsageError(f"unknown world '{world}'. {did_you_mean(world, WORLDS)}")
    panels = []
    if world != "dream":
        panels.append(("reality", islice(real_frames(load_agent(run), seed, world=run.config.world), steps)))
    if world != "real":
        panels.append(("dream", islice(dream_frames(run, seed), steps)))
    return write_video(path, side_by_side(panels), fps=make_world(run.config.world).fps)
