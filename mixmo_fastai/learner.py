"""Learners: one line for fastai users, and what a recipe describes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import fastai.callback.progress
import fastai.callback.schedule  # noqa: F401  # gives every Learner fit_one_cycle and lr_find
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import get_c
from fastai.imports import L
from fastai.learner import Learner
from fastai.metrics import accuracy, accuracy_multi
from fastai.torch_core import trainable_params
from torch import Tensor, nn

from mixmo_fastai.adoption import Wanted, as_mixmo
from mixmo_fastai.averaging import EMACallback
from mixmo_fastai.callback import MixMoCallback, add_guard
from mixmo_fastai.data.glance import first_batch, preserved_random_states
from mixmo_fastai.data.loaders import BatchLoader
from mixmo_fastai.deferred import defer_readbacks
from mixmo_fastai.devices import move_to_device
from mixmo_fastai.errors import InputError, nearest, unknown
from mixmo_fastai.learner_checks import (
    check_batch,
    check_callbacks,
    check_opt_func,
    count_parts,
)
from mixmo_fastai.losses import MixMoLoss, is_multi_label
from mixmo_fastai.metrics import MemberAccuracy
from mixmo_fastai.mixing import Region, check_kind
from mixmo_fastai.models import MixMoModel
from mixmo_fastai.models.ghost_norm import use_ghost_batches
from mixmo_fastai.optimizers import sgd
from mixmo_fastai.parameter_groups import body_and_heads, convert_optimizer, converted_splitter
from mixmo_fastai.randomness import fresh_seed, make_generator
from mixmo_fastai.recipe import Recipe

CALLBACK_ARGUMENTS = tuple(signature(MixMoCallback.__init__).parameters)[2:]  # after self and mix


def mixmo_learner(
    dls: DataLoaders,
    arch: str | nn.Module | Callable[..., nn.Module],
    *,
    mix: str | Region = "cutmix",
    num_members: int | None = None,
    num_classes: int | None = None,
    pretrained: bool = False,
    independent: bool | None = None,
    ghost_batch_size: int = 0,
    **kwargs: Any,
) -> Learner:
    """Build a fastai Learner that trains a MixMo network.

    Args:
        dls: loaders of batches of one image and one target; a batch of n images becomes one of
            batch_repetitions · n for the network.
        arch: network by name, as in "wrn28_10", "resnet50" or "timm/convnext_atto"; a function that
            makes one, as fastai's xresnet50; or a network of your own, which is converted, weights
            and all, or taken as it is where it is a `MixMoModel`. All of what is converted is
            trained, frozen parts included, until `Learner.freeze` says otherwise.
        mix: how features are mixed, see `MixMoCallback`; of one member say "sum".
        num_members: M; 2 where not given, or that of a `MixMoModel`.
        num_classes: K; what the loaders say where not given.
        pretrained: whether a network by name starts from its library's weights. Give your loaders
            the standardisation that these want, such as `Normalize.from_stats(*imagenet_stats)`.
        independent: whether members start apart, for networks that are not trained yet; see
            `convert_to_mixmo`. Where not given, it is so by name unless pretrained; of a function,
            for those of the two layers that differ when it is called twice; of a network, not.
        ghost_batch_size: images among which BatchNorm normalises in training; 0 for all of a batch.
        kwargs: of `MixMoCallback` (alpha, mix_prob, batch_repetitions, seed, …) and of fastai's
            `Learner` (loss_func, opt_func, metrics, cbs, …). Where opt_func is not given it is the
            published one, SGD, whose rates are about a hundred times those of Adam; see `sgd`. A
            seed also fixes the initial weights; without one they differ from Learner to Learner,
            and follow `set_seed`.

    Returns:
        A Learner whose figures in evaluation are those of the ensemble.

    Raises:
        InputError: a name or number is not allowed, or a network cannot be converted.
    """
    mixing = {name: kwargs.pop(name) for name in CALLBACK_ARGUMENTS if name in kwargs}
    _check_known(kwargs)
    if not isinstance(arch, MixMoModel):
        check_opt_func(kwargs.get("opt_func"))
    _check_own_callbacks(L(kwargs.get("cbs")))
    if not isinstance(dls, DataLoaders):
        raise InputError(
            f"mixmo_learner takes loaders (DataLoaders) first; got {type(dls).__name__}."
        )
    num_classes = _num_classes(dls) if num_classes is None else num_classes
    image_shape, targets = _facts_of_batches(dls)
    wanted = Wanted(image_shape, num_classes, num_members, pretrained, independent)
    check_kind(mix, wanted.members_of(arch))
    callback = MixMoCallback(mix, **mixing)
    _check_classes(targets, num_classes, _known_classes(dls))
    loss_func = kwargs.pop("loss_func", getattr(_dataset(dls), "loss_func", None))
    loss = _as_mixmo_loss(loss_func, targets)
    model = as_mixmo(arch, wanted, _initial(callback))
    kwargs.setdefault("splitter", body_and_heads)  # for `freeze` and `fine_tune`
    use_ghost_batches(model, ghost_batch_size)
    if device := getattr(dls, "device", None):  # before the optimizer is made, which looks at it
        move_to_device(model, torch.device(device))
    kwargs.setdefault("opt_func", sgd())
    kwargs.setdefault("metrics", _metrics_for(targets, loss))
    learn = Learner(dls, model, loss, cbs=[callback, *L(kwargs.pop("cbs", None))], **kwargs)
    add_guard(learn)
    return defer_readbacks(learn)


def to_mixmo(
    learn: Learner,
    mix: str | Region = "cutmix",
    *,
    num_members: int | None = None,
    independent: bool = False,
    **kwargs: Any,
) -> Learner:
    """Turn a Learner into one that trains a MixMo network, in place.

    Its network is converted, see `convert_to_mixmo`; its loss is wrapped in `MixMoLoss`; and it
    gets a `MixMoCallback`. Data, metrics and other callbacks stay. A loader that gave n images a
    batch now gives batch_repetitions · n.

    What is frozen stays frozen, and the parameter groups stay those of its splitter: encoders take
    the place of the first convolution, heads that of the last layer. An optimizer that there is
    already is made anew for them, by the same function, with its settings but without its state
    (such as Adam's moments), which belongs to another loss; `freeze` and `unfreeze` do so too.

    Args:
        learn: with a classifier that can be converted, or a `MixMoModel`.
        mix: how features are mixed, see `MixMoCallback`.
        num_members: M; 2 where not given, or that of a `MixMoModel`.
        independent: whether members start apart; for a network that is not trained yet.
        kwargs: of `MixMoCallback` (alpha, mix_prob, batch_repetitions, seed, …).

    Returns:
        the Learner.

    Raises:
        InputError: the network cannot be converted, an argument is not allowed, batches are not
            of one input and one target, or there is a `MixMoCallback`, or a Mix callback of
            fastai's, already. The Learner is as it was.
    """
    if not isinstance(learn, Learner):
        raise InputError(
            f"to_mixmo takes a Learner; got {type(learn).__name__}.\n"
            "A network alone is converted by convert_to_mixmo(model)."
        )
    unknown_names = [name for name in kwargs if name not in CALLBACK_ARGUMENTS]
    if unknown_names:
        raise unknown("argument of to_mixmo", unknown_names[0], CALLBACK_ARGUMENTS)
    if any(isinstance(each, MixMoCallback) for each in learn.cbs):
        raise InputError("The Learner has a MixMoCallback already; it is a MixMo Learner.")
    check_callbacks(learn.cbs)
    if not isinstance(learn.model, MixMoModel):
        check_opt_func(learn.opt_func)
    callback = MixMoCallback(mix, **kwargs)
    loss = _as_mixmo_loss(learn.loss_func)
    image_shape, _ = _facts_of_batches(learn.dls)
    wanted = Wanted(image_shape, num_members=num_members, independent=independent, thaw=False)
    check_kind(mix, wanted.members_of(learn.model))
    before = learn.model
    model = as_mixmo(before, wanted, _initial(callback))
    if model is not before:
        splitter = converted_splitter(learn.splitter, model)
        with _restored_on_error(learn, "model", "splitter", "opt", "lr"):
            learn.model, learn.splitter = model, splitter
            if learn.opt is not None:
                convert_optimizer(learn, before)
    learn.loss_func = loss
    learn.add_cb(callback)
    add_guard(learn)
    return learn


@contextmanager
def _restored_on_error(learn: Learner, *names: str) -> Iterator[None]:
    """Give a Learner back what it had, if something fails."""
    had = {name: getattr(learn, name) for name in names}
    try:
        yield
    except BaseException:
        for name, value in had.items():
            setattr(learn, name, value)
        raise


def _initial(callback: MixMoCallback) -> torch.Generator:
    """Give a generator of initial weights, which the callback's seed fixes if there is one."""
    seed = fresh_seed() if callback.seed is None else callback.seed
    return make_generator(seed, "init")


def _check_known(arguments: Iterable[str]) -> None:
    """Check that what is left is fastai's to take."""
    of_fastai = [*signature(Learner.__init__).parameters][2:]  # after self and dls
    known = [*signature(mixmo_learner).parameters, *CALLBACK_ARGUMENTS, *of_fastai]
    for name in arguments:
        if name not in of_fastai:
            guess = "num_classes" if name == "n_out" else nearest(name, known)
            hint = f"Did you mean {guess!r}?" if guess else "See the docstring for what there is."
            raise InputError(f"mixmo_learner takes no argument {name!r}.\n{hint}")


def _check_own_callbacks(callbacks: Iterable[Any]) -> None:
    """Check that callbacks that were given go with the one that is made here."""
    check_callbacks(callbacks)
    if any(isinstance(each, MixMoCallback) or each is MixMoCallback for each in callbacks):
        raise InputError(
            "mixmo_learner makes a MixMoCallback itself.\nGive it that one's arguments instead: "
            "mixmo_learner(…, mix=…, alpha=…)."
        )


def learner_from_recipe(
    recipe: Recipe, dls: DataLoaders, model: MixMoModel | None = None, **kwargs: Any
) -> Learner:
    """Build the Learner that a recipe describes.

    Args:
        recipe: what to train; of a deep ensemble, the first network.
        dls: from `make_dataloaders`.
        model: its network, if there is one already.
        kwargs: of fastai's `Learner`.
    """
    mix = recipe.mix
    optimizer = recipe.optimizer
    averaging = [EMACallback(recipe.train.ema_decay)] if recipe.train.ema_decay else []
    kwargs["cbs"] = [*averaging, *kwargs.get("cbs", ())]
    kwargs.setdefault("splitter", trainable_params)  # one group, and so in every checkpoint
    return mixmo_learner(
        dls,
        recipe.model.arch if model is None else model,
        mix=mix.kind,
        num_members=recipe.model.num_members,
        pretrained=recipe.model.pretrained,
        ghost_batch_size=recipe.model.ghost_batch_size if model is None else 0,
        alpha=mix.alpha,
        mix_prob=mix.mix_prob,
        decay_start=mix.decay_start,
        weight_root=mix.weight_root,
        batch_repetitions=mix.batch_repetitions,
        input_repetition=mix.input_repetition,
        msda=None if mix.msda == "none" else mix.msda,
        msda_alpha=mix.msda_alpha,
        msda_prob=mix.msda_prob,
        mask_options=mix.options,
        seed=recipe.train.seed,
        lr=recipe.lr,
        opt_func=sgd(optimizer.momentum, optimizer.nesterov, optimizer.weight_decay),
        **kwargs,
    )


def _metrics_for(targets: Tensor | None, loss: MixMoLoss) -> list[Any]:
    """Choose metrics of the ensemble and of its members; of numbers to predict, the user's own."""
    if is_multi_label(loss.base):
        return [accuracy_multi, MemberAccuracy()]
    numbers = targets is not None and targets.is_floating_point()
    return [] if numbers else [accuracy, MemberAccuracy()]


def _as_mixmo_loss(loss: Any, targets: Tensor | None = None) -> MixMoLoss:
    """Wrap a loss; where there is none, cross-entropy, if the data's targets are classes."""
    if loss is None and targets is not None and (targets.is_floating_point() or targets.ndim > 1):
        raise InputError(
            f"The targets are no classes but {str(targets.dtype).removeprefix('torch.')} of shape "
            f"{tuple(targets.shape)}. Say loss_func=…: BCEWithLogitsLossFlat() for\nseveral labels "
            "per image, CrossEntropyLossFlat() for soft labels, MSELossFlat() for numbers."
        )
    return loss if isinstance(loss, MixMoLoss) else MixMoLoss(loss)


def _facts_of_batches(dls: DataLoaders) -> tuple[tuple[int, int, int], Tensor | None]:
    """Give (C, H, W) and some targets, of the first batch; None for classes of our loaders."""
    if isinstance(dls.train, BatchLoader):
        return dls.train.images.image_shape, None
    with preserved_random_states(dls.train):
        batch = first_batch(dls.train)
        parts = count_parts(dls, batch)  # fastai may pass a sample through the transforms
    check_batch(*parts)
    images, *targets = batch
    if getattr(images, "ndim", 0) != 4:
        raise InputError(
            "MixMo needs batches of images (n, C, H, W); the loader's first input is "
            f"{getattr(images, 'shape', type(images).__name__)}."
        )
    channels, height, width = images.shape[1:]
    known = targets[0] if targets and isinstance(targets[0], Tensor) else None
    return (int(channels), int(height), int(width)), known


def _check_classes(targets: Tensor | None, num_classes: int, known: int) -> None:
    """Check that the network answers for what the data asks."""
    if targets is None:
        return
    if targets.ndim > 2:
        raise InputError(
            f"The targets are of shape {tuple(targets.shape)}; MixMo is for one class, several "
            "labels or numbers per image."
        )
    if targets.ndim == 1 and not targets.is_floating_point() and num_classes < known:
        raise InputError(
            f"The data has {known} classes, num_classes is {num_classes}.\nLeave num_classes out."
        )


def _known_classes(dls: DataLoaders) -> int:
    """Tell K where the loaders know it, else 0."""
    return int(get_c(dls) or 0) if isinstance(dls.train, DataLoader) else 0


def _num_classes(dls: DataLoaders) -> int:
    number = _known_classes(dls)
    if not number:
        raise InputError(
            "The loaders do not say how many classes there are. Say it: num_classes=10."
        )
    return number


def _dataset(dls: DataLoaders) -> Any:
    return getattr(dls.train, "dataset", None)
