"""Stable Diffusion (Rombach et al. 2022): text encoder, UNet over latents, and the autoencoder that makes pictures of these.

An edit puts the known latents back, noised to the level of the step, after every step (Lugmayr et al. 2022, "RePaint", eq. 8).
The folder's safety checker is not run.

Legend: S side in pixels, s side in latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oneira.generative.diffusion import noise_of
from oneira.platform.errors import DataError

from ..pictures import finished, fit_mask, resize, to_signed
from ..stages import PictureRequest, Stage, State
from .folders import SCHEDULERS, Family, PublicFolder
from .rows import RowPlan, RowStage, either
from .sampling import STEPS, read_sampling
from .texts import TextStage

FAMILY = Family(
    "Stable Diffusion",
    "StableDiffusionPipeline",
    {
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"), "text_encoder": ("CLIPTextModel",),
        "unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",), "scheduler": SCHEDULERS,
    },
)  # fmt: skip
TASKS = ("generate", "edit")


def make(folder: PublicFolder, device: torch.device, dtype: torch.dtype) -> list[Stage]:
    """The stages of a folder."""
    return [TextStage(folder, device, TASKS), LatentStage(folder, device, dtype)]


class LatentStage(RowStage):
    """Fills picture, uint8 [S, S, 3]."""

    def __init__(self, folder: PublicFolder, device: torch.device, dtype: torch.dtype):
        said, unet, vae = read_sampling(folder), folder.config("unet"), folder.config("vae")
        channels, side = int(vae.get("latent_channels", 4)), folder.whole_number("unet", "sample_size")
        for key, value in (("in_channels", channels), ("time_cond_proj_dim", None)):
            if unet.get(key, value) != value:
                raise DataError(f"'{folder.path / 'unet'}': {key} is {unet[key]}; of {FAMILY.name} it must be {value}.")
        # Folders from before 2023 lack both settings; the networks were all made for these, as diffusers' own pipeline knows.
        sampling = replace(said, clip=0.0, spacing=replace(said.spacing, offset=1))
        super().__init__(
            "decoder", folder, device, dtype, sampling=sampling, shape=(channels, side, side), guidance=7.5,
            steps=STEPS[sampling.sampler],
        )  # fmt: skip
        self.size = side * 2 ** (len(vae.get("block_out_channels", [64])) - 1)

    @cached_property
    def unet(self) -> Any:
        return self.folder.load("unet").to(self.device, memory_format=torch.channels_last)

    @cached_property
    def vae(self) -> Any:
        return self.folder.load("vae").to(self.device)

    def conditions(self, request: PictureRequest, state: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """known: latents of an edit's picture; unknown: float32 [1, s, s], 1 where they are to be drawn."""
        given = {key: torch.as_tensor(state[key]) for key in ("text_states", "empty_states")}
        known, unknown = torch.zeros(self.shape), torch.ones(1, *self.shape[1:])
        if request.task == "edit" and request.picture is not None and request.mask is not None:
            known = self.encode(resize(to_signed(request.picture[None]), self.size))[0]
            unknown = fit_mask(request.mask, self.shape[-1])
        return {**given, "known": known, "unknown": unknown}

    def predict(self, x_t: Tensor, t: Tensor, given: Mapping[str, Tensor], without: Tensor) -> Tensor:
        return self.unet(x_t, t, either(without, given["empty_states"], given["text_states"])).sample

    def stepped(self, plan: RowPlan) -> Tensor:
        """The known latents come back, at the level of noise that the row has now."""
        if plan.request.task != "edit":
            return plan.row.x
        alpha, sigma = self.sampling.schedule.at(plan.row.timestep)
        noise = noise_of(plan.row.seed, 0, self.shape)
        unknown = plan.given["unknown"].to(self.device)
        known = (alpha * plan.given["known"] + sigma * noise).to(self.device)
        return unknown * plan.row.x + (1 - unknown) * known

    def find(self, x: Tensor, requests: Sequence[PictureRequest]) -> list[State]:
        pictures = self.vae.decode(x / self.vae.config.scaling_factor).sample.float().cpu()
        return [{"picture": finished(picture, request)} for picture, request in zip(pictures, requests, strict=True)]

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures float32 [B, 3, S, S] -> latents [B, 4, s, s], the likeliest, on the CPU."""
        return (self.vae.encode(pictures.to(self.device)).latent_dist.mode() * self.vae.config.scaling_factor).cpu()
