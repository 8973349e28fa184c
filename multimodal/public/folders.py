"""Folders of diffusers' format that others made: what may stand in them, and their parts, loaded one by one.

    folder = PublicFolder.open(path, families)      # classes and files checked; nothing is loaded
    unet = folder.load("unet")                      # a network with the folder's weights, in fp32

Nothing in a folder is run. A class is loaded only by its name on `CLASSES`, from the installed libraries; weights only from
safetensors, however many other files lie beside them.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneira.platform.errors import DataError, did_you_mean

from .names import INDEX

CONFIG, SCHEDULER = "config.json", "scheduler_config.json"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5")  # weights of other formats, which are not read
NETWORKS = {  # where each class is, by its name
    "AutoencoderKL": "diffusers.models.autoencoders.autoencoder_kl",
    "UNet2DConditionModel": "diffusers.models.unets.unet_2d_condition",
    "UNet2DModel": "diffusers.models.unets.unet_2d",
    "VQModel": "diffusers.models.autoencoders.vq_model",
    "PriorTransformer": "diffusers.models.transformers.prior_transformer",
    "UnCLIPTextProjModel": "diffusers.pipelines.deprecated.unclip.text_proj",
    "CLIPTextModel": "transformers.models.clip.modeling_clip",
    "CLIPTextModelWithProjection": "transformers.models.clip.modeling_clip",
    "CLIPVisionModelWithProjection": "transformers.models.clip.modeling_clip",
    "T5EncoderModel": "transformers.models.t5.modeling_t5",
}
CLIP_FILES, T5_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt")), (("tokenizer.json",), ("spiece.model",))
PREPARATIONS = {  # what is no network: where the class is, and the groups of files of which one must be there
    "CLIPTokenizer": ("transformers.models.clip.tokenization_clip", CLIP_FILES),
    "CLIPTokenizerFast": ("transformers.models.clip.tokenization_clip", CLIP_FILES),
    "T5Tokenizer": ("transformers.models.t5.tokenization_t5", T5_FILES),
    "T5TokenizerFast": ("transformers.models.t5.tokenization_t5", T5_FILES),
    "CLIPImageProcessor": ("transformers.models.clip.image_processing_clip", (("preprocessor_config.json",),)),
}
SCHEDULERS = (
    "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "UnCLIPScheduler",
)  # fmt: skip
UNUSED = (
    "StableDiffusionSafetyChecker",
    "IFSafetyChecker",
    "IFWatermarker",
    "CLIPFeatureExtractor",
)  # and so not loaded
CLASSES = (*NETWORKS, *PREPARATIONS, *SCHEDULERS)


@dataclass(frozen=True)
class Family:
    """A kind of pipeline: its class in model_index.json, and the parts that it needs, each with the classes it may be of."""

    name: str
    pipeline: str
    parts: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class PublicFolder:
    """A folder that was checked. classes: of its parts, by name."""

    path: Path
    family: Family
    classes: Mapping[str, str]

    @classmethod
    def open(cls, path: Path, families: Sequence[Family]) -> PublicFolder:
        """Raises DataError: it is of no family of these, lacks a part or file, or names a class outside of the list."""
        index = read_json(path / INDEX)
        known = {family.pipeline: family for family in families}
        name = str(index.get("_class_name"))
        if name not in known:
            raise DataError(f"'{path / INDEX}' is of '{name}', which is not known. {did_you_mean(name, known)}")
        family = known[name]
        classes = _classes(path, index)
        for part, allowed in family.parts.items():
            if part not in classes:
                raise DataError(f"'{path}' lacks the part '{part}' of a {family.name} model.")
            if classes[part] not in allowed:
                raise DataError(
                    f"'{path}': its part '{part}' is of class '{classes[part]}'. Allowed: {', '.join(allowed)}."
                )
            _check_files(path / part, classes[part])
        return cls(path, family, {part: classes[part] for part in family.parts})

    def config(self, part: str) -> dict[str, Any]:
        """A part's settings, as its JSON has them."""
        return read_json(self.path / part / (SCHEDULER if self.classes[part] in SCHEDULERS else CONFIG))

    def whole_number(self, part: str, key: str) -> int:
        """A setting of a part that must be a positive whole number. Raises DataError."""
        value = self.config(part).get(key)
        if not isinstance(value, int) or value < 1:
            raise DataError(f"'{self.path / part}': {key} is {value!r}; it must be a positive whole number.")
        return value

    def load(self, part: str) -> Any:
        """A network, frozen, in fp32 and eval mode; or a tokenizer or preparation of pictures. Raises DataError when its files do not fit its class."""
        name, place = self.classes[part], self.path / part
        try:
            if name in PREPARATIONS:
                made = getattr(importlib.import_module(PREPARATIONS[name][0]), name.removesuffix("Fast"))
                return made.from_pretrained(place, local_files_only=True)
            made = getattr(importlib.import_module(NETWORKS[name]), name)
            network, info = _load_network(made, place)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
            raise DataError(f"'{place}' holds no {name} that can be read: {one_line(error)}") from error
        wrong = [*info.get("missing_keys", ()), *info.get("mismatched_keys", ())]
        if wrong:
            raise DataError(f"'{place}' has not all weights of a {name}: {len(wrong)} are missing, as {wrong[0]!r}.")
        return network.requires_grad_(False).eval()


def _load_network(made: Any, place: Path) -> tuple[Any, dict[str, Any]]:
    import torch

    settings: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    if not _plain_weights(place):
        settings["variant"] = "fp16"
    if made.__module__.startswith("diffusers"):
        return made.from_pretrained(place, torch_dtype=torch.float32, low_cpu_mem_usage=False, **settings)
    return made.from_pretrained(place, dtype=torch.float32, **settings)


def _plain_weights(place: Path) -> list[Path]:
    return [path for path in place.glob("*.safetensors") if ".fp16" not in path.name]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises DataError: there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"'{path}' cannot be read: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise DataError(f"'{path}' must hold a JSON object.")
    return found


def one_line(error: BaseException) -> str:
    """What an error says, at most 300 characters in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _classes(path: Path, index: Mapping[str, Any]) -> dict[str, str]:
    """The classes of the parts that an index names and that are used. Raises DataError: one is on no list."""
    found = {}
    for part, value in index.items():
        if part.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue
        name = str(value[-1]) if value else ""
        if name in UNUSED:
            continue
        if name not in CLASSES:
            raise DataError(
                f"'{path / INDEX}': its part '{part}' is of class '{name}', which is not on the list of classes that are "
                f"loaded. {did_you_mean(name, CLASSES)}"
            )
        found[part] = name
    return found


def _check_files(place: Path, name: str) -> None:
    """Raises DataError unless the files of a part of this class are there, in formats that are read."""
    if name in SCHEDULERS:
        read_json(place / SCHEDULER)
    elif name in PREPARATIONS:
        if not any(all((place / file).is_file() for file in files) for files in PREPARATIONS[name][1]):
            groups = " or ".join(" and ".join(files) for files in PREPARATIONS[name][1])
            raise DataError(f"'{place}' lacks the files of a {name}: {groups}.")
    else:
        read_json(place / CONFIG)
        if any(place.glob("*.safetensors")):
            return
        others = sorted(path.name for path in place.glob("*") if path.suffix in PICKLES)
        if others:
            raise DataError(
                f"'{place / others[0]}' is no safetensors: only those are read, since other formats can run code. Have "
                "it converted by who made it, or with save_pretrained of its own library."
            )
        raise DataError(f"'{place}' lacks the weights of a {name}: there is no .safetensors.")
