"""A trained agent as other people's code meets it: frames of the reference environment in, its actions out.

    agent = load_agent("runs/my-run")            # the better of its controllers, by the real check
    agent.reset(num_envs=8)
    actions = agent.act(frames)                  # uint8 [8, 96, 96, 3] -> float32 [8, 3]

Shapes: n environments, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oneira.platform.errors import DataError, UsageError, did_you_mean
from oneira.platform.runs import Run

from .controller import Controller
from .environments import make_world
from .worldmodel import Senses, digest, unpack

STAGES = ("best", "dream", "real")


class Agent:
    """V, M and one controller, remembering a row for each environment.

    Args:
        tree: {"model": packed world model, "params": float32 [P]}.
    """

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self.tree = tree
        self.model = unpack(tree["model"])
        self.world = make_world(self.model.world)
        self.params = np.asarray(tree["params"], np.float32)
        self.controller = Controller(self.model.controller)
        self.senses: Senses | None = None

    def reset(self, num_envs: int, mask: np.ndarray | None = None) -> None:
        """Forget everything (or the rows where `mask`, bool [n], is True): new episodes begin there."""
        if mask is None or self.senses is None or len(mask) != self.senses.num_envs:
            self.senses = Senses(self.model, num_envs)
        else:
            self.senses.forget(np.asarray(mask, bool))

    @torch.inference_mode()
    def act(self, frames: np.ndarray, rewards: np.ndarray | None = None) -> np.ndarray:
        """Actions for the environments' present frames.

        Args:
            frames: as the reference environment gives them (CarRacing: uint8 [n, 96, 96, 3]; DoomTakeCover: uint8 [n, 240, 320, 3]).
            rewards: float [n] that the last actions brought, for an M that reads rewards; without it M's own expectation stands in.

        Returns:
            float32 [n, A] or int64 [n], as the reference environment takes them.

        Raises:
            UsageError: another number of frames than `reset` announced, or frames of another environment.
        """
        if self.senses is None or len(frames) != self.senses.num_envs:
            known = "reset() was not called" if self.senses is None else f"reset() announced {self.senses.num_envs}"
            raise UsageError(f"{len(frames)} frames, but {known}.")
        try:
            small = self.world.preprocess(np.asarray(frames))
        except ValueError as error:
            raise UsageError(f"This agent was trained in '{self.world.name}' ({self.world.env_id}): {error}") from error
        if rewards is not None:
            self.senses.reward = np.asarray(rewards, np.float32)
        actions = self.controller.act_numpy(self.params, self.senses.see(small))
        self.senses.remember(actions)
        return actions


def agent_from_tree(tree: Mapping[str, Any]) -> Agent:
    """An agent from what crossed processes."""
    return Agent(tree)


def agent_tree(run: Run | str | Path, stage: str = "best") -> dict[str, Any]:
    """The tree of a run's agent.

    Args:
        stage: "real" or "dream": the controller bred in that world. "best": the one with the better real check.

    Returns:
        {"model": packed world model, "memory": the checkpoint it is of, "params": float32 [P], "stage": the world it was bred in,
        "tau": of that population's dreams, "key"}.

    Raises:
        UsageError: unknown stage. DataError: the run holds no such controller (yet).
    """
    from .pipeline import latest_agents
    from .stages import packed_model

    if stage not in STAGES:
        raise UsageError(f"unknown stage '{stage}'. {did_you_mean(stage, STAGES)}")
    run = run if isinstance(run, Run) else Run.open(run)
    kept = latest_agents(run)
    if kept is None or not kept.meta["checks"]:
        raise DataError(
            f"'{run.path}' holds no controller yet: its first round is not finished. Continue it: oneira resume {run.path}"
        )
    checks = kept.meta["checks"]
    name = max(checks, key=lambda w: checks[w]["real_mean"]) if stage == "best" else stage
    if name not in checks:
        raise DataError(f"'{run.path}' has no controller of stage '{stage}'; it has: {', '.join(sorted(checks))}.")
    model = packed_model(run, run.config, checks[name]["memory"])
    model.pop("starts")
    entry = checks[name]
    tau = next(p.tau for p in run.config.rounds[entry["round"]].populations if p.name == entry["population"])
    tree = {
        "model": model, "memory": entry["memory"], "params": kept.tensors[name].numpy(), "stage": name, "tau": tau,
    }  # fmt: skip
    return {"key": digest([model["key"], tree["params"]]), **tree}


def load_agent(run: Run | str | Path, stage: str = "best") -> Agent:
    """The agent of a run; see `agent_tree` for `stage` and the errors."""
    return Agent(agent_tree(run, stage))
