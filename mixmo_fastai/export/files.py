"""Export of a trained run as one plain network, to safetensors or ONNX, checked against the run.

Shapes: n images of C channels and H × W pixels, K classes.

The metadata of both file formats hold, as JSON under "mixmo", the name of the format, the
architecture, and the facts about the data that the network needs. Both networks expect standardised
images: (pixels / 255 - mean) / std.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mixmo_fastai.config.choices import EXPORT_SUFFIXES, parse_architecture
from mixmo_fastai.data.augment import normalize
from mixmo_fastai.data.image_sets import ImageSet
from mixmo_fastai.data.run_data import facts_of, read_source
from mixmo_fastai.errors import InputError
from mixmo_fastai.models import create_model
from mixmo_fastai.models.fused import assemble
from mixmo_fastai.runs.data_facts import DataFacts
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.runs.weights import load_network

FORMAT = "mixmo-fused-1"
NUM_CHECKED = 256
"""Number of images on which an exported network is compared with the run."""
TOLERANCES = {".safetensors": 1e-5, ".onnx": 1e-4}
"""Largest difference of logits relative to the largest logit; ONNX sums in a different order."""
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
Metadata = dict[str, str]


@dataclass(frozen=True)
class ExportedNetwork:
    """A fused network loaded from a file.

    Attributes:
        model: the network, in evaluation mode, on the CPU.
        arch: name of its architecture.
        facts: facts about its data that prediction needs.
    """

    model: nn.Module
    arch: str
    facts: DataFacts


def check_export(run: RunFolder, path: Path) -> None:
    """Check that a run can be exported to a file, without loading anything.

    Raises:
        InputError: the run is a deep ensemble or not finished, the suffix of the file is unknown,
            or the packages for it are missing.
    """
    if path.suffix.lower() not in EXPORT_SUFFIXES:
        raise InputError(f"{str(path)!r} must end in {' or '.join(EXPORT_SUFFIXES)}.")
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if path.suffix.lower() == ".onnx" and missing:
        raise InputError(
            f"ONNX files need {', '.join(missing)}.\nInstall: pip install 'mixmo-fastai[export]'"
        )
    if run.recipe().model.num_nets > 1:
        raise InputError(
            f"{run.path} is a deep ensemble, which cannot be fused into one network.\n"
            f"Export one of its networks: mixmo export {run.path}/net-1 --to {path.name}"
        )
    run.check_trained()


def export_run(run: RunFolder, path: Path, data_dir: Path | None = None) -> dict[str, Any]:
    """Fuse a finished run into one plain network, and write it if its logits match the run's.

    The network is written to a temporary file in the same folder, read back, and evaluated on test
    images; the file is renamed to `path` only if its logits match those of the run.

    Args:
        run: a finished run of one network.
        path: a file that ends in .safetensors or .onnx.
        data_dir: folder of the run's data, if not the one that training used.

    Returns:
        arch, parameters, num_bytes, num_images, relative_difference (largest difference of logits
        relative to the largest logit) and same_class (fraction of images with the same class).

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
    x = _standardized_images(source.test if len(source.test) else source.train, facts)
    fused = model.fuse()
    write, read = _FORMATS[suffix]
    try:
        with TemporaryDirectory(prefix=".unchecked-", dir=path.parent) as folder:
            temporary = Path(folder) / f"network{suffix}"
            write(fused, facts, _metadata(recipe.model.arch, facts), temporary)
            with torch.inference_mode():
                expected = model(x)
            # Two batch sizes, to check that the network does not depend on the size at export.
            predict = read(temporary)
            logits = torch.cat([predict(x[:1]), predict(x[1:])])
            agreement = _compare(logits, expected, TOLERANCES[suffix])
            temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"Cannot write {str(path)!r}: {error}.") from error
    return {
        "arch": recipe.model.arch,
        "parameters": sum(p.numel() for p in fused.parameters()),
        "num_bytes": path.stat().st_size,
        "num_images": len(x),
        **agreement,
    }


def load_fused(path: Path | str) -> ExportedNetwork:
    """Load a network that `mixmo export` wrote as .safetensors. No code in the file is executed.

    Args:
        path: the file.

    Raises:
        InputError: the file is missing, damaged, or not an exported .safetensors network.
    """
    path = Path(path)
    if path.is_dir() or not path.exists():
        raise InputError(f"There is no file {str(path)!r}.")
    try:
        if path.suffix.lower() == ".onnx":
            raise InputError(
                f"{path} is an ONNX file, which cannot be loaded here.\n"
                "Export to safetensors instead: mixmo export RUN --to FILE.safetensors"
            )
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    if "mixmo" not in metadata:
        raise InputError(
            f"{path} is not an exported network.\n"
            "Create one with: mixmo export RUN --to FILE.safetensors"
        )
    try:
        header = json.loads(metadata["mixmo"])
        if header["format"] != FORMAT:
            raise InputError(
                f"{path} has format {header['format']!r}; this version reads {FORMAT}."
            )
        facts = DataFacts.from_mapping(header["data"])
        arch = str(header["arch"])
        published = parse_architecture(arch).depth > 0
        # A damaged file may claim a huge network: on "meta", no memory is allocated for it.
        with torch.device("meta" if published else "cpu"):
            channels, height, width = facts.image_shape
            parts = create_model(arch, len(facts.classes), 1, channels, image_size=(height, width))
            model = assemble(parts.encoders[0], parts.core, parts.heads[0])
        types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        if types != {name: tensor.dtype for name, tensor in tensors.items()}:
            raise ValueError(f"its tensors are not those of {arch}")
        model.load_state_dict(tensors, assign=True)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is damaged: {reason}.") from error
    return ExportedNetwork(model.eval(), arch, facts)


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


def _metadata(arch: str, facts: DataFacts) -> Metadata:
    header = {"format": FORMAT, "arch": arch, "data": dataclasses.asdict(facts)}
    return {"mixmo": json.dumps(header)}


def _standardized_images(images: ImageSet, facts: DataFacts) -> Tensor:
    """Return evenly spaced images of a data set, standardised: (n, C, H, W) float."""
    count = min(NUM_CHECKED, len(images))
    chosen = torch.linspace(0, len(images) - 1, count).round().long().tolist()
    pixels = torch.stack([images[i] for i in chosen])
    return normalize(pixels, torch.tensor(facts.mean), torch.tensor(facts.std))


def _compare(logits: Tensor, expected: Tensor, tolerance: float) -> dict[str, float]:
    """Compare logits (n, K); raise if they differ by more than the tolerance."""
    if not expected.isfinite().all():
        raise InputError("The logits of the run are not finite; its weights cannot be exported.")
    difference = float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    same = float((logits.argmax(1) == expected.argmax(1)).double().mean())
    if not difference <= tolerance:  # also true for NaN
        raise InputError(
            f"The logits of the exported network must match the run's to {tolerance:.0e} of the "
            f"largest logit;\nthey differ by {difference:.1e} on {len(expected)} images. Nothing "
            "was written."
        )
    return {"relative_difference": difference, "same_class": same}


def _write_tensors(model: nn.Module, facts: DataFacts, metadata: Metadata, path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    # Not `save_file`, which creates a file that only its owner may read.
    path.write_bytes(save(tensors, metadata={"format": "pt", **metadata}))


def _read_tensors(path: Path) -> Callable[[Tensor], Tensor]:
    model = load_fused(path).model

    def predict(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(x)

    return predict


def _write_onnx(model: nn.Module, facts: DataFacts, metadata: Metadata, path: Path) -> None:
    example = torch.zeros(2, *facts.image_shape)
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(metadata)
    program.save(path)


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def predict(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])

    return predict


_FORMATS = {".safetensors": (_write_tensors, _read_tensors), ".onnx": (_write_onnx, _read_onnx)}
