"""Recipes: all settings of a training run, as nested frozen dataclasses with strict validation.

A recipe is a TOML file that sets only what differs from the defaults, which are defined here.
Standard library only, so that a wrong key or value is refused before torch is imported.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from mixmo_fastai.config.choices import (
    CLASS_WEIGHTS,
    COMPILE,
    CROP_SOURCES,
    DEVICES,
    EARLY_SHAPES,
    LOADERS,
    LOSSES,
    MASK_OPTIONS,
    MASK_REGIONS,
    MEMORY_FORMATS,
    MSDA_KINDS,
    PRECISIONS,
    SCHEDULES,
    SELECTIONS,
    TRANSFORMS,
)
from mixmo_fastai.config.schema import (
    choice_field,
    drop_none,
    number_field,
    text_field,
)


def default_valid_split(num_images: int) -> float:
    """Return the default fraction of the training set that is used for validation.

    The default is 2 %. If that is less than 100 images, it is 100 images or 20 %, whichever is
    smaller. The 95 % interval of an accuracy on 100 images is about ±10 percentage points.

    Args:
        num_images: number of training images before the split.
    """
    return max(0.02, min(0.2, round(100 / max(1, num_images), 4)))


@dataclass(frozen=True)
class Data:
    """Data set, splits, augmentation and loader.

    Attributes:
        dataset: a named data set, or the path of an image folder or of a table of labels.
        path_column, label_column, split_column, group_column: columns of a table of labels; "" to
            find them by their names, "none" for no split or no group. `label_column` may name one
            column of 0 and 1 per label, separated by commas. Images of one group, such as a
            patient's, are never in two splits.
        fold: with a column of folds instead of splits, the fold that is used for validation; the
            others are trained on. "" without folds.
        image_folder: folder to which the paths in a table are relative, itself relative to that of
            the table.
        label_delimiter: what separates several labels of an image in a table; "" to find it, "none"
            for one label per image; with one column per label, "," for several.
        valid_split: fraction of each class of the training set that is used for validation instead
            of training; if None, see `default_valid_split`; ignored if an image folder has a
            validation folder.
        calibration_split: fraction of each class of the validation images that is only used for
            calibration. If None: all of them, or half of them if `train.select` is "best", so that
            the images which select an epoch do not calibrate it.
        test_split: fraction of each class of an image folder that becomes the test set if the
            folder has none; if None, 0.2, or 0 if the folder has a validation folder.
        limit: maximum number of training images, balanced over the classes; 0 for all.
        image_size: height and width to which images are resized. If 0 or None, named data sets keep
            their size. A folder has, if 0, the size of more than half of the training images or, if
            there is none, the median height and the median width, each at most 224; if None, the
            same, but on a CPU at most `defaults.MAX_CPU_SIDE`.
        skip_damaged: whether to skip image files that cannot be decoded; otherwise an error lists
            them. A run stores the names of skipped files in left-out.json.
        crop_padding: pixels of padding before the random crop; if None, that of the data set.
        flip: whether to flip images horizontally at random; if None, that of the data set.
        alternating_flip: whether to flip every second copy of an image in a batch instead of each
            copy at random.
        transform: transform of the training images, one of `choices.TRANSFORMS`; "standard" is
            crop and flip, "none" neither.
        transform_options: keyword arguments of the transform.
        crop_from: what `random-resized-crop` crops: the "original" files at their own size, in
            workers of the streaming loader, or images "resized" to the image size. With "auto", a
            new run on image files of other sizes crops the originals, unless the loader is
            "resident"; others crop resized images.
        loader: "resident" (on the device), "streaming" (from worker processes), or "auto": resident
            if the data fits.
        num_workers: worker processes of the streaming loader.
    """

    dataset: str = "digits"
    path_column: str = text_field()
    label_column: str = text_field()
    split_column: str = text_field()
    group_column: str = text_field()
    fold: str = text_field()
    image_folder: str = ""
    label_delimiter: str = ""
    valid_split: float | None = number_field(None, 0, 0.9)
    calibration_split: float | None = number_field(None, 0, 1)
    test_split: float | None = number_field(None, 0, 0.9)
    limit: int = number_field(0, 0)
    image_size: int | None = number_field(None, 0, 4096)
    skip_damaged: bool = False
    crop_padding: int | None = number_field(None, 0, 64)
    flip: bool | None = None
    alternating_flip: bool = False
    transform: str = choice_field("standard", TRANSFORMS)
    transform_options: dict[str, Any] = field(default_factory=dict)
    crop_from: str = choice_field("auto", CROP_SOURCES)
    loader: str = choice_field("auto", LOADERS)
    num_workers: int = number_field(2, 0, 256)


@dataclass(frozen=True)
class Model:
    """The network.

    Attributes:
        arch: architecture, such as "wrn28_10", "preact_resnet18_3", "resnet50" or
            "timm/convnext_atto"; if None, chosen by `defaults.fill_defaults`.
        pretrained: whether to start a torchvision or timm network from its library's pretrained
            weights.
        weights: file of pretrained weights to start from instead; "" for none.
        num_members: subnetworks M; 1 is the vanilla network.
        perturbation: how much the encoders of members differ that start from pretrained weights;
            see `convert_to_mixmo`.
        num_nets: networks of a deep ensemble, trained separately with different seeds; 1 for a
            single network.
        readout: how the heads read the core's feature maps; "core" is the core's own pooling.
        ghost_batch_size: number of images over which BatchNorm normalises in training; 0 for the
            whole batch.
    """

    arch: str | None = None
    pretrained: bool = False
    weights: str = ""
    num_members: int = number_field(2, 1, 64)
    perturbation: float = number_field(0.1, 0, 1)
    num_nets: int = number_field(1, 1, 64)
    readout: str = "core"
    ghost_batch_size: int = number_field(0, 0, 65_536)


@dataclass(frozen=True)
class Mix:
    """Pairing of images and mixing of features; see `MixMoCallback`.

    If the options of a mask kind (block_size of "patchup" and "patchup-soft"; sigma_min, sigma_max,
    area_min and area_max of "cow") are None, the defaults in `mixing/regions.py` apply.
    """

    kind: str = choice_field("cutmix", MASK_REGIONS)
    alpha: float = number_field(2.0, 1e-3, 1e6)
    mix_prob: float = number_field(0.5, 0, 1)
    decay_start: float = number_field(11 / 12, 0, 1)
    weight_root: float = number_field(3.0, 1, finite=False)
    batch_repetitions: int = number_field(4, 1, 1024)
    input_repetition: float = number_field(0.0, 0, 1)
    early_repetition: float | None = number_field(None, 0, 1)
    early_span: float = number_field(0.4, 1e-3, 1)
    early_shape: str = choice_field("linear", EARLY_SHAPES)
    msda: str = choice_field("none", ("none", *MSDA_KINDS))
    msda_alpha: float = number_field(1.0, 1e-3, 1e6)
    msda_prob: float = number_field(0.5, 0, 1)
    block_size: int | None = number_field(None, 1, 1023)
    sigma_min: float | None = number_field(None, 0, 1e4, open_low=True)
    sigma_max: float | None = number_field(None, 0, 1e4, open_low=True)
    area_min: float | None = number_field(None, 0, 1)
    area_max: float | None = number_field(None, 0, 1)

    @property
    def options(self) -> dict[str, float]:
        """The mask options that are not None."""
        options = {name: getattr(self, name) for names in MASK_OPTIONS.values() for name in names}
        return drop_none(options)


@dataclass(frozen=True)
class Train:
    """Length of training, seed, device and execution.

    Attributes:
        epochs: passes over the loader; each shows every image batch_repetitions times per member.
            If None, chosen by `defaults.fill_defaults`.
        images_seen: length of training as the number of inputs that all networks see together, to
            the nearest epoch, instead of `epochs`.
        batch_size: inputs that the network sees per step, including repetitions; a mixture of M
            images counts as one.
        seed: random seed.
        device: "auto" is CUDA if available, otherwise the CPU.
        precision: "auto" is bfloat16 on CUDA, TF32 on GPUs without bfloat16; on a CPU, `mixmo fit`
            measures which of float32 and bfloat16 is faster, in runs of a minute or more.
        memory_format: memory format of weights and features; "auto" is "channels-last".
        compile: "on", "off", or "auto": on CUDA if the training is long enough to amortise
            compilation.
        threads: CPU threads; 0 for torch's default. "auto" is all CPUs that the process may use; on
            a CPU, `mixmo fit` measures whether fewer are faster, in runs of 20 seconds or more.
        ema_decay: decay of an exponential moving average of the weights, which replaces the weights
            in evaluation and in saved files; 0 for no average.
        select: epoch whose weights are kept: "last", or "best" on the validation split.
    """

    epochs: int | None = number_field(None, 1, 1_000_000)
    images_seen: int | None = number_field(None, 1, 10**15)
    batch_size: int = number_field(64, 1, 65_536)
    seed: int = number_field(0, 0, 2**63 - 1)
    device: str = choice_field("auto", DEVICES)
    precision: str = choice_field("auto", PRECISIONS)
    memory_format: str = choice_field("auto", MEMORY_FORMATS)
    compile: str = choice_field("auto", COMPILE)
    threads: int | str = number_field("auto", 0, 1024, words=("auto",))
    ema_decay: float = number_field(0.0, 0, 0.999999)
    select: str = choice_field("last", SELECTIONS)


@dataclass(frozen=True)
class Loss:
    """The loss of each member, for data with one class per image.

    Attributes:
        name: one of `choices.LOSSES`.
        label_smoothing: cross-entropy: fraction of each label that is spread over all classes.
        class_weights: "balanced" to weight each image inversely to the number of training images of
            its class, so that all classes count equally.
        options: further keyword arguments of a loss other than cross-entropy, such as gamma.
    """

    name: str = choice_field("cross-entropy", LOSSES)
    label_smoothing: float = number_field(0.0, 0, 0.99)
    class_weights: str = choice_field("none", CLASS_WEIGHTS)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Optimizer:
    """The optimizer.

    Attributes:
        name: one of `choices.OPTIMIZERS`, or "torch/NAME" or "fastai/NAME" for an optimizer of
            torch.optim or fastai.optimizer.
        base_lr: published learning rate of SGD, for a batch of 64 without repetition.
        lr: learning rate, instead of the rate derived from base_lr; required for optimizers other
            than SGD; for one-cycle, the peak rate.
        momentum: momentum of SGD in all schedules except one-cycle and fine-tune, which use
            `schedule.momentums`.
        nesterov: whether SGD uses Nesterov momentum.
        weight_decay: weight decay of all parameters, including those of BatchNorm, as published:
            3e-4 · Σ W² in the loss has the gradient 6e-4 · W.
        options: further keyword arguments of an optimizer other than SGD, such as betas.
    """

    name: str = "sgd"
    base_lr: float = number_field(0.05, 0, 1e30, open_low=True)
    lr: float | None = number_field(None, 0, 1e30, open_low=True)
    momentum: float = number_field(0.9, 0, 1)
    nesterov: bool = True
    weight_decay: float = number_field(6e-4, 0, 1e30)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Schedule:
    """Learning-rate schedule.

    Attributes:
        kind: "one-cycle" (cosine up, cosine down), "flat-cosine" (constant, then cosine down),
            "published" (warm-up, then steps) or "fine-tune" (as fastai's `fine_tune`: one-cycle for
            the heads, then one-cycle for all layers, with a lower rate for the body).
        peak: one-cycle: peak rate divided by the published rate, which is constant for the first
            third of training.
        pct_start: one-cycle and fine-tune: fraction of training, or of its second part, during
            which the rate rises.
        div: one-cycle and fine-tune: peak rate divided by the initial rate.
        div_final: all but published: peak rate divided by the final rate.
        frozen_share: fine-tune: fraction of training in which the heads alone are trained.
        body_div: fine-tune: rate of the heads divided by that of the body.
        flat_share: flat-cosine: fraction of training with a constant rate.
        momentums: one-cycle and fine-tune: momentum at start, peak and end.
        milestones: published: fractions of training after which the rate is multiplied by gamma.
        gamma: published: factor by which the rate is multiplied at each milestone.
        warmup_epochs: published: epochs of linear warm-up, as counted by `Recipe.warmup_steps`; the
            rate rises at every step.
    """

    kind: str = choice_field("one-cycle", SCHEDULES)
    peak: float = number_field(2.0, 0, 1e6, open_low=True)
    pct_start: float = number_field(0.25, 0, 1)
    div: float = number_field(25.0, 1, 1e12)
    div_final: float = number_field(1e5, 1, 1e12)
    frozen_share: float = number_field(0.2, 0, 0.99)
    body_div: float = number_field(100.0, 1, 1e6)
    flat_share: float = number_field(0.75, 0, 1)
    momentums: tuple[float, ...] = number_field((0.95, 0.85, 0.95), 0, 1)
    milestones: tuple[float, ...] = number_field((101 / 300, 201 / 300, 226 / 300), 0, 1)
    gamma: float = number_field(0.1, 0, 1, open_low=True)
    warmup_epochs: float = number_field(1.0, 0, 1_000_000)


@dataclass(frozen=True)
class Expected:
    """The accuracy to expect, for comparison; it does not affect training.

    Attributes:
        accuracy: top-1 accuracy in [0, 1], published or measured by this project.
        source: source of the accuracy; begins with "measured" if it is this project.
        arch: network of the accuracy.
    """

    accuracy: float | None = number_field(None, 0, 1)
    source: str = ""
    arch: str = ""


@dataclass(frozen=True)
class Recipe:
    """All settings of a run. Load one with `load_recipe` or `recipe_from_mapping`."""

    name: str = ""
    title: str = ""
    data: Data = Data()
    model: Model = Model()
    mix: Mix = Mix()
    train: Train = Train()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    expected: Expected = Expected()

    @property
    def lr(self) -> float:
        """The learning rate: base_lr · batch_size / 64 / batch_repetitions, times the peak.

        As published, the rate is divided by the repetitions, since b copies of an image carry less
        information than b images. The factor `peak` applies to one-cycle only.
        """
        if self.optimizer.lr is not None:
            return self.optimizer.lr
        scale = self.train.batch_size / 64 / self.mix.batch_repetitions
        peak = self.schedule.peak if self.schedule.kind == "one-cycle" else 1.0
        return self.optimizer.base_lr * scale * peak

    def warmup_steps(self, num_images: int) -> int:
        """Return the number of steps of the published warm-up.

        A warm-up epoch is batch_repetitions · ceil(num_images / batch_size) steps: as published,
        782 · b for the 50,000 images of CIFAR and 1000 · b for Tiny ImageNet. This includes the
        last, incomplete batch and the images that this project uses for validation.

        Args:
            num_images: training images, including those of the validation split.
        """
        batches = math.ceil(num_images / self.train.batch_size)
        return round(self.schedule.warmup_epochs * self.mix.batch_repetitions * batches)

    @property
    def loader_batch_size(self) -> int:
        """Number of distinct images per batch."""
        return self.train.batch_size // self.mix.batch_repetitions
