"""Quantisation of an exported ONNX network to 8-bit integers, with a limit on the loss of accuracy.

Static quantisation of onnxruntime: weights per output channel, activations per tensor with the
range that they have on calibration images; convolutions and linear layers only. The inputs and
outputs of the network remain float32.

Shapes: N images, K classes.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixmo_fastai.data.image_sets import ImageSet
from mixmo_fastai.data.run_data import facts_of
from mixmo_fastai.data.splits import training_parts
from mixmo_fastai.errors import InputError
from mixmo_fastai.export.images import evenly_spaced, standardized
from mixmo_fastai.export.onnx_network import OnnxNetwork
from mixmo_fastai.metrics.table import percent, round_percent

MAX_DROP = 0.5
"""Default of the largest accepted loss of accuracy, in percentage points."""
NUM_CALIBRATION, MAX_EVALUATED, BATCH = 512, 10_000, 64
"""Images for the ranges of activations, largest number of images for the accuracy, batch size."""
NUM_LAYER_IMAGES, NUM_NAMED_LAYERS = 32, 3
"""Images from which the error of each layer is computed, and layers that a message names."""
_SCOPES = "pkg.torch.onnx.name_scopes"
"""Key under which torch's exporter stores the modules around an operation, outermost first."""


@dataclass(frozen=True)
class Quantised:
    """Accuracy of a network before and after quantisation, on the same images.

    Attributes:
        split: the split of these images, "valid" or "test".
        num_images: N.
        before, after: accuracies.
        half_width: half-width of the 95 % interval of the difference of the two, see `_compared`.
        same_class: fraction of images for which both networks predict the same class.
    """

    split: str
    num_images: int
    before: float
    after: float
    half_width: float
    same_class: float

    @property
    def drop(self) -> float:
        """Loss of accuracy in percentage points."""
        return 100 * (self.before - self.after)


def quantise(source: Any, valid_split: float | None, original: Path, target: Path) -> Quantised:
    """Quantise an ONNX network of `mixmo export`.

    The ranges of activations come from images of the validation split, or of the training split if
    there is none; the accuracies from the validation split, or else from the test images.

    Args:
        source: the `DataSource` of the run.
        valid_split: validation split of the run's recipe.
        original: the float network.
        target: file to write.

    Raises:
        InputError: the run has neither validation nor test images.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    train, valid = training_parts(source, valid_split)
    split, evaluated = ("valid", valid) if len(valid) else ("test", source.test)
    if not len(evaluated):
        raise InputError(
            "--int8 compares accuracies on validation or test images, and this run has neither."
        )
    prepared = _prepared(original)
    quant_pre_process(str(original), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(target),
        _Calibration(_chosen(source, valid if len(valid) else train, NUM_CALIBRATION)),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        # CPUs without VNNI add products in 16 bits, which overflow with weights of 8 bits.
        reduce_range=True,
    )
    networks = OnnxNetwork(prepared), OnnxNetwork(target)
    *predicted, labels = _predicted(source, evaluated, *networks)
    same_class = float((predicted[0] == predicted[1]).double().mean())
    compared = _compared(*(each == labels for each in predicted))
    return Quantised(split, len(labels), *compared, same_class)


def _prepared(original: Path) -> Path:
    """Return the file of the float network that onnxruntime has prepared for quantisation."""
    return original.with_name("prepared.onnx")


def check_drop(
    result: Quantised, max_drop: float, source: Any, original: Path, target: Path
) -> None:
    """Check the loss of accuracy.

    Raises:
        InputError: it exceeds `max_drop` points; the message names the layers with the largest
            error.
    """
    if result.drop <= max_drop:
        return
    errors, modules = layer_errors(source, _prepared(original), target), module_names(original)
    worst = ", ".join(
        f"{modules.get(name, name)} {round_percent(error)}"
        for name, error in errors[:NUM_NAMED_LAYERS]
    )
    raise InputError(
        f"int8 lowers the accuracy by {result.drop:.2f} points (from {percent(result.before)} to "
        f"{percent(result.after)}), more than --max-drop {max_drop:g}. Nothing was written.\n"
        f"Largest relative errors of layers: {worst}."
    )


def layer_errors(source: Any, original: Path, quantised: Path) -> list[tuple[str, float]]:
    """Compute the relative error of each quantised activation, largest first.

    Returns:
        Names of activations, and the norm of their error divided by their norm.
    """
    from onnxruntime.quantization.qdq_loss_debug import (
        collect_activations,
        compute_activation_error,
        create_activation_matching,
        modify_model_output_intermediate_tensors,
    )

    images = _chosen(source, source.train, NUM_LAYER_IMAGES)
    activations = []
    for path in (original, quantised):
        observed = path.with_name(f"observed-{path.name}")
        modify_model_output_intermediate_tensors(str(path), str(observed))
        activations.append(collect_activations(str(observed), _Calibration(images)))
    matched = create_activation_matching(activations[1], activations[0])
    errors = compute_activation_error(matched, _relative_error)
    found = {name: each["xmodel_err"] for name, each in errors.items() if "xmodel_err" in each}
    return sorted(found.items(), key=lambda item: -item[1])


def module_names(path: Path) -> dict[str, str]:
    """Return the modules of the network that compute the activations of an ONNX file, by name.

    Operations of a module that is no layer of its own have its name, such as ReLU that of a block.
    """
    import onnx

    names = {}
    for node in onnx.load(str(path)).graph.node:
        scopes = {each.key: each.value for each in node.metadata_props}.get(_SCOPES)
        if scopes is not None:
            *_, module, operation = ["", *json.loads(scopes.replace("'", '"'))]
            kind = "" if node.op_type in ("Conv", "Gemm", "MatMul") else f" ({node.op_type})"
            names[node.output[0]] = f"{module or operation}{kind}"
    return names


def _relative_error(expected: Any, actual: Any) -> float:
    pairs = [
        (torch.as_tensor(e).double(), torch.as_tensor(a).double())
        for e, a in zip(expected, actual, strict=True)
    ]
    error = sum(float((e - a).square().sum()) for e, a in pairs)
    scale = sum(float(e.square().sum()) for e, _ in pairs)
    return (error / max(scale, 1e-30)) ** 0.5


class _Calibration:
    """Batches of standardised images, as onnxruntime reads them."""

    def __init__(self, images: Tensor) -> None:
        self.batches: Iterator[Tensor] = iter(images.split(BATCH))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while (batch := self.get_next()) is not None:
            yield batch

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch, or None."""
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch.numpy()}


def _chosen(source: Any, images: ImageSet, count: int) -> Tensor:
    """Return at most `count` evenly spaced images, standardised."""
    return standardized(images, evenly_spaced(images, count), facts_of(source))


def _predicted(source: Any, images: ImageSet, *networks: OnnxNetwork) -> list[Tensor]:
    """Return the classes (N,) that each network predicts, then the labels (N,)."""
    facts, predicted = facts_of(source), []
    indices = evenly_spaced(images, MAX_EVALUATED)
    for some in indices.split(BATCH):
        batch = standardized(images, some, facts)
        predicted.append(torch.stack([network(batch).argmax(dim=1) for network in networks]))
    return [*torch.cat(predicted, dim=1), images.labels[indices]]


def _compared(before: Tensor, after: Tensor) -> tuple[float, float, float]:
    """Return both accuracies, and the half-width of the 95 % interval of their difference.

    The interval of Agresti and Min (2005) adds two to the number of images, and a half to each of
    the numbers of images on which exactly one network is correct, so that its width is not zero if
    there is none.

    Args:
        before: (N,) bool, whether the float network is correct.
        after: (N,), the same for the quantised network.
    """
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    count = len(before) + 2
    half_width = 1.96 * (lost + gained + 1 - (gained - lost) ** 2 / count) ** 0.5 / count
    return float(before.double().mean()), float(after.double().mean()), half_width
