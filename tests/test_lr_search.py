import pytest

from mixmo_fastai.lr_search import LrSearch

RATES = [10.0 ** (power / 4 - 5) for power in range(24)]


def search(losses, slide):
    names = ("valley", "steep", "minimum")
    return LrSearch(RATES, losses, {**dict.fromkeys(names, 1e-3), "slide": slide})


def test_one_rate_is_advised():
    losses = [2.3] * 8 + [2.3 - 0.1 * step for step in range(12)] + [2.0, 3.0, 5.0, 9.0]
    lowest = RATES[19]
    assert search(losses, 0.0123).advised == 0.012  # two digits
    assert search(losses, 5.0).advised == pytest.approx(lowest, rel=0.05)  # not where it rises


def test_an_easy_first_batch_is_not_the_lowest_loss():
    losses = [1.0, 2.0] + [2.3] * 6 + [2.3 - 0.1 * step for step in range(16)]
    assert search(losses, 0.01).advised == 0.01


@pytest.mark.parametrize("fall", [0.0, 0.02])
def test_no_rate_is_advised_if_the_loss_hardly_falls(fall):
    assert search([2.3] * 12 + [2.3 - fall] + [2.3] * 11, 0.01).advised is None
