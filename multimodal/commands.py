"""The commands of this package: `oneira generate`, `assemble`, `judge` and `models`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .shelf_commands import models

MODEL = Annotated[
    str,
    typer.Option("--model", metavar="M", help="A model's name or folder, diffusers' as well; prior=PATH,decoder=PATH."),
]
JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
MOST = 256  # pictures of one command


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command()(generate)
    app.command()(assemble)
    app.command()(judge)
    app.add_typer(models, name="models")


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option(help="The picture to write; of several, NAME-1, NAME-2 and so on.")],
    model: MODEL = "builtin",
    seed: Annotated[int, typer.Option(help="Of the noise; the next pictures have the seeds after it.")] = 0,
    n: Annotated[int, typer.Option(help="How many pictures.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Of prior and decoder; the model's own number if left out.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How closely to keep to the prompt.")] = None,
    as_json: JSON = False,
) -> None:
    """Draw pictures from a prompt."""
    import sys

    from oneira.platform.console import json_on_stdout
    from oneira.platform.errors import UsageError

    if not 1 <= n <= MOST:
        raise UsageError(f"{n} pictures asked for; allowed are 1 to {MOST}.")
    check_picture_path(out)
    with json_on_stdout(as_json) as emit:
        from .text_to_image import load_text_to_image

        pipe = load_text_to_image(model)
        for note in pipe.notes:
            print(note, file=sys.stderr)
        pictures = pipe([prompt] * n, seed=seed, steps=steps, guidance=guidance)
        places = [out] if n == 1 else [out.with_name(f"{out.stem}-{k + 1}{out.suffix}") for k in range(n)]
        for picture, place in zip(pictures, places, strict=True):
            save_picture(picture, place)
            print(place)
        emit(
            {
                "prompt": prompt, "model": model, "seeds": list(range(seed, seed + n)), "size": list(pictures[0].size),
                "files": [str(place) for place in places],
            }
        )  # fmt: skip


def assemble(
    clip: Annotated[str, typer.Option(help="A run of scenes-clip.")],
    prior: Annotated[str, typer.Option(help="A run of scenes-prior or scenes-prior-ar.")],
    decoder: Annotated[str, typer.Option(help="A run of scenes-decoder.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    upsampler: Annotated[str | None, typer.Option(help="A run of scenes-upsampler.")] = None,
    as_json: JSON = False,
) -> None:
    """Make one text-to-image model, in half precision, of the runs that trained its parts."""
    from oneira.platform.console import json_on_stdout

    with json_on_stdout(as_json) as emit:
        from .assembling import assemble as make
        from .assembling import folder_bytes

        card = make(out, clip=clip, prior=prior, decoder=decoder, upsampler=upsampler)
        size = folder_bytes(out)
        print(f"{out}: {size / 1e6:.1f} MB")
        emit({"model": str(out), "bytes": size, "card": vars(card)})


def judge(
    model: MODEL = "builtin",
    checker: Annotated[
        str, typer.Option(metavar="RUN", help="A run of scenes-checker, its model's folder, or the one that ships.")
    ] = "builtin",
    prompts: Annotated[int, typer.Option(help="Of each kind.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the first picture's noise.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the scores.")] = None,
    as_json: JSON = False,
) -> None:
    """Score a text-to-image model on combinations of attributes that it was never shown."""
    import json
    import sys

    from oneira.platform.console import json_on_stdout
    from oneira.platform.errors import UsageError

    if prompts < 1:
        raise UsageError(f"{prompts} prompts asked for; there must be at least 1.")
    if not 0 <= seed < 2**62:
        raise UsageError(f"The seed is {seed}; it must be in [0, 2^62).")
    if out is not None and not out.absolute().parent.is_dir():
        raise UsageError(f"There is no folder '{out.absolute().parent}'.")
    with json_on_stdout(as_json) as emit:
        from .assembling import part_place
        from .checker import Checker
        from .scoring import score_pictures
        from .text_to_image import TextToImage, load_text_to_image

        pipe = load_text_to_image(model)
        if not isinstance(pipe, TextToImage):
            raise UsageError(f"'{model}' was not made by `oneira assemble`; only those know scenes, and can be judged.")
        place = part_place(checker, "checker")
        judge_of = Checker.load(place / "model" if (place / "model").is_dir() else place)

        def progress(done: int, of: int) -> None:
            if done % 50 == 0 or done == of:
                print(f"{done} of {of} pictures", file=sys.stderr, flush=True)

        scores = score_pictures(pipe, judge_of, prompts=prompts, seed=seed, progress=progress)
        scores["conditions"]["checker"] = str(place)
        emit(scores)
        print_scores(scores)
        if out is not None:
            out.write_text(json.dumps(scores, indent=1), encoding="utf-8")


def print_scores(scores: dict[str, Any]) -> None:
    for kind, conditions in scores.items():
        for condition, counted in conditions.items() if kind != "conditions" else ():
            for what, found in counted.items():
                low, high = found["ci95"]
                print(f"{kind}, from the {condition}: {what} {found['share']:.1%} (95% CI {low:.1%} to {high:.1%})")


def check_picture_path(path: Path) -> None:
    """Raises UsageError before any work is done for a picture that could not be written."""
    from oneira.platform.errors import UsageError, did_you_mean

    kinds = (".png", ".jpg", ".jpeg", ".webp")
    if path.suffix.lower() not in kinds:
        raise UsageError(f"'{path}' is of no kind that is written. {did_you_mean(path.suffix, kinds)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"There is no folder '{path.absolute().parent}'.")


def save_picture(picture: Any, path: Path) -> None:
    from oneira.platform.errors import DataError

    try:
        picture.save(path)
    except OSError as error:
        raise DataError(f"Cannot write '{path}': {error.strerror or error}.") from error
