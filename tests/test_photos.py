"""Photographs of different sizes: what evaluation and training show of them."""

import numpy as np
import pytest
import torch
from photos import (
    KINDS,
    ramp_image,
    read_upright,
    smooth_image,
    write_photo,
    write_photos,
    write_turned,
)
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from mixmo_fastai.data import decoding
from mixmo_fastai.data.decoding import decode_boxes, decode_image
from mixmo_fastai.data.image_folder import read_image_folder
from mixmo_fastai.data.items import OpenImage
from mixmo_fastai.data.loose_images import decode_readable
from mixmo_fastai.errors import InputError

SIDE = 16


def pixels_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def difference(first, second):
    return (first.int() - second.int()).abs().float()


class TestEvaluation:
    """Torchvision resizes the shorter side and crops the centre, to whole pixels."""

    # Sizes at which torchvision's crop is exactly in the centre.
    @pytest.mark.parametrize("size", [(96, 64), (64, 96), (200, 100), (48, 48), (24, 16)], ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_torchvisions(self, kind, size, tmp_path):
        write_photo(tmp_path / kind, smooth_image(*size))
        upright, side = read_upright(tmp_path / kind), 32
        expected = v2.CenterCrop(side)(v2.Resize(side)(upright))
        actual = decode_image(tmp_path / kind, (side, side))
        assert torch.equal(actual, pixels_of(expected))
        tensors = v2.CenterCrop(side)(v2.Resize(side, antialias=True)(pixels_of(upright)))
        assert difference(actual, tensors).max() <= 1

    @pytest.mark.parametrize("width", range(240, 254))
    @pytest.mark.parametrize("side", [32, 33])
    def test_it_is_within_a_pixel_of_torchvisions(self, width, side, tmp_path):
        image = ramp_image(width, 170)
        image.save(tmp_path / "ramp.png")
        expected = v2.CenterCrop(side)(v2.Resize(side)(image))
        actual = decode_image(tmp_path / "ramp.png", (side, side))
        levels_per_pixel = 0.5 * 170 / side
        # The ends of a row are means over fewer pixels.
        inner = difference(actual, pixels_of(expected))[:, 1:-1, 1:-1]
        assert inner.max() <= levels_per_pixel + 1

    def test_nothing_is_stretched(self, tmp_path):
        """The levels of a ramp grow equally fast along rows and columns."""
        ramp_image(250, 130).save(tmp_path / "ramp.png")
        pixels = decode_image(tmp_path / "ramp.png", (SIDE, SIDE)).float()
        along_rows = (pixels[0, :, -2] - pixels[0, :, 1]).mean()
        along_columns = (pixels[1, -2] - pixels[1, 1]).mean()
        assert along_rows == pytest.approx(along_columns.item(), rel=0.02)

    def test_every_reader_shows_the_same(self, tmp_path):
        """Training, evaluation, prediction and fastai's own inference."""
        folder = write_photos(tmp_path / "photos")
        source = read_image_folder(folder, tmp_path / "home", image_size=SIDE)
        for images in (source.train, source.test):
            paths = [folder / images.name(index) for index in range(len(images))]
            expected = torch.stack([decode_image(path, (SIDE, SIDE)) for path in paths])
            assert torch.equal(images.tensor(), expected)
            predicted = dict(decode_readable(paths, (3, SIDE, SIDE), unreadable := {}))
            assert not unreadable
            assert torch.equal(torch.stack([*predicted.values()]), expected)
            opened = [pixels_of(OpenImage((3, SIDE, SIDE))(path)) for path in paths]
            assert torch.equal(torch.stack(opened), expected)


def boxes(*rows):
    return lambda height, width: torch.tensor(rows)


def torchvision_crop(image, box, side=SIDE):
    top, left, height, width = box
    return tv.resized_crop(image, top, left, height, width, [side, side])


class TestBoxesOfFiles:
    @pytest.mark.parametrize("kind", KINDS)
    def test_they_are_torchvisions(self, kind, tmp_path):
        write_photo(tmp_path / kind, smooth_image())
        upright = read_upright(tmp_path / kind)
        # Shorter than twice the result, so that no box of a JPEG file is reduced.
        rows = [(0, 0, 31, 40), (7, 2, 20, 31), (3, 5, 9, 8), (11, 12, 31, 17)]
        windows = decode_boxes(tmp_path / kind, boxes(*rows), (SIDE, SIDE))
        expected = [np.array(torchvision_crop(upright, row)) for row in rows]
        assert np.array_equal(windows.numpy(), np.stack(expected))

    def test_the_result_need_not_be_square(self, tmp_path):
        write_photo(tmp_path / "rgb.png", smooth_image())
        windows = decode_boxes(tmp_path / "rgb.png", boxes((1, 2, 40, 30)), (8, 12))
        upright = read_upright(tmp_path / "rgb.png")
        expected = tv.resized_crop(upright, 1, 2, 40, 30, [8, 12])
        assert np.array_equal(windows[0].numpy(), np.array(expected))

    @pytest.mark.parametrize(
        ("rows", "factor"),
        [
            ([(0, 0, 150, 200)], 8),
            ([(0, 0, 128, 128)], 8),
            ([(0, 0, 127, 200)], 4),
            ([(0, 0, 64, 64), (0, 0, 150, 200)], 4),
            ([(0, 0, 40, 63)], 2),
            ([(0, 0, 31, 200)], 1),
            ([(0, 0, 9, 9), (0, 0, 150, 200)], 1),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("extension", ["jpg", "png"])
    def test_jpeg_is_decoded_no_smaller_than_needed(
        self, rows, factor, extension, tmp_path, monkeypatch
    ):
        path = tmp_path / f"large.{extension}"
        smooth_image(200, 150).save(path)
        decoded = []
        original = decoding._resized_box

        def spy(image, *args):
            decoded.append(image.size)
            return original(image, *args)

        monkeypatch.setattr(decoding, "_resized_box", spy)
        decode_boxes(path, boxes(*rows), (SIDE, SIDE))
        factor = factor if extension == "jpg" else 1
        assert set(decoded) == {(-(-200 // factor), -(-150 // factor))}
        assert all(min(row[2:]) >= factor * SIDE for row in rows) or factor == 1

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("size", [(205, 163), (200, 160), (207, 166)], ids=str)
    def test_reduced_boxes_are_at_their_place(self, size, orientation, tmp_path):
        """An error of two pixels of the file would be visible as one level."""
        image = ramp_image(*size)
        write_turned(tmp_path / "turned.jpg", image, orientation, quality=100, subsampling=0)
        rows = [(0, 0, 130, 130), (size[1] - 131, size[0] - 140, 131, 140), (9, 21, 140, 161)]
        windows = decode_boxes(tmp_path / "turned.jpg", boxes(*rows), (SIDE, SIDE))
        for window, row in zip(windows, rows, strict=True):
            expected = pixels_of(torchvision_crop(image, row))
            signed = window.permute(2, 0, 1).float() - expected
            assert signed[:, 2:-2, 2:-2].mean(dim=(1, 2)).abs().max() < 0.6
            assert signed.abs().max() <= 4

    def test_reduced_boxes_look_like_the_others(self, tmp_path):
        write_photo(tmp_path / "rgb.jpg", smooth_image(900, 700))
        upright = read_upright(tmp_path / "rgb.jpg")
        for row in [(0, 0, 700, 900), (50, 70, 300, 260), (10, 10, 140, 150)]:
            (window,) = decode_boxes(tmp_path / "rgb.jpg", boxes(row), (64, 64))
            expected = pixels_of(torchvision_crop(upright, row, 64))
            assert difference(window.permute(2, 0, 1), expected).mean() < 1

    @pytest.mark.parametrize("kind", ["rgb.jpg", "rgb.png"])
    def test_damaged_files_are_named(self, kind, tmp_path):
        write_photo(tmp_path / kind, smooth_image())
        content = (tmp_path / kind).read_bytes()
        (tmp_path / kind).write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError, match=kind):
            decode_boxes(tmp_path / kind, boxes((0, 0, 20, 20)), (SIDE, SIDE))
