"""Predictions of a trained run for single images.

Shapes: n images of C channels, H × W pixels; M members, or networks of a deep ensemble; K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixmo_fastai.checkpoints.weights import load_network
from mixmo_fastai.data.listing import Skipped
from mixmo_fastai.data.loose_images import PixelLoader, decode_readable, find_images
from mixmo_fastai.detection import entropy_uncertainty
from mixmo_fastai.devices import choose_device, move_to_device
from mixmo_fastai.diversity import information_per_sample
from mixmo_fastai.evaluation import collect_member_logits
from mixmo_fastai.export import ExportedNetwork
from mixmo_fastai.runs import DataFacts, RunFolder
from mixmo_fastai.training import facts_of, read_source

IMAGES_AT_ONCE = 1024
"""Decoded images that are held at a time."""


@dataclass(frozen=True)
class Prediction:
    """What a run says of one image.

    Attributes:
        image: the file.
        label: the class of the ensemble, the mean of logits.
        probability: of that class.
        votes: each member's class; the ensemble's alone of an exported network.
        agreement: share of the votes for the ensemble's class; None of a single vote.
        entropy: of the ensemble, in nats; 0 where it is sure.
        mutual_information: of the members, in nats; None for one member.
    """

    image: str
    label: str
    probability: float
    votes: tuple[str, ...]
    agreement: float | None
    entropy: float
    mutual_information: float | None


def predict_images(
    run: RunFolder | ExportedNetwork,
    places: Sequence[Path],
    data_dir: Path | None = None,
    *,
    device: str | None = None,
    skipped: Skipped | None = None,
) -> tuple[list[Prediction], dict[Path, str]]:
    """Predict image files, and all images below folders.

    The run's data need not be there, but for runs without data.json, such as imported ones.

    Args:
        run: a finished run, or an exported network.
        places: files and folders.
        data_dir: where data sets lie.
        device: where to predict; the recipe's where not given, or what there is.
        skipped: receives the hidden and other files of folders.

    Returns:
        the predictions, and for each file that cannot be read the reason and what to do.

    Raises:
        InputError: the run is not finished, its classes are not known, or no image is found.
    """
    if isinstance(run, ExportedNetwork):
        facts, own_device, plain = run.facts, "auto", [run.model]
    else:
        facts = run.data_facts() or facts_of(read_source(run.recipe(), data_dir, run))
        own_device = run.recipe().train.device
        plain = [load_network(network).fuse(keep_members=True) for network in run.networks()]
    chosen = choose_device(device or own_device)
    networks = [move_to_device(network, chosen) for network in plain]
    paths, unreadable = find_images(places, skipped), {}
    predictions: list[Prediction] = []
    for start in range(0, len(paths), IMAGES_AT_ONCE):
        chunk = paths[start : start + IMAGES_AT_ONCE]
        decoded = dict(decode_readable(chunk, facts.image_shape, unreadable))  # type: ignore[arg-type]
        if decoded:
            pixels = torch.stack(list(decoded.values()))
            loader = PixelLoader(pixels, facts.mean, facts.std, chosen)
            logits = torch.cat([_votes_of(network, loader, networks) for network in networks], 1)
            predictions += _predictions([str(path) for path in decoded], logits, facts)
    return predictions, unreadable


def _votes_of(network: torch.nn.Module, loader: PixelLoader, networks: Sequence[object]) -> Tensor:
    """Give the logits that vote: those of the members, or of each network of a deep ensemble."""
    labelled = collect_member_logits(network, loader)
    assert labelled is not None
    logits = labelled[0]
    return logits if len(networks) == 1 else logits.mean(dim=1, keepdim=True)


def _predictions(images: Sequence[str], logits: Tensor, facts: DataFacts) -> list[Prediction]:
    """Read predictions off member logits (n, M, K)."""
    probabilities = logits.double().mean(dim=1).softmax(dim=1)
    top, labels = probabilities.max(dim=1)
    votes = logits.argmax(dim=2)  # (n, M)
    agreement = (votes == labels[:, None]).double().mean(dim=1)
    several = logits.shape[1] > 1
    information = information_per_sample(logits).tolist() if several else [None] * len(logits)
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
        )
        for i, image in enumerate(images)
    ]
