"""What a finished run gives to others: its agent (`load_agent`) and its dream (`dream_source`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from oneira.platform.errors import DataError
from oneira.platform.runs import Run

from .agent import Agent, agent_tree, load_agent
from .dream import DreamSource
from .environments import make_world
from .pipeline import newest
from .stages import packed_model
from .worldmodel import unpack

__all__ = ["Agent", "agent_tree", "dream_source", "load_agent"]


def dream_source(run: Run | str | Path, memory: str = "") -> DreamSource:
    """A world model of a run, as a dream.

    Args:
        memory: the checkpoint of M, which names its V; "" is the newest. A controller reads the z and h of the one it was bred on only.

    Raises:
        DataError: the run has no trained world model yet.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    memory = memory or newest(run, "memory")
    if not memory:
        raise DataError(f"'{run.path}' holds no world model yet. Continue it: oneira resume {run.path}")
    tree = packed_model(run, run.config, memory)
    model, world = unpack(tree), make_world(run.config.world)

    @torch.inference_mode()
    def decode(z: np.ndarray) -> np.ndarray:
        return np.asarray(model.vision.decode(torch.from_numpy(np.ascontiguousarray(z, np.float32))))

    return DreamSource(
        members=list(model.members),
        config=run.config.memory,
        starts=tree["starts"],
        decode=decode,
        action_low=world.action_low,
        action_high=world.action_high,
        max_steps=world.max_steps,
        survival=world.survival,
    )
