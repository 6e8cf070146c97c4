"""Checks of a recipe whose settings are valid one by one, but do not fit together."""

from mixmo_fastai.config.choices import (
    COW_DEFAULTS,
    CROPPING_TRANSFORM,
    DATASETS,
    MASK_OPTIONS,
    READOUTS,
    TRANSFORMS,
    parse_architecture,
    parse_optimizer,
)
from mixmo_fastai.config.recipe import Loss, Mix, Model, Optimizer, Recipe
from mixmo_fastai.errors import InputError, unknown_name_error


def check_consistency(recipe: Recipe, source: str) -> None:
    """Check that the settings are consistent with each other."""
    _check_mixing(recipe, source)
    _check_data_and_network(recipe, source)
    _check_schedule(recipe, source)
    _check_loss(recipe.loss, source)
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
    _check_weights(recipe.model, source)
    if recipe.model.ghost_batch_size == 1:
        raise InputError(
            f"{source}: model.ghost_batch_size is 1; it must be 0, for the whole batch, or 2 or "
            "more."
        )
    _check_transform(recipe, source)
    _check_repetition(recipe, source)
    is_named = recipe.data.dataset in DATASETS  # others may have a validation folder
    if is_named and train.select == "best" and recipe.data.valid_split == 0:
        raise InputError(
            f"{source}: train.select='best' selects the epoch on the validation split, but "
            "data.valid_split=0 leaves no validation images.\n"
            "Set data.valid_split, or use train.select='last'; the test set is only for the final "
            "evaluation."
        )
    if train.select == "best" and recipe.data.calibration_split == 1:
        raise InputError(
            f"{source}: data.calibration_split=1 leaves no validation images for "
            "train.select='best'.\nSet it below 1, or use train.select='last'."
        )
    if train.batch_size % mix.batch_repetitions:
        multiple = max(1, round(train.batch_size / mix.batch_repetitions)) * mix.batch_repetitions
        raise InputError(
            f"{source}: train.batch_size={train.batch_size} is not a multiple of "
            f"mix.batch_repetitions={mix.batch_repetitions}.\nNearest: {multiple}."
        )


def _check_weights(model: Model, source: str) -> None:
    if model.weights and model.arch is None:
        raise InputError(
            f"{source}: model.weights={model.weights!r} needs model.arch (--arch), the network of "
            "the weights."
        )
    if model.perturbation != Model.perturbation:
        has_weights = bool(model.pretrained or model.weights)
        if not has_weights or model.num_members == 1:
            cause = "with one member" if has_weights else "without pretrained weights"
            remedy = "model.num_members" if has_weights else "model.pretrained or model.weights"
            raise InputError(
                f"{source}: model.perturbation={model.perturbation:g} has no effect {cause}.\n"
                f"Remove it, or set {remedy}."
            )


def _check_repetition(recipe: Recipe, source: str) -> None:
    mix, members = recipe.mix, recipe.model.num_members
    if mix.early_repetition is not None and members == 1:
        raise InputError(
            f"{source}: mix.early_repetition={mix.early_repetition:g} has no effect with one "
            "member.\nRemove it, or set model.num_members."
        )
    if mix.early_repetition is None:
        for key, default in (("early_span", Mix.early_span), ("early_shape", Mix.early_shape)):
            if (value := getattr(mix, key)) != default:
                raise InputError(
                    f"{source}: mix.{key}={value!r} has no effect without mix.early_repetition.\n"
                    "Set mix.early_repetition, such as 1."
                )


def _check_transform(recipe: Recipe, source: str) -> None:
    data = recipe.data
    info = TRANSFORMS[data.transform]
    if info.is_per_image and data.loader == "resident":
        raise InputError(
            f"{source}: data.transform={data.transform!r} processes single images and does not "
            "work with the resident loader.\nUse data.loader='streaming' or 'auto'."
        )
    if data.crop_from != "auto" and data.transform != CROPPING_TRANSFORM:
        raise InputError(
            f"{source}: data.crop_from={data.crop_from!r} has no effect with "
            f"data.transform={data.transform!r}.\nRemove it, or set data.transform="
            f"{CROPPING_TRANSFORM}."
        )
    if data.crop_from == "original" and data.loader == "resident":
        raise InputError(
            f"{source}: data.crop_from='original' reads image files and does not work with the "
            "resident loader.\nUse data.loader='streaming' or 'auto'."
        )
    if info.target is None and data.transform_options:
        raise InputError(
            f"{source}: data.transform={data.transform!r} has no options.\n"
            "Remove data.transform_options, or choose another data.transform."
        )
    for key, is_applied, off in (
        ("crop_padding", info.crops, "0"),
        ("flip", info.flips, "false"),
        ("alternating_flip", info.flips, "false"),
    ):
        if getattr(data, key) and not is_applied:
            raise InputError(
                f"{source}: data.{key} has no effect with data.transform={data.transform!r}.\n"
                f"Set data.{key}={off}, or choose another data.transform."
            )


def _check_schedule(recipe: Recipe, source: str) -> None:
    train = recipe.train
    if train.epochs is not None and train.images_seen is not None:
        raise InputError(
            f"{source}: train.epochs={train.epochs} and train.images_seen={train.images_seen} both "
            "set the length of training.\nSet one of them."
        )
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


def _check_loss(loss: Loss, source: str) -> None:
    if loss.name == "cross-entropy":
        if loss.options:
            raise InputError(
                f"{source}: loss.options is for losses other than cross-entropy.\n"
                "Use loss.label_smoothing and loss.class_weights."
            )
    elif loss.label_smoothing:
        raise InputError(
            f"{source}: loss.label_smoothing is a setting of cross-entropy; got "
            f"loss.name={loss.name!r}.\nRemove one of them."
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
