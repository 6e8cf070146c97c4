"""Any data that fastai's loaders give: transforms, sizes, channels, classes, several labels."""

from dataclasses import dataclass
from typing import Any

import fastai.callback.data  # noqa: F401  # weighted loaders
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.block import (
    CategoryBlock,
    DataBlock,
    MultiCategoryBlock,
    RegressionBlock,
    TransformBlock,
)
from fastai.data.core import DataLoaders
from fastai.data.transforms import ColReader, IndexSplitter, Normalize, RandomSplitter
from fastai.learner import Learner
from fastai.losses import (
    BCEWithLogitsLossFlat,
    CrossEntropyLossFlat,
    FocalLossFlat,
    LabelSmoothingCrossEntropyFlat,
)
from fastai.metrics import mae
from fastai.torch_core import TensorImage
from fastai.vision.augment import RandomResizedCrop, Resize, aug_transforms
from fastai.vision.core import PILImage, PILImageBW
from fastai.vision.data import ImageBlock
from fastai.vision.learner import vision_learner
from PIL import Image
from synthetic import CLASSES, image_arrays
from torch.utils.data import TensorDataset
from torchvision.models import resnet18

from mixmo_fastai import (
    MixMoCallback,
    MixMoLoss,
    create_model,
    mixmo_learner,
    show_pairs,
    to_mixmo,
)
from mixmo_fastai.errors import InputError
from mixmo_fastai.learner.preview import preview_batch
from mixmo_fastai.metrics.fastai import MemberAccuracy


@dataclass
class Item:
    """An image, (H, W, 3) uint8, and what is known of it."""

    image: np.ndarray
    label: Any


def pictures(count=48, size=16):
    """Images of several sizes with the names of their classes."""
    pixels, labels = image_arrays(count, size=size)
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture = picture.resize((size + number % 5, size + number % 3), Image.Resampling.NEAREST)
        yield Item(np.asarray(picture), CLASSES[label])


def block(image=PILImage, category=CategoryBlock, get_y=lambda item: item.label, **kwargs):
    kwargs.setdefault("splitter", RandomSplitter(seed=0))
    kwargs.setdefault("item_tfms", Resize(12))
    kwargs.setdefault("get_x", lambda item: item.image)
    return DataBlock((ImageBlock(image), category), get_y=get_y, **kwargs)


def loaders(data_block, items=None, **kwargs):
    items = [*pictures()] if items is None else items
    return data_block.dataloaders(items, bs=6, num_workers=0, device="cpu", **kwargs)


class Watch(Callback):
    """Notes what the network and the loss are given."""

    order, run_valid = 60, False

    def __init__(self):
        super().__init__()
        self.inputs, self.masks, self.targets, self.losses = [], [], [], []

    def after_batch(self):
        inputs, masks = self.learn.xb
        self.inputs.append(inputs)
        self.masks.append(masks)
        self.targets.append(self.learn.yb)
        self.losses.append(self.learn.loss.item())


def trained(dls, epochs=1, lr=0.02, **kwargs):
    """A Learner that has trained quietly, and what it saw."""
    watch = Watch()
    kwargs.setdefault("batch_repetitions", 2)
    learn = mixmo_learner(dls, "wrn10_1", seed=0, cbs=[watch], **kwargs)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, lr)
    assert all(np.isfinite(watch.losses))
    return learn, watch


@pytest.mark.slow
def test_item_and_batch_transforms():
    """The latter run on every copy, and what they are told of training stays."""
    crops = block(
        item_tfms=RandomResizedCrop(14, min_scale=0.5),
        batch_tfms=[*aug_transforms(size=12), Normalize.from_stats(*[[0.4] * 3, [0.25] * 3])],
    )
    learn, watch = trained(loaders(crops), epochs=8, lr=0.05)
    inputs = watch.inputs[0]  # 6 images, twice, for 2 members
    assert inputs.shape == (12, 2, 3, 12, 12)
    assert len(inputs.flatten(0, 1).flatten(1).unique(dim=0)) > 20
    predictions, targets = learn.get_preds()
    assert (predictions.argmax(1) == targets).float().mean() > 0.7


@pytest.mark.slow
def test_classes_that_are_rarer_than_others():
    """Drawn more often by the loader, or weighed by the loss."""
    items = [item for item in pictures(90) if item.label == "red"] + [
        item for item in pictures(12) if item.label != "red"
    ]
    weights = [1.0 if item.label == "red" else 5.0 for item in items]
    weighted = block(splitter=RandomSplitter(0.1, seed=2)).weighted_dataloaders(
        items, weights, bs=6, num_workers=0, device="cpu"
    )
    _, watch = trained(weighted, epochs=3)
    seen = torch.cat([targets[0].flatten() for targets in watch.targets])
    assert (seen == weighted.vocab.o2i["red"]).float().mean() < 0.8  # of 80 % and more
    dls = loaders(block(), items)
    losses, rarely = [], []
    for weight in (1.0, 50.0):
        rare = torch.ones(3).index_fill(0, torch.tensor(dls.vocab.o2i["blue"]), weight)
        learn, _ = trained(dls, loss_func=CrossEntropyLossFlat(weight=rare), epochs=0)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 0.0)
            losses.append(learn.recorder.values[-1][:2])
            learn.fit(3, 1e-2)
            rarely.append(learn.get_preds()[0].mean(0)[dls.vocab.o2i["blue"]])
    # Of the same scale in training and in evaluation, whatever the weights.
    for train, valid in losses:
        assert train == pytest.approx(valid, rel=0.4)
    assert rarely[1] > 2 * rarely[0]


def test_images_grow_from_fit_to_fit():
    learn, watch = trained(loaders(block()))
    learn.dls = loaders(block(item_tfms=Resize((20, 16))))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
    assert watch.inputs[0].shape[-2:] == watch.masks[0].shape[-2:] == (12, 12)
    assert watch.inputs[-1].shape[-2:] == watch.masks[-1].shape[-2:] == (20, 16)


def test_an_incomplete_last_batch():
    dls = loaders(block(splitter=IndexSplitter(range(5))))
    dls.train.drop_last = False
    _, watch = trained(dls)
    assert [len(inputs) for inputs in watch.inputs] == [12] * 7 + [2]


def test_one_channel():
    dls = loaders(block(PILImageBW, get_x=lambda item: item.image.max(axis=2)))
    learn, _ = trained(dls)
    assert learn.model.in_channels == 1
    name, _, _ = learn.predict(next(pictures()))
    assert name in CLASSES


@pytest.mark.slow
def test_more_than_three_channels():
    """Such as of satellites, as arrays of floats."""

    def as_tensor(item):
        image = torch.from_numpy(item.image[:12, :12].copy()).permute(2, 0, 1).float() / 255
        return TensorImage(torch.cat([image, image.flip(0)]))

    cubes = DataBlock(
        (TransformBlock(type_tfms=as_tensor), CategoryBlock),
        get_y=lambda item: item.label, splitter=RandomSplitter(seed=0),
    )  # fmt: skip
    learn, watch = trained(loaders(cubes), epochs=6, lr=0.05)
    assert watch.inputs[0].shape == (12, 2, 6, 12, 12)
    assert learn.validate()[1] > 0.6
    show_pairs(learn)  # the first three


def test_a_thousand_classes():
    """Targets stay numbers, even where pixels were mixed: no (B, M, K) is made but the logits."""
    items = [Item(item.image, n) for n, item in enumerate(pictures(24))]
    thousand = CategoryBlock(vocab=[*range(1000)])
    dls = loaders(block(category=thousand), items)
    assert dls.c == 1000
    sizes, large = [], set()

    class Kept(Callback):
        order = 1

        def after_pred(self):
            if self.learn.training:
                hooks = torch.autograd.graph.saved_tensors_hooks
                self.within = hooks(self.keep, lambda kept: kept)
                self.within.__enter__()

        def keep(self, kept):
            sizes.append(kept.numel())
            large.add(kept.data_ptr() if kept.numel() == 12 * 2 * 1000 else 0)
            return kept

        def after_loss(self):
            if self.learn.training:
                self.within.__exit__(None, None, None)

    watch = Watch()
    learn = mixmo_learner(
        dls, "wrn10_1", seed=0, cbs=[Kept(), watch], msda="cutmix", batch_repetitions=2
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.01)
    assert all(part.shape == (12, 2) for part in watch.targets[0])
    assert max(sizes) == 12 * 2 * 1000
    # Nothing but the logits' log-softmax, of each image's two labels.
    assert len(large - {0}) <= 2 * len(watch.losses)


MARKS = [["red", "blue"], ["green"], ["red"], [], ["blue", "green"], ["red", "green", "blue"]]


def several_labels():
    """Images of several colours, and all of their names."""
    for number, item in enumerate(pictures(72)):
        names, image = MARKS[number % len(MARKS)], item.image // 2
        for name in names:
            image[..., CLASSES.index(name)] += 120
        yield Item(image, names)


def several_labels_block():
    return block(category=MultiCategoryBlock(vocab=list(CLASSES)))


@pytest.mark.slow
@pytest.mark.parametrize("msda", [None, "mixup"])
def test_several_labels_per_image(msda):
    """Binary cross-entropy, which the loaders ask for, is the base loss."""
    dls = loaders(several_labels_block(), [*several_labels()])
    learn, watch = trained(dls, epochs=10, lr=0.05, msda=msda)
    assert isinstance(learn.loss_func.base, BCEWithLogitsLossFlat)
    assert watch.targets[0][0].shape == (12, 2, 3)
    _, ensemble, members = learn.validate()
    assert ensemble > 0.8
    assert members > 0.8
    probabilities, targets = learn.get_preds()
    assert ((probabilities > 0.5) == (targets > 0.5)).float().mean() == pytest.approx(ensemble)
    names, marks, _ = learn.predict(next(several_labels()))
    assert set(names) == {CLASSES[index] for index in marks.nonzero().flatten()}
    show_pairs(learn)


def test_the_loss_of_several_labels_is_the_weighted_sum_over_members():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 2, 3, generator=random)
    targets = (torch.rand(5, 2, 3, generator=random) > 0.5).float()
    weights = torch.rand(5, 2, generator=random)
    found = MixMoLoss(BCEWithLogitsLossFlat())(logits, targets, weights)
    probabilities = logits.double().sigmoid()
    each = -(targets * probabilities.log() + (1 - targets) * (1 - probabilities).log()).mean(2)
    torch.testing.assert_close(found.double(), (weights * each).sum(1).mean(), rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [LabelSmoothingCrossEntropyFlat, FocalLossFlat])
def test_other_losses_of_fastai(loss):
    learn, _ = trained(loaders(block()), epochs=8, lr=0.05, loss_func=loss())
    assert learn.validate()[1] > 0.7


@pytest.mark.slow
def test_numbers_to_predict():
    """A regression's loss is weighed alike; its metrics are the user's to name."""
    brightness = RegressionBlock(n_out=1)
    dls = loaders(block(category=brightness, get_y=lambda item: float(item.image.mean() / 255)))
    model = create_model("wrn10_1", num_classes=1)
    learn = Learner(dls, model, metrics=mae, cbs=MixMoCallback(seed=0, batch_repetitions=2))
    with learn.no_bar(), learn.no_logging():
        before = learn.validate()[1]
        learn.fit_one_cycle(10, 0.01)
    assert learn.validate()[1] < min(0.2, before)


@pytest.mark.slow
def test_numbers_within_a_range():
    """fastai's `y_range`: the same predictions after the conversion, and within it in training."""
    brightness = RegressionBlock(n_out=1)
    dls = loaders(block(category=brightness, get_y=lambda item: float(item.image.mean() / 255)))
    learn = vision_learner(
        dls, resnet18, pretrained=False, normalize=False, y_range=(-0.5, 1.5), metrics=mae
    )
    with learn.no_bar(), learn.no_logging():
        before = learn.get_preds()[0]
        to_mixmo(learn, seed=0, batch_repetitions=2)
        torch.testing.assert_close(learn.get_preds()[0], before, rtol=1e-4, atol=1e-5)
        learn.fit_one_cycle(2, 1e-3)
        found = learn.get_preds()[0]
    assert found.shape == before.shape
    assert found.min() >= -0.5
    assert found.max() <= 1.5
    images, _ = dls.valid.one_batch()
    model = learn.model.eval()
    torch.testing.assert_close(model.fuse()(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_numbers_to_predict_in_one_line(count):
    def values(item):
        return [float(item.image[..., i].mean() / 255) for i in range(count)]

    dls = loaders(block(category=RegressionBlock(n_out=count), get_y=values))
    learn, _ = trained(dls)
    assert len(learn.validate()) == 1  # metrics are the user's to name


def test_members_have_no_accuracy_of_numbers():
    dls = loaders(block(category=RegressionBlock, get_y=lambda item: float(item.image.mean())))
    with pytest.raises(InputError, match="MemberAccuracy needs class targets"):
        trained(dls, metrics=[MemberAccuracy()])


def test_pixels_that_nobody_has_scaled_are_shown():
    raw = DataBlock(
        (TransformBlock(type_tfms=lambda item: TensorImage(torch.full((2, 8, 8), item.value))),
         CategoryBlock),
        get_y=lambda item: item.label, splitter=RandomSplitter(seed=0),
    )  # fmt: skip

    class Level(Item):
        @property
        def value(self):
            return 255.0 if self.label == "red" else 51.0

    dls = loaders(raw, [Level(item.image, item.label) for item in pictures()])
    learn, _ = trained(dls)
    shown = preview_batch(learn).inputs
    assert shown.unique().tolist() == pytest.approx([0.2, 1.0])
    show_pairs(learn)  # of two channels


def test_pixels_standardised_by_nobody_knows_what_are_shown():
    images = torch.randn(32, 3, 8, 8).clamp(-2.4, 2.4)
    data = TensorDataset(images, torch.randint(3, (32,)))
    dls = DataLoaders.from_dsets(data, data, bs=8, device="cpu", num_workers=0)
    shown = preview_batch(mixmo_learner(dls, "wrn10_1", num_classes=3, seed=0)).inputs
    assert shown.min() == 0
    assert shown.max() == 1
    assert shown.mean() == pytest.approx(0.5, abs=0.05)


def test_classes_of_a_table():
    """As of a data frame: the columns are read, the classes found."""
    import pandas as pd

    frame = pd.DataFrame({"number": range(48)})
    frame["label"] = [item.label for item in pictures()]
    images = [item.image for item in pictures()]
    columns = DataBlock(
        (ImageBlock, CategoryBlock), get_x=lambda row: images[row["number"]],
        get_y=ColReader("label"), splitter=RandomSplitter(seed=0), item_tfms=Resize(12),
    )  # fmt: skip
    learn, _ = trained(loaders(columns, frame))
    assert [*learn.dls.vocab] == sorted(CLASSES)
