"""`mixmo eval`: evaluate a trained run."""

from pathlib import Path
from typing import Annotated

import typer

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.decision_options import EvaluatedCoverage, EvaluatedRisk
from mixmo_fastai.cli.render import incompleteness_lines
from mixmo_fastai.cli.render_metrics import metric_lines
from mixmo_fastai.cli.render_votes import label_distribution_lines
from mixmo_fastai.cli.shift import shift_lines
from mixmo_fastai.config.methods import method_name
from mixmo_fastai.config.resolve import check_ood
from mixmo_fastai.errors import InputError
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.runs.output import free_file

CHANGED = {
    "train": "the training images differ from those of the run, so its validation split, and "
    "temperatures fitted on it, may include images it was trained on",
    "valid": "the validation images differ from those of the run, so metrics on them are not "
    "comparable with its own",
    "test": "the test images differ from those of the run, so these metrics are not comparable "
    "with its own",
}


# Long, since each flag is a parameter.
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder of `mixmo fit`.")],
    *,
    data_dir: opt.DataDir = None,
    ood: Annotated[
        list[str] | None,
        typer.Option(
            help="Out-of-distribution data to detect: a data set, or a folder of images; may be "
            "repeated.",
            metavar="DATASET|FOLDER",
            rich_help_panel=opt.DATA,
        ),
    ] = None,
    corruptions: Annotated[
        str | None,
        typer.Option(
            help="Corrupted test images: the folder of CIFAR-10-C or CIFAR-100-C, or built-in.",
            metavar="DIR|built-in",
            rich_help_panel=opt.DATA,
        ),
    ] = None,
    label_distribution: Annotated[
        Path | None,
        typer.Option(
            help="Votes of annotators on the test images: .npy, or .csv with a row per vote or "
            "image.",
            metavar="FILE",
            rich_help_panel=opt.DATA,
        ),
    ] = None,
    fused: Annotated[
        bool,
        typer.Option(
            "--fused",
            help="Evaluate the plain network that `mixmo export` writes.",
            rich_help_panel=opt.NETWORK,
        ),
    ] = False,
    save_logits: Annotated[
        Path | None,
        typer.Option(
            help="Also write names, labels and each member's logits of the images to this .npz "
            "file.",
            metavar="FILE",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = None,
    coverage: EvaluatedCoverage = 0.9,
    max_risk: EvaluatedRisk = 0.05,
    device: opt.Device = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Evaluate a trained run on its test set; calibrate on its validation split."""
    folder = open_run(run)
    recipe = folder.recipe()
    if label_distribution is not None and not label_distribution.is_file():
        raise InputError(f"There is no file {str(label_distribution)!r}.")
    check_ood(ood or (), recipe.data.dataset)
    opt.check_device(device)
    opt.check_fractions(coverage=coverage, max_risk=max_risk)
    if save_logits is not None:
        save_logits = free_file(save_logits, "", ".npz", "--save-logits")

    from mixmo_fastai.cli.reading import reading_shown
    from mixmo_fastai.data.run_data import changed_images
    from mixmo_fastai.evaluation.logit_files import write_logits
    from mixmo_fastai.evaluation.logits import LabelledLogits
    from mixmo_fastai.evaluation.runs import evaluate_finished, open_finished

    output = Output(as_json=as_json)
    with reading_shown(output):
        finished = open_finished(folder, data_dir, device, fused=fused)

    def record(labelled: LabelledLogits) -> None:
        if save_logits is not None and labelled is not None:
            write_logits(save_logits, finished, labelled)

    requested = ood[0] if ood and len(ood) == 1 else ood
    metrics = evaluate_finished(
        finished,
        data_dir,
        ood=requested,
        corruptions=corruptions,
        coverage=coverage,
        max_risk=max_risk,
        label_distribution=label_distribution,
        record=record,
    )
    changed = changed_images(folder, finished.source)
    remarks = [("Changed", text) for name, text in CHANGED.items() if name in changed]
    notes = incompleteness_lines([*finished.source.notes, *remarks])
    if as_json:
        for line in notes:
            output.print(line)
    title = f"{folder.path}: {method_name(recipe)}, {recipe.model.arch}, {recipe.data.dataset}"
    title += ", fused" * fused
    votes = label_distribution_lines(metrics)
    lines = [title, *notes, "", *votes, *shift_lines(metrics), *metric_lines(metrics, recipe)]
    if save_logits is not None:
        lines += ["", f"Logits: {save_logits}"]
    file = {} if save_logits is None else {"logits": str(save_logits)}
    output.print_result(lines, {"run": str(folder.path), **file, **metrics})
