"""The program `mixmo`: its commands and its error handling.

To add a command, write a module in this package and add a line to `_COMMANDS`.
"""

import inspect
import os
import sys
import traceback
import warnings
from collections.abc import Container, Sequence

import typer

from mixmo_fastai import __version__
from mixmo_fastai.cli.options import use_flag_names
from mixmo_fastai.config.registered import resolve_registered
from mixmo_fastai.errors import InputError, RunFailedError, RunInterruptedError
from mixmo_fastai.runtime.hub_access import avoid_retries
from mixmo_fastai.runtime.launcher import launcher_number
from mixmo_fastai.runtime.signals import StopRequest, handling_signals

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
SIGNAL_MESSAGES = {
    INTERRUPTED: "Interrupted.",
    143: "Terminated.",
    129: "Hung up.",
    138: "Stopped.",
}

_COMMANDS = {
    "fit": (
        "fit:fit",
        "Train a network, evaluate it once on the test set, and write a run folder.",
    ),
    "lr-find": (
        "lr_find:lr_find",
        "Increase the learning rate step by step, and recommend one from the loss curve.",
    ),
    "eval": (
        "evaluate:evaluate",
        "Evaluate a trained run on its test set; calibrate on its validation split.",
    ),
    "ensemble": (
        "ensemble:ensemble",
        "Evaluate finished runs as one ensemble, the mean of their logits, on the test set.",
    ),
    "compare": (
        "compare:compare",
        "Evaluate runs on the same test images, compare each with the first, and plot the results.",
    ),
    "study": (
        "study:study",
        "Train methods with several seeds and training lengths, and compare them.",
    ),
    "predict": (
        "predict:predict",
        "Predict class, probability and the members' votes of each image, as CSV or JSON.",
    ),
    "calibrate": (
        "calibrate:calibrate",
        "Fit the calibration of a finished run on its validation images, and store it.",
    ),
    "inspect": (
        "inspect_:inspect",
        "Measure active filters per convolution, and the norms of the encoders' filters.",
    ),
    "report": ("report:report", "Evaluate a trained run and write a self-contained HTML report."),
    "show": ("show:show", "Plot image pairs, masks and mixtures of the first training batch."),
    "export": (
        "export:export",
        "Write one plain network (encoder, core, head) that computes the logits of the ensemble.",
    ),
    "push": (
        "push:push",
        "Write one plain network with a model card, in the layout of the Hugging Face Hub.",
    ),
    "import": (
        "import_:import_",
        "Convert a published checkpoint to a run that can be evaluated; only its tensors are read.",
    ),
    "recipes": (
        "recipes:recipes",
        "List the recipes with their expected accuracy, or show all settings of one.",
    ),
    "datasets": (
        "datasets:datasets",
        "List the data sets, and verify the checksums of those that are present.",
    ),
}
"""Module and function of each command, imported only to run it, and the first line of its help."""

# Some versions of Typer bundle their own copy of click, so its exceptions are taken from the MRO.
UsageError = typer.BadParameter.__mro__[1]
ClickException = typer.BadParameter.__mro__[2]


def _print_version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(f"mixmo {__version__}")
        raise typer.Exit


def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version.", callback=_print_version, is_eager=True
    ),
) -> None:
    """MixMo for fastai: the accuracy of an ensemble at the cost of one network."""


def build_app(commands: Container[str] = frozenset(_COMMANDS)) -> typer.Typer:
    """Build the program, with these commands; the others have their help but no parameters."""
    app = typer.Typer(
        name="mixmo",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback()(_options)
    for name, (target, first_line) in _COMMANDS.items():
        if name in commands:
            function = resolve_registered("command", name, f"mixmo_fastai.cli.{target}")
            app.command(name, help=_joined_lines(inspect.getdoc(function) or first_line))(function)
        else:
            app.command(name, help=first_line)(lambda: None)
    return app


def _joined_lines(text: str) -> str:
    """Join the lines of each paragraph, which rich would otherwise break where the source does."""
    return "\n\n".join(part.replace("\n", " ") for part in text.split("\n\n"))


def run(args: Sequence[str], program: str | None = None) -> int:
    """Run one command line.

    Args:
        args: the command and its arguments.
        program: file of the program that `mixmo study` starts for each run; None for `mixmo`.

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
        avoid_retries(args)
    with handling_signals() as stop:
        try:
            _check_processes(args)
            arguments = list(args) or ["--help"]
            command = typer.main.get_command(build_app(_commands_to_import(args)))
            settings = {"prog_name": "mixmo", "standalone_mode": False, "obj": program}
            code = command.main(args=arguments, **settings) or DONE
            # Typer converts KeyboardInterrupt to this code without a message.
            return _stopped(stop) if code == INTERRUPTED else int(code)
        except Exception as error:
            if debug and not isinstance(error, ClickException):
                traceback.print_exc()
            known = (RunInterruptedError, *_CODES, ClickException)
            # A signal may break an import in ways that end in any error.
            is_broken_off = stop.number is not None and not isinstance(error, known)
            is_stopped = isinstance(error, typer.Abort) or is_broken_off
            return _stopped(stop) if is_stopped else _report(error)
        except KeyboardInterrupt:
            return _stopped(stop)


def _commands_to_import(args: Sequence[str]) -> Container[str]:
    """Return the command to run, so that no others are imported; all of them for completion."""
    if "_MIXMO_COMPLETE" in os.environ:
        return frozenset(_COMMANDS)
    return [next((argument for argument in args if not argument.startswith("-")), "")]


def _check_processes(args: Sequence[str]) -> None:
    """Check that of all commands only `fit` is started in several processes."""
    if launcher_number("WORLD_SIZE") > 1 and (not args or args[0] != "fit"):
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
