"""Image files to uint8 tensors: any colour mode to RGB or grey, upright, one size.

Shapes: n images of C channels, H × W pixels, uint8.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mixmo_fastai.errors import InputError

BATCH = 128
"""Images that one thread decodes in a row: enough to hide the cost of handing them over."""

_UPRIGHT = {  # what turns an image of each EXIF orientation upright; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_Result = TypeVar("_Result")


def decode_image(path: Path, size: tuple[int, int] | None = None, *, channels: int = 3) -> Tensor:
    """Decode an image file to (C, H, W) uint8.

    The EXIF orientation is applied, 16 bits become 8 and transparency is laid over white. An image
    of another size is scaled, antialiased, until it covers the target, then cropped at the centre.

    Args:
        path: the file, in any format and colour mode that Pillow reads.
        size: (H, W) of the result; None keeps that of the image.
        channels: 3 for RGB, 1 for grey.

    Raises:
        InputError: the file is missing, truncated or not an image; the message names it.
    """
    with _opened(path) as image:
        return image_to_tensor(image, size, channels=channels)


def image_to_tensor(
    image: Image.Image, size: tuple[int, int] | None = None, *, channels: int = 3
) -> Tensor:
    """Turn an opened image into (C, H, W) uint8; see `decode_image`.

    Raises:
        ValueError: it has 32 bits per pixel.
        OSError: it is truncated.
    """
    image.load()  # before the orientation is asked for, whose errors are overlooked
    plain = _opaque(_eight_bit(_upright(image))).convert("L" if channels == 1 else "RGB")
    if size is not None and plain.size != size[::-1]:
        plain = ImageOps.fit(plain, size[::-1], Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(plain))  # (H, W) or (H, W, 3)
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def decode_batches(paths: Sequence[Path], size: tuple[int, int]) -> Iterator[Tensor]:
    """Decode files in threads to batches (n, 3, H, W), in the order of the paths.

    Raises:
        InputError: a file cannot be decoded; the message names it.
    """

    def decode(chunk: Sequence[Path]) -> Tensor:
        pixels = torch.empty((len(chunk), 3, *size), dtype=torch.uint8)
        for row, path in zip(pixels, chunk, strict=True):
            row.copy_(decode_image(path, size))
        return pixels

    return _in_threads(decode, paths)


def image_sizes(paths: Sequence[Path]) -> Iterator[tuple[int, int]]:
    """Read the upright (H, W) of image files from their headers, in the order of the paths.

    Raises:
        InputError: a file is missing or not an image; the message names it.
    """
    for sizes in _in_threads(lambda chunk: [_upright_size(path) for path in chunk], paths):
        yield from sizes


def is_image(name: str) -> bool:
    """Tell by its name whether a file is an image that Pillow reads, and not hidden."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in _extensions()


@cache
def _extensions() -> frozenset[str]:
    known = Image.registered_extensions()
    return frozenset(extension for extension, kind in known.items() if kind in Image.OPEN)


def _in_threads(
    function: Callable[[Sequence[Path]], _Result], paths: Sequence[Path]
) -> Iterator[_Result]:
    # Pillow decodes without the interpreter lock, so threads suffice and copy nothing.
    chunks: Iterable[Sequence[Path]] = (
        paths[start : start + BATCH] for start in range(0, len(paths), BATCH)
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(function, chunks)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # a decoder may raise anything on damaged bytes
        raise InputError(
            f"Cannot decode the image {path}: {_reason(error)}.\n"
            "Replace it by an intact image, or remove it."
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is damaged, or in no known image format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0] or type(error).__name__


def _upright_size(path: Path) -> tuple[int, int]:
    with _opened(path) as image:
        width, height = image.size
        sideways = _orientation(image) >= 5
    return (width, height) if sideways else (height, width)


def _upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    return image if orientation == 1 else image.transpose(_UPRIGHT[orientation])


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged notes on an image do not make its pixels unusable
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _eight_bit(image: Image.Image) -> Image.Image:
    if not image.mode.startswith(("I", "F")):
        return image
    levels = np.asarray(image)
    if image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
        raise ValueError("it has 32 bits per pixel; save it with 8 or 16")
    return Image.fromarray(np.rint(levels / 257).astype(np.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    # Pixels under full transparency have an arbitrary colour, which must not reach the network.
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
