"""WideResNet-d-k for small images, pre-activation.

Source: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, with the details of the
published MixMo networks, verified by the golden values in the tests: a block's *second*
convolution has the stride, with its input padded on the right and at the bottom only, and the
shortcut is a convolution of the block's raw input.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mixmo_fastai.models.readout import average


class WideBlock(nn.Module):
    """BN-ReLU-conv, BN-ReLU-conv with the stride, plus the shortcut.

    Example:
        >>> WideBlock(16, 32, stride=2)(torch.zeros(4, 16, 8, 8)).shape
        torch.Size([4, 32, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(
            out_channels, out_channels, 3, stride, padding=1 if stride == 1 else 0, bias=False
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        y = F.relu(self.bn2(y))
        if self.stride != 1:
            # Pad by one on the right and at the bottom, as published. An odd side, which does not
            # occur in the published networks, is also padded on the left or at the top, to match
            # the size of the shortcut.
            y = F.pad(y, (y.shape[3] % 2, 1, y.shape[2] % 2, 1))
        out: Tensor = self.conv2(y) + self.shortcut(x)
        return out


class WideResNetCore(nn.Module):
    """A WideResNet without its first convolution and its last linear layer.

    Args:
        depth: d = 6n + 4.
        width: k.

    Shapes: (B, 16, h, w) -> (B, 64k).

    Example:
        >>> WideResNetCore(depth=10, width=1)(torch.zeros(4, 16, 32, 32)).shape
        torch.Size([4, 64])
    """

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        blocks_per_group = (depth - 4) // 6
        widths = [STEM_CHANNELS, 16 * width, 32 * width, 64 * width]
        self.groups = nn.Sequential(
            *(
                _group(widths[i], widths[i + 1], blocks_per_group, stride=1 if i == 0 else 2)
                for i in range(3)
            )
        )
        self.bn = nn.BatchNorm2d(widths[3])
        self.out_features = widths[3]

    def maps(self, features: Tensor) -> Tensor:
        """Compute feature maps before pooling: (B, 16, h, w) -> (B, 64k, h/4, w/4).

        Example:
            >>> WideResNetCore(depth=10, width=1).maps(torch.zeros(4, 16, 32, 32)).shape
            torch.Size([4, 64, 8, 8])
        """
        return F.relu(self.bn(self.groups(features)))

    def forward(self, x: Tensor) -> Tensor:
        return average(self.maps(x))


STEM_CHANNELS = 16


def stem(in_channels: int) -> nn.Conv2d:
    """Build one encoder: (B, C, H, W) -> (B, 16, H, W).

    Example:
        >>> stem(in_channels=3)(torch.zeros(4, 3, 32, 32)).shape
        torch.Size([4, 16, 32, 32])
    """
    return nn.Conv2d(in_channels, STEM_CHANNELS, 3, padding=1, bias=False)


def _group(in_channels: int, out_channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    first = WideBlock(in_channels, out_channels, stride)
    rest = (WideBlock(out_channels, out_channels, 1) for _ in range(num_blocks - 1))
    return nn.Sequential(first, *rest)
