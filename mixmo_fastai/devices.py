"""Where a network trains."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mixmo_fastai.errors import InputError


def choose_device(name: str) -> torch.device:
    """Turn "auto", "cpu" or "cuda" into a device.

    Raises:
        InputError: CUDA is asked for where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device is 'cuda', but torch finds no CUDA device here.\n"
            "Use --device cpu, or --device auto to take what there is."
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def describe_device(device: torch.device) -> str:
    """Name a device for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def place(model: nn.Module, device: torch.device, *, channels_last: bool = True) -> nn.Module:
    """Move a network to where it runs; convolutions are faster with the channels innermost."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(device, memory_format=layout)  # type: ignore[call-overload]


@contextmanager
def products(*, tf32: bool, autotune: bool | None = None) -> Iterator[None]:
    """Say, for a while, how a GPU multiplies float32.

    Args:
        tf32: whether products and convolutions may be rounded to TF32; torch's own default is that
            convolutions are.
        autotune: whether cuDNN tries its algorithms first; as it is where not given.
    """
    cudnn, precisions = torch.backends.cudnn, _precisions()
    before = [owner.fp32_precision for owner in precisions]
    legacy, benchmark = _legacy_precision(), cudnn.benchmark
    try:
        if legacy is None:
            for owner in precisions:
                owner.fp32_precision = "tf32" if tf32 else "ieee"
        else:
            _set_legacy_precision("high" if tf32 else "highest", tf32)
        cudnn.benchmark = benchmark if autotune is None else autotune
        yield
    finally:
        cudnn.benchmark = benchmark
        if legacy is not None:
            _set_legacy_precision(*legacy)
        for owner, value in zip(precisions, before, strict=True):
            owner.fp32_precision = value


def _precisions() -> list[Any]:
    """Give what has a precision of float32 of its own in newer versions of torch."""
    parts = {
        torch.backends.cuda: ("matmul",),
        torch.backends.cudnn: ("conv", "rnn"),
        torch.backends.mkldnn: ("matmul", "conv", "rnn"),
    }
    owners = [getattr(backend, name, None) for backend in parts for name in parts[backend]]
    return [owner for owner in owners if hasattr(owner, "fp32_precision")]


def _legacy_precision() -> tuple[str, bool] | None:
    """Tell the precision by torch's older settings; None where somebody uses the newer ones.

    Torch refuses to answer where both were used.
    """
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


def _set_legacy_precision(matmul: str, convolutions: bool) -> None:
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = convolutions


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next batch, where the process runs on it.

    By default it gives blocks of a batch's size back to the system at once, and the next batch pays
    a page fault for every 4 KiB again: up to a quarter of a step of a small network on a CPU. The
    process's peak grows by a few per cent. It holds for the rest of the process. Where there is no
    glibc, nothing happens.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if set_option is None:
        return
    # Older versions take no threshold above 32 MiB.
    if any(set_option(_M_MMAP_THRESHOLD, limit) == 1 for limit in (2**31 - 1, 32 * 2**20)):
        set_option(_M_TRIM_THRESHOLD, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
