"""`mixmo fit`: train."""

from pathlib import Path
from typing import Annotated

import typer

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output, RunInterruptedError
from mixmo_fastai.cli.render import figure_lines, plan_lines, recipe_lines
from mixmo_fastai.errors import InputError
from mixmo_fastai.resolve import resolve_recipe
from mixmo_fastai.runs import check_free, create_run, open_run


def fit(
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
    limit: opt.Limit = None,
    epochs: opt.Epochs = None,
    batch_size: opt.BatchSize = None,
    repeat: opt.Repeat = None,
    lr: opt.Lr = None,
    seed: opt.Seed = None,
    device: opt.Device = None,
    precision: opt.Precision = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The run folder. Default: runs/<data set>-<method>-<n>.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Continue a run that was interrupted.", metavar="RUN", rich_help_panel=opt.OUTPUT
        ),
    ] = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Train a network, evaluate it once on the test set, and leave a run folder.

    Without arguments: Cut-MixMo on the embedded digits, in about a minute.
    """
    settings = opt.flags(
        arch=arch, mix=mix, msda=msda, members=members, valid_split=valid_split, limit=limit,
        epochs=epochs, batch_size=batch_size, repeat=repeat, lr=lr, seed=seed, device=device,
        precision=precision,
    )  # fmt: skip
    if resume is not None:
        given = [dataset, recipe, assignments, out, *settings.values()]
        if any(value is not None for value in given):
            raise InputError(
                "--resume takes every setting from the run's own recipe; leave the others out.\n"
                "Only --data-dir, --json, --quiet and --debug go with it."
            )
        run = open_run(resume)
        resolved = run.recipe()
    else:
        resolved = resolve_recipe(dataset, recipe, settings, assignments or ())
        check_free(out)

    from mixmo_fastai.checkpoints import epochs_done
    from mixmo_fastai.cli.progress import TrainingDisplay
    from mixmo_fastai.training import prepare, train

    output = Output(as_json=as_json, quiet=quiet)
    training = prepare(resolved, data_dir)
    if resume is None:
        run = create_run(training.recipe, out, device=training.device_name)
    output.run = run
    for line in [*plan_lines(training), "", *recipe_lines(training.recipe), ""]:
        output.say(line)
    if resume is not None:
        output.say(f"Resuming: {epochs_done(run)} of {resolved.train.epochs} epochs are done.")
    output.say(f"Run folder: {run.path}")
    display = TrainingDisplay(output, resolved.train.batch_size)
    try:
        figures = train(training, run, cbs=[display], resume=resume is not None)
    except KeyboardInterrupt:
        message = _interrupted(run.path)
        run.log(message)
        raise RunInterruptedError(message) from None
    except Exception as error:
        run.log(f"{type(error).__name__}: {error}")
        raise
    finally:
        display.close()
    output.result(
        ["", *figure_lines(figures, resolved), f"{'Run folder':<15}  {run.path}"],
        {"run": str(run.path), **figures},
    )


def _interrupted(path: Path) -> str:
    return f"Interrupted. Finished epochs are saved; continue: mixmo fit --resume {path}"
