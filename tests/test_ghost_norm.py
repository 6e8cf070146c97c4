import numpy as np
import pytest
import torch
from synthetic import mixmo_dls
from torch import nn

from mixmo_fastai.errors import InputError
from mixmo_fastai.learner.build import mixmo_learner
from mixmo_fastai.models import create_model
from mixmo_fastai.models.ghost_norm import GhostBatchNorm2d, use_ghost_batches


def oracle(x, weight, bias, mean, var, *, sizes, eps=1e-5, momentum=0.1):
    """Group after group, each as a batch of its own; (B, C, H, W) arrays."""
    out, start = np.empty_like(x), 0
    for size in sizes:
        group = x[start : start + size]
        own_mean, own_var = group.mean((0, 2, 3)), group.var((0, 2, 3))
        scale = weight / np.sqrt(own_var + eps)
        shift = bias - own_mean * scale
        out[start : start + size] = group * scale[:, None, None] + shift[:, None, None]
        count = group.size / group.shape[1]
        mean = (1 - momentum) * mean + momentum * own_mean
        var = (1 - momentum) * var + momentum * own_var * count / (count - 1)
        start += size
    return out, mean, var


@pytest.mark.parametrize(
    ("batch", "size", "sizes"),
    [(12, 4, [4, 4, 4]), (10, 4, [4, 3, 3]), (4, 4, [4]), (3, 8, [3]), (9, 2, [2, 2, 2, 2, 1])],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_against_the_oracle(batch, size, sizes, layout):
    norm = GhostBatchNorm2d(5, size).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(batch, 5, 3, 4, dtype=torch.float64).contiguous(memory_format=layout)
    before = [t.detach().clone().numpy() for t in (norm.weight, norm.bias)]
    found = norm(x)
    out, mean, var = oracle(x.numpy(), *before, np.zeros(5), np.ones(5), sizes=sizes)
    np.testing.assert_allclose(found.detach().numpy(), out, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=1e-10)
    np.testing.assert_allclose(norm.running_var.numpy(), var, rtol=1e-10)
    assert norm.num_batches_tracked == len(sizes)
    assert found.is_contiguous(memory_format=layout)


def test_a_large_batch_in_groups_is_small_batches_one_after_the_other():
    torch.manual_seed(0)
    grouped, plain = create_model("wrn10_1", 3), create_model("wrn10_1", 3)
    plain.load_state_dict(grouped.state_dict())
    use_ghost_batches(grouped, 4)
    x = torch.randn(12, 3, 8, 8)
    whole = grouped.member_logits(x)
    parts = torch.cat([plain.member_logits(part) for part in x.split(4)])
    torch.testing.assert_close(whole, parts)
    whole.square().sum().backward()
    parts.square().sum().backward()
    for (name, own), other in zip(grouped.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_evaluation_and_weights_are_those_of_batch_norm():
    grouped = use_ghost_batches(create_model("wrn10_1", 3), 4)
    plain = create_model("wrn10_1", 3)
    assert grouped.state_dict().keys() == plain.state_dict().keys()
    grouped.load_state_dict(plain.state_dict())
    x = torch.randn(9, 3, 8, 8)
    assert torch.equal(grouped.eval()(x), plain.eval()(x))


def test_parameters_stay_the_very_same():
    model = create_model("wrn10_1", 3)
    before = [*model.parameters()]
    use_ghost_batches(model, 8)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(type(m) is GhostBatchNorm2d and m.group_size == 8 for m in norms)
    assert "group_size=8" in repr(norms[0])


def test_zero_leaves_a_network_alone_and_one_is_refused():
    model = create_model("wrn10_1", 3)
    assert all(type(m) is not GhostBatchNorm2d for m in use_ghost_batches(model, 0).modules())
    with pytest.raises(InputError, match="2 or more"):
        use_ghost_batches(model, 1)


def test_a_learner_takes_it_and_its_network_is_exported_as_ever():
    learn = mixmo_learner(mixmo_dls(), "wrn10_1", seed=0, ghost_batch_size=16)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
    model = learn.model.eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model.fuse()(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("keep_members", [False, True])
def test_a_fused_network_has_none(keep_members):
    """So that its pickle needs nothing but torch."""
    model = use_ghost_batches(create_model("resnet18", 3), 8)
    model(torch.randn(9, 3, 32, 32))
    fused = model.eval().fuse(keep_members=keep_members)
    assert not any(isinstance(m, GhostBatchNorm2d) for m in fused.modules())
    assert any(isinstance(m, GhostBatchNorm2d) for m in model.modules())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
