"""Readouts, through which the heads read the core's maps."""

from dataclasses import replace

import pytest
import torch
from short_runs import TINY
from synthetic import mixmo_dls
from torch import nn

from mixmo_fastai import MixMoLoss, body_and_heads, mixmo_learner
from mixmo_fastai.config.choices import READOUTS
from mixmo_fastai.errors import InputError
from mixmo_fastai.mixing import draw_lam, draw_masks, loss_weights
from mixmo_fastai.models import create_model
from mixmo_fastai.models.mixmo_model import MixMoModel
from mixmo_fastai.models.readout import Readout, average, embed, resize_masks
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.weights import load_network
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.train import train

ARCHS = ["wrn10_1", "preact_resnet18_1"]


class PlainAverage(Readout):
    """Average pooling, as in the core."""

    is_fusable = True

    def forward(self, maps, masks=None):
        return average(maps)


class MaskedAverage(Readout):
    """Each head averages the maps with the weights of its member's mask."""

    is_fusable = True

    def forward(self, maps, masks=None):
        if masks is None:
            return average(maps)
        weights = resize_masks(masks, maps.shape[-2:])
        weights = weights / weights.sum(dim=(2, 3), keepdim=True).clamp(min=1e-6)
        return torch.einsum("bfhw,bmhw->bmf", maps, weights)


def small_model(arch, readout=None):
    return create_model(arch, 5, readout=readout, generator=torch.Generator().manual_seed(0))


def random_batch(model, size=16):
    random = torch.Generator().manual_seed(1)
    lam = draw_lam(6, 2, 2.0, generator=random)
    masks, means = draw_masks("cutmix", lam, model.mask_shape(size, size), generator=random)
    return torch.randn(6, 2, 3, size, size, generator=random), masks, means


@pytest.mark.parametrize("arch", ARCHS)
def test_plain_average_equals_the_core_pooling(arch):
    plain, through_maps = small_model(arch), small_model(arch, PlainAverage())
    x, masks, _ = random_batch(plain)
    assert torch.equal(through_maps(x, masks), plain(x, masks))
    assert torch.equal(through_maps(x[:, 0]), plain(x[:, 0]))


@pytest.mark.parametrize("arch", ARCHS)
def test_each_head_has_its_own_embedding(arch):
    """The logits equal those of a loop over samples, members and positions."""
    model = small_model(arch, MaskedAverage()).eval()
    x, masks, _ = random_batch(model)
    with torch.no_grad():
        features = model._mix(x, masks)
        maps = model.core.maps(features)
        actual = model(x, masks)
        for sample in range(len(x)):
            for member, head in enumerate(model.heads):
                weights = nn.functional.adaptive_avg_pool2d(
                    masks[sample, member].mean(dim=0, keepdim=True), maps.shape[-2:]
                )[0]
                total, embedding = 0.0, torch.zeros(maps.shape[1])
                for row in range(maps.shape[2]):
                    for column in range(maps.shape[3]):
                        embedding += weights[row, column] * maps[sample, :, row, column]
                        total += float(weights[row, column])
                expected = head(embedding / max(total, 1e-6))
                torch.testing.assert_close(actual[sample, member], expected, rtol=1e-4, atol=1e-4)


def test_masked_average_is_plain_at_inference():
    model = small_model("wrn10_1", MaskedAverage()).eval()
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(x), small_model("wrn10_1").eval()(x))
        torch.testing.assert_close(model.fuse()(x), model(x), rtol=1e-4, atol=1e-5)


def test_all_parameters_have_gradients():
    model = small_model("wrn10_1", MaskedAverage()).train()
    x, masks, means = random_batch(model)
    MixMoLoss()(
        model(x, masks), torch.arange(12).view(6, 2) % 5, loss_weights(means, 3.0)
    ).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_readout_that_is_not_fusable_is_rejected_by_fuse():
    class MaxReadout(Readout):
        def forward(self, maps, masks=None):
            return maps.amax(dim=(2, 3))

    model = small_model("wrn10_1", MaxReadout())
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    with pytest.raises(InputError, match="readout MaxReadout"):
        model.fuse()


def test_resized_masks_still_sum_to_one():
    masks, _ = draw_masks("channel", draw_lam(3, 4, 2.0), (6, 9, 7))
    resized = resize_masks(masks, (4, 3))
    assert resized.shape == (3, 4, 4, 3)
    torch.testing.assert_close(resized.sum(dim=1), torch.ones(3, 4, 3))


def test_unknown_names_and_unsuitable_cores_are_rejected():
    assert small_model("wrn10_1", "core").readout is None
    with pytest.raises(InputError, match="Unknown readout 'cor'"):
        small_model("wrn10_1", "cor")
    with pytest.raises(InputError, match=r"needs feature maps.*BackboneCore"):
        create_model("resnet18", 5, readout=MaskedAverage())
    flat = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InputError, match=r"maps\(features\)"):
        MixMoModel([nn.Conv2d(3, 4, 3)], flat, [nn.Linear(4, 2)], readout=MaskedAverage())


def test_embed_works_with_any_core_that_has_maps():
    class Core(nn.Module):
        def maps(self, features):
            return features.relu()

        def forward(self, features):
            return average(self.maps(features))

    features = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(embed(PlainAverage(), Core(), features, None), Core()(features))


def test_run_with_a_custom_readout(tmp_path, monkeypatch):
    """The readout is registered by name, as in docs/extending.md."""
    monkeypatch.setitem(READOUTS, "plain", f"{__name__}:PlainAverage")
    recipe = replace(TINY, model=replace(TINY.model, readout="plain"))
    run = create_run(recipe, tmp_path / "run")
    training = prepare(recipe)
    assert isinstance(training.learn.model.readout, PlainAverage)
    metrics = train(training, run)
    assert isinstance(load_network(run).readout, PlainAverage)
    other = create_run(TINY, tmp_path / "other")
    assert train(prepare(TINY), other)["test"] == metrics["test"]
    with pytest.raises(InputError, match=r"model.readout is 'core' now and 'plain'"):
        train(prepare(TINY), run, resume=True)


class WeightedAverage(Readout):
    """Average pooling of maps that are multiplied by one weight per channel."""

    def __init__(self, num_channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))

    def forward(self, maps, masks=None):
        return average(maps) * self.weight


def test_a_learner_trains_the_weights_of_the_readout():
    learn = mixmo_learner(mixmo_dls(), "wrn10_1", readout=WeightedAverage(64), seed=0)
    body, heads = body_and_heads(learn.model)
    weight = learn.model.readout.weight
    assert any(parameter is weight for parameter in heads)
    groups = {id(parameter) for group in (body, heads) for parameter in group}
    assert groups == {id(parameter) for parameter in learn.model.parameters()}
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.1)
    assert not torch.equal(weight, torch.ones(64))
