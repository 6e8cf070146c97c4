"""A mask kind, a network and an augmentation of your own, in any command of `mixmo`.

python examples/own_method.py fit cifar10 --mix diagonal --arch tiny
python examples/own_method.py show cifar10 --mix diagonal --set data.transform=invert
python examples/own_method.py study STUDY.toml

Copy this file and replace what you study. A study then compares your method with those of the
package, with the same seeds, intervals and recipes. Runs need this program again for `eval`,
`predict` and `--resume`; exported networks do not, except for a network of your own.
"""

import torch
from torch import nn

from mixmo_fastai.cli import main
from mixmo_fastai.config.choices import MASK_REGIONS, NETWORKS, TRANSFORMS, TransformInfo
from mixmo_fastai.data.transforms import BatchTransform


def diagonal(area, shape, generator):
    """Return the corner above a diagonal: area (B,), shape (D, h, w) -> (B, 1, h, w), binary."""
    rows, columns = ((torch.arange(n, device=area.device) + 0.5) / n for n in shape[1:])
    end = torch.where(area < 0.5, (2 * area).sqrt(), 2 - (2 - 2 * area).sqrt())
    return (rows[:, None] + columns < end[:, None, None]).to(area.dtype)[:, None]


def tiny(num_classes):
    """Return a plain classifier; its first convolution and last layer become those of members."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        *(nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False)),
        *(nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(64, num_classes),
    )


def invert(prob=0.1):
    """Return a transform that inverts a fraction of the training images, (P, C, H, W) uint8."""

    def invert_some(images, generator):
        uniform = torch.rand(len(images), generator=generator, device=images.device)
        return torch.where((uniform < prob)[:, None, None, None], 255 - images, images)

    return BatchTransform(invert_some)


# Registered in every process that imports this file, also in the workers of a loader.
MASK_REGIONS["diagonal"] = f"{__name__}:diagonal"
NETWORKS["tiny"] = f"{__name__}:tiny"
TRANSFORMS["invert"] = TransformInfo(f"{__name__}:invert", "Invert")

if __name__ == "__main__":
    main(__file__)
