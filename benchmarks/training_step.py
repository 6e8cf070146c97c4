"""Cost of a training step with M members, against the vanilla network of the same width and batch.

python benchmarks/training_step.py [--arch wrn16_4] [--batch-size 64] [--device cuda]
                                   [--out FILE.json]
"""

import argparse
from pathlib import Path

import torch
from measure import interleaved, paired_ratio, report, spread

from mixmo_fastai.losses import MixMoLoss
from mixmo_fastai.mixing import draw_lam, draw_masks, loss_weights
from mixmo_fastai.models import create_model

SIZE, CLASSES = 32, 10


def make_step(arch, batch_size, num_members, channels_last, device="cpu"):
    """One forward, backward and optimizer step on a fixed batch."""
    model = create_model(arch, CLASSES, num_members).to(device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=6e-4
    )
    kind = "cutmix" if num_members > 1 else "sum"
    x = torch.randn(num_members, batch_size, 3, SIZE, SIZE, device=device).transpose(0, 1)
    y = torch.randint(CLASSES, (batch_size, num_members), device=device)
    masks, lam = draw_masks(
        kind, draw_lam(batch_size, num_members, 2.0, device=device), model.mask_shape(SIZE, SIZE)
    )
    weights, loss_func = loss_weights(lam, 3.0), MixMoLoss()

    def step():
        loss_func(model(x, masks), y, weights).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="wrn16_4")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    steps = {
        f"M={members}, {layout}": make_step(
            args.arch, args.batch_size, members, layout == "channels last", args.device
        )
        for members in (1, 2)
        for layout in ("channels first", "channels last")
    }
    seconds = interleaved(steps, args.repeats)
    rows = [
        (name, "{median:.3f} s ({min:.3f} to {max:.3f})".format(**spread(s)))
        for name, s in seconds.items()
    ]
    ratios = {
        layout: paired_ratio(seconds[f"M=2, {layout}"], seconds[f"M=1, {layout}"])
        for layout in ("channels first", "channels last")
    }
    rows += [
        (f"M=2 / M=1, {layout}", "{median:.3f} ({min:.3f} to {max:.3f})".format(**r))
        for layout, r in ratios.items()
    ]
    report(
        f"Training step: {args.arch}, batch {args.batch_size}",
        rows,
        {"seconds": {name: spread(s) for name, s in seconds.items()}, "ratios": ratios},
        args.out,
    )


if __name__ == "__main__":
    main()
