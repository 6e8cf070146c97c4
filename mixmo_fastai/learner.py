"""Learners: one line for fastai users, and what a recipe describes."""

from collections.abc import Callable, Iterable
from functools import partial
from inspect import Parameter, signature
from typing import Any

import fastai.callback.progress
import fastai.callback.schedule  # noqa: F401  # gives every Learner fit_one_cycle and lr_find
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import get_c
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat
from fastai.metrics import accuracy, accuracy_multi
from fastai.optimizer import OptimWrapper
from fastai.torch_core import params
from torch import nn

from mixmo_fastai.averaging import EMACallback
from mixmo_fastai.callback import MixMoCallback
from mixmo_fastai.data.loaders import BatchLoader
from mixmo_fastai.deferred import defer_readbacks
from mixmo_fastai.devices import place
from mixmo_fastai.errors import InputError
from mixmo_fastai.losses import MixMoLoss
from mixmo_fastai.metrics import MemberAccuracy
from mixmo_fastai.mixing import Region, check_kind
from mixmo_fastai.models import MixMoModel, convert_to_mixmo, create_model
from mixmo_fastai.models.backbone_core import BackboneCore
from mixmo_fastai.models.ghost_norm import use_ghost_batches
from mixmo_fastai.models.surgery import draw_apart
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
    num_members: int = 2,
    num_classes: int | None = None,
    pretrained: bool = False,
    ghost_batch_size: int = 0,
    **kwargs: Any,
) -> Learner:
    """Build a fastai Learner that trains a MixMo network.

    Args:
        dls: loaders of batches of one image and one target; a batch of n images becomes one of
            batch_repetitions · n for the network.
        arch: network by name, as in "wrn28_10", "resnet50" or "timm/convnext_atto"; a function that
            makes one, as fastai's xresnet50; or a network of your own, which is converted, weights
            and all, or taken as it is where it is a `MixMoModel`. All of it is trained, frozen
            parts included, until `Learner.freeze` says otherwise.
        mix: how features are mixed, see `MixMoCallback`; "sum" where num_members is 1.
        num_members: M.
        num_classes: K; what the loaders say where not given.
        pretrained: whether a network by name starts from its library's weights.
        ghost_batch_size: images among which BatchNorm normalises in training; 0 for all of a batch.
        kwargs: of `MixMoCallback` (alpha, mix_prob, batch_repetitions, seed, …) and of fastai's
            `Learner` (loss_func, opt_func, metrics, cbs, …). A seed also fixes the initial weights;
            without one they differ from Learner to Learner, and follow `set_seed`.

    Returns:
        A Learner whose figures in evaluation are those of the ensemble.

    Raises:
        InputError: a name or number is not allowed, or a network cannot be converted.
    """
    mixing = {name: kwargs.pop(name) for name in CALLBACK_ARGUMENTS if name in kwargs}
    check_kind(mix, num_members)
    callback = MixMoCallback(mix, **mixing)
    seed = fresh_seed() if callback.seed is None else callback.seed
    model = _as_mixmo(
        arch,
        _num_classes(dls) if num_classes is None else num_classes,
        num_members,
        _image_shape(dls),
        pretrained=pretrained,
        generator=make_generator(seed, "init"),
    )
    model.requires_grad_()
    if pretrained or isinstance(arch, nn.Module):
        kwargs.setdefault("splitter", body_and_heads)  # for `fine_tune`
    use_ghost_batches(model, ghost_batch_size)
    if device := getattr(dls, "device", None):  # before the optimizer is made, which looks at it
        place(model, torch.device(device))
    loss_func = kwargs.pop("loss_func", getattr(_dataset(dls), "loss_func", None))
    kwargs.setdefault("opt_func", sgd())
    of_ensemble = accuracy_multi if _takes_several_labels(loss_func) else accuracy
    kwargs.setdefault("metrics", [of_ensemble, MemberAccuracy()])
    cbs = kwargs.pop("cbs", None) or []
    cbs = [*cbs] if isinstance(cbs, list | tuple) else [cbs]
    learn = Learner(dls, model, _as_mixmo_loss(loss_func), cbs=[callback, *cbs], **kwargs)
    return defer_readbacks(learn)


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


def _as_mixmo(
    arch: str | nn.Module | Callable[..., nn.Module],
    num_classes: int,
    num_members: int,
    image_shape: tuple[int, int, int],
    *,
    pretrained: bool,
    generator: torch.Generator,
) -> MixMoModel:
    """Make a MixMo network of what a user has: a name, a function, or a network."""
    in_channels, *size = image_shape
    image_size = (size[0], size[1])
    if (name := _name_of(arch)) is not None:
        return create_model(
            name,
            num_classes,
            num_members,
            in_channels,
            image_size=image_size,
            generator=generator,
            pretrained=pretrained,
        )
    trained = True
    if not isinstance(arch, nn.Module):
        if not callable(arch) or isinstance(arch, Learner):
            raise InputError(
                "arch must be a name, a function that makes a network, or a network; got "
                f"{type(arch).__name__}.\nOf a Learner it is learn.model."
            )
        if pretrained:
            raise InputError(
                f"pretrained=True goes with names; {getattr(arch, '__name__', arch)!r} is a "
                "function.\nGive the network that it makes with its weights."
            )
        arch, trained = _called(arch, num_classes, generator)
    if isinstance(arch, MixMoModel):
        return _checked(arch, num_classes)
    converted = convert_to_mixmo(
        arch,
        num_members,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        generator=generator,
    )
    return converted if trained else draw_apart(converted, generator)


def _name_of(arch: Any) -> str | None:
    """Give the name of a network, or of torchvision's function that makes it."""
    if isinstance(arch, str):
        return arch
    name = getattr(arch, "__name__", None)
    of_torchvision = str(getattr(arch, "__module__", "")).startswith("torchvision.models.")
    return name if of_torchvision and name in TORCHVISION_NETWORKS else None


def _called(
    make: Callable[..., nn.Module], num_classes: int, generator: torch.Generator
) -> tuple[nn.Module, bool]:
    """Call a function that makes networks, which names their classes in its own way.

    Returns:
        what it made, and whether that was trained: then it is the same whatever was drawn.
    """
    known = signature(make).parameters
    of_fastai = str(getattr(make, "__module__", "")).startswith("fastai.")
    named = next((n for n in ("num_classes", "n_out", "n_classes") if n in known), None)
    takes_any = any(p.kind is Parameter.VAR_KEYWORD for p in known.values())
    if named is None and takes_any:
        named = "n_out" if of_fastai else "num_classes"
    settings = {} if named is None else {named: num_classes}
    made = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**63 - 1, (), generator=generator)))
            made.append(make(**settings))
    if not all(isinstance(each, nn.Module) for each in made):
        raise InputError(
            f"{getattr(make, '__name__', make)!r} makes {type(made[0]).__name__}, not a network."
        )
    pairs = zip(made[0].parameters(), made[1].parameters(), strict=True)
    return made[0], all(torch.equal(*pair) for pair in pairs)


def _checked(model: MixMoModel, num_classes: int) -> MixMoModel:
    """Take a network as it is, if it has as many classes as the data."""
    own = {head.out_features for head in model.heads if isinstance(head, nn.Linear)}
    if own - {num_classes}:
        raise InputError(
            f"The network has {', '.join(map(str, own))} classes, the data {num_classes}.\n"
            "Build it for the data, or say num_classes."
        )
    return model


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


def _takes_several_labels(loss: Any) -> bool:
    base = loss.base if isinstance(loss, MixMoLoss) else loss
    return isinstance(base, nn.BCEWithLogitsLoss | BCEWithLogitsLossFlat)


def _as_mixmo_loss(loss: Any) -> MixMoLoss:
    return loss if isinstance(loss, MixMoLoss) else MixMoLoss(loss)


def _image_shape(dls: DataLoaders) -> tuple[int, int, int]:
    """Give (C, H, W) of the training images, of the first batch where they differ."""
    if isinstance(dls.train, BatchLoader):
        return dls.train.images.image_shape
    batch = dls.train.one_batch() if isinstance(dls.train, DataLoader) else next(iter(dls.train))
    if getattr(batch[0], "ndim", 0) != 4:
        raise InputError(
            "MixMo needs batches of images (n, C, H, W); the loader's first input is "
            f"{getattr(batch[0], 'shape', type(batch[0]).__name__)}."
        )
    channels, height, width = batch[0].shape[1:]
    return int(channels), int(height), int(width)


def _num_classes(dls: DataLoaders) -> int:
    number = get_c(dls) if isinstance(dls.train, DataLoader) else 0
    if not number:
        raise InputError(
            "The loaders do not say how many classes there are. Say it: num_classes=10."
        )
    return int(number)


def _dataset(dls: DataLoaders) -> Any:
    return getattr(dls.train, "dataset", None)
