"""The decoder: from a CLIP image embedding and the text's states to a picture of 64 pixels (GLIDE's and DALL-E 2's).

    decoder = Decoder.new(DecoderConfig(), embed=128, text_width=128, mean=mean, std=std)
    stage = DecoderStage(decoder, steps=15, guidance=2.0)

The network is diffusers' `UNet2DConditionModel` over blocks of 4x4 pixels, so that its costliest level has 16x16 places.
It says what the picture is, not what the noise is: a block of flat colours and an edge is little to say, and 48 numbers of
noise would have to pass through every channel (Li & He 2025, "Back to basics: let denoising generative models denoise").
The image embedding joins the timestep's, the text is read by cross-attention. Two further inputs tell where a place lies,
which convolutions learn only from their edges.

Edits: GLIDE's way, not by putting known pixels back at every level of noise. The network sees the known pixels and the
mask from its first step on, so a few steps suffice and edges fit; a quarter of its training has such a mask.

Without a condition: both embeddings have a learned stand-in, and training drops text, image or both. So guidance, the
caption alone, the embedding alone, and an embedding of a text in place of an image's are all the same network.

Legend: B rows, S side in pixels, E embedding, L places of a text, W width of a text state. Pictures within are float32
[-1, 1], [B, 3, S, S]. Sources: Nichol et al. 2022 ("GLIDE", section 3.1); Ramesh et al. 2022, section 2.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneira.generative.diffusion import Row, Schedule, advance, training_pair
from oneira.generative.learning import seed_of
from oneira.platform.errors import ConfigError, DataError

from .networks import diffusers_class, load_network, plain_attention, save_network
from .pictures import drawn_state, fit_mask, resize, to_signed
from .stages import PictureRequest, Plan

SCHEDULE = Schedule(kind="offset-cosine")
HEAD = 32  # channels of an attention head
GROUPS = 8  # of the group norms
DROP_BOTH, DROP_IMAGE, DROP_TEXT = 0.1, 0.1, 0.2  # shares of the rows that train without
MASKED = 0.25  # share of the rows that train on an edit


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """size: pixels of the square picture. block: pixels of a place of the finest level, along each side. widths: channels of
    the levels, each half as fine as the one before; all but the first attend. blocks: residual blocks of a level."""

    size: int = 64
    block: int = 4
    widths: tuple[int, ...] = (64, 96, 128)
    blocks: int = 1

    def __post_init__(self) -> None:
        if len(self.widths) < 2:
            raise ConfigError(f"widths are {self.widths}; there must be at least two.")
        for width, unit in zip(self.widths, (GROUPS, *(HEAD,) * (len(self.widths) - 1)), strict=True):
            if width < unit or width % unit:
                raise ConfigError(f"widths are {self.widths}; {width} must be a multiple of {unit}.")
        for key in ("block", "blocks"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least 1.")
        least = self.block * 2 ** (len(self.widths) - 1)
        if self.size < least or self.size % least:
            raise ConfigError(f"size is {self.size}; with {len(self.widths)} levels it must be a multiple of {least}.")

    def unet(self, embed: int, text_width: int) -> dict[str, Any]:
        """The arguments of diffusers' class."""
        attending = len(self.widths) - 1
        return {
            "sample_size": self.size // self.block, "in_channels": 7 * self.block**2 + 2,
            "out_channels": 3 * self.block**2,
            "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * attending),
            "up_block_types": (*("CrossAttnUpBlock2D",) * attending, "UpBlock2D"),
            "block_out_channels": self.widths, "layers_per_block": self.blocks, "norm_num_groups": GROUPS,
            # diffusers means the number of heads by this name.
            "attention_head_dim": tuple(max(1, width // HEAD) for width in self.widths),
            "cross_attention_dim": text_width, "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": embed, "resnet_time_scale_shift": "scale_shift",
            "use_linear_projection": True,
        }  # fmt: skip


class Decoder(nn.Module):
    """diffusers' UNet, the statistics of the embeddings it reads, and the learned stand-ins for what it may lack."""

    def __init__(self, unet: Any, conditions: Mapping[str, Tensor]):
        """conditions: mean, std, no_image float32 [E]; no_text float32 [W]."""
        super().__init__()
        self.unet: Any = unet
        self.no_image, self.no_text = (nn.Parameter(conditions[key].clone()) for key in ("no_image", "no_text"))
        for key in ("mean", "std"):
            self.register_buffer(key, conditions[key].clone())
        self.mean: Tensor
        self.std: Tensor
        self.block = math.isqrt(unet.config.out_channels // 3)
        side = unet.config.sample_size
        along = torch.linspace(-1, 1, side)
        grid = torch.stack(torch.meshgrid(along, along, indexing="ij"))[None]
        self.register_buffer("grid", grid, persistent=False)  # float32 [1, 2, G, G]: where each of GxG blocks lies
        self.grid: Tensor

    @classmethod
    def new(cls, config: DecoderConfig, *, embed: int, text_width: int, mean: Tensor, std: Tensor) -> Decoder:
        """An untrained one. mean, std: float32 [E], of the image embeddings it will see."""
        unet = diffusers_class("UNet2DConditionModel")(**config.unet(embed, text_width))
        nothing = {"no_image": torch.randn(embed), "no_text": torch.randn(text_width)}
        return cls(unet, {"mean": mean, "std": std, **nothing})

    @property
    def size(self) -> int:
        return self.unet.config.sample_size * self.block

    def forward(
        self, x_t: Tensor, t: Tensor, known: Tensor, unknown: Tensor, image: Tensor, states: Tensor, mask: Tensor,
        no_image: Tensor, no_text: Tensor,
    ) -> Tensor:  # fmt: skip
        """The estimate of x_0, float32 [B, 3, S, S].

        Args:
            x_t: noised pictures. t: int64 [B].
            known: pictures; unknown: float32 [B, 1, S, S], 1 where `known` says nothing.
            image: float32 [B, E]. states: float32 [B, L, W]. mask: bool [B, L].
            no_image, no_text: bool [B], rows that are not to see the one or the other.
        """
        image = torch.where(no_image[:, None], self.no_image, (image - self.mean) / self.std)
        states = torch.where(no_text[:, None, None], self.no_text, states)
        seen = F.pixel_unshuffle(torch.cat([x_t, known * (1 - unknown), unknown], 1), self.block)
        seen = torch.cat([seen, self.grid.expand(len(x_t), -1, -1, -1)], 1)
        if self.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last):
            seen = seen.contiguous(memory_format=torch.channels_last)
        mask = mask | no_text[:, None]  # the stand-in is at every place
        found = self.unet(seen, t, states, class_labels=image, encoder_attention_mask=mask).sample
        return F.pixel_shuffle(found.float(), self.block)

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Squared error of x_0, in units of sigma: as much as the error of v (Salimans & Ho 2022, section 4) that it means.

        batch: pictures uint8 [B, S, S, 3], and what `embedding.encode` gives.
        """
        x_0 = to_signed(batch["pictures"])
        x_t, t, target = training_pair(SCHEDULE, "x0", x_0, generator)
        _, sigma = SCHEDULE.rates(t, x_0)
        lot = torch.rand(len(x_0), generator=generator, device=x_0.device)
        no_image = lot < DROP_BOTH + DROP_IMAGE
        no_text = (lot < DROP_BOTH) | ((lot >= DROP_BOTH + DROP_IMAGE) & (lot < DROP_BOTH + DROP_IMAGE + DROP_TEXT))
        unknown = random_masks(len(x_0), self.size, generator, x_0.device)
        text = batch["text_states"], batch["text_mask"]
        with plain_attention(x_0.device):
            found = self(x_t, t, x_0, unknown, batch["image_embedding"], *text, no_image, no_text)
        return ((found - target) / sigma).square().mean(), {}

    def save(self, folder: Path) -> None:
        conditions = {key: getattr(self, key) for key in ("mean", "std", "no_image", "no_text")}
        save_network(self.unet, folder, conditions)

    @classmethod
    def load(cls, folder: Path) -> Decoder:
        """What `save` wrote, in eval mode. Raises DataError when the folder holds none."""
        unet, conditions = load_network(folder, "UNet2DConditionModel")
        try:
            return cls(unet, conditions).eval()
        except KeyError as error:
            raise DataError(f"'{folder}' holds no decoder of ours: its conditions lack {error}.") from error


def random_masks(rows: int, side: int, generator: torch.Generator, place: torch.device | str = "cpu") -> Tensor:
    """float32 [rows, 1, side, side], 1 where a picture is unknown: all of it, or for a share of the rows a box.

    A box is between a quarter of the side and all of it, each way.
    """
    lot, left, top, width, height = torch.rand(5, rows, 1, 1, 1, generator=generator, device=place)
    width, height = 0.25 + 0.75 * width, 0.25 + 0.75 * height
    left, top = left * (1 - width), top * (1 - height)
    along = (torch.arange(side, device=place) + 0.5) / side
    x, y = along.view(1, 1, 1, -1), along.view(1, 1, -1, 1)
    box = (x >= left) & (x < left + width) & (y >= top) & (y < top + height)
    return (box | (lot >= MASKED)).float()


@dataclass(kw_only=True)
class DecoderPlan(Plan):
    """row: the picture under way. The rest is what `Decoder.forward` takes, of one row."""

    request: PictureRequest
    row: Row
    known: Tensor
    unknown: Tensor
    image: Tensor
    states: Tensor
    mask: Tensor
    no_image: Tensor
    no_text: Tensor


CONDITIONS = ("known", "unknown", "image", "states", "mask", "no_image", "no_text")


class DecoderStage:
    """Fills picture, uint8 [S, S, 3], and drawn, the same unrounded, float32 [3, S, S]. Without an image_embedding in the state it draws from the caption alone."""

    name = "decoder"

    def __init__(self, model: Decoder, *, steps: int, guidance: float, dtype: torch.dtype = torch.float32):
        """dtype: bfloat16 lets the network's arithmetic be of half precision."""
        self.model, self.steps, self.guidance, self.dtype = model, steps, guidance, dtype

    def plan(self, request: PictureRequest, state: Mapping[str, np.ndarray]) -> DecoderPlan:
        steps = self.steps if request.steps is None else request.steps
        guidance = self.guidance if request.guidance is None else request.guidance
        side, image = self.model.size, state.get("image_embedding")
        known, unknown = torch.zeros(3, side, side), torch.ones(1, side, side)
        if request.task == "edit" and request.picture is not None and request.mask is not None:
            known = resize(to_signed(request.picture[None]), side)[0]
            unknown = fit_mask(request.mask, side)
        return DecoderPlan(
            request=request, steps=steps, known=known, unknown=unknown,
            row=Row.begin(SCHEDULE, (3, side, side), seed=seed_of(request.seed, "decoder"), steps=steps, guidance=guidance),
            image=torch.zeros(self.model.mean.shape) if image is None else torch.as_tensor(image),
            states=torch.as_tensor(state["text_states"]), mask=torch.as_tensor(state["text_mask"]),
            no_image=torch.tensor(image is None), no_text=torch.tensor(not request.prompt.strip()),
        )  # fmt: skip

    @torch.no_grad()
    def step(self, plans: Sequence[DecoderPlan]) -> None:
        place = self.model.mean.device
        values = [torch.stack([getattr(plan, key) for plan in plans]).to(place) for key in CONDITIONS]

        def network(x_t: Tensor, t: Tensor, row: Tensor, without: Tensor) -> Tensor:
            known, unknown, image, states, mask, no_image, no_text = (value[row] for value in values)
            with torch.autocast(place.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16):
                return self.model(
                    x_t, t, known, unknown, image, states, mask, no_image | without, no_text | without
                )  # fmt: skip

        advance([plan.row for plan in plans], network, SCHEDULE, "x0", clip=1.0, device=place)
        for plan in plans:
            plan.step += 1
            if plan.row.done:
                plan.found, plan.done = drawn_state(plan.row.x, plan.request), True
