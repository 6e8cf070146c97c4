"""Runs side by side, on the same test images.

Shapes: N test images, M members, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixmo_fastai.assessment import open_finished
from mixmo_fastai.bootstrap import Interval, intervals, paired_intervals
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation import evaluate_logits
from mixmo_fastai.recipe import Recipe
from mixmo_fastai.runs import RunFolder, check_same_left_out, check_several
from mixmo_fastai.training import data_parts, read_source


@dataclass(frozen=True)
class Compared:
    """One run of a comparison.

    Attributes:
        run: the folder.
        recipe: what was trained.
        figures: of the test set, or of the validation images if no test images are labelled, as
            `evaluation.evaluate_logits` gives them.
        part: which of both, "test" or "valid".
        intervals: 95 % intervals of accuracy, nll and ece, by bootstrap.
        differences: 95 % intervals of the differences in accuracy, nll and ece from the first run,
            by paired bootstrap; None for the first run itself.
        parameters: of all its networks.
        images_seen: by all its networks in training; None where the run does not say.
        seconds: of training; None where the run does not say.
    """

    run: RunFolder
    recipe: Recipe
    figures: dict[str, Any]
    part: str
    intervals: dict[str, Interval]
    differences: dict[str, Interval] | None
    parameters: int
    images_seen: int | None
    seconds: float | None


def compare_runs(
    runs: Sequence[RunFolder], data_dir: Path | None = None, *, device: str | None = None
) -> list[Compared]:
    """Evaluate runs on one test set, each against the first.

    Args:
        runs: two or more finished runs of one data set.
        data_dir: where the data lies, if not where it was looked for in training.
        device: where to evaluate; each recipe's where not given.

    Raises:
        InputError: fewer than two runs, one that is not finished, or runs of different data.
    """
    _check_same_test_set(runs)
    for run in runs:
        run.check_trained()
    source = read_source(runs[0].recipe(), data_dir, runs[0])
    compared: list[Compared] = []
    base: Tensor | None = None
    for run in runs:
        finished = open_finished(run, data_dir, device, source)
        ((logits, labels),) = finished.logits([finished.final_loader()])
        mean = logits.double().mean(dim=1)  # (N, K)
        differences = None if base is None else paired_intervals(base, mean, labels)
        base = mean if base is None else base
        told = run.metrics() if run.is_finished else {}
        each = sum(parameter.numel() for parameter in finished.model.parameters())
        compared.append(
            Compared(
                run=run,
                recipe=finished.recipe,
                figures=evaluate_logits(logits, labels),
                part=finished.final_part,
                intervals=intervals(mean, labels),
                differences=differences,
                parameters=each * finished.recipe.model.num_nets,
                images_seen=told.get("images_seen"),
                seconds=told.get("seconds"),
            )
        )
        del finished  # before the next network and its loaders are there
        torch.cuda.empty_cache()
    return compared


def _check_same_test_set(runs: Sequence[RunFolder]) -> None:
    check_several(runs, "A comparison")
    first = runs[0].recipe().data
    for run in runs[1:]:
        data = run.recipe().data
        for setting in ("dataset", "image_size"):
            own, expected = getattr(data, setting), getattr(first, setting)
            if own != expected:
                raise InputError(
                    f"{run.path} has data.{setting}={own!r}, and {runs[0].path} has {expected!r}.\n"
                    "Only runs with the same test images can be compared."
                )
        if _final_images(run) != _final_images(runs[0]):
            raise InputError(
                f"{run.path} was tested on other images of {first.dataset} than {runs[0].path}; "
                "see split.json in both.\nOnly runs with the same test images can be compared."
            )
        check_same_left_out(runs[0], run)


def _final_images(run: RunFolder) -> tuple[object, ...]:
    """Return what decides which images of a folder a run is finally evaluated on."""
    parts = data_parts(run)
    if parts is None:
        return ()
    drawn = None if parts.drawn is None else parts.drawn.test
    if parts.test or drawn:
        return parts.test, drawn
    return (parts.valid,) if parts.valid else (run.recipe().data.valid_split,)
