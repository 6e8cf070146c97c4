"""Data of fastai's loaders: transforms, sizes, channels, classes, several labels."""

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
from networks import NarrowResNet18
from PIL import Image
from synthetic import CLASSES, image_arrays
from torch.utils.data import TensorDataset

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
    """An image, (H, W, 3) uint8, and its label."""

    image: np.ndarray
    label: Any


def draw_items(count=48, size=16):
    """Draw images of several sizes with the names of their classes."""
    pixels, labels = image_arrays(count, size=size)
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        resized = Image.fromarray(image.permute(1, 2, 0).numpy())
        resized = resized.resize((size + number % 5, size + number % 3), Image.Resampling.NEAREST)
        yield Item(np.asarray(resized), CLASSES[label])


def block(image=PILImage, category=CategoryBlock, get_y=lambda item: item.label, **kwargs):
    kwargs.setdefault("splitter", RandomSplitter(seed=0))
    kwargs.setdefault("item_tfms", Resize(12))
    kwargs.setdefault("get_x", lambda item: item.image)
    return DataBlock((ImageBlock(image), category), get_y=get_y, **kwargs)


def loaders(data_block, items=None, bs=6, **kwargs):
    items = [*draw_items()] if items is None else items
    return data_block.dataloaders(items, bs=bs, num_workers=0, device="cpu", **kwargs)


class BatchRecorder(Callback):
    """Record the inputs of the network and of the loss."""

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


def train_learner(dls, epochs=1, lr=0.02, **kwargs):
    """Train a Learner without output; return it and the recorder of its batches."""
    recorder = BatchRecorder()
    kwargs.setdefault("batch_repetitions", 2)
    learn = mixmo_learner(dls, "wrn10_1", seed=0, cbs=[recorder], **kwargs)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, lr)
    assert all(np.isfinite(recorder.losses))
    return learn, recorder


@pytest.mark.slow
def test_item_and_batch_transforms():
    """Batch transforms run on each copy, with their split set to training."""
    crops = block(
        item_tfms=RandomResizedCrop(14, min_scale=0.5),
        batch_tfms=[*aug_transforms(size=12), Normalize.from_stats(*[[0.4] * 3, [0.25] * 3])],
    )
    learn, recorder = train_learner(loaders(crops), epochs=8, lr=0.05)
    inputs = recorder.inputs[0]  # 6 images, twice, for 2 members
    assert inputs.shape == (12, 2, 3, 12, 12)
    assert len(inputs.flatten(0, 1).flatten(1).unique(dim=0)) > 20
    predictions, targets = learn.get_preds()
    assert (predictions.argmax(1) == targets).float().mean() > 0.7


@pytest.mark.slow
def test_imbalanced_classes():
    """Rare classes can be drawn more often by the loader or weighted by the loss."""
    items = [item for item in draw_items(90) if item.label == "red"] + [
        item for item in draw_items(12) if item.label != "red"
    ]
    weights = [1.0 if item.label == "red" else 5.0 for item in items]
    weighted = block(splitter=RandomSplitter(0.1, seed=2)).weighted_dataloaders(
        items, weights, bs=6, num_workers=0, device="cpu"
    )
    _, recorder = train_learner(weighted, epochs=3)
    seen = torch.cat([targets[0].flatten() for targets in recorder.targets])
    # Of the images, 30 of 38 are red; of the draws, 30 of 70 are expected to be.
    assert (seen == weighted.vocab.o2i["red"]).float().mean() < 0.65
    dls = loaders(block(), items)
    losses, blue_probabilities = [], []
    for weight in (1.0, 50.0):
        class_weights = torch.ones(3).index_fill(0, torch.tensor(dls.vocab.o2i["blue"]), weight)
        learn, _ = train_learner(
            dls, loss_func=CrossEntropyLossFlat(weight=class_weights), epochs=0
        )
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 0.0)
            losses.append(learn.recorder.values[-1][:2])
            learn.fit(3, 1e-2)
            blue_probabilities.append(learn.get_preds()[0].mean(0)[dls.vocab.o2i["blue"]])
    # Training and validation losses have the same scale for all weights.
    for train, valid in losses:
        assert train == pytest.approx(valid, rel=0.4)
    assert blue_probabilities[1] > 2 * blue_probabilities[0]


def test_image_size_may_change_between_fits():
    learn, recorder = train_learner(loaders(block()))
    learn.dls = loaders(block(item_tfms=Resize((20, 16))))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
    assert recorder.inputs[0].shape[-2:] == recorder.masks[0].shape[-2:] == (12, 12)
    assert recorder.inputs[-1].shape[-2:] == recorder.masks[-1].shape[-2:] == (20, 16)


def test_incomplete_last_batch_is_used():
    dls = loaders(block(splitter=IndexSplitter(range(5))))
    dls.train.drop_last = False
    _, recorder = train_learner(dls)
    assert [len(inputs) for inputs in recorder.inputs] == [12] * 7 + [2]


def test_images_with_one_channel():
    dls = loaders(block(PILImageBW, get_x=lambda item: item.image.max(axis=2)))
    learn, _ = train_learner(dls)
    assert learn.model.in_channels == 1
    name, _, _ = learn.predict(next(draw_items()))
    assert name in CLASSES


@pytest.mark.slow
def test_images_with_more_than_three_channels():
    """For example satellite images, read as float tensors."""

    def as_tensor(item):
        image = torch.from_numpy(item.image[:12, :12].copy()).permute(2, 0, 1).float() / 255
        return TensorImage(torch.cat([image, image.flip(0)]))

    satellite_block = DataBlock(
        (TransformBlock(type_tfms=as_tensor), CategoryBlock),
        get_y=lambda item: item.label, splitter=RandomSplitter(seed=0),
    )  # fmt: skip
    learn, recorder = train_learner(loaders(satellite_block), epochs=6, lr=0.05)
    assert recorder.inputs[0].shape == (12, 2, 6, 12, 12)
    assert learn.validate()[1] > 0.6
    show_pairs(learn)  # shows the first three channels


def test_targets_stay_class_indices_with_a_thousand_classes():
    """Only the logits have shape (B, M, K), even if pixels are mixed."""
    items = [Item(item.image, n) for n, item in enumerate(draw_items(24))]
    thousand = CategoryBlock(vocab=[*range(1000)])
    dls = loaders(block(category=thousand), items)
    assert dls.c == 1000
    num_elements, large = [], set()

    class SavedTensorRecorder(Callback):
        order = 1

        def after_pred(self):
            if self.learn.training:
                hooks = torch.autograd.graph.saved_tensors_hooks
                self.context = hooks(self.record, lambda tensor: tensor)
                self.context.__enter__()

        def record(self, tensor):
            num_elements.append(tensor.numel())
            large.add(tensor.data_ptr() if tensor.numel() == 12 * 2 * 1000 else 0)
            return tensor

        def after_loss(self):
            if self.learn.training:
                self.context.__exit__(None, None, None)

    recorder = BatchRecorder()
    learn = mixmo_learner(
        dls,
        "wrn10_1",
        seed=0,
        cbs=[SavedTensorRecorder(), recorder],
        msda="cutmix",
        batch_repetitions=2,
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.01)
    assert all(part.shape == (12, 2) for part in recorder.targets[0])
    assert max(num_elements) == 12 * 2 * 1000
    # Only the log-softmax of the logits is saved, once for each of an image's two labels.
    assert len(large - {0}) <= 2 * len(recorder.losses)


LABEL_SETS = [["red", "blue"], ["green"], ["red"], [], ["blue", "green"], ["red", "green", "blue"]]


def draw_multi_label_items():
    """Draw images of several colours with the names of these colours."""
    for number, item in enumerate(draw_items(72)):
        names, image = LABEL_SETS[number % len(LABEL_SETS)], item.image // 2
        for name in names:
            image[..., CLASSES.index(name)] += 120
        yield Item(image, names)


def multi_label_block():
    return block(category=MultiCategoryBlock(vocab=list(CLASSES)))


@pytest.mark.slow
@pytest.mark.parametrize("msda", [None, "mixup"])
def test_multi_label_classification(msda):
    """The base loss is that of the loaders, binary cross-entropy."""
    dls = loaders(multi_label_block(), [*draw_multi_label_items()])
    learn, recorder = train_learner(dls, epochs=8, lr=0.05, msda=msda)
    assert isinstance(learn.loss_func.base, BCEWithLogitsLossFlat)
    assert recorder.targets[0][0].shape == (12, 2, 3)
    _, ensemble, members = learn.validate()
    assert ensemble > 0.8
    assert members > 0.8
    probabilities, targets = learn.get_preds()
    assert ((probabilities > 0.5) == (targets > 0.5)).float().mean() == pytest.approx(ensemble)
    names, is_present, _ = learn.predict(next(draw_multi_label_items()))
    assert set(names) == {CLASSES[index] for index in is_present.nonzero().flatten()}
    show_pairs(learn)


def test_multi_label_loss_is_the_weighted_sum_over_members():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 2, 3, generator=random)
    targets = (torch.rand(5, 2, 3, generator=random) > 0.5).float()
    weights = torch.rand(5, 2, generator=random)
    actual = MixMoLoss(BCEWithLogitsLossFlat())(logits, targets, weights)
    probabilities = logits.double().sigmoid()
    per_member = -(targets * probabilities.log() + (1 - targets) * (1 - probabilities).log()).mean(
        2
    )
    torch.testing.assert_close(
        actual.double(), (weights * per_member).sum(1).mean(), rtol=1e-5, atol=0
    )


@pytest.mark.slow
@pytest.mark.parametrize("loss", [LabelSmoothingCrossEntropyFlat, FocalLossFlat])
def test_other_losses_of_fastai(loss):
    learn, _ = train_learner(loaders(block()), epochs=7, lr=0.05, loss_func=loss())
    assert learn.validate()[1] > 0.7


@pytest.mark.slow
def test_regression():
    """A regression loss is weighted like any other; the user chooses the metrics."""
    brightness = RegressionBlock(n_out=1)
    dls = loaders(block(category=brightness, get_y=lambda item: float(item.image.mean() / 255)))
    model = create_model("wrn10_1", num_classes=1)
    learn = Learner(dls, model, metrics=mae, cbs=MixMoCallback(seed=0, batch_repetitions=2))
    with learn.no_bar(), learn.no_logging():
        before = learn.validate()[1]
        learn.fit_one_cycle(10, 0.01)
    assert learn.validate()[1] < min(0.2, before)


@pytest.mark.slow
def test_regression_with_y_range():
    """Predictions do not change in the conversion and stay within fastai's `y_range`."""
    brightness = RegressionBlock(n_out=1)
    dls = loaders(block(category=brightness, get_y=lambda item: float(item.image.mean() / 255)))
    learn = vision_learner(
        dls, NarrowResNet18, pretrained=False, normalize=False, y_range=(-0.5, 1.5), metrics=mae
    )
    with learn.no_bar(), learn.no_logging():
        before = learn.get_preds()[0]
        to_mixmo(learn, seed=0, batch_repetitions=2)
        torch.testing.assert_close(learn.get_preds()[0], before, rtol=1e-4, atol=1e-5)
        learn.fit_one_cycle(2, 1e-3)
        after = learn.get_preds()[0]
    assert after.shape == before.shape
    assert after.min() >= -0.5
    assert after.max() <= 1.5
    images, _ = dls.valid.one_batch()
    model = learn.model.eval()
    torch.testing.assert_close(model.fuse()(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_mixmo_learner_for_regression(count):
    def values(item):
        return [float(item.image[..., i].mean() / 255) for i in range(count)]

    dls = loaders(block(category=RegressionBlock(n_out=count), get_y=values))
    learn, _ = train_learner(dls)
    assert len(learn.validate()) == 1  # the loss only: there are no default metrics


def test_member_accuracy_refuses_regression_targets():
    dls = loaders(block(category=RegressionBlock, get_y=lambda item: float(item.image.mean())))
    with pytest.raises(InputError, match="MemberAccuracy needs class targets"):
        train_learner(dls, metrics=[MemberAccuracy()])


def test_preview_scales_pixels_without_a_known_range():
    raw = DataBlock(
        (TransformBlock(type_tfms=lambda item: TensorImage(torch.full((2, 8, 8), item.value))),
         CategoryBlock),
        get_y=lambda item: item.label, splitter=RandomSplitter(seed=0),
    )  # fmt: skip

    class ConstantItem(Item):
        @property
        def value(self):
            return 255.0 if self.label == "red" else 51.0

    items = [ConstantItem(item.image, item.label) for item in draw_items(40)]
    dls = loaders(raw, items, bs=32)  # all training images, so that both values occur
    learn, _ = train_learner(dls)
    shown = preview_batch(learn, count=100).inputs
    assert shown.unique().tolist() == pytest.approx([0.2, 1.0])
    show_pairs(learn)  # images with two channels


def test_preview_scales_pixels_with_unknown_standardisation():
    images = torch.randn(32, 3, 8, 8).clamp(-2.4, 2.4)
    data = TensorDataset(images, torch.randint(3, (32,)))
    dls = DataLoaders.from_dsets(data, data, bs=8, device="cpu", num_workers=0)
    shown = preview_batch(mixmo_learner(dls, "wrn10_1", num_classes=3, seed=0)).inputs
    assert shown.min() == 0
    assert shown.max() == 1
    assert shown.mean() == pytest.approx(0.5, abs=0.05)


def test_columns_of_a_data_frame():
    """Images and labels are read from columns; the classes are found in the data."""
    import pandas as pd

    frame = pd.DataFrame({"number": range(48)})
    frame["label"] = [item.label for item in draw_items()]
    images = [item.image for item in draw_items()]
    columns = DataBlock(
        (ImageBlock, CategoryBlock), get_x=lambda row: images[row["number"]],
        get_y=ColReader("label"), splitter=RandomSplitter(seed=0), item_tfms=Resize(12),
    )  # fmt: skip
    learn, _ = train_learner(loaders(columns, frame))
    assert [*learn.dls.vocab] == sorted(CLASSES)
