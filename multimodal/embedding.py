"""What the networks behind CLIP learn from: a frozen CLIP of another run, and its embeddings of scenes.

    clip = load_clip("scenes-clip")                  # a run's name or folder, or a folder of open_clip's format
    batch = encode(clip, sample(np.arange(64)), seed=0)

Scenes are drawn and encoded as they are needed, never stored: encoding 64 costs a twentieth of the decoder's step on
them, and the data never repeats.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from oneira.platform.devices import pick_device, pick_precision
from oneira.platform.errors import ConfigError, DataError
from oneira.platform.runs import place_of
from oneira.platform.store import MODELS

from .clip import CONFIG, Clip
from .scenes import Scenes, captions, draw, sample
from .shelf import BUILTIN
from .words import with_unknown_words

COUNTED = 2048  # scenes from which statistics of embeddings are taken


def clip_place(name: str) -> Path:
    """The run or folder that `name` means; one of models/ where there is no such run; "builtin" is the model's that ships."""
    if name == "builtin":
        return BUILTIN / "clip"
    place, stored = place_of(name), (MODELS / name).absolute()
    return stored if not place.exists() and (stored / CONFIG).is_file() else place


def clip_folder(name: str) -> Path:
    """The folder in open_clip's format that `name` means: a run of scenes-clip, such a folder itself, or one of models/.

    Raises:
        DataError: there is none yet; the message says how to make one.
    """
    place = clip_place(name)
    for folder in (place / "model", place):
        if (folder / CONFIG).is_file():
            return folder
    raise DataError(
        f"'{place}' holds no trained CLIP. Train one (oneira train scenes-clip --run scenes-clip), or name another's run "
        "(--set clip=RUN)."
    )


def load_clip(name: str) -> Clip:
    """The frozen CLIP of a run or folder, on this machine's device. Raises DataError where there is none."""
    return Clip.load(clip_folder(name)).requires_grad_(False).to(pick_device())


def square_clip(name: str) -> Clip:
    """`load_clip` for priors: diffusers' transformer reads embeddings and text states with layers of one width."""
    clip = load_clip(name)
    embed, width, _ = clip.shape
    if embed != width:
        raise ConfigError(
            f"The CLIP of '{name}' has embeddings of {embed} and text states of {width}; a prior needs them equal."
        )
    return clip


@torch.no_grad()
def encode(clip: Clip, scenes: Scenes, seed: int) -> dict[str, Tensor]:
    """Embeddings of scenes and captions, a tenth of which gets an unknown word (chosen by `seed`).

    Returns:
        image_embedding, text_embedding float32 [B, E]; text_states float32 [B, L, W]; text_mask bool [B, L].
    """
    tokens = clip.words(captions(scenes))
    tokens = with_unknown_words(tokens, clip.words, np.random.default_rng(seed))
    place = clip.mean.device
    with torch.autocast(place.type, torch.bfloat16, enabled=pick_precision("auto", place) is torch.bfloat16):
        images = clip.embed_images(draw(scenes, clip.image_size))
        embedding, states, mask = clip.read_tokens(torch.from_numpy(tokens).to(place))
    return {"image_embedding": images, "text_embedding": embedding, "text_states": states, "text_mask": mask}


def statistics(clip: Clip, count: int = COUNTED) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of image embeddings by dimension, float32 [E] each, on the CPU."""
    images = embeddings(clip, count)
    return images.mean(0), images.std(0).clamp(min=1e-4)


@torch.no_grad()
def embeddings(clip: Clip, count: int, chunk: int = 256) -> Tensor:
    """Of the pictures of the training split's first scenes, float32 [count, E], on the CPU."""
    parts = [np.arange(first, min(first + chunk, count)) for first in range(0, count, chunk)]
    return torch.cat([clip.embed_images(draw(sample(part), clip.image_size)).cpu() for part in parts])
