"""The program `mixmo`: its commands and its error handling.

To add a command, write a module in this package and add a line to `_COMMANDS`.
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
from mixmo_fastai.cli.options import use_flag_names
from mixmo_fastai.errors import InputError, RunFailedError
from mixmo_fastai.runtime.signals import StopRequest, handling_signals

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
SIGNAL_MESSAGES = {INTERRUPTED: "Interrupted.", 143: "Terminated.", 129: "Hung up."}

app = typer.Typer(
    name="mixmo",
    help="MixMo for fastai: the accuracy of an ensemble at the cost of one network.",
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

# Some versions of Typer bundle their own copy of click, so its exceptions are taken from the MRO.
UsageError = typer.BadParameter.__mro__[1]
ClickException = typer.BadParameter.__mro__[2]


def _print_version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(f"mixmo {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version.", callback=_print_version, is_eager=True
    ),
) -> None:
    """Define the options of the program itself."""


def run(args: Sequence[str]) -> int:
    """Run one command line.

    Returns:
        The exit code: 0 for success, 2 for invalid input, 128 + n after signal n (130 for Ctrl-C),
        1 for any other error.
    """
    debug = "--debug" in args
    if not debug:
        # Warnings of libraries that address developers, not users.
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category)
        # Pillow warns about large images, which are supported here.
        warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    with handling_signals() as stop:
        try:
            _check_processes(args)
            command = typer.main.get_command(app)
            arguments = list(args) or ["--help"]
            code = command.main(args=arguments, prog_name="mixmo", standalone_mode=False) or DONE
            # Typer converts KeyboardInterrupt to this code without a message.
            return _stopped(stop) if code == INTERRUPTED else int(code)
        except Exception as error:
            if debug and not isinstance(error, ClickException):
                traceback.print_exc()
            return _stopped(stop) if isinstance(error, typer.Abort) else _report(error)
        except KeyboardInterrupt:
            return _stopped(stop)


def _check_processes(args: Sequence[str]) -> None:
    """Check that of all commands only `fit` is started in several processes."""
    is_distributed = int(os.environ.get("WORLD_SIZE") or "1") > 1
    if is_distributed and (not args or args[0] != "fit"):
        raise InputError("Only `mixmo fit` runs in several processes. Run this without torchrun.")


def _stopped(stop: StopRequest) -> int:
    code = INTERRUPTED if stop.number is None else 128 + stop.number
    return _print_error(SIGNAL_MESSAGES[code], code)


def _report(error: Exception) -> int:
    """Print an error in one to three lines; return the exit code."""
    if isinstance(error, RunInterruptedError):
        return _print_error(str(error), error.exit_code)
    for error_type, code in _CODES.items():
        if isinstance(error, error_type):
            return _print_error(use_flag_names(str(error)), code)
    if isinstance(error, ClickException):
        return _print_error(_usage_message(error), BAD_INPUT)
    first_lines = "\n".join(str(error).splitlines()[:2]) or "no message"
    message = f"{type(error).__name__}: {first_lines}\nAdd --debug to see the traceback."
    return _print_error(message, FAILED)


_CODES = {InputError: BAD_INPUT, RunFailedError: FAILED}


def _usage_message(error: Exception) -> str:
    message: str = error.format_message()  # type: ignore[attr-defined]
    if not isinstance(error, UsageError):
        return message
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "mixmo"
    return f"{message}\nSee `{path} --help` for the allowed arguments."


def _print_error(message: str, code: int) -> int:
    prefix = "" if code > 128 else "Error: "
    if (rank := os.environ.get("RANK") or "0") != "0":
        prefix = f"[process {rank}] {prefix}"
    print(f"{prefix}{message}", file=sys.stderr)  # noqa: T201
    return code
