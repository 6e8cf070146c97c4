"""Convert a pretrained ResNet-50 to MixMo, and train it on a folder of images.

The first convolution becomes two encoders and the last layer two heads. All pretrained weights are
kept, and before training the converted network returns the same outputs.

    python examples/pretrained_resnet50.py path/to/images
    python examples/pretrained_resnet50.py path/to/images --weights resnet50.pth

Two members need to see every image about 30 times, twice in an epoch; with fewer views, one network
is usually better (docs/when.md).
"""

import argparse
from pathlib import Path

import torch
from fastai.data.transforms import Normalize
from fastai.optimizer import Adam
from fastai.torch_core import default_device, set_seed
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.core import imagenet_stats
from fastai.vision.data import ImageDataLoaders
from torch import nn
from torchvision.models import ResNet50_Weights, resnet50

from mixmo_fastai import convert_to_mixmo, mixmo_learner


def main() -> None:
    """Convert the network, check its outputs, fine-tune it, and save the fused network."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder with one folder per class")
    parser.add_argument("--weights", type=Path, help="file of ResNet-50 weights; default: download")
    parser.add_argument("--size", type=int, default=224, help="height and width in pixels")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--batch-size", type=int, default=16, help="images per batch of the loader")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=Path("resnet50-mixmo.pth"))
    args = parser.parse_args()
    if not any(args.folder.glob("*/*")):
        parser.error(f"{args.folder} contains no class folders with images")

    set_seed(0)
    try:
        network = pretrained(args.weights)
    except OSError as error:  # unreadable file or failed download
        parser.error(f"cannot load the weights: {error}")
    compare_outputs(network, args.size)

    dls = ImageDataLoaders.from_folder(
        args.folder,
        valid_pct=0.2,
        seed=0,
        bs=args.batch_size,
        item_tfms=Resize(int(args.size * 1.15)),
        batch_tfms=[*aug_transforms(size=args.size), Normalize.from_stats(*imagenet_stats)],
        device=default_device(),
    )
    # The heads are new, for the new classes; encoders and core keep the pretrained weights.
    learn = mixmo_learner(dls, network, mix="cutmix", batch_repetitions=2, opt_func=Adam, seed=0)
    # One epoch with only the heads, then all layers, with lower rates for the pretrained ones.
    learn.fine_tune(args.epochs, args.lr)
    loss, accuracy, member_accuracy = learn.validate()
    print(f"validation: loss {loss:.3f}, accuracy {accuracy:.1%}, per member {member_accuracy:.1%}")

    fused = learn.model.cpu().eval().fuse()  # a torchvision ResNet again
    torch.save(fused.state_dict(), args.out)
    print(f"Saved {args.out}, for resnet50(num_classes={dls.c}).load_state_dict")


def pretrained(weights: Path | None) -> nn.Module:
    """Load a ResNet-50 pretrained on ImageNet."""
    if weights is None:
        return resnet50(weights=ResNet50_Weights.DEFAULT)
    network = resnet50()
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network


def compare_outputs(network: nn.Module, size: int) -> None:
    """Convert the network, and compare the logits of both on random images."""
    mixmo = convert_to_mixmo(network, num_members=2).eval()
    image = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = network.eval()(image)
        difference = (mixmo(image) - expected).abs().max() / expected.abs().max()
    before, after = (sum(p.numel() for p in m.parameters()) for m in (network, mixmo))
    print(f"MixMo: {after / before:.3f} times the parameters, logits differ by {difference:.0e}")


if __name__ == "__main__":
    main()
