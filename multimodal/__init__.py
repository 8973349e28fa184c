"""Text and pictures: the scenes data set, CLIP, and what draws pictures from captions.

    from oneira.multimodal import load_text_to_image
    load_text_to_image("builtin")(["a red star above a blue ring"], seed=0)[0].save("star.png")

Importing this package loads no torch.
"""

import importlib
from typing import Any

_EXPORTS = {"load_text_to_image": "text_to_image"}

__all__ = ["load_text_to_image"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it exports {', '.join(sorted(_EXPORTS))}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
