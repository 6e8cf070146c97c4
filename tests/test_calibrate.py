"""Calibration on images: what is fitted and stored, and what it promises."""

import json
import math
from dataclasses import replace

import pytest
import torch
from synthetic import draw_labels

from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.data.sources import load_source
from mixmo_fastai.data.splits import split_calibration
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.calibration import (
    calibrate,
    confidences,
    evaluate_promises,
    summary,
)
from mixmo_fastai.evaluation.decisions import Request, decide, decide_for
from mixmo_fastai.export.files import ExportedNetwork
from mixmo_fastai.export.thresholds import ExportedCalibration, exported_thresholds, scale_heads
from mixmo_fastai.metrics.calibration import nll
from mixmo_fastai.metrics.conformal import SCORES
from mixmo_fastai.metrics.diversity import mutual_information_per_sample
from mixmo_fastai.metrics.scaling import Scaling, fit_scaling
from mixmo_fastai.models import create_model
from mixmo_fastai.runs.calibration import (
    CALIBRATION,
    CALIBRATION_IMAGES,
    read_calibration,
    write_calibration,
)
from mixmo_fastai.runs.data_facts import DataFacts
from mixmo_fastai.runs.folder import RunFolder

FACTS = DataFacts(tuple("abcd"), (0.5,), (0.5,), (1, 8, 8))


def draw(num_images, members=2, seed=0, sharpness=3.0):
    """Draw member logits that are overconfident, and labels."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(num_images, 1, 4, generator=generator, dtype=torch.float64)
    labels = draw_labels((2 * true[:, 0]).softmax(dim=1), generator)
    noise = torch.randn(num_images, members, 4, generator=generator, dtype=torch.float64)
    return sharpness * (2 * true + 0.3 * noise), labels


def fit(num_images=400, **options):
    logits, labels = draw(num_images)
    return calibrate(logits, labels, [f"valid/{i}" for i in range(num_images)], **options)


class TestCalibrate:
    def test_scaling_lowers_the_nll_of_other_images(self):
        found = fit()
        logits, labels = draw(4000, seed=1)
        mean = logits.mean(dim=1)
        assert found.reason == ""
        assert found.scaling.temperature == pytest.approx(3, rel=0.2)
        assert nll(found.scaling(mean), labels) < nll(mean, labels)
        # The cross-validated NLL estimates that of new images.
        assert found.effect["after"]["nll"] == pytest.approx(
            float(nll(found.scaling(mean), labels)), abs=0.1
        )
        assert found.effect["after"]["nll"] < found.effect["before"]["nll"]
        assert found.effect["after"]["ece"] < found.effect["before"]["ece"]
        low, high = found.effect["after"]["intervals"]["nll"]
        assert low < found.effect["after"]["nll"] < high

    def test_scores_are_those_of_scaled_probabilities(self):
        logits, labels = draw(400)
        found = fit()
        scaled = found.scaling(logits).mean(dim=1)
        probabilities = scaled.softmax(dim=1)
        for name, score in SCORES.items():
            expected = score(probabilities)[torch.arange(400), labels]
            torch.testing.assert_close(found.label_scores[name], expected)
        assert torch.equal(found.correct, scaled.argmax(dim=1) == labels)
        torch.testing.assert_close(found.confidences["confidence"], probabilities.amax(dim=1))
        entropy = -(probabilities * probabilities.log()).sum(dim=1)
        torch.testing.assert_close(found.confidences["entropy"], -entropy)
        information = mutual_information_per_sample(found.scaling(logits))
        torch.testing.assert_close(found.confidences["mutual-information"], -information)
        assert "mutual-information" not in confidences(logits[:, :1], None)
        torch.testing.assert_close(found.confidences["max-logit"], scaled.amax(dim=1))
        torch.testing.assert_close(found.confidences["energy"], scaled.logsumexp(dim=1))

    def test_familiar_images_reach_the_threshold(self):
        """Of new images of the same source the chosen fraction, within 3 deviations."""
        found, logits = fit(), draw(4000, seed=1)[0]
        for score, values in confidences(logits, found.scaling).items():
            reached = (values >= found.familiar_from(0.9, score)).double().mean().item()
            assert reached == pytest.approx(0.9, abs=3 * (0.09 / 400 + 0.09 / 4000) ** 0.5), score
        unfamiliar = 0.05 * draw(100, seed=2)[0]  # hardly any class stands out
        values = confidences(unfamiliar, found.scaling)["confidence"]
        assert not (values >= found.familiar_from(0.9, "confidence")).any()
        with pytest.raises(InputError, match="need 99 calibration images"):
            calibrate(*draw(50), ["x"] * 50).familiar_from(0.99)
        with pytest.raises(InputError, match="Did you mean 'energy'"):
            found.familiar_from(0.9, "enregy")

    def test_scaling_that_does_not_help_is_left_off(self):
        logits, labels = draw(300, sharpness=1.0)
        temperature = fit_scaling(logits.mean(dim=1), labels).temperature
        calibrated = logits / temperature  # the best temperature of these images is 1
        found = calibrate(calibrated, labels, ["x"] * 300)
        assert found.scaling is None
        assert "does not lower the NLL in cross-validation" in found.reason
        assert summary(found)["method"] == "none"
        few = calibrate(logits[:20], labels[:20], ["x"] * 20)
        assert few.reason == "temperature scaling needs 50 calibration images; there are 20"
        vector = calibrate(logits[:60], labels[:60], ["x"] * 60, "vector")
        assert "100 calibration images per class; a class has" in vector.reason
        assert (
            calibrate(logits, labels, ["x"] * 300, "none").reason == "calibration was not requested"
        )
        all_correct = calibrate(
            10 * torch.eye(4)[:, None].repeat(20, 1, 1), torch.arange(4).repeat(20), ["x"] * 80
        )
        assert "all calibration images are classified correctly" in all_correct.reason
        with pytest.raises(InputError, match="Did you mean 'vector'"):
            calibrate(logits, labels, ["x"] * 300, "vecto")

    def test_vector_scaling_is_an_option(self):
        found = fit(1000, method="vector")
        assert (found.scaling.method, len(found.scaling.scale)) == ("vector", 4)
        assert found.scaling.temperature is None


class TestPromises:
    def test_coverage_and_risk_hold_on_new_images(self):
        """Over 100 draws of the calibration images: the mean coverage, and rare violations."""
        new = draw(2000, seed=10_000)
        coverages, violations = {score: [] for score in SCORES}, 0
        for seed in range(100):
            logits, labels = draw(300, seed=seed)
            found = evaluate_promises(
                calibrate(logits, labels, ["x"] * 300), new, coverage=0.8, max_risk=0.2
            )
            for score in SCORES:
                coverages[score].append(found["sets"][score]["coverage"])
            risk = found["abstention"]["confidence"]["risk"]
            violations += risk is not None and risk > 0.2
        for score, values in coverages.items():
            mean = sum(values) / len(values)
            assert mean > 0.8 - 0.025, score  # 2,000 new images: a deviation of 0.9 points
        assert sum(coverages["lac"]) / 100 == pytest.approx(0.8, abs=0.03)
        assert violations <= 5 + 3 * math.sqrt(100 * 0.05 * 0.95) + 1

    def test_sets_and_abstention_of_one_draw(self):
        found = evaluate_promises(fit(), draw(1000, seed=1), coverage=0.9, max_risk=0.2)
        assert found["sets"]["requested_coverage"] == 0.9
        assert {"lac", "lac-per-class", "raps-per-class"} <= found["sets"].keys()
        assert len(found["sets"]["lac-per-class"]["class_coverage"]) == 4
        accepted = found["abstention"]["confidence"]
        assert accepted["bound"] <= 0.2
        assert accepted["threshold"] < 1
        json.dumps(found, allow_nan=False)

    def test_too_few_images_are_explained(self):
        logits, labels = draw(30)
        found = evaluate_promises(
            calibrate(logits, labels, ["x"] * 30), draw(100), coverage=0.99, max_risk=0.01
        )
        assert found["sets"]["lac"] == {
            "absent": "A coverage of 0.99 needs 99 calibration images; there are 30."
        }
        assert found["abstention"]["confidence"]["risk"] is None
        assert found["abstention"]["confidence"]["threshold"] is None
        json.dumps(found, allow_nan=False)


class TestFiles:
    @pytest.mark.parametrize("method", ["temperature", "vector", "none"])
    def test_stored_calibrations_are_read_back(self, tmp_path, method):
        run, written = RunFolder(tmp_path), fit(1000, method=method)
        assert read_calibration(run) is None
        write_calibration(run, written)
        found = read_calibration(run)
        assert (found.scaling, found.reason, found.names) == (
            written.scaling,
            written.reason,
            written.names,
        )
        for name in SCORES:
            assert torch.equal(found.label_scores[name], written.label_scores[name])
        assert found.sets(0.9) == written.sets(0.9)
        assert found.abstain(0.2, "entropy") == written.abstain(0.2, "entropy")
        assert json.loads((tmp_path / CALIBRATION).read_text())["images"][3] == "valid/3"

    def test_file_of_earlier_scores_has_no_sets_by_them(self):
        entry = exported_thresholds(fit(), in_logits=True)
        assert ExportedCalibration(entry, 4).sets(0.9, "raps").thresholds
        old = {name: value for name, value in entry.items() if name != "scores"}
        assert ExportedCalibration(old, 4).sets(0.9, "lac").thresholds
        for name in ("aps", "raps"):
            with pytest.raises(InputError, match=f"no thresholds for the score '{name}'"):
                ExportedCalibration(old, 4).sets(0.9, name)

    def test_calibration_is_described_in_a_line(self):
        found = fit()
        assert found.temperature == found.scaling.temperature
        text = f"temperature {found.temperature:.4f}, 400 images, 4 classes"
        assert repr(found) == f"<Calibration: {text}>"
        assert "no scaling" in repr(replace(found, scaling=None))

    def test_damage_is_explained(self, tmp_path):
        run = RunFolder(tmp_path)
        write_calibration(run, fit())
        whole, tensors = (
            (tmp_path / name).read_bytes() for name in (CALIBRATION, CALIBRATION_IMAGES)
        )
        for name, content in (
            (CALIBRATION, b"{"),
            (CALIBRATION, whole.replace(b'"scaling"', b'"scalin"')),
            (CALIBRATION, whole.replace(b'"valid/3",', b"")),
            (CALIBRATION, whole.replace(b'"format": 2', b'"format": 1')),
            (CALIBRATION, whole.replace(b'"sha256": "', b'"sha256": "0')),
            (CALIBRATION_IMAGES, tensors[:50]),
            (CALIBRATION_IMAGES, None),
        ):
            write_calibration(run, fit())
            if content is None:
                (tmp_path / name).unlink()
            else:
                assert content != (tmp_path / name).read_bytes()
                (tmp_path / name).write_bytes(content)
            with pytest.raises(
                InputError, match=r"Write (them|it) again: mixmo calibrate"
            ) as error:
                read_calibration(run)
            assert len(str(error.value).splitlines()) == 2


class TestDecisions:
    def test_requests_without_calibration_are_refused(self):
        assert decide(Request(), None, "RUN").note.startswith(
            "The probabilities are not calibrated"
        )
        assert decide(Request(raw=True), None, "RUN").note == ""
        for request in (Request(coverage=0.9), Request(max_risk=0.1)):
            with pytest.raises(InputError, match="mixmo calibrate RUN"):
                decide(request, None, "RUN")

    def test_reasons_and_missing_thresholds_are_explained(self):
        found = decide(Request(max_risk=0.001), fit(), "RUN")
        assert "No prediction is accepted" in found.note
        assert "Even without errors it takes" in found.note
        assert not found.accepted(draw(20)[0]).any()
        many = decide(
            Request(max_risk=0.05), replace(fit(), correct=torch.zeros(400).bool()), "RUN"
        )
        assert "wrong too often with high confidence" in many.note
        both = decide(Request(max_risk=0.001), fit(method="none"), "RUN").note.splitlines()
        assert both[0].startswith("No prediction is accepted")
        assert both[-1].startswith("The probabilities are not calibrated")
        plain = decide(Request(), fit(method="none"), "RUN")
        assert plain.note == "The probabilities are not calibrated: calibration was not requested."
        one = replace(fit(), confidences={})
        with pytest.raises(InputError, match="needs several members"):
            decide(Request(max_risk=0.1, risk_score="mutual-information"), one, "RUN")
        with pytest.raises(InputError, match="Did you mean 'entropy'"):
            decide(Request(max_risk=0.1, risk_score="entrop"), fit(), "RUN")

    def test_the_requested_score_decides(self):
        calibration, (logits, _) = fit(), draw(200, seed=3)
        by_score = {
            score: decide(Request(max_risk=0.3, risk_score=score), calibration, "RUN")
            for score in ("confidence", "entropy")
        }
        for score, found in by_score.items():
            values = confidences(logits, calibration.scaling)[score]
            assert torch.equal(found.accepted(logits), values >= found.abstain.threshold)
            assert 0 < int(found.accepted(logits).sum()) < 200


@pytest.mark.parametrize("in_logits", [True, False])
def test_exported_network_without_scaling_says_so(in_logits):
    entry = exported_thresholds(fit(1000, method="none"), in_logits=in_logits)
    network = ExportedNetwork(torch.nn.Identity(), "x", FACTS, ExportedCalibration(entry, 4))
    text = "The probabilities are not calibrated."
    assert decide_for(Request(), network, "net.onnx").note == text
    assert decide_for(Request(max_risk=0.01), network, "net.onnx").note.endswith(f"\n{text}")
    assert decide_for(Request(raw=True), network, "net.onnx").note == ""


@pytest.mark.parametrize("method", ["temperature", "vector"])
@pytest.mark.parametrize("in_logits", [True, False])
def test_exported_thresholds_decide_as_the_run(method, in_logits):
    """The file of a network with or without scaled logits gives the same decisions."""
    calibration, (logits, _) = fit(1000, method=method), draw(300, members=1, seed=4)
    entry = json.loads(
        json.dumps(exported_thresholds(calibration, in_logits=in_logits), allow_nan=False)
    )
    network = ExportedNetwork(torch.nn.Identity(), "x", FACTS, ExportedCalibration(entry, 4))
    exported_logits = calibration.scaling(logits) if in_logits else logits
    for request in (
        Request(coverage=0.9),
        Request(coverage=0.8, set_score="aps", per_class=True),
        Request(max_risk=0.2),
        Request(max_risk=0.2, risk_score="entropy"),
        Request(familiar=0.9),
        Request(raw=True),
        Request(max_risk=0.01),
    ):
        expected = decide(request, calibration, "RUN")
        found = decide_for(request, network, "net.onnx")
        torch.testing.assert_close(
            found.shown_logits(exported_logits).softmax(2), expected.shown_logits(logits).softmax(2)
        )
        for name in ("set_members", "accepted", "familiar"):
            first, second = (
                getattr(each, name)(values)
                for each, values in ((expected, logits), (found, exported_logits))
            )
            assert first is second is None or torch.equal(first, second), (request, name)
    mixed = Request(coverage=0.9, raw=True)
    for call in (lambda: decide(mixed, calibration, "RUN"), lambda: decide_for(mixed, network, "")):
        if method == "temperature":
            assert call().sets is not None
        else:
            with pytest.raises(InputError, match="--raw shows other classes than"):
                call()
    with pytest.raises(InputError, match="export it again"):
        decide_for(Request(coverage=0.9), replace(network, calibration=None), "net.onnx")


@pytest.mark.parametrize(
    "scaling",
    [Scaling("temperature", (0.5,)), Scaling("vector", (0.5, 2.0, 1.0), (0.1, -0.3, 0.2))],
)
def test_scaled_heads_give_scaled_logits(scaling):
    model = create_model("wrn10_1", 3, generator=torch.Generator().manual_seed(0)).eval()
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = scaling(model(images))
        scale_heads(model, scaling)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.fuse()(images), expected, rtol=1e-4, atol=1e-4)


def test_split_of_the_validation_images():
    images = load_source("digits").train
    for fraction in (None, 1.0):
        assert split_calibration(images, fraction) == (images, None)
    selection, calibration = split_calibration(images, 0.5)
    names = [{part.name(i) for i in range(len(part))} for part in (selection, calibration)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == len(images)
    counts = [part.labels.bincount() for part in (selection, calibration)]
    assert bool(((counts[0] - counts[1]).abs() <= 1).all())
    assert len(split_calibration(images, 0.0)[1]) == 0
    with pytest.raises(InputError, match="calibration_split=1 leaves no validation images"):
        resolve_recipe("digits", assignments=["train.select=best", "data.calibration_split=1"])
