import dataclasses
import subprocess
import sys
from pkgutil import resolve_name
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_summary import draw_logits

from mixmo_fastai.cli import render
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics import bootstrap, summary
from mixmo_fastai.metrics.summary import MetricInputs, evaluate_logits
from mixmo_fastai.metrics.table import (
    COVERAGES,
    DECIMAL,
    INPUTS,
    LISTED_METRICS,
    MAIN_METRICS,
    METRIC_BY_NAME,
    METRICS,
    MULTI_MEMBER_METRICS,
    NATS,
    PERCENT,
    MetricSpec,
    by_name,
)


def names(metrics):
    return [metric.name for metric in metrics]


def test_every_row_is_computed_and_no_name_occurs_twice():
    found = evaluate_logits(*draw_logits(200, 3, 10, signal=1.0))
    assert len(set(names(METRICS))) == len(METRICS)
    assert [name for name in found if name in names(METRICS)] == names(METRICS)
    for metric in METRICS:
        value = found[metric.name]
        assert isinstance(value, list) == metric.is_per_member
        assert np.size(value) == (3 if metric.is_per_member else 1)


def test_rows_name_the_options_that_their_functions_take():
    risks = [metric for metric in METRICS if metric.options]
    assert names(risks) == [f"risk_at_{coverage}" for coverage in COVERAGES]
    assert [metric.options for metric in risks] == [{"coverage": c / 100} for c in COVERAGES]


@pytest.mark.parametrize("metric", MAIN_METRICS, ids=names(MAIN_METRICS))
@pytest.mark.parametrize("size", [(1, 1, 2), (150, 1, 10), (997, 1, 100)])
def test_a_main_metric_follows_from_its_terms(metric, size):
    member_logits, labels = draw_logits(*size)
    logits = member_logits[:, 0].double()
    terms = metric.compute_terms(logits, labels)
    assert terms.dtype == torch.float64
    assert len(terms) == len(labels)
    means = terms.mean(dim=0)
    expected = means if terms.ndim == 1 else means.abs().sum()
    value = metric.compute(MetricInputs(logits, labels))
    assert value == pytest.approx(expected.item(), rel=1e-12, abs=1e-15)


def test_terms_neither_check_nor_wait():
    """On the meta device, which has no values, any read of a value fails."""
    logits, labels = torch.zeros(4, 5, device="meta"), torch.zeros(4, device="meta").long()
    for name in ("accuracy:accuracy_terms", "calibration:nll_terms", "calibration:brier_terms",
                 "calibration:ece_terms"):  # fmt: skip
        assert len(resolve_name(f"mixmo_fastai.metrics.{name}")(logits, labels)) == 4


def test_groups_of_metrics():
    assert names(MAIN_METRICS) == ["accuracy", "nll", "ece"]
    assert MULTI_MEMBER_METRICS == ("ratio_error", "disagreement", "mutual_information")
    assert set(names(METRICS)) - set(names(LISTED_METRICS)) == {"member_accuracy"}
    assert names(m for m in METRICS if m.after_scaling) == ["nll", "brier", "ece"]
    assert names(m for m in METRICS if m.at_optimum) == ["nll", "ece"]
    corrupted = {m.corrupted_name: m.name for m in METRICS if m.corrupted_name}
    assert corrupted == {"cA": "accuracy", "cNLL": "nll", "cECE": "ece"}


def test_titles_begin_with_a_capital_letter():
    titles = {metric.name: metric.title for metric in METRICS}
    assert titles["accuracy"] == "Accuracy"
    assert titles["nll"] == "NLL"
    assert titles["failure_auroc"] == "Failure AUROC"
    assert titles["risk_at_80"] == "Risk at 80 %"


@pytest.mark.parametrize(
    ("number_format", "value", "difference"),
    [(PERCENT, "1.25 %", "+1.25 points"), (DECIMAL, "0.0125", "+0.0125"),
     (NATS, "0.0125 nats", "+0.0125 nats")],
)  # fmt: skip
def test_formats(number_format, value, difference):
    assert number_format.value(0.0125) == value
    assert number_format.difference(0.0125) == difference
    assert number_format.difference(-0.0125) == difference.replace("+", "-")


def spec(**fields):
    return MetricSpec(
        "new", "new", "a new one", DECIMAL, "mixmo_fastai.metrics.calibration:nll", **fields
    )


def test_an_unknown_argument_is_refused():
    with pytest.raises(InputError, match="arguments of the metric 'new' must be among") as raised:
        spec(arguments=("logits", "targets"))
    assert "got 'targets'" in str(raised.value)
    assert all(name in str(raised.value) for name in INPUTS)


@pytest.mark.parametrize(
    "field", [{"terms": "a:b"}, {"after_scaling": True}, {"at_optimum": True},
              {"corrupted_name": "cNew"}],
)  # fmt: skip
def test_metrics_of_the_ensemble_alone_cannot_take_member_logits(field):
    spec(**field)
    with pytest.raises(InputError, match=r"must be among logits, .*got 'member_logits'"):
        spec(arguments=("member_logits", "labels"), **field)


def test_a_metric_that_compares_members_is_undefined_for_one_whatever_its_function_does():
    member_logits, labels = draw_logits(20, 1, 4)
    metric = spec(compares_members=True)
    with pytest.raises(InputError, match="new compares members and needs at least two; got 1"):
        metric.compute(MetricInputs(member_logits[:, 0], labels, member_logits))
    member_logits, labels = draw_logits(20, 2, 4)
    inputs = MetricInputs(member_logits.mean(dim=1), labels, member_logits)
    assert metric.compute(inputs) == spec().compute(inputs)


def test_a_metric_with_terms_has_intervals_and_is_compared(monkeypatch):
    with_terms = dataclasses.replace(
        METRIC_BY_NAME["brier"], terms="mixmo_fastai.metrics.calibration:brier_terms"
    )
    for module in (bootstrap, render):
        monkeypatch.setattr(module, "MAIN_METRICS", (*MAIN_METRICS, with_terms))
    member_logits, labels = draw_logits(300, 2, 6, signal=1.0)
    first, second = (2.0**i * member_logits for i in range(2))
    means = [logits.double().mean(dim=1) for logits in (first, second)]
    differences = bootstrap.paired_intervals(*means, labels)
    compared = [
        SimpleNamespace(
            run=SimpleNamespace(path=f"run-{number}"), recipe=Recipe(), parameters=1,
            images_seen=None, seconds=None, metrics=evaluate_logits(logits, labels),
            intervals=bootstrap.intervals(mean, labels),
            differences=differences if number else None,
        )
        for number, (logits, mean) in enumerate(zip((first, second), means, strict=True))
    ]  # fmt: skip
    values = [each.metrics["brier"] for each in compared]
    for each, value in zip(compared, values, strict=True):
        low, high = each.intervals["brier"]
        assert low < value < high
        assert list(each.intervals) == ["accuracy", "nll", "ece", "brier"]
    low, high = differences["brier"]
    assert low < values[1] - values[0] < high
    lines = render.comparison_lines(compared)
    assert lines[0].split()[:5] == ["run", "accuracy", "NLL", "ECE", "Brier"]
    assert lines[1].split()[6] == f"{values[0]:.4f}"
    assert differences["accuracy"] == (0, 0)  # larger logits leave the predictions as they are
    assert lines[-1] == "    Both are right on the same images, so resampling shows no spread."
    assert lines[-2].split() == [
        *("Brier", f"{values[1] - values[0]:+.4f}"),
        *(f"({low:+.4f}", "to", f"{high:+.4f})"),
    ]


def test_reading_the_table_needs_neither_torch_nor_numpy():
    program = (
        "import sys, mixmo_fastai.metrics.table;"
        "sys.exit(bool({'torch', 'numpy', 'fastai'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def failing_metric(logits, labels):
    return logits[labels.unknown]


def vector_metric(logits, labels):
    return logits.mean(dim=1)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (failing_metric, "failing_metric failed with AttributeError: 'Tensor' object"),
        (lambda logits, labels: logits[:3, 0], "one row per sample, (200,) or (200, Q); got (3,)"),
        (lambda logits, labels: 0.5, "failing_metric failed with TypeError"),
    ],
)
def test_terms_that_fail_do_not_cost_the_other_intervals(monkeypatch, function, reason):
    monkeypatch.setattr(sys.modules[__name__], "failing_metric", function)
    target = f"{__name__}:failing_metric"
    mine = MetricSpec("mine", "mine", "its terms fail", PERCENT, target, terms=target)
    member_logits, labels = draw_logits(200, 1, 10)
    logits = member_logits[:, 0]
    with pytest.raises(InputError) as raised:
        mine.compute_terms(logits, labels)
    assert reason in str(raised.value)
    expected = bootstrap.intervals(logits, labels, num_resamples=50)
    monkeypatch.setattr(bootstrap, "MAIN_METRICS", (mine, *MAIN_METRICS))
    assert bootstrap.intervals(logits, labels, num_resamples=50) == expected


def changing_metric(logits, labels):
    logits -= 5 * logits.amax(dim=1, keepdim=True)
    logits.numpy()[:] *= 3
    return logits.mean()


def test_a_metric_that_changes_its_arguments_does_not_change_the_others(monkeypatch):
    target = f"{__name__}:changing_metric"
    mine = MetricSpec("mine", "mine", "changes the logits", PERCENT, target, terms=target)
    inputs = draw_logits(200, 2, 10)
    expected = evaluate_logits(*inputs)
    monkeypatch.setattr(summary, "METRICS", (mine, *METRICS))
    found = evaluate_logits(*inputs)
    assert found.pop("mine") != 0
    assert found == expected
    logits = inputs[0].mean(dim=1).double()
    before = logits.clone()
    with pytest.raises(InputError):  # a mean, not terms
        mine.compute_terms(logits, inputs[1])
    assert torch.equal(logits, before)


def test_two_metrics_need_two_names():
    assert by_name(METRICS) == {metric.name: metric for metric in METRICS}
    with pytest.raises(InputError, match="two metrics named 'accuracy'"):
        by_name([*METRICS, METRICS[0]])


@pytest.mark.parametrize(
    ("function", "is_per_member", "expected"),
    [
        (failing_metric, False, "failed with AttributeError: 'Tensor' object has no attribute"),
        (vector_metric, False, "must return one number; got ["),
        (lambda logits, labels: None, False, "must return one number; got None"),
        (lambda logits, labels: logits.mean() * torch.nan, False, "returned nan"),
        (lambda logits, labels: logits.mean().abs() / 0, False, "returned inf"),
        (lambda logits, labels: logits.mean(), True, "must return one value per member (M,)"),
    ],
)
def test_a_metric_that_fails_does_not_cost_the_others(
    monkeypatch, function, is_per_member, expected
):
    is_failing = function is failing_metric
    monkeypatch.setattr(sys.modules[__name__], "failing_metric", function)
    mine = MetricSpec(
        "mine",
        "mine",
        "a metric with an error",
        PERCENT,
        f"{__name__}:failing_metric",
        is_per_member=is_per_member,
    )
    monkeypatch.setattr(summary, "METRICS", (*METRICS, mine))
    inputs = draw_logits(200, 2, 10)
    found = evaluate_logits(*inputs)
    reason = found["absent"].pop("mine")
    assert reason.startswith(f"{__name__}:failing_metric {expected}")
    assert ("test_table.py, line" in reason) == is_failing
    monkeypatch.undo()
    assert found.pop("absent") == evaluate_logits(*inputs).pop("absent", {})
    assert "nll" in found
