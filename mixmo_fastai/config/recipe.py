"""Recipes: all settings of a training run, as nested frozen dataclasses with strict validation.

A recipe is a TOML file that sets only what differs from the defaults, which are defined here.
Standard library only, so that a wrong key or value is refused before torch is imported.
"""

import dataclasses
import math
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixmo_fastai.config.choices import (
    COMPILE,
    COW_DEFAULTS,
    DEVICES,
    LOADERS,
    MASK_KINDS,
    MASK_OPTIONS,
    MEMORY_FORMATS,
    MSDA_KINDS,
    PRECISIONS,
    READOUTS,
    SCHEDULES,
    SELECTIONS,
    parse_architecture,
    parse_optimizer,
)
from mixmo_fastai.config.schema import (
    TOML_ERRORS,
    build_settings,
    choice_field,
    number_field,
    parse_value,
    to_mapping,
    to_toml,
)
from mixmo_fastai.errors import InputError, nearest, unknown_name_error

__all__ = [
    "Recipe",
    "find_recipe",
    "load_recipe",
    "override",
    "recipe_from_mapping",
    "recipe_home",
    "recipe_names",
    "to_mapping",
    "to_toml",
]


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
        dataset: a named data set, or the path of an image folder.
        valid_split: fraction of each class of the training set that is used for validation instead
            of training; if None, see `default_valid_split`; ignored if an image folder has a
            validation folder.
        test_split: fraction of each class of an image folder that becomes the test set if the
            folder has none; if None, 0.2, or 0 if the folder has a validation folder.
        limit: maximum number of training images, balanced over the classes; 0 for all.
        image_size: height and width to which the images of a folder are resized. If 0, the size of
            more than half of the training images or, if there is none, the median height and the
            median width, each at most 224. If None, the same, but on a CPU at most
            `defaults.MAX_CPU_SIDE`.
        skip_damaged: whether to skip image files that cannot be decoded; otherwise an error lists
            them. A run stores the names of skipped files in left-out.json.
        crop_padding: pixels of padding before the random crop; if None, that of the data set.
        flip: whether to flip images horizontally at random; if None, that of the data set.
        alternating_flip: whether to flip every second copy of an image in a batch instead of each
            copy at random.
        augmix: whether to apply AugMix to each training image, once per batch; requires the
            streaming loader.
        loader: "resident" (on the device), "streaming" (from worker processes), or "auto": resident
            if the data fits.
        num_workers: worker processes of the streaming loader.
    """

    dataset: str = "digits"
    valid_split: float | None = number_field(None, 0, 0.9)
    test_split: float | None = number_field(None, 0, 0.9)
    limit: int = number_field(0, 0)
    image_size: int | None = number_field(None, 0, 4096)
    skip_damaged: bool = False
    crop_padding: int | None = number_field(None, 0, 64)
    flip: bool | None = None
    alternating_flip: bool = False
    augmix: bool = False
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
        num_members: subnetworks M; 1 is the vanilla network.
        num_nets: networks of a deep ensemble, trained separately with different seeds; 1 for a
            single network.
        readout: how the heads read the core's feature maps; "core" is the core's own pooling.
        ghost_batch_size: number of images over which BatchNorm normalises in training; 0 for the
            whole batch.
    """

    arch: str | None = None
    pretrained: bool = False
    num_members: int = number_field(2, 1, 64)
    num_nets: int = number_field(1, 1, 64)
    readout: str = "core"
    ghost_batch_size: int = number_field(0, 0, 65_536)


@dataclass(frozen=True)
class Mix:
    """Pairing of images and mixing of features; see `MixMoCallback`.

    If the options of a mask kind (block_size of "patchup" and "patchup-soft"; sigma_min, sigma_max,
    area_min and area_max of "cow") are None, the defaults in `mixing/regions.py` apply.
    """

    kind: str = choice_field("cutmix", MASK_KINDS)
    alpha: float = number_field(2.0, 1e-3, 1e6)
    mix_prob: float = number_field(0.5, 0, 1)
    decay_start: float = number_field(11 / 12, 0, 1)
    weight_root: float = number_field(3.0, 1, finite=False)
    batch_repetitions: int = number_field(4, 1, 1024)
    input_repetition: float = number_field(0.0, 0, 1)
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
        return _drop_none(options)


@dataclass(frozen=True)
class Train:
    """Length of training, seed, device and execution.

    Attributes:
        epochs: passes over the loader; each shows every image batch_repetitions times per member.
            If None, chosen by `defaults.fill_defaults`.
        batch_size: images that the network sees per step, including repetitions.
        seed: random seed.
        device: "auto" is CUDA if available, otherwise the CPU.
        precision: "auto" is bfloat16 on CUDA, TF32 on GPUs without bfloat16, float32 on a CPU.
        memory_format: memory format of weights and features; "auto" is "channels-last".
        compile: "on", "off", or "auto": on CUDA if the training is long enough to amortise
            compilation.
        threads: CPU threads; 0 for torch's default.
        ema_decay: decay of an exponential moving average of the weights, which replaces the weights
            in evaluation and in saved files; 0 for no average.
        select: epoch whose weights are kept: "last", or "best" on the validation split.
    """

    epochs: int | None = number_field(None, 1, 1_000_000)
    batch_size: int = number_field(64, 1, 65_536)
    seed: int = number_field(0, 0, 2**63 - 1)
    device: str = choice_field("auto", DEVICES)
    precision: str = choice_field("auto", PRECISIONS)
    memory_format: str = choice_field("auto", MEMORY_FORMATS)
    compile: str = choice_field("auto", COMPILE)
    threads: int = number_field(0, 0, 1024)
    ema_decay: float = number_field(0.0, 0, 0.999999)
    select: str = choice_field("last", SELECTIONS)


@dataclass(frozen=True)
class Optimizer:
    """The optimizer.

    Attributes:
        name: one of `choices.OPTIMIZERS`, or "torch/NAME" or "fastai/NAME" for an optimizer of
            torch.optim or fastai.optimizer.
        base_lr: published learning rate of SGD, for a batch of 64 without repetition.
        lr: learning rate, instead of the rate derived from base_lr; required for optimizers other
            than SGD; for one-cycle, the peak rate.
        momentum: momentum of SGD in all schedules except one-cycle, which uses
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
        kind: "one-cycle" (cosine up, cosine down), "flat-cosine" (constant, then cosine down) or
            "published" (warm-up, then steps).
        peak: one-cycle: peak rate divided by the published rate, which is constant for the first
            third of training.
        pct_start: one-cycle: fraction of training during which the rate rises.
        div: one-cycle: peak rate divided by the initial rate.
        div_final: one-cycle and flat-cosine: peak rate divided by the final rate.
        flat_share: flat-cosine: fraction of training with a constant rate.
        momentums: one-cycle: momentum at start, peak and end.
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
    flat_share: float = number_field(0.75, 0, 1)
    momentums: tuple[float, ...] = number_field((0.95, 0.85, 0.95), 0, 1)
    milestones: tuple[float, ...] = number_field((101 / 300, 201 / 300, 226 / 300), 0, 1)
    gamma: float = number_field(0.1, 0, 1, open_low=True)
    warmup_epochs: float = number_field(1.0, 0, 1_000_000)


@dataclass(frozen=True)
class Expected:
    """The published accuracy, for comparison; it does not affect training.

    Attributes:
        accuracy: top-1 accuracy in [0, 1].
        source: source of the accuracy.
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


def recipe_from_mapping(values: Mapping[str, Any], source: str) -> Recipe:
    """Build a recipe from nested values, checking every key, type and range.

    Args:
        values: nested values, as read from TOML.
        source: where the values come from, such as a file; error messages name it.

    Raises:
        InputError: a key is unknown, a value is invalid, or values contradict each other.
    """
    recipe: Recipe = build_settings(Recipe, values, source)
    _check_consistency(recipe, source)
    return recipe


def override(recipe: Recipe, assignments: Iterable[str], source: str = "--set") -> Recipe:
    """Apply assignments such as "optimizer.lr=0.05"; a value that is not valid TOML is a string.

    Raises:
        InputError: an assignment has no "=", an unknown key or an invalid value.
    """
    values = dataclasses.asdict(recipe)  # unlike to_mapping, keeps settings that are None
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise InputError(
                f"{source} {assignment!r}: write section.key=value, such as train.epochs=5."
            )
        *path, last = key.strip().split(".")
        section = values
        for name in path:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise InputError(
                    f"{source} {assignment!r}: {name!r} is not a section.\n"
                    "Write section.key=value, such as train.epochs=5."
                )
        if isinstance(section.get(last), dict):  # assignment would reset its other keys
            raise InputError(
                f"{source} {assignment!r}: {last!r} is a section.\n"
                "Set its keys separately, such as train.epochs=5."
            )
        section[last] = parse_value(text.strip())
    return recipe_from_mapping(
        {k: _drop_none(item) if isinstance(item, dict) else item for k, item in values.items()},
        source,
    )


def load_recipe(name_or_file: str | Path) -> Recipe:
    """Load a recipe by name, such as "cifar100/cut-mixmo", or from a TOML file.

    Raises:
        InputError: the recipe does not exist or is invalid.
    """
    path = find_recipe(name_or_file)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Recipe {path} cannot be read: {error.strerror}.") from error
    except TOML_ERRORS as error:
        raise InputError(
            f"Recipe {path} is not valid TOML: {error}.\n"
            "`mixmo recipes NAME` shows a valid recipe with all settings."
        ) from error
    if path.resolve().is_relative_to(recipe_home()):
        name = path.resolve().relative_to(recipe_home()).with_suffix("").as_posix()
        values.setdefault("name", name)
    return recipe_from_mapping(values, f"Recipe {path}")


def find_recipe(name_or_file: str | Path) -> Path:
    """Return the path of a recipe.

    Raises:
        InputError: `name_or_file` is neither a known name nor an existing file.
    """
    text = str(name_or_file)
    if text in recipe_names():
        return recipe_home() / f"{text}.toml"
    path = os.path.expanduser(text)
    if os.path.isfile(path):  # unlike Path.is_file, accepts any string
        return Path(path)
    guess = nearest(text, recipe_names())
    hint = f" Did you mean {guess!r}?" if guess else ""
    raise InputError(
        f"There is no recipe {text!r}.{hint}\n"
        "Pass a name that `mixmo recipes` lists, or the path of a TOML file."
    )


def recipe_names() -> list[str]:
    """List the names of the shipped recipes."""
    home = recipe_home()
    return sorted(p.relative_to(home).with_suffix("").as_posix() for p in home.rglob("*.toml"))


def recipe_home() -> Path:
    """Return the folder of shipped recipes: inside the package, or next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def _drop_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _check_consistency(recipe: Recipe, source: str) -> None:
    """Check that the settings are consistent with each other."""
    _check_mixing(recipe, source)
    _check_data_and_network(recipe, source)
    _check_schedule(recipe, source)
    _check_optimizer(recipe.optimizer, source)


def _check_mixing(recipe: Recipe, source: str) -> None:
    mix = recipe.mix
    try:
        if recipe.model.arch is not None:
            parse_architecture(recipe.model.arch)
    except InputError as error:
        raise InputError(f"{source}: model.arch: {error}") from None
    if mix.kind != "sum" and recipe.model.num_members < 2:
        raise InputError(
            f"{source}: mix.kind={mix.kind!r} needs model.num_members of 2 or more; got 1.\n"
            "For one member, use mix.kind='sum' and mix.batch_repetitions=1."
        )
    allowed = MASK_OPTIONS.get(mix.kind, ())
    if unknown_options := [name for name in mix.options if name not in allowed]:
        options = f"Its options: {', '.join(allowed)}." if allowed else "It has no options."
        raise InputError(
            f"{source}: mix.{unknown_options[0]} is not an option of mix.kind={mix.kind!r}.\n"
            f"{options}"
        )
    if mix.block_size is not None and mix.block_size % 2 == 0:
        raise InputError(f"{source}: mix.block_size is {mix.block_size}; it must be odd.")
    for low, high in (("sigma_min", "sigma_max"), ("area_min", "area_max")):
        bounds = {**COW_DEFAULTS, **mix.options}
        if bounds[low] > bounds[high]:
            raise InputError(
                f"{source}: mix.{low} is {bounds[low]:g} and mix.{high} is {bounds[high]:g}; "
                f"mix.{low} must not exceed mix.{high}."
            )


def _check_data_and_network(recipe: Recipe, source: str) -> None:
    if recipe.model.readout not in READOUTS:
        raise InputError(
            f"{source}: model.readout: "
            f"{unknown_name_error('readout', recipe.model.readout, READOUTS)}"
        )
    mix, train = recipe.mix, recipe.train
    if recipe.model.ghost_batch_size == 1:
        raise InputError(
            f"{source}: model.ghost_batch_size is 1; it must be 0, for the whole batch, or 2 or "
            "more."
        )
    if recipe.data.augmix and recipe.data.loader == "resident":
        raise InputError(
            f"{source}: data.augmix processes single images and does not work with the resident "
            "loader.\nUse data.loader='streaming' or 'auto'."
        )
    if train.select == "best" and recipe.data.valid_split == 0:
        raise InputError(
            f"{source}: train.select='best' selects the epoch on the validation split, but "
            "data.valid_split=0 leaves no validation images.\n"
            "Set data.valid_split, or use train.select='last'; the test set is only for the final "
            "evaluation."
        )
    if train.batch_size % mix.batch_repetitions:
        multiple = max(1, round(train.batch_size / mix.batch_repetitions)) * mix.batch_repetitions
        raise InputError(
            f"{source}: train.batch_size={train.batch_size} is not a multiple of "
            f"mix.batch_repetitions={mix.batch_repetitions}.\nNearest: {multiple}."
        )


def _check_schedule(recipe: Recipe, source: str) -> None:
    if len(recipe.schedule.momentums) != 3:
        raise InputError(
            f"{source}: schedule.momentums is {recipe.schedule.momentums}; "
            "it must be three numbers: start, peak, end."
        )
    if list(recipe.schedule.milestones) != sorted(recipe.schedule.milestones):
        raise InputError(
            f"{source}: schedule.milestones is {recipe.schedule.milestones}; it must be sorted in "
            "ascending order."
        )


def _check_optimizer(optimizer: Optimizer, source: str) -> None:
    name, default = optimizer.name, Optimizer()
    try:
        parse_optimizer(name)
    except InputError as error:
        raise InputError(f"{source}: optimizer.name: {error}") from None
    if name == "sgd":
        if optimizer.options:
            raise InputError(
                f"{source}: optimizer.options is for optimizers other than sgd.\n"
                "Use optimizer.momentum, optimizer.nesterov and optimizer.weight_decay."
            )
        if optimizer.nesterov and optimizer.momentum == 0:
            raise InputError(
                f"{source}: optimizer.nesterov=true needs optimizer.momentum above 0; got 0.\n"
                "Increase optimizer.momentum, or use optimizer.nesterov=false."
            )
        return
    if optimizer.lr is None:
        raise InputError(
            f"{source}: optimizer.name={name!r} needs optimizer.lr (--lr); the default learning "
            "rate is for sgd.\n`mixmo lr-find` suggests one, given --set optimizer.lr=0.001."
        )
    if reserved := sorted({"lr", "params", "wd", "weight_decay"} & optimizer.options.keys()):
        raise InputError(
            f"{source}: optimizer.options.{reserved[0]} is not allowed.\n"
            "Use optimizer.lr and optimizer.weight_decay."
        )
    for key in ("momentum", "nesterov"):
        if getattr(optimizer, key) != getattr(default, key):
            raise InputError(
                f"{source}: optimizer.{key} is a setting of sgd; got optimizer.name={name!r}.\n"
                f"Use optimizer.options.{key} if {name} has it."
            )
