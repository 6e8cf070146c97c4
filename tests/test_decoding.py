import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mixmo_fastai.data.decoding import (
    BATCH,
    decode_batches,
    decode_image,
    image_sizes,
    is_image,
)
from mixmo_fastai.errors import InputError


def save(path, array, mode=None, **options):
    Image.fromarray(np.asarray(array)).convert(mode).save(path, **options)
    return path


def one_colour(colour, size=(6, 4)):
    return np.full((*size, len(colour)), colour, dtype=np.uint8)


@pytest.mark.parametrize(
    ("mode", "extension"),
    [("RGB", ".png"), ("CMYK", ".tif"), ("RGBA", ".png"), ("P", ".gif"), ("P", ".png")],
)
def test_every_colour_mode_becomes_rgb(tmp_path, mode, extension):
    path = save(tmp_path / f"red{extension}", one_colour((255, 0, 0)), mode)
    pixels = decode_image(path)
    assert pixels.shape == (3, 6, 4)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    assert pixels[:, 2, 2].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_images_become_three_equal_channels(tmp_path, mode):
    path = save(tmp_path / "white.png", np.full((5, 5), 255, dtype=np.uint8), mode)
    assert decode_image(path).eq(255).all()
    assert decode_image(path, channels=1).shape == (1, 5, 5)


@pytest.mark.parametrize("extension", [".png", ".tif"])
def test_sixteen_bits_become_eight(tmp_path, extension):
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / f"deep{extension}")
    assert decode_image(tmp_path / f"deep{extension}")[0, 0].tolist() == [0, 1, 128, 255]


def test_thirty_two_bits_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(InputError, match=r"float\.tif.*32 bits"):
        decode_image(tmp_path / "float.tif")


def test_transparency_is_laid_over_white(tmp_path):
    pixels = one_colour((10, 20, 30, 0))
    pixels[0] = (10, 20, 30, 255)
    decoded = decode_image(save(tmp_path / "clear.png", pixels))
    assert decoded[:, 0, 0].tolist() == [10, 20, 30]
    assert decoded[:, 1:].eq(255).all()


def test_palette_with_transparency_is_laid_over_white(tmp_path):
    image = Image.new("P", (3, 3), 1)
    image.putpalette([9, 9, 9, 50, 60, 70])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "clear.png", transparency=b"\x00\xff")
    decoded = decode_image(tmp_path / "clear.png")
    assert decoded[:, 0, 0].tolist() == [255, 255, 255]
    assert decoded[:, 2, 2].tolist() == [50, 60, 70]


@pytest.mark.parametrize("extension", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("orientation", range(10))
def test_the_orientation_of_a_photograph_is_applied(tmp_path, orientation, extension):
    noise = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"turned{extension}", noise, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    decoded = decode_image(path)
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), expected)
    assert list(image_sizes([path])) == [tuple(decoded.shape[1:])]


@pytest.mark.parametrize("notes", [b"no tags", b"II*\0\x08\0\0\0\xff\xff\x12\x01"])
@pytest.mark.parametrize("extension", [".png", ".jpg", ".webp"])
def test_a_damaged_orientation_is_overlooked(tmp_path, extension, notes):
    path = save(tmp_path / f"image{extension}", one_colour((9, 9, 9)), exif=b"Exif\0\0" + notes)
    with warnings.catch_warnings(action="ignore"):
        assert decode_image(path).shape == (3, 6, 4)
        assert list(image_sizes([path])) == [(6, 4)]


def test_another_shape_is_cropped_at_the_centre(tmp_path):
    thirds = np.repeat(one_colour((0, 0, 0), (20, 60))[None], 1, axis=0)[0]
    thirds[:, 20:40] = (0, 255, 0)
    decoded = decode_image(save(tmp_path / "wide.png", thirds), (10, 10))
    assert decoded.shape == (3, 10, 10)
    assert decoded[1, :, 1:-1].eq(255).all()


def test_a_target_need_not_be_square(tmp_path):
    path = save(tmp_path / "image.png", one_colour((1, 2, 3), (50, 50)))
    assert decode_image(path, (12, 30)).shape == (3, 12, 30)


def test_scaling_down_is_antialiased(tmp_path):
    checkers = np.indices((64, 64)).sum(0) % 2 * 255
    path = save(tmp_path / "checkers.png", checkers.astype(np.uint8))
    decoded = decode_image(path, (8, 8)).float()
    assert decoded.sub(127.5).abs().max() < 10


def test_an_image_of_the_target_size_keeps_its_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    decoded = decode_image(save(tmp_path / "noise.png", pixels), (9, 7))
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize("extension", [".png", ".jpg", ".gif", ".bmp"])
def test_a_truncated_image_is_named(tmp_path, extension):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = save(tmp_path / f"cut{extension}", noise)
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(InputError, match=r"Cannot decode the image .*cut") as caught:
        decode_image(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"GIF89a\x01"])
@pytest.mark.parametrize("read", [decode_image, lambda path: list(image_sizes([path]))])
def test_what_is_no_image_is_named(tmp_path, content, read):
    path = tmp_path / "text.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"text\.png"):
        read(path)


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png: No such file"):
        decode_image(tmp_path / "gone.png")


def test_batches_keep_the_order(tmp_path):
    count = 2 * BATCH + 3
    paths = [
        save(tmp_path / f"{level:03}.png", np.full((2, 2), level % 256, dtype=np.uint8))
        for level in range(count)
    ]
    batches = list(decode_batches(paths, (2, 2)))
    assert [len(batch) for batch in batches] == [BATCH, BATCH, 3]
    assert torch.cat(batches)[:, 0, 0, 0].tolist() == [level % 256 for level in range(count)]
    assert list(image_sizes(paths)) == [(2, 2)] * count


def test_batches_name_the_image_that_fails(tmp_path):
    good = save(tmp_path / "good.png", one_colour((1, 2, 3)))
    (tmp_path / "bad.png").write_bytes(b"bad")
    with pytest.raises(InputError, match=r"bad\.png"):
        list(decode_batches([good] * BATCH + [tmp_path / "bad.png"], (6, 4)))


def test_no_paths_give_no_batches():
    assert list(decode_batches([], (2, 2))) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", True),
        ("a.JPEG", True),
        ("a.webp", True),
        (".a.jpg", False),
        ("a.txt", False),
        ("jpg", False),
        ("Thumbs.db", False),
    ],
)
def test_images_are_told_by_their_names(name, expected):
    assert is_image(name) is expected
