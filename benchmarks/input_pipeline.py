"""Compare the throughput of the input pipeline with torchvision transforms in a DataLoader.

python benchmarks/input_pipeline.py [--out FILE.json]

This project's pipeline includes everything: order, crop, flip, repetition, normalisation, pairing,
masks and weights. The torchvision pipeline only produces the images, one by one with PIL, and
collates them, without pairing and masks.
"""

import argparse
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from measure import interleaved, paired_ratio, report, spread
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from mixmo_fastai.callbacks.mixmo import MixMoCallback
from mixmo_fastai.data.cuts import Augmentation
from mixmo_fastai.data.image_sets import ArrayImages, numbered
from mixmo_fastai.data.loaders import ResidentLoader
from mixmo_fastai.mixing.pairing import num_copies
from mixmo_fastai.models import create_model
from mixmo_fastai.runtime.devices import keep_freed_memory

MEMBERS, REPETITIONS, BATCH, NUM_IMAGES = 2, 4, 64, 50_000
MEAN, STD, PADDING = (0.49, 0.48, 0.45), (0.2, 0.2, 0.2), 4


def make_pixels(num_images=NUM_IMAGES):
    random = torch.Generator().manual_seed(0)
    return torch.randint(256, (num_images, 3, 32, 32), generator=random, dtype=torch.uint8)


class PilImages(Dataset):
    """Apply torchvision transforms to PIL images made from arrays."""

    def __init__(self, pixels):
        self.arrays = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, PADDING),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self):
        return len(self.arrays)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.arrays[index])), index % 10


class TorchvisionPipeline:
    """Endless batches of M·B images, each distinct image M·b times, from worker processes."""

    def __init__(self, pixels, num_workers):
        self.data, self.num_workers = PilImages(pixels), num_workers
        self.batches = self.endless()

    def endless(self):
        distinct, copies = BATCH // REPETITIONS, MEMBERS * REPETITIONS
        while True:
            order = torch.randperm(len(self.data)).split(distinct)
            batches = [chunk.repeat(copies).tolist() for chunk in order if len(chunk) == distinct]
            yield from DataLoader(self.data, batch_sampler=batches, num_workers=self.num_workers)

    def take(self, num_batches):
        for _ in range(num_batches):
            x, _ = next(self.batches)
            assert len(x) == MEMBERS * BATCH


class MixMoPipeline:
    """The resident loader and MixMoCallback, with a Learner stub that does not train."""

    def __init__(self, pixels, device):
        self.loader = ResidentLoader(
            ArrayImages(pixels, torch.arange(len(pixels)) % 10, numbered("train", len(pixels))),
            classes=tuple("0123456789"),
            mean=MEAN,
            std=STD,
            bs=BATCH // REPETITIONS,
            shuffle=True,
            augmentation=Augmentation(crop_padding=PADDING, flip=True),
            device=device,
        )
        model = create_model("wrn10_1", 10, MEMBERS)
        settings = {"mix_prob": 1.0, "batch_repetitions": REPETITIONS, "seed": 0}
        self.callback = MixMoCallback("cutmix", **settings)
        self.learn = SimpleNamespace(model=model, epoch=0, iter=0, pct_train=0.0)
        self.learn.dls = SimpleNamespace(train=self.loader)
        self.callback.learn = self.learn

    def take(self, num_batches):
        learn, callback = self.learn, self.callback
        learn.dl = self.loader
        callback.before_train()
        for step, (x, y) in enumerate(learn.dl):
            learn.iter, learn.xb, learn.yb = step, (x,), (y,)
            callback.before_batch()
            assert [len(part) for part in (*learn.xb, *learn.yb)] == [BATCH] * 4
            if step + 1 == num_batches:
                return

    def take_images(self, num_batches):
        for step, (x, _) in enumerate(self.loader.expanded(num_copies(MEMBERS, REPETITIONS))):
            assert len(x) == MEMBERS * BATCH
            if step + 1 == num_batches:
                return


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=320)
    parser.add_argument("--other-batches", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--pause", type=float, default=0.5, help="seconds before each measurement")
    parser.add_argument("--images", type=int, default=NUM_IMAGES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    keep_freed_memory()
    pixels = make_pixels(args.images)
    mixmo, torchvision = (
        MixMoPipeline(pixels, args.device),
        TorchvisionPipeline(pixels, args.workers),
    )
    counts = {"pairs, masks and weights": args.batches, "images only": args.batches}
    baseline = f"torchvision, PIL, DataLoader with {args.workers} workers: images only"
    counts[baseline] = args.other_batches
    takes = (mixmo.take, mixmo.take_images, torchvision.take)
    functions = dict(zip(counts, takes, strict=True))
    seconds = interleaved(
        {name: partial(functions[name], count) for name, count in counts.items()},
        args.repeats,
        warmup=1,
        pause=args.pause,  # workers keep prefetching for a while
    )
    per_pair = {name: [s / counts[name] / BATCH for s in seconds[name]] for name in counts}
    rates = {name: spread([1 / s for s in values]) for name, values in per_pair.items()}
    rows = [
        (name, "{median:,.0f} pairs/s ({min:,.0f} to {max:,.0f})".format(**rate))
        for name, rate in rates.items()
    ]
    ratio = paired_ratio(per_pair[baseline], per_pair["pairs, masks and weights"])
    rows.append(
        (
            "ratio, pairs to torchvision images",
            "{median:.1f} ({min:.1f} to {max:.1f})".format(**ratio),
        )
    )
    report(
        f"Input pipeline: 32x32 images, {MEMBERS} members, batch {BATCH}, b = {REPETITIONS}; "
        "goal: 30 times torchvision's",
        rows,
        {"pairs_per_second": rates, "ratio": ratio},
        args.out,
    )


if __name__ == "__main__":
    main()
