import itertools

import numpy as np
import oracle
import pytest
import torch

from mixmo_fastai.data.augment import (
    StoredImages,
    draw_alternating_flips,
    draw_crops,
    draw_flips,
    normalize,
)


@pytest.mark.parametrize(("size", "padding"), [((3, 8, 8), 2), ((1, 5, 9), 1), ((3, 4, 4), 0)])
@pytest.mark.parametrize("mirrored", [False, True])
def test_windows_against_the_oracle(size, padding, mirrored):
    images = torch.randint(1, 256, (6, *size), dtype=torch.uint8)
    indices = torch.tensor([5, 0, 0, 3, 2, 1, 4, 5])
    corners, flips = draw_crops(8, padding), draw_flips(8) if mirrored else None
    windows = StoredImages(images, padding, mirrored=mirrored).windows(indices, corners, flips)
    expected = [
        oracle.crop(images[i].numpy(), row, column, padding)
        for i, (row, column) in zip(indices, corners.tolist(), strict=True)
    ]
    if flips is not None:
        expected = [e[:, :, ::-1] if f else e for e, f in zip(expected, flips, strict=True)]
    assert np.array_equal(windows.numpy(), np.stack(expected))
    assert windows.is_contiguous(memory_format=torch.channels_last)


def test_every_window_of_every_image_either_way_round():
    """The first and the last byte that is stored among them."""
    images = torch.randint(1, 256, (2, 3, 4, 5), dtype=torch.uint8)
    places = list(itertools.product(range(2), range(3), range(3), (False, True)))
    indices, rows, columns, flips = (torch.tensor(part) for part in zip(*places, strict=True))
    stored = StoredImages(images, 1, mirrored=True)
    found = stored.windows(indices, torch.stack([rows, columns], dim=1), flips)
    for window, (image, row, column, flip) in zip(found, places, strict=True):
        expected = oracle.crop(images[image].numpy(), row, column, 1)
        assert np.array_equal(window.numpy(), expected[:, :, ::-1] if flip else expected)


@pytest.mark.parametrize("mirrored", [False, True])
def test_without_corners_a_window_is_the_image(mirrored):
    images = torch.randint(256, (4, 3, 6, 6), dtype=torch.uint8)
    stored = StoredImages(images, 2, mirrored=mirrored)
    assert torch.equal(stored.windows(torch.arange(4)), images)
    assert stored.pixels.numel() == StoredImages.num_bytes(4, images.shape[1:], 2, mirrored)


def test_corners_and_flips_are_uniform():
    corners = draw_crops(90_000, 4, generator=torch.Generator().manual_seed(0))
    counts = (corners[:, 0] * 9 + corners[:, 1]).bincount(minlength=81)
    assert counts.numel() == 81
    assert bool(((counts - 90_000 / 81).abs() < 5 * (90_000 / 81) ** 0.5).all())
    flips = draw_flips(10_000, generator=torch.Generator().manual_seed(0))
    assert flips.float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_alternating_flips_mirror_every_second_copy():
    flips = draw_alternating_flips(5_000, 4, generator=torch.Generator().manual_seed(0))
    by_copy = flips.view(4, 5_000)
    assert torch.equal(by_copy[0], by_copy[2])
    assert torch.equal(by_copy[1], ~by_copy[0])
    assert torch.equal(by_copy[3], ~by_copy[0])
    assert by_copy[0].float().mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [1, 3])
def test_normalize_is_the_formula(layout, channels):
    images = torch.randint(256, (5, channels, 4, 6), dtype=torch.uint8)
    images = images.contiguous(memory_format=layout)
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:channels], torch.tensor([0.2, 0.25, 0.3])[:channels]
    expected = (images / 255 - mean[:, None, None]) / std[:, None, None]
    found = normalize(images, mean, std)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
