"""Build fastai Learners that train MixMo networks, from an architecture or a recipe."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import fastai.callback.progress
import fastai.callback.schedule  # noqa: F401  # adds fit_one_cycle and lr_find to Learner
import torch
from fastai.data.core import DataLoaders
from fastai.imports import L
from fastai.learner import Learner
from fastai.metrics import accuracy, accuracy_multi
from fastai.torch_core import trainable_params
from torch import Tensor, nn

from mixmo_fastai.callbacks.checks import check_callbacks, check_opt_func
from mixmo_fastai.callbacks.deferred import defer_readbacks
from mixmo_fastai.callbacks.ema import EMACallback
from mixmo_fastai.callbacks.mixmo import MixMoCallback, add_companions
from mixmo_fastai.config.choices import parse_architecture
from mixmo_fastai.config.defaults import SHORT_SETTINGS
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.errors import InputError, nearest, unknown_name_error
from mixmo_fastai.learner.arch import NetworkSpec, build_mixmo_model, count_outputs, network_name
from mixmo_fastai.learner.loaders import (
    check_classes,
    check_labels,
    check_outputs,
    count_classes,
    inspect_batches,
    known_classes,
    normalize_for_weights,
)
from mixmo_fastai.learner.losses import recipe_loss
from mixmo_fastai.learner.optimizers import optimizer_from_recipe, sgd
from mixmo_fastai.learner.parameter_groups import (
    body_and_heads,
    convert_optimizer,
    converted_splitter,
    usable_splitter,
)
from mixmo_fastai.metrics.fastai import MemberAccuracy
from mixmo_fastai.mixing import Region, check_kind
from mixmo_fastai.mixing.base_losses import ignored_target, is_known, uses_softmax
from mixmo_fastai.mixing.loss import MixMoLoss, is_multi_label
from mixmo_fastai.models import MixMoModel
from mixmo_fastai.models.ghost_norm import use_ghost_batches
from mixmo_fastai.models.library import pretrained_statistics
from mixmo_fastai.models.member_init import PERTURBATION
from mixmo_fastai.rng import fresh_seed, make_generator
from mixmo_fastai.runtime.devices import move_to_device

CALLBACK_ARGUMENTS = tuple(signature(MixMoCallback.__init__).parameters)[2:]  # after self and mix


def mixmo_learner(
    dls: DataLoaders,
    arch: str | nn.Module | Callable[..., nn.Module],
    *,
    mix: str | Region = "cutmix",
    num_members: int | None = None,
    num_classes: int | None = None,
    pretrained: bool = False,
    weights: Path | str | None = None,
    independent: bool | None = None,
    perturbation: float = PERTURBATION,
    ghost_batch_size: int = 0,
    readout: str | nn.Module | None = None,
    **kwargs: Any,
) -> Learner:
    """Build a fastai Learner that trains a MixMo network.

    Args:
        dls: loaders of batches of one image and one target; the network sees a batch of n images as
            batch_repetitions · n.
        arch: the name of a network, such as "wrn28_10", "resnet50" or "timm/convnext_atto"; a
            function that builds one, such as fastai's xresnet50; or your own network, which is
            converted with its weights, or used unchanged if it is a `MixMoModel`. Conversion
            unfreezes all parameters; use `Learner.freeze` to freeze some.
        mix: how features are mixed, see `MixMoCallback`; must be "sum" for one member.
        num_members: M; by default 2, or that of a `MixMoModel`.
        num_classes: K; by default, that of the loaders, or else that of a given network.
        pretrained: start a network given by name from its library's weights. If the images are
            pixels in [0, 1] and the loaders have no `Normalize`, one with the statistics of the
            weights is added to them, as by fastai's `vision_learner`.
        weights: file of pretrained weights to start from instead: tensors of the plain network, or
            the model.safetensors of a run with the same network or of its export. Standardise the
            images in your loaders accordingly, e.g. with `Normalize.from_stats(*imagenet_stats)`.
        independent: initialise the members independently, for untrained networks; see
            `convert_to_mixmo`. By default: true for a name unless pretrained; for a function, true
            for each of the two layers (first and last) that differs when it is called twice; false
            for a network.
        perturbation: how much members differ that start from trained weights; see
            `convert_to_mixmo`.
        ghost_batch_size: number of images over which BatchNorm computes its statistics in training;
            0 for the whole batch.
        readout: how the heads read the core's feature maps; see `MixMoModel`.
        kwargs: arguments of `MixMoCallback` (alpha, mix_prob, batch_repetitions, seed, …) and of
            fastai's `Learner` (loss_func, opt_func, metrics, cbs, …). If the members do not start
            as independent ones, as with pretrained weights and for your own network, the defaults
            of batch_repetitions, early_repetition and early_span are those of `to_mixmo`; for a
            `MixMoModel`, they are those published. The default opt_func is SGD, as
            published, whose learning rates are about a hundred times those of Adam; see `sgd`.
            A seed also fixes the initial weights; without one they differ from Learner to Learner
            and depend on `set_seed`.

    Returns:
        A Learner whose metrics in evaluation are those of the ensemble.

    Raises:
        InputError: a name or number is not allowed, or a network cannot be converted.
    """
    mixing = {name: kwargs.pop(name) for name in CALLBACK_ARGUMENTS if name in kwargs}
    _check_argument_names(kwargs)
    if not isinstance(arch, MixMoModel):
        check_opt_func(kwargs.get("opt_func"))
    _check_user_callbacks(L(kwargs.get("cbs")))
    if not isinstance(dls, DataLoaders):
        raise InputError(f"dls must be fastai DataLoaders; got {type(dls).__name__}.")
    if num_classes is None and (known_classes(dls) or not isinstance(arch, nn.Module)):
        num_classes = count_classes(dls)  # otherwise, that of the network
    batch = inspect_batches(dls)
    image_shape, targets = batch.image_shape, batch.targets
    spec = NetworkSpec(
        image_shape,
        num_classes,
        num_members,
        pretrained,
        None if weights is None else Path(weights),
        independent,
        perturbation,
        readout=readout,
    )
    check_kind(mix, spec.num_members_for(arch))
    callback = MixMoCallback(mix, **_short_settings(mixing))  # checked before the network is built
    check_classes(targets, num_classes, known_classes(dls))
    loss_func = kwargs.pop("loss_func", None)
    if loss_func is None:
        loss_func = getattr(_dataset(dls), "loss_func", None)
    loss = _as_mixmo_loss(loss_func, targets)
    model, is_trained = build_mixmo_model(arch, spec, _weight_generator(callback))
    _check_labels(targets, model, loss)
    if not is_trained:
        callback = MixMoCallback(mix, **mixing)
    splitter = kwargs.pop("splitter", body_and_heads)  # for `freeze` and `fine_tune`
    kwargs["splitter"] = usable_splitter(splitter, model)
    use_ghost_batches(model, ghost_batch_size)
    if device := getattr(dls, "device", None):  # the optimizer depends on the parameters' device
        move_to_device(model, torch.device(device))
    kwargs.setdefault("opt_func", sgd())
    kwargs.setdefault("metrics", _default_metrics(targets, loss))
    learn = Learner(dls, model, loss, cbs=[callback, *L(kwargs.pop("cbs", None))], **kwargs)
    add_companions(learn)
    if pretrained and weights is None and (name := network_name(arch)):
        normalize_for_weights(dls, batch, *pretrained_statistics(parse_architecture(name)))
    return defer_readbacks(learn)


def to_mixmo(
    learn: Learner,
    mix: str | Region = "cutmix",
    *,
    num_members: int | None = None,
    independent: bool = False,
    perturbation: float = PERTURBATION,
    **kwargs: Any,
) -> Learner:
    """Convert a Learner in place so that it trains a MixMo network.

    The network is converted, see `convert_to_mixmo`; the loss is wrapped in `MixMoLoss`; and a
    `MixMoCallback` is added. Data, metrics and other callbacks are kept. The network sees a batch
    of n images as batch_repetitions · n.

    With a loss that has no `activation`, such as torch's, `get_preds` and `predict` return
    probabilities and classes afterwards, see `MixMoLoss`, where they returned logits before.

    Frozen parameters stay frozen, and the splitter's parameter groups are kept: the encoders
    replace the first convolution, the heads the last layer. An existing optimizer is rebuilt for
    them by the same function, with its settings but without its state (such as Adam's moments),
    which belongs to another loss; `freeze` and `unfreeze` also rebuild it.

    Args:
        learn: a Learner with a classifier that can be converted, or with a `MixMoModel`.
        mix: how features are mixed, see `MixMoCallback`.
        num_members: M; by default 2, or that of a `MixMoModel`.
        independent: initialise the members independently, for an untrained network.
        perturbation: how much the members differ otherwise; see `convert_to_mixmo`.
        kwargs: arguments of `MixMoCallback` (alpha, mix_prob, batch_repetitions, seed, …). The
            defaults of three differ, since short trainings of trained networks need others than
            those published: batch_repetitions=2, early_repetition=1.0 and early_span=0.6. With
            `independent`, or for a `MixMoModel`, they are those published.

    Returns:
        The same Learner.

    Raises:
        InputError: the network cannot be converted, an argument is not allowed, batches do not have
            one input and one target, or the Learner already has a `MixMoCallback` or one of
            fastai's Mix callbacks. The Learner is unchanged.
    """
    if not isinstance(learn, Learner):
        raise InputError(
            f"learn must be a Learner; got {type(learn).__name__}.\n"
            "To convert a network without a Learner, call convert_to_mixmo(model)."
        )
    unknown_names = [name for name in kwargs if name not in CALLBACK_ARGUMENTS]
    if unknown_names:
        raise unknown_name_error("argument of to_mixmo", unknown_names[0], CALLBACK_ARGUMENTS)
    if any(isinstance(each, MixMoCallback) for each in learn.cbs):
        advice = "do not call to_mixmo again"
        if not isinstance(learn.model, MixMoModel):
            advice = "first remove it: learn.remove_cb(MixMoCallback)"
        raise InputError(f"The Learner already has a MixMoCallback; {advice}.")
    check_callbacks(learn.cbs)
    if not isinstance(learn.model, MixMoModel):
        check_opt_func(learn.opt_func)
    callback = MixMoCallback(mix, **_short_settings(kwargs))
    loss = _as_mixmo_loss(learn.loss_func)
    batch = inspect_batches(learn.dls)
    spec = NetworkSpec(
        batch.image_shape,
        num_members=num_members,
        independent=independent,
        perturbation=perturbation,
        unfreeze=False,
    )
    check_kind(mix, spec.num_members_for(learn.model))
    original = learn.model
    model, is_trained = build_mixmo_model(original, spec, _weight_generator(callback))
    if is_known(loss.base):  # another loss may need other outputs
        check_outputs(batch.targets, count_outputs(model), known_classes(learn.dls))
        _check_labels(batch.targets, model, loss)
    if not is_trained:
        callback = MixMoCallback(mix, **kwargs)
    if model is not original:
        splitter = converted_splitter(learn.splitter, model)
        with _restored_on_error(learn, "model", "splitter", "opt", "lr"):
            learn.model, learn.splitter = model, splitter
            if learn.opt is not None:
                convert_optimizer(learn, original)
    learn.loss_func = loss
    learn.add_cb(callback)
    add_companions(learn)
    return learn


def _check_labels(targets: Tensor | None, model: MixMoModel, loss: MixMoLoss) -> None:
    """Check the labels of the first batch for a loss of class indices."""
    if is_known(loss.base) and uses_softmax(loss.base):
        check_labels(targets, count_outputs(model), ignored_target(loss.base))


def _short_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `MixMoCallback` for trained networks; given ones have priority."""
    settings = SHORT_SETTINGS | dict(given)
    if settings["early_repetition"] is None and "early_span" not in given:
        del settings["early_span"]
    return settings


@contextmanager
def _restored_on_error(learn: Learner, *names: str) -> Iterator[None]:
    """Restore attributes of a Learner if the block raises."""
    values = {name: getattr(learn, name) for name in names}
    try:
        yield
    except BaseException:
        for name, value in values.items():
            setattr(learn, name, value)
        raise


def _weight_generator(callback: MixMoCallback) -> torch.Generator:
    """Return a generator for initial weights, seeded by the callback's seed if it has one."""
    seed = fresh_seed() if callback.seed is None else callback.seed
    return make_generator(seed, "init")


def _check_argument_names(names: Iterable[str]) -> None:
    """Check that the remaining keyword arguments are arguments of fastai's Learner."""
    of_learner = [*signature(Learner.__init__).parameters][2:]  # after self and dls
    known = [*signature(mixmo_learner).parameters, *CALLBACK_ARGUMENTS, *of_learner]
    for name in names:
        if name not in of_learner:
            guess = "num_classes" if name == "n_out" else nearest(name, known)
            hint = f"Did you mean {guess!r}?" if guess else "See the docstring for its arguments."
            if name == "y_range":
                hint = "Pass it to vision_learner, and convert that Learner with to_mixmo."
            raise InputError(f"mixmo_learner has no argument {name!r}.\n{hint}")


def _check_user_callbacks(callbacks: Iterable[Any]) -> None:
    """Check that the user's callbacks can be combined with the MixMoCallback created here."""
    check_callbacks(callbacks)
    if any(isinstance(each, MixMoCallback) or each is MixMoCallback for each in callbacks):
        raise InputError(
            "cbs must not contain a MixMoCallback: mixmo_learner creates it.\nPass its arguments "
            "instead: mixmo_learner(…, mix=…, alpha=…)."
        )


def learner_from_recipe(
    recipe: Recipe, dls: DataLoaders, model: MixMoModel | None = None, **kwargs: Any
) -> Learner:
    """Build a Learner from a recipe.

    Args:
        recipe: the recipe; for a deep ensemble, the Learner trains the first network.
        dls: loaders from `make_dataloaders`.
        model: an existing network to train instead of a new one.
        kwargs: arguments of fastai's `Learner`.
    """
    mix = recipe.mix
    averaging = [EMACallback(recipe.train.ema_decay)] if recipe.train.ema_decay else []
    kwargs["cbs"] = [*averaging, *L(kwargs.get("cbs"))]
    if "loss_func" not in kwargs and (loss := recipe_loss(recipe.loss, dls)) is not None:
        kwargs["loss_func"] = loss
    # Checkpoints need a fixed number of groups.
    is_fine_tuned = recipe.schedule.kind == "fine-tune"
    kwargs.setdefault("splitter", body_and_heads if is_fine_tuned else trainable_params)
    return mixmo_learner(
        dls,
        recipe.model.arch if model is None else model,
        mix=mix.kind,
        num_members=recipe.model.num_members,
        pretrained=recipe.model.pretrained and model is None,
        weights=Path(recipe.model.weights) if recipe.model.weights and model is None else None,
        perturbation=recipe.model.perturbation,
        ghost_batch_size=recipe.model.ghost_batch_size if model is None else 0,
        readout=recipe.model.readout if model is None else None,
        alpha=mix.alpha,
        mix_prob=mix.mix_prob,
        decay_start=mix.decay_start,
        weight_root=mix.weight_root,
        batch_repetitions=mix.batch_repetitions,
        input_repetition=mix.input_repetition,
        early_repetition=mix.early_repetition,
        early_span=mix.early_span,
        early_shape=mix.early_shape,
        msda=None if mix.msda == "none" else mix.msda,
        msda_alpha=mix.msda_alpha,
        msda_prob=mix.msda_prob,
        mask_options=mix.options,
        seed=recipe.train.seed,
        lr=recipe.lr,
        opt_func=optimizer_from_recipe(recipe.optimizer),
        **kwargs,
    )


def _default_metrics(targets: Tensor | None, loss: MixMoLoss) -> list[Any]:
    """Return the accuracy of the ensemble and of its members; no metrics for regression."""
    if is_multi_label(loss.base):
        return [accuracy_multi, MemberAccuracy()]
    is_regression = targets is not None and targets.is_floating_point()
    return [] if is_regression else [accuracy, MemberAccuracy()]


def _as_mixmo_loss(loss: Any, targets: Tensor | None = None) -> MixMoLoss:
    """Wrap a loss in `MixMoLoss`; for None, cross-entropy, if the targets are class indices."""
    if loss is None and targets is not None and (targets.is_floating_point() or targets.ndim > 1):
        raise InputError(
            "The default loss needs class indices as targets; got "
            f"{str(targets.dtype).removeprefix('torch.')} of shape {tuple(targets.shape)}.\n"
            "Pass loss_func: BCEWithLogitsLossFlat() for multi-label, CrossEntropyLossFlat() for\n"
            "soft labels, MSELossFlat() for regression."
        )
    return loss if isinstance(loss, MixMoLoss) else MixMoLoss(loss)


def _dataset(dls: DataLoaders) -> Any:
    return getattr(dls.train, "dataset", None)
