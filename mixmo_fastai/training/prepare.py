"""Prepare a training: load the data, build the Learner, and choose open settings."""

import copy
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn

from mixmo_fastai.config.choices import CROPPING_TRANSFORM, TRANSFORMS
from mixmo_fastai.config.defaults import (
    MAX_CPU_SIDE,
    default_arch,
    fill_defaults,
    open_settings,
)
from mixmo_fastai.config.recipe import Recipe, default_valid_split
from mixmo_fastai.config.schema import to_mapping
from mixmo_fastai.data.cuts import Augmentation
from mixmo_fastai.data.dataloaders import BatchTooLargeError, make_dataloaders
from mixmo_fastai.data.fingerprint import fingerprint
from mixmo_fastai.data.image_sets import DataSource, files_of
from mixmo_fastai.data.resized_crop import ResizedCrop
from mixmo_fastai.data.run_data import read_source
from mixmo_fastai.data.splits import training_parts
from mixmo_fastai.data.transforms import build_transform
from mixmo_fastai.errors import InputError
from mixmo_fastai.learner.build import learner_from_recipe
from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.runtime.acceleration import Acceleration, choose_acceleration
from mixmo_fastai.runtime.devices import choose_device, describe_device
from mixmo_fastai.runtime.processes import process_group, rank0_first
from mixmo_fastai.training.pretrained import with_statistics_of_weights

TEST_SET = 2
"""Index of the test loader in the DataLoaders of `make_dataloaders`."""
SPLIT_FOR_CALIBRATION = 0.5
"""Fraction of the validation images for calibration if the others select the best epoch."""


SMALLEST_SAFE_SIZE = 32
"""Height and width that every published network can process."""


@dataclass(frozen=True)
class Training:
    """A prepared run: data and network are loaded, nothing is trained or written yet.

    Attributes:
        recipe: the recipe, fully resolved.
        source: the data set.
        learn: the Learner with loaders and network; for a deep ensemble, that of the first network.
        decided: names of the settings that the recipe left open and `defaults.fill_defaults` has
            set.
        threads: number of threads of a resumed run if it differs from that of its recipe.
    """

    recipe: Recipe
    source: DataSource
    learn: Learner
    decided: tuple[str, ...] = ()
    threads: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        return len(self.learn.dls.train)

    @property
    def num_steps(self) -> int:
        """Steps of the whole training of one network."""
        assert self.recipe.train.epochs is not None
        return self.recipe.train.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up in the published schedule."""
        return self.recipe.warmup_steps(images_of_warmup(self.recipe, self.source))

    @property
    def images_seen(self) -> int:
        """Images seen by all networks, including repetitions."""
        train = self.recipe.train
        per_network = train.epochs * self.steps_per_epoch * train.batch_size
        return per_network * self.recipe.model.num_nets

    @property
    def num_parameters(self) -> int:
        """Number of parameters of all networks."""
        per_network = sum(p.numel() for p in self.learn.model.parameters())
        return per_network * self.recipe.model.num_nets

    @cached_property
    def acceleration(self) -> Acceleration:
        """Precision, memory format, compilation and threads for the device."""
        shape, images = self.source.train.image_shape, self.images_seen
        images //= self.recipe.model.num_nets
        recipe = self.recipe
        if self.threads is not None:
            recipe = replace(recipe, train=replace(recipe.train, threads=self.threads))
        return choose_acceleration(recipe, self.device, self.learn.model, shape, images)

    @property
    def num_threads(self) -> int | None:
        """Number of CPU threads, on which results depend up to rounding; None on other devices."""
        is_cpu = self.device.type == "cpu"
        return self.acceleration.threads or torch.get_num_threads() if is_cpu else None

    def accelerated(self) -> AbstractContextManager[None]:
        """Apply the acceleration in a with block; see `Acceleration.applied`."""
        return self.acceleration.applied(self.learn.model)

    @property
    def identity(self) -> dict[str, Any]:
        """Recipe and data fingerprint, which must be equal when the run is resumed."""
        return {"recipe": to_mapping(self.recipe), "data": fingerprint(self.source)}

    def summary(self) -> dict[str, Any]:
        """Return the entries of the final metrics that describe the training."""
        return {
            "recipe": self.recipe.name,
            "epochs": self.recipe.train.epochs,
            "images_seen": self.images_seen,
            "parameters": self.num_parameters,
        }

    @property
    def device(self) -> torch.device:
        """The device of the network and the batches."""
        return torch.device(self.learn.dls.device)

    @property
    def device_name(self) -> str:
        """Readable description of the device, and of the number of processes if several."""
        return describe_device(self.device, self.acceleration.threads) + self.in_processes

    @property
    def in_processes(self) -> str:
        """Suffix with the number of processes; empty for one."""
        count = process_group().count
        return f" in {count} processes" if count > 1 else ""


def prepare(
    recipe: Recipe,
    data_dir: Path | None = None,
    run: RunFolder | None = None,
    *,
    sized_for: str | None = None,
    threads: int | None = None,
) -> Training:
    """Load the data and build the Learner of a recipe.

    Args:
        recipe: the recipe. Settings that it leaves open are chosen by data and device.
        data_dir: the data folder; see `load_source`.
        run: the run to resume, with its own data split and skipped images; None for a new run.
        sized_for: the device type for which open settings are chosen; None for the recipe's device.
        threads: number of threads; None for the recipe's.

    Raises:
        InputError: the data set, a name or a value is not valid.
    """
    device = choose_device(recipe.train.device)  # fail before any data is read
    sized_for = sized_for or device.type
    num_processes, batch_size = process_group().count, recipe.train.batch_size
    if (remainder := batch_size % num_processes) != 0:
        lower = batch_size - remainder
        raise InputError(
            f"A batch of {batch_size} images cannot be split evenly over {num_processes} processes."
            f"\nUse a multiple of {num_processes} that the batch repetitions divide; the nearest "
            f"multiples are {lower or num_processes} and {lower + num_processes}."
        )
    with rank0_first():  # rank 0 fills the cache of decoded images
        may_scale = recipe.data.image_size is None and sized_for == "cpu"
        source = read_source(
            recipe, data_dir, run, largest_side=MAX_CPU_SIDE if may_scale else None
        )
    if run is None:
        recipe = _with_crop_source(recipe, source)
    return prepare_network(recipe, source, sized_for=sized_for, threads=threads, resumed=run)


def prepare_network(
    recipe: Recipe,
    source: DataSource,
    dls: DataLoaders | None = None,
    *,
    sized_for: str | None = None,
    threads: int | None = None,
    resumed: RunFolder | None = None,
) -> Training:
    """Build the Learner of a recipe for a loaded data set; see `prepare`.

    Args:
        recipe: the recipe.
        source: the data set.
        dls: loaders of another network of the same deep ensemble, reused to keep only one copy of
            the data on the device; None to create them.
        sized_for: see `prepare`.
        threads: see `prepare`.
        resumed: the run to resume: if it has a state, the weights that it started from are not
            needed any more.
    """
    device = choose_device(recipe.train.device)
    recipe = _with_test_split(_with_data_settings(recipe, source), source)
    image_shape, device_type = source.train.image_shape, sized_for or device.type
    arch = recipe.model.arch or default_arch(recipe, device_type, image_shape)
    if resumed is None or resumed.data_facts() is None:
        source = with_statistics_of_weights(recipe, arch, source)
    if dls is None:
        dls = _make_dataloaders(recipe, source, device)
    else:
        dls.train.seed = recipe.train.seed
    open_names = tuple(open_settings(recipe))
    recipe = fill_defaults(
        recipe,
        device=device_type,
        image_shape=image_shape,
        num_images=len(dls.train.images),
        scaled_to=source.scaled_to,
    )
    learn = learner_from_recipe(_without_weights(recipe, resumed), dls)
    _check_image_size(recipe, source, learn.model)
    _check_evaluation_images(recipe, source, dls)
    learn.remove_cbs(ProgressCallback)  # the caller provides the progress display
    training = Training(recipe, source, learn, open_names, threads)
    training.acceleration.move_to_device(learn.model)
    return training


def _without_weights(recipe: Recipe, resumed: RunFolder | None) -> Recipe:
    """Drop the weights to start from if a resumed run has a state that replaces them."""
    if resumed is None or CheckpointStore(resumed.networks()[0].checkpoint).newest() is None:
        return recipe
    return replace(recipe, model=replace(recipe.model, pretrained=False, weights=""))


def _make_dataloaders(recipe: Recipe, source: DataSource, device: torch.device) -> DataLoaders:
    data = recipe.data
    try:
        image_shape = source.train.image_shape
        transform = build_transform(data.transform, data.transform_options, image_shape)
    except InputError as error:
        raise InputError(f"data.transform: {error}") from error
    if isinstance(transform, ResizedCrop) and data.crop_from == "original":
        if files_of(source.train) is None:
            raise InputError(
                f"data.crop_from='original' needs image files, and {source.name} has none.\n"
                "Set data.crop_from=resized."
            )
        transform = transform.from_original()
    try:
        return make_dataloaders(
            source,
            batch_size=recipe.loader_batch_size,
            valid_split=data.valid_split,
            calibration_split=data.calibration_split,
            limit=data.limit,
            augmentation=Augmentation(
                data.crop_padding, data.flip, data.alternating_flip, transform
            ),
            seed=recipe.train.seed,
            device=device,
            loader=data.loader,
            num_workers=data.num_workers,
        )
    except BatchTooLargeError as error:
        raise _with_largest_batch(error, recipe) from None


def _with_largest_batch(error: BatchTooLargeError, recipe: Recipe) -> InputError:
    """Build the error that names the largest batch size that the training images fill."""
    repetitions = recipe.mix.batch_repetitions
    step = math.lcm(repetitions, process_group().count)
    largest = error.num_images * repetitions // step * step
    repeated = f", each repeated {repetitions} times" if repetitions > 1 else ""
    advice = f"Lower the batch size: --batch-size {largest} is the largest possible."
    if not largest:
        advice = f"Add training images: {step // repetitions} or more."
    if recipe.data.limit:
        advice += " Or raise --limit."
    return InputError(f"{error.problem}{repeated}.\n{advice}")


def images_of_warmup(recipe: Recipe, source: DataSource) -> int:
    """Return the number of images that one epoch of the published warm-up stands for.

    As published, this is the whole training set, including images held out for validation. With
    `data.limit` it is the number of images trained on.
    """
    if not recipe.data.limit:
        return len(source.train)
    train, _ = training_parts(source, recipe.data.valid_split)
    return min(recipe.data.limit, len(train))


def _with_test_split(recipe: Recipe, source: DataSource) -> Recipe:
    """Set `data.test_split` to the fraction of the drawn test set, if one was drawn."""
    if source.parts is None or source.parts.drawn is None:
        return recipe
    fraction = source.parts.drawn.test_split
    return replace(recipe, data=replace(recipe.data, test_split=fraction))


def _with_crop_source(recipe: Recipe, source: DataSource) -> Recipe:
    """Set `data.crop_from` to "original" for image files whose sizes are not the image size.

    Runs of versions without this setting have crops of resized images, and keep them.
    """
    data = recipe.data
    if (
        data.transform != CROPPING_TRANSFORM
        or data.crop_from != "auto"
        or data.loader == "resident"
    ):
        return recipe
    files = files_of(source.train)
    if files is None or files.are_all_of_size(source.train.image_shape[1:]):
        return recipe
    return replace(recipe, data=replace(data, crop_from="original"))


def _with_data_settings(recipe: Recipe, source: DataSource) -> Recipe:
    """Set the augmentation and the validation split that depend on the data."""
    data = recipe.data
    applied = TRANSFORMS[data.transform]
    padding, flip = data.crop_padding, data.flip
    if padding is None:
        padding = source.crop_padding if applied.crops else 0
    if flip is None:
        flip = source.flip and applied.flips
    valid_split = data.valid_split
    if valid_split is None and source.valid is None:
        valid_split = default_valid_split(len(source.train))
    if data.alternating_flip and not flip:
        raise InputError(
            "data.alternating_flip is true, but data.flip is false for this data set.\n"
            "Set data.flip=true, or remove data.alternating_flip."
        )
    calibration_split = data.calibration_split
    if calibration_split is None and recipe.train.select == "best":
        calibration_split = SPLIT_FOR_CALIBRATION
    data = replace(
        data,
        crop_padding=padding,
        flip=flip,
        valid_split=valid_split,
        calibration_split=calibration_split,
    )
    return replace(recipe, data=data)


def _check_image_size(recipe: Recipe, source: DataSource, model: nn.Module) -> None:
    """Run the network on one image if images may be too small for its strides."""
    channels, height, width = source.train.image_shape
    if min(height, width) >= SMALLEST_SAFE_SIZE:
        return  # other networks than the published ones were tested when they were built
    device = next(model.parameters()).device
    try:
        with torch.inference_mode():
            copy.deepcopy(model).eval()(torch.zeros(1, channels, height, width, device=device))
    except RuntimeError as error:
        raise InputError(
            f"Images of {height}x{width} are too small for {recipe.model.arch}.\n"
            "Use a larger data.image_size, or another network."
        ) from error


def _check_evaluation_images(recipe: Recipe, source: DataSource, dls: DataLoaders) -> None:
    """Check that there are images to evaluate on, and to select the best epoch."""
    if recipe.train.select == "best" and not len(dls.valid.images):
        raise InputError(
            "train.select='best' needs validation images, and none are left.\n"
            "Increase data.valid_split, reduce data.calibration_split, or use train.select='last'."
        )
    if not any(len(loader.images) for loader in (dls.valid, dls[TEST_SET])):
        raise InputError(
            f"{source.name} has neither labelled test images nor validation images to evaluate on."
            "\nHold some out: --test-split 0.2, or --valid-split 0.1."
        )
