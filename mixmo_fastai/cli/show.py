"""`mixmo show`: plot the first training batch."""

from pathlib import Path
from typing import Annotated

import typer

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.config.methods import method_name, run_label
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.runs.output import free_file


def show(
    dataset: opt.Dataset = None,
    *,
    recipe: opt.RecipeName = None,
    mix: opt.Mix = None,
    msda: opt.Msda = None,
    members: opt.Members = None,
    assignments: opt.Assignments = None,
    data_dir: opt.DataDir = None,
    skip_damaged: opt.SkipDamaged = None,
    limit: opt.Limit = None,
    repeat: opt.Repeat = None,
    seed: opt.Seed = None,
    count: Annotated[int, typer.Option(help="Number of samples to show.", min=1, max=16)] = 6,
    out: Annotated[
        Path | None,
        typer.Option(
            help="PNG of the plot. Default: the first free show-<data set>-<method>.png.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Plot image pairs, masks and mixtures of the first training batch."""
    settings = opt.flags(
        mix=mix, msda=msda, members=members, skip_damaged=skip_damaged, limit=limit, repeat=repeat,
        seed=seed, device="cpu",
    )  # fmt: skip
    resolved = resolve_recipe(dataset, recipe, settings, assignments or ())
    plot_path = free_file(out, f"show-{run_label(resolved)}", ".png")

    from mixmo_fastai.learner.preview import preview_batch
    from mixmo_fastai.plots.png import plot_preview
    from mixmo_fastai.runtime.devices import choose_device
    from mixmo_fastai.training.prepare import prepare

    # Runs on the CPU, with the network and image size that training would use on this machine.
    training = prepare(resolved, data_dir, sized_for=choose_device("auto").type)
    title = f"{method_name(resolved)}: {resolved.mix.kind} masks on {training.source.name}"
    plot_preview(preview_batch(training.learn, count), plot_path, title)
    lines = [f"Plot: {plot_path}"]
    if early := resolved.mix.early_repetition:
        lines.append(
            "Members are shown with different images; training begins with equal ones "
            f"(mix.early_repetition={early:g})."
        )
    Output(as_json=as_json).print_result(lines, {"picture": str(plot_path)})
