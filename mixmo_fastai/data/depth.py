"""Conversion of greyscale images with more than 8 bits per pixel to 8 bits.

A file states how many bits its pixels have, but rarely how many are used: cameras and scanners
write 12 bits into 16-bit files, and programs write 32-bit numbers in any unit.
"""

import numpy as np
from PIL import Image

_SCALES = (2**8 - 1, 2**12 - 1, 2**16 - 1)
"""Maximum pixel values used in 16-bit files."""
_SCALED_BY_PILLOW = ("PPM", "JPEG2000")
_TIFF_BITS = 258  # the tag BitsPerSample
_MIN_PEAK = 1 / 16  # floating-point pixels are taken to be in [0, 1] if their maximum is above this


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert a greyscale image of 16 or 32 bits to 8 bits; return other images unchanged.

    - 16 bits: scaled from the depth stated in the file, or from the smallest of 8, 12 and 16 bits
      that holds every pixel.
    - 32-bit integers: the minimum becomes 0, the maximum 255.
    - 32-bit floating point: [0, 1] becomes [0, 255]; other ranges as for integers.

    Pixels with the value that the file marks as transparent become white.

    Raises:
        ValueError: a pixel is not finite.
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
    """Return the pixel values that become 0 and 255."""
    is_16_bit = image.mode.startswith("I;16") or image.format == "PNG"  # mode "I" in Pillow 10
    if image.mode == "I" and image.format in _SCALED_BY_PILLOW:
        return 0, _SCALES[-1]
    if is_16_bit:
        return 0, _declared_maximum(image) or next(scale for scale in _SCALES if highest <= scale)
    if image.mode == "F" and lowest >= 0 and _MIN_PEAK <= highest <= 1:
        return 0, 1
    return (lowest if lowest < highest else min(lowest, 0)), highest


def _declared_maximum(image: Image.Image) -> int | None:
    """Return the maximum pixel value for the bit depth stated in the file, if any."""
    if image.format == "JPEG2000":
        return _SCALES[-1]
    bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS, (16,))[0]
    return 2**bits - 1 if 8 < bits < 16 else None
