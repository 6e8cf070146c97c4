"""The fast path of a device: precision, memory format, compilation, threads.

Chosen by the device, each part switchable in the recipe. Everything is in force within
`Acceleration.applied` alone, and is taken back however that ends.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixmo_fastai.devices import keep_freed_memory
from mixmo_fastai.errors import InputError
from mixmo_fastai.flops import training_flops
from mixmo_fastai.models.mixmo_model import unwrap
from mixmo_fastai.recipe import Recipe

WORTH_COMPILING = 4e17
"""Operations of a training from which compiling, a minute or two, pays: a quarter of an hour at 440
TFLOP/s, a rate that no GPU is known to exceed on such networks."""


@dataclass(frozen=True)
class Acceleration:
    """How a network is trained on a device.

    Attributes:
        device: where.
        autocast: the type that matrix products and convolutions are computed in; None for that of
            the weights.
        tf32: whether products of float32 may be rounded to TF32, on GPUs that have it.
        channels_last: whether weights, and what follows from them, lie channels last.
        compiled: whether the training pass is compiled.
        threads: of a CPU; 0 for torch's own choice.
    """

    device: torch.device
    autocast: torch.dtype | None = None
    tf32: bool = False
    channels_last: bool = True
    compiled: bool = False
    threads: int = 0

    def place(self, model: nn.Module) -> nn.Module:
        """Move a network to the device, in its memory format."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return model.to(self.device, memory_format=layout)  # type: ignore[call-overload]

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Train a network this way; afterwards everything is as before.

        Args:
            model: a `MixMoModel`, wrapped or not.
        """
        with ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(_fast_float32(self.tf32))
            else:
                keep_freed_memory()
            if self.threads:
                stack.enter_context(_threads(self.threads))
            if self.autocast is not None or self.compiled:
                stack.enter_context(_forward(unwrap(model), self._wrapped))
            yield

    def describe(self) -> str:
        """Say it in words."""
        kinds = {torch.bfloat16: "bfloat16", None: "TF32" if self.tf32 else "float32"}
        parts = [kinds[self.autocast]]
        parts += ["channels last"] if self.channels_last else []
        parts += ["compiled"] if self.compiled else []
        parts += [f"{self.threads} threads"] if self.threads else []
        return ", ".join(parts)

    def _wrapped(self, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Compile the pass of training, and compute either in the chosen precision.

        Precision is entered and left within the pass, so that no error in between leaves it on; the
        loss is computed in float32.
        """
        trained: Any = torch.compile(plain, dynamic=False) if self.compiled else plain

        def forward(inputs: Tensor, masks: Tensor | None = None) -> Tensor:
            # Evaluation has batches of other shapes, each of which would be compiled anew.
            run = plain if masks is None else trained
            with torch.autocast(self.device.type, self.autocast, self.autocast is not None):
                logits: Tensor = run(inputs, masks)
            return logits.float() if self.autocast is not None else logits

        return forward


def choose_acceleration(
    recipe: Recipe,
    device: torch.device,
    model: nn.Module,
    image_shape: tuple[int, ...],
    num_images: int,
) -> Acceleration:
    """Decide what the recipe leaves to the device.

    On CUDA "auto" is bfloat16 where the GPU has it, else TF32, channels last, and compiled where
    the training is long enough to pay for it. On a CPU it is float32, channels last, not compiled.

    Args:
        recipe: its train.precision, train.memory_format, train.compile and train.threads count.
        device: where it is trained.
        model: the network.
        image_shape: (C, H, W).
        num_images: images that it will see.

    Raises:
        InputError: bfloat16 is asked for on a GPU without it, or TF32 on a CPU.
    """
    train, cuda = recipe.train, device.type == "cuda"
    has_bfloat16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if train.precision == "bfloat16" and cuda and not has_bfloat16:
        raise InputError(
            "precision 'bfloat16' needs a GPU that has it; use --precision tf32 or float32."
        )
    if train.precision == "tf32" and not cuda:
        raise InputError("precision 'tf32' needs a CUDA device; use --precision float32.")
    bfloat16 = train.precision == "bfloat16" or (train.precision == "auto" and has_bfloat16)
    compiled = train.compile == "on"
    if train.compile == "auto" and cuda:
        compiled = training_flops(model, image_shape, num_images) >= WORTH_COMPILING
    return Acceleration(
        device,
        autocast=torch.bfloat16 if bfloat16 else None,
        tf32=cuda and train.precision != "float32",
        channels_last=train.memory_format != "contiguous",
        compiled=compiled,
        threads=train.threads,
    )


@contextmanager
def _forward(network: nn.Module, wrap: Callable[..., Callable[..., Tensor]]) -> Iterator[None]:
    """Give one network another forward pass for a while."""
    network.forward = wrap(network.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del network.forward  # what hid the class's own


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _fast_float32(tf32: bool) -> Iterator[None]:
    """Let cuDNN try its algorithms, and say whether float32 may be rounded in products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    cudnn = torch.backends.cudnn
    try:
        with cudnn.flags(
            enabled=True, benchmark=True, deterministic=cudnn.deterministic, allow_tf32=tf32
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
