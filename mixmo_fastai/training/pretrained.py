"""Pixel statistics of pretrained weights, with which images must be normalised."""

from dataclasses import replace
from pathlib import Path

from mixmo_fastai.config.choices import parse_architecture
from mixmo_fastai.config.defaults import is_pretrained
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.data.image_sets import DataSource
from mixmo_fastai.data.statistics import for_channels
from mixmo_fastai.export.header import facts_of_exported
from mixmo_fastai.runs.folder import RunFolder

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def with_statistics_of_weights(recipe: Recipe, arch: str, source: DataSource) -> DataSource:
    """Replace the mean and standard deviation of a data set by those of pretrained weights, if any.

    Weights of a torchvision or timm network have those that their library states. Weights of a run
    or an exported network have those of the run, from data.json beside the file or from its header.
    A note says which are used.

    Args:
        recipe: the recipe.
        arch: its network, also if the recipe leaves it open.
        source: the data set; greyscale images get the mean over the channels of the weights.
    """
    if not is_pretrained(recipe):
        return source
    (origin, found) = _statistics(recipe, arch)
    note = "Normalised", f"with mean and standard deviation of {origin}"
    source = replace(source, notes=(*source.notes, note))
    if found is None:
        return source
    channels = source.train.image_shape[0]
    mean, std = (for_channels(values, channels) for values in found)
    return replace(source, mean=mean, std=std)


def _statistics(recipe: Recipe, arch: str) -> tuple[str, Statistics | None]:
    """Find the statistics of the weights, and describe their origin; None for those of the data."""
    weights = Path(recipe.model.weights)
    if recipe.model.weights:
        if facts := RunFolder(weights.parent).data_facts():
            return f"the run {weights.parent}", (facts.mean, facts.std)
        if facts := facts_of_exported(weights):
            return f"the exported network {weights.name}", (facts.mean, facts.std)
    parsed = parse_architecture(arch)
    if parsed.family not in ("torchvision", "timm"):
        return "these images, since none are stored with the weights", None
    from mixmo_fastai.models.library import pretrained_statistics

    return f"the weights that {parsed.family} has for {arch}", pretrained_statistics(parsed)
