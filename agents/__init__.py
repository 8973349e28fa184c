"""Agents that learn in their own dreams: worlds, world models (V, M), controllers (C), evolution, dream environments.

    from oneira.agents import load_agent, make_dream
    gymnasium.make("oneira.agents:oneira/Dream-v0", run="runs/my-run")

Importing this package registers `oneira/Dream-v0` with Gymnasium and loads neither torch nor numba.
"""

import importlib
from typing import Any

from oneira.platform import presets

_EXPORTS = {"make_dream": "dream", "load_agent": "loading"}

__all__ = ["load_agent", "make_dream"]


def register() -> None:
    """Make `oneira/Dream-v0` known to Gymnasium; a second call changes nothing."""
    import gymnasium

    if "oneira/Dream-v0" not in gymnasium.registry:
        gymnasium.register(
            "oneira/Dream-v0",
            entry_point="oneira.agents.dream:DreamEnv",
            vector_entry_point="oneira.agents.dream:make_vector",
        )


if not presets.collecting_commands:
    register()


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it exports {', '.join(sorted(_EXPORTS))}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
