"""Member logits of every image of a loader, and of all networks of a run.

Shapes: N samples, M members, R runs, K classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixmo_fastai.models import MixMoModel
from mixmo_fastai.models.folding import fold_batch_norm
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.runs.weights import load_weights
from mixmo_fastai.runtime.acceleration import thread_limit
from mixmo_fastai.runtime.devices import float32_precision, use_threads
from mixmo_fastai.runtime.processes import all_gather, process_group

LabelledLogits = tuple[Tensor, Tensor] | None
"""Member logits (N, M, K) and labels (N,), or (N, K) with several labels per image; None if there
are no images."""
NUM_COMPARED = 8
"""Images on which the network for inference is compared with the original."""
BATCHES_BEFORE_FOLDING = 2
"""For fewer batches, folding takes longer than it saves."""


def collect_member_logits(model: Any, loader: Any) -> LabelledLogits:
    """Compute the member logits of every image of a loader, in full float32 without TF32.

    On a CPU, BatchNorm is folded into convolutions where that is exact up to rounding, and no more
    threads run than CPUs may be used.
    In a distributed run each process evaluates part of the images and receives all logits.

    Args:
        model: a `MixMoModel`, or a plain network, which counts as one member; its training mode is
            restored afterwards.
        loader: batches of images (B, C, H, W) and labels (B,), on the model's device; must be a
            `BatchLoader` in a distributed run.

    Returns:
        Member logits (N, M, K) and labels (N,), on the CPU; None for a loader without batches.
    """
    was_training = model.training
    model.eval()
    try:
        threads = use_threads(thread_limit().count)
        with torch.inference_mode(), float32_precision(tf32=False), threads:
            # Copied to the CPU after the loop, so that the GPU never waits inside it.
            batches_of_rank = loader.shard(process_group()) if process_group().count > 1 else loader
            batches, inference_model = [], model
            for number, (images, labels) in enumerate(batches_of_rank):
                x = images.as_subclass(Tensor)
                if number == BATCHES_BEFORE_FOLDING:
                    inference_model = _faster(model, x)
                batches.append((_member_logits(inference_model, x), labels))
    finally:
        model.train(was_training)
    if not batches and process_group().count == 1:
        return None
    parts = (torch.cat(parts).as_subclass(Tensor).cpu() for parts in zip(*batches, strict=True))
    return _interleave([part for part in all_gather(tuple(parts)) if part])


def _faster(model: Any, x: Tensor) -> Any:
    """Return an equal network that is faster on images like these."""
    is_on_cpu = isinstance(model, nn.Module) and x.device.type == "cpu"
    return fold_batch_norm(model, x[:NUM_COMPARED]) if is_on_cpu else model


def _member_logits(model: Any, x: Tensor) -> Tensor:
    """Return member logits (B, M, K); a plain network counts as one member."""
    members = getattr(model, "member_logits", None)
    logits: Tensor = model(x)[:, None] if members is None else members(x)
    return logits


def _interleave(parts: Sequence[tuple[Tensor, Tensor]]) -> LabelledLogits:
    """Restore the order of images: of R processes, rank r has every R-th image from the r-th on."""
    if not parts:
        return None
    count = sum(len(labels) for _, labels in parts)
    logits = parts[0][0].new_empty((count, *parts[0][0].shape[1:]), dtype=torch.float32)
    labels = parts[0][1].new_empty((count, *parts[0][1].shape[1:]))
    for rank, (rank_logits, rank_labels) in enumerate(parts):
        logits[rank :: len(parts)], labels[rank :: len(parts)] = rank_logits, rank_labels
    return logits, labels


def collect_logits(
    run: RunFolder, model: MixMoModel, loaders: Sequence[Any], *, fused: bool = False
) -> tuple[LabelledLogits, ...]:
    """Compute a run's logits of every image of each loader.

    Args:
        run: a run whose networks are all trained.
        model: a network built from the run's recipe; the weights of each network are loaded into it
            in turn.
        loaders: loaders on the model's device.
        fused: evaluate the plain network that each network fuses into.

    Returns:
        Member logits and labels for each loader. The members are those of the network, or the
        networks of a deep ensemble.
    """
    per_network = []
    for network in run.networks():
        load_weights(model, network.weights)
        evaluated = model.fuse() if fused else model
        per_network.append([collect_member_logits(evaluated, loader) for loader in loaders])
    if len(per_network) == 1:
        return tuple(per_network[0])
    return tuple(stack_runs(of_loader) for of_loader in zip(*per_network, strict=True))


def stack_runs(per_run: Sequence[LabelledLogits]) -> LabelledLogits:
    """Make each run one member: R times (N, M, K) -> (N, R, K); None if a run has no images."""
    present = [labelled for labelled in per_run if labelled is not None]
    if len(present) < len(per_run):  # a run without validation split has trained on these images
        return None
    return torch.stack([logits.mean(dim=1) for logits, _ in present], dim=1), present[0][1]
