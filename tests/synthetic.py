"""Small synthetic image sets: coloured blocks whose class is their colour."""

import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.torch_core import TensorCategory, TensorImage

from mixmo_fastai.data.dataloaders import make_dataloaders
from mixmo_fastai.data.image_sets import ArrayImages, DataSource, numbered

CLASSES = ("red", "green", "blue")


def image_arrays(count, size=8, seed=0):
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(CLASSES)
    pixels = torch.randint(0, 120, (count, 3, size, size), generator=random)
    pixels[torch.arange(count), labels] += 110
    return pixels.to(torch.uint8), labels


def draw_labels(probabilities, generator):
    """Draw one class (N,) for each row of probabilities (N, K).

    Unlike `torch.multinomial`, the same numbers in every version of torch.
    """
    uniform = torch.rand(len(probabilities), 1, generator=generator, dtype=torch.float64)
    below = probabilities.cumsum(dim=1) < uniform
    return below.sum(dim=1).clamp_max(probabilities.shape[1] - 1)


def source(num_train=96, num_test=30, size=8):
    parts = []
    for part, count, seed in (("train", num_train, 0), ("test", num_test, 1)):
        pixels, labels = image_arrays(count, size, seed)
        parts.append(ArrayImages(pixels, labels, numbered(part, count)))
    return DataSource(
        "blocks", CLASSES, *parts, mean=(0.3,) * 3, std=(0.25,) * 3, crop_padding=1, flip=True
    )


def mixmo_dls(batch_size=12, **kwargs):
    settings = {"valid_split": 0.1, "device": "cpu", **kwargs}
    return make_dataloaders(source(), batch_size=batch_size, **settings)


class _Items:
    """A data set with the attributes of fastai's; split_idx is 0 for training, 1 for validation."""

    def __init__(self, count, seed):
        pixels, labels = image_arrays(count, seed=seed)
        self.pixels, self.labels = pixels.float() / 255, labels
        self.vocab, self.c, self.split_idx = list(CLASSES), len(CLASSES), seed

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return TensorImage(self.pixels[i]), TensorCategory(self.labels[i])


def fastai_dls(batch_size=12, after_batch=None, num_train=96, num_workers=0):
    """Build plain fastai loaders, without this package."""
    train = TfmdDL(
        _Items(num_train, 0),
        bs=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        after_batch=after_batch,
    )
    valid = TfmdDL(_Items(30, 1), bs=16, num_workers=0)
    return DataLoaders(train, valid, device=torch.device("cpu"))
