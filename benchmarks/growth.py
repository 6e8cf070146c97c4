"""Measure how time scales with members, batch size and test set, and the start-up time.

python benchmarks/growth.py [--arch wrn16_4] [--batch-size 64] [--device cuda] [--out FILE.json]
"""

import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from evaluation import random_logits
from measure import RATIO, SECONDS, format_rows, interleaved, paired_ratio, report, spreads
from steps import Setup, step_parser

from mixmo_fastai.evaluation.splits import evaluate_splits
from mixmo_fastai.runtime.devices import keep_freed_memory

MEMBERS, CLASSES = (1, 2, 3, 4), 100


def doublings(largest, count):
    """Return `count` sizes up to `largest`, each half of the next."""
    return [max(1, largest >> power) for power in reversed(range(count))]


def steps_by_members(setup):
    """Return a training step for each number of members."""
    return {f"a step, M={m}": setup.replace(num_members=m).steps() for m in MEMBERS}


def steps_by_batch(setup):
    """Return a training step for each batch size, up to twice the batch size of the setup."""
    sizes = doublings(2 * setup.batch_size, 4)
    return {f"a step, batch {size}": setup.replace(batch_size=size).steps() for size in sizes}


def evaluations(largest):
    """Return the evaluation of test sets of increasing size."""
    sizes = doublings(largest, 4)
    validation = random_logits(max(60, largest // 10), 2, CLASSES, 1)
    return {
        f"evaluation of {size:,} images": partial(
            evaluate_splits, validation, random_logits(size, 2, CLASSES, 0)
        )
        for size in sizes
    }


def startup_commands(folder):
    """Return whole commands, timed from the start of the process to its end."""
    number = iter(range(10**6))
    fit = ["fit", "digits", "--arch", "wrn10_1", "--epochs", "1", "--limit", "64", "--quiet"]

    def run(*words):
        subprocess.run(
            [sys.executable, "-m", "mixmo_fastai", *words], check=True, capture_output=True
        )

    return {
        "mixmo --help": partial(run, "--help"),
        "import mixmo_fastai.training.train": partial(
            subprocess.run, [sys.executable, "-c", "import mixmo_fastai.training.train"], check=True
        ),
        "mixmo fit, 64 images": lambda: run(*fit, "--out", str(folder / str(next(number)))),
    }


def ratios_to_first(seconds, names):
    """Return the ratio of each time to the first."""
    first, *others = names
    return {f"{name} / {first}": paired_ratio(seconds[name], seconds[first]) for name in others}


def main():
    parser = step_parser(__doc__, arch="wrn16_4", batch_size=64, repeats=7)
    parser.add_argument("--images", type=int, default=16_000, help="images of the largest test set")
    args = parser.parse_args()
    setup = Setup.from_arguments(args)
    keep_freed_memory()  # as training and `mixmo eval` do
    with TemporaryDirectory() as folder, torch.no_grad():
        groups = [evaluations(args.images), startup_commands(Path(folder))]
        seconds = [interleaved(group, args.repeats, warmup=1) for group in groups]
    groups = [steps_by_members(setup), steps_by_batch(setup), *groups]
    seconds = [*(interleaved(group, args.repeats) for group in groups[:2]), *seconds]
    times = {name: value for each in seconds for name, value in spreads(each).items()}
    ratios = {
        name: value
        for each, group in zip(seconds[:3], groups[:3], strict=True)
        for name, value in ratios_to_first(each, [*group]).items()
    }
    report(
        f"Scaling: {args.arch}, batch {args.batch_size}, {setup.acceleration.describe()}",
        format_rows(times, SECONDS) + format_rows(ratios, RATIO),
        {"seconds": times, "ratios": ratios},
        args.out,
    )


if __name__ == "__main__":
    main()
