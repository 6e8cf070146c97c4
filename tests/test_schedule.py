import itertools

import fastai.callback.schedule
import pytest
import torch
from fastai.callback.schedule import combined_cos

from mixmo_fastai.training.schedule import fine_tune, flat_cosine, one_cycle, published_steps

PUBLISHED = {"milestones": (101 / 300, 201 / 300, 226 / 300), "gamma": 0.1}
BOUNDS = (1, 101, 201, 226, 300)  # epochs of the end of the warm-up, the drops and the end


@pytest.mark.parametrize("pct_start", [0.1, 0.25, 0.3, 0.5, 0.9])
@pytest.mark.parametrize(("start", "peak", "end"), [(0.004, 0.1, 1e-6), (0.95, 0.85, 0.95)])
def test_one_cycle_equals_fastai(monkeypatch, pct_start, start, peak, end):
    def double_tensor(values):  # fastai uses single precision
        return torch.tensor(list(values), dtype=torch.float64)

    monkeypatch.setattr(fastai.callback.schedule, "tensor", double_tensor)
    schedule, reference = (
        one_cycle(start, peak, end, pct_start),
        combined_cos(pct_start, start, peak, end),
    )
    for point in range(2000):
        progress = point / 2000
        assert schedule(progress) == pytest.approx(float(reference(progress)), abs=1e-12), progress


def test_one_cycle_start_peak_and_end():
    schedule = one_cycle(0.1, 1.0, 0.01, 0.25)
    assert (schedule(0), schedule(0.25)) == (pytest.approx(0.1), 1.0)
    assert schedule(1.0) == pytest.approx(0.01)
    values = [schedule(point / 100) for point in range(101)]
    assert values[:26] == sorted(values[:26])
    assert values[25:] == sorted(values[25:], reverse=True)


@pytest.mark.parametrize(("pct_start", "first", "last"), [(0, 1.0, 0.01), (1, 0.1, 1.0)])
def test_one_cycle_with_only_one_half(pct_start, first, last):
    schedule = one_cycle(0.1, 1.0, 0.01, pct_start)
    assert (schedule(0.0), schedule(1.0)) == (pytest.approx(first), pytest.approx(last))


def test_published_warmup_is_linear_per_step():
    schedule = published_steps(0.4, epochs=300, steps_per_epoch=8, warmup_steps=8, **PUBLISHED)
    rates = [schedule(step / 2400) for step in range(10)]
    assert rates == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.4, 0.4])


def test_published_rate_drops_after_epochs_101_201_and_226():
    steps = 7
    schedule = published_steps(
        0.1, epochs=300, steps_per_epoch=steps, warmup_steps=steps, **PUBLISHED
    )
    rates = [schedule(step / (300 * steps)) for step in range(300 * steps)]
    stages = [rates[begin * steps : end * steps] for begin, end in itertools.pairwise(BOUNDS)]
    for rate, stage in zip([0.1, 0.01, 0.001, 0.0001], stages, strict=True):
        assert stage == pytest.approx([rate] * len(stage), rel=1e-12)


def test_drops_are_exact_despite_rounding_of_progress():
    epochs, steps = 300, 195
    schedule = published_steps(
        1.0, epochs=epochs, steps_per_epoch=steps, warmup_steps=100, **PUBLISHED
    )
    for epoch in (100, 101, 200, 201, 225, 226):
        progress = epoch / epochs  # like fastai, which adds one step at a time
        for _ in range(steps):
            drops = (epoch >= 101) + (epoch >= 201) + (epoch >= 226)
            assert schedule(progress) == pytest.approx(0.1**drops, rel=1e-12), epoch
            progress += 1 / (steps * epochs)


@pytest.mark.parametrize(("warmup_steps", "first"), [(0, 1.0), (5, 0.2), (20, 0.05)])
def test_warmup_of_any_length(warmup_steps, first):
    schedule = published_steps(
        1.0, epochs=10, steps_per_epoch=10, milestones=(), gamma=0.1, warmup_steps=warmup_steps
    )
    assert schedule(0.0) == pytest.approx(first)
    assert schedule(0.5) == 1.0


@pytest.mark.parametrize("flat_fraction", [0.0, 0.3, 0.75])
def test_flat_cosine_equals_fastai(monkeypatch, flat_fraction):
    """fit_flat_cos keeps lr constant until pct_start and then anneals it to lr / div_final."""
    monkeypatch.setattr(
        fastai.callback.schedule,
        "tensor",
        lambda values: torch.tensor(list(values), dtype=torch.float64),
    )
    reference = combined_cos(flat_fraction, 0.4, 0.4, 0.4e-5)
    schedule = flat_cosine(0.4, 0.4e-5, flat_fraction)
    for point in range(1000):
        progress = point / 1000
        assert schedule(progress) == pytest.approx(float(reference(progress)), abs=1e-12), progress


def test_flat_cosine_may_be_constant():
    assert flat_cosine(0.4, 0.0, 1.0)(1.0) == 0.4
    assert flat_cosine(0.4, 0.1, 0.5)(1.0) == pytest.approx(0.1)


def test_both_parts_of_fine_tuning_end_at_the_peak_divided_by_div_final():
    rates = fine_tune(
        0.1, num_steps=3000, frozen_steps=1000, body_div=20.0, pct_start=0.3,
        div=5.0, div_final=100.0, momentums=(0.95, 0.85, 0.95),
    )["lr"]  # fmt: skip
    frozen = combined_cos(0.99, 0.1 / 25, 0.1, 0.1 / 100)
    for step in (0, 500, 990, 995, 999):
        expected = float(frozen(step / 1000))
        assert rates(step / 3000) == pytest.approx([expected / 10, expected], rel=1e-4), step
    unfrozen = combined_cos(0.3, 0.05 / 5, 0.05, 0.05 / 100)
    for step in (0, 600, 1500, 1999):
        expected = float(unfrozen(step / 2000))
        actual = rates((1000 + step) / 3000)
        assert actual == pytest.approx([expected / 20, expected], rel=1e-4), step
