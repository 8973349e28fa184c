"""The command `oneira`. Here are train, resume, report, runs and doctor; other packages add theirs by entry points:

    [project.entry-points."oneira.commands"]
    mine = "my_package.commands:register"        # register(app: typer.Typer) -> None

Nothing here imports torch, numpy or ray before a command needs it, so that `oneira --help` answers at once.
Exit codes: 0 done, 2 usage or config, 3 bad data or checkpoint, 4 something is not installed, 75 can be resumed.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from . import presets
from .errors import EnvironmentMissing, Interrupted, OneiraError

app = typer.Typer(
    name="oneira",
    help="Agents trained inside their own dreams, on a laptop or a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its name in runs/.")]
ExecutorOption = Annotated[str, typer.Option("--executor", metavar="ray|serial", help="Who does the work.")]
AddressOption = Annotated[str | None, typer.Option("--address", metavar="ADDR", help="The Ray cluster to join.")]


@app.command()
def train(
    preset: Annotated[str, typer.Argument(metavar="PRESET|FILE.toml", help="A preset's name, or a TOML file.")],
    run: Annotated[str | None, typer.Option("--run", metavar="RUN", help="Where; an existing run goes on.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="K=V", help="Set one key of the config.")
    ] = None,
    executor: ExecutorOption = "ray",
    address: AddressOption = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="The whole preset with every stage tiny.")] = False,
    as_json: Json = False,
) -> None:
    """Train a preset: world model, controller, report."""
    from .console import json_on_stdout
    from .training import find_executor, open_or_create, read_preset, read_settings

    with json_on_stdout(as_json) as emit:
        find_executor(executor, address)  # a misspelt one must not leave a new run behind
        name, config = read_preset(preset, read_settings(settings or []), smoke)
        opened, is_new = open_or_create(name, config, run, sys.argv, smoke)
        _train(opened, is_new, executor, address, emit)


@app.command()
def resume(
    run: RunArgument, executor: ExecutorOption = "ray", address: AddressOption = None, as_json: Json = False
) -> None:
    """Go on with a run that was stopped, as if it had never stopped."""
    from .console import json_on_stdout
    from .runs import Run

    with json_on_stdout(as_json) as emit:
        _train(Run.open(run), False, executor, address, emit)


def _train(run: Any, is_new: bool, executor: str, address: str | None, emit: Any) -> None:
    from .console import show
    from .training import train as train_run

    def begun() -> None:
        if not is_new:
            run.mark_started(sys.argv)
        print(f"{'Training' if is_new else 'Going on with'} {run.preset} in {run.path}", file=sys.stderr, flush=True)
        machine = run.provenance()["started"][-1]["machine"]
        print(
            f"on {machine['device']} in {machine['precision']}, {machine['cores']} cores", file=sys.stderr, flush=True
        )

    try:
        summary = train_run(run, executor, address, begun=begun)
    except Interrupted:
        raise
    except OneiraError:
        if is_new:
            run.drop_if_empty()
        raise
    for key, value in summary.items():
        if not isinstance(value, dict):
            print(f"{key}: {show(value)}")
    print(f"report: {run.report_path}")
    emit({"run": str(run.path), "preset": run.preset, "summary": summary, "report": str(run.report_path)})


@app.command()
def report(run: RunArgument, as_json: Json = False) -> None:
    """Write a run's report.html anew, and say where it is."""
    from .console import json_on_stdout
    from .runs import Run
    from .training import report as write_report

    with json_on_stdout(as_json) as emit:
        opened = Run.open(run)
        path = write_report(opened)
        print(path)
        emit({"run": str(opened.path), "report": str(path)})


@app.command()
def runs(as_json: Json = False) -> None:
    """List the runs in runs/."""
    from .console import json_on_stdout, print_table
    from .runs import runs_folder

    with json_on_stdout(as_json) as emit:
        rows = [_run_row(path) for path in runs_folder()]
        emit({"runs": rows})
        if rows:
            columns = ["name", "preset", "state", "stage", "step", "started"]
            print_table(columns, [[row[column] for column in columns] for row in rows])
        else:
            print("There are no runs in 'runs/' yet. Make one: oneira train carracing-quick")


def _run_row(path: Any) -> dict[str, Any]:
    from .runs import Run

    row: dict[str, Any] = dict.fromkeys(("preset", "smoke", "stage", "step", "started", "summary"))
    row = {"name": path.name, "path": str(path.absolute()), **row, "state": "damaged"}
    try:
        run = Run.open(path)
        row |= {"preset": run.preset, "smoke": run.smoke, "state": run.state(), "summary": run.summary()}
        work = [line for line in run.metrics() if line["stage"] != "stage"]  # which says how long others took
        last = max(work, key=lambda line: line["time"], default={"stage": None, "step": None})
        row |= {"stage": last["stage"], "step": last["step"], "started": run.provenance()["started"][0]["time"]}
    except OneiraError as error:
        row["error"] = str(error)
    return row


@app.command()
def doctor(as_json: Json = False) -> None:
    """What works on this machine, and what to install for the rest."""
    import dataclasses

    from .console import json_on_stdout
    from .doctor import check_all

    with json_on_stdout(as_json) as emit:
        checks = check_all()
        for check in checks:
            mark = "ok     " if check.ok else "MISSING" if check.required else "absent "
            print(f"{mark}  {check.name:<22}  {check.detail}")
            if not check.ok and check.install:
                print(f"{'':<33}install: {check.install}")
        for name, problem in skipped_commands.items():
            print(f"note: the commands of '{name}' were left out: {problem}")
        missing = [check for check in checks if check.required and not check.ok]
        emit(
            {"ok": not missing, "checks": [dataclasses.asdict(check) for check in checks], "skipped": skipped_commands}
        )
    if missing:
        wanted = "; ".join(f"{check.name}: {check.install}" for check in missing)
        raise EnvironmentMissing(f"Something that Oneira needs is missing. {wanted}")


skipped_commands: dict[str, str] = {}


def add_commands() -> None:
    """Registers the commands of all installed packages; one that fails is left out, and `oneira doctor` says why."""
    presets.collecting_commands = True
    try:
        for name, point in presets.find_entry_points("oneira.commands").items():
            try:
                point.load()(app)
            except Exception as error:  # a broken package must not take the other commands away
                skipped_commands[name] = f"{type(error).__name__}: {error}"
    finally:
        presets.collecting_commands = False


def _fail(message: str, code: int) -> int:
    from .logs import say

    say("error", f"oneira: {message}", exit_code=code)
    return code


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[0].split()) or type(error).__name__


def run_command(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code; what went wrong is said in one line on stderr."""
    try:
        result = app(args=None if arguments is None else list(arguments), prog_name="oneira", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader left: the flush at exit must not fail too
        return 0
    except Exception as error:
        if os.environ.get("ONEIRA_DEBUG") == "1":
            import traceback

            traceback.print_exc()
        return _explain(error)


def _explain(error: Exception) -> int:
    if isinstance(error, OneiraError):
        return _fail(" ".join(str(error).split("\n")), error.exit_code)
    if hasattr(error, "format_message"):  # what the command line's parser refuses
        text = error.format_message()
        return _fail(f"{_one_line(error) if not text else text.splitlines()[0]} (try --help)", 2)
    if type(error).__name__ == "Abort":
        return _fail("interrupted", 130)
    if isinstance(error, ModuleNotFoundError):
        return _fail(
            f"the Python module '{error.name}' is not installed. Run 'oneira doctor'.", EnvironmentMissing.exit_code
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _fail(f"no room is left on the disk ({error.filename or 'while writing'}).", 3)
    where = getattr(error, "where", "")
    if where:  # a worker's error: its traceback is nowhere else
        print(where, file=sys.stderr)
    hint = "" if os.environ.get("ONEIRA_DEBUG") == "1" or where else " (ONEIRA_DEBUG=1 shows where)"
    return _fail(f"{type(error).__name__}: {_one_line(error)}{hint}", OneiraError.exit_code)


def main() -> None:
    """The console script."""
    add_commands()
    sys.exit(run_command())


if __name__ == "__main__":
    main()
