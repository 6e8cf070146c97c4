"""Conversion keeps dtypes, modes, generators and the given network."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from networks import NarrowResNet18, SmallNetwork, build_backbone, largest_difference
from torch import nn

from mixmo_fastai.models import convert_to_mixmo


def test_training_modes_of_all_parts_are_kept():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3))
    model(torch.zeros(2, 3, 8, 8))
    model[1].eval()
    converted = convert_to_mixmo(model.train(False).train(), 2, image_size=8)
    assert converted.training
    model[1].eval()
    converted = convert_to_mixmo(model, 2, image_size=8)
    assert model.training
    assert not model[1].training


@pytest.mark.slow
def test_independent_members_are_permutations():
    model = build_backbone("resnet18")
    converted = convert_to_mixmo(model, 3, independent=True, image_size=32)
    for layers, original in ((converted.encoders, model.conv1), (converted.heads, model.fc)):
        weights = torch.stack([layer.weight.flatten() for layer in layers]).detach()
        assert torch.equal(
            weights.sort().values, original.weight.flatten().sort().values.expand(3, -1)
        )
        assert torch.corrcoef(weights).triu(1).abs().max() < 0.1


@pytest.mark.slow
def test_dtypes_of_all_parts_are_kept():
    model = build_backbone("resnet18").half()
    model.bn1.float()
    model.register_buffer("double_buffer", torch.full((1,), 1 / 3, dtype=torch.float64))
    body = convert_to_mixmo(model, image_size=32).core.body
    assert body.bn1.weight.dtype == torch.float32
    assert body.layer1[0].conv1.weight.dtype == torch.float16
    assert torch.equal(body.double_buffer, model.double_buffer)


class RandomForward(SmallNetwork):
    def forward(self, x):
        features = self.first(x).relu().mean((2, 3))
        return self.last(features + 0 * torch.randn_like(features))


def test_global_generator_is_restored_after_random_forward_passes():
    state = torch.get_rng_state()
    convert_to_mixmo(model := RandomForward(), generator=torch.Generator())
    assert not torch.equal(torch.get_rng_state(), state)  # creating the network changes the state
    state = torch.get_rng_state()
    convert_to_mixmo(model, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_of_the_weights_is_kept(dtype):
    model = build_backbone("resnet18").to(dtype)
    converted = convert_to_mixmo(model, image_size=32)
    assert {p.dtype for p in converted.parameters()} == {dtype}
    assert {p.dtype for p in model.parameters()} == {dtype}
    if dtype == torch.float64:
        x = torch.randn(2, 3, 32, 32, dtype=dtype)
        torch.testing.assert_close(converted.eval()(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_conversion_inside_autocast():
    model, x = build_backbone("resnet18"), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        converted = convert_to_mixmo(model, image_size=32)
    with torch.no_grad():
        assert largest_difference(converted.eval()(x), model(x)) < 1e-4


def test_frozen_core_stays_frozen_but_encoders_and_heads_train():
    model = build_backbone("resnet18").requires_grad_(False)
    converted = convert_to_mixmo(model, image_size=32)
    trainable = {name.split(".")[0] for name, p in converted.named_parameters() if p.requires_grad}
    assert trainable == {"encoders", "heads"}


def test_network_with_nan_weights_is_converted():
    model = SmallNetwork()
    nn.init.constant_(model.last.weight, float("nan"))
    assert convert_to_mixmo(model)(torch.randn(1, 2, 9, 9)).isnan().all()


def test_conversion_does_not_change_the_network():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 3))
    model.train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    convert_to_mixmo(model, generator=torch.Generator(), num_classes=7, image_size=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.slow
def test_inference_in_several_threads():
    """Each thread receives the predictions for its own images."""
    converted = convert_to_mixmo(NarrowResNet18().eval(), image_size=32)
    images = torch.randn(8, 1, 3, 32, 32)
    with torch.no_grad():
        expected = [converted(image) for image in images]

        def predict(number):
            with torch.no_grad():
                return number, converted(images[number])

        with ThreadPoolExecutor(4) as pool:
            for number, actual in pool.map(predict, [*range(8)] * 15):
                torch.testing.assert_close(actual, expected[number])


def test_copies_and_pickles_have_equal_outputs():
    converted, x = convert_to_mixmo(SmallNetwork()), torch.randn(2, 2, 9, 9)
    for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        torch.testing.assert_close(other(x), converted(x))


def test_features_are_not_kept_after_the_forward_pass():
    converted = convert_to_mixmo(SmallNetwork())
    converted(torch.randn(2, 2, 9, 9))
    assert converted.core.body.first.of_thread.features is None

    class StopError(Exception):
        pass

    def stop(*_):
        raise StopError

    converted.core.body.last.register_forward_hook(stop)
    with pytest.raises(StopError):
        converted(torch.randn(2, 2, 9, 9))
    assert converted.core.body.first.of_thread.features is None
