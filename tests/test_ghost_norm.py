import copy

import numpy as np
import pytest
import torch
from synthetic import mixmo_dls
from torch import nn

from mixmo_fastai.errors import InputError
from mixmo_fastai.learner.build import mixmo_learner
from mixmo_fastai.models import create_model
from mixmo_fastai.models.folding import fold_batch_norm
from mixmo_fastai.models.ghost_norm import (
    GhostBatchNorm2d,
    use_full_batches,
    use_ghost_batches,
)
from mixmo_fastai.models.norms import timm_norm
from mixmo_fastai.models.synced_norm import sync_batch_norm, sync_on_gpu


def oracle(x, weight, bias, mean, var, *, sizes, eps=1e-5, momentum=0.1):
    """Normalise arrays (B, C, H, W) group by group, each as a separate batch."""
    out, start = np.empty_like(x), 0
    for size in sizes:
        group = x[start : start + size]
        group_mean, group_var = group.mean((0, 2, 3)), group.var((0, 2, 3))
        scale = weight / np.sqrt(group_var + eps)
        shift = bias - group_mean * scale
        out[start : start + size] = group * scale[:, None, None] + shift[:, None, None]
        count = group.size / group.shape[1]
        mean = (1 - momentum) * mean + momentum * group_mean
        var = (1 - momentum) * var + momentum * group_var * count / (count - 1)
        start += size
    return out, mean, var


@pytest.mark.parametrize(
    ("batch", "size", "sizes"),
    [(12, 4, [4, 4, 4]), (10, 4, [4, 3, 3]), (4, 4, [4]), (3, 8, [3]), (9, 2, [2, 2, 2, 2, 1])],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_ghost_norm_matches_the_oracle(batch, size, sizes, memory_format):
    norm = GhostBatchNorm2d(5, size).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(batch, 5, 3, 4, dtype=torch.float64).contiguous(memory_format=memory_format)
    before = [t.detach().clone().numpy() for t in (norm.weight, norm.bias)]
    actual = norm(x)
    out, mean, var = oracle(x.numpy(), *before, np.zeros(5), np.ones(5), sizes=sizes)
    np.testing.assert_allclose(actual.detach().numpy(), out, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=1e-10)
    np.testing.assert_allclose(norm.running_var.numpy(), var, rtol=1e-10)
    assert norm.num_batches_tracked == len(sizes)
    assert actual.is_contiguous(memory_format=memory_format)


def test_grouped_batch_equals_separate_small_batches():
    torch.manual_seed(0)
    grouped, plain = create_model("wrn10_1", 3), create_model("wrn10_1", 3)
    plain.load_state_dict(grouped.state_dict())
    use_ghost_batches(grouped, 4)
    x = torch.randn(12, 3, 8, 8)
    grouped_logits = grouped.member_logits(x)
    plain_logits = torch.cat([plain.member_logits(part) for part in x.split(4)])
    torch.testing.assert_close(grouped_logits, plain_logits)
    grouped_logits.square().sum().backward()
    plain_logits.square().sum().backward()
    for (name, parameter), expected in zip(
        grouped.named_parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_evaluation_equals_batch_norm_with_the_same_weights():
    grouped = use_ghost_batches(create_model("wrn10_1", 3), 4)
    plain = create_model("wrn10_1", 3)
    assert grouped.state_dict().keys() == plain.state_dict().keys()
    grouped.load_state_dict(plain.state_dict())
    x = torch.randn(9, 3, 8, 8)
    assert torch.equal(grouped.eval()(x), plain.eval()(x))


def test_parameters_are_the_same_objects():
    model = create_model("wrn10_1", 3)
    before = [*model.parameters()]
    use_ghost_batches(model, 8)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(type(m) is GhostBatchNorm2d and m.group_size == 8 for m in norms)
    assert "group_size=8" in repr(norms[0])


def test_every_norm_of_timm_is_replaced_and_restored():
    """timm's BatchNormAct2d contains the activation."""
    generator = torch.Generator().manual_seed(0)
    model = create_model("timm/test_efficientnet", 3, generator=generator)
    plain = copy.deepcopy(model)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    plain(images[:4])
    expected = plain(images[:4]), plain(images[4:])
    model(images[:4])
    use_ghost_batches(model, 4)
    kinds = {
        type(m).__name__ for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    }
    assert kinds == {"GhostBatchNormAct2d"}
    torch.testing.assert_close(model(images), torch.cat(expected))
    restored = use_full_batches(copy.deepcopy(model)).eval()
    assert [type(m) for m in restored.modules()] == [type(m) for m in plain.modules()]
    torch.testing.assert_close(restored(images), model.eval()(images))
    folded = fold_batch_norm(model, images)
    torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-4)
    remaining = sum(isinstance(m, GhostBatchNorm2d) for m in folded.modules())
    assert remaining <= 1  # that after the encoders


@pytest.mark.parametrize(
    "replace", [lambda n: use_ghost_batches(n, 2), sync_batch_norm, sync_on_gpu]
)
def test_layers_derived_from_batch_norm_are_refused(replace):
    class Shifted(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(InputError, match=r"layers of class Shifted, derived from BatchNorm; .*can"):
        replace(nn.Sequential(nn.Conv2d(3, 2, 1), Shifted(2)))


@pytest.mark.parametrize("replace", [sync_batch_norm, sync_on_gpu])
def test_synchronised_norms_keep_the_activations(replace):
    generator = torch.Generator().manual_seed(0)
    network = create_model("timm/test_efficientnet", 3, generator=generator)
    network.core = nn.Sequential(network.core, nn.BatchNorm1d(network.heads[0].in_features))
    images = torch.randn(4, 3, 32, 32, generator=generator)
    network(images)
    expected, before = network.eval()(images), [*network.parameters()]
    synced = replace(replace(network))  # as in two trainings of one Learner
    torch.testing.assert_close(synced(images), expected)
    assert all(a is b for a, b in zip(before, synced.parameters(), strict=True))
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, timm_norm())
    assert not any(type(module) in plain for module in synced.modules())


def test_group_size_zero_changes_nothing_and_one_is_refused():
    model = create_model("wrn10_1", 3)
    assert all(type(m) is not GhostBatchNorm2d for m in use_ghost_batches(model, 0).modules())
    with pytest.raises(InputError, match="2 or more"):
        use_ghost_batches(model, 1)


def test_learner_with_ghost_batches_trains_and_can_be_fused():
    learn = mixmo_learner(mixmo_dls(), "wrn10_1", seed=0, ghost_batch_size=16)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
    model = learn.model.eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model.fuse()(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("keep_members", [False, True])
def test_fused_network_has_no_ghost_norm(keep_members):
    """A pickled fused network needs only torch."""
    model = use_ghost_batches(create_model("resnet18", 3), 8)
    model(torch.randn(9, 3, 32, 32))
    fused = model.eval().fuse(keep_members=keep_members)
    assert not any(isinstance(m, GhostBatchNorm2d) for m in fused.modules())
    assert any(isinstance(m, GhostBatchNorm2d) for m in model.modules())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
