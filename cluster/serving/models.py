"""From a model's name to its stages. The one place that knows how models are loaded."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from oneira.platform.errors import DataError, UsageError

if TYPE_CHECKING:
    from oneira.multimodal.stages import Stage

LOADER = "oneira.multimodal.text_to_image:load_text_to_image"
KINDS = ("text", "prior", "decoder", "upsampler")  # of stages, in their order: "upsampler-128" is of the last kind


def load_models(names: Sequence[str], loader: str, kinds: Sequence[str] = KINDS) -> dict[str, list[Stage]]:
    """The stages of each model that are of these kinds, in their order, by the model's own name.

    Args:
        names: as `oneira serve --model` takes them.
        loader: "module:function" of a function that gives for a name an object with `name` and `stages`.

    Raises:
        UsageError: two models with one name, or no such loader. DataError: a stage of an unknown kind.
    """
    found: dict[str, list[Stage]] = {}
    for name in names:
        model = _find(loader)(name)
        if model.name in found:
            raise UsageError(f"Two models are called '{model.name}'. Each may be served once.")
        strange = [stage.name for stage in model.stages if kind_of(stage.name) not in KINDS]
        if strange:
            raise DataError(f"Model '{model.name}' has a stage '{strange[0]}'. Allowed kinds: {', '.join(KINDS)}.")
        found[model.name] = [stage for stage in model.stages if kind_of(stage.name) in kinds]
    return found


def kind_of(stage: str) -> str:
    """ "upsampler-128" -> "upsampler"."""
    return stage.partition("-")[0]


def _find(loader: str):
    module, _, function = loader.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"No loader '{loader}': {error}. It is written MODULE:FUNCTION.") from error
