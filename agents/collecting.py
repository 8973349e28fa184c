"""The unit of work that gathers experience: a few episodes, driven together, with everything that was seen.

Shapes: n episodes, T steps of one of them, A actions, F features, P parameters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from oneira.platform.devices import device_here

from .controller import ControllerConfig
from .environments import make_world
from .exploration import Exploration, NoisyChoices, NoisyController, RandomChoices, RandomControllers, Wandering
from .worldmodel import Senses, unpack


@torch.inference_mode()
def collect_unit(shared: dict[str, Any] | None, unit: dict[str, Any]) -> list[dict[str, Any]]:
    """Drive the episodes of a unit.

    Args:
        shared: a packed world model, for policies that look; None for those that do not.
        unit: world, policy ("wandering", "random" or "noisy"), seeds (tracks), seed (of the policy), max_steps, stuck, and for
            "noisy" params float [P].

    Returns:
        For each episode frames uint8 [T + 1, 64, 64, 3], actions float32 [T, A] (int64 [T, 1] of a discrete world), rewards float32 [T], terminated, truncated, seed.
    """
    seeds = unit["seeds"]
    batch = make_world(unit["world"]).batch(seeds, np.arange(len(seeds)))
    model = None if shared is None else unpack(shared)
    senses = None if model is None else Senses(model, len(seeds))
    policy = _policy(unit, len(seeds), model.controller if model else ControllerConfig())
    frames = batch.reset()
    episodes: list[dict[str, Any]] = [
        {"frames": [f], "actions": [], "rewards": [], "seed": s} for f, s in zip(frames, seeds, strict=True)
    ]
    rows = np.arange(len(seeds))
    with device_here("cpu").lease(priority="train") as lease:
        for _ in range(unit["max_steps"]):
            lease.step()
            actions = policy.act(senses.see(frames) if senses else None)
            seen, rewards, terminated, truncated = batch.step(actions[rows], rows)
            frames[rows] = seen
            for i, n in enumerate(rows):
                e = episodes[n]
                e["frames"].append(seen[i])
                e["actions"].append(actions[n])
                e["rewards"].append(rewards[i])
                e["terminated"], e["truncated"] = bool(terminated[i]), bool(truncated[i])
            if senses:
                all_rewards = np.zeros(len(seeds), np.float32)
                all_rewards[rows] = rewards
                senses.remember(actions, all_rewards)
            over = terminated | truncated
            if unit["stuck"]:
                over |= batch.steps_since_tile[rows] >= unit["stuck"]
            rows = rows[~over]
            if not len(rows):
                break
    return [
        {
            **e,
            "frames": np.stack(e["frames"]),
            "actions": np.stack(e["actions"]).reshape(len(e["actions"]), -1),
            "rewards": np.array(e["rewards"], np.float32),
        }
        for e in episodes
    ]


def _policy(unit: dict[str, Any], count: int, config: ControllerConfig) -> Exploration:
    world = make_world(unit["world"])
    if unit["policy"] == "wandering":
        return (
            RandomChoices(count, unit["seed"], world.action_size) if world.discrete else Wandering(count, unit["seed"])
        )
    if unit["policy"] == "random":
        return RandomControllers(count, unit["seed"], config)
    params = np.asarray(unit["params"])
    spread = float(np.sqrt(np.mean(params**2)))
    if world.discrete:
        return NoisyChoices(count, unit["seed"], config, params, error=0.4, parameter_noise=0.15 * spread)
    return NoisyController(count, unit["seed"], config, params, action_noise=0.4, parameter_noise=0.15 * spread)
