"""Parameter groups of a MixMo Learner, and of a Learner that was converted.

fastai freezes parameters and sets learning rates by the groups that a Learner's splitter returns.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastai.learner import Learner
from fastai.torch_core import params, trainable_params
from torch import Tensor, nn

from mixmo_fastai.errors import InputError, summarize_error
from mixmo_fastai.models import MixMoModel
from mixmo_fastai.models.backbone_core import BackboneCore

Splitter = Callable[[Any], Any]


def body_and_heads(model: nn.Module) -> list[list[nn.Parameter]]:
    """Split a network's parameters for fastai's `freeze` and for discriminative learning rates.

    The first group holds the encoders and the core, the second the readout and the heads, together
    with the module that contained the network's last layer, such as the head of fastai's
    `vision_learner`. Another network, such as the result of `fuse`, is one group.
    """
    if not isinstance(model, MixMoModel):
        return [params(model)]
    core = model.core
    head_module = core.head_block() if isinstance(core, BackboneCore) else None
    head_parameters = [] if head_module is None else params(head_module)
    head_ids = {id(parameter) for parameter in head_parameters}
    body = [p for p in (*params(model.encoders), *params(core)) if id(p) not in head_ids]
    readout = getattr(model, "readout", None)  # missing in Learners exported by version 0.1.0
    readout_parameters = [] if readout is None else params(readout)
    return [body, [*head_parameters, *readout_parameters, *params(model.heads)]]


class ConvertedSplitter:
    """Apply the splitter of the original network to the MixMo network converted from it.

    The splitter is called on the original network, with one encoder as its first convolution and
    one head as its last layer. All encoders are then added to that encoder's group, and all heads
    to that head's group: the first and the last group if groups go from input to output.

    Args:
        splitter: splitter of the original network.
    """

    def __init__(self, splitter: Splitter) -> None:
        self.splitter = splitter

    def __call__(self, model: nn.Module) -> Any:
        core = getattr(model, "core", None)
        if not isinstance(model, MixMoModel) or not isinstance(core, BackboneCore):
            return self.splitter(model)  # another network, such as the result of `fuse`
        with core.restored(model.encoders[0], model.heads[0]) as network:
            groups = self.splitter(network)
            groups = [*groups]  # consumes generators inside the context
        replacements: dict[int, list[nn.Parameter]] = {}
        for layers in (model.encoders, model.heads):
            for name, parameter in layers[0].named_parameters():
                replacements[id(parameter)] = [layer.get_parameter(name) for layer in layers]
        return _replace_parameters(groups, replacements)


ConvertedGroups = ConvertedSplitter  # its name in Learners exported by version 0.1.0


def converted_splitter(splitter: Splitter, model: MixMoModel) -> Splitter:
    """Convert the splitter of the original network into one for the MixMo network.

    Args:
        splitter: splitter of the original network; splitters that work for any network are
            returned unchanged.
        model: the MixMo network.

    Raises:
        InputError: the splitter fails.
    """
    if splitter in _GENERIC_SPLITTERS or not isinstance(model.core, BackboneCore):
        return splitter
    converted = ConvertedSplitter(splitter)
    try:
        converted(model)
    except Exception as error:  # a user's function may raise any error
        raise InputError(
            f"The Learner's splitter fails on its network: {summarize_error(error)}.\n"
            "Set another splitter; learn.splitter = trainable_params puts all in one group."
        ) from error
    return converted


def usable_splitter(splitter: Splitter, model: MixMoModel) -> Splitter:
    """Return a splitter that may be one for the MixMo network or for the network it came from.

    Args:
        splitter: splitter of either network.
        model: the MixMo network.

    Raises:
        InputError: the splitter fails on both.
    """
    try:
        [*splitter(model)]  # also consumes a generator
    except Exception:  # a user's function may raise any error
        return converted_splitter(splitter, model)
    return splitter


_GENERIC_SPLITTERS = (trainable_params, params, body_and_heads)


def convert_optimizer(learn: Learner, original: nn.Module) -> None:
    """Replace a Learner's optimizer by one for its converted network.

    The new optimizer has the same groups, settings and frozen groups. Its state is reset, as after
    fastai's `freeze` and `unfreeze`, because the loss and the batches have changed.

    Args:
        learn: a Learner with the converted network and the optimizer of the original network.
        original: the network before its conversion.
    """
    old_opt, splitter = learn.opt, learn.splitter
    groups = _replace_parameters(old_opt.param_lists, _converted_parameters(original, learn.model))
    learn.splitter = lambda _: groups
    try:
        learn.create_opt()
    finally:
        learn.splitter = splitter
    for name in old_opt.hypers[0]:
        learn.opt.set_hyper(name, [group[name] for group in old_opt.hypers])
    learn.opt.frozen_idx = old_opt.frozen_idx


def _converted_parameters(original: nn.Module, model: MixMoModel) -> dict[int, list[nn.Parameter]]:
    """Map the id of each original parameter to the parameters that replace it."""
    core, replacements = model.core, {}
    assert isinstance(core, BackboneCore)
    for name, layers in ((core.first, model.encoders), (core.last, model.heads)):
        for parameter_name, parameter in original.get_submodule(name).named_parameters():
            replacements[id(parameter)] = [layer.get_parameter(parameter_name) for layer in layers]
    for name, parameter in original.named_parameters():
        if id(parameter) not in replacements:
            replacements[id(parameter)] = [core.body.get_parameter(name)]
    return replacements


def _replace_parameters(
    groups: Iterable[Any], replacements: Mapping[int, list[nn.Parameter]]
) -> list[Any]:
    """Replace parameters in nested groups by those that `replacements` maps their ids to."""
    replaced: list[Any] = []
    for item in groups:
        if isinstance(item, Tensor):
            replaced += replacements.get(id(item), [item])
        elif isinstance(item, Mapping):  # a parameter group of torch's optimizers
            params_of_group = _replace_parameters(item["params"], replacements)
            replaced.append({**item, "params": params_of_group})
        else:
            replaced.append(_replace_parameters(item, replacements))
    return replaced
