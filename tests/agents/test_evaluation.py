"""Scores: statistics by hand, the interface by key, and the reference environment against Gymnasium driven alone."""

from __future__ import annotations

import json
import math
import sys
import types

import gymnasium
import numpy as np
import pytest

from oneira.agents import evaluation
from oneira.agents.evaluation import drive, evaluate_reference, rank_correlation, reported_seeds, score, student_t_975
from oneira.platform.errors import UsageError
from oneira.platform.executor import SerialExecutor

CONDITIONS = {
    "env_id": "CarRacing-v3", "env_version": "gymnasium 1.4.0", "preprocessing": "none", "conditions": {"skill": 4}, "stage": "best",
    "wall_s": 1.5, "env_steps": 3000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("degrees", "quantile"),  # from the published tables
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (15, 2.1314), (29, 2.0452), (99, 1.9842), (999, 1.9623), (5000, 1.9604)],
)
def test_student_t(degrees: int, quantile: float) -> None:
    assert student_t_975(degrees) == pytest.approx(quantile, abs=6e-5)


def test_the_normal_limit_is_joined_without_a_step() -> None:
    assert student_t_975(1000) == pytest.approx(student_t_975(1001), abs=1e-5)


def test_score_by_hand() -> None:
    result = score([1.0, 2.0, 6.0], [5, 6, 7], **CONDITIONS)
    assert list(result)[:3] == ["mean", "std", "ci95"]
    assert (result["mean"], result["std"]) == (3.0, pytest.approx(math.sqrt(7)))
    half = 4.302653 * math.sqrt(7 / 3)
    assert result["ci95"] == [pytest.approx(3 - half, abs=1e-4), pytest.approx(3 + half, abs=1e-4)]
    assert (result["episodes"], result["returns"], result["seeds"]) == (3, [1.0, 2.0, 6.0], [5, 6, 7])
    assert {key: result[key] for key in CONDITIONS} == CONDITIONS and result["versions"]["gymnasium"]
    json.dumps(result, allow_nan=False)


def test_one_episode_has_no_spread() -> None:
    result = score([4.0], [0], **CONDITIONS)
    assert (result["std"], result["ci95"]) == (None, [None, None])
    json.dumps(result, allow_nan=False)


def test_rank_correlation_by_hand() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 25, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [9, 7, 5, 3]) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4
    assert rank_correlation([0, 5, 5, 7], [1, 3, 2, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0


def test_seeds() -> None:
    assert reported_seeds(3) == [2**30, 2**30 + 1, 2**30 + 2]
    with pytest.raises(UsageError):
        reported_seeds(0)


class Straight:
    """Full gas, and from a row's own step 31 on it swerves by what it sees: rows mixed up would drive elsewhere."""

    shapes: set

    def reset(self, num_envs: int, mask: np.ndarray | None = None) -> None:
        self.steps = np.zeros(num_envs, int)
        self.shapes = set()

    def act(self, frames: np.ndarray) -> np.ndarray:
        self.shapes.add((frames.shape, str(frames.dtype)))
        self.steps += 1
        green = frames[..., 1].mean(axis=(1, 2)) / 255
        steer = np.where(self.steps > 30, green - 0.5, 0)
        return np.stack([steer, np.full(len(frames), 0.3), np.zeros(len(frames))], 1).astype(np.float32)


@pytest.fixture
def short_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference environment with a time limit of 60 steps: the real one takes ten seconds an episode."""

    def reference(self, render_mode: str | None = None):
        return gymnasium.make("CarRacing-v3", render_mode=render_mode, max_episode_steps=60)

    monkeypatch.setattr("oneira.agents.environments.CarRacing.reference", reference)


def alone(seed: int) -> float:
    """The same drive, with nothing but Gymnasium."""
    env = gymnasium.make("CarRacing-v3", max_episode_steps=60)
    agent, total, over = Straight(), 0.0, False
    agent.reset(1)
    frame, _ = env.reset(seed=seed)
    while not over:
        frame, reward, terminated, truncated, _ = env.step(agent.act(frame[None])[0])
        total += float(reward)
        over = terminated or truncated
    env.close()
    return total


@pytest.mark.usefixtures("short_episodes")
def test_episodes_driven_together_are_those_driven_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("oneira.agents.agent")
    agents: list[Straight] = []
    module.agent_from_tree = lambda tree: agents.append(Straight()) or agents[-1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "oneira.agents.agent", module)
    monkeypatch.setattr(evaluation, "_agents", type(evaluation._agents)())
    seeds = reported_seeds(5)
    with SerialExecutor() as executor:
        result = evaluate_reference({"weights": np.ones(3)}, seeds, executor, stage="dream")
    assert result["returns"] == [pytest.approx(alone(seed), abs=1e-9) for seed in seeds]
    assert len(set(result["returns"])) > 1  # the tracks do differ
    assert (result["seeds"], result["env_steps"], result["stage"]) == (seeds, 300, "dream")
    assert len(agents) == 1  # built once for two units
    assert agents[0].shapes == {((4, 96, 96, 3), "uint8")}  # also for the unit of one episode
    with pytest.raises(ValueError, match="1 to 4"):
        drive(Straight(), [], world="carracing")
