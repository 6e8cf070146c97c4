"""The readout of `examples/unmixing.py`: its weights, its fadeout, its training, the command."""

import numpy as np
import pytest
import torch
from commands import FIT, train_small_study
from fastai.callback.core import Callback
from learners import make_learner
from synthetic import mixmo_dls
from unmixing_example import SCRIPT, TARGETS, NormalizedUnmixing, Unmixing

from mixmo_fastai import MixMoCallback, create_model, mixmo_learner
from mixmo_fastai.config.choices import READOUTS
from mixmo_fastai.errors import InputError
from mixmo_fastai.mixing import draw_lam, draw_masks
from mixmo_fastai.models.readout import average, set_readout_progress


@pytest.fixture
def registered(monkeypatch):
    for name, target in TARGETS.items():
        monkeypatch.setitem(READOUTS, name, target)


def oracle(maps, masks, kept, *, normalized):
    """Compute the embeddings (B, M, F) with loops."""
    batch, channels, height, width = maps.shape
    members, (mask_height, mask_width) = masks.shape[1], masks.shape[-2:]
    rows, columns = mask_height // height, mask_width // width
    embeddings = np.zeros((batch, members, channels))
    for b in range(batch):
        for i in range(members):
            total = 0.0
            for y in range(height):
                for x in range(width):
                    part = masks[
                        b, i, :, y * rows : (y + 1) * rows, x * columns : (x + 1) * columns
                    ]
                    weight = part.mean() + kept * (1 - part.mean())
                    total += weight
                    embeddings[b, i] += weight * maps[b, :, y, x]
            embeddings[b, i] /= total if normalized else height * width
    return embeddings


@pytest.mark.parametrize("kind", ["cutmix", "channel", "linear"])
@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("progress", [0.0, 0.1, 1 / 3, 0.9])
def test_embeddings_equal_the_oracle(kind, members, normalized, progress):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 5, 4, 2, generator=generator)
    lam = draw_lam(3, members, 2.0, generator=generator)
    masks, _ = draw_masks(kind, lam, (6, 8, 8), generator=generator)
    readout = Unmixing(normalized=normalized)
    readout.set_progress(progress)
    expected = oracle(maps.numpy(), masks.numpy(), min(1, 3 * progress), normalized=normalized)
    np.testing.assert_allclose(readout(maps, masks), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Unmixing, NormalizedUnmixing])
def test_after_the_fadeout_all_heads_read_the_plain_average(kind):
    maps, readout = torch.randn(2, 5, 4, 4), kind(span=0.5)
    masks, _ = draw_masks("cutmix", draw_lam(2, 2, 2.0), (6, 8, 8))
    readout.set_progress(0.5)
    expected = average(maps)
    torch.testing.assert_close(readout(maps, masks), expected[:, None].expand(-1, 2, -1))
    torch.testing.assert_close(readout(maps, None), expected)


def test_without_a_span_it_is_the_plain_average():
    readout = Unmixing(span=0.0)
    readout.set_progress(0.0)
    assert readout.fadeout == 1
    with pytest.raises(InputError, match="span must be from 0 to 1"):
        Unmixing(span=2)


class Watch(Callback):
    """Record the weight that the readout keeps, with the progress, in each training step."""

    order, run_valid = 30, False

    def __init__(self):
        super().__init__()
        self.seen = []

    def after_pred(self):
        self.seen.append((self.learn.pct_train, float(self.learn.model.readout.fadeout)))


def test_training_fades_out(registered):
    watch = Watch()
    learn = mixmo_learner(mixmo_dls(), "wrn10_1", seed=0, readout="unmixing", cbs=[watch])
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 0.01)
    assert [fadeout for _, fadeout in watch.seen] == pytest.approx(
        [min(1, 3 * progress) for progress, _ in watch.seen]
    )
    assert watch.seen[0][1] == 0
    assert watch.seen[-1][1] == 1
    watch.seen.clear()
    learn.lr_find(num_it=5, show_plot=False)
    assert {fadeout for _, fadeout in watch.seen} == {1.0}


def test_heads_get_gradients_from_their_own_regions_only():
    """At the start, with binary masks, a head does not read positions of other members."""
    maps = torch.randn(1, 3, 4, 4, requires_grad=True)
    masks, _ = draw_masks("vertical", torch.tensor([[0.5, 0.5]]), (6, 8, 8), shuffle_roles=False)
    Unmixing()(maps, masks)[:, 0].sum().backward()
    assert bool((maps.grad[..., :2] != 0).all())
    assert bool((maps.grad[..., 2:] == 0).all())


@pytest.mark.parametrize("name", ["unmixing", "unmixing-normalized"])
@pytest.mark.parametrize(
    "arch", ["wrn10_1", pytest.param("preact_resnet18_1", marks=pytest.mark.slow)]
)
def test_fused_networks_are_exact(registered, name, arch):
    model = create_model(arch, 4, readout=name, generator=torch.Generator().manual_seed(0)).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.fuse()(images), model(images), rtol=1e-4, atol=1e-4)
    assert not any("fadeout" in key for key in model.state_dict())


def test_networks_with_another_readout_train_as_before():
    model = create_model("wrn10_1", 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    set_readout_progress(model, 0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    learn = make_learner(callback=MixMoCallback(seed=0))
    learn.fit(1, 0.0)
    assert learn.recorder.values[-1][0] > 0


@pytest.mark.slow
def test_the_example_adds_the_readout_to_every_command(mixmo, tmp_path):
    command = mixmo(*FIT, "run", "--set", "model.readout=unmixing", script=SCRIPT)
    assert command.wait() == 0, command.printed
    command = mixmo("eval", "run", script=SCRIPT)
    assert command.wait() == 0, command.printed
    command = mixmo("eval", "run")
    assert command.wait() == 2
    assert "Unknown readout 'unmixing'" in command.printed


@pytest.mark.slow
def test_a_study_trains_with_the_program_that_runs_it(mixmo, tmp_path):
    methods = {"unmixing": "model.readout=unmixing"}
    train_small_study(mixmo, tmp_path, "wrn10_1", methods, SCRIPT)
    assert (tmp_path / "out" / "runs" / "unmixing-400-seed0" / "metrics.json").exists()
