"""`oneira models list|show|import|export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

models = typer.Typer(help="See what models there are, take others' in and give ours away.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]
Name = Annotated[
    str, typer.Argument(metavar="NAME", help="Built in, in models/, a run, a folder, or the hub's OWNER/NAME.")
]


@models.command("list")
def list_models(as_json: Json = False) -> None:
    """The models that can be named: built-in ones, those of models/, and trained runs."""
    from dataclasses import asdict

    from oneira.platform.console import json_on_stdout, print_table

    from .shelf import shelf

    with json_on_stdout(as_json) as emit:
        rows = shelf()
        if rows:
            print_table(
                ("model", "from", "kind", "MB"), [(r.name, r.source, r.kind, _megabytes(r.bytes)) for r in rows]
            )
        else:
            print("No models yet: train one, or take one in with `oneira models import PATH`.", file=sys.stderr)
        emit({"models": [asdict(row) for row in rows]})


@models.command()
def show(name: Name, as_json: Json = False) -> None:
    """What a model is: its kind, its parts, how many parameters each has and in what precision."""
    from oneira.platform.console import json_on_stdout, print_table

    from .shelf import describe

    with json_on_stdout(as_json) as emit:
        found = describe(name)
        print(f"{found.model.name}: {found.model.kind}, in {found.model.place}")
        rows: list[tuple[Any, ...]] = [
            (p.name, p.parameters, "+".join(p.precision), _megabytes(p.bytes)) for p in found.parts
        ]
        print_table(("part", "parameters", "precision", "MB"), rows)
        _say_left(found.leftovers)
        emit(found.as_json())


@models.command("import")
def import_model(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A folder, a run, or the hub's OWNER/NAME.")],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What to call it; its folder's name if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy a model into models/, checked, so that its name is enough: oneira serve --model NAME."""
    from oneira.platform import store
    from oneira.platform.console import json_on_stdout

    from .shelf import describe

    with json_on_stdout(as_json) as emit:
        found = describe(path)
        called = name or (found.model.name if found.model.source == "folder" else Path(path).name)
        place = store.place_for(called)
        left = store.copy(Path(found.model.place), place)
        print(f"{called}: {found.model.kind}, {_megabytes(found.model.bytes)} MB, in {place}")
        _say_left(left)
        emit({"name": called, "kind": found.model.kind, "place": str(place), "left_out": left})


@models.command()
def export(
    name: Name, path: Annotated[Path, typer.Argument(metavar="PATH", help="A new folder.")], as_json: Json = False
) -> None:
    """Write a model's folder elsewhere, in the format of its library: diffusers', open_clip's or ours."""
    from oneira.platform import store
    from oneira.platform.console import json_on_stdout

    from .shelf import describe

    with json_on_stdout(as_json) as emit:
        found = describe(name)
        left = store.copy(Path(found.model.place), path.expanduser().absolute())
        print(path)
        _say_left(left)
        emit({"name": found.model.name, "kind": found.model.kind, "place": str(path), "left_out": left})


def _say_left(files: Any) -> None:
    if files:
        some = ", ".join(list(files)[:5]) + (", …" if len(files) > 5 else "")
        print(f"Never read, and so not copied: {some}", file=sys.stderr)


def _megabytes(size: int) -> float:
    return round(size / 1e6, 1)
