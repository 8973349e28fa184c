"""The commands of this package: `oneira sample` and `oneira compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
MOST = 10_000  # samples of one command, which are drawn together


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command()(sample)
    app.command()(compare)


def sample(
    model: Annotated[str, typer.Argument(metavar="RUN|NAME", help="A run, a preset (its newest run), or a folder.")],
    out: Annotated[Path, typer.Option(help="What to write: .png shows, .npy holds arrays, .txt texts.")],
    n: Annotated[int, typer.Option("--n", help="How many.")] = 64,
    seed: Annotated[int, typer.Option(help="The same seed gives the same samples.")] = 0,
    as_json: JSON = False,
) -> None:
    """Draw samples from a trained generative model."""
    from oneira.platform.console import json_on_stdout
    from oneira.platform.errors import UsageError

    if not 1 <= n <= MOST:
        raise UsageError(f"{n} samples asked for; allowed are 1 to {MOST:,}.")
    with json_on_stdout(as_json) as emit:
        from .models import load_model
        from .spaces import check_format, write_samples

        loaded = load_model(model)
        check_format(out, loaded.space)
        write_samples(loaded.sample(n, seed), loaded.space, out)
        print(out)
        emit({"model": model, "kind": loaded.kind, "n": n, "seed": seed, "file": str(out)})


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Trained runs of generative models.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("compare.html"),
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="One picture with a panel of samples for each run, too.")
    ] = None,
    classifier: Annotated[
        str,
        typer.Option(
            metavar="RUN",
            help="A classifier's run, or a folder with Inception: samples are scored in its features too.",
        ),
    ] = "",
    as_json: JSON = False,
) -> None:
    """Put runs side by side: one page with their scores and their samples."""
    from oneira.platform.console import json_on_stdout

    with json_on_stdout(as_json) as emit:
        from .comparing import comparison_page, describe_run, panel_of
        from .contact import check_sheet, contact_sheet
        from .settings import load_classifier, version_of

        if sheet is not None:
            check_sheet(sheet)
        reader = load_classifier(classifier) if classifier else None
        rows = [describe_run(run, reader) for run in runs]
        print(comparison_page(rows, out, f"{classifier} ({version_of(classifier)})" if classifier else ""))
        if sheet is not None:
            print(contact_sheet([panel_of(row) for row in rows], sheet))
        emit({"runs": rows, "page": str(out), "sheet": str(sheet) if sheet else None})
