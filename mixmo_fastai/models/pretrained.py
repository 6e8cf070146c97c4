"""Read pretrained weights from a file: of a plain network, or of a MixMo network.

Shapes: M members of the new network, K classes.
"""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mixmo_fastai.errors import InputError, summarize_error
from mixmo_fastai.models.member_init import PERTURBATION, MemberInit
from mixmo_fastai.models.mixmo_model import MixMoModel

SAFETENSORS, PICKLED = ".safetensors", (".pth", ".pt", ".bin", ".ckpt")
_CONTAINERS = ("state_dict", "model", "model_state_dict")  # names under which files nest tensors
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of compiled networks

_FUSED_PARTS = {"encoder.": "encoders.0.", "core.": "core.", "head.": "heads.0."}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file by name; no code of the file is run.

    Args:
        path: a `.safetensors` file, or a file of `torch.save` with a dictionary of tensors, which
            may be nested under "state_dict", "model" or "model_state_dict".

    Raises:
        InputError: the file is missing, damaged, or holds something other than named tensors.

    Example:
        >>> read_weights(Path("nowhere.pth"))
        Traceback (most recent call last):
        mixmo_fastai.errors.InputError: There is no file of weights 'nowhere.pth'.
    """
    if not os.path.isfile(path):
        raise InputError(f"There is no file of weights {str(path)!r}.")
    try:
        if path.suffix.lower() == SAFETENSORS:
            return _named_tensors(load_file(path), path)
        if path.suffix.lower() not in PICKLED:
            kinds = ", ".join((SAFETENSORS, *PICKLED))
            raise InputError(f"{path} is not a file of weights.\nKnown suffixes: {kinds}.")
        # weights_only refuses everything but tensors and plain values.
        values = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # damaged files raise errors of many types
        reason, hint = summarize_error(error, max_length=200), ""
        if not isinstance(error, SafetensorError | OSError | MemoryError):
            reason = "it is damaged, incomplete, or was not written by torch.save"
            if "weights_only" in str(error) and "Unsupported operand" not in str(error):
                reason = "it holds Python objects, which are not loaded"
                hint = (
                    "\nSave only tensors: torch.save(model.state_dict(), FILE), or "
                    "learn.save(NAME, with_opt=False)."
                )
        raise InputError(f"The weights {path} cannot be read: {reason}.{hint}") from error
    return _named_tensors(values, path)


def _named_tensors(values: Any, path: Path) -> dict[str, Tensor]:
    """Find the dictionary of tensors, and remove the prefixes of wrappers from its names."""
    while isinstance(values, Mapping):
        nested = (values.get(name) for name in _CONTAINERS)
        inner = next((value for value in nested if isinstance(value, Mapping)), None)
        if inner is None:
            break
        values = inner
    if not isinstance(values, Mapping) or not values:
        raise InputError(
            f"{path} holds {type(values).__name__}, not tensors by name.\n"
            "Save them with torch.save(model.state_dict(), FILE)."
        )
    tensors = {str(name): value for name, value in values.items() if isinstance(value, Tensor)}
    if len(tensors) < len(values):
        other = next(str(name) for name in values if str(name) not in tensors)
        raise InputError(
            f"{path} holds {other!r}, which is not a tensor.\n"
            "Save only tensors: torch.save(model.state_dict(), FILE)."
        )
    while prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in tensors)), ""):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{path}: the weights {name} are not finite.")
    return tensors


@dataclass(frozen=True)
class SavedWeights:
    """The tensors of a file, and the networks into which they can be loaded.

    Attributes:
        tensors: tensors by name.
        path: their file, for messages.

    Example:
        >>> SavedWeights({"encoders.0.weight": torch.zeros(1)}, "model.safetensors").is_mixmo
        True
        >>> SavedWeights({"conv1.weight": torch.zeros(1)}, "resnet18.pth").is_mixmo
        False
    """

    tensors: Mapping[str, Tensor]
    path: Path | str

    @classmethod
    def read(cls, path: Path) -> "SavedWeights":
        """Read a file; see `read_weights`.

        The tensors of an exported network of `FusedNetwork`'s parts get the names of a `MixMoModel`
        with one member.

        Example:
            >>> SavedWeights.read(Path("weights.txt"))
            Traceback (most recent call last):
            mixmo_fastai.errors.InputError: There is no file of weights 'weights.txt'.
        """
        return cls(_with_member_names(read_weights(path)), path)

    @property
    def is_mixmo(self) -> bool:
        """Whether the tensors have the names of a `MixMoModel`."""
        return any(name.startswith("encoders.0.") for name in self.tensors)

    def load_backbone(self, network: nn.Module, last: str) -> bool:
        """Load the weights of a plain network, except for a last layer with other classes.

        Args:
            network: the network, changed in place.
            last: name of its last layer, whose tensors may be missing in the file.

        Returns:
            whether the last layer was loaded too.

        Raises:
            InputError: the tensors belong to another network; the message names the first
                difference.

        Example:
            >>> network = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 10))
            >>> trained = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 1000))
            >>> SavedWeights(trained.state_dict(), "trained.pth").load_backbone(network, "2")
            False
            >>> torch.equal(network[0].weight, trained[0].weight)
            True
        """
        tensors, expected = dict(self.tensors), network.state_dict()
        of_last = [name for name in expected if name.startswith(f"{last}.")]
        fits = all(
            name in tensors and tensors[name].shape == expected[name].shape for name in of_last
        )
        if not fits:
            for name in of_last:
                tensors.pop(name, None)
                expected.pop(name)
        self._check_same(tensors, expected)
        network.load_state_dict(tensors, strict=False)
        return fits

    @torch.no_grad()
    def load_mixmo(
        self,
        model: MixMoModel,
        generator: torch.Generator | None = None,
        perturbation: float = PERTURBATION,
    ) -> None:
        """Load the weights of another `MixMoModel` with the same core.

        With the same number of members, encoders and heads are loaded unchanged. Otherwise the
        other network's encoders are summed and its heads averaged, as by `MixMoModel.fuse`, and
        divided among the members as by `convert_to_mixmo`; the outputs stay the same. Heads for
        other classes keep their initialisation.

        Args:
            model: the network, changed in place.
            generator: for the perturbations of `convert_to_mixmo`.
            perturbation: their size, if the number of members differs.

        Raises:
            InputError: the tensors belong to another network; the message names the first
                difference.

        Example:
            >>> from mixmo_fastai.models import create_model
            >>> trained, model = create_model("wrn10_1", 4, 2), create_model("wrn10_1", 4, 3)
            >>> SavedWeights(trained.state_dict(), "model.safetensors").load_mixmo(model)
            >>> images = torch.randn(2, 3, 8, 8)
            >>> outputs = [each.eval()(images) for each in (trained, model)]
            >>> torch.allclose(*outputs, atol=1e-5)
            True
        """
        core = _without_ends(self.tensors)
        self._check_same(core, _without_ends(model.state_dict()))
        encoders, heads = (_layers(self.tensors, kind) for kind in ("encoders", "heads"))
        shapes = [_shape(layers) for layers in (encoders, heads)]
        expected = [_shape([part[0].state_dict()]) for part in (model.encoders, model.heads)]
        has_other_classes = shapes[1][1:] == expected[1][1:] != () and shapes[1] != expected[1]
        for kind, found, needed in zip(("encoders", "heads"), shapes, expected, strict=True):
            if found != needed and not (kind == "heads" and has_other_classes):
                raise self._refuse(f"its {kind} have shape {found}, not {needed}")
        init = MemberInit(model.num_members, perturbation)
        model.load_state_dict(core, strict=False)
        if len(encoders) != model.num_members:
            whole = _merged(model.encoders[0], encoders, torch.sum)
            encoders = [layer.state_dict() for layer in init.make_encoders(whole, generator)]
        if len(heads) != model.num_members and not has_other_classes:
            whole = _merged(model.heads[0], heads, torch.mean)
            heads = [layer.state_dict() for layer in init.make_heads(whole, generator)]
        for layer, values in zip(model.encoders, encoders, strict=True):
            layer.load_state_dict(values)
        if not has_other_classes:
            for layer, values in zip(model.heads, heads, strict=True):
                layer.load_state_dict(values)

    def _check_same(self, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        """Check that tensors have the names and shapes of a network's."""
        names = [name for name in expected if not name.endswith("num_batches_tracked")]
        if missing := [name for name in names if name not in tensors]:
            found = next((f", but {name}" for name in tensors if name not in expected), "")
            raise self._refuse(f"it has no {missing[0]}{found}")
        if unknown := [name for name in tensors if name not in expected]:
            raise self._refuse(f"the network has no {unknown[0]}")
        for name in names:
            if tensors[name].shape != expected[name].shape:
                shapes = [tuple(part[name].shape) for part in (tensors, expected)]
                raise self._refuse(f"{name} has shape {shapes[0]}, not {shapes[1]}")

    def check_mixmo(self, arch: str) -> None:
        """Check that the tensors have the names of a `MixMoModel`.

        Raises:
            InputError: they are those of a plain network, which `arch` does not have.

        Example:
            >>> SavedWeights({"fc.weight": torch.zeros(1)}, "other.pth").check_mixmo("wrn10_1")
            Traceback (most recent call last):
            mixmo_fastai.errors.InputError: The weights other.pth do not belong to wrn10_1.
            Pass the model.safetensors of a run that trained this network, or its export.
        """
        if not self.is_mixmo:
            raise InputError(
                f"The weights {self.path} do not belong to {arch}.\n"
                "Pass the model.safetensors of a run that trained this network, or its export."
            )

    def _refuse(self, difference: str) -> InputError:
        return InputError(f"The weights {self.path} belong to another network: {difference}.")


def _with_member_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a `FusedNetwork` to those of a `MixMoModel` with one member."""
    if not all(name.startswith(tuple(_FUSED_PARTS)) for name in tensors):
        return tensors
    parts = ((name.partition("."), tensor) for name, tensor in tensors.items())
    return {_FUSED_PARTS[f"{part}."] + rest: tensor for (part, _, rest), tensor in parts}


def _without_ends(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that belong neither to encoders nor to heads."""
    return {n: t for n, t in tensors.items() if not n.startswith(("encoders.", "heads."))}


def _layers(tensors: Mapping[str, Tensor], kind: str) -> list[dict[str, Tensor]]:
    """Return the tensors of each encoder or each head, by their names in the layer."""
    found: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        prefix, _, rest = full_name.partition(".")
        number, _, name = rest.partition(".")
        if prefix == kind and number.isdigit():
            found.setdefault(int(number), {})[name] = tensor
    return [found[number] for number in sorted(found)]


def _shape(layers: Sequence[Mapping[str, Tensor]]) -> tuple[int, ...]:
    """Return the shape of the weight of the first of several equal layers."""
    return tuple(layers[0]["weight"].shape) if layers and "weight" in layers[0] else ()


def _merged(
    layer: nn.Module, layers: Sequence[Mapping[str, Tensor]], reduce: Callable[..., Tensor]
) -> nn.Module:
    """Return a copy of a layer with the sum or the mean of the tensors of several."""
    merged = copy.deepcopy(layer)
    merged.load_state_dict(
        {name: reduce(torch.stack([each[name] for each in layers]), 0) for name in layers[0]}
    )
    return merged
