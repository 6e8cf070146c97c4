"""Decode image files to uint8 tensors: RGB or greyscale, upright, of one size.

Shapes: n images of C channels, H × W pixels, uint8.
"""

import errno
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mixmo_fastai.data.depth import to_eight_bits
from mixmo_fastai.errors import InputError
from mixmo_fastai.runtime.cpus import available_cpus
from mixmo_fastai.runtime.progress import counted

BATCH = 32
"""Images decoded by a thread per task: enough to make the cost of a task negligible."""

_SHRINKS = (8, 4, 2, 1)
"""Factors by which libjpeg can reduce height and width of a JPEG image while decoding it."""

_MIRRORED_ROWS, _MIRRORED_COLUMNS = (3, 4, 7, 8), (2, 3, 6, 7)
"""EXIF orientations whose first upright row or column is the last of a stored row or column."""

_ROTATED = range(2, 9)
"""EXIF orientations of images that are not upright; from 5 on, height and width are swapped."""

_DAMAGE = ("data stream", "decoder error", "decoder object", "broken")
"""Words in Pillow's errors about damaged data. For truncated files, it uses "truncated"."""

_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

_Result = TypeVar("_Result", bound=Sized)


class UndecodableError(InputError):
    """An image file cannot be decoded.

    Attributes:
        reason: the reason, without file name and period.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


def decode_image(path: Path, size: tuple[int, int] | None = None, *, channels: int = 3) -> Tensor:
    """Decode an image file to (C, H, W) uint8.

    The EXIF orientation is applied, 16 and 32 bits are converted to 8 by `to_eight_bits`, and
    transparent images are composited onto white. An image of another size is resized with
    antialiasing to cover the target size, then centre-cropped.

    Args:
        path: the file, in any format and colour mode that Pillow supports.
        size: (H, W) of the result; None keeps the size of the image.
        channels: 3 for RGB, 1 for greyscale.

    Raises:
        InputError: the file is missing, truncated or not an image; the message names it.
    """
    with _opened(path) as image:
        return image_to_tensor(image, size, channels=channels)


def image_to_tensor(
    image: Image.Image, size: tuple[int, int] | None = None, *, channels: int = 3
) -> Tensor:
    """Convert an open image to (C, H, W) uint8; see `decode_image`.

    Raises:
        ValueError: the image has pixels that are not finite.
        OSError: the image is truncated.
    """
    image.load()  # raises errors that reading the orientation would suppress
    plain = _opaque(_upright(image)).convert("L" if channels == 1 else "RGB")
    if size is not None and plain.size != size[::-1]:
        plain = ImageOps.fit(plain, size[::-1], Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(plain))  # (H, W) or (H, W, 3)
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def decode_boxes(path: Path, choose: Callable[[int, int], Tensor], size: tuple[int, int]) -> Tensor:
    """Decode boxes of an image file, each resized with antialiasing to one size.

    As in `decode_image`, the image is upright, opaque and RGB. A JPEG file is decoded at a half, a
    quarter or an eighth of its height and width if all boxes then still are as large as the result.

    Args:
        path: the file.
        choose: maps the upright height and width of the image to n boxes (n, 4): top, left, height,
            width.
        size: (H, W) of the result.

    Returns:
        (n, H, W, 3) uint8, channels last.

    Raises:
        InputError: the file is missing, truncated or not an image; the message names it.
    """
    with _opened(path) as image:
        height, width = _size_of(image)
        boxes = choose(height, width)
        shrink = _shrink(image, boxes, size)
        image.load()
        orientation = _orientation(image)
        plain = _upright(image)
        # A reduced image ends with the stored rows and columns, and is padded if they do not fill
        # its last pixels. In a mirrored image, this padding comes first.
        top = shrink * plain.height - height if orientation in _MIRRORED_ROWS else 0
        left = shrink * plain.width - width if orientation in _MIRRORED_COLUMNS else 0
        pixels = np.empty((len(boxes), *size, 3), np.uint8)
        for row, box in zip(pixels, boxes.tolist(), strict=True):
            row[:] = _resized_box(plain, (box[0] + top, box[1] + left, *box[2:]), shrink, size)
    return torch.from_numpy(pixels)


def _shrink(image: Image.Image, boxes: Tensor, size: tuple[int, int]) -> int:
    """Let a JPEG image be decoded at a smaller size that suffices for boxes (n, 4).

    Returns:
        the factor by which height and width are smaller; 1 for other images.
    """
    if image.format not in ("JPEG", "MPO"):
        return 1
    ratio = (boxes[:, 2:] / torch.tensor(size)).min().item()
    shrink = next((factor for factor in _SHRINKS if factor <= ratio), 1)
    reduced = (max(1, image.width // shrink), max(1, image.height // shrink))
    width = image.width
    drafted = image.draft(None, reduced)
    return 1 if drafted is None else round(width / drafted[1][2])


def _resized_box(
    image: Image.Image, box: tuple[int, ...], shrink: int, size: tuple[int, int]
) -> Image.Image:
    """Resize a box (top, left, height, width) of an image that was reduced by a factor."""
    top, left, height, width = (side / shrink for side in box)
    corner = (math.floor(left), math.floor(top))
    bottom, right = top + height, left + width
    region = image.crop((*corner, math.ceil(right), math.ceil(bottom)))  # as torchvision crops
    inner = (left - corner[0], top - corner[1], right - corner[0], bottom - corner[1])
    return _rgb(region).resize(size[::-1], Image.Resampling.BILINEAR, inner)


def _rgb(image: Image.Image) -> Image.Image:
    opaque = _opaque(image)
    return opaque if opaque.mode == "RGB" else opaque.convert("RGB")


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

    return _in_threads(decode, paths, "Decoding images")


def image_sizes(paths: Sequence[Path]) -> Iterator[tuple[int, int]]:
    """Read the upright (H, W) of image files from their headers, in the order of the paths.

    Raises:
        InputError: a file is missing or not an image; the message names it.
    """
    for sizes in _in_threads(
        lambda chunk: [*map(_upright_size, chunk)], paths, "Reading image sizes"
    ):
        yield from sizes


def undecodable(paths: Sequence[Path]) -> Iterator[str | None]:
    """Decode files in threads; for each, return the reason why it cannot be decoded, or None."""

    def reason(path: Path) -> str | None:
        try:
            decode_image(path)
        except UndecodableError as error:
            return error.reason
        return None

    for reasons in _in_threads(lambda chunk: [*map(reason, chunk)], paths, "Checking images"):
        yield from reasons


UNSUPPORTED = frozenset(
    (".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf")
)
"""Suffixes of photographs that Pillow reads only with a plugin: those of phones and cameras."""


def is_unsupported(name: str) -> bool:
    """Check by name whether a file is a photograph in a format that cannot be read."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix in UNSUPPORTED and suffix not in _extensions() and not name.startswith(".")


def is_image(name: str) -> bool:
    """Check by name whether a file is an image that Pillow can read, and is not hidden."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in _extensions()


@cache
def _extensions() -> frozenset[str]:
    known = Image.registered_extensions()
    return frozenset(extension for extension, kind in known.items() if kind in Image.OPEN)


def _in_threads(
    function: Callable[[Sequence[Path]], _Result], paths: Sequence[Path], task: str
) -> Iterator[_Result]:
    # Pillow releases the GIL while decoding, so threads suffice.
    chunks: Iterable[Sequence[Path]] = (
        paths[start : start + BATCH] for start in range(0, len(paths), BATCH)
    )
    with ThreadPoolExecutor(available_cpus().count) as pool:
        yield from counted(pool.map(function, chunks), task, len(paths))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        # Open the file first: given a name, Pillow memory-maps some TIFF files and mixes up their
        # rows.
        with path.open("rb") as file, Image.open(file) as image:
            yield image
    except Exception as error:  # a decoder may raise any exception on damaged data
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in _SHORTAGES:
            raise  # not caused by the file
        reason, advice = _explain(path, error)
        message = f"Cannot decode the image {path}: {reason}.\n{advice}"
        raise UndecodableError(message, reason) from error


def _explain(path: Path, error: Exception) -> tuple[str, str]:
    """Return the reason why an image cannot be decoded, and advice."""
    if isinstance(error, Image.DecompressionBombError) and (size := re.search(r"\d+", str(error))):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        return (
            f"it has {int(size[0]) / 1e6:.0f} megapixels, and the limit is {limit}",
            "Save it at a smaller size: images are resized to the training size anyway.",
        )
    if isinstance(error, ValueError) and "not finite" in str(error):
        return str(error), "Save it with 8 or 16 bits per pixel."
    replace = "Replace it with an intact image, or remove it."
    if isinstance(error, UnidentifiedImageError):
        if is_unsupported(name := str(path)):  # of a path, or of an image in a data set
            suffix = os.path.splitext(name)[1]
            return f"the format {suffix} is not supported", "Convert it to JPEG or PNG."
        is_empty = path.stat().st_size == 0
        unidentified = "it is damaged, or not in a known image format"
        return ("the file is empty" if is_empty else unidentified), replace
    if isinstance(error, OSError) and error.strerror:
        return error.strerror, replace
    return _readable(str(error).partition("\n")[0] or type(error).__name__), replace


def _readable(message: str) -> str:
    """Return a readable form of the most common error messages of Pillow."""
    if "truncated" in message.lower():
        return "the file is truncated"
    if any(words in message for words in _DAMAGE):
        return f"the file is damaged ({message})"
    return message


def _upright_size(path: Path) -> tuple[int, int]:
    with _opened(path) as image:
        return _size_of(image)


def _size_of(image: Image.Image) -> tuple[int, int]:
    """Return the upright (H, W) of an open image."""
    orientation = _orientation(image)
    if image.format == "TIFF" and orientation in _ROTATED:
        image.load()  # rotates TIFF; the size before depends on the version of Pillow
        orientation = 1
    width, height = image.size
    return (width, height) if orientation >= 5 else (height, width)


def _upright(image: Image.Image) -> Image.Image:
    """Rotate a loaded image upright; convert greyscale pixels to 8 bits."""
    # Pillow rotates TIFF images on loading, and older versions keep the orientation tag.
    orientation = 1 if image.format == "TIFF" else _orientation(image)
    plain = to_eight_bits(image)
    if orientation == 1:
        return plain
    # Keep only the orientation: other tags may be damaged, and Pillow writes them all again.
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    copied = plain.copy()
    copied.info = {**plain.info, "exif": tags.tobytes()}
    return ImageOps.exif_transpose(copied)


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # the pixels of an image with damaged tags are still usable
        return 1
    return orientation if orientation in _ROTATED else 1


def _opaque(image: Image.Image) -> Image.Image:
    # Fully transparent pixels have arbitrary colours, which must not reach the network.
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
