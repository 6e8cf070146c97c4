"""Corrupted test images: the official CIFAR-10-C and CIFAR-100-C, and built-in corruptions.

Shapes: n test images of C channels, H × W pixels, uint8.
Source: Hendrycks, Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019; severities as in its CIFAR-10-C.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from mixmo_fastai.data.decoding import image_to_tensor
from mixmo_fastai.errors import InputError
from mixmo_fastai.rng import make_generator

NUM_SEVERITIES = 5
OFFICIAL_TYPES = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
"""The types averaged in published results; the archives hold four more, for validation."""


@dataclass(frozen=True)
class CorruptedPart:
    """The test images with one corruption at one severity.

    Attributes:
        kind: name of the corruption.
        severity: severity, 1 to 5.
        pixels: (n, C, H, W) uint8.
        labels: (n,) int64.
    """

    kind: str
    severity: int
    pixels: Tensor
    labels: Tensor


def read_official(folder: Path) -> Iterator[CorruptedPart]:
    """Load CIFAR-10-C or CIFAR-100-C, one corruption and severity at a time.

    Each file holds the n test images at five increasing severities as (5n, 32, 32, 3) uint8;
    labels.npy holds their labels, (5n,). All files are checked before the first part is returned;
    pixels are read when needed.

    Raises:
        InputError: a file is missing, truncated or has another shape or type; the message names it.
    """
    labels = _load(folder / "labels.npy")
    if labels.ndim != 1 or len(labels) % NUM_SEVERITIES or labels.dtype.kind not in "iu":
        raise InputError(
            f"{folder / 'labels.npy'} must hold integers, five times the test set; got "
            f"{labels.dtype} of shape {labels.shape}."
        )
    files = {kind: _load(folder / f"{kind}.npy") for kind in OFFICIAL_TYPES}
    for kind, array in files.items():
        if array.shape != (len(labels), 32, 32, 3) or array.dtype != np.uint8:
            raise InputError(
                f"{folder / kind}.npy must be uint8 of shape ({len(labels)}, 32, 32, 3); got "
                f"{array.dtype} of shape {array.shape}."
            )
    num_images = len(labels) // NUM_SEVERITIES
    for kind, array in files.items():
        for severity in range(1, NUM_SEVERITIES + 1):
            part = slice((severity - 1) * num_images, severity * num_images)
            pixels = torch.from_numpy(np.array(array[part])).permute(0, 3, 1, 2).contiguous()
            part_labels = torch.from_numpy(np.array(labels[part]).astype(np.int64))
            yield CorruptedPart(kind, severity, pixels, part_labels)


def make_corrupted(
    pixels: Tensor, labels: Tensor, device: torch.device | str = "cpu", *, seed: int = 0
) -> Iterator[CorruptedPart]:
    """Apply every corruption of `BUILT_IN` to test images, at five severities.

    Args:
        pixels: (n, C, H, W) uint8, with 1 or 3 channels.
        labels: (n,).
        device: device of the computation.
        seed: seed of the noise.
    """
    for kind, (corrupt, strengths) in BUILT_IN.items():
        for severity, strength in enumerate(strengths, 1):
            generator = make_generator(seed, "corruption", step=severity, device=device)
            batches = [
                corrupt(batch.to(device), strength, generator) for batch in pixels.split(_BATCH)
            ]
            yield CorruptedPart(kind, severity, torch.cat(batches).cpu(), labels)


def add_noise(pixels: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise with standard deviation `strength`, for pixels in [0, 1]."""
    noise = torch.randn(pixels.shape, generator=generator, device=pixels.device)
    return _as_bytes(pixels / 255 + strength * noise)


def blur(pixels: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Apply a Gaussian blur with standard deviation `strength`, in pixels."""
    size = 2 * int(4 * strength + 0.5) + 1
    blurred: Tensor = transforms.gaussian_blur(pixels, [size, size], [strength, strength])
    return blurred


def brighten(pixels: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Add `strength` to pixels in [0, 1]."""
    return _as_bytes(pixels / 255 + strength)


def lower_contrast(pixels: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Scale the deviation of each channel from its mean by `strength`, per image."""
    scaled = pixels / 255
    mean = scaled.mean(dim=(2, 3), keepdim=True)
    return _as_bytes(mean + strength * (scaled - mean))


def pixelate(pixels: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Shrink to the fraction `strength` of the size, then enlarge without interpolation."""
    size = list(pixels.shape[2:])
    small = [max(1, int(side * strength)) for side in size]
    nearest = transforms.InterpolationMode.NEAREST
    shrunk = transforms.resize(pixels, small, antialias=True)
    grown: Tensor = transforms.resize(shrunk, size, interpolation=nearest)
    return grown


def compress(pixels: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Compress as JPEG with quality `strength`; Pillow does this on the CPU."""
    return torch.stack([_through_jpeg(i, int(strength)) for i in pixels.cpu()]).to(pixels.device)


Corruption = Callable[[Tensor, float, torch.Generator], Tensor]
BUILT_IN: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "noise": (add_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "blur": (blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "brightness": (brighten, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (lower_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg": (compress, (80, 65, 58, 50, 40)),
}
"""Corruptions for any data: a function, and its strength at severities 1 to 5."""
_BATCH = 1000


def _through_jpeg(image: Tensor, quality: int) -> Tensor:
    """Encode and decode one image (C, H, W)."""
    values = image.permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(values[:, :, 0] if len(image) == 1 else values).save(
        file, "JPEG", quality=quality
    )
    with Image.open(file) as compressed:
        return image_to_tensor(compressed, channels=len(image))


def _as_bytes(values: Tensor) -> Tensor:
    """Clamp values to [0, 1] and convert them to uint8."""
    return (values.clamp(0, 1) * 255).round().to(torch.uint8)


def _load(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing.\nUse the folder of CIFAR-10-C or CIFAR-100-C, with labels.npy "
            f"and {len(OFFICIAL_TYPES)} types such as fog.npy, or 'built-in'."
        ) from None
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path} is truncated or not a NumPy file: {reason}.\nDownload it again."
        ) from error
    return array
