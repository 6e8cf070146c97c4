"""Export of a trained run as one plain network, checked against the run.

The formats are safetensors, ONNX, and the programs of `torch.export` (.pt2).

Shapes: n images of C channels and H × W pixels, K classes.

The metadata of all formats hold, as JSON under "mixmo", the name of the format, the
architecture, the facts about the data that the network needs, and the calibration (`thresholds`).
All networks expect standardised images: (pixels / 255 - mean) / std. Their logits are calibrated,
unless the run has no calibration.
"""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mixmo_fastai.config.choices import EXPORT_SUFFIXES, HUB_PREFIX, parse_architecture
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.data.image_sets import DataSource
from mixmo_fastai.data.run_data import facts_of, read_source
from mixmo_fastai.errors import InputError
from mixmo_fastai.export import int8
from mixmo_fastai.export.formats import (
    read_program,
    write_onnx,
    write_program,
    write_tensors,
)
from mixmo_fastai.export.header import (
    damage_explained,
    metadata_of,
    parts_of_header,
    read_header,
)
from mixmo_fastai.export.images import evenly_spaced, standardized
from mixmo_fastai.export.onnx_network import OnnxNetwork
from mixmo_fastai.export.thresholds import (
    ExportedCalibration,
    exported_thresholds,
    scale_heads,
)
from mixmo_fastai.metrics.multi_label import LabelDecisions
from mixmo_fastai.metrics.scaling import Scaling
from mixmo_fastai.models import create_model
from mixmo_fastai.models.folding import fold_batch_norm
from mixmo_fastai.models.fused import assemble
from mixmo_fastai.runs.calibration import read_calibration
from mixmo_fastai.runs.data_facts import DataFacts
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.runs.labels import check_one_label, label_decisions
from mixmo_fastai.runs.weights import load_network

NUM_CHECKED = 256
"""Number of images on which an exported network is compared with the run."""
TOLERANCES = {".safetensors": 1e-5, ".onnx": 1e-4, ".pt2": 1e-4}
"""Largest difference of logits relative to the largest logit; others sum in a different order."""
WEIGHTS, CONFIG = "model.safetensors", "config.json"
"""Files of a folder in the layout of the Hugging Face Hub; see `hub`."""
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


@dataclass(frozen=True)
class ExportedNetwork:
    """A fused network loaded from a file.

    Attributes:
        model: the network, in evaluation mode, on the CPU.
        arch: name of its architecture.
        facts: facts about its data that prediction needs.
        calibration: None if the file has none.
        labels: which labels are predicted, with several per image; None with one.
    """

    model: nn.Module
    arch: str
    facts: DataFacts
    calibration: ExportedCalibration | None = None
    labels: LabelDecisions | None = None


def check_export(run: RunFolder, path: Path, push_to: str | None = None) -> None:
    """Check that a run can be exported to a file, without loading anything.

    Args:
        run: the run.
        path: the file.
        push_to: for `mixmo push`, where to, for the message about deep ensembles.

    Raises:
        InputError: the run is a deep ensemble or not finished, the suffix of the file is unknown,
            or the packages for it are missing.
    """
    if path.suffix.lower() not in EXPORT_SUFFIXES:
        raise InputError(f"{str(path)!r} must end in {', '.join(EXPORT_SUFFIXES)}.")
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if path.suffix.lower() == ".onnx" and missing:
        raise InputError(
            f"ONNX files need {', '.join(missing)}.\nInstall: pip install 'mixmo-fastai[export]'"
        )
    if run.recipe().model.num_nets > 1:
        network = run.networks()[0].argument
        command = f"Export one of its networks: mixmo export {network} --to {path.name}"
        if push_to is not None:
            command = f"Push one of its networks: mixmo push {network} --to {push_to}"
        raise InputError(
            f"{run.path} is a deep ensemble, which cannot be fused into one network.\n{command}"
        )
    run.check_trained()


def export_run(
    run: RunFolder,
    path: Path,
    data_dir: Path | None = None,
    *,
    max_drop: float | None = None,
    raw: bool = False,
) -> dict[str, Any]:
    """Fuse a finished run into one plain network, and write it if its logits match the run's.

    The logits are calibrated if the run has a calibration, and those of the check as well.

    The network is written to a temporary file in the same folder, read back, and evaluated on test
    images; the file is renamed to `path` only if its logits match those of the run.

    Args:
        run: a finished run of one network.
        path: a file that ends in one of `choices.EXPORT_SUFFIXES`.
        data_dir: folder of the run's data, if not the one that training used.
        max_drop: quantise an ONNX network to 8-bit integers, which may lower the accuracy by this
            many percentage points; None for float32.
        raw: whether to write the logits without calibration.

    Returns:
        With `max_drop` also int8, see `int8.Quantised`, and
        arch, parameters, num_bytes, num_images, relative_difference (largest difference of logits
        relative to the largest logit), same_class (fraction of images with the same class) and
        calibration ("temperature", "vector" or "none").

    Raises:
        InputError: see `check_export`; or the file exists, or there is no data to compare on.
        InputError: the file's logits do not match the run's; nothing is written.
    """
    check_export(run, path)
    if os.path.lexists(path):
        raise InputError(f"{str(path)!r} exists and was not changed. Choose another file.")
    suffix, recipe, model = path.suffix.lower(), run.recipe(), load_network(run)
    source = read_source(recipe, data_dir, run)
    facts = facts_of(source)
    _check_facts(run, facts)
    calibration = read_calibration(run)
    scaling = None if raw or calibration is None else calibration.scaling
    labels = None
    if facts.is_multi_label:
        scaling, labels = _label_scaling(run, len(facts.classes), raw=raw)
        if max_drop is not None:
            check_one_label(run, "--int8")
    if scaling is not None:
        scale_heads(model, scaling)
    entry = None if calibration is None else exported_thresholds(calibration, in_logits=not raw)
    images = source.test if len(source.test) else source.train
    x = standardized(images, evenly_spaced(images, NUM_CHECKED), facts)
    fused = model.fuse()
    write, read = _FORMATS[suffix]
    try:
        with TemporaryDirectory(prefix=".unchecked-", dir=path.parent) as folder:
            temporary = Path(folder) / f"network{suffix}"
            # The .safetensors of a network have the names of its architecture.
            written = fused if suffix == ".safetensors" else fold_batch_norm(fused.eval(), x[:8])
            metadata = metadata_of(recipe.model.arch, facts, entry, labels)
            write(written, facts, metadata, temporary)
            with torch.inference_mode():
                expected = model(x)
            # Two batch sizes, to check that the network does not depend on the size at export.
            predict = read(temporary)
            with torch.inference_mode():
                logits = torch.cat([predict(x[:1]), predict(x[1:])])
            agreement = _compare(logits, expected, TOLERANCES[suffix], labels)
            if max_drop is not None:
                temporary, agreement["int8"] = _quantise(source, recipe, temporary, max_drop)
            temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"Cannot write {str(path)!r}: {error}.") from error
    return {
        "arch": recipe.model.arch,
        "parameters": sum(p.numel() for p in fused.parameters()),
        "num_bytes": path.stat().st_size,
        "num_images": len(x),
        "calibration": "none" if scaling is None else scaling.method,
        **agreement,
    }


def load_fused(path: Path | str) -> ExportedNetwork:
    """Load a network that `mixmo export` wrote. No code in the file is executed.

    Args:
        path: a .safetensors file, or an .onnx file, which onnxruntime runs on the CPU; a folder
            that `mixmo push` wrote; or "hf:USER/NAME", a repository of the Hugging Face Hub, also
            with @REVISION.

    Raises:
        InputError: the file is missing, damaged, or not an exported network of these formats, or
            the repository cannot be read.
    """
    if str(path).startswith(HUB_PREFIX):
        from mixmo_fastai.export.hub import download_weights

        path = download_weights(str(path).removeprefix(HUB_PREFIX))
    path = Path(path)
    path = path / WEIGHTS if (path / CONFIG).is_file() else path
    if path.is_dir():
        raise InputError(
            f"The folder {str(path)!r} has no {CONFIG}: it is not one that `mixmo push` wrote."
        )
    if not path.exists():
        raise InputError(f"There is no file {str(path)!r}.")
    if path.suffix.lower() == ".onnx":
        network = OnnxNetwork(path)
        header = read_header(path, network.metadata)
        return ExportedNetwork(network.eval(), *parts_of_header(path, header))
    if path.suffix.lower() == ".pt2":
        raise InputError(
            f"{path} is a program of torch.export; run it with torch.export.load.\n"
            "For `mixmo predict`, export to .safetensors or .onnx."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(
            f"{path} cannot be read: it is damaged, or not an exported network ({error}).\n"
            "Export the network of a run: mixmo export RUN --to net.safetensors."
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    arch, facts, calibration, labels = parts_of_header(path, read_header(path, metadata))
    with damage_explained(path):
        published = parse_architecture(arch).depth > 0
        # A damaged file may claim a huge network: on "meta", no memory is allocated for it.
        with torch.device("meta" if published else "cpu"):
            model = plain_network(arch, facts)
        types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        if types != {name: tensor.dtype for name, tensor in tensors.items()}:
            raise ValueError(f"its tensors are not those of {arch}")
        model.load_state_dict(tensors, assign=True)
    return ExportedNetwork(model.eval(), arch, facts, calibration, labels)


def plain_network(arch: str, facts: DataFacts) -> nn.Module:
    """Create the untrained plain network into which a network of an architecture fuses.

    Raises:
        InputError: the architecture is unknown, or does not fit the images.
    """
    channels, height, width = facts.image_shape
    parts = create_model(arch, len(facts.classes), 1, channels, image_size=(height, width))
    return assemble(parts.encoders[0], parts.core, parts.heads[0])


def write_fused(
    model: nn.Module,
    arch: str,
    facts: DataFacts,
    calibration: dict[str, Any] | None,
    path: Path,
    *,
    labels: LabelDecisions | None = None,
) -> None:
    """Write a plain network as a .safetensors file that `load_fused` reads.

    Args:
        model: the network.
        arch: name of its architecture.
        facts: facts about its data.
        calibration: entry of the header, from `thresholds.exported_thresholds`; None for none.
        path: the file.
        labels: which labels are predicted, with several per image; None with one.
    """
    write_tensors(model, facts, metadata_of(arch, facts, calibration, labels), path)


def _check_facts(run: RunFolder, facts: DataFacts) -> None:
    """Check that the facts recorded by the run, such as mean and std, match the data."""
    recorded = run.data_facts() or facts
    for field in dataclasses.fields(facts):
        expected, actual = getattr(recorded, field.name), getattr(facts, field.name)
        if expected != actual:
            raise InputError(
                f"{field.name} is {str(expected)[:60]} in {run.path / 'data.json'}; the data has "
                f"{str(actual)[:60]}.\nRestore the file or the data."
            )


def _quantise(
    source: DataSource, recipe: Recipe, original: Path, max_drop: float
) -> tuple[Path, dict[str, Any]]:
    """Quantise an ONNX network; return the new file and the accuracies."""
    target = original.with_name("int8.onnx")
    result = int8.quantise(source, recipe.data.valid_split, original, target)
    int8.check_drop(result, max_drop, source, original, target)
    return target, dataclasses.asdict(result)


def _label_scaling(
    run: RunFolder, num_classes: int, *, raw: bool
) -> tuple[Scaling | None, LabelDecisions]:
    """Return the scaling of the heads, and the thresholds of the scaled logits' probabilities."""
    found = label_decisions(run, num_classes, raw=raw)
    if found.temperature == 1.0:
        return None, found
    scaling = Scaling("temperature", (1 / found.temperature,))
    return scaling, LabelDecisions(found.thresholds, contained=found.temperature)


def _compare(
    logits: Tensor, expected: Tensor, tolerance: float, labels: LabelDecisions | None = None
) -> dict[str, Any]:
    """Compare logits (n, K); raise if they differ by more than the tolerance."""
    if not expected.isfinite().all():
        raise InputError("The logits of the run are not finite; its weights cannot be exported.")
    difference = float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if labels is None:
        is_same = logits.argmax(1) == expected.argmax(1)
    else:
        is_same = (labels(logits) == labels(expected)).all(dim=1)
    same = float(is_same.double().mean())
    if not difference <= tolerance:  # also true for NaN
        raise InputError(
            f"The logits of the exported network must match the run's to {tolerance:.0e} of the "
            f"largest logit;\nthey differ by {difference:.1e} on {len(expected)} images. Nothing "
            "was written."
        )
    key = "same_class" if labels is None else "same_labels"
    return {"relative_difference": difference, key: same}


def _read_fused(path: Path) -> Callable[[Tensor], Tensor]:
    return load_fused(path).model


_FORMATS = {
    ".safetensors": (write_tensors, _read_fused),
    ".onnx": (write_onnx, _read_fused),
    ".pt2": (write_program, read_program),
}
