"""Acceleration of training: precision, memory format, compilation, threads.

The device sets the defaults; the recipe can override each of them. All settings are active only
within `Acceleration.applied` and restored afterwards, except the memory allocator settings of a
process on a CPU.
"""

import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.errors import InputError
from mixmo_fastai.models.flops import UNCOUNTABLE, training_flops
from mixmo_fastai.models.mixmo_model import unwrap
from mixmo_fastai.runtime.cpus import CpuLimit, available_threads
from mixmo_fastai.runtime.devices import (
    float32_precision,
    keep_freed_memory,
    move_to_device,
    use_threads,
)

MIN_COMPILED_SECONDS = 900.0
"""Training time in seconds from which compilation, which takes one or two minutes, pays off."""
MAX_THREADS_PER_PROCESSOR = 8
"""Threads per processor that are accepted; more threads only slow each other down."""
TORCH = "torch's default"
"""Reason of `thread_limit` if torch limits the number of threads."""
MAX_FLOPS, MAX_IMAGES_PER_SECOND = 500e12, 40_000.0
"""Upper bounds of any known GPU on these networks, per second: operations bound wide networks,
images bound small networks, which are limited by memory and by many small kernels."""


@dataclass(frozen=True)
class Acceleration:
    """Settings that make training fast on a device.

    Attributes:
        device: the device.
        autocast: dtype of matrix products and convolutions; None for the dtype of the weights.
        tf32: whether float32 products may be rounded to TF32, on GPUs that support it.
        channels_last: whether weights and activations use the channels-last memory format.
        compiled: whether the forward pass of training is compiled.
        threads: number of CPU threads; 0 for torch's default.
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
        """Apply the settings to a network in a with block, and restore everything afterwards.

        Args:
            model: a `MixMoModel`, possibly wrapped, as by DistributedDataParallel.
        """
        with ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(float32_precision(tf32=self.tf32, autotune=True))
            else:
                keep_freed_memory()
            stack.enter_context(self.threaded())
            if self.autocast is not None or self.compiled or not self.channels_last:
                stack.enter_context(_replaced_forward(unwrap(model), self._accelerate))
            yield

    def threaded(self) -> AbstractContextManager[None]:
        """Apply the number of threads only, as for evaluation, which runs in full precision."""
        return use_threads(self.threads)

    def describe(self) -> str:
        """Return a readable description."""
        kinds = {torch.bfloat16: "bfloat16", None: "TF32" if self.tf32 else "float32"}
        parts = [kinds[self.autocast]]
        parts += ["channels last"] if self.channels_last else []
        parts += ["compiled"] if self.compiled else []
        parts += [f"{self.threads} thread{'s' * (self.threads > 1)}"] if self.threads else []
        return ", ".join(parts)

    def _accelerate(self, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Wrap a forward pass: compile it for training, set precision and memory format.

        Autocast is entered and left within the pass, so that no error can leave it on.

        Args:
            plain: the forward pass, `MixMoModel.forward`.
        """
        training_forward: Any = torch.compile(plain, dynamic=False) if self.compiled else plain

        def forward(
            network: nn.Module, inputs: Tensor, masks: Tensor | None = None, *more: Any
        ) -> Tensor:
            if not self.channels_last:  # loaders return channels-last batches
                inputs = _member_by_member(inputs) if inputs.ndim == 5 else inputs.contiguous()
            if self.compiled and masks is not None:
                masks = masks.contiguous()  # the same strides for all kinds, so it compiles once
            # Evaluation batches have other shapes, each of which would be compiled again.
            run = plain if masks is None else training_forward
            if self.autocast is None:  # keep the caller's autocast setting
                return run(network, inputs, masks, *more)
            with torch.autocast(self.device.type, self.autocast):
                logits: Tensor = run(network, inputs, masks, *more)
            return logits

        return forward


def choose_acceleration(
    recipe: Recipe,
    device: torch.device,
    model: nn.Module,
    image_shape: tuple[int, ...],
    num_images: int,
) -> Acceleration:
    """Resolve the "auto" settings of a recipe for a device.

    On CUDA, "auto" selects bfloat16 if the GPU supports it, otherwise TF32 if supported; channels
    last; and compilation if training is long enough and a compiler, Python's headers and Triton are
    installed. On a CPU it selects float32, channels last and no compilation; `choose_precision`
    of `training/precision.py` replaces "auto" before, if it measures the precisions.

    Args:
        recipe: `train.precision`, `train.memory_format`, `train.compile` and `train.threads` are
            used; threads "auto" are all that `thread_limit` allows.
        device: the device of training.
        model: the network.
        image_shape: (C, H, W).
        num_images: number of images that the network will see in training.

    Raises:
        InputError: the device does not support the requested bfloat16 or TF32, compilation was
            requested without a compiler, or there are far more threads than processors.
    """
    train, cuda = recipe.train, device.type == "cuda"
    has_bfloat16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if train.precision == "bfloat16" and cuda and not has_bfloat16:
        raise InputError(
            "precision 'bfloat16' needs a GPU that supports it; use --precision float32."
        )
    has_tf32 = cuda and torch.cuda.get_device_capability(device) >= (8, 0)
    if train.precision == "tf32" and not has_tf32:
        raise InputError(
            "precision 'tf32' needs a CUDA device that supports it; use --precision float32."
        )
    threads = thread_limit().count if isinstance(train.threads, str) else train.threads
    _check_host(threads, device, must_compile=train.compile == "on")
    bfloat16 = train.precision == "bfloat16" or (train.precision == "auto" and has_bfloat16)
    compiled = train.compile == "on"
    if train.compile == "auto" and cuda and _can_compile(device):
        try:
            flops = training_flops(model, image_shape, num_images)
        except UNCOUNTABLE:  # then only the number of images decides
            flops = 0.0
        compiled = (
            max(flops / MAX_FLOPS, num_images / MAX_IMAGES_PER_SECOND) >= MIN_COMPILED_SECONDS
        )
    return Acceleration(
        device,
        autocast=torch.bfloat16 if bfloat16 else None,
        tf32=has_tf32 and train.precision != "float32",
        channels_last=train.memory_format != "contiguous",
        compiled=compiled,
        threads=threads,
    )


def thread_limit() -> CpuLimit:
    """Return `available_threads`, or torch's number of threads if that is smaller.

    The latter is the number of physical cores, unless a program has changed it.
    """
    limit, own = available_threads(), torch.get_num_threads()
    return CpuLimit(own, TORCH) if own < limit.count else limit


def _check_host(threads: int, device: torch.device, *, must_compile: bool) -> None:
    if threads > MAX_THREADS_PER_PROCESSOR * (os.cpu_count() or 1):
        raise InputError(
            f"{threads} threads are too many for this machine with {os.cpu_count()} processors.\n"
            "Use --threads auto."
        )
    if must_compile and not _has_compiler(device):
        raise InputError(
            "--compile on needs a C++ compiler, such as g++, and none was found.\n"
            "Install a compiler, or remove --compile on."
        )


def _has_compiler(device: torch.device) -> bool:
    """Check for the compiler that torch.compile uses: C for a GPU (Triton), otherwise C++."""
    on_gpu = device.type == "cuda"
    names = (os.environ.get("CC"), "gcc", "clang") if on_gpu else (os.environ.get("CXX"), "g++")
    return any(name and shutil.which(name) for name in names)


def _can_compile(device: torch.device) -> bool:
    """Check the requirements of torch.compile on a GPU: compiler, Python headers and Triton."""
    has_headers = (Path(sysconfig.get_path("include")) / "Python.h").is_file()
    capable = torch.cuda.get_device_capability(device) >= (7, 0)
    return _has_compiler(device) and has_headers and capable and find_spec("triton") is not None


def _member_by_member(inputs: Tensor) -> Tensor:
    """Lay out (B, M, C, H, W) so that the batch (B, C, H, W) of each member is contiguous."""
    return inputs.transpose(0, 1).contiguous().transpose(0, 1)


@contextmanager
def _replaced_forward(
    network: nn.Module, wrap: Callable[..., Callable[..., Tensor]]
) -> Iterator[None]:
    """Replace the forward pass of one network in a with block.

    The replacement is a bound method, so that copies of the network use their own weights.
    """
    attributes = vars(network)
    before = attributes.get("forward")
    if before is None:
        plain = type(network).forward
    else:  # already replaced by other code
        plain = getattr(before, "__func__", lambda _, *inputs: before(*inputs))
    attributes["forward"] = MethodType(wrap(plain), network)
    try:
        yield
    finally:
        if before is None:
            attributes.pop("forward", None)
        else:
            attributes["forward"] = before
