"""The fast path of a device: precision, memory format, compilation, threads.

Chosen by the device, each part switchable in the recipe. Everything is in force within
`Acceleration.applied` alone, and is taken back however that ends, but for how a process on a CPU
keeps its memory.
"""

import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from mixmo_fastai.devices import float32_precision, keep_freed_memory, move_to_device
from mixmo_fastai.errors import InputError
from mixmo_fastai.flops import training_flops
from mixmo_fastai.models.mixmo_model import unwrap
from mixmo_fastai.recipe import Recipe

WORTH_COMPILING = 900.0
"""Seconds of training from which compiling, a minute or two, pays."""
THREADS_PER_PROCESSOR = 8
"""From here on more threads only get in each other's way."""
FASTEST_FLOPS, FASTEST_IMAGES = 500e12, 40_000.0
"""Operations and images per second that no GPU is known to exceed on such networks: the first
bounds wide networks, the second small ones, whose time goes into memory and many small kernels."""


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

    def move_to_device(self, model: nn.Module) -> nn.Module:
        """Move a network to the device, in its memory format."""
        return move_to_device(model, self.device, channels_last=self.channels_last)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Train a network this way; afterwards everything is as before.

        Args:
            model: a `MixMoModel`, wrapped or not.
        """
        with ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(float32_precision(tf32=self.tf32, autotune=True))
            else:
                keep_freed_memory()
            stack.enter_context(self.threaded())
            if self.autocast is not None or self.compiled or not self.channels_last:
                stack.enter_context(_forward(unwrap(model), self._wrapped))
            yield

    @contextmanager
    def threaded(self) -> Iterator[None]:
        """Use its threads alone, as for an evaluation, which is not rounded."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def describe(self) -> str:
        """Say it in words."""
        kinds = {torch.bfloat16: "bfloat16", None: "TF32" if self.tf32 else "float32"}
        parts = [kinds[self.autocast]]
        parts += ["channels last"] if self.channels_last else []
        parts += ["compiled"] if self.compiled else []
        parts += [f"{self.threads} thread{'s' * (self.threads > 1)}"] if self.threads else []
        return ", ".join(parts)

    def _wrapped(self, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Compile the pass of training, and compute either in the chosen precision and layout.

        Precision is entered and left within the pass, so that no error in between leaves it on.

        Args:
            plain: the pass, (network, inputs, masks) -> logits.
        """
        trained: Any = torch.compile(plain, dynamic=False) if self.compiled else plain

        def forward(network: nn.Module, inputs: Tensor, masks: Tensor | None = None) -> Tensor:
            if not self.channels_last:  # as loaders give them
                inputs = _member_by_member(inputs) if inputs.ndim == 5 else inputs.contiguous()
            if self.compiled and masks is not None:
                masks = masks.contiguous()  # masks of all kinds alike, so that one compilation does
            # Evaluation has batches of other shapes, each of which would be compiled anew.
            run = plain if masks is None else trained
            if self.autocast is None:  # the caller's own is left alone
                return run(network, inputs, masks)
            with torch.autocast(self.device.type, self.autocast):
                logits: Tensor = run(network, inputs, masks)
            return logits

        return forward


def choose_acceleration(
    recipe: Recipe,
    device: torch.device,
    model: nn.Module,
    image_shape: tuple[int, ...],
    num_images: int,
) -> Acceleration:
    """Decide what the recipe leaves to the device.

    On CUDA "auto" is bfloat16 where the GPU has it, else TF32 where it has that, channels last, and
    compiled where the training is long enough to pay for it and there is what compiling takes. On a
    CPU it is float32, channels last, not compiled.

    Args:
        recipe: its train.precision, train.memory_format, train.compile and train.threads count.
        device: where it is trained.
        model: the network.
        image_shape: (C, H, W).
        num_images: images that it will see.

    Raises:
        InputError: bfloat16 or TF32 is asked for where there is none, compilation where there is no
            compiler, or far more threads than there are processors.
    """
    train, cuda = recipe.train, device.type == "cuda"
    has_bfloat16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if train.precision == "bfloat16" and cuda and not has_bfloat16:
        raise InputError("precision 'bfloat16' needs a GPU that has it; use --precision float32.")
    has_tf32 = cuda and torch.cuda.get_device_capability(device) >= (8, 0)
    if train.precision == "tf32" and not has_tf32:
        raise InputError(
            "precision 'tf32' needs a CUDA device that has it; use --precision float32."
        )
    _check_host(train.threads, device, asked=train.compile == "on")
    bfloat16 = train.precision == "bfloat16" or (train.precision == "auto" and has_bfloat16)
    compiled = train.compile == "on"
    if train.compile == "auto" and cuda and _can_compile(device):
        flops = training_flops(model, image_shape, num_images)
        compiled = max(flops / FASTEST_FLOPS, num_images / FASTEST_IMAGES) >= WORTH_COMPILING
    return Acceleration(
        device,
        autocast=torch.bfloat16 if bfloat16 else None,
        tf32=has_tf32 and train.precision != "float32",
        channels_last=train.memory_format != "contiguous",
        compiled=compiled,
        threads=train.threads,
    )


def _check_host(threads: int, device: torch.device, *, asked: bool) -> None:
    if threads > THREADS_PER_PROCESSOR * (os.cpu_count() or 1):
        raise InputError(
            f"{threads} threads are far more than this machine has processors, {os.cpu_count()}.\n"
            "Take --threads 0 for torch's own choice."
        )
    if asked and not _has_compiler(device):
        raise InputError(
            "Compiling needs a C++ compiler, such as g++, and none was found.\n"
            "Install one, or leave --compile on out."
        )


def _has_compiler(device: torch.device) -> bool:
    """Tell whether there is what torch.compile calls: C for a GPU, as Triton does, else C++."""
    on_gpu = device.type == "cuda"
    names = (os.environ.get("CC"), "gcc", "clang") if on_gpu else (os.environ.get("CXX"), "g++")
    return any(name and shutil.which(name) for name in names)


def _can_compile(device: torch.device) -> bool:
    """Tell whether torch.compile finds what it needs for a GPU: as Triton looks for it."""
    has_headers = (Path(sysconfig.get_path("include")) / "Python.h").is_file()
    capable = torch.cuda.get_device_capability(device) >= (7, 0)
    return _has_compiler(device) and has_headers and capable and find_spec("triton") is not None


def _member_by_member(inputs: Tensor) -> Tensor:
    """Lay (B, M, C, H, W) out so that each member's batch (B, C, H, W) is contiguous."""
    return inputs.transpose(0, 1).contiguous().transpose(0, 1)


@contextmanager
def _forward(network: nn.Module, wrap: Callable[..., Callable[..., Tensor]]) -> Iterator[None]:
    """Give one network another forward pass for a while.

    It is a method, so that copies of the network run on their own weights.
    """
    attributes = vars(network)
    before = attributes.get("forward")
    if before is None:
        plain = type(network).forward
    else:  # somebody else's
        plain = getattr(before, "__func__", lambda _, *inputs: before(*inputs))
    attributes["forward"] = MethodType(wrap(plain), network)
    try:
        yield
    finally:
        if before is None:
            attributes.pop("forward", None)
        else:
            attributes["forward"] = before
