"""The first stage: CLIP reads the prompt, and the picture where a request has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .clip import Clip
from .stages import PictureRequest, Plan


@dataclass(kw_only=True)
class TextPlan(Plan):
    """prompt. pixels: float32 [1, 3, S, S], of the request's picture as CLIP sees it, or None."""

    prompt: str
    pixels: Tensor | None


class TextStage:
    """Fills text_embedding float32 [E], text_states float32 [L, W], text_mask bool [L], and image_embedding float32 [E]
    where the request has a picture or an embedding."""

    name = "text"

    def __init__(self, clip: Clip):
        self.clip = clip

    def plan(self, request: PictureRequest, state: Mapping[str, Any]) -> TextPlan:
        pixels = None if request.picture is None else self.clip.pixels(request.picture[None])
        found = {}
        if request.embedding is not None:
            embedding = torch.as_tensor(request.embedding, dtype=torch.float32)
            found["image_embedding"] = F.normalize(embedding, dim=-1).numpy()
        return TextPlan(prompt=request.prompt, pixels=pixels, found=found)

    @torch.no_grad()
    def step(self, plans: Sequence[TextPlan]) -> None:
        texts = [values.cpu().numpy() for values in self.clip.read_texts([plan.prompt for plan in plans])]
        for plan, embedding, states, mask in zip(plans, *texts, strict=True):
            plan.found |= {"text_embedding": embedding, "text_states": states, "text_mask": mask}
            plan.step, plan.done = 1, True
        seen = [plan for plan in plans if plan.pixels is not None]
        if seen:
            pixels = torch.cat([plan.pixels for plan in seen if plan.pixels is not None])
            images = F.normalize(self.clip.network.encode_image(pixels).float(), dim=-1).cpu().numpy()
            for plan, image in zip(seen, images, strict=True):
                plan.found["image_embedding"] = image
