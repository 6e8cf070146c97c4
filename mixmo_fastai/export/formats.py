"""Writers of the formats of `files`."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from mixmo_fastai.runs.data_facts import DataFacts

Metadata = dict[str, str]


def write_tensors(model: nn.Module, facts: DataFacts, metadata: Metadata, path: Path) -> None:
    """Write the tensors of a network as .safetensors."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    # Not `save_file`, which creates a file that only its owner may read.
    path.write_bytes(save(tensors, metadata={"format": "pt", **metadata}))


def write_onnx(model: nn.Module, facts: DataFacts, metadata: Metadata, path: Path) -> None:
    """Write a network as .onnx, for batches of any size."""
    example = torch.zeros(2, *facts.image_shape)
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),  # by name, torch 2.6 fails
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(metadata)
    program.save(path)


def write_program(model: nn.Module, facts: DataFacts, metadata: Metadata, path: Path) -> None:
    """Write a network as a program of `torch.export`, for batches of any size."""
    example = torch.zeros(2, *facts.image_shape)
    batches = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (example,), dynamic_shapes=batches)
    torch.export.save(program, path, extra_files=metadata)


def read_program(path: Path) -> Callable[[Tensor], Tensor]:
    """Read a program of `torch.export` as a function of a batch."""
    program: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return program
