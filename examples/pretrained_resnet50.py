"""Turn a pretrained ResNet-50 into MixMo, and train it on a folder of images.

The first convolution becomes two encoders and the last layer two heads; all trained weights are
kept, and until it is trained on, the network gives what it gave before.

    python examples/pretrained_resnet50.py path/to/images
    python examples/pretrained_resnet50.py path/to/images --weights resnet50.pth
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
    """Convert, check, fine-tune, and write the plain network that it becomes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a folder with a folder per class")
    parser.add_argument("--weights", type=Path, help="a file of weights; downloaded without it")
    parser.add_argument("--size", type=int, default=224, help="height and width in pixels")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16, help="images of the loader")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=Path("resnet50-mixmo.pth"))
    asked = parser.parse_args()
    if not any(asked.folder.glob("*/*")):
        parser.error(f"{asked.folder} holds no folders of images, one per class")

    set_seed(0)
    try:
        network = pretrained(asked.weights)
    except OSError as error:  # also of downloads
        parser.error(f"the weights cannot be had: {error}")
    show_that_nothing_is_lost(network, asked.size)

    dls = ImageDataLoaders.from_folder(
        asked.folder,
        valid_pct=0.2,
        seed=0,
        bs=asked.batch_size,
        item_tfms=Resize(int(asked.size * 1.15)),
        batch_tfms=[*aug_transforms(size=asked.size), Normalize.from_stats(*imagenet_stats)],
        device=default_device(),
    )
    # The heads are new where the classes are; encoders and core keep what they have learnt.
    learn = mixmo_learner(dls, network, mix="cutmix", batch_repetitions=2, opt_func=Adam, seed=0)
    # The heads alone for an epoch, then all of it, the trained part more slowly.
    learn.fine_tune(asked.epochs, asked.lr)
    loss, accuracy, of_members = learn.validate()
    print(f"validation: loss {loss:.3f}, accuracy {accuracy:.1%}, of a member {of_members:.1%}")

    fused = learn.model.cpu().eval().fuse()  # a ResNet of torchvision again
    torch.save(fused.state_dict(), asked.out)
    print(f"written: {asked.out}, for resnet50(num_classes={dls.c}).load_state_dict")


def pretrained(weights: Path | None) -> nn.Module:
    """Give a ResNet-50 as it was trained on ImageNet."""
    if weights is None:
        return resnet50(weights=ResNet50_Weights.DEFAULT)
    network = resnet50()
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network


def show_that_nothing_is_lost(network: nn.Module, size: int) -> None:
    """Convert, and compare what both say of an image."""
    mixmo = convert_to_mixmo(network, num_members=2).eval()
    image = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = network.eval()(image)
        difference = (mixmo(image) - expected).abs().max() / expected.abs().max()
    plain, multi = (sum(p.numel() for p in m.parameters()) for m in (network, mixmo))
    print(f"as MixMo: {multi / plain:.3f} times the parameters, logits off by {difference:.0e}")


if __name__ == "__main__":
    main()
