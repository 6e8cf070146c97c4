import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mixmo_fastai.data.decoding import (
    BATCH,
    UndecodableError,
    decode_batches,
    decode_image,
    image_sizes,
    is_image,
)
from mixmo_fastai.errors import InputError


def save(path, array, mode=None, **options):
    Image.fromarray(np.asarray(array)).convert(mode).save(path, **options)
    return path


def uniform_image(colour, size=(6, 4)):
    return np.full((*size, len(colour)), colour, dtype=np.uint8)


@pytest.mark.parametrize(
    ("mode", "extension"),
    [("RGB", ".png"), ("CMYK", ".tif"), ("RGBA", ".png"), ("P", ".gif"), ("P", ".png")],
)
def test_colour_modes_are_converted_to_rgb(tmp_path, mode, extension):
    path = save(tmp_path / f"red{extension}", uniform_image((255, 0, 0)), mode)
    pixels = decode_image(path)
    assert pixels.shape == (3, 6, 4)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    assert pixels[:, 2, 2].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_greyscale_images_have_three_equal_channels(tmp_path, mode):
    path = save(tmp_path / "white.png", np.full((5, 5), 255, dtype=np.uint8), mode)
    assert decode_image(path).eq(255).all()
    assert decode_image(path, channels=1).shape == (1, 5, 5)


@pytest.mark.parametrize("extension", [".png", ".tif"])
def test_16_bit_images_are_scaled_to_8_bits(tmp_path, extension):
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / f"deep{extension}")
    assert decode_image(tmp_path / f"deep{extension}")[0, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("extension", [".png", ".tif"])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_levels_of_lower_depth_in_16_bits_are_scaled(tmp_path, bits, extension):
    levels = np.linspace(0, 2**bits - 1, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / f"deep{extension}")
    assert decode_image(tmp_path / f"deep{extension}")[0].flatten().tolist() == list(range(256))


def test_12_bit_tiff_is_scaled_by_its_stated_depth(tmp_path):
    levels = [0, 16, 1606, 80]
    packed = int("".join(f"{level:012b}" for level in levels), 2).to_bytes(6, "big")
    tags = [  # width, height, bits, compression, colour, offset, samples, rows, bytes
        *((256, 4, 4), (257, 4, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1)),
        *((273, 4, 8), (277, 3, 1), (278, 4, 1), (279, 4, 6)),
    ]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    folder = struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "dark.tif").write_bytes(b"II*\0" + struct.pack("<I", 14) + packed + folder)
    assert decode_image(tmp_path / "dark.tif")[0, 0].tolist() == [0, 1, 100, 5]


def test_netpbm_is_scaled_by_its_stated_maximum(tmp_path):
    (tmp_path / "dark.pgm").write_bytes(b"P5 2 1 4095\n" + struct.pack(">2H", 0, 1638))
    assert decode_image(tmp_path / "dark.pgm")[0, 0].tolist() == [0, 102]


@pytest.mark.parametrize(
    ("dtype", "levels", "expected"),
    [
        (np.int32, [0, 1, 2, 5], [0, 51, 102, 255]),
        (np.int32, [-1000, -500, 0, 3000], [0, 32, 64, 255]),
        (np.int32, [0, 10**9, 10**9, 2 * 10**9], [0, 128, 128, 255]),
        (np.int32, [7, 7, 7, 7], [255] * 4),
        (np.int32, [0, 0, 0, 0], [0] * 4),
        (np.float32, [0, 0.2, 0.4, 0.8], [0, 51, 102, 204]),
        (np.float32, [0, 0.001, 0.002, 0.004], [0, 64, 128, 255]),
        (np.float32, [-1.5, 0, 0, 1.5], [0, 128, 128, 255]),
        (np.float32, [0, 51, 102, 255], [0, 51, 102, 255]),
    ],
)
def test_32_bit_images_are_scaled_by_their_range(tmp_path, dtype, levels, expected):
    Image.fromarray(np.array([levels], dtype=dtype)).save(tmp_path / "scan.tif")
    assert decode_image(tmp_path / "scan.tif")[0, 0].tolist() == expected


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_not_finite_are_refused(tmp_path, value):
    Image.fromarray(np.array([[0.5, value]], dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(InputError, match=r"float\.tif.*not finite") as caught:
        decode_image(tmp_path / "float.tif")
    assert "8 or 16 bits" in str(caught.value)


def encode_16_bit_png(levels, transparent):
    """Encode a row of 16-bit grey levels, one of them transparent, as PNG."""
    header = struct.pack(">IIBBBBB", len(levels), 1, 16, 0, 0, 0, 0)
    row = b"\0" + struct.pack(f">{len(levels)}H", *levels)
    chunks = [
        *((b"IHDR", header), (b"tRNS", struct.pack(">H", transparent))),
        *((b"IDAT", zlib.compress(row)), (b"IEND", b"")),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


@pytest.mark.parametrize(
    ("levels", "transparent", "expected"),
    [
        ([0, 257, 65535, 9000], 257, [0, 255, 255, 35]),
        ([0, 4095, 65535], 65535, [0, 255, 255]),  # a transparent level does not show the bit depth
        ([300, 300], 300, [255, 255]),
    ],
)
def test_transparent_16_bit_grey_becomes_white(tmp_path, levels, transparent, expected):
    (tmp_path / "clear.png").write_bytes(encode_16_bit_png(levels, transparent))
    for channels in (1, 3):
        assert decode_image(tmp_path / "clear.png", channels=channels)[0, 0].tolist() == expected


def test_too_large_image_is_named_with_its_size(tmp_path, monkeypatch):
    path = save(tmp_path / "scan.png", uniform_image((9, 9, 9), (30, 50)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    for read in (decode_image, lambda path: list(image_sizes([path]))):
        with pytest.raises(InputError, match=r"scan\.png.*megapixels.*\n.*smaller") as caught:
            read(path)
        assert "intact" not in str(caught.value)


def test_transparent_images_are_composited_over_white(tmp_path):
    pixels = uniform_image((10, 20, 30, 0))
    pixels[0] = (10, 20, 30, 255)
    decoded = decode_image(save(tmp_path / "clear.png", pixels))
    assert decoded[:, 0, 0].tolist() == [10, 20, 30]
    assert decoded[:, 1:].eq(255).all()


def test_transparent_palettes_are_composited_over_white(tmp_path):
    image = Image.new("P", (3, 3), 1)
    image.putpalette([9, 9, 9, 50, 60, 70])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "clear.png", transparency=b"\x00\xff")
    decoded = decode_image(tmp_path / "clear.png")
    assert decoded[:, 0, 0].tolist() == [255, 255, 255]
    assert decoded[:, 2, 2].tolist() == [50, 60, 70]


@pytest.mark.parametrize("extension", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied(tmp_path, orientation, extension):
    noise = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"turned{extension}", noise, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    decoded = decode_image(path)
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), expected)
    assert list(image_sizes([path])) == [tuple(decoded.shape[1:])]


TRANSPOSES = {  # from an upright image to each orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "I;16", "I", "F"])
@pytest.mark.parametrize("orientation", TRANSPOSES)
def test_tiff_orientation_is_applied_once(tmp_path, orientation, mode, compression):
    noise = np.random.default_rng(0).integers(0, 2, (6, 10), dtype=np.uint8) * 255
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}.get(mode)
    upright = Image.fromarray(noise if dtype is None else noise.astype(dtype))
    if dtype is None:
        upright = upright.convert(mode)
    path = tmp_path / "turned.tif"
    upright.transpose(TRANSPOSES[orientation]).save(
        path, tiffinfo={0x0112: orientation}, compression=compression
    )
    decoded = decode_image(path)
    assert np.array_equal(decoded[0].numpy(), noise)
    assert list(image_sizes([path])) == [(6, 10)]


def test_orientation_is_applied_next_to_tags_that_pillow_cannot_write(tmp_path):
    upright = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    # The orientation is 6. The offset of a thumbnail is text, which Pillow does not write.
    tags = b"II*\0\x08\0\0\0\x02\0"
    tags += struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x0201, 2, 4, 65)
    turned = np.asarray(Image.fromarray(upright).transpose(TRANSPOSES[6]))
    path = save(tmp_path / "photo.png", turned, exif=b"Exif\0\0" + tags + bytes(4))
    with warnings.catch_warnings(action="ignore"):
        decoded = decode_image(path)
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), upright)


@pytest.mark.parametrize("exif_data", [b"not tags", b"II*\0\x08\0\0\0\xff\xff\x12\x01"])
@pytest.mark.parametrize("extension", [".png", ".jpg", ".webp"])
def test_damaged_exif_data_is_ignored(tmp_path, extension, exif_data):
    path = save(
        tmp_path / f"image{extension}", uniform_image((9, 9, 9)), exif=b"Exif\0\0" + exif_data
    )
    with warnings.catch_warnings(action="ignore"):
        assert decode_image(path).shape == (3, 6, 4)
        assert list(image_sizes([path])) == [(6, 4)]


def test_images_of_another_aspect_ratio_are_centre_cropped(tmp_path):
    wide_image = np.repeat(uniform_image((0, 0, 0), (20, 60))[None], 1, axis=0)[0]
    wide_image[:, 20:40] = (0, 255, 0)
    decoded = decode_image(save(tmp_path / "wide.png", wide_image), (10, 10))
    assert decoded.shape == (3, 10, 10)
    assert decoded[1, :, 1:-1].eq(255).all()


def test_target_size_need_not_be_square(tmp_path):
    path = save(tmp_path / "image.png", uniform_image((1, 2, 3), (50, 50)))
    assert decode_image(path, (12, 30)).shape == (3, 12, 30)


def test_downscaling_is_antialiased(tmp_path):
    checkers = np.indices((64, 64)).sum(0) % 2 * 255
    path = save(tmp_path / "checkers.png", checkers.astype(np.uint8))
    decoded = decode_image(path, (8, 8)).float()
    assert decoded.sub(127.5).abs().max() < 10


def test_image_of_the_target_size_is_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    decoded = decode_image(save(tmp_path / "noise.png", pixels), (9, 7))
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize("extension", [".png", ".jpg", ".gif", ".bmp"])
def test_truncated_image_is_named(tmp_path, extension):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = save(tmp_path / f"cut{extension}", noise)
    path.write_bytes(path.read_bytes()[:-700])
    reason = "the file is (truncated|damaged)"
    with pytest.raises(InputError, match=rf"Cannot decode the image .*cut.*: {reason}") as caught:
        decode_image(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("end", [300, 400, -2])
def test_truncated_jpeg_is_reported_as_truncated(tmp_path, end):
    path = save(tmp_path / "cut.jpg", np.full((40, 40, 3), 90, np.uint8))
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(UndecodableError) as caught:
        decode_image(path)
    assert caught.value.reason == "the file is truncated"


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"GIF89a\x01"])
@pytest.mark.parametrize("read", [decode_image, lambda path: list(image_sizes([path]))])
def test_files_that_are_not_images_are_named(tmp_path, content, read):
    path = tmp_path / "text.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"text\.png"):
        read(path)


def test_missing_image_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png: No such file"):
        decode_image(tmp_path / "gone.png")


def test_batches_are_in_order(tmp_path):
    count = 2 * BATCH + 3
    paths = [
        save(tmp_path / f"{level:03}.png", np.full((2, 2), level % 256, dtype=np.uint8))
        for level in range(count)
    ]
    batches = list(decode_batches(paths, (2, 2)))
    assert [len(batch) for batch in batches] == [BATCH, BATCH, 3]
    assert torch.cat(batches)[:, 0, 0, 0].tolist() == [level % 256 for level in range(count)]
    assert list(image_sizes(paths)) == [(2, 2)] * count


def test_undecodable_image_in_a_batch_is_named(tmp_path):
    good = save(tmp_path / "good.png", uniform_image((1, 2, 3)))
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
def test_images_are_recognised_by_file_name(name, expected):
    assert is_image(name) is expected
