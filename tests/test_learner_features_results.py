"""fastai's features for a trained Learner work with MixMo: images, predictions, files, metrics."""

import random
import re

import fastai.vision.learner  # noqa: F401 - draws results and top losses
import numpy as np
import pytest
import torch
from fastai.interpret import ClassificationInterpretation
from fastai.learner import load_learner
from synthetic import CLASSES
from three_learners import (
    accuracy_of,
    copy_weights,
    equal_weights,
    folder,
    hidden_plots,
    make,
    make_learner,
    make_trained,
    trained_weights,
)

from mixmo_fastai import (
    ECE,
    NLL,
    Brier,
    Disagreement,
    MemberAccuracy,
    evaluate_logits,
    member_preds,
    show_pairs,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("hidden_plots")]

# Fixtures.
__all__ = ["folder", "hidden_plots", "make", "make_learner", "make_trained", "trained_weights"]


def test_show_batch(make):
    import matplotlib.pyplot as plt

    learn = make()
    learn.dls.show_batch(max_n=4)
    assert sum(bool(axes.images) for axes in plt.gcf().axes) == 4


def test_show_pairs(make):
    import matplotlib.pyplot as plt

    learn = make()
    show_pairs(learn, max_n=3, title="pairs")
    fig = plt.gcf()
    assert len(fig.axes) == 3 * 5  # image and mask of each member, and the mixture
    names = {axes.get_title().split("\n")[-1] for axes in fig.axes}
    assert names & set(CLASSES)
    assert all(axes.images for axes in fig.axes)


def test_show_pairs_does_not_change_the_learner(make):
    random.seed(0)
    shown = make()
    random.seed(0)
    other = make()
    torch.manual_seed(5)
    before, state = {**vars(shown)}, random_states()
    show_pairs(shown)
    assert random_states() == state
    del before["loss_func"]
    assert before == {name: value for name, value in vars(shown).items() if name in before}
    for learn in (shown, other):
        random.seed(0)
        torch.manual_seed(0)
        learn.fit(1, 1e-2)
    assert equal_weights(copy_weights(shown), copy_weights(other))


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_show_results(make):
    import matplotlib.pyplot as plt

    learn = make()
    learn.show_results(max_n=4)
    titled = [axes.get_title() for axes in plt.gcf().axes if axes.images]
    assert len(titled) == 4
    assert all(set(title.split("\n")) <= set(CLASSES) for title in titled)


def test_get_preds(make):
    learn = make()
    learn.fit(1, 1e-2)
    inputs, probabilities, targets, decoded, losses = learn.get_preds(
        with_input=True, with_decoded=True, with_loss=True
    )
    assert len(inputs) == len(targets) == len(learn.dls.valid_ds)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(targets)))
    expected = learn.model.eval()(inputs)
    torch.testing.assert_close(probabilities, expected.softmax(1).detach(), rtol=1e-3, atol=1e-4)
    assert torch.equal(decoded, probabilities.argmax(1))
    nll = -probabilities.gather(1, targets[:, None].long()).log().squeeze(1)
    torch.testing.assert_close(losses, nll, rtol=1e-3, atol=1e-4)


def test_member_preds(make):
    learn = make()
    learn.fit(1, 1e-2)
    probabilities, targets, votes, information = member_preds(learn)
    inputs, ensemble, ensemble_targets = learn.get_preds(with_input=True)
    assert torch.equal(targets, torch.Tensor(ensemble_targets))
    expected = learn.model.eval().member_logits(inputs).softmax(2).detach()
    torch.testing.assert_close(probabilities, torch.Tensor(expected), rtol=1e-3, atol=1e-4)
    assert torch.equal(votes, probabilities.argmax(2))
    ensemble_probabilities = probabilities.log().mean(1).softmax(1)
    torch.testing.assert_close(ensemble_probabilities, torch.Tensor(ensemble), rtol=1e-3, atol=1e-4)
    assert information.shape == targets.shape


def test_predict(make_trained):
    learn = make_trained()
    learn.fit(1, 1e-3)
    dataset = learn.dls.valid_ds
    item = learn.dls.valid.items[0] if hasattr(learn.dls.valid, "items") else dataset[0][0]
    name, index, probabilities = learn.predict(item)
    assert name in CLASSES
    assert int(index) == [*learn.dls.vocab].index(name) == int(probabilities.argmax())
    torch.testing.assert_close(probabilities, learn.get_preds()[0][0], rtol=1e-2, atol=1e-2)


def test_tta(make_trained):
    learn = make_trained()
    learn.fit(1, 1e-3)
    (augmented, plain), targets = learn.tta(n=2, beta=None)
    torch.testing.assert_close(plain, learn.get_preds()[0])
    torch.testing.assert_close(augmented.sum(1), torch.ones(len(targets)))
    assert (augmented.argmax(1) == targets).float().mean() > 0.8  # of 9 images


def test_classification_interpretation(make_trained):
    import matplotlib.pyplot as plt

    learn = make_trained()
    learn.fit(1, 1e-3)
    interpretation = ClassificationInterpretation.from_learner(learn)
    matrix = interpretation.confusion_matrix()
    assert matrix.sum() == len(learn.dls.valid_ds)
    assert np.trace(matrix) / matrix.sum() == pytest.approx(accuracy_of(learn))
    interpretation.plot_confusion_matrix()
    interpretation.plot_top_losses(4)
    assert sum(bool(axes.images) for axes in plt.gcf().axes) == 4
    interpretation.print_classification_report()


@pytest.mark.filterwarnings("ignore:load_learner")
def test_export_and_load_learner(make, tmp_path):
    learn = make()
    learn.fit(1, 1e-2)
    expected = learn.get_preds()[0]
    x, _ = learn.dls.valid.one_batch()
    learn.export("learner.pkl")
    loaded = load_learner(tmp_path / "learner.pkl")
    torch.testing.assert_close(loaded.model.eval()(x).softmax(1), expected[: len(x)])
    assert loaded.mix_mo.mix == "cutmix"


def test_save_and_load(make):
    learn = make()
    learn.fit(1, 1e-2)
    before = copy_weights(learn)
    learn.save("stage-1")
    learn.fit(1, 1e-2)
    learn.load("stage-1")
    assert equal_weights(copy_weights(learn), before)


def test_train_metrics(make_trained):
    """Training metrics average over the members, each with its own images."""
    learn = make_trained()
    learn.recorder.train_metrics = True
    learn.fit(1, 1e-3)
    names, row = learn.recorder.metric_names, learn.recorder.values[-1]
    metrics = dict(zip(names[1:], row, strict=False))
    assert 0.4 < metrics["train_accuracy"] <= 1
    assert metrics["valid_accuracy"] > 0.7
    assert metrics.get("train_member_accuracy", metrics["train_accuracy"]) == pytest.approx(
        metrics["train_accuracy"]
    )


@pytest.mark.filterwarnings("ignore:load_learner")
def test_nll_brier_ece_member_accuracy_and_disagreement(make, tmp_path):
    """They are those of `evaluate_logits`, after a fit, an lr_find and in an exported Learner."""
    learn = make()
    learn.metrics = [NLL(), Brier(), ECE(), MemberAccuracy(), Disagreement()]
    learn.lr_find(num_it=5, show_plot=False)
    learn.fit_one_cycle(1, 0.05)
    assert list(learn.recorder.metric_names[3:8]) == [
        *("nll", "brier", "ece", "member_accuracy", "disagreement")
    ]
    learn.model.eval()
    with torch.no_grad():
        batches = [(learn.model.member_logits(x), y) for x, y in learn.dls.valid]
    logits, labels = (
        torch.cat(parts).as_subclass(torch.Tensor) for parts in zip(*batches, strict=True)
    )
    expected = evaluate_logits(logits, labels)
    expected["member_accuracy"] = sum(expected["member_accuracy"]) / 2
    learn.export("learner.pkl")
    loaded = load_learner(tmp_path / "learner.pkl")
    for values in (
        learn.recorder.values[-1][2:7],
        learn.validate()[1:],
        loaded.validate(dl=learn.dls.valid)[1:],
    ):
        for metric, value in zip(learn.metrics, values, strict=True):
            assert value == pytest.approx(expected[metric.name], rel=1e-5, abs=1e-6), metric.name


def test_summary(make):
    learn = make()
    text = re.sub(r"[,.]", "", learn.summary())
    total = sum(p.numel() for p in learn.model.parameters())
    assert f"Total params: {total}" in text


def test_progress_bars(make_learner, folder, tmp_path, capsys):
    learn = make_learner(folder, tmp_path)
    learn.fit(1, 1e-3)
    output = capsys.readouterr().out
    assert "epoch" in output
    assert "valid_loss" in output
    with learn.no_bar():
        learn.fit(1, 1e-3)
