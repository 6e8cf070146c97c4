"""Comparison of runs on the same test images.

Shapes: N test images, M members, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixmo_fastai.config.choices import DATASETS
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.data.image_sets import ImageSet
from mixmo_fastai.data.run_data import data_parts, read_source
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.runs import open_finished
from mixmo_fastai.metrics.bootstrap import Interval, intervals, paired_intervals
from mixmo_fastai.metrics.summary import evaluate_logits
from mixmo_fastai.runs.folder import RunFolder, check_same_left_out, check_several
from mixmo_fastai.runs.labels import check_one_label


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison.

    Attributes:
        run: the run folder.
        recipe: recipe of the run.
        metrics: metrics of `evaluation.evaluate_logits` on the test set, or on the validation
            images if there are no labelled test images.
        split: split of `metrics`: "test" or "valid".
        intervals: 95 % bootstrap intervals of accuracy, nll and ece.
        differences: 95 % paired-bootstrap intervals of the differences in accuracy, nll and ece
            from the first run; None for the first run itself.
        parameters: number of parameters of all networks.
        images_seen: number of images seen by all networks in training; None if not recorded.
        seconds: duration of training; None if not recorded.
    """

    run: RunFolder
    recipe: Recipe
    metrics: dict[str, Any]
    split: str
    intervals: dict[str, Interval]
    differences: dict[str, Interval] | None
    parameters: int
    images_seen: int | None
    seconds: float | None


def compare_runs(
    runs: Sequence[RunFolder], data_dir: Path | None = None, *, device: str | None = None
) -> list[ComparedRun]:
    """Evaluate runs on the same test set and compare each with the first.

    Args:
        runs: two or more finished runs with the same test images: their names, sizes and labels
            must be equal, in folders or tables that may differ otherwise.
        data_dir: folder of the data, if not the one that training used.
        device: device to evaluate on; by default, that of each recipe.

    Raises:
        InputError: there are fewer than two runs, one is not finished, or their data differs.
    """
    _check_same_test_set(runs)
    for run in runs:
        run.check_trained()
        check_one_label(run, "mixmo compare")
    origin = _origin(runs[0])
    source = read_source(runs[0].recipe(), data_dir, runs[0])
    compared: list[ComparedRun] = []
    first_logits: Tensor | None = None
    first_images: tuple[ImageSet, Sequence[str]] | None = None
    for run in runs:
        of_first = source if _origin(run) == origin else None
        finished = open_finished(run, data_dir, device, of_first)
        images = finished.final_images, finished.source.classes
        first_images = first_images or images
        if not _are_equal(images, first_images):
            raise _other_images(run, runs[0])
        ((logits, labels),) = finished.logits([finished.final_loader()])
        mean = logits.double().mean(dim=1)  # (N, K)
        differences = None if first_logits is None else paired_intervals(first_logits, mean, labels)
        first_logits = mean if first_logits is None else first_logits
        recorded = run.metrics() if run.is_finished else {}
        num_parameters = sum(parameter.numel() for parameter in finished.network.parameters())
        compared.append(
            ComparedRun(
                run=run,
                recipe=finished.recipe,
                metrics=evaluate_logits(logits, labels),
                split=finished.final_split,
                intervals=intervals(mean, labels),
                differences=differences,
                parameters=num_parameters * finished.recipe.model.num_nets,
                images_seen=recorded.get("images_seen"),
                seconds=recorded.get("seconds"),
            )
        )
        del finished  # frees memory before the next network and its loaders are built
        torch.cuda.empty_cache()
    return compared


def _check_same_test_set(runs: Sequence[RunFolder]) -> None:
    check_several(runs, "A comparison")
    first = runs[0].recipe().data
    for run in runs[1:]:
        data = run.recipe().data
        # Another folder may hold the same test images, which are compared after reading.
        is_named = not {data.dataset, first.dataset}.isdisjoint(DATASETS)
        for setting in ("dataset", "image_size") if is_named else ("image_size",):
            value, expected = getattr(data, setting), getattr(first, setting)
            if value != expected:
                raise InputError(
                    f"{run.path} has data.{setting}={value!r}; {runs[0].path} has {expected!r}.\n"
                    "Only runs with the same test images can be compared."
                )
        if data.dataset == first.dataset and _final_images(run) != _final_images(runs[0]):
            raise _other_images(run, runs[0])
        check_same_left_out(runs[0], run)


def _origin(run: RunFolder) -> tuple[str, object]:
    """Return what decides the images of a run: its data set, and the split of a folder or table."""
    return run.recipe().data.dataset, data_parts(run)


def _are_equal(
    first: tuple[ImageSet, Sequence[str]], other: tuple[ImageSet, Sequence[str]]
) -> bool:
    """Check whether images and their classes are equal: names, labels, and sizes of the files."""
    (images, classes), (other_images, other_classes) = first, other
    return (
        len(images) == len(other_images)
        and [*classes] == [*other_classes]
        and torch.equal(images.labels, other_images.labels)
        and all(images.name(i) == other_images.name(i) for i in range(len(images)))
        and [*images.sizes()] == [*other_images.sizes()]
    )


def _other_images(run: RunFolder, first: RunFolder) -> InputError:
    return InputError(
        f"{run.path} and {first.path} have different test images, or validation images if there "
        "are none: other names, labels, classes or sizes of files; see split.json and "
        "data.calibration_split in both.\nOnly runs with the same test images can be compared."
    )


def _final_images(run: RunFolder) -> tuple[object, ...]:
    """Return the settings that determine which images of a folder the final metrics use."""
    parts = data_parts(run)
    if parts is None:
        return ()
    drawn = None if parts.drawn is None else parts.drawn.test
    if parts.test or drawn:
        return parts.test, drawn
    data = run.recipe().data
    drawn_from = parts.valid or data.valid_split
    return drawn_from, data.calibration_split or None  # the images that calibrate are left out
