from dataclasses import replace

import pytest
import torch

from mixmo_fastai.cli import run
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.learner.preview import preview_batch
from mixmo_fastai.plots.png import plot_preview
from mixmo_fastai.training.prepare import prepare


def preview(count=5, **flags):
    settings = {key.replace("__", "."): value for key, value in flags.items()}
    recipe = resolve_recipe("digits", None, {"model.arch": "wrn10_1", **settings})
    return preview_batch(prepare(recipe).learn, count)


@pytest.mark.parametrize("kind", ["sum", "linear", "cutmix", "cow", "channel", "noise"])
def test_the_mixture_is_made_of_inputs_and_masks(kind):
    seen = preview(mix__kind=kind)
    assert seen.inputs.shape == (5, 2, 1, 8, 8)
    width = 16 if kind == "channel" else 8  # a column for each feature channel
    assert seen.masks.shape == (5, 2, 8, width)
    assert seen.by_channels == (kind == "channel")
    torch.testing.assert_close(seen.masks.sum(1), torch.ones(5, 8, width))
    weights = seen.masks.mean(dim=(2, 3), keepdim=True) if kind == "channel" else seen.masks
    if kind == "channel":
        assert bool(((seen.masks == 0) | (seen.masks == 1)).all())
    expected = (seen.inputs * weights[:, :, None]).sum(1)
    torch.testing.assert_close(seen.mixed, expected)
    assert bool(((seen.inputs >= 0) & (seen.inputs <= 1)).all())


def test_a_binary_kind_is_shown_whatever_its_probability():
    masks = preview(mix__kind="cutmix", mix__mix_prob=0.0).masks
    assert bool(((masks == 0) | (masks == 1)).all())


def test_pixels_come_back_as_they_were():
    """A digit's levels are multiples of 255 / 16, rounded."""
    levels = (preview(mix__kind="sum").inputs * 255).round()
    allowed = (torch.arange(17) * 255 / 16).round()
    assert set(levels.unique().tolist()) <= set(allowed.tolist())


def test_labels_of_mixed_pixels_name_both():
    seen = preview(count=16, mix__msda="mixup")
    assert all(len(names) == 2 for names in seen.labels)
    named = " ".join(f" {name}" for names in seen.labels for name in names)
    assert "%" in named
    assert " 0% " not in named


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [[], ["--mix", "horizontal", "--members", "3"], ["--members", "1"]]
)
def test_the_command_draws_a_picture(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["show", "digits", "--count", "2", "--out", "picture.png", *flags]) == 0
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "picture.png" in capsys.readouterr().out
    assert run(["show", "digits", "--out", "picture.png"]) == 2
    assert "exists and was not changed" in capsys.readouterr().err


def test_names_are_not_taken_for_tex(tmp_path):
    seen = preview(count=2)
    labels = [["$x_{$", "$"] for _ in seen.labels]
    plot_preview(replace(seen, labels=labels), tmp_path / "picture.png", title="a $5$ run_$^{")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
