"""DeepFloyd IF: T5 reads the prompt, a UNet draws pixels, and a second folder's UNet enlarges them, told the same text.

    oneira generate "a fox" --model decoder=IF-I-XL-v1.0,upsampler=IF-II-L-v1.0 --out fox.png

The first folder alone gives pictures of 64 pixels. Safety checker and watermarker of the folders are not run. After Saharia et
al. 2022 ("Imagen"). Legend: S side in pixels, L places of a text, W width of a text state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from oneira.generative.diffusion import noise_of
from oneira.generative.learning import seed_of

from ..stages import PictureRequest, Stage, State
from .folders import SCHEDULERS, Family, PublicFolder
from .rows import RowStage, either
from .sampling import read_sampling
from .texts import TextStage
from .unclip import pictures_of

FAMILY = Family(
    "DeepFloyd IF",
    "IFPipeline",
    {
        "tokenizer": ("T5Tokenizer", "T5TokenizerFast"), "text_encoder": ("T5EncoderModel",),
        "unet": ("UNet2DConditionModel",), "scheduler": SCHEDULERS,
    },
)  # fmt: skip
UPSAMPLER = Family(
    "DeepFloyd IF's upsampler",
    "IFSuperResolutionPipeline",
    {"unet": ("UNet2DConditionModel",), "scheduler": SCHEDULERS, "image_noising_scheduler": ("DDPMScheduler",)},
)
TASKS = ("generate",)
LENGTH = 77  # places of a text
LEVEL = 250  # timestep of the noise that is laid over the small picture


def make(folder: PublicFolder, upsampler: PublicFolder | None, device: torch.device, dtype: torch.dtype) -> list[Stage]:
    """The stages of one folder or two."""
    stages: list[Stage] = [T5Stage(folder, device, TASKS, LENGTH), PixelStage(folder, device, dtype)]
    return stages if upsampler is None else [*stages, EnlargingStage(upsampler, device, dtype)]


class T5Stage(TextStage):
    """Reads prompts in small letters, as the networks were trained."""

    def read(self, texts: Sequence[str]) -> list[State]:
        return super().read([text.lower().strip() for text in texts])


class PixelStage(RowStage):
    """Fills picture uint8 [S, S, 3], and drawn float32 [3, S, S], the same unrounded."""

    def __init__(
        self, folder: PublicFolder, device: torch.device, dtype: torch.dtype, *, name: str = "decoder",
        guidance: float = 7.0, steps: int = 100,
    ):  # fmt: skip
        side = folder.whole_number("unet", "sample_size")
        super().__init__(
            name, folder, device, dtype, sampling=read_sampling(folder), shape=(3, side, side), guidance=guidance,
            steps=steps,
        )  # fmt: skip

    @cached_property
    def unet(self) -> Any:
        return self.folder.load("unet").to(self.device, memory_format=torch.channels_last)

    def conditions(self, request: PictureRequest, state: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        return {key: torch.as_tensor(state[key]) for key in ("text_states", "empty_states")}

    def predict(self, x_t: Tensor, t: Tensor, given: Mapping[str, Tensor], without: Tensor) -> Tensor:
        return self.unet(x_t, t, either(without, given["empty_states"], given["text_states"])).sample

    def find(self, x: Tensor, requests: Sequence[PictureRequest]) -> list[State]:
        return pictures_of(x, requests)


class EnlargingStage(PixelStage):
    """Replaces picture by a larger one. It takes no more steps than its own number, and its own guidance."""

    def __init__(self, folder: PublicFolder, device: torch.device, dtype: torch.dtype):
        name = f"upsampler-{folder.whole_number('unet', 'sample_size')}"
        super().__init__(folder, device, dtype, name=name, guidance=4.0, steps=50)
        self.level = read_sampling(folder, "image_noising_scheduler").schedule.at(LEVEL)

    def amounts(self, request: PictureRequest) -> tuple[int, float]:
        return min(request.steps or self.steps, self.steps), self.guidance

    def conditions(self, request: PictureRequest, state: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        small = torch.as_tensor(state["drawn"])[None]
        enlarged = F.interpolate(small, self.shape[1:], mode="bilinear", align_corners=True)[0]
        noise = noise_of(seed_of(request.seed, self.name, "condition"), 0, self.shape)
        alpha, sigma = self.level
        return {**super().conditions(request, state), "enlarged": alpha * enlarged + sigma * noise}

    def predict(self, x_t: Tensor, t: Tensor, given: Mapping[str, Tensor], without: Tensor) -> Tensor:
        seen = torch.cat([x_t, given["enlarged"]], 1)
        texts = either(without, given["empty_states"], given["text_states"])
        return self.unet(seen, t, texts, class_labels=torch.full_like(t, LEVEL)).sample
