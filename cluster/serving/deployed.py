"""The Serve application as a configuration file names it: `import_path: oneira.cluster.serving.deployed:app`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from oneira.platform.errors import UsageError, did_you_mean

ARGUMENTS = ("models", "layout", "loader", "rows", "queue", "replicas", "memory", "cpus", "gpus")


def app(arguments: Mapping[str, Any]) -> Any:
    """The application for the file's `args`.

    Args:
        arguments: models (names or folders), layout ("split" or "fused"), loader, rows, queue, replicas and memory as for `Serving`; cpus and gpus:
            the cluster's at most, which bound how far stages scale.

    Raises:
        UsageError: an unknown argument or layout, no model, or no key in ONEIRA_API_KEY: a deployed server is never open.
    """
    from .application import Serving, build
    from .models import LOADER
    from .running import LAYOUTS

    for name in arguments:
        if name not in ARGUMENTS:
            raise UsageError(f"Unknown argument '{name}'. {did_you_mean(name, ARGUMENTS)}")
    layout, models = arguments.get("layout", "split"), tuple(arguments.get("models", ()))
    if layout not in LAYOUTS:
        raise UsageError(f"Unknown layout '{layout}'. {did_you_mean(str(layout), LAYOUTS)}")
    if not models:
        raise UsageError("No model is named. Allowed: one or more.")
    key = os.environ.get("ONEIRA_API_KEY")
    if not key:
        raise UsageError("ONEIRA_API_KEY is not set: a server that others can reach needs a key.")
    more = {name: arguments[name] for name in ("rows", "queue", "replicas", "memory") if name in arguments}
    serving = Serving(models=models, loader=arguments.get("loader", LOADER), key=key, **more)
    return build(serving, layout, int(arguments.get("cpus", 1)), int(arguments.get("gpus", 0)))
