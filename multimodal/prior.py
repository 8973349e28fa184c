"""The diffusion prior: from a caption to the CLIP embedding of a picture that it could belong to (DALL-E 2, section 2.2).

    prior = Prior.new(PriorConfig(), embed=128, length=32, mean=mean, std=std)
    stage = PriorStage(prior, steps=10, guidance=2.0)

The network is diffusers' `PriorTransformer`: a causal transformer over the text's states, the text's embedding, the
timestep, the noised embedding, and a last place from which the embedding without noise is read. Two are sampled, and the
one that lies nearer to the text's embedding is kept.

Legend: B rows, E embedding (also the width of a text state), L places of a text. Embeddings of CLIP have length 1; within
the diffusion they are standardised: mean 0 and deviation 1 in every dimension.

Source: Ramesh et al. 2022, "Hierarchical Text-Conditional Image Generation with CLIP Latents".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneira.generative.diffusion import Row, Schedule, advance, training_pair
from oneira.generative.learning import seed_of
from oneira.platform.errors import ConfigError

from .networks import diffusers_class, load_network, plain_attention, save_network
from .stages import PictureRequest, Plan

SCHEDULE = Schedule(kind="cosine")
DROPPED = 0.1  # share of the rows that train without their text (Ramesh et al. 2022, section 2.2)
FARTHEST = 5.0  # deviations from the mean that an estimate may lie
SAMPLES = 2  # of which the better is kept
HEAD = 32  # channels of an attention head


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """width, layers: of the transformer; heads are 32 wide. levels: of noise at which each row is seen in a step.

    More levels a row cost no CLIP, and they even out what the loss owes to the noise.
    """

    width: int = 128
    layers: int = 6
    levels: int = 4

    def __post_init__(self) -> None:
        if self.width < HEAD or self.width % HEAD:
            raise ConfigError(f"width is {self.width}; it must be a multiple of {HEAD}.")
        for key in ("layers", "levels"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least 1.")


class Prior(nn.Module):
    """diffusers' transformer, and how it is trained. Its statistics, `clip_mean` and `clip_std`, are fitted, not learned."""

    def __init__(self, network: Any, levels: int = 1):
        super().__init__()
        self.network: Any = network
        self.levels = levels
        network.clip_mean.requires_grad_(False)
        network.clip_std.requires_grad_(False)

    @classmethod
    def new(cls, config: PriorConfig, *, embed: int, length: int, mean: Tensor, std: Tensor) -> Prior:
        """An untrained one. mean, std: float32 [E], of the embeddings it will learn (they are zero in diffusers' class)."""
        network = diffusers_class("PriorTransformer")(
            num_attention_heads=config.width // HEAD, attention_head_dim=HEAD, num_layers=config.layers,
            embedding_dim=embed, num_embeddings=length,
        )  # fmt: skip
        with torch.no_grad():
            network.clip_mean.copy_(mean[None])
            network.clip_std.copy_(std[None])
            nn.init.normal_(network.positional_embedding, std=0.02)
            nn.init.normal_(network.prd_embedding, std=0.02)
        return cls(network, config.levels)

    @property
    def clip_mean(self) -> Tensor:
        """Of the embeddings that it has learnt, float32 [E]."""
        return self.network.clip_mean[0]

    @property
    def embed(self) -> int:
        return self.network.config.embedding_dim

    def standardise(self, embedding: Tensor) -> Tensor:
        return (embedding - self.network.clip_mean) / self.network.clip_std

    def restore(self, x: Tensor) -> Tensor:
        """Undoes `standardise`, float32 [B, E] of length 1."""
        return F.normalize(x * self.network.clip_std + self.network.clip_mean, dim=-1)

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor, states: Tensor, mask: Tensor, without: Tensor) -> Tensor:
        """The estimate of x_0, float32 [B, E].

        Args:
            x_t: float32 [B, E], standardised, noised. t: int64 [B]. text: float32 [B, E]. states: float32 [B, L, E].
            mask: bool [B, L]. without: bool [B], rows that are not to see their text.
        """
        text = text.masked_fill(without[:, None], 0) * math.sqrt(self.embed)
        states = states.masked_fill(without[:, None, None], 0)
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        mask = torch.where(without[:, None], first, mask)
        return self.network(x_t, t, text, states, mask).predicted_image_embedding.float()

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Squared error of the estimate of x_0 (Ramesh et al. 2022, eq. 2). batch: what `embedding.encode` gives."""
        rows = {key: value.repeat_interleave(self.levels, 0) for key, value in batch.items()}
        x_0 = self.standardise(rows["image_embedding"])
        without = torch.rand(len(x_0), generator=generator, device=x_0.device) < DROPPED
        x_t, t, target = training_pair(SCHEDULE, "x0", x_0, generator)
        with plain_attention(x_0.device):
            found = self(x_t, t, rows["text_embedding"], rows["text_states"], rows["text_mask"], without)
        return F.mse_loss(found, target), {}

    def save(self, folder: Path) -> None:
        save_network(self.network, folder)

    @classmethod
    def load(cls, folder: Path) -> Prior:
        """What `save` wrote, in eval mode. Raises DataError when the folder holds none."""
        return cls(load_network(folder, "PriorTransformer")[0]).eval()


@dataclass(kw_only=True)
class PriorPlan(Plan):
    """rows: samples under way. text float32 [E], states [L, E], mask bool [L]: what they are conditioned on."""

    rows: list[Row]
    text: Tensor
    states: Tensor
    mask: Tensor


class PriorStage:
    """Fills image_embedding, float32 [E], where the stages before have not (an edit with a prompt fills it anew)."""

    name = "prior"

    def __init__(self, model: Prior, *, steps: int, guidance: float):
        self.model, self.steps, self.guidance = model, steps, guidance

    def plan(self, request: PictureRequest, state: Mapping[str, Any]) -> Plan:
        if not needs_prior(request, state):
            return Plan(done=True)
        steps = self.steps if request.steps is None else request.steps
        guidance = self.guidance if request.guidance is None else request.guidance
        rows = [
            Row.begin(
                SCHEDULE, (self.model.embed,), seed=seed_of(request.seed, "prior", k), steps=steps, guidance=guidance
            )
            for k in range(SAMPLES)
        ]
        text, states, mask = (torch.as_tensor(state[key]) for key in ("text_embedding", "text_states", "text_mask"))
        return PriorPlan(rows=rows, text=text, states=states, mask=mask, steps=steps)

    @torch.no_grad()
    def step(self, plans: Sequence[PriorPlan]) -> None:
        place = self.model.network.clip_mean.device
        text, states, mask = (
            torch.stack([getattr(plan, key) for plan in plans for _ in range(SAMPLES)]).to(place)
            for key in ("text", "states", "mask")
        )

        def network(x_t: Tensor, t: Tensor, row: Tensor, without: Tensor) -> Tensor:
            return self.model(x_t, t, text[row], states[row], mask[row], without)

        rows = [row for plan in plans for row in plan.rows]
        advance(rows, network, SCHEDULE, "x0", clip=FARTHEST, device=place)
        for plan in plans:
            plan.step += 1
            if plan.rows[0].done:
                self._finish(plan)

    def _finish(self, plan: PriorPlan) -> None:
        found = self.model.restore(torch.stack([row.x for row in plan.rows])).cpu()
        best = int((found @ plan.text).argmax())
        plan.found, plan.done = {"image_embedding": found[best].numpy()}, True


def needs_prior(request: PictureRequest, state: Mapping[str, Any]) -> bool:
    """Whether an image embedding is to be made from the text.

    That of an edit's picture would draw the picture again, so a prompt, which says what all of it shall show, replaces it.
    """
    return "image_embedding" not in state or (request.task == "edit" and bool(request.prompt.strip()))
