"""Calibration of logits by temperature or vector scaling, and whether it helps.

Shapes: N images, K classes. Logits are (N, K), labels (N,).
Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from mixmo_fastai.errors import InputError, unknown_name_error
from mixmo_fastai.metrics.calibration import check_logits
from mixmo_fastai.metrics.temperature import TEMPERATURE_BOUNDS, fit_temperature
from mixmo_fastai.rng import make_generator

NUM_FOLDS = 5
"""Parts of the calibration images for `cross_scaled`."""


@dataclass(frozen=True)
class Scaling:
    """Calibrated logits: scale · logits + bias.

    Attributes:
        method: a name in `METHODS`.
        scale: one number for all classes, or one per class.
        bias: one number per class; empty for none.

    Example:
        >>> Scaling("temperature", (0.5,))(torch.tensor([[2.0, 0.0]]))
        tensor([[1., 0.]])
    """

    method: str
    scale: tuple[float, ...]
    bias: tuple[float, ...] = ()

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "Scaling":
        """Build from the output of `dataclasses.asdict`, as read from JSON.

        Raises:
            ValueError: a number is not finite, or there is no scale.
            LookupError: a value is missing.

        Example:
            >>> Scaling.from_mapping({"method": "temperature", "scale": [0.5], "bias": []})
            Scaling(method='temperature', scale=(0.5,), bias=())
        """
        scale, bias = (tuple(map(float, values[key])) for key in ("scale", "bias"))
        if not all(map(math.isfinite, (*scale, *bias))) or not scale:
            raise ValueError("the scaling is not finite")
        return cls(str(values["method"]), scale, bias)

    @property
    def temperature(self) -> float | None:
        """The temperature; None for vector scaling."""
        return 1 / self.scale[0] if len(self.scale) == 1 else None

    def __call__(self, logits: Tensor) -> Tensor:
        """Scale logits (…, K)."""
        scaled = logits * logits.new_tensor(self.scale)
        return scaled + logits.new_tensor(self.bias) if self.bias else scaled


def ensemble_logits(member_logits: Tensor, scaling: Scaling | None) -> Tensor:
    """Return the mean of the members' logits, scaled: (N, M, K) -> (N, K) in float64.

    Args:
        member_logits: (N, M, K).
        scaling: None for none.

    Example:
        >>> members = torch.tensor([[[2.0, 0.0], [4.0, 2.0]]])
        >>> ensemble_logits(members, Scaling("temperature", (0.5,)))
        tensor([[1.5000, 0.5000]], dtype=torch.float64)
    """
    logits = member_logits.double().mean(dim=1)
    return logits if scaling is None else scaling(logits)


def temperature_scaling(logits: Tensor, labels: Tensor) -> Scaling:
    """Fit one temperature; see `fit_temperature`.

    Raises:
        InputError: invalid arguments, or no temperature is optimal.

    Example:
        >>> logits, labels = torch.tensor([[2.0, 0.0]]).expand(4, 2), torch.tensor([0, 0, 0, 1])
        >>> round(temperature_scaling(logits, labels).temperature, 4)
        1.8205
    """
    temperature = fit_temperature(logits, labels)
    if not TEMPERATURE_BOUNDS[0] < temperature < TEMPERATURE_BOUNDS[1]:
        raise InputError(
            "no temperature is optimal, since all calibration images are classified correctly, or "
            "the network is no better than chance"
        )
    return Scaling("temperature", (1 / temperature,))


def vector_scaling(logits: Tensor, labels: Tensor) -> Scaling:
    """Fit a scale and a bias per class, which minimise the NLL.

    The problem is convex; it is solved by L-BFGS in float64, starting from the temperature. The
    biases add up to zero. With few images per class it fits their noise.

    Raises:
        InputError: invalid arguments, or no scaling is optimal.

    Example:
        >>> logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat_interleave(4, dim=0)
        >>> labels = torch.tensor([0, 0, 0, 1, 0, 1, 0, 1])  # 3 of 4, and 2 of 4
        >>> vector_scaling(logits, labels)(logits[[0, 4]]).softmax(dim=1)[:, 0]
        tensor([0.7500, 0.5000])
    """
    start = temperature_scaling(logits, labels).scale
    values, targets = logits.detach().double().numpy(), labels.numpy()
    num_images, num_classes = values.shape
    is_target = np.eye(num_classes)[targets]

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        scale, bias = np.split(parameters, 2)
        scaled = values * scale + bias
        largest = scaled.max(axis=1, keepdims=True)
        log_sums = largest + np.log(np.exp(scaled - largest).sum(axis=1, keepdims=True))
        excess = (np.exp(scaled - log_sums) - is_target) / num_images
        nll = float((log_sums - scaled)[is_target.astype(bool)].mean())
        return nll, np.concatenate([(excess * values).sum(axis=0), excess.sum(axis=0)])

    first = np.concatenate([np.full(num_classes, start), np.zeros(num_classes)])
    found = minimize(loss, first, jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    scale, bias = np.split(found.x, 2)
    if not np.isfinite(found.x).all():
        raise InputError("no vector scaling is optimal; use more calibration images")
    return Scaling("vector", tuple(scale.tolist()), tuple((bias - bias.mean()).tolist()))


METHODS: dict[str, Callable[[Tensor, Tensor], Scaling]] = {
    "temperature": temperature_scaling,
    "vector": vector_scaling,
}
"""Calibration methods by name."""


def fit_scaling(logits: Tensor, labels: Tensor, method: str = "temperature") -> Scaling:
    """Fit a method of `METHODS`.

    Raises:
        InputError: an unknown method, invalid arguments, or no optimum.

    Example:
        >>> logits, labels = torch.tensor([[2.0, 0.0]]).expand(4, 2), torch.tensor([0, 0, 0, 1])
        >>> fit_scaling(logits, labels).method
        'temperature'
    """
    if method not in METHODS:
        raise unknown_name_error("calibration method", method, METHODS)
    check_logits(logits, labels)
    return METHODS[method](logits, labels)


def cross_scaled(logits: Tensor, labels: Tensor, method: str = "temperature") -> Tensor:
    """Scale each fifth of the logits by what was fitted on the other four.

    So the NLL of the result estimates that of new images, without further images. The fifths are
    random with about equal numbers of misclassified images, and the same for equal inputs.

    Args:
        logits: (N, K).
        labels: (N,).
        method: a name in `METHODS`.

    Returns:
        (N, K) in float64.

    Raises:
        InputError: as for `fit_scaling`.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 1] * 10)
        >>> cross_scaled(torch.tensor([[2.0, 0.0]]).expand(40, 2), labels).shape
        torch.Size([40, 2])
    """
    logits = logits.detach().double()
    order = torch.randperm(len(labels), generator=make_generator(0, "folds"))
    is_correct = (logits.argmax(dim=1) == labels)[order]
    order = torch.cat([order[is_correct], order[~is_correct]])
    scaled = torch.empty_like(logits)
    folds = [order[number::NUM_FOLDS] for number in range(NUM_FOLDS)]
    for number, fold in enumerate(folds):
        others = torch.cat([*folds[:number], *folds[number + 1 :]])
        try:
            scaling = fit_scaling(logits[others], labels[others], method)
        except InputError as error:
            raise InputError(f"{error} (in a part of the cross-validation)") from error
        scaled[fold] = scaling(logits[fold])
    return scaled
