"""Predictions of a trained run for image files.

Shapes: n images of C channels, H × W pixels; M members, or networks of a deep ensemble; K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixmo_fastai.data.listing import Skipped
from mixmo_fastai.data.loose_images import PixelLoader, decode_readable
from mixmo_fastai.data.named_images import NamedImage, find_named_images
from mixmo_fastai.data.run_data import facts_of, read_source
from mixmo_fastai.evaluation.decisions import Decisions
from mixmo_fastai.evaluation.logits import collect_member_logits
from mixmo_fastai.export.files import ExportedNetwork
from mixmo_fastai.metrics.diversity import mutual_information_per_sample
from mixmo_fastai.metrics.multi_label import DEFAULT_THRESHOLD, LabelDecisions, as_decisions
from mixmo_fastai.metrics.ood import entropy_uncertainty
from mixmo_fastai.runs.data_facts import DataFacts
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.runs.labels import label_decisions
from mixmo_fastai.runs.weights import load_network
from mixmo_fastai.runtime.devices import choose_device, move_to_device

IMAGES_AT_ONCE = 1024
"""Number of decoded images in memory at a time."""


@dataclass(frozen=True)
class Prediction:
    """Prediction for one image.

    Attributes:
        image: path of the file, or what a table calls it.
        label: class predicted by the ensemble, from the mean of the members' logits.
        probability: probability of that class.
        votes: class predicted by each member; for an exported network, only the ensemble's class.
        agreement: fraction of the votes for the ensemble's class; None for a single vote.
        entropy: entropy of the ensemble's probabilities, in nats; 0 if one class has all of it.
        mutual_information: mutual information of the members, in nats; None for one member.
        classes: the prediction set, most likely class first; None if not requested.
        is_familiar: whether the image is like those of training; None if not requested.
        is_accepted: whether the prediction is accepted at the requested risk, or None.
        probabilities: probability of each class; None if not requested.
    """

    image: str
    label: str
    probability: float
    votes: tuple[str, ...]
    agreement: float | None
    entropy: float
    mutual_information: float | None
    classes: tuple[str, ...] | None = None
    is_accepted: bool | None = None
    is_familiar: bool | None = None
    probabilities: dict[str, float] | None = None


@dataclass(frozen=True)
class LabelsPrediction:
    """Prediction for one image that may have several labels.

    Attributes:
        image: path of the file, or what a table calls it.
        labels: predicted labels: those whose probability is above their threshold.
        probabilities: probability of each label of the data.
        entropy: sum of the entropies of all labels, in nats.
        mutual_information: sum of the mutual information of the members about each label, in nats;
            None for one member.
    """

    image: str
    labels: tuple[str, ...]
    probabilities: dict[str, float]
    entropy: float
    mutual_information: float | None


def predict_images(
    run: RunFolder | ExportedNetwork,
    paths: Sequence[Path],
    data_dir: Path | None = None,
    *,
    device: str | None = None,
    skipped: Skipped | None = None,
    decisions: Decisions | None = None,
    raw: bool = False,
    image_folder: Path | None = None,
    all_probabilities: bool = False,
) -> tuple[list[Prediction] | list[LabelsPrediction], dict[Path, str]]:
    """Predict the classes of images: files, all images in folders, and those that tables name.

    The run's data set is not needed, except for runs without data.json, such as imported ones. An
    image that is given several times is predicted as often.

    Args:
        run: a finished run, or an exported network.
        paths: files, folders, and tables as for `find_named_images`.
        data_dir: folder of the data sets.
        device: device to predict on; by default, that of the recipe, or the best one available for
            an exported network.
        skipped: receives the files of folders that are not predicted, such as hidden files.
        decisions: from `decisions.decide`; None for the network's own probabilities.
        raw: with several labels per image, whether probabilities are not calibrated.
        image_folder: folder to which paths in tables are relative; by default, that of the table.
        all_probabilities: whether the predictions have the probability of each class; with several
            labels per image, they always do.

    Returns:
        The predictions, `LabelsPrediction` with several labels per image; and for each unreadable
        image, named like a predicted one, the reason and what to do.

    Raises:
        InputError: the run is not finished, its classes are not known, no image is found, or a
            table cannot be read.
    """
    path_column = ""
    if isinstance(run, ExportedNetwork):
        facts, default_device, plain = run.facts, "auto", [run.model]
    else:
        run.check_trained()
        facts = run.data_facts() or facts_of(read_source(run.recipe(), data_dir, run))
        default_device, path_column = run.recipe().train.device, run.recipe().data.path_column
        plain = [load_network(network).fuse(keep_members=True) for network in run.networks()]
    labels = None
    if facts.is_multi_label:
        labels = _label_decisions(run, len(facts.classes), raw=raw)
    chosen = choose_device(device or default_device)
    networks = [move_to_device(network, chosen) for network in plain]
    images = find_named_images(paths, skipped, image_folder=image_folder, path_column=path_column)
    unreadable: dict[Path, str] = {}
    predictions: list[Any] = []
    for start in range(0, len(images), IMAGES_AT_ONCE):
        names, pixels = _decode(images[start : start + IMAGES_AT_ONCE], facts, unreadable)
        if names:
            loader = PixelLoader(torch.stack(pixels), facts.mean, facts.std, chosen)
            logits = torch.cat(
                [_voter_logits(network, loader, networks) for network in networks], 1
            )
            if labels is None:
                predictions += _predictions(
                    names, logits, facts, decisions or Decisions(), with_all=all_probabilities
                )
            else:
                predictions += _label_predictions(names, logits, facts, labels)
    return predictions, unreadable


def _decode(
    images: Sequence[NamedImage], facts: DataFacts, unreadable: dict[Path, str]
) -> tuple[list[str], list[Tensor]]:
    """Decode images; return the names and pixels of those that can be read."""
    names, decoded = [], []
    for name, path in images:
        if path is None:
            unreadable[Path(name)] = f"There is no image {name!r}."
            continue
        reasons: dict[Path, str] = {}
        for _, pixels in decode_readable([path], facts.image_shape, reasons):  # type: ignore[arg-type]
            names.append(name)
            decoded.append(pixels)
        unreadable.update((Path(name), reason) for reason in reasons.values())
    return names, decoded


def _voter_logits(
    network: torch.nn.Module, loader: PixelLoader, networks: Sequence[object]
) -> Tensor:
    """Return the logits of the voters: the members, or one network of a deep ensemble."""
    labelled = collect_member_logits(network, loader)
    assert labelled is not None
    logits = labelled[0]
    return logits if len(networks) == 1 else logits.mean(dim=1, keepdim=True)


def _predictions(
    images: Sequence[str],
    logits: Tensor,
    facts: DataFacts,
    decisions: Decisions,
    *,
    with_all: bool,
) -> list[Prediction]:
    """Build predictions from member logits (n, M, K), with the probability of each class or not."""
    sets, accepted = decisions.set_members(logits), decisions.accepted(logits)
    familiar = decisions.familiar(logits)
    logits = decisions.shown_logits(logits.double())
    probabilities = logits.double().mean(dim=1).softmax(dim=1)
    top, labels = probabilities.max(dim=1)
    votes = logits.argmax(dim=2)  # (n, M)
    agreement = (votes == labels[:, None]).double().mean(dim=1)
    several = logits.shape[1] > 1
    information = (
        mutual_information_per_sample(logits).tolist() if several else [None] * len(logits)
    )
    entropies = entropy_uncertainty(logits).tolist()
    return [
        Prediction(
            image=image,
            label=facts.classes[int(labels[i])],
            probability=float(top[i]),
            votes=tuple(facts.classes[vote] for vote in votes[i].tolist()),
            agreement=float(agreement[i]) if several else None,
            entropy=entropies[i],
            mutual_information=information[i],
            classes=None if sets is None else _set_names(sets[i], probabilities[i], facts),
            is_accepted=None if accepted is None else bool(accepted[i]),
            is_familiar=None if familiar is None else bool(familiar[i]),
            probabilities=_by_class(probabilities[i], facts) if with_all else None,
        )
        for i, image in enumerate(images)
    ]


def _label_decisions(
    run: RunFolder | ExportedNetwork, num_classes: int, *, raw: bool
) -> LabelDecisions:
    """Return which labels are predicted."""
    if isinstance(run, RunFolder):
        return label_decisions(run, num_classes, raw=raw)
    found = run.labels or LabelDecisions((DEFAULT_THRESHOLD,) * num_classes)
    return found.with_temperature(1 / found.contained) if raw else found


def _label_predictions(
    images: Sequence[str], logits: Tensor, facts: DataFacts, decide: LabelDecisions
) -> list[LabelsPrediction]:
    """Build predictions of labels from member logits (n, M, K)."""
    ensemble = logits.double().mean(dim=1)
    probabilities, predicted = decide.probabilities(ensemble), decide(ensemble)
    samples, _ = as_decisions(logits.double() / decide.temperature, torch.zeros_like(ensemble))
    per_image = (len(images), -1)
    entropies = entropy_uncertainty(samples).view(per_image).sum(dim=1).tolist()
    information = [None] * len(images)
    if logits.shape[1] > 1:
        found = mutual_information_per_sample(samples).view(per_image).sum(dim=1)
        information = found.tolist()
    return [
        LabelsPrediction(
            image=image,
            labels=tuple(n for n, is_on in zip(facts.classes, predicted[i], strict=True) if is_on),
            probabilities=_by_class(probabilities[i], facts),
            entropy=entropies[i],
            mutual_information=information[i],
        )
        for i, image in enumerate(images)
    ]


def _by_class(probabilities: Tensor, facts: DataFacts) -> dict[str, float]:
    """Return the probabilities (K,) by the names of the classes."""
    return dict(zip(facts.classes, probabilities.tolist(), strict=True))


def _set_names(members: Tensor, probabilities: Tensor, facts: DataFacts) -> tuple[str, ...]:
    """Return the names of the classes of a set, most likely first."""
    order = probabilities.argsort(descending=True, stable=True).tolist()
    return tuple(facts.classes[label] for label in order if bool(members[label]))
