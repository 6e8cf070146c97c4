"""Timing that survives a noisy machine: interleaved repetitions, medians and their spread."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import fastai
import torch

Seconds = list[float]
SECONDS = "{median:.3f} s ({min:.3f} to {max:.3f})"
RATIO = "{median:.3f} ({min:.3f} to {max:.3f})"


def interleaved(
    subjects: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2, pause: float = 0
) -> dict[str, Seconds]:
    """Time each subject once per round, so that a slow minute hits all of them alike.

    A pause of some seconds before each lets processes of the one before come to rest.
    """
    for _ in range(warmup):
        for subject in subjects.values():
            subject()
    seconds: dict[str, Seconds] = {name: [] for name in subjects}
    for _ in range(repeats):
        for name, subject in subjects.items():
            _finish_queue()
            time.sleep(pause)
            began = time.perf_counter()
            subject()
            _finish_queue()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def _finish_queue() -> None:
    """A GPU runs behind the program; a time without waiting for it is that of the program alone."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def spread(values: Seconds) -> dict[str, float]:
    """Give minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def spreads(values: Mapping[str, Seconds]) -> dict[str, dict[str, float]]:
    """Give the spread of each."""
    return {name: spread(each) for name, each in values.items()}


def rows_of(figures: Mapping[str, dict[str, float]], form: str) -> list[tuple[str, str]]:
    """Put spreads into words, one row each."""
    return [(name, form.format(**figure)) for name, figure in figures.items()]


def paired_ratio(numerator: Seconds, denominator: Seconds) -> dict[str, float]:
    """Give the spread of the ratios, round by round."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def machine() -> dict[str, object]:
    """Name what the figures were measured on."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
        "cuda": torch.version.cuda if torch.cuda.is_initialized() else None,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_initialized() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastai": fastai.__version__,
    }


def report(title: str, rows: list[tuple[str, str]], figures: dict[str, object], out: Path | None):
    """Print a table, and write the figures as JSON where asked for."""
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, text in rows:
        print(f"  {name:<{width}}  {text}")
    about = machine()
    print("  on " + ", ".join(f"{key} {value}" for key, value in about.items() if value))
    if out is not None:
        out.write_text(json.dumps({"machine": about, **figures}, indent=2) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
