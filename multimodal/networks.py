"""diffusers' networks as folders of diffusers' own format: config.json and diffusion_pytorch_model.safetensors.

A folder may hold a second file, conditions.safetensors, with what diffusers' classes have no place for (the learned
embedding of "no condition", statistics): a network of ours is theirs and a few tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from oneira.platform.errors import DataError

CONFIG, WEIGHTS, CONDITIONS = "config.json", "diffusion_pytorch_model.safetensors", "conditions.safetensors"
CLASSES = ("PriorTransformer", "UNet2DConditionModel", "UNet2DModel")  # what a config may name


def diffusers_class(name: str) -> Any:
    """One of `CLASSES`. Imported late: diffusers costs seconds."""
    assert name in CLASSES
    if name == "PriorTransformer":
        from diffusers.models.transformers.prior_transformer import PriorTransformer as found
    elif name == "UNet2DConditionModel":
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel as found
    else:
        from diffusers.models.unets.unet_2d import UNet2DModel as found
    return found


def save_network(network: Any, folder: Path, conditions: Mapping[str, Tensor] | None = None) -> None:
    """Writes a network of diffusers, and what goes with it, into an existing folder."""
    network.save_config(folder)
    save_tensors(network.state_dict(), folder / WEIGHTS)
    if conditions:
        save_tensors(conditions, folder / CONDITIONS)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    import safetensors.torch

    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}  # channels_last is not
    safetensors.torch.save_file(plain, path, {"format": "pt"})


def load_network(folder: Path, name: str) -> tuple[Any, dict[str, Tensor]]:
    """(network of the class called `name`, in fp32; its conditions, empty where there are none).

    Raises:
        DataError: a file is missing or damaged, or the config names another class; one line says which.
    """
    import safetensors.torch

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict) or config.get("_class_name") != name:
            found = config.get("_class_name") if isinstance(config, dict) else config
            raise ValueError(f"its config is of '{found}'")
        network = diffusers_class(name).from_config(config)
        network.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))  # half precision becomes fp32 here
        place = folder / CONDITIONS
        conditions = safetensors.torch.load_file(place) if place.exists() else {}
        return network, {key: value.float() for key, value in conditions.items()}
    except (OSError, ValueError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise DataError(f"'{folder}' holds no {name} in diffusers' format: {_first_line(error)}") from error


def plain_attention(place: torch.device) -> AbstractContextManager[Any]:
    """For the forward pass of a training step: on a CPU the fused attention's backward pass is slower than plain products
    over the few places that texts and small pictures have (docs/LOG.md)."""
    return sdpa_kernel(SDPBackend.MATH) if place.type == "cpu" else nullcontext()


def halve(folder: Path) -> None:
    """Turns the weights of all files of a folder and its folders to half precision. Raises DataError where one does not fit."""
    import safetensors
    import safetensors.torch

    for path in sorted(folder.rglob("*.safetensors")):
        tensors = safetensors.torch.load_file(path)
        small = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
        for key, value in small.items():
            if not torch.equal(value.isfinite(), tensors[key].isfinite()):
                raise DataError(f"'{key}' in '{path}' is too large for half precision.")
        save_tensors(small, path)


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
