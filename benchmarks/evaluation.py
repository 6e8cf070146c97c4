"""Measure the time to evaluate a run from its logits: all metrics, and the bootstrap alone.

python benchmarks/evaluation.py [--images 10000] [--members 2] [--classes 100] [--out FILE.json]
"""

import argparse
from pathlib import Path

import torch
from measure import interleaved, report, spread

from mixmo_fastai.evaluation.splits import evaluate_splits
from mixmo_fastai.metrics.bootstrap import intervals
from mixmo_fastai.runtime.devices import keep_freed_memory


def random_logits(num_images, num_members, num_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    logits = torch.randn(num_images, num_members, num_classes, generator=generator)
    logits[torch.arange(num_images), :, labels] += 3
    return logits, labels


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    keep_freed_memory()  # as `mixmo eval` does
    test = random_logits(args.images, args.members, args.classes, 0)
    validation = random_logits(max(60, args.images // 10), args.members, args.classes, 1)
    mean = test[0].double().mean(dim=1)
    functions = {
        "all metrics, including the bootstrap": lambda: evaluate_splits(validation, test),
        "bootstrap of 1,000 resamples": lambda: intervals(mean, test[1]),
    }
    seconds = interleaved(functions, args.repeats, warmup=1)
    rows = [
        (name, "{median:.2f} s ({min:.2f} to {max:.2f})".format(**spread(values)))
        for name, values in seconds.items()
    ]
    report(
        f"Evaluation of {args.images:,} images x {args.members} members x {args.classes} classes; "
        "goals: under 2 s with the bootstrap, under 5 s for the bootstrap alone",
        rows,
        {"seconds": {name: spread(values) for name, values in seconds.items()}},
        args.out,
    )


if __name__ == "__main__":
    main()
