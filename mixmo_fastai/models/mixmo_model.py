"""The multi-input multi-output network.

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
from mixmo_fastai.models.part_checks import (
    check_core_output,
    check_num_members,
    separate_modules,
)
from mixmo_fastai.models.readout import build_readout, check_readout, embed


class MixMoModel(nn.Module):
    """M encoders, one core, M heads.

    In training, each member receives a different image, and masks mix the members' features. At
    inference, all members receive the same image, and the network is an ensemble of M members at
    the cost of one network. The mode depends on the arguments of `forward`, not on
    `model.training`.

    Args:
        encoders: M modules (B, C, H, W) -> (B, D, h, w), one first convolution per member.
        core: module (B, D, h, w) -> (B, features).
        heads: M modules (B, features) -> (B, K), one last linear layer per member.
        output: elementwise layer that turns logits into predictions, such as the `SigmoidRange` of
            fastai's `y_range`; None if the logits are the predictions. At inference it is applied
            to the mean of the members' logits, so that `fuse` remains exact.
        readout: name in `choices.READOUTS`, or a module as in `models/readout.py`, through which
            the heads read the core's maps; None or "core" for the core's own pooling.

    Raises:
        InputError: there are no encoders, the numbers of encoders and heads differ, one of them is
            not a module or is given twice, or the core does not return the maps that the readout
            needs.

    Example:
        >>> encoders = [nn.Conv2d(3, 8, 3, padding=1) for _ in range(2)]
        >>> core = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> model = MixMoModel(encoders, core, heads=[nn.Linear(8, 10) for _ in range(2)])
        >>> model(torch.zeros(4, 3, 32, 32)).shape  # one image for both members: ensemble logits
        torch.Size([4, 10])
        >>> images, masks = torch.zeros(4, 2, 3, 32, 32), torch.full((4, 2, 1, 32, 32), 0.5)
        >>> model(images, masks).shape  # one image per member: member logits
        torch.Size([4, 2, 10])
    """

    def __init__(
        self,
        encoders: Iterable[nn.Module],
        core: nn.Module,
        heads: Iterable[nn.Module],
        output: nn.Module | None = None,
        readout: str | nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(separate_modules("encoders", encoders))
        self.core = core
        self.heads = nn.ModuleList(separate_modules("heads", heads))
        self.output = output
        if not len(self.encoders) == len(self.heads) >= 1:
            raise InputError(
                "MixMoModel needs one encoder and one head per member; "
                f"got {len(self.encoders)} encoders and {len(self.heads)} heads."
            )
        self.set_readout(readout)
        self._mask_shapes: dict[tuple[int, int], tuple[int, int, int]] = {}

    def set_readout(self, readout: str | nn.Module | None) -> None:
        """Replace the readout; see the docstring of the class.

        Raises:
            InputError: the name is unknown, or the core does not return the maps that the readout
                needs.

        Example:
            >>> from mixmo_fastai.models.create import create_model
            >>> from mixmo_fastai.models.readout import Readout
            >>> class MaxPooling(Readout):
            ...     def forward(self, maps, masks):
            ...         return maps.amax(dim=(2, 3))
            >>> model = create_model("wrn10_1", num_classes=10)
            >>> model.set_readout(MaxPooling())
            >>> model(torch.zeros(4, 3, 32, 32)).shape
            torch.Size([4, 10])
        """
        self.readout = build_readout(readout)
        if self.readout is not None:
            check_readout(self.readout, self.core)

    def __getitem__(self, index: Any) -> nn.Module:
        """Refuse access by position, as to the body and head of fastai's vision networks.

        Raises:
            InputError: always; it names the parts.
        """
        raise InputError(
            "A MixMoModel has no parts by position; its parts are encoders, core and heads. The "
            "body of a\nconverted vision_learner is model.core.body[0]. For splitters of such "
            "networks, call to_mixmo(learn)."
        )

    @property
    def num_members(self) -> int:
        """Number of members, M."""
        return len(self.encoders)

    @property
    def in_channels(self) -> int:
        """Number of image channels, C, read from the first convolution or linear layer."""
        for module in self.encoders.modules():
            if not isinstance(module, nn.Conv2d | nn.Linear) or is_lazy(module.weight):
                continue
            if isinstance(module, nn.Linear):
                return module.in_features
            return module.in_channels  # the weights of a grouped convolution have fewer
        raise InputError(
            "Cannot infer the number of image channels: the encoders have no initialised "
            "convolution.\nGive each encoder a convolution; run lazy layers on one batch first."
        )

    def forward(
        self, inputs: Tensor, masks: Tensor | None = None, all_members: bool = False
    ) -> Tensor:
        """Compute ensemble logits, or member logits if masks are given.

        Args:
            inputs: (B, C, H, W) without masks; (B, M, C, H, W), one image per member, with masks.
            masks: (B, M, 1 or D, h, w), summing to one over the members.
            all_members: without masks, return what `member_logits` returns instead.

        Returns:
            Ensemble logits (B, K), the mean of the members' logits; with masks, member logits
            (B, M, K). The `output` layer, if any, is applied to them.

        Example:
            >>> from mixmo_fastai.models.create import create_model
            >>> model = create_model("wrn10_1", num_classes=10, num_members=2)
            >>> model(torch.zeros(4, 3, 32, 32)).shape
            torch.Size([4, 10])
            >>> masks = torch.full((4, 2, 1, *model.mask_shape(32, 32)[1:]), 0.5)
            >>> model(torch.zeros(4, 2, 3, 32, 32), masks).shape
            torch.Size([4, 2, 10])
        """
        if masks is not None:
            features = self._mix(inputs, masks)
            return self.predictions(self._apply_core_and_heads(features, inputs, masks))
        logits = self.member_logits(inputs)
        return logits if all_members else self.predictions(logits.mean(dim=1))

    def predictions(self, logits: Tensor) -> Tensor:
        """Apply the `output` layer, if any, to member or ensemble logits (…, K).

        Example:
            >>> parts = [nn.Conv2d(3, 8, 4)], nn.Flatten(), [nn.Linear(8, 1)]
            >>> MixMoModel(*parts, output=nn.Sigmoid()).predictions(torch.zeros(2, 1))
            tensor([[0.5000],
                    [0.5000]])
        """
        # Pickles of version 0.1.0 have no `output`.
        output: nn.Module | None = getattr(self, "output", None)
        return logits if output is None else output(logits)

    def member_logits(self, x: Tensor) -> Tensor:
        """Compute logits of all members for the same image: (B, C, H, W) -> (B, M, K).

        The `output` layer is not applied.

        Example:
            >>> from mixmo_fastai.models.create import create_model
            >>> model = create_model("wrn10_1", num_classes=10, num_members=2)
            >>> model.member_logits(torch.zeros(4, 3, 32, 32)).shape
            torch.Size([4, 2, 10])
        """
        # Masks of 1/M, the mean mask of training, times the factor M of `_mix`.
        features = self.encoders[0](x)
        for encoder in self.encoders[1:]:
            features = features + encoder(x)
        return self._apply_core_and_heads(features, x)

    def mask_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape (D, h, w) of an encoder's output for images of this size.

        Raises:
            InputError: the shape cannot be computed, the output is not a feature map, or encoders
                differ in it.

        Example:
            >>> from mixmo_fastai.models.create import create_model
            >>> create_model("wrn10_1", num_classes=10).mask_shape(32, 32)
            (16, 32, 32)
        """
        if (height, width) not in self._mask_shapes:
            dtypes = [p.dtype for p in self.encoders.parameters() if p.is_floating_point()]
            dtype = dtypes[0] if dtypes else None
            image = torch.empty(1, self.in_channels, height, width, device="meta", dtype=dtype)
            shapes = [_output_shape(encoder, image) for encoder in self.encoders]
            if len(set(shapes)) > 1:
                raise InputError(
                    "Encoders must return feature maps of equal shape, which are added; got "
                    f"{', '.join(map(str, shapes))} for images of ({height}, {width})."
                )
            self._mask_shapes[height, width] = shapes[0]
        return self._mask_shapes[height, width]

    def fuse(self, *, keep_members: bool = False) -> nn.Module:
        """Fuse the ensemble into a plain network with the same logits and predictions.

        The encoders become one convolution with the summed weights, and the heads one linear layer
        with the mean weights; the result is exact up to rounding.

        Args:
            keep_members: whether to stack all heads in the last layer, so that the network can
                still return the logits of each member.

        Returns:
            A new network (B, C, H, W) -> (B, K): an instance of the original class if the model was
            converted, otherwise a `FusedNetwork` of one encoder, a copy of the core and one head.
            With `keep_members`, always a `FusedNetwork`, whose `member_logits` returns (B, M, K).

        Raises:
            InputError: an encoder is not a single convolution, a head is not a single linear
                layer, encoders or heads differ in more than their weights, or the readout is not
                fusable.

        Example:
            >>> from mixmo_fastai.models.create import create_model
            >>> generator = torch.Generator().manual_seed(0)
            >>> model = create_model("wrn10_1", num_classes=10, generator=generator).eval()
            >>> images = torch.randn(4, 3, 32, 32, generator=generator)
            >>> torch.allclose(model.fuse()(images), model(images), atol=1e-4)
            True
        """
        readout: nn.Module | None = getattr(self, "readout", None)  # not in pickles of 0.1.0
        if readout is not None and not getattr(readout, "is_fusable", False):
            raise InputError(
                f"fuse() cannot fuse a network with the readout {type(readout).__name__}, because "
                "its is_fusable is False.\n"
                "Set is_fusable=True if the readout without masks equals the core's own pooling."
            )
        parts = [*self.encoders], self.core, [*self.heads], getattr(self, "output", None)
        return fuse_parts(*parts, keep_members=keep_members)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a state dict, as `nn.Module.load_state_dict` does.

        Raises:
            InputError: the state dict was saved before the network was converted, or is that of a
                network with another number of members.

        Example:
            >>> from mixmo_fastai.models.create import create_model
            >>> model, other = (create_model("wrn10_1", num_classes=10) for _ in range(2))
            >>> model.load_state_dict(other.state_dict())
            <All keys matched successfully>
        """
        loaded_names, model_names = state_dict.keys(), self.state_dict().keys()
        if args[0] if args else kwargs.get("strict", True):
            check_num_members(loaded_names, self.num_members)
        if (
            isinstance(self.core, BackboneCore)
            and not loaded_names & model_names
            and loaded_names & self.core.original_names(model_names)
        ):
            raise InputError(
                "These weights were saved before the network was converted to MixMo: they have no "
                "encoders and heads.\nLoad them into the original network or its Learner, then "
                "convert it: to_mixmo(learn.load(…))."
            )
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _mix(self, inputs: Tensor, masks: Tensor) -> Tensor:
        # One member at a time, so that the stacked features (B, M, D, h, w) are never in memory;
        # `mixing.mix_features` is the direct form. The factor M is applied to the masks because
        # they are smaller than the features.
        scaled = masks * self.num_members
        mixed: Tensor | None = None
        for i, encoder in enumerate(self.encoders):
            features = encoder(inputs[:, i])
            mask = _in_fast_layout(scaled[:, i], features)
            mixed = mask * features if mixed is None else torch.addcmul(mixed, mask, features)
        assert mixed is not None
        return mixed

    def _apply_core_and_heads(
        self, features: Tensor, image: Tensor, masks: Tensor | None = None
    ) -> Tensor:
        """Compute member logits (B, M, K) from features (B, D, h, w) of images (…, H, W)."""
        readout: nn.Module | None = getattr(self, "readout", None)  # not in pickles of 0.1.0
        if readout is None:
            embedding = run_core(self.core, features, image)
        else:
            num_features = getattr(self.heads[0], "in_features", None)
            embedding = embed(readout, self.core, features, masks, num_features)
        if embedding.ndim == 2 or readout is None:
            check_core_output(embedding, self.heads[0])
            logits = torch.stack([head(embedding) for head in self.heads], dim=1)
        else:  # (B, M, F), one embedding per head
            pairs = zip(self.heads, embedding.unbind(dim=1), strict=True)
            logits = torch.stack([head(head_embedding) for head, head_embedding in pairs], dim=1)
        # In half precision, the mean logits of different classes would often tie.
        return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _in_fast_layout(mask: Tensor, features: Tensor) -> Tensor:
    """Convert a mask (B, 1 or D, h, w) to the dtype of features (B, D, h, w).

    On a CPU, it takes nine times as long to multiply channels-last bfloat16 features by a mask of
    one channel as by one of all channels, so the mask is copied to all channels.
    """
    if features.device.type == "cpu" and features.dtype == torch.bfloat16:
        return torch.empty_like(features, requires_grad=False).copy_(mask)
    return mask.to(features.dtype)


def find_first_difference(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> str | None:
    """Return the name of the first tensor that differs, or None.

    A tensor differs if it is missing, unexpected, or has another shape or dtype.

    Example:
        >>> find_first_difference({"weight": torch.zeros(2)}, {"weight": torch.zeros(3)})
        'weight'
        >>> find_first_difference({"weight": torch.zeros(2)}, {"weight": torch.ones(2)}) is None
        True
    """
    expected_types, actual_types = (
        {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        for tensors in (expected, actual)
    )
    names = expected_types | actual_types
    return next((n for n in names if expected_types.get(n) != actual_types.get(n)), None)


def unwrap(model: nn.Module) -> Any:
    """Return the model inside the wrappers of distributed training and `torch.compile`.

    Example:
        >>> model = MixMoModel([nn.Conv2d(3, 8, 4)], nn.Flatten(), [nn.Linear(8, 10)])
        >>> unwrap(nn.DataParallel(model)) is model
        True
    """
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
            f"Cannot compute the output shape of encoder {name} for images of "
            f"{tuple(image.shape[1:])}: {reason}\n"
            "Masks need this shape: change the encoder so that it runs on the meta device."
        ) from error
    if len(shape) != 3:
        raise InputError(
            f"Encoder {name} returns (B, {', '.join(map(str, shape))}); expected feature maps "
            "(B, D, h, w) for the masks."
        )
    return shape


def _dry_run(encoder: nn.Module, image: Tensor) -> Tensor:
    """Run an encoder on the meta device without its hooks, since these may read values."""
    if type(encoder) is nn.Conv2d:  # not for subclasses, which may pad differently
        out: Tensor = encoder._conv_forward(image, encoder.weight.to("meta", image.dtype), None)
    else:
        out = copy.deepcopy(encoder).to("meta").forward(image)
    return out
