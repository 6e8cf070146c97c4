"""Fine-tune a pretrained network in a fastai Learner, plain or as MixMo, and evaluate it.

    python examples/fine_tune_learner.py path/to/images --method mixmo
    python examples/fine_tune_learner.py path/to/images --method plain

The folder contains train/ and test/, each with one folder per class. Both commands show every
training image equally often: an epoch of MixMo shows it twice. The network is timm's;
`--weights FILE` reads its weights from a file, such as that of lite0_weights.py. The results of
docs/results.md ("The rates of a Learner") were measured with this program, with the options there.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import timm
import torch
from fastai.callback.mixup import CutMix
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import FuncSplitter, Normalize, get_image_files, parent_label
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import default_device, params, set_seed
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.data import ImageBlock
from fastai.vision.learner import vision_learner
from safetensors.torch import load_file
from torch import nn

from mixmo_fastai import to_mixmo
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.splits import cross_fitted
from mixmo_fastai.metrics.calibration import nll

REPETITIONS = 2  # copies of each image in a batch of MixMo
NUM_VALID = 256  # validation images, for the figures of each epoch


def parse_arguments() -> argparse.Namespace:
    """Parse and check the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder with train/CLASS/ and test/CLASS/")
    parser.add_argument("--method", choices=("plain", "cutmix", "mixmo"), default="mixmo")
    parser.add_argument("--head", choices=("fastai", "linear"), default="linear")
    parser.add_argument("--ps", type=float, default=0.5, help="dropout of fastai's head")
    parser.add_argument(
        "--perturbation", type=float, default=1.0, help="how much MixMo's members differ at first"
    )
    parser.add_argument("--arch", default="tf_efficientnet_lite0", help="name of a timm network")
    parser.add_argument("--weights", type=Path, help="safetensors file; default: download")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--limit", type=int, default=2000, help="training images, over all classes")
    parser.add_argument("--views", type=int, default=30, help="times each image is seen")
    parser.add_argument("--batch-size", type=int, default=64, help="images seen per step")
    parser.add_argument("--lr", type=float, default=8e-3, help="base_lr of fine_tune")
    parser.add_argument("--lr-mult", type=float, default=1, help="lr_mult of fine_tune")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write the results to")
    args = parser.parse_args()
    if not any(args.folder.glob("train/*/*")) or not any(args.folder.glob("test/*/*")):
        parser.error(f"{args.folder} contains no images in train/CLASS/ and test/CLASS/")
    if args.views < 2 * repetitions(args.method):
        parser.error("--views must leave one epoch frozen and one for all layers")
    return args


def repetitions(method: str) -> int:
    """Return how often an epoch shows each image."""
    return REPETITIONS if method == "mixmo" else 1


def make_dataloaders(args: argparse.Namespace):
    """Return loaders of equally many training images per class, and the test images."""
    rng = np.random.default_rng(0)  # the same images for every seed and method
    train, valid = [], []
    folders = sorted(path for path in (args.folder / "train").iterdir() if path.is_dir())
    per_class, num_valid = args.limit // len(folders), max(1, NUM_VALID // len(folders))
    if per_class < 1:
        raise InputError(f"--limit must be {len(folders)} or more, one image per class")
    for folder in folders:
        files = get_image_files(folder).sorted()
        files = [files[index] for index in rng.permutation(len(files))]
        num = min(per_class, max(1, len(files) - 1))  # leave one for validation
        train += files[:num]
        valid += files[num : num + num_valid]
    chosen = set(valid)
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock),
        get_items=lambda _: train + valid,
        get_y=parent_label,
        splitter=FuncSplitter(lambda file: file in chosen),
        item_tfms=Resize(args.size),
        batch_tfms=aug_transforms(),
    )
    dls = block.dataloaders(
        args.folder,
        bs=args.batch_size // repetitions(args.method),
        val_bs=256,
        num_workers=0,
        device=default_device(),
    )
    return dls, get_image_files(args.folder / "test").sorted()


def make_learner(dls, args: argparse.Namespace) -> Learner:
    """Return a frozen Learner of the pretrained network, with fastai's head or one linear layer."""
    cfg = timm.get_pretrained_cfg(args.arch)
    dls.add_tfms([Normalize.from_stats(cfg.mean, cfg.std)], "after_batch")
    settings = {
        "loss_func": CrossEntropyLossFlat(),
        "metrics": accuracy,
        "cbs": CutMix() if args.method == "cutmix" else None,
    }
    download = args.weights is None
    if args.head == "fastai":
        settings |= {"pretrained": download, "normalize": False, "ps": args.ps}
        learn = vision_learner(dls, args.arch, **settings)
        body = learn.model[0].model
    else:
        body = timm.create_model(args.arch, pretrained=download)
        body.reset_classifier(0)
        network = nn.Sequential(body, nn.Linear(body.num_features, dls.c))
        learn = Learner(
            dls, network, splitter=lambda model: [params(model[0]), params(model[1])], **settings
        )
    if args.weights is not None:
        wanted = body.state_dict()
        state = {k: v for k, v in load_file(args.weights).items() if k in wanted}
        missing = [k for k in wanted if k not in state and "num_batches_tracked" not in k]
        if missing:
            raise SystemExit(f"Error: {args.weights} has no {missing[0]}")
        body.load_state_dict(state, strict=False)
    learn.freeze()
    return learn


def calibrated_nll(logits: torch.Tensor, labels: torch.Tensor) -> float | None:
    """Return the NLL of halves of the images, at the temperature fitted on the other half."""
    try:
        return cross_fitted(logits, labels)["nll"]
    except InputError as error:  # few images, or predictions no better than chance
        print(f"No calibration: {error}")
        return None


def main() -> None:
    """Train, evaluate on the test images, and print the results as JSON."""
    args = parse_arguments()
    set_seed(args.seed, reproducible=True)
    dls, test = make_dataloaders(args)
    learn = make_learner(dls, args)
    if args.method == "mixmo":
        to_mixmo(
            learn,
            mix="cutmix",
            batch_repetitions=REPETITIONS,
            perturbation=args.perturbation,
            seed=args.seed,
        )
    # One epoch with only the head, then all layers.
    epochs = args.views // repetitions(args.method) - 1
    learn.fine_tune(epochs, args.lr, lr_mult=args.lr_mult)

    probabilities, labels = learn.get_preds(dl=dls.test_dl(test, with_labels=True))
    logits = probabilities.double().clamp_min(1e-12).log()
    labels = torch.as_tensor(labels)
    results = {
        "method": args.method,
        "head": args.head + f", ps={args.ps:g}" * (args.head == "fastai" and args.ps != 0.5),
        "fine_tune": [epochs, args.lr, args.lr_mult],
        "perturbation": args.perturbation if args.method == "mixmo" else None,
        "seed": args.seed,
        "accuracy": (logits.argmax(1) == labels).double().mean().item(),
        "nll": nll(logits, labels).item(),
        "nll_calibrated": calibrated_nll(logits, labels),
    }
    print(json.dumps(results))
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:  # invalid arguments, reported by this package
        raise SystemExit(f"Error: {error}") from None
