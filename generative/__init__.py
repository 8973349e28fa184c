"""Generative families: one model, one file, one training loop for all (`training.fit`), one interface (`models`).

    from oneira.generative import load_model
    load_model("realnvp-moons").sample(8, seed=0)

Importing this package loads no torch.
"""

import importlib
from typing import Any

_EXPORTS = {"load_model": "models", "check_model": "checking"}

__all__ = ["check_model", "load_model"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it exports {', '.join(sorted(_EXPORTS))}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
