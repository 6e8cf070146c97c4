"""The program `mixmo`: its commands, and what becomes of errors.

A new command is a module beside this one and a line in `_COMMANDS`.
"""

import os
import sys
import traceback
import warnings
from collections.abc import Sequence

import typer

from mixmo_fastai import __version__
from mixmo_fastai.cli import (
    compare,
    datasets,
    ensemble,
    evaluate,
    export,
    fit,
    import_,
    inspect_,
    lr_find,
    predict,
    recipes,
    report,
    show,
)
from mixmo_fastai.cli.console import RunInterruptedError
from mixmo_fastai.cli.options import in_flags
from mixmo_fastai.errors import InputError, RunFailedError
from mixmo_fastai.interruption import StopRequest, handling_signals

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
NAMES = {INTERRUPTED: "Interrupted.", 143: "Terminated.", 129: "Hung up."}

app = typer.Typer(
    name="mixmo",
    help="MixMo for fastai: the accuracy of an ensemble at the price of one network.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
_COMMANDS = {
    "fit": fit.fit,
    "lr-find": lr_find.lr_find,
    "eval": evaluate.evaluate,
    "ensemble": ensemble.ensemble,
    "compare": compare.compare,
    "predict": predict.predict,
    "inspect": inspect_.inspect,
    "report": report.report,
    "show": show.show,
    "export": export.export,
    "import": import_.import_,
    "recipes": recipes.recipes,
    "datasets": datasets.datasets,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)

# Typer carries its own copy of click in some versions; its exceptions are found by descent.
UsageError = typer.BadParameter.__mro__[1]
ClickException = typer.BadParameter.__mro__[2]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mixmo {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version.", callback=_print_version, is_eager=True
    ),
) -> None:
    """Options of the program itself."""


def run(args: Sequence[str]) -> int:
    """Run one command line.

    Returns:
        0 done, 2 the user's input, 128 + n ended by signal n (130 by Ctrl-C), 1 anything else.
    """
    debug = "--debug" in args
    if not debug:
        # Third parties warn their developers, not the people who train.
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category)
        # Pillow's warning of large scans, which are read all the same.
        warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    with handling_signals() as stop:
        try:
            _check_processes(args)
            command = typer.main.get_command(app)
            arguments = list(args) or ["--help"]
            code = command.main(args=arguments, prog_name="mixmo", standalone_mode=False) or DONE
            # Typer turns an interruption into this code without a word.
            return _stopped(stop) if code == INTERRUPTED else int(code)
        except Exception as error:
            if debug and not isinstance(error, ClickException):
                traceback.print_exc()
            return _stopped(stop) if isinstance(error, typer.Abort) else _report(error)
        except KeyboardInterrupt:
            return _stopped(stop)


def _check_processes(args: Sequence[str]) -> None:
    """Check that only training was started in several processes."""
    several = int(os.environ.get("WORLD_SIZE") or "1") > 1
    if several and (not args or args[0] != "fit"):
        raise InputError("Only `mixmo fit` runs in several processes. Start this one by itself.")


def _stopped(stop: StopRequest) -> int:
    code = INTERRUPTED if stop.number is None else 128 + stop.number
    return _say(NAMES[code], code)


def _report(error: Exception) -> int:
    """Say in one to three lines what went wrong."""
    if isinstance(error, RunInterruptedError):
        return _say(str(error), error.exit_code)
    for kind, code in _CODES.items():
        if isinstance(error, kind):
            return _say(in_flags(str(error)), code)
    if isinstance(error, ClickException):
        return _say(_usage(error), BAD_INPUT)
    first_lines = "\n".join(str(error).splitlines()[:2]) or "no message"
    return _say(f"{type(error).__name__}: {first_lines}\n--debug shows where.", FAILED)


_CODES = {InputError: BAD_INPUT, RunFailedError: FAILED}


def _usage(error: Exception) -> str:
    message: str = error.format_message()  # type: ignore[attr-defined]
    if not isinstance(error, UsageError):
        return message
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "mixmo"
    return f"{message}\n`{path} --help` lists what there is."


def _say(message: str, code: int) -> int:
    prefix = "" if code > 128 else "Error: "
    if (rank := os.environ.get("RANK") or "0") != "0":
        prefix = f"[process {rank}] {prefix}"
    print(f"{prefix}{message}", file=sys.stderr)  # noqa: T201
    return code
