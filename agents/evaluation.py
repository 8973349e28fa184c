"""Scores with their conditions. Reported ones come from Gymnasium's own environment, on seeds never used in training.

    result = evaluate_reference(agent_tree, reported_seeds(100), executor, world="carracing", stage="best")

A unit of work is always `EPISODES_PER_UNIT` episodes stepped together, so that the agent's forward pass is batched and
the result of a seed depends neither on the number of workers nor on the order in which they answer.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, Protocol

import numpy as np

from oneira.platform.errors import UsageError
from oneira.platform.runs import versions

from .environments import make_world
from .worldmodel import digest

DEFAULT_SEED = 2**30  # training draws its seeds from [0, 2**24) only
EPISODES_PER_UNIT = 4


class Agent(Protocol):
    """What is evaluated: acts on the reference environment's own frames, for a fixed number of environments at once."""

    def reset(self, num_envs: int, mask: np.ndarray | None = None) -> None: ...

    def act(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [n, H, W, 3] -> actions [n, A] float32, or [n] int64, as the environment takes them."""
        ...


def reported_seeds(episodes: int, first: int = DEFAULT_SEED) -> list[int]:
    """The seeds S .. S + N - 1 of an evaluation. UsageError unless N >= 1 and S >= 0."""
    if episodes < 1 or first < 0:
        raise UsageError(f"An evaluation needs at least 1 episode and a seed >= 0; got {episodes} and {first}.")
    return list(range(first, first + episodes))


def score(
    returns: Sequence[float],
    seeds: Sequence[int],
    *,
    env_id: str,
    env_version: str,
    preprocessing: str,
    conditions: Mapping[str, Any],
    stage: str,
    wall_s: float,
    env_steps: int,
) -> dict[str, Any]:
    """The JSON of `oneira evaluate`.

    std has ddof 1; ci95 is Student's interval of the mean. Both are None for a single episode, which says nothing of
    spread. conditions: of the environment, such as its difficulty. wall_s in seconds; env_steps over all episodes; versions of the libraries that a score may depend on.
    """
    values = np.asarray(returns, np.float64)
    if not len(values) or len(values) != len(seeds):
        raise ValueError(f"a score needs one seed per return, and one at least; got {len(values)} and {len(seeds)}")
    mean, count = float(values.mean()), len(values)
    std = float(values.std(ddof=1)) if count > 1 else None
    half = None if std is None else student_t_975(count - 1) * std / math.sqrt(count)
    return {
        "mean": mean,
        "std": std,
        "ci95": [None, None] if half is None else [mean - half, mean + half],
        "episodes": count,
        "returns": [float(value) for value in values],
        "seeds": [int(seed) for seed in seeds],
        "env_id": env_id,
        "env_version": env_version,
        "preprocessing": preprocessing,
        "conditions": dict(conditions),
        "stage": stage,
        "wall_s": round(float(wall_s), 3),
        "env_steps": int(env_steps),
        "versions": {"python": sys.version.split()[0], **versions()},
    }


def student_t_975(degrees: int) -> float:
    """The 97.5% quantile of Student's t: with t = sqrt(v) tan(a) its density is cos(a)^(v-1), integrated up to a."""
    if degrees > 1000:  # Cornish-Fisher: the error is below 1e-8
        z = 1.959963984540054
        return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    angles = np.linspace(0.0, math.pi / 2, 100_001)
    density = np.cos(angles) ** (degrees - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(degrees) * math.tan(float(np.interp(0.95 * area[-1], area, angles)))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, in [-1, 1]; equals share their mean rank. 0 if one side is all equal."""
    ranks = []
    for values in (np.asarray(a, np.float64), np.asarray(b, np.float64)):
        _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[group])
    x, y = (r - r.mean() for r in ranks)
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm else 0.0


def promises_too_much(dream_per_step: float, real_per_step: float) -> bool:
    """Whether a dream is exploited: it pays for a step more than half again what reality pays, and 0.3 beyond.

    In a world of survival "a step" is a share of the longest episode: a dream of D steps against a reality of R, of 2,100 at most, is
    suspect where D > 1.5 R + 630.
    """
    return dream_per_step > 0.3 + 1.5 * max(real_per_step, 0)


def evaluate_reference(
    agent: Any, seeds: Sequence[int], executor: Any, *, world: str = "carracing", stage: str = "best"
) -> dict[str, Any]:
    """Drive full episodes of the reference environment and score them; see `score`.

    Args:
        agent: the tree that `agent_from_tree` reads: arrays and configs.
        seeds: one per episode, see `reported_seeds`.
        executor: of platform/executor.py.
        stage: which controller this is: best, dream or real, or a population's name.

    Raises:
        UsageError: the agent was trained in another world.
    """
    described = make_world(world)
    if (own := agent.get("model", {}).get("world", world)) != world:
        raise UsageError(f"This agent was trained in '{own}'; it cannot act in '{world}'.")
    started = time.monotonic()
    units = [list(seeds[i : i + EPISODES_PER_UNIT]) for i in range(0, len(seeds), EPISODES_PER_UNIT)]
    shared = executor.share({"key": digest(agent), "agent": agent, "world": world})
    results = list(executor.map(episodes_unit, shared, units))
    return score(
        [value for result in results for value in result["returns"]],
        seeds,
        env_id=described.env_id,
        env_version=f"{described.library} {metadata.version(described.library)}",
        preprocessing=described.preprocessing,
        conditions=described.conditions,
        stage=stage,
        wall_s=time.monotonic() - started,
        env_steps=sum(sum(result["lengths"]) for result in results),
    )


def evaluate_dream(
    run: Any, agent: Any, seeds: Sequence[int], *, stage: str = "best", tau: float = 1.0
) -> dict[str, Any]:
    """Score an agent's controller in the dream it was bred on: what it believes, not what it is worth. Arguments as above.

    Dream i starts from, and is dreamed with, the random numbers of seed i; rewards are M's expectations.
    """
    from .agent import agent_from_tree
    from .dream import make_dream
    from .loading import dream_source

    started = time.monotonic()
    controller = agent_from_tree(agent)
    names = run.config.controller.features
    env = make_dream(dream_source(run, agent["memory"]), num_envs=len(seeds), obs="latent", tau=tau)
    env.reset(seed=[int(seed) for seed in seeds])
    returns, running, steps = np.zeros(len(seeds)), np.ones(len(seeds), bool), 0
    while running.any():
        actions = controller.controller.act_numpy(controller.params, env.features(names))
        _, rewards, terminated, truncated, _ = env.step(actions)
        returns += np.where(running, rewards, 0)
        steps += int(running.sum())
        running &= ~(terminated | truncated)
    return score(
        list(returns),
        seeds,
        env_id="oneira/Dream-v0",
        env_version=f"tau {tau}",
        preprocessing=make_world(run.config.world).preprocessing,
        conditions={"tau": tau},
        stage=stage,
        wall_s=time.monotonic() - started,
        env_steps=steps,
    )


def episodes_unit(shared: dict[str, Any], seeds: list[int]) -> dict[str, Any]:
    """One unit of work: at most EPISODES_PER_UNIT episodes, with the agent of `shared`."""
    return drive(_agent(shared["key"], shared["agent"]), seeds, world=shared["world"])


def drive(agent: Agent, seeds: Sequence[int], *, world: str) -> dict[str, list]:
    """Full episodes of the reference environment, stepped together: {"returns", "lengths"}, an entry per seed.

    Every episode has an environment of its own, so that none sees what another left behind. The agent always sees
    EPISODES_PER_UNIT rows: matrix products of another shape round differently. Rows with no running episode are black.
    """
    if not 1 <= len(seeds) <= EPISODES_PER_UNIT:
        raise ValueError(f"a unit has 1 to {EPISODES_PER_UNIT} episodes; got {len(seeds)}")
    envs = [reference_environment(world) for _ in seeds]
    try:
        first = [env.reset(seed=int(seed))[0] for env, seed in zip(envs, seeds, strict=True)]
        frames = np.zeros((EPISODES_PER_UNIT, *first[0].shape), np.uint8)
        frames[: len(seeds)] = first
        returns, lengths, running = [0.0] * len(seeds), [0] * len(seeds), set(range(len(seeds)))
        agent.reset(EPISODES_PER_UNIT)
        while running:
            actions = agent.act(frames)
            for i in sorted(running):
                frames[i], reward, terminated, truncated, _ = envs[i].step(actions[i])
                returns[i] += float(reward)
                lengths[i] += 1
                if terminated or truncated:
                    frames[i] = 0
                    running.discard(i)
    finally:
        for env in envs:
            env.close()
    return {"returns": returns, "lengths": lengths}


def reference_environment(world: str, render_mode: str | None = None) -> Any:
    """The world's reference environment, without a window and without pygame's greeting on standard output."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    return make_world(world).reference(render_mode)


_agents: OrderedDict[str, Agent] = OrderedDict()  # a worker builds an agent once, not once a unit


def _agent(key: str, tree: dict[str, Any]) -> Agent:
    from .agent import agent_from_tree

    if key not in _agents:
        _agents[key] = agent_from_tree(tree)
        if len(_agents) > 2:
            _agents.popitem(last=False)
    return _agents[key]
