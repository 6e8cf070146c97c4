"""Recipes: everything that defines a training run, as typed, strict, nested settings.

A recipe is a TOML file that says only what makes it itself; all defaults are here. Standard library
only, so that a wrong key or value is refused before torch is imported.
"""

import dataclasses
import math
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmo_fastai.errors import InputError, nearest
from mixmo_fastai.names import (
    COMPILE,
    COW_DEFAULTS,
    DEVICES,
    LOADERS,
    MASK_KINDS,
    MASK_OPTIONS,
    MEMORY_FORMATS,
    MSDA_KINDS,
    PRECISIONS,
    SCHEDULES,
    SELECTIONS,
    parse_architecture,
)
from mixmo_fastai.settings import (
    NOT_TOML,
    build,
    choice,
    number,
    parse_value,
    to_mapping,
    to_toml,
)

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
    """Choose the fraction of the training set that validates.

    2 %, or if that is less than 100 images, 100 images or 20 %, whichever is smaller. An accuracy
    of 100 images is known to about 10 points either way.

    Args:
        num_images: training images, with those that will validate.
    """
    return max(0.02, min(0.2, round(100 / max(1, num_images), 4)))


@dataclass(frozen=True)
class Data:
    """What is trained on.

    Attributes:
        dataset: a named data set, or the path of an image folder.
        valid_split: share of each class of the training set that validates instead of training; by
            the number of images if it is not given, see `default_valid_split`; not used for an
            image folder with a validation folder.
        test_split: fraction of each class of an image folder without test images that is set aside
            to test; 0.2 if not given, or none beside a validation folder.
        limit: at most so many training images, balanced over the classes; 0 for all.
        image_size: height and width to which an image folder is scaled; 0 for its own: that of most
            training images, or else the median height and the median width. If not given, its own,
            and on a CPU no more than `sizing.MAX_CPU_SIDE`.
        skip_damaged: whether image files that cannot be decoded are left out; otherwise an error
            names them. A run keeps the names in left-out.json.
        crop_padding: pixels of padding before the random crop; the data set's where not given.
        flip: whether images are mirrored at random; the data set's where not given.
        alternating_flip: whether every second copy of an image in a batch is mirrored, in place of
            each by chance.
        augmix: whether each training image goes through AugMix first, once per batch it is in; it
            takes the streaming loader.
        loader: "resident" on the device, "streaming" by workers, "auto" resident where it fits.
        num_workers: processes that read images for the streaming loader.
    """

    dataset: str = "digits"
    valid_split: float | None = number(None, 0, 0.9)
    test_split: float | None = number(None, 0, 0.9)
    limit: int = number(0, 0)
    image_size: int | None = number(None, 0, 4096)
    skip_damaged: bool = False
    crop_padding: int | None = number(None, 0, 64)
    flip: bool | None = None
    alternating_flip: bool = False
    augmix: bool = False
    loader: str = choice("auto", LOADERS)
    num_workers: int = number(2, 0, 256)


@dataclass(frozen=True)
class Model:
    """The network.

    Attributes:
        arch: as in "wrn28_10", "preact_resnet18_3", "resnet50" or "timm/convnext_atto"; chosen by
            `sizing.fill_defaults` where not given.
        pretrained: whether a network of torchvision or timm starts from its library's weights.
        num_members: subnetworks M; 1 is the vanilla network.
        num_nets: networks of a deep ensemble, each trained by itself from another seed; 1 for none.
        ghost_batch_size: images among which BatchNorm normalises in training; 0 for all of a batch.
    """

    arch: str | None = None
    pretrained: bool = False
    num_members: int = number(2, 1, 64)
    num_nets: int = number(1, 1, 64)
    ghost_batch_size: int = number(0, 0, 65_536)


@dataclass(frozen=True)
class Mix:
    """How images are paired and features mixed; see `MixMoCallback`.

    The options of a mask kind (block_size of "patchup" and "patchup-soft"; sigma_min, sigma_max,
    area_min and area_max of "cow") are the kind's own where not given; see `mixing/regions.py`.
    """

    kind: str = choice("cutmix", MASK_KINDS)
    alpha: float = number(2.0, 1e-3, 1e6)
    mix_prob: float = number(0.5, 0, 1)
    decay_start: float = number(11 / 12, 0, 1)
    weight_root: float = number(3.0, 1, finite=False)
    batch_repetitions: int = number(4, 1, 1024)
    input_repetition: float = number(0.0, 0, 1)
    msda: str = choice("none", ("none", *MSDA_KINDS))
    msda_alpha: float = number(1.0, 1e-3, 1e6)
    msda_prob: float = number(0.5, 0, 1)
    block_size: int | None = number(None, 1, 1023)
    sigma_min: float | None = number(None, 0, 1e4, open_low=True)
    sigma_max: float | None = number(None, 0, 1e4, open_low=True)
    area_min: float | None = number(None, 0, 1)
    area_max: float | None = number(None, 0, 1)

    @property
    def options(self) -> dict[str, float]:
        """The options of mask kinds that are given."""
        named = {name: getattr(self, name) for names in MASK_OPTIONS.values() for name in names}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class Train:
    """How long, on what.

    Attributes:
        epochs: passes of the loader; each shows every image batch_repetitions times per member.
            Chosen by `sizing.fill_defaults` where not given.
        batch_size: images that the network sees per step, repetitions included.
        seed: of everything random.
        device: "auto" takes CUDA where there is one.
        precision: "auto" is bfloat16 on CUDA, TF32 on GPUs without it, and float32 elsewhere.
        memory_format: of weights and features; "auto" is "channels-last".
        compile: "on", "off", or "auto", on CUDA where the training is long enough to pay for it.
        threads: of a CPU; 0 for torch's own choice.
        ema_decay: of an exponential moving average of the weights, which is then what is evaluated
            and kept; 0 is none.
        select: which epoch's weights are kept: the "last", or the "best" on the validation split.
    """

    epochs: int | None = number(None, 1, 1_000_000)
    batch_size: int = number(64, 1, 65_536)
    seed: int = number(0, 0, 2**63 - 1)
    device: str = choice("auto", DEVICES)
    precision: str = choice("auto", PRECISIONS)
    memory_format: str = choice("auto", MEMORY_FORMATS)
    compile: str = choice("auto", COMPILE)
    threads: int = number(0, 0, 1024)
    ema_decay: float = number(0.0, 0, 0.999999)
    select: str = choice("last", SELECTIONS)


@dataclass(frozen=True)
class Optimizer:
    """SGD.

    Attributes:
        base_lr: the published learning rate, for a batch of 64 without repetition.
        lr: overrides the rate that follows from base_lr; the peak of it under one-cycle.
        momentum: under the published schedule; one-cycle has `schedule.momentums`.
        nesterov: Nesterov's momentum.
        weight_decay: on all parameters, BatchNorm included, as published: 3e-4 · Σ W² in the loss
            has the gradient 6e-4 · W.
    """

    base_lr: float = number(0.05, 0, 1e30, open_low=True)
    lr: float | None = number(None, 0, 1e30, open_low=True)
    momentum: float = number(0.9, 0, 1)
    nesterov: bool = True
    weight_decay: float = number(6e-4, 0, 1e30)


@dataclass(frozen=True)
class Schedule:
    """The learning rate over time.

    Attributes:
        kind: "one-cycle" (cosine up, cosine down), "flat-cosine" (held, then cosine down) or
            "published" (warm-up, then steps).
        peak: one-cycle: highest rate over the published one, which is held for a third of training.
        pct_start: one-cycle: share of training that goes up.
        div: one-cycle: peak over start.
        div_final: one-cycle and flat-cosine: highest rate over the last.
        flat_share: flat-cosine: share of training that holds the rate.
        momentums: one-cycle: momentum at start, peak and end.
        milestones: published: shares of training after which the rate is multiplied by gamma.
        gamma: published: that factor.
        warmup_epochs: published: epochs of linear warm-up, per step, as `Recipe.warmup_steps`
            counts them.
    """

    kind: str = choice("one-cycle", SCHEDULES)
    peak: float = number(2.0, 0, 1e6, open_low=True)
    pct_start: float = number(0.25, 0, 1)
    div: float = number(25.0, 1, 1e12)
    div_final: float = number(1e5, 1, 1e12)
    flat_share: float = number(0.75, 0, 1)
    momentums: tuple[float, ...] = number((0.95, 0.85, 0.95), 0, 1)
    milestones: tuple[float, ...] = number((101 / 300, 201 / 300, 226 / 300), 0, 1)
    gamma: float = number(0.1, 0, 1, open_low=True)
    warmup_epochs: float = number(1.0, 0, 1_000_000)


@dataclass(frozen=True)
class Expected:
    """The published figure, for comparison; nothing is trained differently for it.

    Attributes:
        accuracy: top-1 in [0, 1].
        source: where it was published.
        arch: the network that it belongs to.
    """

    accuracy: float | None = number(None, 0, 1)
    source: str = ""
    arch: str = ""


@dataclass(frozen=True)
class Recipe:
    """A complete description of a run. Read one with `load_recipe` or `recipe_from_mapping`."""

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

        The rate falls with the repetitions, as published, since b copies of an image carry less
        than b images do. The peak counts under one-cycle only.
        """
        if self.optimizer.lr is not None:
            return self.optimizer.lr
        scale = self.train.batch_size / 64 / self.mix.batch_repetitions
        peak = self.schedule.peak if self.schedule.kind == "one-cycle" else 1.0
        return self.optimizer.base_lr * scale * peak

    def warmup_steps(self, num_images: int) -> int:
        """Count the steps of the published warm-up.

        An epoch of it is batch_repetitions · ceil(num_images / batch_size) steps: as published,
        782 · b for the 50,000 images of CIFAR and 1000 · b for Tiny ImageNet, with the last,
        incomplete batch and with the images that are set aside for validation here.

        Args:
            num_images: training images, those of the validation split included.
        """
        batches = math.ceil(num_images / self.train.batch_size)
        return round(self.schedule.warmup_epochs * self.mix.batch_repetitions * batches)

    @property
    def loader_batch_size(self) -> int:
        """Distinct images per batch."""
        return self.train.batch_size // self.mix.batch_repetitions


def recipe_from_mapping(values: Mapping[str, Any], where: str) -> Recipe:
    """Build a recipe from nested values, checking every key, type and range.

    Args:
        values: as read from TOML.
        where: what errors name as their place, such as a file.

    Raises:
        InputError: naming place, key, allowed values and the nearest name.
    """
    recipe: Recipe = build(Recipe, values, where)
    _check_together(recipe, where)
    return recipe


def override(recipe: Recipe, assignments: Iterable[str], where: str = "--set") -> Recipe:
    """Apply assignments such as "optimizer.lr=0.05"; a value that is not TOML is a string.

    Raises:
        InputError: an assignment has no "=", or names an unknown key or an impossible value.
    """
    values = dataclasses.asdict(recipe)  # with the settings that are left open
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise InputError(
                f"{where} {assignment!r}: write section.key=value, as in train.epochs=5."
            )
        *path, last = key.strip().split(".")
        section = values
        for name in path:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise InputError(
                    f"{where} {assignment!r}: {name!r} is not a section.\n"
                    "Write section.key=value, as in train.epochs=5."
                )
        if isinstance(section.get(last), dict):  # or its other keys would fall back to defaults
            raise InputError(
                f"{where} {assignment!r}: {last!r} is a section.\n"
                "Set its keys one by one, as in train.epochs=5."
            )
        section[last] = parse_value(text.strip())
    given = {k: _given(part) if isinstance(part, dict) else part for k, part in values.items()}
    return recipe_from_mapping(given, where)


def load_recipe(name_or_file: str | Path) -> Recipe:
    """Read a recipe by its name, such as "cifar100/cut-mixmo", or from a TOML file.

    Raises:
        InputError: there is none, or it is not a valid recipe.
    """
    path = find_recipe(name_or_file)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Recipe {path} cannot be read: {error.strerror}.") from error
    except NOT_TOML as error:
        raise InputError(
            f"Recipe {path} is not valid TOML: {error}.\n"
            "`mixmo recipes NAME` shows one that is, with every setting."
        ) from error
    if path.resolve().is_relative_to(recipe_home()):
        name = path.resolve().relative_to(recipe_home()).with_suffix("").as_posix()
        values.setdefault("name", name)
    return recipe_from_mapping(values, f"Recipe {path}")


def find_recipe(name_or_file: str | Path) -> Path:
    """Find the file of a recipe.

    Raises:
        InputError: neither a known name nor an existing file.
    """
    text = str(name_or_file)
    if text in recipe_names():
        return recipe_home() / f"{text}.toml"
    path = os.path.expanduser(text)
    if os.path.isfile(path):  # unlike pathlib's, it takes any text
        return Path(path)
    guess = nearest(text, recipe_names())
    hint = f" Did you mean {guess!r}?" if guess else ""
    raise InputError(
        f"There is no recipe {text!r}.{hint}\n"
        "Give one that `mixmo recipes` lists, or the path of a TOML file."
    )


def recipe_names() -> list[str]:
    """List the recipes that come with the package."""
    home = recipe_home()
    return sorted(p.relative_to(home).with_suffix("").as_posix() for p in home.rglob("*.toml"))


def recipe_home() -> Path:
    """Find the folder of recipes: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _check_together(recipe: Recipe, where: str) -> None:
    """Check what no single key shows."""
    _check_mixing(recipe, where)
    _check_data_and_network(recipe, where)
    _check_schedule(recipe, where)


def _check_mixing(recipe: Recipe, where: str) -> None:
    mix = recipe.mix
    try:
        if recipe.model.arch is not None:
            parse_architecture(recipe.model.arch)
    except InputError as error:
        raise InputError(f"{where}: model.arch: {error}") from None
    if mix.kind != "sum" and recipe.model.num_members < 2:
        raise InputError(
            f"{where}: mix.kind={mix.kind!r} needs model.num_members of 2 or more; got 1.\n"
            "A network of one member takes mix.kind='sum' and mix.batch_repetitions=1."
        )
    allowed = MASK_OPTIONS.get(mix.kind, ())
    if strange := [name for name in mix.options if name not in allowed]:
        takes = f"takes {', '.join(allowed)}" if allowed else "takes no options"
        raise InputError(
            f"{where}: mix.{strange[0]} is no option of mix.kind={mix.kind!r}, which {takes}."
        )
    if mix.block_size is not None and mix.block_size % 2 == 0:
        raise InputError(f"{where}: mix.block_size is {mix.block_size}; it must be odd.")
    for low, high in (("sigma_min", "sigma_max"), ("area_min", "area_max")):
        ends = {name: getattr(mix, name) for name in (low, high)}
        least, most = ({**COW_DEFAULTS, **_given(ends)}[name] for name in (low, high))
        if least > most:
            raise InputError(
                f"{where}: mix.{low} is {least:g} and mix.{high} is {most:g}; they must not fall."
            )


def _check_data_and_network(recipe: Recipe, where: str) -> None:
    mix, train = recipe.mix, recipe.train
    if recipe.model.ghost_batch_size == 1:
        raise InputError(
            f"{where}: model.ghost_batch_size is 1; it must be 0, for all of a batch, or 2 or more."
        )
    if recipe.data.augmix and recipe.data.loader == "resident":
        raise InputError(
            f"{where}: data.augmix works image by image, which the resident loader does not.\n"
            "Take data.loader='streaming' or 'auto'."
        )
    if train.select == "best" and recipe.data.valid_split == 0:
        raise InputError(
            f"{where}: train.select='best' picks the epoch on the validation split, and "
            "data.valid_split=0 leaves none.\nThe test set is only for the last figure."
        )
    if train.batch_size % mix.batch_repetitions:
        whole = max(1, round(train.batch_size / mix.batch_repetitions)) * mix.batch_repetitions
        raise InputError(
            f"{where}: train.batch_size={train.batch_size} is not a multiple of "
            f"mix.batch_repetitions={mix.batch_repetitions}.\nNearest: {whole}."
        )


def _check_schedule(recipe: Recipe, where: str) -> None:
    if len(recipe.schedule.momentums) != 3:
        raise InputError(
            f"{where}: schedule.momentums is {recipe.schedule.momentums}; "
            "it must be three numbers: start, peak, end."
        )
    if list(recipe.schedule.milestones) != sorted(recipe.schedule.milestones):
        raise InputError(
            f"{where}: schedule.milestones is {recipe.schedule.milestones}; it must rise."
        )
    if recipe.optimizer.nesterov and recipe.optimizer.momentum == 0:
        raise InputError(
            f"{where}: optimizer.momentum=0 leaves Nesterov's momentum nothing to work on.\n"
            "Raise it, or take optimizer.nesterov=false."
        )
