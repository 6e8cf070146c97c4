"""Where a network trains."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

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
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        with cudnn.flags(
            enabled=cudnn.enabled,
            benchmark=cudnn.benchmark if autotune is None else autotune,
            deterministic=cudnn.deterministic,
            allow_tf32=tf32,
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next batch, where the process runs on it.

    By default it gives blocks of a batch's size back to the system at once, and the next batch pays
    a page fault for every 4 KiB again: up to a quarter of a step of a small network on a CPU. The
    peak stays what it was. It holds for the rest of the process. Where there is no glibc, nothing
    happens.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if set_option is None:
        return
    # Older versions take no threshold above 32 MiB.
    if any(set_option(_M_MMAP_THRESHOLD, limit) == 1 for limit in (2**31 - 1, 32 * 2**20)):
        set_option(_M_TRIM_THRESHOLD, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
