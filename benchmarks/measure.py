"""Timing that is robust on a noisy machine: interleaved repetitions, medians and spreads."""

import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

# Before the imports that print and warn: torch's profiler, and torch.jit in fastai.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")
warnings.filterwarnings("ignore", r".torch\.jit\.\w+. is deprecated")

import fastai  # noqa: E402
import torch  # noqa: E402

from mixmo_fastai.runtime.devices import cpu_name  # noqa: E402

Seconds = list[float]
SECONDS = "{median:.3f} s ({min:.3f} to {max:.3f})"
RATIO = "{median:.3f} ({min:.3f} to {max:.3f})"


def interleaved(
    functions: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2, pause: float = 0
) -> dict[str, Seconds]:
    """Time each function once per round, so that slow periods affect all functions equally.

    A pause in seconds before each function lets processes of the previous function finish.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds: dict[str, Seconds] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            _finish_queue()
            time.sleep(pause)
            start = time.perf_counter()
            function()
            _finish_queue()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _finish_queue() -> None:
    """Wait for the GPU; otherwise only the time to launch its kernels would be measured."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def spread(values: Seconds) -> dict[str, float]:
    """Return minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def spreads(values: Mapping[str, Seconds]) -> dict[str, dict[str, float]]:
    """Return the spread of each entry."""
    return {name: spread(each) for name, each in values.items()}


def format_rows(spreads: Mapping[str, dict[str, float]], template: str) -> list[tuple[str, str]]:
    """Format each spread as a row of name and text."""
    return [(name, template.format(**values)) for name, values in spreads.items()]


def paired_ratio(numerator: Seconds, denominator: Seconds) -> dict[str, float]:
    """Return the spread of the ratios, computed per round."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def machine() -> dict[str, object]:
    """Return the hardware and versions used for the measurements."""
    return {
        "processor": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
        "cuda": torch.version.cuda if torch.cuda.is_initialized() else None,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_initialized() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastai": fastai.__version__,
    }


def report(title: str, rows: list[tuple[str, str]], results: dict[str, object], out: Path | None):
    """Print a table, and write the results as JSON if `out` is given."""
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, text in rows:
        print(f"  {name:<{width}}  {text}")
    environment = machine()
    print("  on " + ", ".join(f"{key} {value}" for key, value in environment.items() if value))
    if out is not None:
        out.write_text(json.dumps({"machine": environment, **results}, indent=2) + "\n")
