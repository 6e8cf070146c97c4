"""Devices: selection, float32 precision and memory settings."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixmo_fastai.errors import InputError


def choose_device(name: str) -> torch.device:
    """Turn "auto", "cpu" or "cuda" into a device.

    Raises:
        InputError: "cuda" was requested, but CUDA is not available.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device is 'cuda', but torch finds no CUDA device.\n"
            "Use --device cpu, or --device auto to use a GPU only if there is one."
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def describe_device(device: torch.device, threads: int = 0) -> str:
    """Return a readable name of a device, on a CPU with the number of threads; 0 for torch's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = threads or torch.get_num_threads()
    return f"{platform.processor() or platform.machine()}, {threads} threads"


def cpu_name() -> str:
    """Return the name of the CPU, such as "AMD EPYC 9654 96-Core Processor, family 25 model 17".

    Virtual machines may shorten the name of different generations to the same one.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not on Linux
        text = ""
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    first = {key.strip(): value.strip() for key, _, value in pairs}
    name = first.get("model name") or platform.processor() or platform.machine()
    generation = [first.get(key, "") for key in ("cpu family", "model")]
    return f"{name}, family {generation[0]} model {generation[1]}" if all(generation) else name


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Use a number of CPU threads in a with block; 0 for the present one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def move_to_device(
    model: nn.Module, device: torch.device, *, channels_last: bool = True
) -> nn.Module:
    """Move a network to its device; convolutions are faster in channels-last layout."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(device, memory_format=layout)  # type: ignore[call-overload]


@contextmanager
def float32_precision(*, tf32: bool, autotune: bool | None = None) -> Iterator[None]:
    """Set the precision of float32 products on a GPU for the duration of a with block.

    Args:
        tf32: whether matrix products and convolutions may be rounded to TF32; by default, torch
            allows it for convolutions only.
        autotune: whether cuDNN benchmarks its algorithms first; None keeps the current setting.
    """
    cudnn, backends = torch.backends.cudnn, _precision_backends()
    before = [backend.fp32_precision for backend in backends]
    legacy, benchmark = _legacy_precision(), cudnn.benchmark
    try:
        if legacy is None:
            for backend in backends:
                backend.fp32_precision = "tf32" if tf32 else "ieee"
        else:
            _set_legacy_precision("high" if tf32 else "highest", tf32)
        cudnn.benchmark = benchmark if autotune is None else autotune
        yield
    finally:
        cudnn.benchmark = benchmark
        if legacy is not None:
            _set_legacy_precision(*legacy)
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


def _precision_backends() -> list[Any]:
    """Return the backends that have an `fp32_precision` setting, as in newer versions of torch."""
    names = {
        torch.backends.cuda: ("matmul",),
        torch.backends.cudnn: ("conv", "rnn"),
        torch.backends.mkldnn: ("matmul", "conv", "rnn"),
    }
    backends = [getattr(module, name, None) for module in names for name in names[module]]
    return [backend for backend in backends if hasattr(backend, "fp32_precision")]


def _legacy_precision() -> tuple[str, bool] | None:
    """Return torch's older precision settings; None if the newer ones are in use.

    Torch raises an error if both kinds of settings were used.
    """
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


def _set_legacy_precision(matmul: str, convolutions: bool) -> None:
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = convolutions


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next batch.

    By default glibc returns blocks of a batch's size to the system immediately, and the next batch
    pays a page fault per 4 KiB: up to a quarter of the step time of a small network on a CPU. Peak
    memory grows by a few percent. The setting holds for the rest of the process. Without glibc,
    this is a no-op.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if set_option is None:
        return
    # Older versions accept thresholds up to 32 MiB only.
    if any(set_option(_M_MMAP_THRESHOLD, limit) == 1 for limit in (2**31 - 1, 32 * 2**20)):
        set_option(_M_TRIM_THRESHOLD, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # constants of glibc's malloc.h
