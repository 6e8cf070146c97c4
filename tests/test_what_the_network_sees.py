"""Which images, labels and masks reach the network, for every kind of loader.

Every pixel of image i is i, so that each position of each batch can be traced back to its image.
The expected pairs and masks are drawn here, step by step, from the definition of the streams.
"""

import pytest
import torch
from fastai.data.core import DataLoaders, TfmdDL
from learners import BatchRecorder, SkipBackward, make_learner
from torch.utils.data import DataLoader, TensorDataset

from mixmo_fastai import MixMoCallback
from mixmo_fastai.callbacks.mixmo import scheduled_mix_prob
from mixmo_fastai.data.cuts import STEPS_AT_ONCE, Augmentation
from mixmo_fastai.data.dataloaders import make_dataloaders
from mixmo_fastai.data.image_sets import ArrayImages, DataSource
from mixmo_fastai.mixing import draw_mixings
from mixmo_fastai.mixing.pairing import draw_pairings
from mixmo_fastai.rng import make_generator
from mixmo_fastai.runtime.processes import Processes

NUM_IMAGES, BATCH, REPETITIONS, MEMBERS, SEED = 80, 4, 3, 2, 7
STEPS, SIDE = NUM_IMAGES // BATCH, 4
CLASSES = ("a", "b", "c")


def labels_of(indices):
    return (indices * 5 + indices // 3) % 3  # not a period that a wrong pairing could keep


def pixels_of(indices):
    return indices.view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE)


def own_loaders(loader):
    numbers = torch.arange(NUM_IMAGES)
    pixels = pixels_of(numbers).to(torch.uint8).contiguous()
    names = tuple(map(str, range(NUM_IMAGES)))
    images = ArrayImages(pixels, labels_of(numbers), names)
    few = ArrayImages(pixels[:9], labels_of(numbers[:9]), names[:9])
    source = DataSource(
        "numbers", CLASSES, images, few, mean=(0.0,) * 3, std=(1.0,) * 3, crop_padding=0, flip=False
    )
    return make_dataloaders(
        source, batch_size=BATCH, valid_split=0, seed=SEED, loader=loader, num_workers=0,
        device="cpu", augmentation=Augmentation(0, False),
    )  # fmt: skip


def items():
    numbers = torch.arange(NUM_IMAGES)
    return [*zip(pixels_of(numbers).float() / 255, labels_of(numbers), strict=True)]


def fastai_loaders():
    train = TfmdDL(items(), bs=BATCH, shuffle=False, drop_last=True, num_workers=0)
    dls = DataLoaders(train, TfmdDL(items()[:9], bs=9, num_workers=0), device=torch.device("cpu"))
    dls.c = 3
    return dls


def torch_loaders():
    numbers = torch.arange(NUM_IMAGES)
    data = TensorDataset(pixels_of(numbers).float() / 255, labels_of(numbers))
    loaders = (DataLoader(data, batch_size=BATCH), DataLoader(data, batch_size=16))
    dls = DataLoaders(*loaders, device=torch.device("cpu"))
    dls.c = 3
    return dls


LOADERS = {
    "resident": lambda: own_loaders("resident"),
    "streaming": lambda: own_loaders("streaming"),
    "fastai": fastai_loaders,
    "torch": torch_loaders,
}


def epoch_order(dls, epoch):
    """Return the order of the images in an epoch: the loaders of others do not shuffle here."""
    order = getattr(dls.train, "order", None)
    return torch.arange(NUM_IMAGES) if order is None else order(epoch)


def slots_of(step, epoch):
    """Return which slot each member sees at each position of a step: (B, M)."""
    first = step // STEPS_AT_ONCE * STEPS_AT_ONCE
    generator = make_generator(SEED, "pairing", epoch, first)
    slots = draw_pairings(
        STEPS_AT_ONCE, BATCH, MEMBERS, REPETITIONS, [0.0] * STEPS_AT_ONCE, generator=generator
    )
    return slots[step - first]


def mixing_of(kind, step, epoch, progress, shape):
    """Draw masks and loss weights of a step; expensive kinds are drawn for one step each."""
    at_once = STEPS_AT_ONCE if kind in ("linear", "cutmix") else 1
    first = step // at_once * at_once
    prob = scheduled_mix_prob(progress, 0.5, 11 / 12)
    numbers = torch.rand(at_once, generator=make_generator(SEED, "schedule", epoch, first)).tolist()
    drawn = draw_mixings(
        kind, numbers, (BATCH * REPETITIONS, MEMBERS), shape,
        mix_prob=0.5 if at_once > 1 else prob, alpha=2.0, weight_root=3.0, options={},
        lam_generator=make_generator(SEED, "lam", epoch, first),
        mask_generator=make_generator(SEED, "masks", epoch, first),
    )  # fmt: skip
    return drawn.select(step - first, prob)


def train(dls, kind, num_epochs=2):
    """Train without gradients; return what reached the network in each step."""
    seen = BatchRecorder()
    callback = MixMoCallback(kind, seed=SEED, batch_repetitions=REPETITIONS)
    learn = make_learner(dls, callback=callback, cbs=[seen, SkipBackward()])
    learn.fit(num_epochs, 0.0)
    assert len(seen.seen) == num_epochs * STEPS
    return learn, seen.seen


@pytest.mark.parametrize("kind", ["cutmix", "linear", "patchup"])
@pytest.mark.parametrize("loader", LOADERS)
def test_images_labels_and_masks_reach_the_network(loader, kind):
    assert STEPS > STEPS_AT_ONCE  # draws for several steps are used up within an epoch
    dls = LOADERS[loader]()
    learn, seen = train(dls, kind)
    for number, (inputs, masks, targets, weights, _) in enumerate(seen):
        epoch, step = divmod(number, STEPS)
        order = epoch_order(dls, epoch)
        chosen = order[step * BATCH : (step + 1) * BATCH]
        expected = chosen[slots_of(step, epoch) % BATCH]  # (B, M)
        numbers = (inputs * 255).round().long()
        assert bool((numbers == numbers[..., :1, :1, :1]).all())  # whole images
        assert torch.equal(numbers[..., 0, 0, 0], expected), (epoch, step)
        assert torch.equal(targets, labels_of(expected))
        for member in range(MEMBERS):
            times = expected[:, member].bincount(minlength=NUM_IMAGES)
            assert times[chosen].tolist() == [REPETITIONS] * BATCH
        shape = learn.model.mask_shape(SIDE, SIDE)
        mixing = mixing_of(kind, step, epoch, number / len(seen), shape)
        assert torch.equal(masks, mixing.masks), (epoch, step)
        assert torch.equal(weights, mixing.weights)


@pytest.mark.parametrize("loader", LOADERS)
def test_every_image_is_seen_equally_often_in_an_epoch(loader):
    _, seen = train(LOADERS[loader](), "cutmix", num_epochs=1)
    images = torch.cat([inputs[..., 0, 0, 0] for inputs, *_ in seen]).mul(255).round().long()
    for member in range(MEMBERS):
        times = images[:, member].bincount(minlength=NUM_IMAGES)
        assert times.tolist() == [REPETITIONS] * NUM_IMAGES
    pairs = {tuple(pair) for pair in images.tolist()}
    assert len(pairs) > NUM_IMAGES * REPETITIONS // 2  # members see different images


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("loader", ["resident", "streaming"])
def test_a_process_sees_its_positions_of_the_batch(monkeypatch, loader, rank):
    callbacks = "mixmo_fastai.callbacks"
    monkeypatch.setattr(f"{callbacks}.mixmo.process_group", lambda: Processes(rank, 2))
    monkeypatch.setattr(f"{callbacks}.draws.rank_distrib", lambda: rank)
    dls = LOADERS[loader]()
    seen = BatchRecorder()
    callback = MixMoCallback("cutmix", seed=SEED, batch_repetitions=REPETITIONS)
    make_learner(dls, callback=callback, cbs=[seen, SkipBackward()]).fit(1, 0.0)
    half = BATCH * REPETITIONS // 2
    for step, (inputs, masks, targets, *_) in enumerate(seen.seen):
        chosen = epoch_order(dls, 0)[step * BATCH : (step + 1) * BATCH]
        expected = chosen[slots_of(step, 0) % BATCH][rank * half : (rank + 1) * half]
        assert torch.equal((inputs[..., 0, 0, 0] * 255).round().long(), expected)
        assert torch.equal(targets, labels_of(expected))
        assert len(masks) == half
