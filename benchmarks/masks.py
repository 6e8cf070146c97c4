"""Compare the time to draw the masks of a batch with a training step on that batch.

python benchmarks/masks.py [--batch-size 512] [--arch wrn16_4] [--device cuda] [--out FILE.json]
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from measure import interleaved, report, spread
from steps import Setup

from mixmo_fastai.mixing import MASK_KINDS, draw_lam, draw_masks
from mixmo_fastai.runtime.acceleration import Acceleration

SHAPE = (16, 32, 32)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--arch", default="wrn16_4")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--step-repeats", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lam = draw_lam(args.batch_size, 2, 2.0, device=args.device)
    generator = torch.Generator(args.device).manual_seed(0)
    kinds = {
        kind: partial(draw_masks, kind, lam, SHAPE, generator=generator) for kind in MASK_KINDS
    }
    seconds = interleaved(kinds, args.repeats)
    acceleration = Acceleration(torch.device(args.device))
    step = Setup(args.arch, args.batch_size, acceleration=acceleration).steps()
    step_seconds = interleaved({"step": step}, args.step_repeats, warmup=1)["step"]
    step_time = spread(step_seconds)["median"]
    fractions = {kind: spread([s / step_time for s in values]) for kind, values in seconds.items()}
    rows = [
        (
            kind,
            f"{1e3 * spread(seconds[kind])['median']:7.2f} ms   {100 * fraction['median']:.3f} %",
        )
        for kind, fraction in fractions.items()
    ]
    report(
        f"Masks of {args.batch_size} samples at 32x32, and their fraction of a training step of "
        f"{args.arch} ({step_time:.2f} s); goal: under 2 %",
        rows,
        {"seconds": {k: spread(v) for k, v in seconds.items()}, "fraction_of_step": fractions},
        args.out,
    )


if __name__ == "__main__":
    main()
