"""`mixmo study`: train and compare methods over seeds and training lengths."""

import dataclasses
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.errors import InputError, RunFailedError
from mixmo_fastai.runs.files import write_atomically
from mixmo_fastai.runs.lock import starting
from mixmo_fastai.runs.output import check_writable, expand_user
from mixmo_fastai.runtime.text import counted
from mixmo_fastai.study.execute import Executor
from mixmo_fastai.study.plan import Study, read_study
from mixmo_fastai.study.records import check_unchanged, other_runs, writing_study


# Long, since each flag is a parameter.
def study(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A TOML file; docs/study.md describes it.")],
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the runs and results. Default: studies/<name>.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Data set, image folder or table of labels instead of the file's."),
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, max=1024, help="Number of runs to train at the same time.")
    ] = 1,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="Train only this method; may be repeated. Results show all finished runs.",
        ),
    ] = None,
    seeds: Annotated[
        list[int] | None,
        typer.Option("--seed", help="Train only this seed; may be repeated."),
    ] = None,
    images_seen: Annotated[
        list[int] | None,
        typer.Option("--images-seen", help="Train only this length; may be repeated."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Method from which differences are taken. Default: the first."),
    ] = None,
    summary: Annotated[
        bool, typer.Option("--summary", help="Train nothing; only write the results so far.")
    ] = False,
    data_dir: opt.DataDir = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Train methods with several seeds and training lengths, and compare them.

    Finished runs are skipped and interrupted ones resumed, so the same command continues a study.
    Several processes, also on several machines, may share a folder.
    """
    chosen = methods or [], seeds or [], images_seen or []
    if summary and any(chosen):
        raise InputError(
            "--method, --seed and --images-seen choose what is trained; --summary trains nothing."
        )
    planned = read_study(expand_user(file), dataset, must_exist=not summary)
    runs = planned.choose(*chosen)
    reference = planned.check_method(reference)
    folder = expand_user(out or Path("studies") / planned.name)
    check_writable(folder)
    if summary and not _has_results(planned, folder):
        raise _no_results(folder)
    output = Output(as_json=as_json, quiet=quiet)
    _print_other_runs(other_runs(planned.runs, folder), output)
    if not summary:
        check_unchanged(planned.runs, folder)  # also those that are not chosen
        with writing_study(folder):
            folder.mkdir(parents=True, exist_ok=True)
        output.print(f"{planned.name}: {counted(len(runs), 'run')} in {folder}")
        try:
            Executor(folder, jobs, data_dir, output.print, context.obj).train(runs)
        except RunFailedError as failed:
            for line in _write_results_after(failed, planned, folder, data_dir, reference):
                output.print(line)
            raise
        if not _has_results(planned, folder):
            output.print_result(
                ["No run is finished yet: other processes train them."],
                _result(planned, reference, len(planned.runs), []),
            )
            return
    lines, value = _write_results(planned, folder, data_dir, reference)
    output.print_result(lines, value)


def _print_other_runs(names: list[str], output: Output) -> None:
    """Name the finished runs in the folder that the study does not plan."""
    if names:
        from mixmo_fastai.study.tables import others_text

        output.print(others_text(names))


def _has_results(planned: Study, folder: Path) -> bool:
    return any(run.folder(folder).is_finished for run in planned.runs)


def _result(
    planned: Study, reference: str, unfinished: int, cells: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the result as JSON has it."""
    return {
        "name": planned.name,
        "reference": reference,
        "unfinished": unfinished,
        "cells": cells,
    }


def _no_results(folder: Path) -> InputError:
    problem = f"No run in {folder} is finished yet."
    if not folder.is_dir():
        problem = f"There is no folder {str(folder)!r}, so no run of the study is finished yet."
    return InputError(f"{problem}\nTrain them without --summary.")


def _write_results_after(
    failed: RunFailedError, planned: Study, folder: Path, data_dir: Path | None, reference: str
) -> list[str]:
    """Write the results without the runs that failed, if there are any; return what is printed.

    Raises:
        RunFailedError: they cannot be computed; the message also says why runs failed.
    """
    if not _has_results(planned, folder):
        return []
    try:
        return _write_results(planned, folder, data_dir, reference)[0]
    except InputError as error:
        raise RunFailedError(f"{failed}\nNo results: {error}") from error


def _write_results(
    planned: Study, folder: Path, data_dir: Path | None, reference: str
) -> tuple[list[str], dict[str, Any]]:
    """Write the files of the results; return what is printed.

    Processes that share the folder do so one after another, so that the last one has all runs.
    """
    with starting(folder / "results"):
        return _write_results_alone(planned, folder, data_dir, reference)


def _write_results_alone(
    planned: Study, folder: Path, data_dir: Path | None, reference: str
) -> tuple[list[str], dict[str, Any]]:
    from mixmo_fastai.plots.study import AXES, plot_calibration, plot_study
    from mixmo_fastai.report.study import render
    from mixmo_fastai.study.results import collect_results
    from mixmo_fastai.study.tables import by_length, markdown

    cells = collect_results(planned, folder, data_dir, reference=reference)
    finished = {(cell.method, cell.images_seen, seed) for cell in cells for seed in cell.seeds}
    missing = [
        run.name for run in planned.runs if (run.method, run.images_seen, run.seed) not in finished
    ]
    text = markdown(planned.name, cells, reference, missing)
    value = _result(planned, reference, len(missing), [dataclasses.asdict(cell) for cell in cells])
    longest = [*by_length(cells).values()][-1]
    methods = planned.methods
    plots = {"calibration.png": _png(partial(plot_calibration, longest, methods=methods))}
    for axis in AXES:
        shown = longest if axis == "parameters" else cells
        plot = partial(plot_study, shown, axis=axis, methods=methods)
        plots[f"{axis.replace('_', '-')}.png"] = _png(plot)
    files: dict[str, str | bytes] = {
        "study.md": text,
        "study.json": json.dumps(value, indent=2) + "\n",
        **plots,
        "study.html": render(planned, cells, reference, plots, missing),
    }
    for name, content in files.items():
        with writing_study(folder / name):
            write_atomically(folder / name, content, is_shared=True)
    return [text.rstrip(), "", f"Results: {folder / 'study.html'}"], value


def _png(plot: Callable[[BinaryIO], None]) -> bytes:
    """Return the PNG that a function writes to a file."""
    buffer = io.BytesIO()
    plot(buffer)
    return buffer.getvalue()
