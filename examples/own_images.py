"""Train a MixMo network on a folder of images of your own.

The folder holds a folder per class. A fifth of the images is kept for validation.

    python examples/own_images.py path/to/images
    python examples/own_images.py path/to/images --arch convnext_tiny --size 224 --epochs 40
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

REPETITIONS = 4  # of each image in a batch, for every member


def main() -> None:
    """Read what was asked for, train, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a folder with a folder per class")
    parser.add_argument("--arch", default="resnet18", help="network, as of torchvision or timm/…")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="images the network sees a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak of one-cycle, of Adam")
    parser.add_argument("--out", type=Path, default=Path("own-images"), help="where results go")
    asked = parser.parse_args()
    if not any(asked.folder.glob("*/*")):
        parser.error(f"{asked.folder} holds no folders of images, one per class")
    asked.out.mkdir(parents=True, exist_ok=True)

    set_seed(0)
    dls = ImageDataLoaders.from_folder(
        asked.folder,
        valid_pct=0.2,
        seed=0,
        bs=max(1, asked.batch_size // REPETITIONS),
        item_tfms=Resize(int(asked.size * 1.15)),
        batch_tfms=aug_transforms(size=asked.size, min_scale=0.75),
        device=default_device(),
    )
    learn = mixmo_learner(
        dls,
        asked.arch,
        mix="cutmix",
        batch_repetitions=REPETITIONS,
        opt_func=Adam,  # steadier than SGD on small folders
        seed=0,
        path=asked.out,
    )
    # Every epoch shows each image four times: compare with four epochs of a plain network.
    learn.fit_one_cycle(
        asked.epochs,
        asked.lr,
        cbs=[CSVLogger(), SaveModelCallback(monitor="valid_loss", fname="best")],
    )

    loss, accuracy, of_members = learn.validate()
    print(f"validation: loss {loss:.3f}, accuracy {accuracy:.1%}, of a member {of_members:.1%}")

    name, _, probabilities = learn.predict(dls.valid_ds.items[0])
    print(f"{dls.valid_ds.items[0]}: {name}, {probabilities.max():.0%} sure")

    learn.export("learner.pkl")
    # A plain network with the ensemble's logits, whose file needs torch alone.
    plain = learn.model.cpu().eval().fuse()
    image = torch.zeros(2, 3, asked.size, asked.size)
    batches = ({0: torch.export.Dim("batch")},)
    torch.export.save(
        torch.export.export(plain, (image,), dynamic_shapes=batches), asked.out / "network.pt2"
    )
    print(f"written: {asked.out / 'learner.pkl'}, {asked.out / 'network.pt2'}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:  # what this package says of wrong arguments
        raise SystemExit(f"Error: {error}") from None
