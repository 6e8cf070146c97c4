"""Generated photographs of different sizes and kinds, as files and as torchvision reads them."""

import numpy as np
from PIL import Image, ImageOps

WIDTH, HEIGHT = 61, 43
KINDS = ("rgb.jpg", "rgb.png", "turned.jpg", "grey.jpg", "grey.png", "alpha.png", "cmyk.jpg")


def smooth_image(width=WIDTH, height=HEIGHT, seed=0):
    """Draw a smooth RGB image, like a photograph at a high resolution."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def ramp_image(width, height):
    """Draw an image whose red is the column, and whose green the row, in half levels per pixel."""
    rows, columns = np.indices((height, width)) / 2
    pixels = np.stack([columns, rows, np.full_like(rows, 99)], 2)
    return Image.fromarray(pixels.round().astype(np.uint8))


def write_turned(path, image, orientation, **settings):
    """Write an upright image as a camera does that was held in another way."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = {6: 8, 8: 6}.get(orientation, orientation)  # the inverse of each turn
    turn = Image.Exif()
    turn[0x0112] = stored
    image = image.copy()
    image.info["exif"] = turn.tobytes()
    ImageOps.exif_transpose(image).save(path, exif=exif, **settings)


def write_photo(path, image):
    """Write an image as the kind of file that its name says."""
    kind, settings = path.stem.partition("-")[0], {"quality": 95}
    if kind == "turned":
        write_turned(path, image, 6, **settings)
    elif kind == "grey":
        image.convert("L").save(path, **settings)
    elif kind == "cmyk":
        image.convert("CMYK").save(path, **settings)
    elif kind == "alpha":
        image.putalpha(image.convert("L"))
        image.save(path)
    else:
        image.save(path, **settings)


def read_upright(path):
    """Read an image as a user of torchvision would: upright, on white, RGB."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode == "RGBA":
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def write_photos(root, per_class=4, num_test=2):
    """Write a folder of two classes with photographs of every kind, each of another size."""
    for part, count in (("train", per_class), ("test", num_test)):
        for number, label in enumerate(("cat", "dog")):
            for index in range(count):
                seed = 100 * number + index + 50 * (part == "test")
                kind, dot, extension = KINDS[seed % len(KINDS)].partition(".")
                path = root / part / label / f"{kind}-{index:03}{dot}{extension}"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_photo(path, smooth_image(WIDTH + 5 * index, HEIGHT + 3 * seed % 40, seed))
    return root
