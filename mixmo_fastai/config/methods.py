"""Display names of methods, splits, published results and durations."""

from pathlib import Path

from mixmo_fastai.config.choices import HUB_PREFIX, TRANSFORMS, is_table
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.config.resolve import changed_settings

PIXEL_NAMES = {"cutmix": "CutMix", "mixup": "Mixup"}
METHOD_NAMES = {"cutmix": "Cut-MixMo", "linear": "Linear-MixMo", "sum": "MIMO"}


def method_name(recipe: Recipe) -> str:
    """Return the display name of a recipe's method."""
    if recipe.name == "imported":
        return f"Imported network, members: {recipe.model.num_members}"
    name = METHOD_NAMES.get(recipe.mix.kind, f"MixMo ({recipe.mix.kind})")
    if recipe.model.num_members == 1:
        name = "Vanilla"
    if pixels := PIXEL_NAMES.get(recipe.mix.msda):
        name = f"{name} + {pixels}"
    if label := TRANSFORMS[recipe.data.transform].label:
        name = f"{name} + {label}"
    nets = recipe.model.num_nets
    return f"{name}, deep ensemble of {nets} networks" if nets > 1 else name


def expected_label(recipe: Recipe) -> str:
    """Return "Published" or, if this project measured the expected accuracy itself, "Expected"."""
    return "Expected" if recipe.expected.source.startswith("measured") else "Published"


def expected_result(recipe: Recipe) -> str:
    """Return the expected accuracy of a recipe and the settings that differ; "" if it has none."""
    expected = recipe.expected
    if expected.accuracy is None:
        return ""
    text = f"{100 * expected.accuracy:.2f} % top-1 with {expected.arch} ({expected.source})"
    changed = changed_settings(recipe)
    return f"{text}; this run differs in {', '.join(changed)}" if changed else text


def run_label(recipe: Recipe) -> str:
    """Return the name of a run: its data set and its recipe or method."""
    dataset = Path(recipe.data.dataset.removeprefix(HUB_PREFIX)).name or "data"
    if is_table(dataset):
        dataset = Path(dataset).stem
    return f"{dataset}-{recipe.name.rpartition('/')[2] or _method_label(recipe)}"


def _method_label(recipe: Recipe) -> str:
    """Return the name of a method: mask kind or pixel mixing, and the number of networks."""
    model, mix = recipe.model, recipe.mix
    pixels = [mix.msda] if mix.msda != "none" else []
    if model.num_members > 1:
        parts = [METHOD_NAMES.get(mix.kind, f"{mix.kind}-MixMo").lower(), *pixels]
    else:
        parts = pixels or ["vanilla"]
    return "-".join(parts) + (f"-x{model.num_nets}" if model.num_nets > 1 else "")
