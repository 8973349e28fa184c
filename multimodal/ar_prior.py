"""The autoregressive prior: an image embedding as a sequence of numbered values (DALL-E 2, section 2.2).

The embedding's principal components, from the strongest down, are each put into one of some buckets of equal probability;
a causal transformer reads the text and predicts the buckets one after another. Before them stands how similar text and
picture are, likewise in buckets: asking for the highest makes pictures that fit their text better. It is the alternative
to `prior`, for the same stage; each step of the stage finds one component.

Legend: B rows, E embedding, L places of a text, W width of a text state, K components, M buckets, T = L + 2 + K - 1 places.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneira.generative.learning import seed_of
from oneira.platform.config import from_dict, to_dict
from oneira.platform.errors import ConfigError, DataError

from .networks import save_tensors
from .prior import DROPPED, HEAD, needs_prior
from .stages import PictureRequest, Plan

LIKENESSES = 8  # buckets of the similarity; the last is asked for
CONFIG, WEIGHTS = "ar_prior.json", "ar_prior.safetensors"


@dataclass(frozen=True, kw_only=True)
class ArPriorConfig:
    """width, layers: of the transformer; heads are 32 wide. components: K. buckets: M."""

    width: int = 128
    layers: int = 6
    components: int = 48
    buckets: int = 64

    def __post_init__(self) -> None:
        if self.width < HEAD or self.width % HEAD:
            raise ConfigError(f"width is {self.width}; it must be a multiple of {HEAD}.")
        for key, lowest in (("layers", 1), ("components", 1), ("buckets", 2)):
            if getattr(self, key) < lowest:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least {lowest}.")


@dataclass(frozen=True)
class Code:
    """How embeddings become buckets: what is fitted, not learned.

    mean float32 [E]; basis [E, K], orthonormal columns; edges [K, M - 1], rising; values [K, M], the mean of each bucket;
    likeness [LIKENESSES - 1], edges of the cosine between text and picture.
    """

    mean: Tensor
    basis: Tensor
    edges: Tensor
    values: Tensor
    likeness: Tensor

    @classmethod
    def fit(cls, images: Tensor, texts: Tensor, components: int, buckets: int) -> Code:
        """From embeddings of pictures float32 [N, E] and of their texts [N, E], N well above M."""
        if components > images.shape[1]:
            raise ConfigError(f"components is {components}; embeddings have {images.shape[1]} numbers.")
        mean = images.mean(0)
        _, _, directions = torch.linalg.svd((images - mean).double(), full_matrices=False)
        basis = directions[:components].T.float().contiguous()
        found = (images - mean) @ basis
        edges = torch.quantile(found, torch.arange(1, buckets) / buckets, dim=0).T.contiguous()
        which = F.one_hot(torch.searchsorted(edges, found.T.contiguous()), buckets).float()  # [K, N, M]
        values = torch.einsum("nk,knm->km", found, which) / which.sum(1).clamp(min=1)
        likeness = torch.quantile((images * texts).sum(1), torch.arange(1, LIKENESSES) / LIKENESSES)
        return cls(mean, basis, edges, values, likeness)


class ArPrior(nn.Module):
    """The transformer. Buffers are the `Code`."""

    def __init__(self, config: ArPriorConfig, code: Code, *, text_width: int, length: int):
        super().__init__()
        self.config, self.text_width, self.length = config, text_width, length
        for key, value in vars(code).items():
            self.register_buffer(key, value.clone())
        self.mean: Tensor
        self.basis: Tensor
        self.edges: Tensor
        self.values: Tensor
        self.likeness: Tensor
        width, embed = config.width, len(code.mean)
        self.from_states, self.from_text = nn.Linear(text_width, width), nn.Linear(embed, width)
        self.no_text = nn.Parameter(0.02 * torch.randn(width))
        self.of_likeness = nn.Embedding(LIKENESSES, width)
        self.of_value = nn.Linear(1, width)  # buckets are ordered: a table of them would have to learn that
        self.place = nn.Parameter(0.02 * torch.randn(length + 1 + config.components, width))
        layer = nn.TransformerEncoderLayer(
            width, width // HEAD, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, config.layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, config.buckets)

    @property
    def clip_mean(self) -> Tensor:
        """Of the embeddings that it has learnt, float32 [E]."""
        return self.mean

    def encode(self, images: Tensor) -> Tensor:
        """Embeddings float32 [B, E] -> buckets int64 [B, K]."""
        with torch.autocast(images.device.type, enabled=False):  # half precision would miss buckets
            found = (images.float() - self.mean) @ self.basis
        return torch.searchsorted(self.edges, found.T.contiguous()).T

    def decode(self, buckets: Tensor) -> Tensor:
        """Buckets int64 [B, K] -> embeddings float32 [B, E], of length 1."""
        return F.normalize(self.values_of(buckets) @ self.basis.T + self.mean, dim=-1)

    def values_of(self, buckets: Tensor) -> Tensor:
        """What the first k components are, float32 [B, k], by their buckets int64 [B, k]."""
        return self.values[: buckets.shape[1]].gather(1, buckets.T).T

    def forward(
        self, buckets: Tensor, likeness: Tensor, text: Tensor, states: Tensor, mask: Tensor, without: Tensor
    ) -> Tensor:
        """Logits of every component up to number k, each given those before it, float32 [B, k + 1, M].

        Args:
            buckets: int64 [B, k], k < K. likeness: int64 [B]. text: float32 [B, E]. states: float32 [B, L, W].
            mask: bool [B, L]. without: bool [B], rows that are not to see their text.
        """
        text = self.from_text(text * math.sqrt(text.shape[1]))[:, None]
        known = torch.where(without[:, None, None], self.no_text, torch.cat([self.from_states(states), text], 1))
        given = self.values_of(buckets) / self.values.std(1)[: buckets.shape[1]]
        x = torch.cat([known, self.of_likeness(likeness)[:, None], self.of_value(given[..., None])], 1)
        x = x + self.place[: x.shape[1]]
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        mask = mask | without[:, None]  # what stands for no text tells nothing of its length
        unread = F.pad(~mask, (0, x.shape[1] - mask.shape[1]))
        return self.head(self.blocks(x, mask=later, src_key_padding_mask=unread)[:, self.length + 1 :]).float()

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Cross entropy of the buckets, in nats a component. batch: what `embedding.encode` gives."""
        images, texts = batch["image_embedding"], batch["text_embedding"]
        buckets = self.encode(images)
        likeness = torch.searchsorted(self.likeness, (images * texts).sum(1))
        without = torch.rand(len(images), generator=generator, device=images.device) < DROPPED
        logits = self(buckets[:, :-1], likeness, texts, batch["text_states"], batch["text_mask"], without)
        return F.cross_entropy(logits.flatten(0, 1), buckets.flatten()), {}

    def save(self, folder: Path) -> None:
        """Writes config and weights into an existing folder."""
        settings = {"config": to_dict(self.config), "text_width": self.text_width, "length": self.length}
        (folder / CONFIG).write_text(json.dumps(settings, indent=1), encoding="utf-8")
        save_tensors(self.state_dict(), folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> ArPrior:
        """What `save` wrote, in eval mode. Raises DataError when the folder holds none."""
        import safetensors.torch

        try:
            settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            tensors = safetensors.torch.load_file(folder / WEIGHTS)
            config = from_dict(ArPriorConfig, settings["config"])
            code = Code(**{field.name: tensors[field.name].float() for field in fields(Code)})
            model = cls(config, code, text_width=settings["text_width"], length=settings["length"])
            model.load_state_dict(tensors)
            return model.eval()
        except (
            OSError, ValueError, KeyError, TypeError, RuntimeError, ConfigError, safetensors.SafetensorError
        ) as error:  # fmt: skip
            raise DataError(f"'{folder}' holds no autoregressive prior: {error}") from error


@dataclass(kw_only=True)
class ArPriorPlan(Plan):
    """buckets: those found so far. lots: in [0, 1), one a component, float64 [K]; they decide what is drawn."""

    lots: np.ndarray
    guidance: float
    text: Tensor
    states: Tensor
    mask: Tensor
    buckets: list[int] = field(default_factory=list)


class ArPriorStage:
    """Fills image_embedding, float32 [E], as `PriorStage` does. It has as many steps as components, whatever is asked for."""

    name = "prior"

    def __init__(self, model: ArPrior, *, guidance: float):
        self.model, self.guidance = model, guidance

    def plan(self, request: PictureRequest, state: Mapping[str, Any]) -> Plan:
        if not needs_prior(request, state):
            return Plan(done=True)
        count = self.model.config.components
        lots = np.random.default_rng(seed_of(request.seed, "prior")).random(count)
        guidance = self.guidance if request.guidance is None else request.guidance
        text, states, mask = (torch.as_tensor(state[key]) for key in ("text_embedding", "text_states", "text_mask"))
        return ArPriorPlan(lots=lots, guidance=guidance, text=text, states=states, mask=mask, steps=count)

    @torch.no_grad()
    def step(self, plans: Sequence[ArPriorPlan]) -> None:
        for plan, logits in zip(plans, self._logits(plans), strict=True):
            shares = torch.softmax(logits.double(), 0).cumsum(0).cpu().numpy()
            lot = plan.lots[len(plan.buckets)] * shares[-1]
            plan.buckets.append(min(int(np.searchsorted(shares, lot, side="right")), len(shares) - 1))
            plan.step += 1
            if plan.step == plan.steps:
                buckets = torch.tensor([plan.buckets], device=self.model.mean.device)
                plan.found, plan.done = {"image_embedding": self.model.decode(buckets)[0].cpu().numpy()}, True

    def _logits(self, plans: Sequence[ArPriorPlan]) -> Tensor:
        """Of each plan's next component, guided, float32 [plans, M]; one call of the network."""
        place = self.model.mean.device
        longest = max(len(plan.buckets) for plan in plans)
        # What follows a row's own buckets cannot be seen from them.
        filled = torch.tensor([plan.buckets + [0] * (longest - len(plan.buckets)) for plan in plans], dtype=torch.long)
        twice = [i for i, plan in enumerate(plans) if plan.guidance != 1.0]
        row = torch.tensor([*range(len(plans)), *twice], device=place)
        text, states, mask = (
            torch.stack([getattr(plan, key) for plan in plans]).to(place)[row] for key in ("text", "states", "mask")
        )
        buckets = filled.view(len(plans), longest).to(place)[row]
        likeness = torch.full((len(row),), LIKENESSES - 1, device=place)
        found = self.model(buckets, likeness, text, states, mask, torch.arange(len(row), device=place) >= len(plans))
        ends = torch.tensor([len(plans[i].buckets) for i in row.tolist()], device=place)
        found = found[torch.arange(len(row), device=place), ends]
        guided = found[: len(plans)].clone()
        for i, other in zip(twice, found[len(plans) :], strict=True):
            guided[i] = other + plans[i].guidance * (guided[i] - other)
        return guided
