"""How time grows: with members, with the batch, with the test set; and what a start costs.

python benchmarks/growth.py [--arch wrn16_4] [--batch-size 64] [--device cuda] [--out FILE.json]
"""

import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from evaluation import draw
from measure import RATIO, SECONDS, interleaved, paired_ratio, report, rows_of, spreads
from steps import Setup, parser_of_steps

from mixmo_fastai.devices import keep_freed_memory
from mixmo_fastai.evaluation import evaluate_splits

MEMBERS, CLASSES = (1, 2, 3, 4), 100


def doublings(largest, count):
    """Give so many sizes, each half of the next."""
    return [max(1, largest >> power) for power in reversed(range(count))]


def steps_by_members(setup):
    """One step with each number of members."""
    return {f"a step, M={m}": setup.but(num_members=m).steps() for m in MEMBERS}


def steps_by_batch(setup):
    """One step with each size of the batch, up to twice the given one."""
    sizes = doublings(2 * setup.batch_size, 4)
    return {f"a step, batch {size}": setup.but(batch_size=size).steps() for size in sizes}


def evaluations(largest):
    """Every figure of test sets of growing size."""
    sizes = doublings(largest, 4)
    validation = draw(max(60, largest // 10), 2, CLASSES, 1)
    return {
        f"evaluation of {size:,} images": partial(
            evaluate_splits, validation, draw(size, 2, CLASSES, 0)
        )
        for size in sizes
    }


def starts(folder):
    """Whole commands, from the process's start to its end."""
    number = iter(range(10**6))
    fit = ["fit", "digits", "--arch", "wrn10_1", "--epochs", "1", "--limit", "64", "--quiet"]

    def run(*words):
        subprocess.run(
            [sys.executable, "-m", "mixmo_fastai", *words], check=True, capture_output=True
        )

    return {
        "mixmo --help": partial(run, "--help"),
        "import mixmo_fastai.training": partial(
            subprocess.run, [sys.executable, "-c", "import mixmo_fastai.training"], check=True
        ),
        "mixmo fit, 64 images": lambda: run(*fit, "--out", str(folder / str(next(number)))),
    }


def ratios_within(seconds, names):
    """Compare each with the first."""
    first, *others = names
    return {f"{name} / {first}": paired_ratio(seconds[name], seconds[first]) for name in others}


def main():
    parser = parser_of_steps(__doc__, arch="wrn16_4", batch_size=64, repeats=7)
    parser.add_argument("--images", type=int, default=16_000, help="of the largest test set")
    args = parser.parse_args()
    setup = Setup.from_arguments(args)
    keep_freed_memory()  # as training and `mixmo eval` do
    with TemporaryDirectory() as folder, torch.no_grad():
        groups = [evaluations(args.images), starts(Path(folder))]
        warmup = int(args.repeats > 1)
        seconds = [interleaved(group, args.repeats, warmup=warmup) for group in groups]
    groups = [steps_by_members(setup), steps_by_batch(setup), *groups]
    seconds = [*(interleaved(group, args.repeats) for group in groups[:2]), *seconds]
    times = {name: value for each in seconds for name, value in spreads(each).items()}
    ratios = {
        name: value
        for each, group in zip(seconds[:3], groups[:3], strict=True)
        for name, value in ratios_within(each, [*group]).items()
    }
    report(
        f"Growth: {args.arch}, batch {args.batch_size}, {setup.path.describe()}",
        rows_of(times, SECONDS) + rows_of(ratios, RATIO),
        {"seconds": times, "ratios": ratios},
        args.out,
    )


if __name__ == "__main__":
    main()
