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

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from oneira.platform.checkpoints import json_bytes
from oneira.platform.config import from_dict, to_dict
from oneira.platform.errors import DataError, UsageError, did_you_mean
from oneira.platform.presets import load_entry_point, preset_names
from oneira.platform.runs import find_run, place_of, runs_folder

from .finding import CARD, WEIGHTS, find_model
from .noise import Noise
from .spaces import Space

ABILITIES = ("encode", "decode", "log_prob", "interpolate", "complete")


class GenerativeModel(nn.Module, ABC):
    """A model of the rows of one space. Whoever writes one gives it `kind`, `Config`, `loss` and `draw`, and may add:

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

    def draw(self, noise: Noise) -> Any:
        """A row of the space for each of the noise's, from that row's noise alone; no other randomness is used.

        Keyword-only arguments that a family adds are settings, which `sample` passes on. Who writes `sample` instead need
        not write this; then groups are drawn one after another.
        """
        if not self.can_sample:
            raise UsageError(f"The model '{self.kind}' cannot be sampled from.")
        parts = [self.sample(count, generator.initial_seed()) for count, generator in noise.groups]
        return torch.cat(parts) if isinstance(parts[0], Tensor) else [row for part in parts for row in part]

    def check(self, **settings: Any) -> None:
        """Raises UsageError for settings that `draw` would refuse whatever the rows; it draws nothing."""

    def sample(self, n: int, seed: int, **settings: Any) -> Any:
        """`n` rows of the space: float32 or uint8 [n, ...], or a list of texts. The same seed gives the same rows.

        Args:
            settings: see the family's `draw`.

        Raises:
            UsageError: a model that cannot be sampled from, no rows, a negative seed, a setting that makes no sense.
        """
        return self.draw(self.noise([(n, seed)]), **settings)

    def noise(self, groups: Sequence[tuple[int, int]]) -> Noise:
        """The noise of groups (rows, seed) that are drawn together, each as if it were alone."""
        if any(n < 1 for n, _ in groups):
            raise UsageError(f"{min(n for n, _ in groups)} rows are asked for; it must be at least 1.")
        return Noise([(n, self.generator(seed)) for n, seed in groups])

    def precise(self) -> Self:
        """A copy in float64 (float32 on devices without it), for draws of whole numbers.

        Whether a value falls on one side of a number drawn or the other may hang on a sum's last digit, which changes
        with how many rows are drawn together, and one that falls otherwise changes all that are drawn after it. That
        happens to a row in some thousands in float32, and to none that anybody will see in float64.
        """
        model = copy.deepcopy(self)
        return model if self.device.type == "mps" else model.double()

    @property
    def can_sample(self) -> bool:
        """Whether this model has a `draw` or a `sample` of its own."""
        return (type(self).draw, type(self).sample) != (GenerativeModel.draw, GenerativeModel.sample)

    def own_scores(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """Scores beyond those that all models have (`scores.score_model`), of test rows batch["x"] and batch["y"]."""
        return {}

    def alarms(self, scores: Mapping[str, float]) -> list[str]:
        """What a report warns of, a sentence each, of the scores that this model has."""
        return []

    def texts(self, batch: Mapping[str, Tensor]) -> list[str]:
        """What a page shows of test rows, of a model of texts that cannot be sampled from."""
        return []

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
        """A generator on the model's device. Raises UsageError for a seed outside of [0, 2^63)."""
        if not 0 <= seed < 2**63:
            raise UsageError(f"The seed is {seed}; it must be in [0, 2^63).")
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
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"'{folder}' holds no model: its {CARD} cannot be read ({error}).") from error
    cls = load_entry_point("oneira.models", "model", kind)
    try:
        with torch.random.fork_rng(devices=[]):  # the first weights, which nobody will see, are random
            model = cls(from_dict(cls.Config, config), from_dict(Space, space))
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError, UsageError) as error:
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
    folder = find_model(name)
    if folder is not None:
        return read_model(folder)
    if not place_of(name).exists() and not Path(name).exists():
        if str(name) in preset_names():
            raise UsageError(f"There is no trained run of '{name}' in 'runs/'. Make one: oneira train {name}")
        known = {run.name for run in runs_folder()} | set(preset_names())
        raise UsageError(f"There is no run, preset or model '{name}'. {did_you_mean(Path(name).name, known)}")
    raise DataError(f"The run '{find_run(name)}' holds no trained generative model.")
