"""Training steps on generated images for the benchmarks, by hand and with a Learner."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

import torch
from fastai.callback.core import Callback, CancelValidException
from fastai.data.core import DataLoaders
from fastai.learner import Learner

from mixmo_fastai.data.cuts import Augmentation
from mixmo_fastai.data.image_sets import ArrayImages, numbered
from mixmo_fastai.data.loaders import ResidentLoader
from mixmo_fastai.learner.build import mixmo_learner
from mixmo_fastai.learner.optimizers import sgd
from mixmo_fastai.mixing import draw_lam, draw_masks, loss_weights
from mixmo_fastai.mixing.loss import MixMoLoss
from mixmo_fastai.models import MixMoModel, create_model
from mixmo_fastai.models.ghost_norm import use_ghost_batches
from mixmo_fastai.runtime.acceleration import Acceleration

SIZE, CLASSES, REPETITIONS, LR = 32, 10, 4, 1e-3


@dataclass(frozen=True)
class Setup:
    """A network, its batch size and its training settings.

    Attributes:
        arch: name of the network.
        batch_size: images that the network sees per step.
        num_members: M; 1 is the vanilla network.
        acceleration: device, precision, memory format, compilation.
        ghost_batch_size: as in a recipe.
    """

    arch: str
    batch_size: int
    num_members: int = 2
    acceleration: Acceleration = field(default_factory=lambda: Acceleration(torch.device("cpu")))
    ghost_batch_size: int = 0

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> "Setup":
        """Create a setup from the arguments of `step_parser`."""
        check_batch_size(args.batch_size)
        acceleration = Acceleration(
            torch.device(args.device),
            autocast=torch.bfloat16 if args.precision == "bfloat16" else None,
            tf32=args.precision == "tf32",
            compiled=args.compiled,
        )
        return cls(args.arch, args.batch_size, acceleration=acceleration)

    def replace(self, **changes: Any) -> "Setup":
        """Return a copy with changed fields; names of other fields change the acceleration."""
        fields = {k: v for k, v in changes.items() if k in Setup.__dataclass_fields__}
        others = {k: v for k, v in changes.items() if k not in fields}
        acceleration = replace_fields(self.acceleration, **others)
        return replace_fields(self, **fields, acceleration=acceleration)

    def model(self) -> MixMoModel:
        """Create the network on its device."""
        model = create_model(self.arch, CLASSES, self.num_members)
        use_ghost_batches(model, self.ghost_batch_size)
        return self.acceleration.move_to_device(model)

    def batch(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Create a batch as MixMoCallback prepares it: inputs, masks; targets, weights."""
        size, members, device = self.batch_size, self.num_members, self.acceleration.device
        x = torch.randn(members * size, 3, SIZE, SIZE, device=device)
        if self.acceleration.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        y = torch.randint(CLASSES, (size, members), device=device)
        lam = draw_lam(size, members, 2.0, device=device)
        shape = create_model(self.arch, CLASSES, members).mask_shape(SIZE, SIZE)
        masks, lam = draw_masks("cutmix" if members > 1 else "sum", lam, shape)
        return (x.unflatten(0, (members, size)).transpose(0, 1), masks), (y, loss_weights(lam, 3.0))

    def steps(self, num_steps: int = 1) -> Callable[[], None]:
        """Return a hand-written training loop over a prepared batch."""
        model, (xb, yb) = self.model(), self.batch()
        optimizer, loss_func = sgd()(model.parameters(), lr=LR).opt, MixMoLoss()

        def run() -> None:
            model.train()
            with self.acceleration.applied(model):
                for _ in range(num_steps):
                    loss_func(model(*xb), *yb).backward()
                    optimizer.step()
                    optimizer.zero_grad()

        return run

    def epochs(self, num_steps: int) -> Callable[[], None]:
        """Return an epoch of a Learner: loader, augmentation, pairing, masks and bookkeeping."""
        learn = self.learner(num_steps)

        def run() -> None:
            with self.acceleration.applied(learn.model), learn.no_bar(), learn.no_logging():
                learn.fit(1, LR)
            assert learn.recorder.iters == [num_steps], learn.recorder.iters

        return run

    def learner(
        self, num_steps: int, *, more_cbs: Iterable[Callback] = (), **settings: Any
    ) -> Learner:
        """Create a Learner with `num_steps` steps per epoch and no validation."""
        repetitions = REPETITIONS if self.num_members > 1 else 1
        distinct = self.batch_size // repetitions
        count = distinct * num_steps
        random = torch.Generator().manual_seed(0)
        images = ArrayImages(
            torch.randint(256, (count, 3, SIZE, SIZE), generator=random, dtype=torch.uint8),
            torch.arange(count) % CLASSES,
            numbered("train", count),
        )
        loader = ResidentLoader(
            images,
            classes=tuple(map(str, range(CLASSES))),
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            bs=distinct,
            shuffle=True,
            augmentation=Augmentation(crop_padding=4, flip=True),
            device=self.acceleration.device,
        )
        learn = mixmo_learner(
            DataLoaders(loader, loader, path=Path(), device=self.acceleration.device),
            self.arch,
            mix="cutmix" if self.num_members > 1 else "sum",
            num_members=self.num_members,
            batch_repetitions=repetitions,
            ghost_batch_size=self.ghost_batch_size,
            cbs=[*more_cbs, _SkipValidation()],
            **settings,
        )
        self.acceleration.move_to_device(learn.model)
        return learn


def check_batch_size(batch_size: int) -> None:
    """End the program if a batch cannot show each image `REPETITIONS` times."""
    if batch_size % REPETITIONS:
        raise SystemExit(f"--batch-size must be a multiple of the {REPETITIONS} repetitions.")


def cpu_parser(description: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """Create the argument parser of a benchmark that measures a CPU only."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    return parser


def step_parser(
    description: str | None, *, arch: str, batch_size: int, repeats: int | None = None
) -> argparse.ArgumentParser:
    """Create the argument parser of a benchmark of training steps."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default=arch)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    if repeats is not None:
        parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=("float32", "tf32", "bfloat16"))
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    return parser


class _SkipValidation(Callback):
    """Skip validation."""

    def before_validate(self) -> None:
        raise CancelValidException
