"""Pairs per second of the whole input side: order, crop, flip, repetition, pairing, masks.

python benchmarks/input_pipeline.py [--out FILE.json]
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

import torch
from measure import interleaved, report, spread

from mixmo_fastai.callback import MixMoCallback
from mixmo_fastai.data.image_sets import ArrayImages, numbered
from mixmo_fastai.data.loaders import Augmentation, ResidentLoader
from mixmo_fastai.models import create_model
from mixmo_fastai.pairing import num_copies

MEMBERS, REPETITIONS, BATCH, NUM_IMAGES = 2, 4, 64, 50_000


def make_loader():
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (NUM_IMAGES, 3, 32, 32), generator=random, dtype=torch.uint8)
    labels = torch.arange(NUM_IMAGES) % 10
    return ResidentLoader(
        ArrayImages(pixels, labels, numbered("train", NUM_IMAGES)),
        classes=tuple("0123456789"),
        mean=(0.49, 0.48, 0.45),
        std=(0.2, 0.2, 0.2),
        bs=BATCH // REPETITIONS,
        shuffle=True,
        augmentation=Augmentation(crop_padding=4, flip=True),
    )


def make_callback():
    """The callback of training, on a Learner that has nothing to train."""
    callback = MixMoCallback("cutmix", mix_prob=1.0, batch_repetitions=REPETITIONS, seed=0)
    callback.learn = SimpleNamespace(
        model=create_model("wrn10_1", 10, MEMBERS), epoch=0, iter=0, pct_train=0.0
    )
    callback.fit_seed, callback.copies_in_batch = 0, num_copies(MEMBERS, REPETITIONS)
    return callback


def take_batches(loader, callback, num_batches):
    learn = callback.learn
    for step, (x, y) in enumerate(loader.batches(num_copies(MEMBERS, REPETITIONS))):
        if step == num_batches:
            break
        learn.iter, learn.xb, learn.yb = step, (x,), (y,)
        callback.before_batch()
        assert [len(part) for part in (*learn.xb, *learn.yb)] == [BATCH] * 4


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    loader, callback = make_loader(), make_callback()
    seconds = interleaved(
        {"resident": lambda: take_batches(loader, callback, args.batches)}, args.repeats, warmup=1
    )["resident"]
    rates = spread([args.batches * BATCH / s for s in seconds])
    report(
        f"Input pipeline: pairs of 32x32 images, batch {BATCH}, b = {REPETITIONS}, CutMix masks",
        [("resident loader", "{median:,.0f} pairs/s ({min:,.0f} to {max:,.0f})".format(**rates))],
        {"pairs_per_second": rates},
        args.out,
    )


if __name__ == "__main__":
    main()
