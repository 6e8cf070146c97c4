"""Finished runs, evaluated alone or together as a deep ensemble.

Shapes: N images, M members of a run, R runs, K classes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixmo_fastai.checkpoints import load_weights
from mixmo_fastai.data.dataloaders import make_evaluation_loaders
from mixmo_fastai.data.image_sets import DataSource
from mixmo_fastai.devices import choose_device, place
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation import LabelledLogits, collect_member_logits, evaluate_parts
from mixmo_fastai.models import create_model
from mixmo_fastai.recipe import Recipe
from mixmo_fastai.runs import RunFolder
from mixmo_fastai.training import read_source


def evaluate_run(
    run: RunFolder, data_dir: Path | None = None, *, device: str | None = None
) -> dict[str, Any]:
    """Evaluate a trained run anew; a deep ensemble as one, each network a member.

    Args:
        run: a finished run.
        data_dir: where its data lies, if not where it was looked for in training.
        device: where to evaluate; the recipe's where not given.

    Returns:
        the figures, as `evaluation.evaluate_loaders` gives them.

    Raises:
        InputError: the run is not finished or damaged, or its data is not there.
    """
    return evaluate_parts(*_logits_of(run, data_dir, device))


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
        the figures, as `evaluation.evaluate_loaders` gives them.

    Raises:
        InputError: fewer than two runs, one that is not finished, or runs of different data.
    """
    _check_comparable(runs)
    parts = [_logits_of(run, data_dir, device) for run in runs]
    validation, test = (_as_one([part[i] for part in parts]) for i in range(2))
    return evaluate_parts(validation, test)


def collect_logits(
    run: RunFolder, model: nn.Module, loaders: Sequence[Any]
) -> tuple[LabelledLogits, ...]:
    """Show a run every image of some loaders once.

    Args:
        run: its networks are finished.
        model: a network of its recipe; the weights of each network are put into it in turn.
        loaders: on the model's device.

    Returns:
        for each loader the member logits and labels; the members are the network's own, or the
        networks of a deep ensemble.
    """
    parts = []
    for network in run.networks():
        load_weights(model, network.weights)
        parts.append([collect_member_logits(model, loader) for loader in loaders])
    if len(parts) == 1:
        return tuple(parts[0])
    return tuple(_as_one(of_loader) for of_loader in zip(*parts, strict=True))


def _logits_of(
    run: RunFolder, data_dir: Path | None, device: str | None
) -> tuple[LabelledLogits, ...]:
    recipe = run.recipe()
    if missing := [network.path for network in run.networks() if not network.weights.is_file()]:
        raise InputError(
            f"{missing[0]} has no weights yet: the run is not finished.\n"
            f"Continue it: mixmo fit --resume {run.path}"
        )
    chosen = choose_device(device or recipe.train.device)
    source = read_source(recipe, data_dir)
    loaders = make_evaluation_loaders(
        source,
        valid_split=recipe.data.valid_split,
        device=chosen,
        loader=recipe.data.loader,
        num_workers=recipe.data.num_workers,
    )
    return collect_logits(run, place(_network(recipe, source), chosen), loaders)


def _network(recipe: Recipe, source: DataSource) -> nn.Module:
    channels = source.test.image_shape[0]
    return create_model(recipe.model.arch, len(source.classes), recipe.model.num_members, channels)


def _check_comparable(runs: Sequence[RunFolder]) -> None:
    if len(runs) < 2:
        raise InputError(f"An ensemble needs two runs or more; got {len(runs)}.")
    first, *others = [run.recipe().data for run in runs]
    for run, data in zip(runs[1:], others, strict=True):
        for setting in ("dataset", "valid_split", "image_size"):
            own, expected = getattr(data, setting), getattr(first, setting)
            without_split = setting == "valid_split" and 0 in (own, expected)
            if own != expected and not without_split:
                raise InputError(
                    f"{run.path} has data.{setting}={own!r}, and {runs[0].path} has {expected!r}.\n"
                    "Runs of one ensemble must share the data and the validation split."
                )


def _as_one(parts: Sequence[LabelledLogits]) -> LabelledLogits:
    """Make each run one member: R times (N, M, K) -> (N, R, K); None where one has no images."""
    present = [part for part in parts if part is not None]
    if len(present) < len(parts):  # a run without validation split has trained on these images
        return None
    return torch.stack([logits.mean(dim=1) for logits, _ in present], dim=1), present[0][1]
