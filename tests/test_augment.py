import numpy as np
import oracle
import pytest
import torch

from mixmo_fastai.augment import crop, draw_crops, draw_flips, flip, normalize, pad


@pytest.mark.parametrize(("size", "padding"), [((3, 8, 8), 2), ((1, 5, 9), 1), ((3, 4, 4), 0)])
def test_crops_against_the_oracle(size, padding):
    images = torch.randint(1, 256, (6, *size), dtype=torch.uint8)
    indices = torch.tensor([5, 0, 0, 3, 2, 1, 4, 5])
    corners = draw_crops(8, padding)
    windows = crop(pad(images, padding), indices, corners, padding)
    expected = [
        oracle.crop(images[i].numpy(), row, column, padding)
        for i, (row, column) in zip(indices, corners.tolist(), strict=True)
    ]
    assert np.array_equal(windows.numpy(), np.stack(expected))


def test_the_middle_window_is_the_image():
    images = torch.randint(256, (4, 3, 6, 6), dtype=torch.uint8)
    windows = crop(pad(images, 2), torch.arange(4), torch.full((4, 2), 2), 2)
    assert torch.equal(windows, images)


def test_corners_and_flips_are_uniform():
    corners = draw_crops(90_000, 4, generator=torch.Generator().manual_seed(0))
    counts = (corners[:, 0] * 9 + corners[:, 1]).bincount(minlength=81)
    assert counts.numel() == 81
    assert bool(((counts - 90_000 / 81).abs() < 5 * (90_000 / 81) ** 0.5).all())
    flips = draw_flips(10_000, generator=torch.Generator().manual_seed(0))
    assert flips.float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_flip_mirrors_left_and_right_of_the_chosen():
    images = torch.arange(12).view(2, 1, 2, 3)
    flipped = flip(images, torch.tensor([True, False]))
    assert flipped[0, 0].tolist() == [[2, 1, 0], [5, 4, 3]]
    assert torch.equal(flipped[1], images[1])


def test_normalize_is_the_formula():
    images = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    expected = (images / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(normalize(images, mean, std), expected)
