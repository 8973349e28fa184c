"""From a model's name to its stages. The one place that knows how models are loaded."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneira.generative.finding import find_model
from oneira.multimodal.public.names import absolute, split
from oneira.platform.errors import DataError, UsageError
from oneira.platform.store import MODELS

if TYPE_CHECKING:
    from oneira.multimodal.stages import Stage

LOADER = "oneira.multimodal.text_to_image:load_text_to_image"
PICTURES = ("text", "prior", "decoder", "upsampler")
"""Kinds of stages that draw pictures, in their order: "upsampler-128" is of the last kind."""
KINDS = (*PICTURES, "sampler")


def load_models(names: Sequence[str], loader: str, kinds: Sequence[str] = KINDS) -> dict[str, list[Stage]]:
    """The stages of each model that are of these kinds, in their order, by the model's own name.

    Args:
        names: as `oneira serve --model` takes them. One that `generative` finds has a sampler as its only stage.
        loader: "module:function" of a function that gives for any other name an object with `name` and `stages`.

    Raises:
        UsageError: two models with one name, or no such loader. DataError: a stage of an unknown kind.
    """
    found: dict[str, list[Stage]] = {}
    for name in names:
        model, stages = load_model(name, loader, kinds)
        must_be_new(model, found)
        found[model] = stages
    return found


def load_model(name: str, loader: str, kinds: Sequence[str] = KINDS) -> tuple[str, list[Stage]]:
    """(its own name, its stages) of one model. As `load_models`."""
    if find_model(name) is not None:
        return Path(name).name, _sampler(name) if "sampler" in kinds else []
    model = _find(loader)(name)
    strange = [stage.name for stage in model.stages if kind_of(stage.name) not in KINDS]
    if strange:
        raise DataError(f"Model '{model.name}' has a stage '{strange[0]}'. Allowed kinds: {', '.join(KINDS)}.")
    return model.name, [stage for stage in model.stages if kind_of(stage.name) in kinds]


def must_be_new(model: str, others: Collection[str]) -> None:
    """Raises UsageError where one of the others is called the same."""
    if model in others:
        raise UsageError(f"Two models are called '{model}'. Each may be served once.")


def needed_kinds(names: Sequence[str]) -> list[str]:
    """The kinds of stages that models of these names have."""
    generative = [find_model(name) is not None for name in names]
    return [*(PICTURES if not all(generative) else ()), *(["sampler"] if any(generative) else [])]


def must_be_here(name: str) -> None:
    """Raises UsageError or DataError where this machine has no such model; loads nothing."""
    from oneira.multimodal.shelf import folder_of

    parts = split(name)
    for part, path in parts.items():
        if not path.exists():
            raise UsageError(f"There is no '{path}', which '{part}' names.")
    if not parts:
        folder_of(name)


def anywhere(name: str) -> str:
    """The name of a model as a process in another folder understands it: runs and folders by their whole path."""
    if find_model(name) is not None:
        from oneira.platform.runs import place_of  # brings numpy, which --help does without

        for place in (place_of(name), Path(name).expanduser(), MODELS / name):
            if place.exists():
                return str(place.absolute())
    return absolute(name)


def _sampler(name: str) -> list[Any]:
    from oneira.generative.models import load_model

    from .sampling import SampleStage

    return [SampleStage(load_model(name).requires_grad_(False))]


def kind_of(stage: str) -> str:
    """ "upsampler-128" -> "upsampler"."""
    return stage.partition("-")[0]


def _find(loader: str):
    module, _, function = loader.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"No loader '{loader}': {error}. It is written MODULE:FUNCTION.") from error
