import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmo_fastai.errors import InputError
from mixmo_fastai.mixing.pairing import draw_pairing, draw_pairings, num_copies


@settings(deadline=None, max_examples=60)
@given(
    num_images=st.integers(1, 9),
    members=st.integers(1, 4),
    repetitions=st.integers(1, 5),
    input_repetition=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_every_member_sees_every_image_equally_often(
    num_images, members, repetitions, input_repetition, seed
):
    slots = draw_pairing(
        num_images,
        members,
        repetitions,
        input_repetition,
        generator=torch.Generator().manual_seed(seed),
    )
    batch = num_images * repetitions
    assert slots.shape == (batch, members)
    assert 0 <= slots.min() <= slots.max() < num_images * num_copies(members, repetitions)
    images = slots % num_images
    for member in range(members):
        counts = images[:, member].bincount(minlength=num_images)
        assert counts.tolist() == [repetitions] * num_images
    shared = int((slots == slots[:, :1]).all(1).sum())
    assert shared >= round(input_repetition * batch)
    if members > 1:
        assert shared == round(input_repetition * batch)


def test_slots_are_unique_without_input_repetition():
    slots = draw_pairing(16, 2, 4)
    assert slots.flatten().unique().numel() == 128


def test_pairings_repeat_each_image_four_times_and_share_no_slots_by_default():
    """The defaults of the paper: b = 4, and no input repetition."""
    assert draw_pairing(16, 2).shape == (64, 2)
    slots = draw_pairings(3, 16, 2)
    assert slots.shape == (3, 64, 2)
    assert all(batch.flatten().unique().numel() == 128 for batch in slots)


def test_one_pairing_is_drawn_as_the_only_one_of_several():
    one = draw_pairing(6, 3, generator=torch.Generator().manual_seed(0))
    several = draw_pairings(1, 6, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(one, several[0])


def test_orders_are_independent_and_uniform():
    """Over many draws, all pairs of images occur equally often."""
    pair_counts = torch.zeros(4, 4)
    for seed in range(3000):
        slots = draw_pairing(4, 2, 1, generator=torch.Generator().manual_seed(seed)) % 4
        pair_counts[slots[:, 0], slots[:, 1]] += 1
    assert pair_counts.sum() == 12_000
    assert bool(((pair_counts - 750).abs() < 4 * 750**0.5).all())


def test_generator_determines_the_pairs():
    first, second = (draw_pairing(8, 3, generator=torch.Generator().manual_seed(2)) for _ in "ab")
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 0), "num_members"),
        ((4, 2, 0), "batch_repetitions"),
        ((4, 2, 4, 1.5), "input_repetition must be from 0 to 1; got 1.5"),
        ((4, 2, 4, float("nan")), "input_repetition"),
        ((0, 2), "num_images"),
    ],
)
def test_numbers_out_of_range_are_rejected(arguments, message):
    with pytest.raises(InputError, match=message):
        draw_pairing(*arguments)
