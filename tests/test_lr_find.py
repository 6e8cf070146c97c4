import random

import pytest

from mixmo_fastai.cli import lr_find, run
from mixmo_fastai.training.lr_find import LrSearch

RATES = [10.0 ** (power / 4 - 5) for power in range(24)]


def search(losses, slide):
    names = ("valley", "steep", "minimum")
    return LrSearch(RATES, losses, {**dict.fromkeys(names, 1e-3), "slide": slide})


def test_slide_is_recommended_up_to_the_lowest_loss():
    losses = [2.3] * 8 + [2.3 - 0.1 * step for step in range(12)] + [2.0, 3.0, 5.0, 9.0]
    rate_of_lowest_loss = RATES[19]
    assert search(losses, 0.0123).recommended == 0.012  # rounded to two digits
    assert search(losses, 5.0).recommended == pytest.approx(rate_of_lowest_loss, rel=0.05)


def test_too_small_rates_are_not_recommended():
    """With few steps, `slide` may lie in the first quarter, where the rates are too small."""
    losses = [2.3] * 8 + [2.3 - 0.1 * step for step in range(16)]
    assert search(losses, RATES[5]).recommended == 1e-3  # that of `valley`
    too_small = dict.fromkeys(("valley", "slide", "steep", "minimum"), RATES[3])
    assert LrSearch(RATES, losses, too_small).recommended is None


def test_slide_below_the_cautious_valley_is_not_recommended():
    losses = [2.3] * 8 + [2.3 - 0.1 * step for step in range(16)]
    assert search(losses, RATES[7]).recommended == 1e-3


def test_easy_first_batch_is_ignored():
    losses = [1.0, 2.0] + [2.3] * 6 + [2.3 - 0.1 * step for step in range(16)]
    assert search(losses, 0.01).recommended == 0.01


@pytest.mark.parametrize("decrease", [0.0, 0.02])
def test_no_rate_is_recommended_if_the_loss_hardly_decreases(decrease):
    assert search([2.3] * 12 + [2.3 - decrease] + [2.3] * 11, 0.01).recommended is None


def noisy_search(decrease, noise, num_steps=100):
    """Return a search whose loss decreases in its second half, smoothed as in fastai."""
    random_numbers, average, losses = random.Random(0), 0.0, []
    for step in range(num_steps):
        progress = max(0.0, 2 * step / num_steps - 1)
        average = 0.98 * average + 0.02 * (
            2.5 - decrease * progress + random_numbers.gauss(0, noise)
        )
        losses.append(average / (1 - 0.98 ** (step + 1)))
    rates = [10.0 ** (7 * step / num_steps - 6) for step in range(num_steps)]
    names = ("valley", "slide", "steep", "minimum")
    return LrSearch(rates, losses, dict.fromkeys(names, 0.1))


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.5])
def test_noise_is_estimated_per_step(noise):
    assert noisy_search(1.0, noise, 2000).noise == pytest.approx(noise, rel=0.15)


def test_outlier_does_not_count_as_noise():
    losses = [1.0] + [2.3] * 23
    assert search(losses, 0.01).noise < 0.2


def test_curve_within_the_noise_is_flat():
    flat = noisy_search(0.3, 0.2)
    assert flat.start - flat.lowest > 0.03  # more than 1 % of the loss
    assert flat.is_flat
    assert flat.recommended is None
    steep = noisy_search(1.5, 0.1)
    assert not steep.is_flat
    assert steep.recommended == 0.1


def test_the_printed_command_has_the_advised_rate_only(monkeypatch, tmp_path, capsys):
    losses = [2.3] * 8 + [2.3 - 0.1 * step for step in range(16)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lr_find, "_search", lambda *_, **__: search(losses, 0.0123))
    assert run(["lr-find", "digits", "--set", "optimizer.lr = 0.3", "--quiet"]) == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert command.endswith("--lr 0.012")
    assert "optimizer" not in command
