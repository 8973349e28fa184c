"""Text to image as one object: prompts to pictures, variations, edits, interpolations.

    pipe = load_text_to_image("builtin")                       # or a folder that `oneira assemble` made
    pictures = pipe(["a red star above a blue ring"], seed=0)  # PIL images
    others = pipe.variations(pictures[0], n=4)
    frames = pipe.interpolate("a red star", pictures[0], frames=9)

A model is one folder: clip/ (open_clip's format), prior/, decoder/, upsampler/ (diffusers' format), and model.json, which
says in which order they work and with how many steps. `stages` are the objects that `oneira.cluster` serves. Folders of
diffusers' format that others made are read by `public/`.

Legend: E embedding. Pictures come as PIL images or uint8 [H, W, 3]. Source of what it can do: Ramesh et al. 2022, section 3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from oneira.generative.interpolation import slerp
from oneira.platform import store
from oneira.platform.config import from_dict, to_dict
from oneira.platform.devices import pick_device, pick_precision
from oneira.platform.errors import ConfigError, DataError, UsageError, did_you_mean
from oneira.platform.logs import say

from .clip import Clip
from .decoder import Decoder, DecoderStage
from .drawing import Drawing, Picture, as_array, require
from .prior import Prior, PriorStage
from .public.loading import load_public
from .public.names import is_public
from .shelf import BUILTIN
from .stages import PictureRequest, Plan, Stage, through
from .text_stage import TextStage
from .upsampler import Upsampler, UpsamplerStage

NAMES = ("builtin",)  # models that ship with the package
MODEL = "model.json"
CONDITIONS = ("prior", "text", "caption")

Condition = Literal["prior", "text", "caption"]


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What stands in model.json.

    Args:
        prior: how the folder prior/ works: "diffusion" or "autoregressive".
        prior_steps, decoder_steps, upsampler_steps: calls of each network for one picture.
        prior_guidance, decoder_guidance: how far to go from what each says without the text to what it says with it.
        sizes: sides in pixels of the pictures after each upsampler, each twice the one before.
        note: what whoever uses the model should know, said on stderr when it is loaded.
    """

    prior: Literal["diffusion", "autoregressive"] = "diffusion"
    prior_steps: int = 10
    prior_guidance: float = 2.0
    decoder_steps: int = 15
    decoder_guidance: float = 2.0
    upsampler_steps: int = 1
    sizes: tuple[int, ...] = (128, 256)
    note: str = ""

    def __post_init__(self) -> None:
        for key in ("prior_steps", "decoder_steps", "upsampler_steps"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least 1.")
        if any(b != 2 * a for a, b in zip(self.sizes, self.sizes[1:], strict=False)):
            raise ConfigError(f"sizes are {self.sizes}; each must be twice the one before.")


def load_text_to_image(
    name_or_folder: str | Path = "builtin", *, device: str = "auto", precision: Literal["fp32", "bf16", "auto"] = "fp32"
) -> Drawing:
    """A model by its name or folder: a `TextToImage` where it is one of ours, with all that it can do.

    Args:
        device: auto, cpu, cuda, cuda:N or mps.
        precision: of decoder and upsamplers. fp32 draws the same picture whoever shares the batch; bf16 may be some
            levels of 255 off.

    Raises:
        UsageError: there is no such name or folder.
        DataError: the folder is no model, or lacks a part.
    """
    place = pick_device(device)
    if is_public(str(name_or_folder)):
        return load_public(str(name_or_folder), device=place, dtype=pick_precision(precision, place))
    folder = find_model(name_or_folder)
    card = read_card(folder)
    if card.note:
        say("note", f"oneira: note: {card.note}", model=store.name_of(folder))
    clip = Clip.load(folder / "clip").to(place)
    dtype = pick_precision(precision, place)
    decoder = Decoder.load(folder / "decoder").to(place)
    stages: list[Stage] = [TextStage(clip), load_prior(folder / "prior", card, place)]
    stages.append(DecoderStage(_packed(decoder), steps=card.decoder_steps, guidance=card.decoder_guidance, dtype=dtype))
    if card.sizes:
        upsampler = _packed(Upsampler.load(folder / "upsampler").to(place))
        stages += [UpsamplerStage(upsampler, size=size, steps=card.upsampler_steps, dtype=dtype) for size in card.sizes]
    return TextToImage(stages, card, name=store.name_of(folder))


def _packed(model: Any) -> Any:
    """Frozen, and laid out as the CPU's convolutions like it."""
    return model.requires_grad_(False).to(memory_format=torch.channels_last)


def load_prior(folder: Path, card: ModelCard, place: torch.device) -> Stage:
    if card.prior == "diffusion":
        model = Prior.load(folder).requires_grad_(False).to(place)
        return PriorStage(model, steps=card.prior_steps, guidance=card.prior_guidance)
    from .ar_prior import ArPrior, ArPriorStage

    return ArPriorStage(ArPrior.load(folder).requires_grad_(False).to(place), guidance=card.prior_guidance)


def find_model(name_or_folder: str | Path) -> Path:
    """The folder of a model. Raises UsageError for an unknown name, DataError where a folder holds no model."""
    if str(name_or_folder) in NAMES:
        return BUILTIN
    folder = store.find(name_or_folder) or Path(name_or_folder).expanduser()
    if folder.is_file():
        raise DataError(f"'{folder}' is a file; a model is a folder with {MODEL} or with diffusers' model_index.json.")
    if not folder.is_dir():
        known = [*NAMES, *(place.name for place in store.stored())]
        raise UsageError(
            f"There is no model '{name_or_folder}': it is no folder. {did_you_mean(str(name_or_folder), known)}"
        )
    if not (folder / MODEL).is_file():
        raise DataError(
            f"'{folder}' is no text-to-image model: it has no {MODEL} (`oneira assemble` makes one from runs), and no "
            "model_index.json of diffusers'."
        )
    return folder


def read_card(folder: Path) -> ModelCard:
    try:
        return from_dict(ModelCard, json.loads((folder / MODEL).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, ConfigError) as error:
        raise DataError(f"'{folder / MODEL}' cannot be read: {error}") from error


def write_card(folder: Path, card: ModelCard) -> None:
    (folder / MODEL).write_text(json.dumps(to_dict(card), indent=1), encoding="utf-8")


class TextToImage(Drawing):
    """A model of ours, and all that can be done with it."""

    def __init__(self, stages: Sequence[Stage], card: ModelCard, name: str):
        super().__init__(stages, name)
        self.card = card

    @property
    def clip(self) -> Clip:
        stage = self.stages[0]
        assert isinstance(stage, TextStage)
        return stage.clip

    @property
    def size(self) -> int:
        """The side of a picture, in pixels."""
        return self.stages[-1].size if self.card.sizes else self.stages[-1].model.size  # type: ignore[attr-defined]

    def interpolate(
        self, start: str | Picture, end: str | Picture, frames: int = 9, *, seed: int = 0, steps: int | None = None
    ) -> list[Any]:
        """Pictures on the great circle between two image embeddings, all from the same noise; a prompt's comes from the
        prior. Raises UsageError for fewer than two frames."""
        require(frames >= 2, f"{frames} frames asked for; there must be at least 2.")
        a, b = self.embed([start, end], seed=seed)
        path = [slerp(a, b, k / (frames - 1)) for k in range(frames)]
        return self.draw_embeddings(path, seed=seed, steps=steps)

    def text_difference(
        self, picture: Picture, before: str, after: str, frames: int = 5, *, strength: float = 0.5, seed: int = 0,
        steps: int | None = None,
    ) -> list[Any]:  # fmt: skip
        """The picture turned towards what `after` has and `before` has not, in `frames` steps up to `strength` of the way
        (Ramesh et al. 2022, section 3.3). strength: in [0, 1]; the paper goes up to 0.25 to 0.5."""
        require(0 <= strength <= 1, f"strength is {strength}; it must be in [0, 1].")
        require(frames >= 1, f"{frames} frames asked for; there must be at least 1.")
        image = self.embed([picture])[0]
        old, new = self.clip.embed_texts([before, after]).cpu().numpy()
        require(not np.allclose(old, new, atol=1e-5), "The two texts say the same; there is no difference to go along.")
        difference = F.normalize(torch.from_numpy(new - old), dim=0).numpy()
        path = [slerp(image, difference, strength * (k + 1) / frames) for k in range(frames)]
        return self.draw_embeddings(path, seed=seed, steps=steps)

    # ---- what they are made of

    def embed(self, things: Sequence[str | Picture], *, seed: int = 0) -> list[np.ndarray]:
        """Image embeddings float32 [E]: CLIP's of pictures, the prior's of prompts."""
        requests = [
            PictureRequest(prompt=thing, seed=seed)
            if isinstance(thing, str)
            else PictureRequest(task="variation", picture=as_array(thing), seed=seed)
            for thing in things
        ]
        return [state["image_embedding"] for state in through(self.stages[:2], requests)]

    def draw_embeddings(
        self, embeddings: Sequence[np.ndarray], *, seed: int = 0, steps: int | None = None
    ) -> list[Any]:
        """Pictures of image embeddings float32 [E], all from the same noise."""
        return self.draw(
            [PictureRequest(task="embedding", embedding=e, seed=seed, steps=steps) for e in embeddings]
        )  # fmt: skip

    def conditioned(self, on: Condition) -> TextToImage:
        """The same model with its prior replaced (Ramesh et al. 2022, figure 8).

        on: "prior" (as it is), "text" (the text's embedding in place of the image's), or "caption" (no embedding at all).
        """
        if on not in CONDITIONS:
            raise UsageError(f"Unknown condition '{on}'. {did_you_mean(on, CONDITIONS)}")
        if on == "prior":
            return self
        return TextToImage([self.stages[0], Instead(on), *self.stages[2:]], self.card, self.name)


@dataclass
class Instead:
    """Stands where the prior stood."""

    on: Condition
    name: str = field(default="prior", init=False)

    def plan(self, request: PictureRequest, state: Mapping[str, np.ndarray]) -> Plan:
        found = {"image_embedding": state["text_embedding"]} if self.on == "text" else {}
        return Plan(done=True, found={} if "image_embedding" in state else found)

    def step(self, plans: Sequence[Plan]) -> None:
        """Nothing is ever left to do."""
