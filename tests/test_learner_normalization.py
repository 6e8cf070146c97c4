"""`mixmo_learner(pretrained=True)` normalises as fastai's `vision_learner` does."""

import pytest
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import IndexSplitter, Normalize
from fastai.learner import Learner
from fastai.vision.core import PILImage, PILImageBW
from fastai.vision.data import ImageBlock
from synthetic import image_arrays
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import TensorDataset
from torchvision.models import get_model

from mixmo_fastai import mixmo_learner
from mixmo_fastai.data.dataloaders import make_dataloaders
from mixmo_fastai.data.sources import load_source

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(autouse=True)
def _no_download(monkeypatch):
    """Replace the download by random weights."""
    wide = get_model("resnet18", num_classes=1000).state_dict()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *_, **__: dict(wide)
    )


def vision_dls(kind=PILImage, batch_tfms=()):
    images, labels = image_arrays(24, size=32)
    pixels = [image.permute(1, 2, 0).numpy() for image in images]
    block = DataBlock(
        (ImageBlock(kind), CategoryBlock),
        get_x=lambda index: pixels[index] if kind is PILImage else pixels[index][:, :, 0],
        get_y=lambda index: int(labels[index]),
        splitter=IndexSplitter(range(16, 24)),
        batch_tfms=[*batch_tfms],
    )
    return block.dataloaders(range(24), bs=8, num_workers=0, device="cpu")


def normalizers(dls):
    return [
        [each for each in loader.after_batch.fs if isinstance(each, Normalize)]
        for loader in dls.loaders
    ]


def test_statistics_of_the_weights_are_added_to_all_loaders():
    dls = vision_dls()
    before = dls.valid.one_batch()[0]
    learn = mixmo_learner(dls, "resnet18", pretrained=True, num_classes=10)
    assert isinstance(learn, Learner)
    assert [len(found) for found in normalizers(learn.dls)] == [1, 1]
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    torch.testing.assert_close(
        torch.Tensor(learn.dls.valid.one_batch()[0]), (torch.Tensor(before) - mean) / std
    )


def test_greyscale_images_get_the_mean_over_the_channels():
    dls = vision_dls(PILImageBW)
    mixmo_learner(dls, "resnet18", pretrained=True, num_classes=10)
    ((normalize,), _) = normalizers(dls)
    assert normalize.mean.flatten().tolist() == pytest.approx([sum(MEAN) / 3])
    assert normalize.std.flatten().tolist() == pytest.approx([sum(STD) / 3])


def test_a_normalize_of_the_loaders_is_kept():
    own = Normalize.from_stats([0.5] * 3, [0.25] * 3, cuda=False)
    dls = vision_dls(batch_tfms=[own])
    mixmo_learner(dls, "resnet18", pretrained=True, num_classes=10)
    for (normalize,) in normalizers(dls):
        assert normalize.mean.flatten().tolist() == [0.5] * 3


def test_other_loaders_stay_as_they_are():
    untrained = vision_dls()
    mixmo_learner(untrained, "resnet18", num_classes=10)
    assert normalizers(untrained) == [[], []]
    digits = make_dataloaders(load_source("digits"), batch_size=16)  # normalise already
    mixmo_learner(digits, "resnet18", pretrained=True)
    assert [len(found) for found in normalizers(digits)] == [1] * len(digits.loaders)


@pytest.mark.parametrize(("shift", "factor"), [(-0.5, 2.0), (0.0, 255.0)])
def test_images_that_are_no_pixels_from_0_to_1_stay_as_they_are(shift, factor):
    images = torch.rand(24, 3, 32, 32).add(shift).mul(factor)
    data = TensorDataset(images, torch.arange(24) % 3)
    dls = DataLoaders.from_dsets(data, data, bs=8, num_workers=0, device="cpu")
    mixmo_learner(dls, "resnet18", pretrained=True, num_classes=3)
    assert normalizers(dls) == [[], []]


def test_pixels_slightly_above_1_from_interpolation_are_pixels():
    images = torch.rand(24, 3, 32, 32)
    images[:, :, 0] = 1.0000001
    data = TensorDataset(images, torch.arange(24) % 3)
    dls = DataLoaders.from_dsets(data, data, bs=8, num_workers=0, device="cpu")
    assert dls.train.one_batch()[0].max() > 1
    mixmo_learner(dls, "resnet18", pretrained=True, num_classes=3)
    assert [len(found) for found in normalizers(dls)] == [1, 1]


@pytest.mark.parametrize("validation", [DataLoader, TorchDataLoader])
def test_loaders_without_batch_transforms_stay_as_they_are(validation):
    data = TensorDataset(torch.rand(24, 3, 32, 32), torch.arange(24) % 3)
    train = DataLoaders.from_dsets(data, data, bs=8, num_workers=0, device="cpu").train
    dls = DataLoaders(train, validation(data, 8))
    mixmo_learner(dls, "resnet18", pretrained=True, num_classes=3)
    assert not any(isinstance(each, Normalize) for each in train.after_batch.fs)
