"""From public folders to a model: which family they are of, and that family's stages."""

from __future__ import annotations

import torch

from oneira.platform import store
from oneira.platform.errors import UsageError

from ..drawing import Drawing
from ..stages import Stage
from . import deepfloyd, kandinsky, stable, unclip
from .folders import Family, PublicFolder
from .names import place_of, split
from .rows import RowStage

FAMILIES: dict[str, tuple[Family, ...]] = {  # which may stand for which part of a model
    "prior": (kandinsky.PRIOR,),
    "decoder": (stable.FAMILY, kandinsky.DECODER, unclip.FAMILY, deepfloyd.FAMILY),
    "upsampler": (deepfloyd.UPSAMPLER,),
}
WAYS = {  # how a model of several folders is written, by the pipeline of each
    kandinsky.PRIOR.pipeline: "prior=PATH,decoder=PATH",
    kandinsky.DECODER.pipeline: "prior=PATH,decoder=PATH",
    deepfloyd.UPSAMPLER.pipeline: "decoder=PATH,upsampler=PATH",
}
BESIDE = {
    kandinsky.DECODER.pipeline: {"prior"},
    deepfloyd.FAMILY.pipeline: {"upsampler"},
}  # what a decoder may come with


def load_public(name: str, *, device: torch.device, dtype: torch.dtype = torch.float32) -> Drawing:
    """The model of one folder of diffusers' format, or of several. Checked as a whole here; each stage loads its networks when
    it is used.

    Args:
        name: a folder, or parts as `names.split` takes them. dtype: bfloat16 lets the arithmetic of the networks that draw be of half
            precision.

    Raises:
        UsageError: parts that make no model together.
        DataError: no family that is known, a class outside of the list, a file missing or of a format that is not read.
    """
    paths = split(name)
    paths = paths or {"decoder": place_of(name)}
    every = [family for families in FAMILIES.values() for family in families]
    folders = {part: PublicFolder.open(path, every) for part, path in paths.items()}
    for part, folder in folders.items():
        way = WAYS.get(folder.family.pipeline)
        if way and len(folders) == 1:
            raise UsageError(f"'{folder.path}' is one of two folders of {folder.family.name}: write --model {way}.")
        if folder.family not in FAMILIES[part]:
            raise UsageError(f"'{folder.path}' is of {folder.family.pipeline}, which is no {part}.")
    stages = _stages(folders, device, dtype)
    said = [(stage.folder.path, stage.sampling.note) for stage in stages if isinstance(stage, RowStage)]
    return Drawing(stages, store.name_of(paths["decoder"]), [f"'{path}': {note}" for path, note in said if note])


def _stages(folders: dict[str, PublicFolder], device: torch.device, dtype: torch.dtype) -> list[Stage]:
    decoder = folders.get("decoder")
    if decoder is None:
        raise UsageError("No decoder is named: write --model prior=PATH,decoder=PATH.")
    strange = sorted(set(folders) - BESIDE.get(decoder.family.pipeline, set()) - {"decoder"})
    if strange:
        raise UsageError(f"{decoder.family.name} takes no {strange[0]} beside its decoder.")
    if decoder.family is kandinsky.DECODER:
        return kandinsky.make(folders["prior"], decoder, device, dtype)
    if decoder.family is deepfloyd.FAMILY:
        return deepfloyd.make(decoder, folders.get("upsampler"), device, dtype)
    return (stable if decoder.family is stable.FAMILY else unclip).make(decoder, device, dtype)
