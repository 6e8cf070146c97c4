"""Exported ONNX networks, run by onnxruntime.

Shapes: B images of C channels and H × W pixels, K classes.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixmo_fastai.errors import InputError, summarize_error


class OnnxNetwork(nn.Module):
    """A network in an ONNX file: (B, C, H, W) -> (B, K), on the CPU and without gradients.

    Args:
        path: a file of `mixmo export`.

    Attributes:
        metadata: the metadata of the file.

    Raises:
        InputError: onnxruntime is missing, or the file is missing or damaged, or has other inputs
            and outputs.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        if find_spec("onnxruntime") is None:
            raise InputError(
                f"{path} needs onnxruntime.\nInstall: pip install 'mixmo-fastai[export]'"
            )
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # errors are raised
        try:
            session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors have no common class
            raise InputError(f"{path} cannot be read: {summarize_error(error)}.") from error
        names = [
            [each.name for each in side] for side in (session.get_inputs(), session.get_outputs())
        ]
        if names != [["images"], ["logits"]]:
            raise InputError(
                f"{path} must have the input 'images' and the output 'logits'; it has {names[0]} "
                f"and {names[1]}.\nCreate it with: mixmo export RUN --to FILE.onnx"
            )
        self.session: Any = session
        self.metadata: dict[str, str] = dict(session.get_modelmeta().custom_metadata_map)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.detach().cpu().contiguous().numpy()
        (logits,) = self.session.run(["logits"], {"images": pixels})
        return torch.from_numpy(logits).to(images.device)
