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
def test_mixture_is_the_sum_of_masked_inputs(kind):
    result = preview(mix__kind=kind)
    assert result.inputs.shape == (5, 2, 1, 8, 8)
    width = 16 if kind == "channel" else 8  # a column for each feature channel
    assert result.masks.shape == (5, 2, 8, width)
    assert result.by_channels == (kind == "channel")
    torch.testing.assert_close(result.masks.sum(1), torch.ones(5, 8, width))
    weights = result.masks.mean(dim=(2, 3), keepdim=True) if kind == "channel" else result.masks
    if kind == "channel":
        assert bool(((result.masks == 0) | (result.masks == 1)).all())
    expected = (result.inputs * weights[:, :, None]).sum(1)
    torch.testing.assert_close(result.mixed, expected)
    assert bool(((result.inputs >= 0) & (result.inputs <= 1)).all())


def test_preview_ignores_the_probability_of_mixing():
    masks = preview(mix__kind="cutmix", mix__mix_prob=0.0).masks
    assert bool(((masks == 0) | (masks == 1)).all())


def test_preview_shows_original_pixel_values():
    """Pixel values of the digits are multiples of 255 / 16, rounded."""
    levels = (preview(mix__kind="sum").inputs * 255).round()
    allowed = (torch.arange(17) * 255 / 16).round()
    assert set(levels.unique().tolist()) <= set(allowed.tolist())


def test_labels_after_msda_name_both_images():
    result = preview(count=16, mix__msda="mixup")
    assert all(len(names) == 2 for names in result.labels)
    text = " ".join(f" {name}" for names in result.labels for name in names)
    assert "%" in text
    assert " 0% " not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [[], ["--mix", "horizontal", "--members", "3"], ["--members", "1"]]
)
def test_show_command_writes_an_image(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["show", "digits", "--count", "2", "--out", "preview.png", *flags]) == 0
    assert (tmp_path / "preview.png").read_bytes().startswith(b"\x89PNG")
    assert "preview.png" in capsys.readouterr().out
    early = ["--set", "mix.early_repetition=0.5"] * (flags == [])
    assert run(["show", "digits", "--out", "early.png", *flags, *early]) == 0
    assert ("(mix.early_repetition=0.5)" in capsys.readouterr().out) == bool(early)
    assert run(["show", "digits", "--out", "preview.png"]) == 2
    assert "exists and was not changed" in capsys.readouterr().err


def test_names_are_not_parsed_as_tex(tmp_path):
    result = preview(count=2)
    labels = [["$x_{$", "$"] for _ in result.labels]
    plot_preview(replace(result, labels=labels), tmp_path / "preview.png", title="a $5$ run_$^{")
    assert (tmp_path / "preview.png").read_bytes().startswith(b"\x89PNG")
