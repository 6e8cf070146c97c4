"""Drawing masks neither synchronises with the device nor copies, checked by its CPU operations."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mixmo_fastai.mixing import MASK_KINDS, draw_lam, draw_masks, loss_weights
from mixmo_fastai.mixing.msda import (
    draw_msda,
    make_own_image_dominant,
    mix_images,
    own_label_weights,
)
from mixmo_fastai.mixing.pairing import draw_pairing

SYNCHRONISING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "item")


class NoSynchronisation(TorchDispatchMode):
    """Reject operations that would synchronise with a GPU, and copies between devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in SYNCHRONISING, f"{name} synchronises with the device"
        kwargs = kwargs or {}
        if name == "_to_copy" and kwargs.get("device") is not None:
            assert torch.device(kwargs["device"]) == args[0].device, "copy between devices"
        # A boolean index calls nonzero internally.
        if name == "index":
            assert all(i is None or i.dtype != torch.bool for i in args[1])
        return func(*args, **kwargs)


@pytest.mark.parametrize("num_members", [2, 3])
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_drawing_masks(kind, num_members):
    generator = torch.Generator().manual_seed(0)
    with NoSynchronisation():
        lam = draw_lam(8, num_members, 2.0, generator=generator)
        masks, lam = draw_masks(kind, lam, (16, 8, 8), generator=generator)
        loss_weights(lam, 3.0)
    assert masks.shape[:2] == (8, num_members)


@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
def test_msda_of_pixels(kind):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(8, 2, 3, 8, 8)
    masks = torch.full((8, 2, 1, 8, 8), 0.5)
    with NoSynchronisation():
        draw = draw_msda(
            kind, 8, 2, size=(8, 8), alpha=1.0, prob=0.5, generator=generator, device="cpu"
        )
        draw, own_weights = make_own_image_dominant(draw, own_label_weights(draw.masks, masks))
        mixed = mix_images(inputs, draw)
    assert mixed.shape == inputs.shape
    assert bool((own_weights >= 0.5).all())


def test_drawing_pairs():
    with NoSynchronisation():
        slots = draw_pairing(8, 2, 4, 0.5, generator=torch.Generator().manual_seed(0), device="cpu")
    assert slots.shape == (32, 2)


def test_synchronising_operations_are_detected():
    with NoSynchronisation(), pytest.raises(AssertionError, match="synchronises with the device"):
        torch.rand(3).sum().item()
    with NoSynchronisation(), pytest.raises(AssertionError):
        torch.rand(3)[torch.rand(3) > 0.5]
