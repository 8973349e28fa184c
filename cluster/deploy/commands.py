"""`oneira deploy`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oneira.platform.console import json_on_stdout
from oneira.platform.errors import DataError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]


def deploy(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the files are written.")] = Path("deploy"),
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="K=V", help="Such as workers=4, gpus=1, image=...")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write files for KubeRay, `ray up`, Docker, systemd and Grafana."""
    from oneira.platform.config import override
    from oneira.platform.training import read_settings

    from .files import Deployment, deployment_files

    with json_on_stdout(as_json) as emit:
        files = deployment_files(override(Deployment(), read_settings(settings or [])))
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (out / name).write_text(text, encoding="utf-8")
                print(out / name)
        except OSError as error:
            raise DataError(f"Cannot write into '{out}': {error.strerror or error}.") from error
        emit({"files": [str(out / name) for name in files]})
