"""Temperature and vector scaling against independent optimisers."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.scaling import (
    METHODS,
    NUM_FOLDS,
    Scaling,
    cross_scaled,
    ensemble_logits,
    fit_scaling,
    temperature_scaling,
    vector_scaling,
)
from mixmo_fastai.rng import make_generator


def draw(num_images, num_classes=4, seed=0):
    """Draw overconfident logits with a bias towards the first class."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(num_images, num_classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(true.softmax(dim=1), 1, generator=generator)[:, 0]
    return 3 * true + torch.tensor([1.0, 0, 0, 0])[:num_classes], labels


def nll(logits, labels):
    """Return the mean NLL, in NumPy."""
    logits = np.asarray(logits)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=1))
    return float((log_sums - shifted[np.arange(len(logits)), np.asarray(labels)]).mean())


def test_temperature_minimises_the_nll():
    logits, labels = draw(800)
    found = temperature_scaling(logits, labels)
    best = minimize_scalar(
        lambda t: nll(logits / t, labels), bounds=(0.1, 10), options={"xatol": 1e-9}
    )
    assert found.temperature == pytest.approx(best.x, rel=1e-5)
    assert found.bias == ()


def test_vector_scaling_minimises_the_nll():
    """Against Nelder and Mead's method, which uses no gradient."""
    logits, labels = draw(800, num_classes=3)
    found = vector_scaling(logits, labels)
    start = np.array([*found.scale, *found.bias]) + 0.1
    best = minimize(
        lambda p: nll(logits.numpy() * p[:3] + p[3:], labels),
        start,
        method="Nelder-Mead",
        options={"maxiter": 20_000, "maxfev": 20_000, "xatol": 1e-7, "fatol": 1e-12},
    )
    assert nll(found(logits), labels) == pytest.approx(best.fun, abs=1e-6)
    assert nll(found(logits), labels) < nll(temperature_scaling(logits, labels)(logits), labels)
    assert sum(found.bias) == pytest.approx(0, abs=1e-9)
    assert found.temperature is None


@pytest.mark.parametrize("method", METHODS)
def test_scaled_logits_are_scale_times_logits_plus_bias(method):
    logits, labels = draw(200)
    found = fit_scaling(logits, labels, method)
    members = torch.stack([logits, logits.roll(1, 0)], dim=1)  # (N, M, K)
    expected = members.numpy() * np.array(found.scale) + (np.array(found.bias) if found.bias else 0)
    np.testing.assert_allclose(found(members).numpy(), expected, atol=1e-12)
    # The mean of scaled members is the scaled mean.
    torch.testing.assert_close(found(members).mean(dim=1), found(members.mean(dim=1)))


@pytest.mark.parametrize("method", METHODS)
def test_cross_scaling_fits_on_other_images(method):
    logits, labels = draw(203)
    scaled = cross_scaled(logits, labels, method)
    # Changing the label of an image, here to another wrong one, must not change its own scaling.
    wrong = int((logits.argmax(1) != labels).nonzero()[0])
    others = {0, 1, 2, 3} - {int(labels[wrong]), int(logits[wrong].argmax())}
    changed = labels.clone()
    changed[wrong] = min(others)
    again = cross_scaled(logits, changed, method)
    torch.testing.assert_close(again[wrong], scaled[wrong])
    different = (again - scaled).abs().amax(dim=1) > 1e-9
    assert int(different.sum()) == pytest.approx(203 * (1 - 1 / NUM_FOLDS), abs=2)
    assert nll(scaled, labels) < nll(logits, labels)
    assert nll(scaled, labels) > nll(fit_scaling(logits, labels, method)(logits), labels)


def test_each_fifth_is_scaled_by_the_others():
    """The order is fixed, so that the NLL of a stored calibration can be computed again."""
    logits, labels = draw(58)
    order = torch.randperm(58, generator=make_generator(0, "folds")).tolist()
    assert order[:6] == [35, 12, 29, 34, 56, 15]
    wrong = [i for i in order if int(logits[i].argmax()) != int(labels[i])]
    order = [*(i for i in order if i not in wrong), *wrong]
    scaled = cross_scaled(logits, labels)
    for number in range(5):
        others = [i for position, i in enumerate(order) if position % 5 != number]
        fold = order[number::5]
        scaling = fit_scaling(logits[others], labels[others])
        torch.testing.assert_close(scaled[fold], scaling(logits[fold]))


def test_cross_validation_spreads_the_errors():
    """With two errors, each part has at most one, so that the others have a temperature."""
    logits, labels = 4 * torch.eye(3).repeat(100, 1).double(), torch.arange(3).repeat(100)
    labels[[0, 7]] = (labels[[0, 7]] + 1) % 3
    assert cross_scaled(logits, labels).isfinite().all()
    labels[7] = (labels[7] + 2) % 3  # a single error is missing in one part
    with pytest.raises(InputError, match=r"optimal, .* \(in a part of the cross-validation"):
        cross_scaled(logits, labels)


def test_calibrated_logits_are_left_almost_unchanged():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5000, 4, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    assert temperature_scaling(logits, labels).temperature == pytest.approx(1, abs=0.08)


def test_failures_are_explained():
    separated, labels = 10 * torch.eye(3).repeat(5, 1), torch.arange(3).repeat(5)
    for method in METHODS:
        with pytest.raises(InputError, match="all calibration images are classified correctly"):
            fit_scaling(separated, labels, method)
    with pytest.raises(InputError, match="Did you mean 'vector'"):
        fit_scaling(separated, labels, "vektor")
    with pytest.raises(InputError, match="labels"):
        fit_scaling(separated, labels[:3])
    assert Scaling("temperature", (0.5,)).temperature == 2


def test_there_is_one_scaling_per_fifth():
    logits, labels = draw(203)
    factors = (cross_scaled(logits, labels) / logits)[:, 0].round(decimals=9)
    values, counts = factors.unique(return_counts=True)
    assert (len(values), sorted(counts.tolist())) == (5, [40, 40, 41, 41, 41])


def test_scalings_are_built_from_numbers_only():
    values = {"method": "vector", "scale": [1, 2.5], "bias": [0.5, -0.5]}
    assert Scaling.from_mapping(values) == Scaling("vector", (1.0, 2.5), (0.5, -0.5))
    for changes in ({"scale": []}, {"scale": [1, np.nan]}, {"bias": [0, np.inf]}):
        with pytest.raises(ValueError, match="not finite"):
            Scaling.from_mapping(values | changes)
    with pytest.raises(FrozenInstanceError):
        Scaling("temperature", (1.0,)).bias = (1.0,)


def test_ensembles_are_the_scaled_mean_of_the_members():
    members = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))
    mean = members.double().mean(dim=1)
    torch.testing.assert_close(ensemble_logits(members, None), mean)
    scaling = Scaling("vector", (0.5, 1.0, 2.0), (1.0, 0.0, -1.0))
    torch.testing.assert_close(ensemble_logits(members, scaling), scaling(mean))


def test_predictions_worse_than_chance_have_no_scaling():
    with pytest.raises(
        InputError, match=r"no temperature is optimal, since .* no better than chance"
    ):
        temperature_scaling(-torch.eye(5), torch.arange(5))
