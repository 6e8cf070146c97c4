"""Finished runs, evaluated alone or together as a deep ensemble.

Shapes: N images, M members of a run, R runs, K classes.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from mixmo_fastai.calibration import expected_calibration_error, nll, top_predictions
from mixmo_fastai.checkpoints.store import CheckpointStore
from mixmo_fastai.checkpoints.weights import load_weights
from mixmo_fastai.data.corruptions import make_corrupted, read_official
from mixmo_fastai.data.damage import damaged_images, find_damaged
from mixmo_fastai.data.dataloaders import make_evaluation_loaders
from mixmo_fastai.data.fingerprint import fingerprint
from mixmo_fastai.data.image_sets import DataSource, ImageSet
from mixmo_fastai.data.layout import unseen_part
from mixmo_fastai.data.loaders import BatchLoader
from mixmo_fastai.data.loose_images import PixelLoader, as_shape, decode_readable, find_images
from mixmo_fastai.data.sources import load_source
from mixmo_fastai.data.splits import training_parts
from mixmo_fastai.detection import detection_metrics
from mixmo_fastai.devices import choose_device, keep_freed_memory, move_to_device
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation import LabelledLogits, collect_member_logits, evaluate_parts
from mixmo_fastai.models import MixMoModel, create_model
from mixmo_fastai.names import DATASETS
from mixmo_fastai.recipe import Recipe
from mixmo_fastai.resolve import check_dataset
from mixmo_fastai.runs import RunFolder, check_same_left_out, check_several
from mixmo_fastai.training import data_parts, read_source

BUILT_IN_NAME = "built-in"
OFFICIAL_SHAPE = (3, 32, 32)


def evaluate_run(
    run: RunFolder,
    data_dir: Path | None = None,
    *,
    device: str | None = None,
    ood: str | None = None,
    corruptions: str | None = None,
    fused: bool = False,
) -> dict[str, Any]:
    """Evaluate a trained run anew; a deep ensemble as one, each network a member.

    Args:
        run: a finished run.
        data_dir: where its data lies, if not where it was looked for in training.
        device: where to evaluate; the recipe's where not given.
        ood: a data set, or a folder of images, that the run knows nothing of.
        corruptions: the folder of CIFAR-10-C or CIFAR-100-C, or "built-in" for what
            `data.corruptions` makes of the run's own test images.
        fused: whether each network is evaluated as the plain one that it fuses into, which has no
            members.

    Returns:
        the figures, as `evaluation.evaluate_parts` gives them; with `ood` what
        `detection.detection_metrics` says of it; with `corruptions` accuracy, nll and ece per type,
        as means over the severities and per severity, and the means cA, cNLL and cECE over the
        types.

    Raises:
        InputError: the run is not finished or damaged, or data is not there.
    """
    finished = open_finished(run, data_dir, device, fused=fused)
    return evaluate_finished(finished, data_dir, ood=ood, corruptions=corruptions)


def evaluate_finished(
    finished: "FinishedRun",
    data_dir: Path | None = None,
    *,
    ood: str | None = None,
    corruptions: str | None = None,
) -> dict[str, Any]:
    """Evaluate a run that is open; see `evaluate_run`.

    Raises:
        InputError: a file of weights is damaged, or data is not there.
    """
    strange = [] if ood is None else [finished.loader(read_strange(ood, finished, data_dir))]
    validation, test, *others = finished.logits([*finished.loaders(), *strange])
    figures = evaluate_parts(validation, test)
    for logits, _ in others:
        detected = detection_metrics((test or validation)[0], logits)
        figures["ood"] = {"dataset": ood, "num_images": len(logits), **detected}
    if corruptions is not None:
        figures["corruptions"] = evaluate_corruptions(finished, corruptions)
    return figures


def evaluate_corruptions(finished: "FinishedRun", place: str) -> dict[str, Any]:
    """Evaluate a run on corrupted test images; see `evaluate_run`.

    Raises:
        InputError: the files are missing, damaged, or not of the run's images and classes.
    """
    test, shape = finished.final_images, finished.source.train.image_shape
    if place != BUILT_IN_NAME and shape != OFFICIAL_SHAPE:
        raise InputError(
            f"--corruptions DIR is for images of 3x32x32, and this run has {shape}.\n"
            f"Take --corruptions {BUILT_IN_NAME}."
        )
    parts = (
        make_corrupted(test.tensor(), test.labels, finished.device)
        if place == BUILT_IN_NAME
        else read_official(Path(place).expanduser())
    )
    by_kind: dict[str, dict[str, list[float]]] = {}
    for part in parts:
        if int(part.labels.max()) >= len(finished.source.classes):
            raise InputError(
                f"{place} has labels up to {int(part.labels.max())}; this run knows "
                f"{len(finished.source.classes)} classes."
            )
        logits = finished.logits([finished.loader(part.pixels)])[0][0].double().mean(dim=1)
        found = {"accuracy": top_predictions(logits, part.labels)[1].double().mean().item()}
        found |= {
            "nll": nll(logits, part.labels).item(),
            "ece": expected_calibration_error(logits, part.labels).item(),
        }
        for name, value in found.items():
            by_kind.setdefault(part.kind, {}).setdefault(name, []).append(value)
    types = {
        kind: {**{name: mean(values) for name, values in found.items()}, "severities": found}
        for kind, found in by_kind.items()
    }
    names = {"cA": "accuracy", "cNLL": "nll", "cECE": "ece"}
    overall = {short: mean(t[name] for t in types.values()) for short, name in names.items()}
    return {"source": place, **overall, "types": types}


def evaluate_ensemble(
    runs: Sequence[RunFolder], data_dir: Path | None = None, *, device: str | None = None
) -> dict[str, Any]:
    """Evaluate several runs as one deep ensemble, the mean of their logits.

    Each run is one member, whatever members it has itself, so that every run counts alike.

    Args:
        runs: two or more finished runs, trained on one data set with one validation split; where
            some have none, there is no validation of the whole.
        data_dir: where the data lies, if not where it was looked for in training.
        device: where to evaluate; each recipe's where not given.

    Returns:
        the figures, as `evaluation.evaluate_parts` gives them.

    Raises:
        InputError: fewer than two runs, one that is not finished, or runs of different data.
    """
    _check_comparable(runs)
    for run in runs:
        run.check_trained()
    source = read_source(runs[0].recipe(), data_dir, runs[0])
    opened = [open_finished(run, data_dir, device, source) for run in runs]
    parts = [finished.logits(finished.loaders()) for finished in opened]
    validation, test = (_as_one([part[i] for part in parts]) for i in range(2))
    return evaluate_parts(validation, test)


def collect_logits(
    run: RunFolder, model: MixMoModel, loaders: Sequence[Any], *, fused: bool = False
) -> tuple[LabelledLogits, ...]:
    """Show a run every image of some loaders once.

    Args:
        run: its networks are finished.
        model: a network of its recipe; the weights of each network are put into it in turn.
        loaders: on the model's device.
        fused: whether to show them to the plain network that each fuses into.

    Returns:
        for each loader the member logits and labels; the members are the network's own, or the
        networks of a deep ensemble.
    """
    parts = []
    for network in run.networks():
        load_weights(model, network.weights)
        shown = model.fuse() if fused else model
        parts.append([collect_member_logits(shown, loader) for loader in loaders])
    if len(parts) == 1:
        return tuple(parts[0])
    return tuple(_as_one(of_loader) for of_loader in zip(*parts, strict=True))


@dataclass(frozen=True)
class FinishedRun:
    """A run whose networks are trained, with its data, ready to be shown images.

    Attributes:
        run: the folder.
        recipe: what was trained.
        source: the data.
        device: where it is shown images.
        model: a network of the recipe on that device; `logits` puts the weights into it.
        fused: whether images are shown to the plain network that it fuses into.
    """

    run: RunFolder
    recipe: Recipe
    source: DataSource
    device: torch.device
    model: MixMoModel
    fused: bool = False

    def loaders(self) -> tuple[BatchLoader, ...]:
        """Make the loaders of the validation split and of the test set; either may be empty."""
        return self._loaders_of(self._valid, self.source.test)

    @property
    def final_images(self) -> ImageSet:
        """The images of the final figures: the test set, or the validation images without one."""
        return self.source.test if len(self.source.test) else self._valid

    @property
    def final_part(self) -> str:
        """The part that `final_images` are: "test" or "valid"."""
        return "test" if len(self.source.test) else "valid"

    @property
    def _valid(self) -> ImageSet:
        return training_parts(self.source, self.recipe.data.valid_split)[1]

    def final_loader(self) -> BatchLoader:
        """Make the loader of `final_images`."""
        return self._loaders_of(self.final_images)[0]

    def _loaders_of(self, *parts: ImageSet) -> tuple[BatchLoader, ...]:
        data = self.recipe.data
        return make_evaluation_loaders(
            self.source,
            *parts,
            device=self.device,
            loader=data.loader,
            num_workers=data.num_workers,
        )

    def loader(self, pixels: Tensor) -> PixelLoader:
        """Make a loader of other images (n, C, H, W) uint8 of the run's shape."""
        return PixelLoader(pixels, self.source.mean, self.source.std, self.device)

    def logits(self, loaders: Sequence[Any]) -> tuple[Any, ...]:
        """Show the run every image of some loaders once; see `collect_logits`."""
        return collect_logits(self.run, self.model, loaders, fused=self.fused)


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
        data_dir: where its data lies, if not where it was looked for in training.
        device: where to evaluate; the recipe's where not given.
        source: its data, where it is read already.
        fused: see `FinishedRun`.

    Raises:
        InputError: the run is not finished, or its data is not there.
    """
    recipe = run.recipe()
    run.check_trained()
    keep_freed_memory()  # the figures of a large test set take half the time
    chosen = choose_device(device or recipe.train.device)
    source = source or read_source(recipe, data_dir, run)
    (channels, *size), model = source.train.image_shape, recipe.model
    network = create_model(
        model.arch,
        len(source.classes),
        model.num_members,
        channels,
        image_size=(size[0], size[1]),
    )
    move_to_device(network, chosen)
    return FinishedRun(run, recipe, source, chosen, network, fused)


def trains_on_other_images(run: RunFolder, source: DataSource) -> bool:
    """Check whether the training images are no longer those that a run was trained on.

    False if its checkpoint is gone, which alone tells.
    """
    try:
        saved = CheckpointStore(run.networks()[0].checkpoint).newest()
        before = json.loads((saved.path / "state.json").read_bytes())["data"] if saved else {}
    except (InputError, OSError, ValueError, KeyError, TypeError):
        return False
    return "train" in before and before["train"] != fingerprint(source)["train"]


def read_strange(place: str, finished: FinishedRun, data_dir: Path | None) -> Tensor:
    """Read images that a run knows nothing of, in the run's shape.

    Args:
        place: the name of a data set, of which the test set is taken, or a folder: its `test/` or
            `valid/` if it has one, otherwise all images below it.
        finished: the run.
        data_dir: where data sets lie.

    Returns:
        (O, C, H, W) uint8.

    Raises:
        InputError: it is the run's own data set, is not there, or an image cannot be read.
    """
    shape = finished.source.train.image_shape
    if place in DATASETS:
        if place == finished.recipe.data.dataset:
            raise InputError(f"{place} is what the run was trained on; --ood wants other images.")
        return as_shape(load_source(place, data_dir).test.tensor(), shape)
    check_dataset(place)
    folder, unreadable = Path(place).expanduser(), dict[Path, str]()
    paths = find_images([unseen_part(folder)])
    decoded = [image for _, image in decode_readable(paths, shape, unreadable)]
    if unreadable:
        names = [os.path.relpath(path, folder) for path in unreadable]
        error = damaged_images(folder, find_damaged(folder, names), len(paths))
        raise error.advising("Replace or remove them.")
    return torch.stack(decoded)


def _check_comparable(runs: Sequence[RunFolder]) -> None:
    check_several(runs, "An ensemble")
    first, *others = [run.recipe().data for run in runs]
    for run, data in zip(runs[1:], others, strict=True):
        for setting in ("dataset", "valid_split", "image_size"):
            own, expected = getattr(data, setting), getattr(first, setting)
            without_split = setting == "valid_split" and 0 in (own, expected)
            is_open = None in (own, expected)  # not begun, or with a validation folder
            if own != expected and not (without_split or is_open):
                raise InputError(
                    f"{run.path} has data.{setting}={own!r}, and {runs[0].path} has {expected!r}.\n"
                    "Runs of one ensemble must share the data and the validation split."
                )
        _check_same_parts(runs[0], run)
        check_same_left_out(runs[0], run)


def _check_same_parts(first: RunFolder, other: RunFolder) -> None:
    """Check that two runs on one image folder took the same images of it for each part."""
    if data_parts(first) != data_parts(other):
        raise InputError(
            f"{other.path} trains, validates or tests on other images of "
            f"{first.recipe().data.dataset} than {first.path}.\n"
            "Runs of one ensemble must share all three; split.json in each run names them."
        )


def _as_one(parts: Sequence[LabelledLogits]) -> LabelledLogits:
    """Make each run one member: R times (N, M, K) -> (N, R, K); None where one has no images."""
    present = [part for part in parts if part is not None]
    if len(present) < len(parts):  # a run without validation split has trained on these images
        return None
    return torch.stack([logits.mean(dim=1) for logits, _ in present], dim=1), present[0][1]
