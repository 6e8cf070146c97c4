"""Pixel statistics of pretrained weights, with which images must be normalised."""

from dataclasses import replace
from pathlib import Path

from mixmo_fastai.config.choices import parse_architecture
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.data.image_sets import DataSource
from mixmo_fastai.runs.folder import RunFolder

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def with_statistics_of_weights(recipe: Recipe, arch: str, source: DataSource) -> DataSource:
    """Replace the mean and standard deviation of a data set by those of pretrained weights, if any.

    Weights of a torchvision or timm network have those that their library states. Weights from a
    run have those of the run.

    Args:
        recipe: the recipe.
        arch: its network, also if the recipe leaves it open.
        source: the data set; greyscale images get the mean over the channels of the weights.
    """
    found = _statistics(recipe, arch)
    if found is None:
        return source
    channels = source.train.image_shape[0]
    mean, std = (
        values if len(values) == channels else (sum(values) / len(values),) * channels
        for values in found
    )
    return replace(source, mean=mean, std=std)


def _statistics(recipe: Recipe, arch: str) -> Statistics | None:
    model = recipe.model
    if model.weights:
        facts = RunFolder(Path(model.weights).parent).data_facts()
        if facts is not None:
            return facts.mean, facts.std
    if not (model.pretrained or model.weights):
        return None
    parsed = parse_architecture(arch)
    if parsed.family not in ("torchvision", "timm"):
        return None
    from mixmo_fastai.models.library import pretrained_statistics

    return pretrained_statistics(parsed)
