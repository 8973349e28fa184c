"""The first stage of public models: their text encoder reads the prompt, and once the empty one, which guidance goes away from.

Legend: L places of a text, W width of a state, E embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from oneira.platform.errors import UsageError

from ..stages import PictureRequest, Plan, State
from .folders import PublicFolder


@dataclass(kw_only=True)
class TextPlan(Plan):
    """request: whose prompt and picture are to be read."""

    request: PictureRequest


class TextStage:
    """Fills text_embedding float32 [E], text_states float32 [L, W], text_mask bool [L], and the same of no text as
    empty_embedding, empty_states and empty_mask.

    The embedding is that of CLIP's common space where the encoder has it, else the pooled state, else the mean of the states.
    Of a request for "embedding" it fills image_embedding as it is. Other tasks than `tasks` raise UsageError.

    Args:
        length: L; 0 is the encoder's own.
    """

    name = "text"

    def __init__(self, folder: PublicFolder, device: torch.device, tasks: Sequence[str], length: int = 0):
        self.folder, self.device, self.tasks, self.length = folder, device, tasks, length

    @cached_property
    def tokenizer(self) -> Any:
        return self.folder.load("tokenizer")

    @cached_property
    def encoder(self) -> Any:
        return self.folder.load("text_encoder").to(self.device)

    @cached_property
    def empty(self) -> State:
        """What the encoder says of no text."""
        return {name.replace("text", "empty"): value for name, value in self.read([""])[0].items()}

    def plan(self, request: PictureRequest, state: Mapping[str, np.ndarray]) -> TextPlan:
        if request.task not in self.tasks:
            name = self.folder.family.name
            raise UsageError(f"{name} has no '{request.task}'. Allowed: {', '.join(self.tasks)}.")
        return TextPlan(request=request)

    def step(self, plans: Sequence[TextPlan]) -> None:
        read = self.read([plan.request.prompt for plan in plans])
        for plan, found in zip(plans, read, strict=True):
            plan.found = {**found, **self.empty, **self.see(plan.request)}
            plan.step, plan.done = 1, True

    def see(self, request: PictureRequest) -> State:
        """What else is known of a request."""
        if request.embedding is None:
            return {}
        return {"image_embedding": np.asarray(request.embedding, np.float32)}

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> list[State]:
        """Texts of any length, cut where the encoder ends."""
        own = getattr(self.encoder.config, "max_position_embeddings", self.length)
        length = self.length or min(self.tokenizer.model_max_length, own)
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        mask = tokens.attention_mask
        masked = getattr(self.encoder.config, "use_attention_mask", self.encoder.config.model_type == "t5")
        said = self.encoder(
            tokens.input_ids.to(self.device), **({"attention_mask": mask.to(self.device)} if masked else {})
        )
        states = said.last_hidden_state.float().cpu()
        embedding = said.get("text_embeds", said.get("pooler_output"))
        if embedding is None:
            embedding = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        columns = {
            "text_embedding": embedding.float().cpu().numpy(),
            "text_states": states.numpy(),
            "text_mask": mask.bool().numpy(),
        }
        return [{name: values[i] for name, values in columns.items()} for i in range(len(texts))]
