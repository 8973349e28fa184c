"""A small real model of text to image, with random weights: what the server is tested with.

load("tiny")        16 dimensions, pictures of 64 and 128 pixels, a few steps
load("patient")     the same, and every step takes 50 ms: to be cancelled, to be waited for
load("other"), load("third")    as "tiny", with other weights
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from oneira.generative.diffusion import Row, Schedule, advance
from oneira.multimodal.stages import PictureRequest, Plan, State
from oneira.platform.errors import UsageError

DIMENSIONS = 16
LENGTH = 24
SEEDS = {"tiny": 0, "patient": 0, "other": 1, "third": 2}  # of the weights
SCHEDULE = Schedule(timesteps=100)


@dataclass(kw_only=True)
class TextPlan(Plan):
    request: PictureRequest


class Text:
    """Bytes of the prompt, looked up and averaged; a picture's mean colours, projected."""

    name = "text"

    def __init__(self) -> None:
        self.table = nn.Embedding(256, DIMENSIONS)
        self.see = nn.Linear(3 * 16, DIMENSIONS)

    def plan(self, request: PictureRequest, state: Mapping[str, np.ndarray]) -> TextPlan:
        if "purple" in request.prompt and "unknown" in request.prompt:
            raise UsageError("The prompt has a word that the model refuses.")
        return TextPlan(request=request)

    @torch.no_grad()
    def step(self, plans: Sequence[TextPlan]) -> None:
        for plan in plans:
            codes = list(plan.request.prompt.encode())[:LENGTH]
            states = torch.zeros(LENGTH, DIMENSIONS)
            states[: len(codes)] = self.table(torch.tensor(codes, dtype=torch.long))
            mask = np.arange(LENGTH) < len(codes)
            plan.found = {
                "text_embedding": states.sum(0).div(max(len(codes), 1)).numpy(),
                "text_states": states.numpy(),
                "text_mask": mask,
            }
            if plan.request.picture is not None:
                pixels = torch.from_numpy(plan.request.picture).permute(2, 0, 1).float().div(255)[None]
                plan.found["image_embedding"] = self.see(interpolate(pixels, (4, 4), mode="area").flatten(1))[0].numpy()
            plan.step, plan.done = 1, True


@dataclass(kw_only=True)
class RowPlan(Plan):
    row: Row | None = None
    condition: Tensor = field(default_factory=lambda: torch.zeros(0))
    request: PictureRequest = field(default_factory=PictureRequest)


class _Diffusion:
    steps = 4
    shape: tuple[int, ...] = ()

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause
        self.batches: list[int] = []  # rows of each step made, for the tests that look

    def _plan(self, request: PictureRequest, condition: Tensor) -> RowPlan:
        steps = request.steps or self.steps
        guidance = 2.0 if request.guidance is None else request.guidance
        row = Row.begin(SCHEDULE, self.shape, seed=request.seed, steps=steps, guidance=guidance)
        return RowPlan(row=row, condition=condition, request=request, steps=steps)

    def step(self, plans: Sequence[RowPlan]) -> None:
        conditions = torch.stack([plan.condition for plan in plans])

        def network(x: Tensor, t: Tensor, row: Tensor, without: Tensor) -> Tensor:
            blind = without.view(-1, *[1] * (conditions.dim() - 1))
            return self.predict(x, t / SCHEDULE.timesteps, torch.where(blind, 0.0, conditions[row]))

        advance([plan.row for plan in plans], network, SCHEDULE, "x0", clip=1.0)
        self.batches.append(len(plans))
        time.sleep(self.pause)
        for plan in plans:
            plan.step += 1
            if plan.row.done:
                plan.done, plan.found = True, self.find(plan)

    def predict(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        raise AssertionError

    def find(self, plan: RowPlan) -> State:
        raise AssertionError


class Prior(_Diffusion):
    name, shape = "prior", (DIMENSIONS,)

    def __init__(self, pause: float) -> None:
        super().__init__(pause)
        self.net = nn.Sequential(nn.Linear(2 * DIMENSIONS + 1, 32), nn.SiLU(), nn.Linear(32, DIMENSIONS), nn.Tanh())

    def plan(self, request: PictureRequest, state: Mapping[str, np.ndarray]) -> RowPlan:
        if request.task == "embedding":
            return RowPlan(done=True, found={"image_embedding": request.embedding})
        if "image_embedding" in state:
            return RowPlan(done=True)
        return self._plan(request, torch.from_numpy(state["text_embedding"]))

    def predict(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self.net(torch.cat([x, condition, t[:, None]], 1))

    def find(self, plan: RowPlan) -> State:
        return {"image_embedding": plan.row.x.numpy()}


class Decoder(_Diffusion):
    name, shape = "decoder", (3, 64, 64)

    def __init__(self, pause: float) -> None:
        super().__init__(pause)
        self.colour = nn.Linear(DIMENSIONS, 3)
        self.net = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1), nn.Tanh())

    def plan(self, request: PictureRequest, state: Mapping[str, np.ndarray]) -> RowPlan:
        return self._plan(request, torch.from_numpy(state["image_embedding"]))

    def predict(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        colour = self.colour(condition)[:, :, None, None].expand(-1, -1, 64, 64)
        return self.net(torch.cat([x, colour], 1))

    def find(self, plan: RowPlan) -> State:
        return {"picture": to_bytes(plan.row.x, plan.request), "drawn": plan.row.x.numpy()}


class Upsampler(_Diffusion):
    name, shape = "upsampler-128", (3, 128, 128)
    steps = 2

    def __init__(self, pause: float) -> None:
        super().__init__(pause)
        self.net = nn.Conv2d(6, 3, 3, padding=1)

    def plan(self, request: PictureRequest, state: Mapping[str, np.ndarray]) -> RowPlan:
        low = torch.from_numpy(state["drawn"])[None]
        return self._plan(request, interpolate(low, (128, 128), mode="bilinear")[0])

    def predict(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return (condition + 0.05 * self.net(torch.cat([x, condition], 1))).clamp(-1, 1)

    def find(self, plan: RowPlan) -> State:
        return {"picture": to_bytes(plan.row.x, plan.request)}


def to_bytes(x: Tensor, request: PictureRequest) -> np.ndarray:
    """uint8 [H, W, 3]; in an edit what is not masked stays as it was."""
    picture = x.add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    if request.mask is None:
        return picture
    side = len(picture)
    every = len(request.mask) // side
    return np.where(request.mask[::every, ::every, None], picture, request.picture[::every, ::every])


@dataclass(frozen=True)
class Model:
    name: str
    stages: list


def load(name: str) -> Model:
    """The model of one of these names; the same weights every time."""
    if name not in SEEDS:
        raise UsageError(f"Unknown model '{name}'. Allowed: {', '.join(SEEDS)}.")
    pause = 0.05 if name == "patient" else 0.0
    with torch.random.fork_rng():
        torch.manual_seed(SEEDS[name])
        return Model(name, [Text(), Prior(pause), Decoder(pause), Upsampler(pause)])
