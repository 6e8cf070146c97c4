"""Converted networks with an output layer after the last linear layer."""

import pickle

import pytest
import torch
from fastai.layers import SigmoidRange
from networks import SmallNetwork
from torch import nn

from mixmo_fastai.models import convert_to_mixmo

OUTPUTS = {
    "y_range": lambda: SigmoidRange(-1, 6),
    "y_range per output": lambda: SigmoidRange(torch.tensor([0.0, 1, 2]), torch.tensor(7.0)),
    "sigmoid": nn.Sigmoid,
    "tanh and inactive layers": lambda: nn.Sequential(nn.Tanh(), nn.Dropout(0.0), nn.Identity()),
    "in-place relu": lambda: nn.ReLU(inplace=True),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_layer_after_the_last_linear_layer(name):
    torch.manual_seed(0)
    model = nn.Sequential(SmallNetwork(), OUTPUTS[name]()).eval()
    x = torch.randn(4, 2, 9, 9)
    with torch.no_grad():
        converted = convert_to_mixmo(model)
        torch.testing.assert_close(converted(x), model(x))
        for head in converted.heads:  # different members, as after training
            nn.init.normal_(head.weight, std=2.0)
        expected = converted.output(converted.member_logits(x).mean(dim=1))
        assert torch.equal(converted(x), expected)
        mean_of_predictions = converted.predictions(converted.member_logits(x)).mean(dim=1)
        assert (converted(x) - mean_of_predictions).abs().max() > 1e-2
        fused = converted.fuse()
        assert type(fused) is nn.Sequential
        assert not fused.training
        torch.testing.assert_close(fused(x), expected)
        fused_members = converted.fuse(keep_members=True)
        torch.testing.assert_close(fused_members(x), expected)
        torch.testing.assert_close(fused_members.member_logits(x), converted.member_logits(x))


def test_members_predict_within_the_range_in_training():
    converted = convert_to_mixmo(nn.Sequential(SmallNetwork(), SigmoidRange(2, 3)))
    nn.init.normal_(converted.heads[0].weight, std=20.0)
    x = torch.randn(4, 2, 2, 9, 9)
    masks = torch.full((4, 2, 1, *converted.mask_shape(9, 9)[1:]), 0.5)
    predictions = converted.train()(x, masks)
    assert predictions.shape == (4, 2, 3)
    assert predictions.min() >= 2
    assert predictions.max() <= 3


def test_output_layer_adds_no_tensors_and_old_pickles_load():
    unbounded, bounded = (
        convert_to_mixmo(m) for m in (SmallNetwork(), nn.Sequential(SmallNetwork(), nn.Sigmoid()))
    )
    assert len(unbounded.state_dict()) == len(bounded.state_dict())
    # Pickles of version 0.1.0 have no attribute `output`.
    del unbounded.__dict__["output"], unbounded.core.__dict__["output"]
    loaded = pickle.loads(pickle.dumps(unbounded))
    x = torch.randn(4, 2, 9, 9)
    assert torch.equal(loaded(x), unbounded(x))
    torch.testing.assert_close(loaded.eval().fuse()(x), unbounded(x))
