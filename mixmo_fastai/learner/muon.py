"""Muon: momentum whose update is orthogonalised, for convolutions and linear layers.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. A
convolution's weight (out, in, kh, kw) is treated as a matrix (out, in · kh · kw). torch.optim.Muon
accepts matrices only, and torch before 2.9 has no Muon.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration, chosen by the authors for a steep slope at zero."""
NUM_ITERATIONS = 5
ADAM_BETAS, ADAM_EPS = (0.9, 0.95), 1e-8


def orthogonalize(matrix: Tensor) -> Tensor:
    """Map a matrix approximately to the nearest semi-orthogonal one: U S Vᵀ -> about U Vᵀ.

    Args:
        matrix: (rows, columns).

    Returns:
        (rows, columns), with singular values between about 0.7 and 1.2.
    """
    a, b, c = COEFFICIENTS
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Muon for weights of two or more dimensions, Adam for biases and normalisation layers.

    Weight decay is decoupled, as in AdamW, and applies to all parameters.

    Args:
        params: parameters or groups.
        lr: learning rate of the orthogonalised updates.
        momentum: momentum of the updates, in Nesterov's form.
        weight_decay: decoupled weight decay.
        adam_ratio: learning rate of Adam, as a multiple of `lr`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        adam_ratio: float = 0.15,
    ) -> None:
        for name, value in {
            "lr": lr,
            "weight_decay": weight_decay,
            "adam_ratio": adam_ratio,
        }.items():
            if not value >= 0:
                raise ValueError(f"{name} must be 0 or more; got {value!r}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1; got {momentum!r}")
        settings = {"momentum": momentum, "weight_decay": weight_decay, "adam_ratio": adam_ratio}
        super().__init__(params, {"lr": lr, **settings})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        lr = group["lr"]
        parameter.mul_(1 - lr * group["weight_decay"])
        if parameter.ndim >= 2:
            parameter.sub_(
                self._orthogonal_update(parameter, gradient, group["momentum"]), alpha=lr
            )
        else:
            parameter.sub_(self._adam_update(parameter, gradient), alpha=lr * group["adam_ratio"])

    def _orthogonal_update(self, parameter: Tensor, gradient: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        nesterov = gradient.lerp(buffer, momentum)
        matrix = nesterov.reshape(len(nesterov), -1)
        scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
        return scale * orthogonalize(matrix).reshape(parameter.shape)

    def _adam_update(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        state, (beta1, beta2) = self.state[parameter], ADAM_BETAS
        if "step" not in state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        step = float(state["step"])
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1) / (1 - beta1**step)
        square = state["exp_avg_sq"].lerp_(gradient.square(), 1 - beta2) / (1 - beta2**step)
        return mean / (square.sqrt() + ADAM_EPS)
