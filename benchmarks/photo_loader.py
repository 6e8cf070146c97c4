"""Compare the streaming loader on photographs with torchvision's ImageFolder in a DataLoader.

python benchmarks/photo_loader.py [--photos FOLDER] [--out FILE.json]

Both crop at random from the image files, resize to the same size, flip and normalise, with the same
number of worker processes: this project with `random_resized_crop().from_original()`, torchvision
with its transforms v2. The photographs are mosaics of those in a folder, or of noise, so that their
sizes can be chosen.
"""

import argparse
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measure import interleaved, paired_ratio, report, spread
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from mixmo_fastai.data.cuts import Augmentation
from mixmo_fastai.data.dataloaders import make_dataloaders
from mixmo_fastai.data.image_folder import read_image_folder
from mixmo_fastai.data.resized_crop import random_resized_crop

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = {"500x375": (500, 375), "1600x1200": (1600, 1200), "4000x3000": (4000, 3000)}
TILE = 144  # side of a tile of a photograph of 500x375; larger photographs are as smooth as theirs
QUALITY = 90
CLASSES = ("a", "b")
warnings.filterwarnings("ignore", "This DataLoader will create")


def write_photos(folder, tiles, size, count):
    """Write `count` JPEG files of a size (W, H), half of them upright, in two class folders."""
    random = np.random.default_rng(0)
    factor = max(size) / 500
    for number in range(count):
        width, height = size if number % 2 else size[::-1]
        base = (round(width / factor), round(height / factor))
        image = Image.new("RGB", base)
        for top in range(0, base[1], TILE):
            for left in range(0, base[0], TILE):
                image.paste(tiles[random.integers(len(tiles))], (left, top))
        path = folder / "train" / CLASSES[number % 4 // 2] / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.resize((width, height), Image.Resampling.LANCZOS).save(path, quality=QUALITY)


def read_tiles(photos):
    """Read up to 200 tiles; noise, smoothed like a photograph, if there is no folder."""
    if photos is None:
        noise = np.random.default_rng(0).integers(0, 256, (20, TILE // 4, TILE // 4, 3), np.uint8)
        return [Image.fromarray(each).resize((TILE, TILE)) for each in noise]
    paths = sorted(path for path in photos.rglob("*.*") if path.is_file())
    paths = paths[:: max(1, len(paths) // 200)]
    return [Image.open(path).convert("RGB").resize((TILE, TILE)) for path in paths]


def torchvision_loader(folder, side, batch_size, num_workers):
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(side),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return DataLoader(
        ImageFolder(folder / "train", transform),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
    )


def mixmo_loader(folder, side, batch_size, num_workers):
    source = read_image_folder(
        folder, folder / "home", image_size=side, test_split=0, cache_limit=0
    )
    return make_dataloaders(
        source,
        batch_size=batch_size,
        valid_split=0,
        augmentation=Augmentation(flip=True, transform=random_resized_crop().from_original()),
        device="cpu",
        num_workers=num_workers,
    ).train


def load(batches, shape):
    """Load all batches once."""
    count = 0
    for x, _ in batches:
        assert x.shape == shape
        assert x.dtype == torch.float32
        count += len(x)
    return count


def measure(folder, args):
    """Measure one size of photographs; return images per second and ratios."""
    loaders = [
        make(folder, args.side, args.batch_size, args.workers)
        for make in (torchvision_loader, mixmo_loader)
    ]
    copies = args.copies
    shapes = [(times * args.batch_size, 3, args.side, args.side) for times in (1, 1, copies)]
    passes = {
        "torchvision": partial(load, loaders[0], shapes[0]),
        "streaming": partial(load, loaders[1], shapes[1]),
        "copies": lambda: load(loaders[1].expanded(copies), shapes[2]),
    }
    seconds = interleaved(passes, args.repeats, warmup=1, pause=args.pause)
    num_images = len(loaders[0]) * args.batch_size
    rates = {name: spread([num_images / s for s in each]) for name, each in seconds.items()}
    ratio = paired_ratio(seconds["torchvision"], seconds["streaming"])
    crops = paired_ratio([copies * s for s in seconds["torchvision"]], seconds["copies"])
    return {"images_per_second": rates, "ratio": ratio, "ratio_of_crops": crops}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, help="folder of photographs for the mosaics")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--copies", type=int, default=8, help="crops per image, as with MixMo")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--pause", type=float, default=0.5, help="seconds before each measurement")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tiles, results, rows = read_tiles(args.photos), {}, []
    for name in args.sizes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            write_photos(Path(folder), tiles, SIZES[name], args.images)
            results[name] = measured = measure(Path(folder), args)
        for kind in ("torchvision", "streaming"):
            text = "{median:,.0f} images/s ({min:,.0f} to {max:,.0f})"
            rows.append((f"{name}, {kind}", text.format(**measured["images_per_second"][kind])))
        text = "{median:.2f} ({min:.2f} to {max:.2f})"
        rows.append((f"{name}, ratio", text.format(**measured["ratio"])))
        rows.append(
            (
                f"{name}, ratio of crops, {args.copies} each",
                text.format(**measured["ratio_of_crops"]),
            )
        )
    report(
        f"Photographs to {args.side}x{args.side}, random resized crops, {args.workers} workers; "
        "goal: torchvision's rate",
        rows,
        results,
        args.out,
    )


if __name__ == "__main__":
    main()
