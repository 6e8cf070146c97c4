"""Parameter groups of a MixMo Learner, and those that a converted Learner had before.

fastai freezes, and sets learning rates, by the groups that a Learner's splitter makes.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastai.learner import Learner
from fastai.torch_core import params, trainable_params
from torch import Tensor, nn

from mixmo_fastai.errors import InputError, first_line
from mixmo_fastai.models import MixMoModel
from mixmo_fastai.models.backbone_core import BackboneCore

Splitter = Callable[[Any], Any]


def body_and_heads(model: MixMoModel) -> list[list[nn.Parameter]]:
    """Split a network's parameters for fastai's `freeze` and for rates by depth.

    Encoders and core, then the heads, and with them what the network had built as one piece with
    its last layer, such as the head of fastai's `vision_learner`.
    """
    core = model.core
    around = core.head_block() if isinstance(core, BackboneCore) else None
    late = [] if around is None else params(around)
    taken = {id(parameter) for parameter in late}
    body = [p for p in (*params(model.encoders), *params(core)) if id(p) not in taken]
    return [body, [*late, *params(model.heads)]]


class ConvertedGroups:
    """The groups of a network's own splitter, for the MixMo network that it became.

    The splitter is given the network as it was built, with one encoder as its first convolution
    and one head as its last layer. All encoders join the group of the one, and all heads that of
    the other: the first and the last group of splitters that go from the input to the output.

    Args:
        splitter: of the network before its conversion.
    """

    def __init__(self, splitter: Splitter) -> None:
        self.splitter = splitter

    def __call__(self, model: nn.Module) -> Any:
        core = getattr(model, "core", None)
        if not isinstance(model, MixMoModel) or not isinstance(core, BackboneCore):
            return self.splitter(model)  # another network, such as what `fuse` made
        with core.restored(model.encoders[0], model.heads[0]) as network:
            groups = self.splitter(network)
            groups = [*groups]  # some are made on demand
        matching: dict[int, list[nn.Parameter]] = {}
        for layers in (model.encoders, model.heads):
            for name, parameter in layers[0].named_parameters():
                matching[id(parameter)] = [layer.get_parameter(name) for layer in layers]
        return _exchanged(groups, matching)


def converted_splitter(splitter: Splitter, model: MixMoModel) -> Splitter:
    """Make a splitter of a MixMo network out of that of the network before its conversion.

    Args:
        splitter: of the network before. Those that know every network stay as they are.
        model: the MixMo network.

    Raises:
        InputError: the splitter fails.
    """
    if splitter in _OF_ANY_NETWORK or not isinstance(model.core, BackboneCore):
        return splitter
    converted = ConvertedGroups(splitter)
    try:
        converted(model)
    except Exception as error:  # anything may happen in a user's function
        raise InputError(
            f"The Learner's splitter fails on its network: {first_line(error)}.\n"
            "Set one that splits it; learn.splitter = trainable_params makes one group."
        ) from error
    return converted


_OF_ANY_NETWORK = (trainable_params, params, body_and_heads)


def convert_optimizer(learn: Learner, before: nn.Module) -> None:
    """Create an optimizer for a Learner's converted network like the one that the Learner has.

    It has the same groups with the same settings, frozen as they were. Its state starts afresh, as
    fastai's own does after `freeze` and `unfreeze`: the loss and the batches are others now.

    Args:
        learn: with the converted network and an optimizer of the network before.
        before: the network before.
    """
    had, splitter = learn.opt, learn.splitter
    groups = _exchanged(had.param_lists, _matching(before, learn.model))
    learn.splitter = lambda _: groups
    try:
        learn.create_opt()
    finally:
        learn.splitter = splitter
    for name in had.hypers[0]:
        learn.opt.set_hyper(name, [group[name] for group in had.hypers])
    learn.opt.frozen_idx = had.frozen_idx


def _matching(before: nn.Module, after: MixMoModel) -> dict[int, list[nn.Parameter]]:
    """Map each parameter of a network to those that it became in its MixMo network."""
    core, found = after.core, {}
    assert isinstance(core, BackboneCore)
    for name, layers in ((core.first, after.encoders), (core.last, after.heads)):
        for own, parameter in before.get_submodule(name).named_parameters():
            found[id(parameter)] = [layer.get_parameter(own) for layer in layers]
    for name, parameter in before.named_parameters():
        if id(parameter) not in found:
            found[id(parameter)] = [core.body.get_parameter(name)]
    return found


def _exchanged(groups: Iterable[Any], matching: Mapping[int, list[nn.Parameter]]) -> list[Any]:
    """Put other parameters in the place of those that have some; others stay."""
    exchanged: list[Any] = []
    for each in groups:
        if isinstance(each, Tensor):
            exchanged += matching.get(id(each), [each])
        elif isinstance(each, Mapping):  # as torch's optimizers take them
            exchanged.append({**each, "params": _exchanged(each["params"], matching)})
        else:
            exchanged.append(_exchanged(each, matching))
    return exchanged
