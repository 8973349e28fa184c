"""Kandinsky 2.2 (Razzhigaev et al. 2023): CLIP and a prior in one folder, a decoder over latents and its autoencoder in another.

    oneira generate "a fox" --model prior=kandinsky-2-2-prior,decoder=kandinsky-2-2-decoder --out fox.png

The decoder sees the image embedding alone, never the text. Legend: E embedding, S side in pixels, s side in latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..pictures import finished
from ..stages import PictureRequest, Stage, State
from .folders import SCHEDULERS, Family, PublicFolder
from .priors import PriorStage
from .rows import RowStage, either
from .sampling import STEPS, read_sampling
from .texts import TextStage

PRIOR = Family(
    "Kandinsky 2.2",
    "KandinskyV22PriorPipeline",
    {
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"), "text_encoder": ("CLIPTextModelWithProjection",),
        "image_encoder": ("CLIPVisionModelWithProjection",), "image_processor": ("CLIPImageProcessor",),
        "prior": ("PriorTransformer",), "scheduler": ("UnCLIPScheduler",),
    },
)  # fmt: skip
DECODER = Family(
    "Kandinsky 2.2",
    "KandinskyV22Pipeline",
    {"unet": ("UNet2DConditionModel",), "movq": ("VQModel",), "scheduler": SCHEDULERS},
)
TASKS = ("generate", "variation", "embedding")


def make(prior: PublicFolder, decoder: PublicFolder, device: torch.device, dtype: torch.dtype) -> list[Stage]:
    """The stages of two folders."""
    return [ClipStage(prior, device, TASKS), PriorStage(prior, device, dtype), LatentStage(decoder, device, dtype)]


class ClipStage(TextStage):
    """Fills as well empty_image float32 [E], the embedding of a picture of zeros, and image_embedding of the request's picture."""

    @cached_property
    def eye(self) -> Any:
        return self.folder.load("image_encoder").to(self.device)

    @cached_property
    def preparation(self) -> Any:
        return self.folder.load("image_processor")

    @cached_property
    def empty(self) -> State:
        side = self.eye.config.image_size
        return {**super().empty, "empty_image": self.look(torch.zeros(1, 3, side, side))}

    def see(self, request: PictureRequest) -> State:
        if request.picture is None:
            return super().see(request)
        pixels = self.preparation(request.picture, input_data_format="channels_last", return_tensors="pt").pixel_values
        return {"image_embedding": self.look(pixels)}

    @torch.no_grad()
    def look(self, pixels: Tensor) -> np.ndarray:
        """Pixels as the encoder takes them, float32 [1, 3, S, S] -> float32 [E]."""
        return self.eye(pixels.to(self.device)).image_embeds[0].float().cpu().numpy()


class LatentStage(RowStage):
    """Fills picture, uint8 [S, S, 3]."""

    def __init__(self, folder: PublicFolder, device: torch.device, dtype: torch.dtype):
        unet, sampling = folder.config("unet"), read_sampling(folder)
        side = folder.whole_number("unet", "sample_size")
        super().__init__(
            "decoder", folder, device, dtype, sampling=sampling, shape=(int(unet.get("in_channels", 4)), side, side),
            guidance=4.0, steps=STEPS[sampling.sampler],
        )  # fmt: skip

    @cached_property
    def unet(self) -> Any:
        return self.folder.load("unet").to(self.device, memory_format=torch.channels_last)

    @cached_property
    def movq(self) -> Any:
        return self.folder.load("movq").to(self.device)

    def conditions(self, request: PictureRequest, state: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        return {key: torch.as_tensor(state[key]) for key in ("image_embedding", "empty_image")}

    def predict(self, x_t: Tensor, t: Tensor, given: Mapping[str, Tensor], without: Tensor) -> Tensor:
        image = either(without, given["empty_image"], given["image_embedding"])
        return self.unet(x_t, t, None, added_cond_kwargs={"image_embeds": image}).sample

    def find(self, x: Tensor, requests: Sequence[PictureRequest]) -> list[State]:
        pictures = self.movq.decode(x, force_not_quantize=True).sample.float().cpu()
        return [{"picture": finished(picture, request)} for picture, request in zip(pictures, requests, strict=True)]
