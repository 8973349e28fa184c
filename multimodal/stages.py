"""From a request to a picture in stages: what a stage is, and the loop that takes requests through them.

    for state in through([text, prior, decoder, upsampler], requests): state["picture"]

A stage plans what it has to do for one picture, and makes one step for any mix of plans with one call of its network. So
pictures of different requests, with different seeds, numbers of steps and guidance, share a call, and may join and leave
at any step. Here the stages follow one another in one process; `oneira.cluster` hosts the same objects in deployments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

State = dict[
    str, np.ndarray
]  # what the stages before have found, by name; plain arrays, so that it may cross processes


@dataclass(frozen=True, kw_only=True)
class PictureRequest:
    """One picture to be made.

    Args:
        task: "generate" from the prompt; "variation" of the picture; "edit" of the picture where the mask is True, to fit the
            prompt; "embedding" draws an image embedding that is given (interpolations and text differences make it).
        prompt: may be empty where the task allows it.
        seed: of all noise of this picture, in [0, 2^63).
        steps: of each sampler; None is the model's own number. guidance: of prior and decoder; None is the model's own.
        picture: uint8 [H, W, 3]. mask: bool [H, W]. embedding: float32 [E].
    """

    task: Literal["generate", "variation", "edit", "embedding"] = "generate"
    prompt: str = ""
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    picture: np.ndarray | None = None
    mask: np.ndarray | None = None
    embedding: np.ndarray | None = None


@dataclass(kw_only=True)
class Plan:
    """What a stage does for one picture, and how far it is. A stage derives its own from it.

    Args:
        done: nothing is left to do. found: what the stage adds to the state, whole when done.
        step, steps: calls of the network made and to be made, for whoever shows progress or estimates a wait.
    """

    done: bool = False
    found: State = field(default_factory=dict)
    step: int = 0
    steps: int = 1


class Stage(Protocol):
    """One network's part of the way. The same seed gives the same picture, whoever shares the batch (at most 1/255 apart)."""

    name: str

    def plan(self, request: PictureRequest, state: Mapping[str, np.ndarray]) -> Any:
        """The stage's own `Plan` for a request, given what the stages before found; done at once where it has no part."""
        ...

    def step(self, plans: Sequence[Any]) -> None:
        """One call of the network for plans that are not done; marks those that are done now."""
        ...


def through(stages: Sequence[Stage], requests: Sequence[PictureRequest], rows: int = 16) -> Iterator[State]:
    """Takes the requests through the stages, at most `rows` together. Yields the state of each at the end, in their order."""
    for start in range(0, len(requests), rows):
        part = requests[start : start + rows]
        states: list[State] = [{} for _ in part]
        for stage in stages:
            plans = [stage.plan(request, state) for request, state in zip(part, states, strict=True)]
            while left := [plan for plan in plans if not plan.done]:
                stage.step(left)
            for state, plan in zip(states, plans, strict=True):
                state.update(plan.found)
        yield from states
