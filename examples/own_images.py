"""Train a MixMo network on your own folder of images.

The folder contains one folder per class. A fifth of the images is used for validation.

    python examples/own_images.py path/to/images
    python examples/own_images.py path/to/images --arch convnext_tiny --size 224 --epochs 40

Training starts from random weights. Two members need about 1.5 million images seen, that is
epochs · 4 · number of images, and at least 75 epochs; with fewer, a plain network is usually better
(docs/when.md).
"""

import argparse
from pathlib import Path

import torch
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import SaveModelCallback
from fastai.optimizer import Adam
from fastai.torch_core import default_device, set_seed
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.data import ImageDataLoaders

from mixmo_fastai import mixmo_learner
from mixmo_fastai.errors import InputError

REPETITIONS = 4  # copies of each image in a batch, per member


def parse_arguments() -> argparse.Namespace:
    """Parse and check the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder with one folder per class")
    parser.add_argument(
        "--arch", default="resnet18", help="name of a torchvision or timm/… network"
    )
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument(
        "--batch-size", type=int, default=64, help="images that the network sees per step"
    )
    parser.add_argument(
        "--lr", type=float, default=2e-3, help="peak learning rate of one-cycle, for Adam"
    )
    parser.add_argument("--out", type=Path, default=Path("own-images"), help="output folder")
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"--epochs must be 1 or more; got {args.epochs}")
    if not any(args.folder.glob("*/*")):
        parser.error(f"{args.folder} contains no class folders with images")
    return args


def main() -> None:
    """Train, evaluate and export."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)

    set_seed(0)
    dls = ImageDataLoaders.from_folder(
        args.folder,
        valid_pct=0.2,
        seed=0,
        bs=max(1, args.batch_size // REPETITIONS),
        item_tfms=Resize(int(args.size * 1.15)),
        batch_tfms=aug_transforms(size=args.size, min_scale=0.75),
        device=default_device(),
    )
    learn = mixmo_learner(
        dls,
        args.arch,
        mix="cutmix",
        batch_repetitions=REPETITIONS,
        opt_func=Adam,  # more stable than SGD on small folders
        seed=0,
        path=args.out,
    )
    # Each epoch shows every image four times: compare with four epochs of a plain network.
    learn.fit_one_cycle(
        args.epochs,
        args.lr,
        cbs=[CSVLogger(), SaveModelCallback(monitor="valid_loss", fname="best")],
    )

    loss, accuracy, member_accuracy = learn.validate()
    print(f"validation: loss {loss:.3f}, accuracy {accuracy:.1%}, per member {member_accuracy:.1%}")

    name, _, probabilities = learn.predict(dls.valid_ds.items[0])
    print(f"{dls.valid_ds.items[0]}: {name}, probability {probabilities.max():.0%}")

    learn.export("learner.pkl")
    # A plain network with the ensemble's logits; loading it needs only torch.
    plain = learn.model.cpu().eval().fuse()
    image = torch.zeros(2, 3, args.size, args.size)
    batches = ({0: torch.export.Dim("batch")},)
    torch.export.save(
        torch.export.export(plain, (image,), dynamic_shapes=batches), args.out / "network.pt2"
    )
    print(f"Saved {args.out / 'learner.pkl'}, {args.out / 'network.pt2'}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:  # invalid arguments, reported by this package
        raise SystemExit(f"Error: {error}") from None
