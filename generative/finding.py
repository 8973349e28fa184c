"""Where a trained generative model is, by what people call it. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

from oneira.platform.presets import preset_names
from oneira.platform.store import MODELS

CARD, WEIGHTS = "model.json", "model.safetensors"


def find_model(name: str | Path) -> Path | None:
    """The folder with the weights of a run (a path, or its name in runs/), of a preset's newest trained run, or of a folder
    that `GenerativeModel.save` wrote (a path, or its name in models/); None where there is none."""
    from oneira.platform.runs import place_of, preset_of, runs_folder  # brings numpy, which --help does without

    place = place_of(name)
    for folder in (Path(name).expanduser(), place, place / "model", MODELS / name):
        if is_model(folder):
            return folder
    if str(name) in preset_names() and not place.exists():
        for run in reversed(runs_folder()):
            if is_model(run / "model") and preset_of(run) == str(name):
                return run / "model"
    return None


def is_model(folder: Path) -> bool:
    """Whether a folder's card is one of ours: other models are kept in folders with a card as well."""
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(card, dict) and {"kind", "config", "space"} <= card.keys()
