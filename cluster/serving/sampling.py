"""A generative model as a stage: requests for samples, of different seeds and sizes, drawn together.

stage = SampleStage(load_model("runs/realnvp-moons"))
plan = stage.plan(SampleRequest(n=8, seed=0), {})            # raises UsageError for what the model cannot do
stage.step([plan]); plan.found["samples"]                    # as load_model(...).sample(8, seed=0)

Importing this loads no torch.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from oneira.multimodal.stages import Plan
from oneira.platform.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from oneira.generative.models import GenerativeModel

TOGETHER = 256  # rows of one call of the model
MOST_PASSES = 4000  # rows times steps of one request, where steps can be asked for


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """`n` rows by one seed. params: what the model's `draw` is told, such as temperature; `labels` is one label or `n`."""

    n: int = 1
    seed: int = 0
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class SamplePlan(Plan):
    request: SampleRequest
    settings: dict[str, Any]  # of a whole call, so the same for all who share it
    labels: list[int] | None  # of each row


class SampleStage:
    """Hosts one model. A step draws the oldest plan and others with the same settings, up to `TOGETHER` rows and `MOST_PASSES`.

    Raises:
        UsageError: the model cannot be sampled from.
    """

    name = "sampler"

    def __init__(self, model: GenerativeModel) -> None:
        if not model.can_sample:
            raise UsageError(f"A model of kind '{model.kind}' cannot be served: there is nothing to sample from it.")
        self.model = model
        signature = inspect.signature(model.draw).parameters.values()
        self.params = sorted(one.name for one in signature if one.kind is one.KEYWORD_ONLY)
        self.batches: deque[int] = deque(maxlen=100)  # rows of each of the last steps, for whoever looks

    def plan(self, request: SampleRequest, state: Mapping[str, np.ndarray]) -> SamplePlan:
        """Raises UsageError for settings that the model has not, labels that it does not know, and too much work."""
        for name in request.params:
            if name not in self.params:
                known = did_you_mean(name, self.params) if self.params else "This model has none."
                raise UsageError(f"Unknown setting '{name}'. {known}")
        settings = dict(request.params)
        labels = settings.pop("labels", None)
        if labels is not None:
            labels = self._labels([labels] * request.n if isinstance(labels, int) else list(labels), request.n)
        self.model.check(**settings)
        if request.n * self._steps(settings) > MOST_PASSES:
            raise UsageError(
                f"{request.n} samples of {self._steps(settings)} steps; n times steps is {MOST_PASSES} at most."
            )
        return SamplePlan(request=request, settings=settings, labels=labels)

    def _steps(self, settings: Mapping[str, Any]) -> int:
        """The passes of a row, 0 where they cannot be asked for."""
        own: int = getattr(self.model.config, "steps", 0)
        return int(settings.get("steps") or own) if "steps" in self.params else 0

    def _labels(self, labels: list[int], n: int) -> list[int]:
        classes = self.model.space.classes
        if not getattr(self.model.config, "conditional", False):
            raise UsageError("This model was trained without labels; it cannot be asked for one.")
        if len(labels) != n or not all(0 <= label < classes for label in labels):
            raise UsageError(f"Wanted are one label or {n} labels in [0, {classes}).")
        return labels

    def step(self, plans: Sequence[SamplePlan]) -> None:
        """Draws for the first plan and for those that can share its call, which nobody can interrupt: it is as long as the
        largest request alone may be."""
        together: list[SamplePlan] = []
        rows, steps = 0, self._steps(plans[0].settings)
        most = min(TOGETHER, MOST_PASSES // steps) if steps else TOGETHER
        for plan in plans:
            alike = plan.settings == plans[0].settings and (plan.labels is None) == (plans[0].labels is None)
            if alike and (not together or rows + plan.request.n <= most):
                together.append(plan)
                rows += plan.request.n
        self.batches.append(rows)
        for plan, samples in zip(together, self._draw(together), strict=True):
            plan.found = {"samples": samples, "kind": np.array(self.model.space.kind)}
            plan.step, plan.done = 1, True

    def _draw(self, plans: Sequence[SamplePlan]) -> list[np.ndarray]:
        """What each plan gets: points float32 [n, D], visible pictures uint8 [n, H, W, 3], or n texts."""
        from oneira.generative.spaces import visible

        settings = dict(plans[0].settings)
        if plans[0].labels is not None:
            import torch

            settings["labels"] = torch.tensor([label for plan in plans for label in plan.labels or []])
        noise = self.model.noise([(plan.request.n, plan.request.seed) for plan in plans])
        drawn = self.model.draw(noise, **settings)
        space = self.model.space
        rows = np.array(drawn, dtype=np.str_) if space.kind == "text" else drawn.cpu().numpy()
        if space.kind == "pictures":
            rows = visible(rows, space.levels)
        ends = np.cumsum([plan.request.n for plan in plans])[:-1]
        return np.split(rows, ends)
