"""`mixmo lr-find`: learning-rate range test."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.plan import threads_lines, timing_announced
from mixmo_fastai.cli.render import columns, setup_lines
from mixmo_fastai.config.defaults import MIN_LR_FIND_STEPS
from mixmo_fastai.config.methods import method_name, run_label
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.runs.output import free_file

MAX_STEPS = 10_000


# Long, since each flag is a parameter.
def lr_find(
    dataset: opt.Dataset = None,
    *,
    recipe: opt.RecipeName = None,
    arch: opt.Arch = None,
    mix: opt.Mix = None,
    msda: opt.Msda = None,
    members: opt.Members = None,
    assignments: opt.Assignments = None,
    data_dir: opt.DataDir = None,
    valid_split: opt.ValidSplit = None,
    test_split: opt.TestSplit = None,
    skip_damaged: opt.SkipDamaged = None,
    limit: opt.Limit = None,
    batch_size: opt.BatchSize = None,
    repeat: opt.Repeat = None,
    seed: opt.Seed = None,
    device: opt.Device = None,
    precision: opt.Precision = None,
    memory_format: opt.MemoryFormat = None,
    compiled: opt.Compile = None,
    threads: opt.Threads = None,
    steps: Annotated[
        int,
        typer.Option(
            help="Steps of the test.",
            min=MIN_LR_FIND_STEPS,
            max=MAX_STEPS,
            rich_help_panel=opt.TRAINING,
        ),
    ] = 100,
    start: Annotated[
        float,
        typer.Option(help="First learning rate.", min=1e-12, rich_help_panel=opt.TRAINING),
    ] = 1e-6,
    end: Annotated[
        float,
        typer.Option(help="Last learning rate.", max=1e6, rich_help_panel=opt.TRAINING),
    ] = 10.0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="PNG of the curve. Default: the first free lr-find-<data set>-<method>.png.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Increase the learning rate step by step, and recommend one from the loss curve."""
    fit_flags = {
        "arch": arch, "mix": mix, "msda": msda, "members": members, "valid_split": valid_split,
        "test_split": test_split, "skip_damaged": skip_damaged, "limit": limit,
        "batch_size": batch_size, "repeat": repeat, "seed": seed, "device": device,
        "precision": precision, "memory_format": memory_format, "compiled": compiled,
        "threads": threads,
    }  # fmt: skip
    settings = opt.flags(**fit_flags)
    if not start < end:
        raise typer.BadParameter(f"--start {start:g} must be below --end {end:g}.")
    resolved = resolve_recipe(dataset, recipe, settings, assignments or ())
    plot_path = free_file(out, f"lr-find-{run_label(resolved)}", ".png")

    output = Output(as_json=as_json, quiet=quiet)
    search = _search(resolved, data_dir, output, plot_path, num_steps=steps, start=start, end=end)
    rate = resolved.lr if search.recommended is None else search.recommended
    other_assignments = [
        text for text in assignments or () if text.partition("=")[0].strip() != "optimizer.lr"
    ]
    flags = {"recipe": recipe, **fit_flags, "data_dir": data_dir, "lr": rate}
    command = opt.fit_command(dataset, flags, other_assignments)
    advice = _advice(search, resolved.lr, steps)
    output.print_result(
        ["", *_table(search), "", f"Plot: {plot_path}", *advice, f"  {command}"],
        {
            "advised_lr": rate,
            "flat": search.is_flat,
            "fall": search.start - search.lowest,
            "noise": search.noise,
            "command": command,
            "suggestions": search.suggestions,
            "recipe_lr": resolved.lr,
            "curve": str(plot_path),
            "lrs": search.lrs,
            "losses": search.losses,
        },
    )


def _search(
    recipe: Recipe, data_dir: Path | None, output: Output, plot_path: Path, **search_range: Any
) -> Any:
    """Prepare the training, run the test and plot the curve; return the `LrSearch`."""
    from mixmo_fastai.cli.reading import reading_shown
    from mixmo_fastai.plots.png import plot_lr_search
    from mixmo_fastai.training.lr_find import search_lr
    from mixmo_fastai.training.prepare import prepare
    from mixmo_fastai.training.threads import choose_threads

    with reading_shown(output):
        prepared = prepare(recipe, data_dir)
    steps, start, end = (search_range[name] for name in ("num_steps", "start", "end"))
    fraction = steps * prepared.recipe.train.batch_size / prepared.images_seen
    training, threads = choose_threads(prepared, fraction, timing_announced(output))
    for line in [*setup_lines(training), *threads_lines(threads)]:
        output.print(line)
    output.print(f"Testing learning rates from {start:g} to {end:g} in {steps} steps …")
    search = search_lr(training, **search_range)
    title = f"{method_name(recipe)} on {training.source.name}, {training.recipe.model.arch}"
    plot_lr_search(search, plot_path, title)
    return search


def _table(search: Any) -> list[str]:
    rows = [(name, f"{lr:.3g}", MEANINGS[name]) for name, lr in search.suggestions.items()]
    return columns([("method", "rate", "meaning"), *rows], left=(0, 2))


def _advice(search: Any, recipe_lr: float, steps: int) -> list[str]:
    """Return the recommended rate, or why there is none and what to do."""
    if search.recommended is not None:
        return [f"Recommended learning rate: {search.recommended:.2g} (recipe: {recipe_lr:.2g})"]
    reason = "No learning rate stands out in so few steps."
    if search.is_flat:
        reason = (
            "The curve is too flat to recommend a learning rate: the smoothed loss falls from "
            f"{search.start:.2f} to {search.lowest:.2f}; single steps vary by {search.noise:.2f}."
        )
    remedy = f"Keep the recipe's learning rate, {recipe_lr:g}"
    if steps < MAX_STEPS:
        remedy += f", or take more steps, e.g. --steps {min(3 * steps, MAX_STEPS)}"
    return [reason, f"{remedy}."]


MEANINGS = {
    "valley": "two thirds of the way down the longest descent; cautious",
    "slide": "end of the steepest stretch before the loss rises",
    "steep": "steepest single step; often only noise",
    "minimum": "a tenth of the rate with the lowest loss",
}
