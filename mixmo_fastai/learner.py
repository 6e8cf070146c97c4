"""Learners: one line for fastai users, and what a recipe describes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
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
from fastai.optimizer import OptimWrapper
from fastai.torch_core import params, trainable_params
from torch import Tensor, nn

from mixmo_fastai.averaging import EMACallback
from mixmo_fastai.callback import MixMoCallback
from mixmo_fastai.data.glance import first_batch, random_states_kept
from mixmo_fastai.data.loaders import BatchLoader
from mixmo_fastai.deferred import defer_readbacks
from mixmo_fastai.devices import place
from mixmo_fastai.errors import InputError, nearest, unknown
from mixmo_fastai.losses import MixMoLoss, is_multi_label
from mixmo_fastai.metrics import MemberAccuracy
from mixmo_fastai.mixing import Region, check_kind
from mixmo_fastai.models import MixMoModel, create_model
from mixmo_fastai.models.backbone_core import BackboneCore
from mixmo_fastai.models.ghost_norm import use_ghost_batches
from mixmo_fastai.models.surgery import Members, convert_between, find_ends
from mixmo_fastai.names import TORCHVISION_NETWORKS
from mixmo_fastai.randomness import fresh_seed, make_generator
from mixmo_fastai.recipe import Recipe

CALLBACK_ARGUMENTS = tuple(signature(MixMoCallback.__init__).parameters)[2:]  # after self and mix


def sgd(momentum: float = 0.9, nesterov: bool = True, weight_decay: float = 6e-4) -> partial[Any]:
    """Give fastai the published optimizer: torch's SGD with Nesterov's momentum.

    Its decay reaches all parameters, BatchNorm's included; fastai's own SGD spares those and has no
    Nesterov.
    """
    return partial(
        TorchOptimizer,
        opt=_sgd,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
    )


class TorchOptimizer(OptimWrapper):
    """fastai's wrapper of an optimizer of torch, without the settings that torch leaves at None.

    fastai's TensorBoardCallback takes every setting for a number.
    """

    @property
    def hypers(self) -> list[dict[str, Any]]:
        """Settings of each group of parameters."""
        return [{k: v for k, v in own.items() if v is not None} for own in super().hypers]


def _sgd(groups: Iterable[Any], **settings: Any) -> torch.optim.SGD:
    """Make torch's optimizer, in one kernel for all parameters where they lie on a GPU."""
    groups = [*groups]
    parameters = [p for g in groups for p in (g["params"] if isinstance(g, dict) else [g])]
    on_gpu = all(p.is_cuda for p in parameters)
    return torch.optim.SGD(groups, fused=True if on_gpu else None, **settings)


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
        mix: how features are mixed, see `MixMoCallback`; "sum" where num_members is 1.
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
    if not hasattr(dls, "train"):
        raise InputError(
            f"mixmo_learner takes loaders (DataLoaders) first; got {type(dls).__name__}."
        )
    wanted = _Wanted(
        _num_classes(dls) if num_classes is None else num_classes,
        num_members,
        *_facts_of_batches(dls),
        pretrained=pretrained,
        independent=independent,
    )
    check_kind(mix, wanted.members_of(arch))
    callback = MixMoCallback(mix, **mixing)
    loss_func = kwargs.pop("loss_func", getattr(_dataset(dls), "loss_func", None))
    loss = _as_mixmo_loss(loss_func, wanted.targets)
    seed = fresh_seed() if callback.seed is None else callback.seed
    model = _as_mixmo(arch, wanted, make_generator(seed, "init"))
    kwargs.setdefault("splitter", body_and_heads)  # for `freeze` and `fine_tune`
    use_ghost_batches(model, ghost_batch_size)
    if device := getattr(dls, "device", None):  # before the optimizer is made, which looks at it
        place(model, torch.device(device))
    kwargs.setdefault("opt_func", sgd())
    kwargs.setdefault("metrics", _metrics_for(wanted.targets, loss))
    learn = Learner(dls, model, loss, cbs=[callback, *L(kwargs.pop("cbs", None))], **kwargs)
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

    Its network is converted, see `convert_to_mixmo`, and all of it trains; its loss is wrapped in
    `MixMoLoss`; its optimizer is made anew when a fit begins, by the same function, with the two
    groups of `body_and_heads`; and it gets a `MixMoCallback`. Data, metrics and other callbacks
    stay. A loader that gave n images a batch now gives batch_repetitions · n.

    Args:
        learn: with a classifier that can be converted, or a `MixMoModel`.
        mix: how features are mixed, see `MixMoCallback`.
        num_members: M; 2 where not given, or that of a `MixMoModel`.
        independent: whether members start apart; for a network that is not trained yet.
        kwargs: of `MixMoCallback` (alpha, mix_prob, batch_repetitions, seed, …).

    Returns:
        the Learner.

    Raises:
        InputError: the network cannot be converted, an argument is not allowed, or there is a
            `MixMoCallback` already. The Learner is as it was.
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
    callback = MixMoCallback(mix, **kwargs)
    loss = _as_mixmo_loss(learn.loss_func)
    if isinstance(learn.model, MixMoModel):
        check_members(learn.model, num_members)
        check_kind(mix, learn.model.num_members)
    else:
        num_members = 2 if num_members is None else num_members
        check_kind(mix, num_members)
        image_shape, _ = _facts_of_batches(learn.dls)
        names = find_ends(learn.model, image_size=image_shape[1:], in_channels=image_shape[0])
        seed = fresh_seed() if callback.seed is None else callback.seed
        learn.model = convert_between(
            learn.model,
            names,
            Members(num_members, encoders_apart=independent, heads_apart=independent),
            generator=make_generator(seed, "init"),
        ).requires_grad_()
    learn.loss_func, learn.splitter, learn.opt = loss, body_and_heads, None
    return learn.add_cb(callback)


def body_and_heads(model: MixMoModel) -> list[list[nn.Parameter]]:
    """Split a network's parameters for fastai's `freeze` and for rates by depth.

    Encoders and core, then the heads, and with them what the network had built as one piece with
    its last layer, such as the head of fastai's `vision_learner`.
    """
    core = model.core
    around = core.around_the_head() if isinstance(core, BackboneCore) else None
    late = [] if around is None else params(around)
    taken = {id(parameter) for parameter in late}
    body = [p for p in (*params(model.encoders), *params(core)) if id(p) not in taken]
    return [body, [*late, *params(model.heads)]]


@dataclass(frozen=True)
class _Wanted:
    """What the network is to be like.

    Attributes:
        num_classes: K.
        num_members: M; None where it is not said.
        image_shape: (C, H, W) of the data.
        targets: some of the data's; None where they are classes.
        pretrained, independent: see `mixmo_learner`.
    """

    num_classes: int
    num_members: int | None
    image_shape: tuple[int, int, int]
    targets: Tensor | None
    pretrained: bool
    independent: bool | None

    @property
    def image_size(self) -> tuple[int, int]:
        return self.image_shape[1], self.image_shape[2]

    def members_of(self, arch: Any) -> int:
        """Tell M: what is said, or what a network has."""
        own = arch.num_members if isinstance(arch, MixMoModel) else 2
        return int(own if self.num_members is None else self.num_members)


def _as_mixmo(
    arch: str | nn.Module | Callable[..., nn.Module], wanted: _Wanted, generator: torch.Generator
) -> MixMoModel:
    """Make a MixMo network of what a user has: a name, a function, or a network."""
    if (name := _name_of(arch)) is not None:
        return create_model(
            name,
            wanted.num_classes,
            wanted.members_of(arch),
            wanted.image_shape[0],
            image_size=wanted.image_size,
            generator=generator,
            pretrained=wanted.pretrained,
        ).requires_grad_()
    if isinstance(arch, Learner) or not callable(arch):
        raise InputError(
            "arch must be a name, a function that makes a network, or a network; got "
            f"{type(arch).__name__}.\nOf a Learner it is learn.model."
        )
    if wanted.pretrained:
        what = "a network" if isinstance(arch, nn.Module) else "a function"
        raise InputError(
            f"pretrained=True goes with names; {what} brings its own weights.\nLeave it out."
        )
    twin = None
    if not isinstance(arch, nn.Module):
        arch, twin = _called_twice(arch, wanted.num_classes, generator)
    if isinstance(arch, MixMoModel):
        _check_fits(arch, wanted)
        return arch
    names = find_ends(arch, image_size=wanted.image_size, in_channels=wanted.image_shape[0])
    apart = [_differ(arch, twin, name) for name in names]
    if wanted.independent is not None:
        apart = [wanted.independent] * 2
    return convert_between(
        arch,
        names,
        Members(wanted.members_of(arch), encoders_apart=apart[0], heads_apart=apart[1]),
        num_classes=wanted.num_classes,
        in_channels=wanted.image_shape[0],
        generator=generator,
    ).requires_grad_()


def _name_of(arch: Any) -> str | None:
    """Give the name of a network, or of torchvision's function that makes it."""
    if isinstance(arch, str):
        return arch
    name = getattr(arch, "__name__", None)
    of_torchvision = str(getattr(arch, "__module__", "")).startswith("torchvision.models.")
    return name if of_torchvision and name in TORCHVISION_NETWORKS else None


def _called_twice(
    make: Callable[..., nn.Module], num_classes: int, generator: torch.Generator
) -> list[nn.Module]:
    """Call a function that makes networks twice; it names their classes in its own way.

    Where it brings trained weights, these are the same both times; what it draws differs.
    """
    unnamed, settings = _classes_for(make, num_classes)
    made = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            seed = int(torch.randint(2**63 - 1, (), generator=generator))
            torch.default_generator.manual_seed(seed)  # not that of any GPU
            made.append(make(*unnamed, **settings))
        if not isinstance(made[0], nn.Module):
            name = getattr(make, "__name__", type(make).__name__)
            raise InputError(f"{name!r} makes {type(made[0]).__name__}, not a network.")
    return made


def _classes_for(
    make: Callable[..., nn.Module], num_classes: int
) -> tuple[tuple[int, ...], dict[str, int]]:
    """Say the number of classes to a function in its own words, if it is to be told."""
    name = getattr(make, "__name__", type(make).__name__)
    try:
        known = signature(make).parameters
    except ValueError as error:  # of some that are not written in Python
        raise InputError(f"{name!r} does not say what it takes; wrap it in a function.") from error
    inner = make.func if isinstance(make, partial) else make
    bound = make.keywords if isinstance(make, partial) else {}
    # Trained weights bring their own last layer, of which new heads are made.
    trained = bound.get("weights") is not None or bound.get("pretrained")
    if trained or any(name in bound for name in _FOR_CLASSES):
        return (), {}
    named = next((name for name in _FOR_CLASSES if name in known), None)
    if named is None and any(p.kind is Parameter.VAR_KEYWORD for p in known.values()):
        of_fastai = str(getattr(inner, "__module__", "")).startswith("fastai.")
        named = "n_out" if of_fastai else "num_classes"
    if named is not None:
        return (), {named: num_classes}
    variable = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    needed = [
        p.name for p in known.values() if p.default is Parameter.empty and p.kind not in variable
    ]
    if needed:
        raise InputError(
            f"{name!r} needs {', '.join(needed)}; only the number of classes can be given to it, "
            f"as {_FOR_CLASSES[0]}.\nBind the rest: functools.partial(…, {needed[0]}=…)."
        )
    return (), {}


_FOR_CLASSES = ("num_classes", "n_out", "n_classes", "classes", "num_labels", "c", "k", "n")


def _differ(one: nn.Module, other: nn.Module | None, layer: str) -> bool:
    """Tell whether a layer has other weights in the other network; there may be none."""
    if other is None:
        return False
    ours, theirs = (model.get_submodule(layer).get_parameter("weight") for model in (one, other))
    return not torch.equal(ours, theirs)


def _check_fits(model: MixMoModel, wanted: _Wanted) -> None:
    """Check that a network that is taken as it is suits the data, and what was said."""
    own = {head.out_features for head in model.heads if isinstance(head, nn.Linear)}
    if own - {wanted.num_classes}:
        raise InputError(
            f"The network has {', '.join(map(str, own))} classes, the data {wanted.num_classes}.\n"
            "Build it for the data, or say num_classes."
        )
    check_members(model, wanted.num_members)
    stem = model.encoders[0]
    if isinstance(stem, nn.Conv2d) and stem.in_channels != wanted.image_shape[0]:
        raise InputError(
            f"The network takes images of {stem.in_channels} channels; the data has "
            f"{wanted.image_shape[0]}."
        )


def check_members(model: MixMoModel, wanted: int | None) -> None:
    """Check that a network has as many members as were asked for, if they were."""
    if wanted not in (None, model.num_members):
        raise InputError(
            f"The network has {model.num_members} members, not {wanted}.\nLeave num_members out."
        )


def _check_known(arguments: Iterable[str]) -> None:
    """Check that what is left is fastai's to take."""
    of_fastai = [*signature(Learner.__init__).parameters][2:]  # after self and dls
    known = [*signature(mixmo_learner).parameters, *CALLBACK_ARGUMENTS, *of_fastai]
    for name in arguments:
        if name not in of_fastai:
            guess = "num_classes" if name == "n_out" else nearest(name, known)
            hint = f"Did you mean {guess!r}?" if guess else "See the docstring for what there is."
            raise InputError(f"mixmo_learner takes no argument {name!r}.\n{hint}")


def learner_from_recipe(recipe: Recipe, dls: DataLoaders, **kwargs: Any) -> Learner:
    """Build the Learner that a recipe describes.

    Args:
        recipe: what to train; of a deep ensemble, the first network.
        dls: from `make_dataloaders`.
        kwargs: of fastai's `Learner`.
    """
    mix = recipe.mix
    optimizer = recipe.optimizer
    averaging = [EMACallback(recipe.train.ema_decay)] if recipe.train.ema_decay else []
    kwargs["cbs"] = [*averaging, *kwargs.get("cbs", ())]
    kwargs.setdefault("splitter", trainable_params)  # one group, and so in every checkpoint
    return mixmo_learner(
        dls,
        recipe.model.arch,
        mix=mix.kind,
        num_members=recipe.model.num_members,
        pretrained=recipe.model.pretrained,
        ghost_batch_size=recipe.model.ghost_batch_size,
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
    with random_states_kept(dls.train):
        images, *targets = first_batch(dls.train)
    if getattr(images, "ndim", 0) != 4:
        raise InputError(
            "MixMo needs batches of images (n, C, H, W); the loader's first input is "
            f"{getattr(images, 'shape', type(images).__name__)}."
        )
    channels, height, width = images.shape[1:]
    known = targets[0] if targets and isinstance(targets[0], Tensor) else None
    return (int(channels), int(height), int(width)), known


def _num_classes(dls: DataLoaders) -> int:
    number = get_c(dls) if isinstance(dls.train, DataLoader) else 0
    if not number:
        raise InputError(
            "The loaders do not say how many classes there are. Say it: num_classes=10."
        )
    return int(number)


def _dataset(dls: DataLoaders) -> Any:
    return getattr(dls.train, "dataset", None)
