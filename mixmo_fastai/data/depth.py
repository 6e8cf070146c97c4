"""Grey pixels of more than 8 bits, scaled to 8.

A file says how many bits its pixels have, and seldom which of them are used: cameras and scanners
write 12 bits into files of 16, and programs write 32-bit numbers in any unit.
"""

import numpy as np
from PIL import Image

_SCALES = (2**8 - 1, 2**12 - 1, 2**16 - 1)
"""Highest levels that 16-bit files are written with."""
_SCALED_BY_PILLOW = ("PPM", "JPEG2000")
_TIFF_BITS = 258  # the tag BitsPerSample
_DARKEST = 1 / 16  # highest value of floating-point pixels that are in [0, 1], and not in a unit


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey pixels of 16 or 32 bits to 8; leave other images as they are.

    - 16 bits: the file's own depth, or the least of 8, 12 and 16 bits that holds every pixel.
    - 32 bits, whole numbers: the lowest pixel becomes 0, the highest 255.
    - 32 bits, floating point: 0 to 1 become 0 to 255; other ranges as for whole numbers.

    Pixels of the level that the file calls transparent become white.

    Raises:
        ValueError: a pixel is not a finite number.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    levels = np.asarray(image)
    clear = image.info.get("transparency")
    is_clear = levels == clear if isinstance(clear, int) else np.zeros(levels.shape, bool)
    shown = levels[~is_clear]
    if not np.isfinite(shown).all():
        raise ValueError("it has pixels that are not finite numbers")
    ends = (float(shown.min()), float(shown.max())) if shown.size else (0.0, 0.0)
    low, high = _range_of(image, *ends)
    scaled = (levels.astype(np.float64) - low) * 255 / max(high - low, np.finfo(np.float32).tiny)
    return Image.fromarray(np.where(is_clear, 255, np.rint(scaled)).astype(np.uint8))


def _range_of(image: Image.Image, lowest: float, highest: float) -> tuple[float, float]:
    """Choose the levels that become 0 and 255."""
    is_16_bit = image.mode.startswith("I;16") or image.format == "PNG"  # which was "I" in Pillow 10
    if image.mode == "I" and image.format in _SCALED_BY_PILLOW:
        return 0, _SCALES[-1]
    if is_16_bit:
        return 0, _declared(image) or next(scale for scale in _SCALES if highest <= scale)
    if image.mode == "F" and lowest >= 0 and _DARKEST <= highest <= 1:
        return 0, 1
    return (lowest if lowest < highest else min(lowest, 0)), highest


def _declared(image: Image.Image) -> int | None:
    """Read the highest level that a file of less than 16 bits can hold."""
    if image.format == "JPEG2000":
        return _SCALES[-1]
    bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS, (16,))[0]
    return 2**bits - 1 if 8 < bits < 16 else None
