"""The network with several inputs and several outputs.

Shapes: B batch, M members, C image channels, H W image size, D feature channels, h w feature size
after the encoder, K classes.
Source: Ramé, Sun, Cord, "MixMo", ICCV 2021, section 3.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mixmo_fastai.errors import InputError
from mixmo_fastai.models.backbone_core import BackboneCore
from mixmo_fastai.models.fused import fuse_parts, run_core


class MixMoModel(nn.Module):
    """M encoders, one core, M heads.

    Trained with one image per member and masks that mix their features; asked with one image, it
    is an ensemble of M members at the price of one network. The arguments decide which, not the
    training mode.

    Args:
        encoders: M modules (B, C, H, W) -> (B, D, h, w), the first convolution once per member.
        core: a module (B, D, h, w) -> (B, features).
        heads: M modules (B, features) -> (B, K), the last linear layer once per member.
        output: what turns logits into predictions, each number by itself, such as the
            `SigmoidRange` of fastai's `y_range`; None when logits are the predictions. It is
            applied to the mean of the members' logits, so that `fuse` stays exact.

    Raises:
        InputError: the number of encoders is not that of heads, or zero.
    """

    def __init__(
        self,
        encoders: Iterable[nn.Module],
        core: nn.Module,
        heads: Iterable[nn.Module],
        output: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.core = core
        self.heads = nn.ModuleList(heads)
        self.output = output
        if not len(self.encoders) == len(self.heads) >= 1:
            raise InputError(
                "MixMoModel needs one encoder and one head per member; "
                f"got {len(self.encoders)} encoders and {len(self.heads)} heads."
            )
        self._mask_shapes: dict[tuple[int, int], tuple[int, int, int]] = {}
        # (B, M, K) of the last batch in evaluation mode, for metrics of the members.
        self.latest_member_logits: Tensor | None = None

    @property
    def num_members(self) -> int:
        """M."""
        return len(self.encoders)

    @property
    def in_channels(self) -> int:
        """C, of the first layer that says so."""
        for module in self.encoders.modules():
            known = isinstance(module, nn.Conv2d | nn.Linear) and not is_lazy(module.weight)
            if known:
                return int(module.weight.shape[1])  # type: ignore[index]
        raise InputError(
            "The encoders hold no convolution that tells the number of image channels.\n"
            "Give each a convolution of known size; a lazy one must have seen an image."
        )

    def forward(self, inputs: Tensor, masks: Tensor | None = None) -> Tensor:
        """Predict.

        Args:
            inputs: (B, C, H, W) for the ensemble, or (B, M, C, H, W), an image per member, with
                masks.
            masks: (B, M, 1 or D, h, w), summing to one over the members.

        Returns:
            Ensemble logits (B, K), the mean of the members' logits; member logits (B, M, K) where
            masks are given. With an `output` layer, what it makes of these.
        """
        if masks is not None:
            return self.predictions(self._decode(self._mix(inputs, masks), inputs))
        logits = self.member_logits(inputs)
        if not self.training:
            self.latest_member_logits = logits.detach()
        return self.predictions(logits.mean(dim=1))

    def predictions(self, logits: Tensor) -> Tensor:
        """Apply the `output` layer, if there is one, to logits (…, K) of members or ensemble."""
        output: nn.Module | None = getattr(self, "output", None)  # version 0.1.0 pickled none
        return logits if output is None else output(logits)

    def member_logits(self, x: Tensor) -> Tensor:
        """Show every member the same image: (B, C, H, W) -> (B, M, K), before any `output`."""
        features = self.encoders[0](x)
        for encoder in self.encoders[1:]:
            features = features + encoder(x)
        return self._decode(features, x)

    def mask_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Tell the shape (D, h, w) of an encoder's output for images of this size.

        Raises:
            InputError: the encoder cannot say it, or its output is no map of features.
        """
        if (height, width) not in self._mask_shapes:
            image = torch.empty(1, self.in_channels, height, width, device="meta")
            self._mask_shapes[height, width] = _output_shape(self.encoders[0], image)
        return self._mask_shapes[height, width]

    def fuse(self, *, keep_members: bool = False) -> nn.Module:
        """Collapse the ensemble into a plain network with the same logits and predictions.

        The encoders become one convolution with the summed weights, and the heads one linear layer
        with the mean weights, so the collapse is exact up to rounding.

        Args:
            keep_members: whether the last layer keeps all heads, side by side, so that the network
                still tells what each member votes.

        Returns:
            A new network (B, C, H, W) -> (B, K): of one that was converted, of the class that it
            had before; else with one encoder, a copy of the core and one head. With `keep_members`
            its `member_logits` gives (B, M, K).

        Raises:
            InputError: an encoder is not one convolution, a head not one linear layer, or they
                differ in more than their weights.
        """
        parts = [*self.encoders], self.core, [*self.heads], getattr(self, "output", None)
        return fuse_parts(*parts, keep_members=keep_members)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load tensors, as any module does.

        Raises:
            InputError: they are of the network that was converted, before its conversion.
        """
        given, own = state_dict.keys(), self.state_dict().keys()
        if isinstance(self.core, BackboneCore) and not given & own and given & self.core.had(own):
            raise InputError(
                "These weights were saved before the network was converted to MixMo: they have no "
                "encoders and heads.\nLoad them into the network, or its Learner, as it was "
                "before, then convert it: to_mixmo(learn.load(…))."
            )
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _mix(self, inputs: Tensor, masks: Tensor) -> Tensor:
        # Member by member, so that no stack of features is ever held; `mixing.mix_features` is the
        # plain form. The factor M goes into the masks, which are small.
        scaled = masks * self.num_members
        mixed: Tensor | None = None
        for i, encoder in enumerate(self.encoders):
            features = encoder(inputs[:, i])
            mask = scaled[:, i].to(features.dtype)
            mixed = mask * features if mixed is None else torch.addcmul(mixed, mask, features)
        assert mixed is not None
        return mixed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "latest_member_logits": None}  # no user's data in an export

    def _decode(self, features: Tensor, image: Tensor) -> Tensor:
        """(B, D, h, w) of images (…, H, W) -> member logits (B, M, K)."""
        embedding = run_core(self.core, features, image)
        logits = torch.stack([head(embedding) for head in self.heads], dim=1)
        # In half precision, means of members and their classes would often tie.
        return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def first_difference(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """Name the first tensor that is missing, unknown, or of another shape or type; else None."""
    ours, theirs = ({k: (t.shape, t.dtype) for k, t in each.items()} for each in (own, given))
    return next((name for name in ours | theirs if ours.get(name) != theirs.get(name)), None)


def unwrap(model: nn.Module) -> Any:
    """Find the network inside wrappers of distributed training and of torch.compile."""
    for attribute in ("module", "_orig_mod"):
        if not isinstance(model, MixMoModel):
            model = getattr(model, attribute, model)
    return model


def _output_shape(encoder: nn.Module, image: Tensor) -> tuple[int, int, int]:
    name = type(encoder).__name__
    try:
        shape = tuple(_dry_run(encoder, image).shape[1:])
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"The encoder {name} cannot say the shape of its output for images of "
            f"{tuple(image.shape[1:])}: {reason}\n"
            "Masks need it before any image is seen: its forward must run on the meta device."
        ) from error
    if len(shape) != 3:
        raise InputError(
            f"The encoder {name} gives (B, {', '.join(map(str, shape))}); masks are laid over maps "
            "of features (B, D, h, w)."
        )
    return shape


def _dry_run(encoder: nn.Module, image: Tensor) -> Tensor:
    """Run an encoder on the meta device, without its hooks, which may look at values."""
    if type(encoder) is nn.Conv2d:  # a subclass may pad in its own way
        out: Tensor = encoder._conv_forward(image, encoder.weight.to("meta"), None)
    else:
        out = copy.deepcopy(encoder).to("meta").forward(image)
    return out
