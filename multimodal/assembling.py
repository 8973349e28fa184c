"""One folder from the runs that trained its parts, in half precision: what `oneira assemble` does."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from oneira.generative.learning import write_folder
from oneira.platform.errors import DataError, UsageError
from oneira.platform.runs import place_of

from .ar_prior import CONFIG as AR_CONFIG
from .ar_prior import ArPrior
from .clip import Clip
from .decoder import Decoder
from .embedding import clip_folder, statistics
from .networks import halve
from .prior import Prior
from .shelf import BUILTIN, TEXT_TO_IMAGE, kind_of
from .text_to_image import ModelCard, write_card
from .upsampler import Upsampler

COUNTED = 256  # scenes whose embeddings are looked at
FAR = 0.5  # deviations, on average over an embedding's components, that a mean may lie away


def assemble(
    out: Path, *, clip: str, prior: str, decoder: str, upsampler: str | None = None, card: ModelCard | None = None
) -> ModelCard:
    """Writes a model's folder, in the place of one that is there, and returns what stands in its model.json.

    Args:
        clip, prior, decoder, upsampler: runs, folders that hold such a network, or "builtin"; without an upsampler pictures stay as
            the decoder draws them.
        card: steps, guidance and sizes; which prior it is, and whether there are sizes, is seen from the parts.

    Raises:
        DataError: a part is not there or not trained yet, or the parts do not fit each other.
        UsageError: `out` is a folder of something else.
    """
    if out.is_file() or (out.exists() and any(out.iterdir()) and kind_of(out) != TEXT_TO_IMAGE):
        raise UsageError(f"'{out}' is something else than a model of text to image; give a new folder.")
    sources = {
        "clip": clip_folder(clip),
        "prior": part_folder(prior, "prior"),
        "decoder": part_folder(decoder, "decoder"),
    }
    if upsampler is not None:
        sources["upsampler"] = part_folder(upsampler, "upsampler")
    given = card or ModelCard()
    autoregressive = (sources["prior"] / AR_CONFIG).is_file()
    card = ModelCard(
        **{
            **vars(given),
            "prior": "autoregressive" if autoregressive else "diffusion",
            "prior_guidance": 1.0 if autoregressive and card is None else given.prior_guidance,
            "sizes": given.sizes if upsampler is not None else (),
        }
    )
    check_parts(sources, card.sizes)

    def write(folder: Path) -> None:
        for name, source in sources.items():
            shutil.copytree(source, folder / name)
        halve(folder)
        write_card(folder, card)

    write_folder(out.absolute(), write)
    return card


def part_place(name: str, part: str) -> Path:
    """Where a part is looked for: the run or folder that `name` means; "builtin" is that of the model that ships."""
    return BUILTIN / part if name == "builtin" else place_of(name)


def part_folder(name: str, part: str) -> Path:
    """The folder with the network of a run, `name` itself, or a part of the built-in model. Raises DataError where there is none."""
    place = part_place(name, part)
    for folder in (place / "model", place):
        if (folder / "config.json").is_file() or (folder / AR_CONFIG).is_file():
            if (folder / "provenance.json").is_file():
                break  # a run's own config.json: it is not trained yet
            return folder
    advice = f": `oneira resume {name}` goes on with it" if (place / "provenance.json").is_file() else ""
    raise DataError(f"'{place}' holds no trained network{advice}.")


def check_parts(sources: dict[str, Path], sizes: Sequence[int] = ()) -> None:
    """Loads every part, and raises DataError unless they were made for the same CLIP and pass on pictures of `sizes`."""
    clip = Clip.load(sources["clip"])
    embed, width, length = clip.shape
    prior: Prior | ArPrior
    if (sources["prior"] / AR_CONFIG).is_file():
        prior = ArPrior.load(sources["prior"])
        found = {"prior": (len(prior.mean), prior.text_width, prior.length)}
    else:
        prior = Prior.load(sources["prior"])
        found = {"prior": (prior.embed, prior.embed, prior.network.config.num_embeddings)}
    decoder = Decoder.load(sources["decoder"])
    found["decoder"] = (len(decoder.mean), len(decoder.no_text), length)
    for name, shape in found.items():
        if shape != (embed, width, length):
            raise DataError(
                f"The {name} in '{sources[name]}' is of another CLIP: embeddings, text states and length are {shape}, but of "
                f"the CLIP in '{sources['clip']}' {(embed, width, length)}."
            )
    check_embeddings(clip, {"prior": prior.clip_mean, "decoder": decoder.mean}, sources)
    if "upsampler" in sources:
        Upsampler.load(sources["upsampler"])
    if sizes and sizes[0] != 2 * decoder.size:
        raise DataError(
            f"The first upsampler makes pictures of {sizes[0]} pixels, but the decoder's have {decoder.size}; it must be twice "
            "that."
        )


def check_embeddings(clip: Clip, means: Mapping[str, Tensor], sources: Mapping[str, Path]) -> None:
    """Raises DataError where a part has learnt from other embeddings than this CLIP's: their means lie elsewhere."""
    mean, std = statistics(clip, COUNTED)
    for name, found in means.items():
        away = ((found.cpu() - mean) / std).abs().mean()
        if away > FAR:
            raise DataError(
                f"The {name} in '{sources[name]}' was trained on embeddings of another CLIP than that in '{sources['clip']}': "
                f"their mean lies {away:.1f} deviations away."
            )


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
