"""Evaluation of finished runs, alone or together as a deep ensemble.

Shapes: N images, M members of a run, R runs, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.data.dataloaders import make_evaluation_loaders
from mixmo_fastai.data.image_names import image_names
from mixmo_fastai.data.image_sets import DataSource, ImageSet, groups_of, no_images
from mixmo_fastai.data.label_distributions import LabelDistributions, read_label_distributions
from mixmo_fastai.data.loaders import BatchLoader
from mixmo_fastai.data.loose_images import PixelLoader
from mixmo_fastai.data.run_data import data_parts, read_source, with_recorded_statistics
from mixmo_fastai.data.splits import split_calibration, training_parts
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.calibration import COVERAGE, MAX_RISK, calibrate_images
from mixmo_fastai.evaluation.corruptions import evaluate_corruptions
from mixmo_fastai.evaluation.label_distribution import evaluate_label_distribution
from mixmo_fastai.evaluation.logits import LabelledLogits, collect_logits, stack_runs
from mixmo_fastai.evaluation.multi_label import evaluate_multi_label
from mixmo_fastai.evaluation.ood import ood_entries, read_ood_images
from mixmo_fastai.evaluation.splits import evaluate_splits
from mixmo_fastai.models import MixMoModel, build_model
from mixmo_fastai.runs.calibration import Calibration, read_calibration
from mixmo_fastai.runs.folder import RunFolder, check_same_left_out, check_several
from mixmo_fastai.runs.labels import check_not_requested
from mixmo_fastai.runs.weights import load_weights
from mixmo_fastai.runtime.devices import choose_device, keep_freed_memory, move_to_device


def evaluate_run(
    run: RunFolder,
    data_dir: Path | None = None,
    *,
    device: str | None = None,
    ood: str | Sequence[str] | None = None,
    corruptions: str | None = None,
    label_distribution: Path | None = None,
    fused: bool = False,
) -> dict[str, Any]:
    """Evaluate a trained run again; each network of a deep ensemble counts as one member.

    Args:
        run: a finished run.
        data_dir: folder of the run's data, if not the one that training used.
        device: device to evaluate on; by default, that of the recipe.
        ood: an out-of-distribution data set, or folder of images, or a sequence of them.
        corruptions: the folder of CIFAR-10-C or CIFAR-100-C, or "built-in" to apply
            `data.corruptions` to the run's own test images.
        label_distribution: file of human labels of the test images; see
            `data.label_distributions.read_label_distributions`.
        fused: evaluate the plain network that each network fuses into, which has no members.

    Returns:
        The metrics of `evaluation.evaluate_splits`; with `ood`, an entry with its name, number of
        images and `metrics.ood.detection_metrics`, or a list of entries for a sequence; with
        `corruptions`, accuracy, nll and ece per type, as means over the severities and per
        severity, and their means over the types, cA, cNLL and cECE; with `label_distribution`, the
        metrics of `evaluate_label_distribution`.

    Raises:
        InputError: the run is not finished or damaged, or data is missing.
    """
    finished = open_finished(run, data_dir, device, fused=fused)
    return evaluate_finished(
        finished, data_dir, ood=ood, corruptions=corruptions, label_distribution=label_distribution
    )


def evaluate_finished(
    finished: "FinishedRun",
    data_dir: Path | None = None,
    *,
    ood: str | Sequence[str] | None = None,
    corruptions: str | None = None,
    coverage: float = COVERAGE,
    max_risk: float = MAX_RISK,
    label_distribution: Path | None = None,
    record: Callable[[LabelledLogits], None] = lambda labelled: None,
) -> dict[str, Any]:
    """Evaluate an opened run; see `evaluate_run`.

    Args:
        finished: the run.
        data_dir: as for `evaluate_run`.
        ood: as for `evaluate_run`.
        corruptions: as for `evaluate_run`.
        coverage: coverage of the prediction sets.
        max_risk: risk of the accepted predictions.
        label_distribution: as for `evaluate_run`.
        record: gets the logits and labels of `finished.final_images`.

    Raises:
        InputError: a weights file is damaged, or data is missing.
    """
    if finished.source.is_multi_label:
        requested = {
            "ood": bool(ood),
            "corruptions": corruptions is not None,
            "label-distribution": label_distribution is not None,
            "coverage": coverage != COVERAGE,
            "max-risk": max_risk != MAX_RISK,
        }
        check_not_requested(finished.run, requested)
        validation, test, separate = finished.logits(finished.loaders())
        record(test or validation)
        return finished.multi_label_metrics((validation, test, separate))
    votes = None if label_distribution is None else finished.read_votes(label_distribution)
    names = [ood] if isinstance(ood, str) else list(ood or ())
    shape = finished.source.train.image_shape
    images = read_ood_images(names, finished.recipe.data.dataset, shape, data_dir)
    validation, test, separate, *others = finished.logits(
        [*finished.loaders(), *map(finished.loader, images)]
    )
    record(final := test or validation)
    metrics = evaluate_splits(
        validation,
        test,
        finished.calibration(validation, separate),
        separate=separate,
        is_separate=finished.is_separate,
        coverage=coverage,
        max_risk=max_risk,
    )
    if names:
        entries = ood_entries(names, final[0], [logits for logits, _ in others])
        metrics["ood"] = entries[0] if isinstance(ood, str) else entries
    if corruptions is not None:
        metrics["corruptions"] = evaluate_corruptions(finished, corruptions)
    if votes is not None:
        metrics["label_distribution"] = evaluate_label_distribution(votes, *final, metrics)
    return metrics


def evaluate_ensemble(
    runs: Sequence[RunFolder], data_dir: Path | None = None, *, device: str | None = None
) -> dict[str, Any]:
    """Evaluate several runs as one deep ensemble, the mean of their logits.

    Each run counts as one member, regardless of its own members, so all runs have equal weight.

    Args:
        runs: two or more finished runs, trained on the same data set with the same validation
            split; if a run has none, there are no validation metrics.
        data_dir: folder of the data, if not the one that training used.
        device: device to evaluate on; by default, that of each recipe.

    Returns:
        The metrics of `evaluation.evaluate_splits`.

    Raises:
        InputError: there are fewer than two runs, one is not finished, or their data differs.
    """
    _check_comparable(runs)
    for run in runs:
        run.check_trained()
    source = read_source(runs[0].recipe(), data_dir, runs[0])
    opened = _separated_alike([open_finished(run, data_dir, device, source) for run in runs])
    per_run = [finished.logits(finished.loaders()) for finished in opened]
    validation, test, separate = (stack_runs(of_part) for of_part in zip(*per_run, strict=True))
    if source.is_multi_label:
        return opened[0].multi_label_metrics((validation, test, separate))
    calibration = opened[0].fit_calibration(validation, separate)
    return evaluate_splits(
        validation, test, calibration, separate=separate, is_separate=opened[0].is_separate
    )


@dataclass(frozen=True)
class FinishedRun:
    """A trained run with its data, ready for evaluation.

    Attributes:
        run: the run folder.
        recipe: recipe of the run.
        source: data of the run.
        device: device of the evaluation.
        network: built from the recipe, on the device; `model` and `logits` load weights into it.
        fused: evaluate the plain network that each network fuses into.
    """

    run: RunFolder
    recipe: Recipe
    source: DataSource
    device: torch.device
    network: MixMoModel
    fused: bool = False

    @property
    def model(self) -> MixMoModel:
        """Trained network, in evaluation mode; of a deep ensemble the first one."""
        load_weights(self.network, self.run.networks()[0].weights)
        return self.network.eval()

    def loaders(self) -> tuple[BatchLoader, ...]:
        """Build the loaders of the validation split, the test set and the calibration images.

        Each may be empty, the last one also if the validation images serve for calibration.
        """
        valid, separate = self._valid_parts()
        others = no_images(valid) if separate is None else separate
        return self._loaders_of(valid, self.source.test, others)

    @property
    def final_images(self) -> ImageSet:
        """Images of the final metrics: the test set, or the validation images if it is empty."""
        return self.source.test if len(self.source.test) else self._valid_parts()[0]

    @property
    def final_split(self) -> str:
        """Split of `final_images`: "test" or "valid"."""
        return "test" if len(self.source.test) else "valid"

    def read_votes(self, path: Path) -> LabelDistributions:
        """Read the label distributions of `final_images`."""
        names = image_names(self.source, self.final_images, self.final_split)
        return read_label_distributions(path, names, self.source.classes)

    @property
    def is_separate(self) -> bool:
        """Whether images were set aside for calibration, even if there are none."""
        return self._valid_parts()[1] is not None

    def _valid_parts(self) -> tuple[ImageSet, ImageSet | None]:
        """Return the validation images, and those for calibration if they are others."""
        data = self.recipe.data
        _, valid = training_parts(self.source, data.valid_split)
        return split_calibration(valid, data.calibration_split)

    def multi_label_metrics(self, logits: Sequence[LabelledLogits]) -> dict[str, Any]:
        """Compute the metrics of images with several labels, from the logits of `loaders`."""
        *parts, separate = logits
        settings = {"separate": separate, "is_separate": self.is_separate}
        return evaluate_multi_label(*parts, self.source.classes, **settings)

    def calibration(
        self, validation: LabelledLogits, separate: LabelledLogits
    ) -> Calibration | None:
        """Read the run's calibration, or fit one that is not stored; see `fit_calibration`."""
        return read_calibration(self.run) or self.fit_calibration(validation, separate)

    def fit_calibration(
        self, validation: LabelledLogits, separate: LabelledLogits, method: str = "temperature"
    ) -> Calibration | None:
        """Fit a calibration on the run's calibration images; None if it has none.

        Args:
            validation: member logits and labels of the validation images.
            separate: of the images set aside for calibration.
            method: a name in `scaling.METHODS`, or "none".
        """
        valid, others = self._valid_parts()
        if others is None:
            return calibrate_images(validation, valid, method)
        return calibrate_images(separate, others, method)

    def final_loader(self) -> BatchLoader:
        """Build the loader of `final_images`."""
        return self._loaders_of(self.final_images)[0]

    def _loaders_of(self, *image_sets: ImageSet) -> tuple[BatchLoader, ...]:
        data = self.recipe.data
        return make_evaluation_loaders(
            self.source,
            *image_sets,
            device=self.device,
            loader=data.loader,
            num_workers=data.num_workers,
        )

    def loader(self, pixels: Tensor) -> PixelLoader:
        """Build a loader of other images (n, C, H, W) uint8 of the run's shape."""
        return PixelLoader(pixels, self.source.mean, self.source.std, self.device)

    def logits(self, loaders: Sequence[Any]) -> tuple[Any, ...]:
        """Compute the run's logits of every image of each loader; see `collect_logits`."""
        return collect_logits(self.run, self.network, loaders, fused=self.fused)


def open_finished(
    run: RunFolder,
    data_dir: Path | None = None,
    device: str | None = None,
    source: DataSource | None = None,
    *,
    fused: bool = False,
) -> FinishedRun:
    """Open a run for evaluation.

    Args:
        run: a finished run.
        data_dir: folder of the run's data, if not the one that training used.
        device: device to evaluate on; by default, that of the recipe.
        source: data of the run, if it was read before, also for another run; the size of images,
            mean and standard deviation are always this run's.
        fused: see `FinishedRun`.

    Raises:
        InputError: the run is not finished, or its data is missing.
    """
    recipe = run.recipe()
    run.check_trained()
    keep_freed_memory()  # halves the time of the metrics of a large test set
    chosen = choose_device(device or recipe.train.device)
    facts = run.data_facts()
    if source is None or (facts is not None and facts.image_shape != source.train.image_shape):
        source = read_source(recipe, data_dir, run)
    else:
        source = with_recorded_statistics(source, run)
    channels, height, width = source.train.image_shape
    network = build_model(recipe.model, len(source.classes), channels, image_size=(height, width))
    move_to_device(network, chosen)
    return FinishedRun(run, recipe, source, chosen, network, fused)


def _check_comparable(runs: Sequence[RunFolder]) -> None:
    check_several(runs, "An ensemble")
    first, *others = [run.recipe().data for run in runs]
    for run, data in zip(runs[1:], others, strict=True):
        for setting in ("dataset", "valid_split", "image_size"):
            value, expected = getattr(data, setting), getattr(first, setting)
            without_split = setting == "valid_split" and 0 in (value, expected)
            is_open = None in (value, expected)  # not started, or with a validation folder
            if value != expected and not (without_split or is_open):
                raise InputError(
                    f"{run.path} has data.{setting}={value!r}; {runs[0].path} has {expected!r}.\n"
                    "Runs of one ensemble must share the data and the validation split."
                )
        _check_same_parts(runs[0], run)
        check_same_left_out(runs[0], run)


def _separated_alike(opened: Sequence[FinishedRun]) -> list[FinishedRun]:
    """Give runs of one ensemble the same calibration images: such that selected no epoch.

    A smaller fraction is a part of a larger one, unless whole groups are drawn: then runs with
    several fractions have no images in common, and nothing is calibrated.
    """
    data = [finished.recipe.data for finished in opened]
    choosing = [f.recipe.data.calibration_split for f in opened if f.recipe.train.select == "best"]
    fractions = {each.calibration_split for each in data} - {None}
    smallest = min([*fractions, *(each or 0.0 for each in choosing)], default=None)
    if len(fractions) > 1 and groups_of(opened[0].source.train) is not None:
        smallest = 0.0
    recipes = [
        replace(each.recipe, data=replace(each.recipe.data, calibration_split=smallest))
        for each in opened
    ]
    return [replace(each, recipe=recipe) for each, recipe in zip(opened, recipes, strict=True)]


def _check_same_parts(first: RunFolder, other: RunFolder) -> None:
    """Check that two runs on one image folder use the same images for each split."""
    if data_parts(first) != data_parts(other):
        raise InputError(
            f"{other.path} and {first.path} split {first.recipe().data.dataset} differently.\n"
            "Runs of one ensemble must share training, validation and test images; see split.json "
            "in each run."
        )
