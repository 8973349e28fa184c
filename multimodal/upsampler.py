"""The upsampler: a picture of twice the side, 64 to 128 and 128 to 256 pixels (Ramesh et al. 2022, section 2.1).

    upsampler = Upsampler.new(UpsamplerConfig())
    stages = [UpsamplerStage(upsampler, size=size, steps=1) for size in (128, 256)]

Two stages of one network: it is convolutional throughout and sees the picture at no size in particular, and how an edge
goes on between two pixels is the same question at both sizes. It learns both together, on squares cut out of the finer one.

It predicts the picture itself, as what is to be added to the enlarged one: that is little, and hardly ever in doubt, so one
step is enough, and a few channels. Conditioning noise (Ho et al. 2022, "Cascaded diffusion models", section 4): in training the
small picture is noised by a random strength, which the network is told, so that it does not trust a decoder's mistakes.

Legend: B rows, S side in pixels of the large picture. Pictures within are float32 [-1, 1], [B, 3, S, S].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneira.generative.diffusion import Row, Schedule, advance, noise_of, training_pair
from oneira.generative.learning import seed_of
from oneira.platform.errors import ConfigError, DataError

from .networks import diffusers_class, load_network, save_network
from .pictures import drawn_state, resize, to_signed
from .stages import PictureRequest, Plan

SCHEDULE = Schedule(kind="offset-cosine")
BLOCK = 4  # pixels of a block, along each side
GROUPS = 8  # of the group norms
NOISIEST = 0.1  # standard deviation of the conditioning noise, at most
NOISE = 0.02  # when drawing
CHANGE = 0.1  # deviation, roughly, of a true picture from an enlarged one: what the network's output is a multiple of
STRENGTHS = 1000.0  # what the network is told is the noise in this unit, like a timestep


@dataclass(frozen=True, kw_only=True)
class UpsamplerConfig:
    """size: pixels of the squares it learns from, of the larger picture. widths: channels of its two or more levels."""

    size: int = 128
    widths: tuple[int, ...] = (32, 64)

    def __post_init__(self) -> None:
        if not self.widths or any(width < GROUPS or width % GROUPS for width in self.widths):
            raise ConfigError(f"widths are {self.widths}; each must be a multiple of {GROUPS}.")
        least = BLOCK * 2 ** (len(self.widths) - 1)
        if self.size < 16 or self.size % least:
            raise ConfigError(f"size is {self.size}; with {len(self.widths)} levels it must be a multiple of {least}.")

    def unet(self) -> dict[str, Any]:
        """The arguments of diffusers' class."""
        return {
            "sample_size": self.size // BLOCK, "in_channels": 6 * BLOCK**2, "out_channels": 3 * BLOCK**2,
            "down_block_types": ("DownBlock2D",) * len(self.widths),
            "up_block_types": ("UpBlock2D",) * len(self.widths),
            "block_out_channels": self.widths, "layers_per_block": 1, "norm_num_groups": GROUPS,
            "add_attention": False, "class_embed_type": "timestep",
        }  # fmt: skip


class Upsampler(nn.Module):
    """diffusers' UNet without attention, over blocks of 4x4 pixels of the noised and of the enlarged picture."""

    def __init__(self, unet: Any):
        super().__init__()
        self.unet: Any = unet

    @classmethod
    def new(cls, config: UpsamplerConfig) -> Upsampler:
        """An untrained one; before it learns anything it gives back the enlarged picture."""
        unet = diffusers_class("UNet2DModel")(**config.unet())
        nn.init.zeros_(unet.conv_out.weight)
        nn.init.zeros_(unet.conv_out.bias)
        return cls(unet)

    def forward(self, x_t: Tensor, t: Tensor, enlarged: Tensor, strength: Tensor) -> Tensor:
        """The estimate of x_0, float32 [B, 3, S, S].

        Args:
            x_t: noised pictures. t: int64 [B]. enlarged: the small picture at this size, with its noise of `strength`,
                float32 [B], a standard deviation.
        """
        seen = F.pixel_unshuffle(torch.cat([x_t, enlarged], 1), BLOCK)
        if self.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last):
            seen = seen.contiguous(memory_format=torch.channels_last)
        found = self.unet(seen, t, class_labels=strength * STRENGTHS).sample
        return enlarged + CHANGE * F.pixel_shuffle(found.float(), BLOCK)

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Squared error of x_0. batch: large uint8 [B, S, S, 3], small uint8 [B, S / 2, S / 2, 3]."""
        x_0, small = to_signed(batch["large"]), to_signed(batch["small"])
        strength = NOISIEST * torch.rand(len(small), generator=generator, device=small.device)
        noise = torch.randn(small.shape, generator=generator, device=small.device)
        enlarged = enlarge(small + strength.view(-1, 1, 1, 1) * noise)
        x_t, t, target = training_pair(SCHEDULE, "x0", x_0, generator)
        loss = F.mse_loss(self(x_t, t, enlarged, strength), target)
        return loss, {"enlarged": F.mse_loss(enlarge(small), target).detach()}  # what doing nothing would cost

    def save(self, folder: Path) -> None:
        save_network(self.unet, folder)

    @classmethod
    def load(cls, folder: Path) -> Upsampler:
        """What `save` wrote, in eval mode. Raises DataError when the folder holds none."""
        unet, _ = load_network(folder, "UNet2DModel")
        if unet.config.in_channels != 6 * BLOCK**2 or unet.config.class_embed_type != "timestep":
            raise DataError(f"'{folder}' holds a UNet, but no upsampler of ours.")
        return cls(unet).eval()


def enlarge(pictures: Tensor) -> Tensor:
    """[B, 3, S / 2, S / 2] -> [B, 3, S, S]. A pixel depends on those near it alone, so a cut-out gives what a whole gives."""
    return F.interpolate(pictures, scale_factor=2, mode="bilinear", align_corners=False)


@dataclass(kw_only=True)
class UpsamplerPlan(Plan):
    """row: the picture under way. enlarged: float32 [3, S, S], with its noise."""

    request: PictureRequest
    row: Row
    enlarged: Tensor


class UpsamplerStage:
    """Replaces picture by one of `size` pixels, uint8 [size, size, 3], and drawn, which it enlarges where it is there. It takes no more steps than its own number."""

    def __init__(self, model: Upsampler, *, size: int, steps: int, dtype: torch.dtype = torch.float32):
        self.model, self.size, self.steps, self.dtype = model, size, steps, dtype
        self.name = f"upsampler-{size}"

    def plan(self, request: PictureRequest, state: Mapping[str, np.ndarray]) -> UpsamplerPlan:
        steps = self.steps if request.steps is None else min(request.steps, self.steps)
        seed = seed_of(request.seed, self.name)
        small = torch.as_tensor(state["drawn"])[None] if "drawn" in state else to_signed(state["picture"][None])
        small = resize(small, self.size // 2)
        small = small + NOISE * noise_of(seed_of(request.seed, self.name, "condition"), 0, small.shape)
        row = Row.begin(SCHEDULE, (3, self.size, self.size), seed=seed, steps=steps)
        return UpsamplerPlan(request=request, row=row, enlarged=enlarge(small)[0], steps=steps)

    @torch.no_grad()
    def step(self, plans: Sequence[UpsamplerPlan]) -> None:
        place = self.model.unet.conv_in.weight.device
        enlarged = torch.stack([plan.enlarged for plan in plans]).to(place)
        strength = torch.full((len(plans),), NOISE, device=place)

        def network(x_t: Tensor, t: Tensor, row: Tensor, without: Tensor) -> Tensor:
            with torch.autocast(place.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16):
                return self.model(x_t, t, enlarged[row], strength[row])

        advance([plan.row for plan in plans], network, SCHEDULE, "x0", clip=1.0, device=place)
        for plan in plans:
            plan.step += 1
            if plan.row.done:
                plan.found, plan.done = drawn_state(plan.row.x, plan.request), True
