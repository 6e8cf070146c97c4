"""The section of the report on what to do with predictions."""

from types import SimpleNamespace

import pytest
import torch
from synthetic import draw_labels

from mixmo_fastai.evaluation.calibration import calibrate, summary
from mixmo_fastai.metrics.conformal import set_metrics
from mixmo_fastai.report.decisions import (
    class_rows,
    decision_data,
    notes,
    threshold_chart,
)


def draw(num_images, seed, margin=3.0):
    generator = torch.Generator().manual_seed(seed)
    true = margin * torch.randn(num_images, 1, 4, generator=generator, dtype=torch.float64)
    labels = draw_labels(true[:, 0].softmax(dim=1), generator)
    return 2 * true.expand(-1, 2, -1), labels


class Images:
    """Images whose pixels are their index."""

    def __getitem__(self, index):
        return torch.full((3, 2, 2), index % 256, dtype=torch.uint8)

    def name(self, index):
        return f"test/{index}"


FINISHED = SimpleNamespace(
    source=SimpleNamespace(classes=("ant", "bee", "cat", "dog")), final_images=Images()
)


def decide(num_calibration=1000, margin=3.0):
    logits, labels = draw(num_calibration, 10, margin)
    calibration = calibrate(logits, labels, ["x"] * num_calibration)
    new_logits, new_labels = draw(500, 1, margin)
    return calibration, decision_data(calibration, FINISHED, new_logits, new_labels)


def test_notes_state_what_was_measured():
    calibration, data = decide()
    lines = notes(data, summary(calibration))
    assert len(lines) == 4
    assert f"temperature {calibration.scaling.temperature:.3f}, from 1,000 images" in lines[0]
    accepted = data.confidence >= data.abstain.threshold
    risk = 100 * (~data.correct[accepted]).double().mean()
    assert f"accepts {100 * accepted.double().mean():.2f} %, of which {risk:.2f} % are" in lines[1]
    found = set_metrics(data.sets, data.labels)
    assert f"label of {100 * found['coverage']:.2f} %" in lines[2]
    assert f"{found['mean_size']:.2f} classes on average" in lines[2]
    assert lines[3].endswith("mixmo predict RUN IMAGES --max-risk 0.05 --coverage 0.9")


def test_few_calibration_images_are_explained():
    calibration, data = decide(8)
    lines = notes(data, summary(calibration))
    assert "not calibrated: temperature scaling needs 50 calibration images" in lines[0]
    assert "No threshold guarantees" in lines[1]
    assert "needs 9 calibration images; there are 8" in lines[2]
    assert data.sets is None
    assert [example.title for example in data.examples] == ["ask"]
    assert "accepts 0.00 %" in threshold_chart(data).plot.alt_text


def test_limit_that_cannot_be_met_gives_way_to_the_next():
    calibration, data = decide(margin=1.3)
    assert not calibration.abstain(0.1).coverage
    assert data.abstain == calibration.abstain(0.2)
    lines = notes(data, summary(calibration))
    assert "that at most 5 % of the accepted" in lines[1]
    assert "The next limit that can be met, 20 %, is shown instead; since it" in lines[1]
    assert "at most 20 % of them are wrong" in lines[2]
    assert "--max-risk 0.2 " in lines[4]
    assert "limit 20 %" in str(threshold_chart(data).svg)
    assert [example.title for example in data.examples][:2] == ["accept", "ask"]


def test_examples_show_each_decision():
    _, data = decide()
    accept, ask, ambiguous = data.examples
    for example, expected in ((accept, True), (ask, False)):
        index = int(example.name.split("/")[1])
        assert (float(data.confidence[index]) >= data.abstain.threshold) == expected
        assert f"probability {100 * data.confidence[index]:.2f} %" in example.text
        assert int(example.pixels[0, 0, 0]) == index % 256
        assert example.label == FINISHED.source.classes[int(data.labels[index])]
    index = int(ambiguous.name.split("/")[1])
    assert int(data.sets[index].sum()) == int(data.sets.sum(dim=1).max()) > 1
    assert ambiguous.text.startswith(f"{int(data.sets[index].sum())} classes: ")


def test_classes_with_the_lowest_coverage_are_first():
    _, data = decide()
    rows = class_rows(data)
    values = [float(row[1].split()[0]) for row in rows]
    assert values == sorted(values)
    assert {row[0] for row in rows} == set(FINISHED.source.classes)
    for name, coverage, size in rows:
        chosen = data.labels == FINISHED.source.classes.index(name)
        contains = data.sets.gather(1, data.labels[:, None])[:, 0][chosen]
        assert float(coverage.split()[0]) == pytest.approx(
            100 * float(contains.double().mean()), abs=0.01
        )
        assert float(size) == pytest.approx(
            float(data.sets[chosen].sum(1).double().mean()), abs=0.01
        )


def test_chart_marks_limit_and_threshold():
    _, data = decide()
    chart = threshold_chart(data)
    svg = str(chart.svg)
    assert "limit 5 %" in svg
    assert "threshold" in svg
    assert chart.title == "Accept or ask"
