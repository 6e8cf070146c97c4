"""How much the members of a converted network differ at first."""

import pytest
import torch
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from learners import small_network
from synthetic import fastai_dls
from torch import nn
from torchvision.models import resnet18

from mixmo_fastai import convert_to_mixmo, create_model, mixmo_learner, to_mixmo
from mixmo_fastai.config.load import load_recipe, override
from mixmo_fastai.config.recipe import Model
from mixmo_fastai.errors import InputError
from mixmo_fastai.learner.build import learner_from_recipe
from mixmo_fastai.models.member_init import PERTURBATION


def relative_spread(layers):
    """Return how far members' weights are from their mean, in its standard deviations."""
    weights = torch.stack([layer.weight.detach() for layer in layers])
    mean = weights.mean(dim=0)
    return float((weights - mean).std(correction=0) / mean.std(correction=0))


@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize("perturbation", [0.0, 0.1, 0.5, 1.0])
def test_outputs_are_those_of_the_network_however_much_members_differ(members, perturbation):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 32)
    network, images = nn.Sequential(*layers).eval(), torch.randn(4, 3, 8, 8)
    model = convert_to_mixmo(network, members, image_size=8, perturbation=perturbation).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images), network(images), rtol=1e-4, atol=1e-5)
    # The mean of M independent draws is subtracted from each.
    factor = (1 - 1 / members) ** 0.5
    expected = [perturbation * factor, min(perturbation, PERTURBATION) * factor]
    spreads = [relative_spread(layers) for layers in (model.encoders, model.heads)]
    assert spreads == pytest.approx(expected, rel=0.1, abs=1e-6)


def test_default_is_the_same_everywhere():
    assert Model().perturbation == PERTURBATION


def test_learners_and_recipes_pass_it_on(tmp_path):
    weights = tmp_path / "weights.pt"
    torch.save(resnet18().state_dict(), weights)
    learn = Learner(fastai_dls(), small_network(), loss_func=CrossEntropyLossFlat())
    recipe = override(load_recipe("fine-tune/cut-mixmo"), ["model.arch=resnet18"])
    recipe = override(recipe, ["model.pretrained=false", f"model.weights={weights}"])
    networks = {
        perturbation: [
            to_mixmo(learn, seed=0, perturbation=perturbation).model
            if perturbation == 0.6
            else mixmo_learner(fastai_dls(), small_network(), perturbation=perturbation).model,
            create_model("resnet18", 3, weights=weights, perturbation=perturbation),
            mixmo_learner(
                fastai_dls(), "resnet18", weights=weights, perturbation=perturbation
            ).model,
            learner_from_recipe(
                override(recipe, [f"model.perturbation={perturbation}"]), fastai_dls()
            ).model,
        ]
        for perturbation in (0.2, 0.6)
    }
    for perturbation, models in networks.items():
        for model in models:
            expected = perturbation * 0.5**0.5
            assert relative_spread(model.encoders) == pytest.approx(expected, rel=0.25)


def test_members_of_a_run_with_another_number_are_perturbed_too(tmp_path):
    trained = create_model("wrn10_1", 3, 2, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "model.pt"
    torch.save(trained.state_dict(), path)
    model = create_model("wrn10_1", 3, 3, weights=path, perturbation=0.9)
    assert relative_spread(model.encoders) == pytest.approx(0.9 * (2 / 3) ** 0.5, rel=0.25)


@pytest.mark.parametrize("value", [-0.1, 1.5, "large"])
def test_other_values_are_refused(value):
    with pytest.raises(InputError, match="perturbation must be from 0 to 1"):
        create_model("wrn10_1", 3, perturbation=value)
    with pytest.raises(InputError, match="perturbation must be from 0 to 1"):
        to_mixmo(
            Learner(fastai_dls(), small_network(), loss_func=CrossEntropyLossFlat()),
            perturbation=value,
        )


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ([], "without pretrained weights"),
        (
            ["model.pretrained=true", "model.num_members=1", "mix.kind=sum"],
            "with one member",
        ),
    ],
)
def test_recipes_refuse_a_perturbation_without_effect(changes, cause):
    recipe = override(load_recipe("cifar10/cut-mixmo"), ["model.arch=resnet18", *changes])
    with pytest.raises(InputError, match=rf"model\.perturbation=0\.5 has no effect {cause}\.\n"):
        override(recipe, ["model.perturbation=0.5"])
    members = ["model.pretrained=true", "model.num_members=2", "model.perturbation=0.5"]
    assert override(recipe, members).model.perturbation == 0.5
