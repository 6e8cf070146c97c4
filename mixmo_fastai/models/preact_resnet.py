"""PreActResNet-18-w, "ResNet-18-w" in the paper, for images of 64x64.

Source: He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016, with the details of the
published MixMo networks: the first convolution has stride 2, the input of the shortcut is the
*activated* input of the block, and no BatchNorm follows the last group.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mixmo_fastai.models.readout import average


class PreActBlock(nn.Module):
    """BN-ReLU-conv with the stride, BN-ReLU-conv, plus the shortcut.

    Example:
        >>> PreActBlock(64, 128, stride=2)(torch.zeros(4, 64, 8, 8)).shape
        torch.Size([4, 128, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        residual = x if self.shortcut is None else self.shortcut(activated)
        y = self.conv1(activated)
        out: Tensor = self.conv2(F.relu(self.bn2(y))) + residual
        return out


class PreActResNetCore(nn.Module):
    """A PreActResNet-18 without its first convolution and its last linear layer.

    Args:
        width: w; the four groups have 64w, 128w, 256w and 512w channels.

    Shapes: (B, 64, h, w) -> (B, 512w).

    Example:
        >>> PreActResNetCore(width=1)(torch.zeros(4, 64, 8, 8)).shape
        torch.Size([4, 512])
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [STEM_CHANNELS, 64 * width, 128 * width, 256 * width, 512 * width]
        self.groups = nn.Sequential(
            *(_group(widths[i], widths[i + 1], stride=1 if i == 0 else 2) for i in range(4))
        )
        self.out_features = widths[4]

    def maps(self, features: Tensor) -> Tensor:
        """Compute feature maps before pooling: (B, 64, h, w) -> (B, 512w, h/8, w/8).

        Example:
            >>> PreActResNetCore(width=1).maps(torch.zeros(4, 64, 8, 8)).shape
            torch.Size([4, 512, 1, 1])
        """
        maps: Tensor = self.groups(features)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return average(self.maps(x))


STEM_CHANNELS = 64


def stem(in_channels: int) -> nn.Conv2d:
    """Build one encoder: (B, C, H, W) -> (B, 64, H/2, W/2).

    Example:
        >>> stem(in_channels=3)(torch.zeros(4, 3, 64, 64)).shape
        torch.Size([4, 64, 32, 32])
    """
    return nn.Conv2d(in_channels, STEM_CHANNELS, 3, stride=2, padding=1, bias=False)


def _group(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        PreActBlock(in_channels, out_channels, stride), PreActBlock(out_channels, out_channels, 1)
    )
