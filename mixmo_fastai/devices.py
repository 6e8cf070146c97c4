"""Where a network trains."""

import ctypes
import os
import platform

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


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to where it trains, in the memory format that is fastest there."""
    # Convolutions are faster with the channels innermost, on a CPU as on a GPU.
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next batch, where the process runs on it.

    By default it gives blocks of a batch's size back to the system at once, and the next batch pays
    a page fault for every 4 KiB again: up to a quarter of a step of a small network on a CPU. The
    peak stays what it was. Where there is no glibc, nothing happens.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if set_option is not None:
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            set_option(option, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
