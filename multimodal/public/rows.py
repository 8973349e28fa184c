"""A stage of a public model that draws rows: what the families' priors, decoders and upsamplers share.

A family says what a row is conditioned on (`conditions`), what its network predicts (`predict`), and what is made of rows that
are done (`find`). The rest, batches of rows at different steps, is here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oneira.generative.diffusion import Row, advance
from oneira.generative.learning import seed_of

from ..stages import PictureRequest, Plan, State
from .folders import PublicFolder
from .sampling import Sampling


@dataclass(kw_only=True)
class RowPlan(Plan):
    """row: under way. given: what it is conditioned on, by name."""

    request: PictureRequest
    row: Row
    given: Mapping[str, Tensor]


class RowStage(ABC):
    """Derive a stage from it.

    Args:
        shape: of a row. guidance, steps: the model's own, where a request says nothing.
        dtype: bfloat16 lets the network's arithmetic be of half precision.
    """

    def __init__(
        self, name: str, folder: PublicFolder, device: torch.device, dtype: torch.dtype, *, sampling: Sampling,
        shape: tuple[int, ...], guidance: float, steps: int,
    ):  # fmt: skip
        self.name, self.folder, self.device, self.dtype = name, folder, device, dtype
        self.sampling, self.shape, self.guidance, self.steps = sampling, shape, guidance, steps

    # ---- what a family says

    def needed(self, request: PictureRequest, state: Mapping[str, np.ndarray]) -> bool:
        """Whether there is anything to do for a request."""
        return True

    @abstractmethod
    def conditions(self, request: PictureRequest, state: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """What a row is conditioned on: tensors of the same shapes for every request."""

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, given: Mapping[str, Tensor], without: Tensor) -> Tensor:
        """What `generative.diffusion.Network` says, of rows [M, ...] with their conditions; `given["last"]` is bool [M]:
        whether it is their last step."""

    @abstractmethod
    def find(self, x: Tensor, requests: Sequence[PictureRequest]) -> list[State]:
        """What rows that are done, [B, ...], add to their states."""

    def amounts(self, request: PictureRequest) -> tuple[int, float]:
        """Steps and guidance of a request."""
        steps = self.steps if request.steps is None else request.steps
        return steps, self.guidance if request.guidance is None else request.guidance

    def stepped(self, plan: RowPlan) -> Tensor:
        """What a row goes on with after a step that was not its last."""
        return plan.row.x

    # ---- the stage

    def plan(self, request: PictureRequest, state: Mapping[str, np.ndarray]) -> Any:
        if not self.needed(request, state):
            return Plan(done=True)
        steps, guidance = self.amounts(request)
        row = self.sampling.begin(self.shape, seed_of(request.seed, self.name), steps, guidance)
        return RowPlan(request=request, row=row, steps=steps, given=self.conditions(request, state))

    @torch.no_grad()
    def step(self, plans: Sequence[RowPlan]) -> None:
        given = {key: torch.stack([plan.given[key] for plan in plans]).to(self.device) for key in plans[0].given}
        given["last"] = torch.tensor([plan.step + 1 == plan.steps for plan in plans], device=self.device)

        def network(x_t: Tensor, t: Tensor, row: Tensor, without: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16):
                output = self.predict(x_t, t, {key: value[row] for key, value in given.items()}, without)
            return output if self.sampling.learned else output[:, : x_t.shape[1]]

        said = self.sampling
        advance(
            [plan.row for plan in plans], network, said.schedule, said.prediction, clip=said.clip, device=self.device
        )
        done = []
        for plan in plans:
            plan.step += 1
            if plan.row.done:
                done.append(plan)
            else:
                plan.row.x = self.stepped(plan)
        if done:
            found = self.find(torch.stack([plan.row.x for plan in done]), [plan.request for plan in done])
            for plan, state in zip(done, found, strict=True):
                plan.found, plan.done = state, True


def either(without: Tensor, nothing: Tensor, something: Tensor) -> Tensor:
    """Rows of `nothing` where `without` is True, of `something` elsewhere."""
    return torch.where(without.view(-1, *(1,) * (something.dim() - 1)), nothing, something)
