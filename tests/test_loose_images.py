import numpy as np
import pytest
import torch
from PIL import Image

from mixmo_fastai.data.loose_images import PixelLoader, convert_shape, decode_readable, find_images
from mixmo_fastai.errors import InputError


def write(path, size=(8, 6), mode="RGB", value=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 20, 30)).save(path)
    return path


def test_images_are_found_in_folders_and_listed_files_are_kept(tmp_path):
    first, second = write(tmp_path / "b/2.png"), write(tmp_path / "a/1.jpg")
    (tmp_path / "a/notes.txt").write_text("not an image")
    (tmp_path / "a/.hidden.png").write_text("")
    without_suffix = tmp_path / "image-without-suffix"
    without_suffix.write_bytes(first.read_bytes())
    assert find_images([tmp_path / "a", tmp_path / "b", without_suffix]) == [
        second,
        first,
        without_suffix,
    ]


def test_paths_without_images_are_rejected(tmp_path):
    with pytest.raises(InputError, match="no image or folder"):
        find_images([tmp_path / "none.png"])
    with pytest.raises(InputError, match="No image was found"):
        find_images([tmp_path])


def test_unreadable_images_are_reported_and_skipped(tmp_path):
    good, bad = write(tmp_path / "a.png"), tmp_path / "b.png"
    bad.write_bytes(b"not an image")
    unreadable = {}
    decoded = dict(decode_readable([bad, good], (3, 4, 5), unreadable))
    assert {path: pixels.shape for path, pixels in decoded.items()} == {good: (3, 4, 5)}
    assert list(unreadable) == [bad]
    assert "b.png" in unreadable[bad]


def test_images_are_converted_to_the_requested_shape():
    colour = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    colour = colour.to(torch.uint8)
    grey = convert_shape(colour, (1, 16, 16))
    expected = np.tensordot(colour.numpy().astype(float), [0.299, 0.587, 0.114], axes=(1, 0))
    assert np.abs(grey[:, 0].numpy() - expected).max() <= 0.5001
    assert torch.equal(convert_shape(grey, (3, 16, 16)), grey.expand(-1, 3, -1, -1))
    small = convert_shape(colour, (3, 8, 8))
    assert (small.shape, small.dtype) == ((2, 3, 8, 8), torch.uint8)
    assert convert_shape(colour, (3, 16, 16)) is colour
    with pytest.raises(InputError, match="3 channels cannot be converted to 4"):
        convert_shape(colour, (4, 16, 16))


@pytest.mark.parametrize("size", [(4, 8), (8, 4), (12, 24), (5, 7)], ids=str)
def test_converted_images_are_cropped_rather_than_stretched(size):
    """Levels grow along rows as fast as along columns, and are symmetric around the centre."""
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    images = (torch.stack([rows, columns, rows]) * 15)[None].to(torch.uint8)
    (down, along, _) = convert_shape(images, (3, *size))[0].float()
    assert down.shape == size
    steps = down[-2, 0] - down[1, 0], along[0, -2] - along[0, 1]
    per_pixel = [step.item() / (length - 3) for step, length in zip(steps, size, strict=True)]
    assert per_pixel[0] == pytest.approx(per_pixel[1], rel=0.1)
    assert down.mean() == pytest.approx(7.5 * 15, abs=15 * 16 / max(size) / 2 + 1)


def test_batches_are_normalised():
    pixels = torch.arange(2 * 3 * 4).view(2, 3, 2, 2).to(torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.4, 0.3)
    ((x, y),) = PixelLoader(pixels, mean, std)
    expected = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(x, expected)
    assert y.tolist() == [-1, -1]
