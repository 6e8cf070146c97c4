"""The section `[loss]` of a recipe: its losses, weights of classes, checks, and trainings."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat
from small_data import write_image_folder
from synthetic import fastai_dls
from torch import nn

from mixmo_fastai.cli import run as program
from mixmo_fastai.config import choices
from mixmo_fastai.config.recipe import Loss, Recipe
from mixmo_fastai.config.resolve import changed_settings, resolve_recipe
from mixmo_fastai.data.dataloaders import make_dataloaders
from mixmo_fastai.data.sources import load_source
from mixmo_fastai.errors import InputError
from mixmo_fastai.learner.build import learner_from_recipe
from mixmo_fastai.learner.losses import FocalLoss, balanced_weights, focal, loss_from_recipe
from mixmo_fastai.mixing.loss import MixMoLoss
from mixmo_fastai.training.identity import comparable

LABELS = torch.tensor([0] * 6 + [1] * 2 + [2] * 4)


def weights_of_labels():
    return balanced_weights(LABELS, 3)


def oracle(logits, labels, *, smoothing=0.0, weights=None, gamma=0.0):
    """Compute the mean loss of a batch with loops, as in the papers."""
    total = divisor = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        probabilities = np.exp(row) / np.exp(row).sum()
        weight = [1.0] * len(row) if weights is None else weights
        targets = [smoothing / len(row) + (1 - smoothing) * (k == label) for k in range(len(row))]
        losses = [-weight[k] * targets[k] * np.log(p) for k, p in enumerate(probabilities)]
        total += (1 - probabilities[label]) ** gamma * sum(losses)
        divisor += 1 if gamma else weight[label]  # the focal loss is averaged over images
    return total / divisor


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        (Loss(), {}),
        (Loss(label_smoothing=0.1), {"smoothing": 0.1}),
        (Loss(class_weights="balanced"), {"weights": [2 / 3, 2, 1]}),
        (
            Loss(label_smoothing=0.2, class_weights="balanced"),
            {"smoothing": 0.2, "weights": [2 / 3, 2, 1]},
        ),
        (Loss("focal"), {"gamma": 2}),
        (Loss("focal", options={"gamma": 0.5}), {"gamma": 0.5}),
        (Loss("focal", class_weights="balanced"), {"gamma": 2, "weights": [2 / 3, 2, 1]}),
    ],
)
def test_losses_equal_an_oracle(settings, terms):
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 1, 0])
    loss = MixMoLoss(loss_from_recipe(settings, weights_of_labels)).to(torch.float64)
    expected = oracle(logits, labels, **terms)
    assert loss(logits, labels).item() == pytest.approx(expected)
    members = torch.stack([logits, logits], dim=1)  # (B, M, K): two equal members
    pairs, weights = torch.stack([labels, labels], dim=1), torch.ones(5, 2, dtype=torch.float64)
    assert loss(members, pairs, weights).item() == pytest.approx(2 * expected)
    torch.testing.assert_close(loss.activation(logits), logits.softmax(dim=1))


def test_focal_loss_without_weights_equals_that_of_fastai():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 1, 0])
    for gamma in (0.0, 0.7, 2.0):
        torch.testing.assert_close(
            focal(gamma=gamma)(logits, labels), FocalLossFlat(gamma=gamma)(logits, labels)
        )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_has_finite_gradients_for_certain_predictions(gamma):
    logits = torch.tensor([[60.0, 0.0], [0.0, 60.0], [1.0, 1.0]], requires_grad=True)
    focal(gamma=gamma)(logits, torch.tensor([0, 0, 1])).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[2].abs().min() > 0


@pytest.mark.parametrize("name", choices.LOSSES)
def test_weights_are_on_the_device_of_the_loss(name):
    loss = MixMoLoss(loss_from_recipe(Loss(name, class_weights="balanced"), weights_of_labels))
    logits, labels = torch.zeros(4, 3, device="meta"), torch.zeros(4, device="meta").long()
    assert loss.to("meta")(logits, labels).device.type == "meta"


def test_classes_are_weighted_in_both_targets_of_mixed_images():
    """The divisor of the mean counts each target with its part of the image."""
    logits = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets, pasted = torch.randint(3, (2, 6, 2), generator=torch.Generator().manual_seed(1))
    own = torch.rand(6, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = torch.tensor([1.0, 9.0, 3.0], dtype=torch.float64)
    loss = MixMoLoss(nn.CrossEntropyLoss(weight=weights))
    found = loss(logits, targets, torch.ones_like(own), pasted, own)
    total = divisor = 0.0
    for b in range(6):
        for i in range(2):
            for label, part in ((targets[b, i], own[b, i]), (pasted[b, i], 1 - own[b, i])):
                total -= part * weights[label] * logits[b, i].log_softmax(dim=0)[label]
                divisor += part * weights[label]
    assert found.item() == pytest.approx((total / (divisor / 2)).item())  # a sum over two members
    unweighted = MixMoLoss(nn.CrossEntropyLoss())
    assert torch.equal(
        unweighted(logits, targets, torch.ones_like(own), targets, torch.ones_like(own)),
        unweighted(logits, targets, torch.ones_like(own)),
    )


def test_balanced_weights():
    weights = balanced_weights(LABELS, 3)
    assert weights.tolist() == pytest.approx([12 / 18, 2, 1])
    assert weights[LABELS].mean().item() == pytest.approx(1)
    for label in range(3):  # all classes have the same total weight
        assert weights[LABELS][label == LABELS].sum().item() == pytest.approx(4)
    assert balanced_weights(torch.tensor([0, 0, 2]), 3).tolist() == pytest.approx([0.5, 0, 1])


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["loss.name=focl"], r"loss\.name is 'focl'\. Did you mean 'focal'"),
        (["loss.label_smoothing=1"], r"loss\.label_smoothing is 1.*at most 0\.99"),
        (["loss.class_weights=balnced"], "Did you mean 'balanced'"),
        (["loss.options.gamma=2"], "for losses other than cross-entropy"),
        (["loss.name=focal", "loss.label_smoothing=0.1"], "is a setting of cross-entropy"),
        (["train.label_smoothing=0.1"], r"Did you mean 'loss\.label_smoothing'"),
    ],
)
def test_wrong_settings_are_refused(assignments, message):
    with pytest.raises(InputError, match=message):
        resolve_recipe("digits", assignments=assignments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gama": 1}, "'gama'.*Did you mean 'gamma'"),
        ({"gamma": "a"}, "gamma must be 0 or more; got 'a'"),
        ({"gamma": -1}, "gamma must be 0 or more; got -1"),
        ({"weight": 1}, "weight"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        loss_from_recipe(Loss("focal", options=options), weights_of_labels)


def square(scale=1.0):
    return lambda pred, targets: scale * nn.functional.cross_entropy(pred, targets) ** 2


def rejected():
    raise RuntimeError("no such thing")


def nothing():
    pass


def test_registered_losses(monkeypatch):
    monkeypatch.setitem(choices.LOSSES, "square", f"{__name__}:square")
    monkeypatch.setitem(choices.LOSSES, "rejected", f"{__name__}:rejected")
    monkeypatch.setitem(choices.LOSSES, "absent", "mixmo_fastai.absent:name")
    monkeypatch.setitem(choices.LOSSES, "nothing", f"{__name__}:nothing")
    monkeypatch.setitem(choices.LOSSES, "pi", "math:pi")
    recipe = resolve_recipe("digits", assignments=["loss.name=square", "loss.options.scale=3.0"])
    logits, labels = torch.zeros(4, 10), torch.arange(4)
    loss = loss_from_recipe(recipe.loss, weights_of_labels)
    assert loss(logits, labels).item() == pytest.approx(3 * np.log(10) ** 2)
    for settings, message in (
        (Loss("square", class_weights="balanced"), r"has no weights of classes"),
        (Loss("rejected"), r"rejects its options: RuntimeError: no such thing"),
        (Loss("absent"), "The loss 'absent' is registered as"),
        (Loss("nothing"), "must return a loss of logits and classes; it returned None"),
        (Loss("pi"), r"must be a function; got 3\.14"),
    ):
        with pytest.raises(InputError, match=message):
            loss_from_recipe(settings, weights_of_labels)


def small_learner(loss, num_images=48):
    recipe = resolve_recipe("digits", None, {"model.arch": "wrn10_1", "train.batch_size": 16})
    recipe = dataclasses.replace(recipe, loss=loss)
    dls = make_dataloaders(
        load_source("digits"), batch_size=4, valid_split=0.1, limit=num_images, device="cpu"
    )
    return learner_from_recipe(recipe, dls)


def test_learner_of_a_recipe_has_its_loss():
    assert isinstance(small_learner(Loss()).loss_func.base, CrossEntropyLossFlat)  # of the data
    learn = small_learner(Loss(class_weights="balanced", label_smoothing=0.1))
    labels = learn.dls.train.images.labels
    torch.testing.assert_close(learn.loss_func.base.weight, balanced_weights(labels, 10))
    assert learn.loss_func.base.label_smoothing == 0.1
    assert isinstance(small_learner(Loss("focal")).loss_func.base, FocalLoss)


def test_loaders_of_fastai_have_no_weights_of_classes():
    recipe = Recipe(model=dataclasses.replace(Recipe().model, arch="wrn10_1"))
    learner_from_recipe(recipe, fastai_dls())
    weighted = dataclasses.replace(recipe, loss=Loss(class_weights="balanced"))
    with pytest.raises(InputError, match=r"class_weights needs the loaders of make_dataloaders"):
        learner_from_recipe(weighted, fastai_dls())


def test_the_published_accuracy_is_that_of_the_published_loss():
    recipe = resolve_recipe("cifar10", "cifar10/cut-mixmo")
    assert changed_settings(recipe) == []
    assert changed_settings(dataclasses.replace(recipe, loss=Loss("focal"))) == ["loss.name"]


def test_several_labels_per_image_have_binary_cross_entropy(monkeypatch):
    learn = small_learner(Loss())
    monkeypatch.setattr(learn.dls.train, "is_multi_label", True)
    with pytest.raises(InputError, match=r"settings of \[loss\] are for one class per image"):
        learner_from_recipe(Recipe(loss=Loss("focal")), learn.dls)


def test_checkpoints_of_older_recipes_have_the_present_loss():
    recipe = json.loads(json.dumps({"loss": vars(Loss()), "train": {}}))
    older = {"train": {}}
    assert comparable({"recipe": recipe}) == comparable({"recipe": older})
    other = {**recipe, "loss": {**recipe["loss"], "label_smoothing": 0.1}}
    assert comparable({"recipe": other}) != comparable({"recipe": older})


def test_a_run_is_trained_with_the_loss_of_its_recipe(tmp_path, capsys):
    folder = write_image_folder(tmp_path / "images", num_train=8, num_test=3, size=(8, 8))
    for path in sorted((folder / "train" / "dog").iterdir())[:4]:
        path.unlink()
    flags = ["--arch", "wrn10_1", "--batch-size", "8", "--epochs", "1", "--device", "cpu"]
    losses = {}
    for name, settings in {
        "plain": [],
        "balanced": ["--set", "loss.class_weights=balanced", "--set", "loss.label_smoothing=0.1"],
        "focal": ["--set", "loss.name=focal"],
    }.items():
        run = tmp_path / name
        assert program(["fit", str(folder), *flags, *settings, "--out", str(run)]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert ("cross-entropy, label smoothing 0.1, classes weighted equally" in printed) == (
            name == "balanced"
        )
        assert ("Loss focal" in printed) == (name == "focal")
        (_, row) = (run / "history.csv").read_text().splitlines()[:2]
        losses[name] = row.split(",")[1]
        assert program(["eval", str(run)]) == 0
        capsys.readouterr()
    assert len(set(losses.values())) == 3
