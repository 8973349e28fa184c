"""The one interface of all generative models, how they are kept in folders, and how they are found again.

    model = load_model("runs/realnvp-moons")      # a run, the newest run of a preset, or a folder that `save` wrote
    model.sample(8, seed=0)                       # what the model's space says: points, pictures or texts
    model.abilities                               # {"encode", "decode", "log_prob", "interpolate"} of a flow

A model is a class with a `kind`, a `Config` and the methods of `GenerativeModel`; `checking.check_model` tells an author what
is wrong with it. Its kind is found by an entry point:

    [project.entry-points."oneira.models"]
    mine = "my_package.mine:Mine"
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from oneira.platform.checkpoints import json_bytes
from oneira.platform.config import from_dict, to_dict
from oneira.platform.errors import DataError, UsageError, did_you_mean
from oneira.platform.presets import load_entry_point, preset_names
from oneira.platform.runs import Run, find_run, place_of, runs_folder

from .spaces import Space

ABILITIES = ("encode", "decode", "log_prob", "interpolate", "complete")
CARD, WEIGHTS = "model.json", "model.safetensors"


class GenerativeModel(nn.Module, ABC):
    """A model of the rows of one space. Whoever writes one gives it `kind`, `Config`, `loss` and `sample`, and may add:

    encode(x) -> z and decode(z) -> x, float32 [N, ...]; with `invertible` each undoes the other.
    log_prob(x) -> float32 [N], nats a row; of pictures it is of the discrete picture, or a lower bound of it.
    interpolate(a, b, count) -> `count` rows from one row [...] to another, ends included.
    complete(...) -> rows of which a part is given, such as the beginning of a text.
    """

    kind: ClassVar[str]
    Config: ClassVar[type]
    invertible: ClassVar[bool] = False

    def __init__(self, config: Any, space: Space):
        super().__init__()
        self.config, self.space = config, space

    @abstractmethod
    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """(scalar to minimise, named scalars to log) of rows batch["x"] and, where there are labels, batch["y"]."""

    def sample(self, n: int, seed: int) -> Any:
        """`n` rows of the space. The same seed gives the same rows; no other randomness is used."""
        raise UsageError(f"The model '{self.kind}' cannot be sampled from.")

    @property
    def can_sample(self) -> bool:
        """Whether this model has a `sample` of its own."""
        return type(self).sample is not GenerativeModel.sample

    def own_scores(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """Scores beyond those that all models have (`scores.score_model`), of test rows batch["x"] and batch["y"]."""
        return {}

    def pictures(self, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """What a report shows beside samples, of test rows: {caption: uint8 [H, W, 3]}."""
        return {}

    @property
    def abilities(self) -> set[str]:
        """Which of `ABILITIES` this model has."""
        return {name for name in ABILITIES if hasattr(self, name)}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def generator(self, seed: int) -> torch.Generator:
        """A generator on the model's device. Raises UsageError for a negative seed."""
        if seed < 0:
            raise UsageError(f"The seed is {seed}; it must not be negative.")
        return torch.Generator(self.device).manual_seed(seed)

    def save(self, folder: Path) -> None:
        """Writes model.json (kind, config, space) and model.safetensors into an existing folder."""
        from safetensors.torch import save_file

        card = {"kind": self.kind, "config": to_dict(self.config), "space": to_dict(self.space)}
        (folder / CARD).write_bytes(json_bytes(card))
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}, folder / WEIGHTS
        )


def read_model(folder: Path) -> GenerativeModel:
    """What `save` wrote, in eval mode. Raises DataError when it is not there, damaged or of another version."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        kind, config, space = card["kind"], card["config"], card["space"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"'{folder}' holds no model: its {CARD} cannot be read ({error}).") from error
    cls = load_entry_point("oneira.models", "model", kind)
    try:
        with torch.random.fork_rng(devices=[]):  # the first weights, which nobody will see, are random
            model = cls(from_dict(cls.Config, config), from_dict(Space, space))
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError, UsageError) as error:
        raise DataError(f"The model in '{folder}' cannot be read: {error}") from error
    return model.eval()


def load_model(name: str | Path) -> GenerativeModel:
    """A trained model, in eval mode.

    Args:
        name: a run's folder or its name in runs/; a preset's name, which means its newest run that is trained; or a
            folder that `save` wrote.

    Raises:
        UsageError: there is nothing of that name; the message gives the nearest.
        DataError: it is not a trained generative model.
    """
    place = place_of(name)
    for folder in (Path(name).expanduser(), place, place / "model"):
        if (folder / CARD).is_file():
            return read_model(folder)
    if str(name) in preset_names() and not place.exists():
        return read_model(_newest(str(name)) / "model")
    if not place.exists() and not Path(name).exists():
        known = {folder.name for folder in runs_folder()} | set(preset_names())
        raise UsageError(f"There is no run, preset or model '{name}'. {did_you_mean(Path(name).name, known)}")
    raise DataError(f"The run '{find_run(name)}' holds no trained generative model.")


def _newest(preset: str) -> Path:
    for folder in reversed(runs_folder()):
        if (folder / "model" / CARD).is_file() and Run.open(folder).preset == preset:
            return folder
    raise UsageError(f"There is no trained run of '{preset}' in 'runs/'. Make one: oneira train {preset}")
