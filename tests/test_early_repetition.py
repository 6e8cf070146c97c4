"""Members that see the same images at first: the schedule, its pairing, and its training."""

import math

import pytest
import torch
from fastai.callback.core import Callback
from learners import make_learner, small_network
from short_runs import TINY
from synthetic import fastai_dls, mixmo_dls

from mixmo_fastai import MixMoCallback, mixmo_learner, show_pairs
from mixmo_fastai.cli.render import setup_lines
from mixmo_fastai.config.load import recipe_from_mapping
from mixmo_fastai.config.resolve import override
from mixmo_fastai.errors import InputError
from mixmo_fastai.learner.preview import preview_batch
from mixmo_fastai.mixing.pairing import draw_pairing, draw_pairings, scheduled_repetition
from mixmo_fastai.training.prepare import prepare

PROGRESS = [step / 40 for step in range(41)]


def oracle(progress, late, early, span, shape):
    if progress >= span:
        return late
    weight = {
        "step": 1.0,
        "linear": 1 - progress / span,
        "cosine": math.cos(math.pi / 2 * progress / span) ** 2,
    }[shape]
    return weight * early + (1 - weight) * late


@pytest.mark.parametrize("shape", ["step", "linear", "cosine"])
@pytest.mark.parametrize("ends", [(0.0, 1.0), (0.25, 0.5), (1.0, 0.0)])
@pytest.mark.parametrize("span", [0.2, 0.75, 1.0])
def test_schedule_equals_the_oracle(shape, ends, span):
    values = [scheduled_repetition(p, *ends, span, shape) for p in PROGRESS]
    assert values == pytest.approx([oracle(p, *ends, span, shape) for p in PROGRESS])
    assert scheduled_repetition(0.0, *ends, span, shape) == pytest.approx(ends[1])
    assert scheduled_repetition(1.0, *ends, span, shape) == ends[0]


def test_without_an_early_value_the_late_one_holds():
    assert {scheduled_repetition(p, 0.5, None, 0.4, "linear") for p in PROGRESS} == {0.5}
    assert {scheduled_repetition(p, 0.5, 1.0, 0.0, "linear") for p in PROGRESS} == {0.5}


@pytest.mark.parametrize("members", [1, 2, 3])
def test_each_batch_has_its_own_fraction(members):
    fractions = [0.0, 0.25, 0.3, 0.5, 1.0, 0.0]
    generator = torch.Generator().manual_seed(0)
    slots = draw_pairings(6, 4, members, 5, fractions, generator=generator)
    same = (slots == slots[..., :1]).all(dim=2).sum(dim=1).tolist()
    assert same == ([20] * 6 if members == 1 else [0, 5, 6, 10, 20, 0])
    images = slots % 4
    for batch in range(6):
        for member in range(members):
            assert images[batch, :, member].bincount(minlength=4).tolist() == [5] * 4
    # A member's own slots, except where it sees those of member 0.
    own = slots // 20
    assert bool(((own == torch.arange(members)) | (own == 0)).all())
    assert all(len(set(batch.flatten().tolist())) == 20 * members - same[i] * (members - 1)
               for i, batch in enumerate(slots))  # fmt: skip


def test_free_positions_are_uniform():
    """Where members may differ, all pairs of the images there occur equally often."""
    draws = 4000
    generator = torch.Generator().manual_seed(1)
    slots = draw_pairings(draws, 4, 2, 1, [0.0, 0.5] * (draws // 2), generator=generator)
    first, second = (slots % 4).unbind(dim=2)
    partly, all_free = slice(1, None, 2), slice(0, None, 2)
    assert torch.equal(first[partly, 1::2], second[partly, 1::2])
    swapped = first[partly, 0] == second[partly, 2]  # the free positions
    assert float(swapped.double().mean()) == pytest.approx(0.5, abs=4 * 0.5 / (draws / 2) ** 0.5)
    equal = (first[all_free] == second[all_free]).double().mean(dim=0)
    assert equal.tolist() == pytest.approx([0.25] * 4, abs=4 * 0.433 / (draws / 2) ** 0.5)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.7])
def test_repeated_positions_are_spread_over_the_batch(fraction):
    """Every group of neighbouring positions, such as a ghost batch, has its share of them."""
    slots = draw_pairings(3, 16, 2, 4, fraction, generator=torch.Generator().manual_seed(0))
    is_repeated = slots[..., 0] == slots[..., 1]
    assert int(is_repeated.sum()) == 3 * round(64 * fraction)
    in_groups = is_repeated.view(3, 4, 16).sum(dim=2)
    assert bool(((in_groups - 16 * fraction).abs() < 1.1).all())


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_one_fraction_for_all_batches_gives_the_former_draws(fraction):
    first, second = (
        draw_pairings(3, 4, 2, 5, given, generator=torch.Generator().manual_seed(0))
        for given in (fraction, [fraction] * 3)
    )
    assert torch.equal(first, second)
    single = draw_pairing(4, 2, 5, fraction, generator=torch.Generator().manual_seed(0))
    assert int((single == single[:, :1]).all(1).sum()) == round(fraction * 20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"early_repetition": 1.5}, "early_repetition must be from 0 to 1; got 1.5"),
        ({"early_repetition": 1, "early_span": -0.1}, "early_span must be from 0 to 1"),
        ({"early_repetition": 1, "early_shape": "linaer"}, "Did you mean 'linear'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        MixMoCallback(**settings)


def test_each_batch_needs_a_fraction():
    with pytest.raises(InputError, match="2 values for 3 batches"):
        draw_pairings(3, 4, 2, 4, [0.0, 0.5])
    with pytest.raises(InputError, match="input_repetition must be from 0 to 1; got 2"):
        draw_pairings(2, 4, 2, 4, [0.0, 2])


class Fractions(Callback):
    """Record at which fraction of positions both members see the same slot of the batch."""

    order, run_valid = 30, False

    def __init__(self):
        super().__init__()
        self.seen = []

    def before_batch(self):
        inputs, targets = self.learn.xb[0], self.learn.yb[0]
        batch = len(inputs) // self.learn.mix_mo.batch_repetitions
        slots = self.learn.mix_mo.draws.slots(self.learn.iter, batch, inputs.device)
        first, second = slots.view(2, -1)
        same = first == second
        assert torch.equal(inputs[same, 0], inputs[same, 1])
        assert torch.equal(targets[same, 0], targets[same, 1])
        equal_pixels = (inputs[:, 0] == inputs[:, 1]).flatten(1).all(dim=1)
        assert bool((first % batch == second % batch)[equal_pixels].all())
        self.seen.append(float(same.double().mean()))


LOADERS = {"own": mixmo_dls, "fastai": fastai_dls}
SETTINGS = {"input_repetition": 0.25, "early_repetition": 1.0, "early_span": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("shape", ["step", "linear", "cosine"])
def test_training_follows_the_schedule(kind, shape):
    seen = Fractions()
    callback = MixMoCallback(seed=0, batch_repetitions=2, early_shape=shape, **SETTINGS)
    learn = make_learner(LOADERS[kind](), callback=callback, cbs=[seen])
    for num_epochs in (1, 2):  # every fit begins the schedule again, as those of rate and mix_prob
        seen.seen.clear()
        learn.fit(num_epochs, 0.0)
        steps = num_epochs * len(learn.dls.train)
        expected = [
            round(24 * oracle(step / steps, 0.25, 1.0, 0.5, shape)) / 24 for step in range(steps)
        ]
        assert seen.seen == pytest.approx(expected)
        assert expected[0] == 1
        assert expected[-1] == 0.25


def test_learning_rate_search_uses_the_late_value():
    seen = Fractions()
    callback = MixMoCallback(seed=0, batch_repetitions=2, early_repetition=1.0)
    learn = make_learner(callback=callback, cbs=[seen])
    learn.lr_find(num_it=12, show_plot=False)
    assert len(seen.seen) >= 12
    assert max(seen.seen) < 0.5


def test_preview_shows_different_images():
    learn = make_learner(callback=MixMoCallback(seed=0, early_repetition=1.0))
    before = {**vars(learn)}
    inputs = preview_batch(learn, count=48).inputs
    assert not torch.equal(inputs[:, 0], inputs[:, 1])
    assert learn.mix_mo.early_repetition == 1.0
    assert vars(learn).get("n_epoch") == before.get("n_epoch")
    show_pairs(learn)


def test_callbacks_pickled_without_the_settings_have_no_schedule():
    callback = MixMoCallback(seed=0)
    for name in ("early_repetition", "early_span", "early_shape"):
        del vars(callback)[name]
    seen = Fractions()
    make_learner(callback=callback, cbs=[seen]).fit(1, 0.0)
    assert max(seen.seen) < 0.5


@pytest.mark.parametrize(
    ("assignments", "text"),
    [
        ([], None),
        (["input_repetition=0.5"], "the same for all members at 50 % of positions"),
        (["early_repetition=0"], None),
        (
            ["early_repetition=1", "early_shape=step"],
            "the same for all members at 100 % of positions until 40 % of training",
        ),
        (
            ["early_repetition=1", "early_span=0.5"],
            "the same for all members at 100 % of positions falling to 0 % at 50 % of training",
        ),
        (
            ["early_repetition=0", "input_repetition=0.5", "early_shape=cosine"],
            "the same for all members at 0 % of positions rising to 50 % at 40 % of training",
        ),
    ],
)
def test_the_plan_states_the_schedule(assignments, text):
    recipe = override(TINY, [f"mix.{assignment}" for assignment in assignments])
    plan = "\n".join(setup_lines(prepare(recipe)))
    assert ("the same for all members" in plan) == (text is not None)
    assert text is None or text in plan


def test_recipes_check_the_settings():
    for mix, message in (
        ({"early_repetition": 2}, "mix.early_repetition is 2"),
        ({"early_shape": "stairs"}, "mix.early_shape is 'stairs'"),
        ({"early_shape": "step"}, "mix.early_shape='step' has no effect without"),
        ({"early_span": 0.5}, "mix.early_span=0.5 has no effect without"),
        ({"early_repetition": 1, "early_span": 0}, "mix.early_span is 0"),
    ):
        with pytest.raises(InputError, match=message):
            recipe_from_mapping({"name": "tiny", "mix": mix}, "here")


def test_the_callback_refuses_settings_without_effect():
    for arguments in ({"early_span": 0.6}, {"early_shape": "step"}):
        with pytest.raises(InputError, match="no effect without early_repetition"):
            MixMoCallback(**arguments)
    with pytest.raises(InputError, match="early_span is 0"):
        MixMoCallback(early_repetition=1, early_span=0)
    learn = mixmo_learner(mixmo_dls(), small_network(), early_repetition=None)
    assert (learn.mix_mo.early_repetition, learn.mix_mo.early_span) == (None, 0.4)
    with pytest.raises(InputError, match="no effect without early_repetition"):
        mixmo_learner(mixmo_dls(), "wrn10_1", early_span=0.6)
