"""Mistakes in what users add are explained before a training begins."""

import dataclasses

import pytest
import torch
from synthetic import fastai_dls, image_arrays, mixmo_dls, source
from torch import nn

from mixmo_fastai import MixMoModel, mixmo_learner
from mixmo_fastai.cli.program import run as program
from mixmo_fastai.config import choices
from mixmo_fastai.config.choices import DATASETS, TransformInfo
from mixmo_fastai.config.registered import resolve_registered
from mixmo_fastai.data.cuts import Augmentation
from mixmo_fastai.data.dataloaders import make_dataloaders
from mixmo_fastai.data.image_sets import ArrayImages, DataSource, Subset, numbered
from mixmo_fastai.data.sources import SOURCES, NamedSource, load_source
from mixmo_fastai.data.transforms import BatchTransform, ImageTransform, build_transform
from mixmo_fastai.errors import InputError
from mixmo_fastai.learner.optimizers import build_optimizer_factory, from_torch
from mixmo_fastai.metrics.fastai import StreamingMetric
from mixmo_fastai.metrics.table import METRICS
from mixmo_fastai.models import create_model
from mixmo_fastai.models.readout import Readout, average

PIXELS, LABELS = image_arrays(12)
NAMES = numbered("train", 12)


def explained(raised):
    """Return the message of an error, which has at most three lines."""
    message = str(raised.value)
    assert len(message.splitlines()) <= 3
    return message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"pixels": PIXELS.float() / 255}, "uint8; got (12, 3, 8, 8) of float32"),
        ({"pixels": PIXELS.numpy()}, "uint8; got ndarray"),
        ({"pixels": PIXELS[0]}, "uint8; got (3, 8, 8) of uint8"),
        ({"pixels": PIXELS.permute(0, 2, 3, 1)}, "looks like (N, H, W, C)"),
        ({"labels": LABELS.int()}, "int64; got (12,) of int32"),
        ({"labels": LABELS.tolist()}, "int64; got list"),
        ({"labels": LABELS[:, None]}, "int64; got (12, 1) of int64"),
        ({"labels": LABELS[:9]}, "got 12 images, 9 labels and 12 names"),
        ({"names": NAMES[:3]}, "got 12 images, 12 labels and 3 names"),
    ],
)
def test_images_in_arrays(change, expected):
    with pytest.raises(InputError) as raised:
        ArrayImages(**{"pixels": PIXELS, "labels": LABELS, "names": NAMES} | change)
    assert expected in explained(raised)


def images_with(labels=LABELS, size=8):
    return ArrayImages(image_arrays(12, size)[0], labels, NAMES)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"std": (0.2, 0.0, 0.2)},
            "std must have one number above 0 and at most 1 per channel, here 3",
        ),
        ({"std": (0.2,)}, "std must have one number above 0 and at most 1 per channel"),
        ({"mean": (0.2, 0.3)}, "mean must have one number from 0 to 1 per channel, here 3"),
        ({"mean": (0.2, 0.3, float("nan"))}, "mean must have one number from 0 to 1 per channel"),
        ({"mean": 0.5}, "mean must have one number from 0 to 1 per channel"),
        ({"mean": (128.0,) * 3, "std": (50.0,) * 3}, "since pixels are divided by 255"),
        ({"classes": 3}, "classes must be the names of the classes, as strings; got 3"),
        ({"classes": "abc"}, "as strings; got 'abc'"),
        ({"crop_padding": 0.5}, "crop_padding must be an integer, 0 or more"),
        ({"train": images_with(LABELS + 1)}, "'blocks', train must be indices of its 3 classes"),
        ({"test": images_with(LABELS - 1)}, "from 0 to 2; got -1 to 1"),
        ({"valid": images_with(LABELS + 9)}, "'blocks', valid must be indices"),
        ({"test": images_with(size=9)}, "(3, 8, 8), those of test (3, 9, 9)"),
    ],
)
def test_sources(change, expected):
    with pytest.raises(InputError) as raised:
        dataclasses.replace(source(), **change)
    assert expected in explained(raised)


def test_sources_without_test_images_and_of_subsets_are_accepted():
    whole = source()
    nothing = Subset(whole.test, torch.empty(0, dtype=torch.int64))
    part = Subset(whole.train, torch.arange(30))
    assert len(dataclasses.replace(whole, train=part, test=nothing).train) == 30


@pytest.mark.parametrize(
    ("fact", "expected"),
    [
        ({"num_classes": 4}, "has num_classes 3, but its entry in DATASETS states 4"),
        ({"image_shape": (3, 9, 9)}, "has image_shape (3, 8, 8), but"),
    ],
)
def test_named_data_sets_must_have_their_stated_properties(monkeypatch, tmp_path, fact, expected):
    facts = dataclasses.replace(DATASETS["digits"], num_classes=3, image_shape=(3, 8, 8))
    monkeypatch.setitem(DATASETS, "blocks", facts)
    monkeypatch.setitem(SOURCES, "blocks", NamedSource(source))
    assert isinstance(load_source("blocks", tmp_path), DataSource)
    monkeypatch.setitem(DATASETS, "blocks", dataclasses.replace(facts, **fact))
    with pytest.raises(InputError) as raised:
        load_source("blocks", tmp_path)
    assert expected in explained(raised)


class OneArgument(Readout):
    def forward(self, maps):
        return average(maps)


class Returns(Readout):
    """A readout that returns the result of a function of its arguments."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, maps, masks):
        return self.function(maps, masks)


@pytest.mark.parametrize(
    ("readout", "expected"),
    [
        (OneArgument, "pass an instance: readout=OneArgument()"),
        (3, "readout must be a name, a module or None; got 3"),
        (OneArgument(), "The readout OneArgument must have a method forward(maps, masks)"),
    ],
)
def test_readouts_that_are_none(readout, expected):
    with pytest.raises(InputError) as raised:
        mixmo_learner(mixmo_dls(), "wrn10_1", readout=readout)
    assert expected in explained(raised)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda maps, masks: maps, "returned (4, 64, 2, 2) for maps (4, 64, 2, 2)"),
        (lambda maps, masks: average(maps)[:, :9], "returned (4, 9)"),
        (lambda maps, masks: average(maps)[:2], "returned (2, 64)"),
        (lambda maps, masks: average(maps)[:, None].expand(-1, 3, -1), "returned (4, 3, 64)"),
        (lambda maps, masks: (average(maps),), "returned tuple"),
    ],
)
@pytest.mark.parametrize("with_masks", [True, False])
def test_readouts_that_return_another_shape(function, expected, with_masks):
    model = create_model("wrn10_1", 3, 2, readout=Returns(function))
    images, masks = torch.zeros(4, 2, 3, 8, 8), torch.full((4, 2, 1, 8, 8), 0.5)
    with pytest.raises(InputError) as raised:
        model(images, masks) if with_masks else model(images[:, 0])
    message = explained(raised)
    assert f"The readout Returns {expected}" in message
    assert ("(4, 64) or (4, 2, 64)" in message) == with_masks


def test_readouts_with_one_embedding_per_head_need_masks():
    model = create_model("wrn10_1", 3, 2, readout=Returns(lambda maps, _: torch.zeros(4, 2, 64)))
    images, masks = torch.zeros(4, 2, 3, 8, 8), torch.full((4, 2, 1, 8, 8), 0.5)
    assert model(images, masks).shape == (4, 2, 3)
    with pytest.raises(InputError, match=r"returned \(4, 2, 64\) .*; expected \(4, 64\)\."):
        model(images[:, 0])


def test_encoders_of_different_sizes():
    encoders = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3)]
    core = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = MixMoModel(encoders, core, [nn.Linear(8, 3), nn.Linear(8, 3)])
    with pytest.raises(InputError) as raised:
        mixmo_learner(mixmo_dls(), model).fit(1)
    assert "feature maps of equal shape" in explained(raised)
    assert "got (8, 8, 8), (8, 6, 6) for images of (8, 8)" in explained(raised)


def test_batch_transforms_need_a_generator():
    with pytest.raises(InputError) as raised:
        BatchTransform(lambda images: images)
    assert "must take images and a generator" in explained(raised)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda images: images[1:], "got (35, 3, 8, 8) uint8"),
        (lambda images: images.float(), "got (36, 3, 8, 8) float32"),
        (lambda images: images[:, :, :5], "got (36, 3, 5, 8) uint8"),
        (lambda images: None, "got NoneType"),
    ],
)
def test_transforms_that_change_the_type_of_images(function, expected):
    transform = BatchTransform(lambda images, generator: function(images))
    augmentation = Augmentation(transform=transform)
    dls = make_dataloaders(
        source(), batch_size=9, valid_split=0.1, augmentation=augmentation, device="cpu"
    )
    with pytest.raises(InputError) as raised:
        next(iter(dls.train.expanded(4)))
    message = explained(raised)
    assert "must keep shape and type: (36, 3, 8, 8) uint8; " in message
    assert expected in message


@pytest.mark.parametrize(
    "function", [lambda image: image[:1], lambda image: image / 255, lambda image: None]
)
def test_image_transforms_that_change_the_type_of_an_image(function):
    transform = ImageTransform(function).seeded(seed=0, epoch=0)
    with pytest.raises(InputError) as raised:
        transform(PIXELS[0], index=0)
    assert "must keep shape and type: (3, 8, 8) uint8; got" in explained(raised)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("mixmo_fastai.mixing.regions.box", "it must have the form 'package.module:name'"),
        ("mixmo_fastai.mixing.absent:box", "ModuleNotFoundError: No module named"),
        ("mixmo_fastai.mixing.regions:absent", "AttributeError: module"),
        ("a b:c", "ValueError: invalid format"),
    ],
)
def test_registered_names_that_cannot_be_imported(target, expected):
    with pytest.raises(InputError) as raised:
        resolve_registered("mask kind", "mine", target)
    message = explained(raised)
    assert f"The mask kind 'mine' is registered as {target!r}, which cannot be imported" in message
    assert expected in message


def test_every_table_names_its_kind(monkeypatch):
    absent = "mixmo_fastai.absent:name"
    monkeypatch.setitem(choices.READOUTS, "mine", absent)
    with pytest.raises(InputError, match="The readout 'mine' is registered as"):
        create_model("wrn10_1", 3, 2, readout="mine")
    monkeypatch.setitem(choices.TRANSFORMS, "mine", TransformInfo(absent, "Mine"))
    with pytest.raises(InputError, match="The transform 'mine' is registered as"):
        build_transform("mine")
    monkeypatch.setitem(choices.OPTIMIZERS, "mine", absent)
    with pytest.raises(InputError, match="The optimizer 'mine' is registered as"):
        build_optimizer_factory("mine", 0.0)
    metric = dataclasses.replace(METRICS[0], name="mine", function=absent, arguments=())
    with pytest.raises(InputError, match="The metric 'mine' is registered as"):
        metric.compute(None)


def parts(num_features=8):
    core = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return [nn.Conv2d(3, 8, 3) for _ in range(2)], core, [nn.Linear(num_features, 3) for _ in "ab"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({0: [nn.Conv2d(3, 8, 3)] * 2}, "encoders must be separate modules"),
        ({2: [nn.Linear(8, 3)] * 2}, "heads must be separate modules"),
        ({0: [nn.Conv2d, nn.Conv2d]}, "encoders must be modules; got <class"),
        ({0: nn.Conv2d(3, 8, 3)}, "encoders must be a list of modules"),
    ],
)
def test_parts_of_a_network(change, expected):
    arguments = [change.get(position, part) for position, part in enumerate(parts())]
    with pytest.raises(InputError) as raised:
        MixMoModel(*arguments)
    assert expected in explained(raised)


@pytest.mark.parametrize(
    ("core", "num_features", "expected"),
    [
        (nn.AdaptiveAvgPool2d(1), 8, "The core returned (4, 8, 1, 1); the heads need (B, 8)"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), 9, "(4, 8); the heads need (B, 9)"),
    ],
)
def test_cores_that_do_not_fit_the_heads(core, num_features, expected):
    encoders, _, heads = parts(num_features)
    with pytest.raises(InputError) as raised:
        MixMoModel(encoders, core, heads)(torch.zeros(4, 3, 8, 8))
    assert expected in explained(raised)


@pytest.mark.parametrize(
    ("opt_func", "expected"),
    [
        (torch.optim.AdamW, "Wrap it: opt_func=from_torch(AdamW)"),
        ("adamw", "must be a function that creates an optimizer; got 'adamw'"),
    ],
)
def test_optimizers_of_torch_need_a_wrapper(opt_func, expected):
    with pytest.raises(InputError) as raised:
        mixmo_learner(mixmo_dls(), "wrn10_1", opt_func=opt_func)
    assert expected in explained(raised)


@pytest.mark.parametrize("kind", ["adamw", torch.nn.Linear, 3])
def test_from_torch_needs_a_class_of_optimizers(kind):
    with pytest.raises(InputError, match="from_torch needs a class of optimizers"):
        from_torch(kind)


def test_settings_of_an_optimizer_are_refused_before_a_run_is_created(tmp_path, capsys):
    folder = tmp_path / "run"
    settings = "--set optimizer.name=torch/RAdam --lr 0.001 --set optimizer.options.betas=[0.9,1.5]"
    arguments = f"fit digits --arch wrn10_1 --limit 64 --epochs 1 --device cpu {settings}".split()
    assert program([*arguments, "--out", str(folder)]) == 2
    assert "torch/RAdam rejects the settings" in capsys.readouterr().err
    assert not folder.exists()


class Listing(torch.optim.SGD):
    """An optimizer whose state no checkpoint can hold."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["sizes"] = [1, 2]


def listing(weight_decay=0.0):
    return from_torch(Listing, weight_decay=weight_decay)


def without_decay():
    return from_torch(Listing)


def test_a_state_that_cannot_be_saved_is_refused_after_one_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(choices.OPTIMIZERS, "listing", f"{__name__}:listing")
    steps = []
    monkeypatch.setattr(Listing, "zero_grad", lambda self, *_: steps.append(len(self.state)))
    settings = "--set optimizer.name=listing --lr 0.001 --epochs 2 --limit 64 --device cpu"
    arguments = ["fit", "digits", "--arch", "wrn10_1", *settings.split()]
    assert program([*arguments, "--out", str(tmp_path / "run"), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert "keeps 'sizes' of type list, which checkpoints cannot hold.\n" in error
    assert len(error.splitlines()) <= 3
    assert len(steps) <= 1


def test_an_optimizer_without_weight_decay_is_explained(monkeypatch):
    monkeypatch.setitem(choices.OPTIMIZERS, "without", f"{__name__}:without_decay")
    with pytest.raises(InputError, match=r"test_extension_errors:without_decay must accept weight"):
        build_optimizer_factory("without", 1e-4)


class Terms(StreamingMetric):
    def __init__(self, function):
        self.function = function

    def terms(self, learn):
        return self.function(learn.pred)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda pred: pred.double(), "(16,); got (16, 3) of float64"),
        (lambda pred: pred.double()[:, :1], "(16,); got (16, 1) of float64"),
        (lambda pred: pred.argmax(dim=1), "(16,); got (16,) of int64"),
        (lambda pred: pred.double().mean(), "(16,); got () of float64"),
        (lambda pred: pred.double()[:3, 0], "(16,); got (3,) of float64"),
        (lambda pred: pred[:, 0].tolist(), "(16,); got list"),
        (lambda pred: None, "(16,); got NoneType"),
    ],
)
def test_terms_of_a_streaming_metric(function, expected):
    dls = fastai_dls()
    learn = mixmo_learner(dls, "wrn10_1", loss_func=nn.CrossEntropyLoss(), metrics=Terms(function))
    with learn.no_bar(), pytest.raises(InputError) as raised:
        learn.validate()
    message = explained(raised)
    assert "Terms.terms must return one floating-point number per sample, " in message
    assert expected in message


def test_a_streaming_metric_without_terms():
    class Nothing(StreamingMetric):
        pass

    with pytest.raises(InputError, match=r"Nothing must define the method terms\(learn\)"):
        Nothing().terms(None)
