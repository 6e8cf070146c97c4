import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from learners import BatchRecorder, make_learner
from synthetic import mixmo_dls

from mixmo_fastai.callbacks.mixmo import MixMoCallback
from mixmo_fastai.errors import InputError
from mixmo_fastai.mixing import draw_lam, draw_masks, loss_weights
from mixmo_fastai.mixing.loss import MixMoLoss
from mixmo_fastai.mixing.msda import (
    MsdaDraw,
    draw_msda,
    gather_partners,
    make_own_image_dominant,
    mix_images,
    own_label_weights,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
@pytest.mark.parametrize("num_members", [1, 2, 3])
class TestDraw:
    def test_shapes_and_ranges(self, kind, num_members):
        draw = draw_msda(kind, 20, num_members, (8, 10), generator=generator())
        assert draw.masks.shape == (20, num_members, 1, 8, 10)
        assert bool(((draw.masks >= 0) & (draw.masks <= 1)).all())
        for member in range(num_members):
            assert sorted(draw.partners[:, member].tolist()) == list(range(20))

    def test_images_are_mixed_with_the_given_probability(self, kind, num_members):
        draw = draw_msda(kind, 3000, num_members, (8, 8), prob=0.3, generator=generator())
        changed = (draw.masks < 1).flatten(2).any(dim=2).float().mean().item()
        # A CutMix box may be empty; a Mixup ratio is never 1.
        assert 0.2 < changed < 0.33
        never = draw_msda(kind, 50, num_members, (8, 8), prob=0, generator=generator())
        assert bool((never.masks == 1).all())

    def test_label_weights_equal_the_oracle(self, kind, num_members):
        mask_kind = "cutmix" if num_members > 1 else "sum"
        lam = draw_lam(12, num_members, 2.0, generator=generator())
        masks, _ = draw_masks(mask_kind, lam, (4, 4, 5), generator=generator(1))
        draw = draw_msda(kind, 12, num_members, (8, 10), prob=1, generator=generator(2))
        own_weights = own_label_weights(draw.masks, masks)
        for b in range(12):
            for i in range(num_members):
                if masks[b, i].sum() == 0:
                    assert own_weights[b, i] == 1
                    continue
                expected = oracle.label_weight(
                    draw.masks[b, i, 0].double().numpy(), masks[b, i].double().numpy()
                )
                assert own_weights[b, i].item() == pytest.approx(expected, abs=1e-5)


def test_mixup_ratios_are_uniform_for_alpha_one():
    masks = draw_msda("mixup", 20_000, 1, (1, 1), prob=1, generator=generator()).masks
    quantiles = masks.flatten().quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    assert quantiles == pytest.approx([0.1, 0.5, 0.9], abs=0.012)


def test_mixed_images_select_pixels_by_the_mask():
    inputs = torch.rand(5, 2, 3, 4, 4, generator=generator())
    draw = draw_msda("cutmix", 5, 2, (4, 4), prob=1, generator=generator(1))
    mixed = mix_images(inputs, draw)
    for b in range(5):
        for i in range(2):
            original, pasted = inputs[b, i], inputs[draw.partners[b, i], i]
            expected = np.where(draw.masks[b, i].numpy() == 1, original.numpy(), pasted.numpy())
            np.testing.assert_array_equal(mixed[b, i].numpy(), expected)


def test_own_image_becomes_dominant():
    draw = draw_msda("mixup", 30, 2, (4, 4), prob=1, generator=generator())
    masks = torch.full((30, 2, 1, 4, 4), 0.5)
    own_weights = own_label_weights(draw.masks, masks)
    assert bool((own_weights < 0.5).any())
    swapped, new_weights = make_own_image_dominant(draw, own_weights)
    assert bool((new_weights >= 0.5).all())
    torch.testing.assert_close(own_label_weights(swapped.masks, masks), new_weights)
    assert torch.equal(swapped.partners, draw.partners)


def test_member_with_an_empty_mask_keeps_its_label():
    masks = torch.stack([torch.ones(1, 4, 4), torch.zeros(1, 4, 4)])[None]
    own_weights = own_label_weights(torch.zeros(1, 2, 1, 8, 8), masks)
    assert own_weights.tolist() == [[0.0, 1.0]]


def test_rounding_does_not_increase_label_weights_beyond_one():
    lam = draw_lam(64, 2, 2.0, generator=generator())
    masks, _ = draw_masks("linear", lam, (1, 8, 8), generator=generator())  # expanded
    own_weights = own_label_weights(torch.ones(64, 2, 1, 8, 8), masks)
    assert own_weights.max() == 1
    assert own_weights.min() > 0.9999


def test_loss_of_two_targets_equals_that_of_soft_targets():
    pred = torch.randn(6, 2, 5, generator=generator())
    first, second = torch.randint(5, (2, 6, 2), generator=generator())
    own_weights = torch.rand(6, 2, generator=generator())
    weights = loss_weights(draw_lam(6, 2, 2.0, generator=generator()), 3)
    one_hot = [F.one_hot(t, 5).float() for t in (first, second)]
    soft = own_weights[..., None] * one_hot[0] + (1 - own_weights[..., None]) * one_hot[1]
    loss = MixMoLoss()
    torch.testing.assert_close(
        loss(pred, first, weights, second, own_weights), loss(pred, soft, weights)
    )


@pytest.mark.parametrize("num_members", [1, 2, 3])
@pytest.mark.parametrize("msda", ["cutmix", "mixup"])
def test_training_sees_mixed_images_with_both_targets(num_members, msda):
    spy = BatchRecorder()
    mix = "cutmix" if num_members > 1 else "sum"
    callback = MixMoCallback(mix, msda=msda, msda_prob=1.0, seed=0)
    learn = make_learner(mixmo_dls(), cbs=[spy], callback=callback, num_members=num_members)
    learn.fit(1, 0.01)
    _, _, targets, _, pasted, own_weights, _ = spy.seen[0]
    assert targets.shape == pasted.shape == own_weights.shape == (48, num_members)
    assert bool((own_weights < 1).any())
    if num_members > 1:
        assert bool((own_weights >= 0.5).all())
    else:  # with one member, the pasted image may be dominant
        assert bool((own_weights < 0.5).any())
    assert not torch.equal(targets, pasted)


def test_partners_belong_to_the_same_member():
    values = torch.arange(10).view(5, 2)
    partners = torch.tensor([[4, 0], [3, 1], [2, 2], [1, 3], [0, 4]])
    expected = [[8, 1], [6, 3], [4, 5], [2, 7], [0, 9]]
    assert gather_partners(values, partners).tolist() == expected
    assert isinstance(MsdaDraw(values, partners).masks, torch.Tensor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"msda": "cutmx"}, "Did you mean 'cutmix'"),
        ({"msda": "mixup", "msda_alpha": 0}, "msda_alpha"),
        ({"msda": "mixup", "msda_alpha": float("inf")}, "msda_alpha must be positive and finite"),
        ({"msda": "mixup", "msda_prob": 2}, "msda_prob"),
    ],
)
def test_invalid_arguments_are_rejected(arguments, message):
    with pytest.raises(InputError, match=message):
        MixMoCallback(**arguments)


def test_defaults_are_uniform_ratios_for_half_of_the_images():
    first = draw_msda("mixup", 40, 2, (2, 2), generator=generator())
    second = draw_msda("mixup", 40, 2, (2, 2), alpha=1.0, prob=0.5, generator=generator())
    assert torch.equal(first.masks, second.masks)


def test_no_image_is_mixed_with_probability_zero(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.zeros(size))
    draw = draw_msda("mixup", 4, 2, (2, 2), prob=0.0, generator=generator())
    assert bool((draw.masks == 1).all())


def test_images_of_equal_weight_are_not_swapped():
    draw = MsdaDraw(torch.tensor([0.25, 0.75]).view(1, 2, 1, 1, 1), torch.zeros(1, 2).long())
    unchanged, weights = make_own_image_dominant(draw, torch.tensor([[0.5, 0.5]]))
    assert torch.equal(unchanged.masks, draw.masks)
    assert weights.tolist() == [[0.5, 0.5]]
