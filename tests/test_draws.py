"""The draws of an epoch: which are drawn together, and which are common to processes."""

from types import SimpleNamespace

import pytest
import torch

from mixmo_fastai.callbacks import draws as module
from mixmo_fastai.callbacks.draws import EpochDraws
from mixmo_fastai.data.cuts import STEPS_AT_ONCE
from mixmo_fastai.mixing.pairing import draw_pairings

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)


def make_draws(mix="cutmix", *, num_processes=1, repetition_at=lambda step: 0.0, mix_prob=0.5):
    settings = SimpleNamespace(
        mix=mix, mask_options={}, alpha=2.0, mix_prob=mix_prob, weight_root=3.0,
        batch_repetitions=2, msda="mixup", msda_alpha=1.0, msda_prob=1.0,
    )  # fmt: skip
    return EpochDraws(settings, 7, 1, 2, num_processes=num_processes, repetition_at=repetition_at)


def test_each_step_has_its_own_repetition():
    first = 3 * STEPS_AT_ONCE
    draws = make_draws(repetition_at=lambda step: (step - first) / STEPS_AT_ONCE)
    slots = draws.slots_from(first, 8, CPU).unflatten(1, (2, -1))
    same = (slots[:, 0] == slots[:, 1]).sum(dim=1)
    assert same.tolist() == list(range(STEPS_AT_ONCE))  # of 16 positions


def test_slots_are_drawn_once_for_several_steps(monkeypatch):
    sizes = []

    def count(num_batches, *arguments, **keywords):
        sizes.append(num_batches)
        return draw_pairings(num_batches, *arguments, **keywords)

    monkeypatch.setattr(module, "draw_pairings", count)
    draws = make_draws()
    in_order = [draws.slots(step, 4, CPU) for step in range(40 * STEPS_AT_ONCE)]
    assert sizes == [STEPS_AT_ONCE] * 40
    for step in (0, 17, 20 * STEPS_AT_ONCE - 1, 20 * STEPS_AT_ONCE + 5, 40 * STEPS_AT_ONCE - 1):
        assert torch.equal(make_draws().slots(step, 4, CPU), in_order[step])
        first = step // STEPS_AT_ONCE * STEPS_AT_ONCE
        assert torch.equal(draws.slots_from(first, 4, CPU)[step - first], in_order[step])


@pytest.mark.parametrize("mix", ["cutmix", "noise"])
def test_masks_do_not_depend_on_the_step_at_which_drawing_begins(mix):
    """The probability of regions decays; a run may be resumed at any step."""
    steps = range(2 * STEPS_AT_ONCE)
    probs = [0.9 - 0.025 * step for step in steps]
    draws = make_draws(mix, mix_prob=0.9)
    for step, prob in zip(steps, probs, strict=True):
        masks, weights = draws.mixing(step, 4, SHAPE, prob, CPU)
        resumed = make_draws(mix, mix_prob=0.9).mixing(step, 4, SHAPE, prob, CPU)
        assert torch.equal(masks, resumed.masks)
        assert torch.equal(weights, resumed.weights)


def test_expensive_masks_are_drawn_only_for_steps_that_use_them(monkeypatch):
    bounds = []

    def record(*arguments, mix_prob, **keywords):
        bounds.append((len(arguments[1]), mix_prob))
        return module_draw(*arguments, mix_prob=mix_prob, **keywords)

    module_draw = module.draw_mixings
    monkeypatch.setattr(module, "draw_mixings", record)
    make_draws("noise").mixing(5, 4, SHAPE, 0.25, CPU)
    make_draws("cutmix").mixing(5, 4, SHAPE, 0.25, CPU)
    assert bounds == [(1, 0.25), (STEPS_AT_ONCE, 0.5)]


def draws_of_ranks(monkeypatch, num_processes):
    """Return slots, masks, numbers of the schedule and partners, for ranks 0 and 1."""
    results = []
    for rank in (0, 1):
        monkeypatch.setattr(module, "rank_distrib", lambda rank=rank: rank)
        draws = make_draws("linear", num_processes=num_processes)
        slots = draws.slots(0, 8, CPU).unflatten(0, (2, -1))
        mixing = draws.mixing(0, 16 // num_processes, SHAPE, 0.5, CPU)
        schedule = draws._uniforms(0, 4)
        inputs = torch.zeros(16 // num_processes, 2, 3, 8, 8)
        msda, _ = draws.msda(0, inputs, mixing.masks)
        results.append((slots, mixing.masks, schedule, msda.partners))
    return results


def test_processes_that_split_a_batch_draw_it_together(monkeypatch):
    first, second = draws_of_ranks(monkeypatch, 2)
    whole = make_draws("linear")
    monkeypatch.setattr(module, "rank_distrib", lambda: 0)
    slots = whole.slots(0, 8, CPU).unflatten(0, (2, -1))
    assert torch.equal(torch.cat([first[0], second[0]], dim=1), slots)
    masks = whole.mixing(0, 16, SHAPE, 0.5, CPU).masks
    assert torch.equal(torch.cat([first[1], second[1]]), masks)
    assert first[2] == second[2]
    assert not torch.equal(first[3], second[3])  # partners are images of the same process


def test_processes_with_batches_of_their_own_draw_separately(monkeypatch):
    """As in fastai's DistributedDL: all have the same schedule, nothing else in common."""
    first, second = draws_of_ranks(monkeypatch, 1)
    assert first[0].shape == second[0].shape == (2, 16)
    assert first[1].shape == second[1].shape == (16, 2, *SHAPE)
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    assert first[2] == second[2]
    assert not torch.equal(first[3], second[3])
