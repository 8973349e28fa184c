"""unCLIP as Karlo was published (Lee et al. 2022): prior, decoder of pixels, and one upsampler whose last step has its own network.

Legend: M rows, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..pictures import finished
from ..stages import PictureRequest, Stage, State
from .folders import Family, PublicFolder
from .priors import TEXT, PriorStage, text_of
from .rows import RowStage, either
from .sampling import read_sampling
from .texts import TextStage

FAMILY = Family(
    "unCLIP",
    "UnCLIPPipeline",
    {
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"), "text_encoder": ("CLIPTextModelWithProjection",),
        "prior": ("PriorTransformer",), "decoder": ("UNet2DConditionModel",), "text_proj": ("UnCLIPTextProjModel",),
        "super_res_first": ("UNet2DModel",), "super_res_last": ("UNet2DModel",), "prior_scheduler": ("UnCLIPScheduler",),
        "decoder_scheduler": ("UnCLIPScheduler",), "super_res_scheduler": ("UnCLIPScheduler",),
    },
)  # fmt: skip
TASKS = ("generate", "embedding")


def make(folder: PublicFolder, device: torch.device, dtype: torch.dtype) -> list[Stage]:
    """The stages of a folder."""
    return [
        TextStage(folder, device, TASKS), PriorStage(folder, device, dtype, "prior_scheduler"),
        DecoderStage(folder, device, dtype), UpsamplerStage(folder, device, dtype),
    ]  # fmt: skip


class DecoderStage(RowStage):
    """Fills picture uint8 [S, S, 3], and drawn float32 [3, S, S], the same unrounded."""

    def __init__(self, folder: PublicFolder, device: torch.device, dtype: torch.dtype):
        side = folder.whole_number("decoder", "sample_size")
        super().__init__(
            "decoder", folder, device, dtype, sampling=read_sampling(folder, "decoder_scheduler"), shape=(3, side, side),
            guidance=8.0, steps=25,
        )  # fmt: skip

    @cached_property
    def unet(self) -> Any:
        return self.folder.load("decoder").to(self.device, memory_format=torch.channels_last)

    @cached_property
    def projection(self) -> Any:
        return self.folder.load("text_proj").to(self.device)

    def conditions(self, request: PictureRequest, state: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        return {"image": torch.as_tensor(state["image_embedding"]), **text_of(state)}

    def predict(self, x_t: Tensor, t: Tensor, given: Mapping[str, Tensor], without: Tensor) -> Tensor:
        embedding, states, mask = (either(without, given[f"empty_{key}"], given[f"text_{key}"]) for key in TEXT)
        image = either(without, self.projection.learned_classifier_free_guidance_embeddings, given["image"])
        states, added = self.projection(
            image_embeddings=image, prompt_embeds=embedding, text_encoder_hidden_states=states,
            do_classifier_free_guidance=False,
        )  # fmt: skip
        mask = F.pad(mask, (self.projection.config.clip_extra_context_tokens, 0), value=True)
        return self.unet(x_t, t, states, class_labels=added, attention_mask=mask).sample

    def find(self, x: Tensor, requests: Sequence[PictureRequest]) -> list[State]:
        return pictures_of(x, requests)


class UpsamplerStage(RowStage):
    """Replaces picture by a larger one. It takes no more steps than its own number, and knows no guidance."""

    def __init__(self, folder: PublicFolder, device: torch.device, dtype: torch.dtype):
        side = folder.whole_number("super_res_first", "sample_size")
        super().__init__(
            f"upsampler-{side}", folder, device, dtype, sampling=read_sampling(folder, "super_res_scheduler"),
            shape=(3, side, side), guidance=1.0, steps=7,
        )  # fmt: skip

    @cached_property
    def first(self) -> Any:
        return self.folder.load("super_res_first").to(self.device, memory_format=torch.channels_last)

    @cached_property
    def last(self) -> Any:
        return self.folder.load("super_res_last").to(self.device, memory_format=torch.channels_last)

    def amounts(self, request: PictureRequest) -> tuple[int, float]:
        return min(request.steps or self.steps, self.steps), self.guidance

    def conditions(self, request: PictureRequest, state: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        small = torch.as_tensor(state["drawn"])[None].clamp(-1, 1)
        return {
            "enlarged": F.interpolate(small, self.shape[1:], mode="bicubic", align_corners=False, antialias=True)[0]
        }  # fmt: skip

    def predict(self, x_t: Tensor, t: Tensor, given: Mapping[str, Tensor], without: Tensor) -> Tensor:
        seen, found = torch.cat([x_t, given["enlarged"]], 1), torch.empty_like(x_t)
        for network, chosen in ((self.first, ~given["last"]), (self.last, given["last"])):
            if chosen.any():
                found[chosen] = network(seen[chosen], t[chosen]).sample.float()[:, : x_t.shape[1]]
        return found

    def find(self, x: Tensor, requests: Sequence[PictureRequest]) -> list[State]:
        return pictures_of(x, requests)


def pictures_of(x: Tensor, requests: Sequence[PictureRequest]) -> list[State]:
    """Rows float32 [B, 3, S, S] as picture and drawn."""
    return [
        {"picture": finished(row, request), "drawn": row.numpy()}
        for row, request in zip(x.float().cpu(), requests, strict=True)
    ]
