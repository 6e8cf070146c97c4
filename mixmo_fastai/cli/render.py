"""Format plans, filters and comparisons as lines of text."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from mixmo_fastai.config.methods import expected_label, expected_result, method_name
from mixmo_fastai.config.recipe import Loss, Mix, Recipe
from mixmo_fastai.config.resolve import changed_settings
from mixmo_fastai.config.schema import to_mapping
from mixmo_fastai.metrics.table import MAIN_METRICS, percent, round_percent
from mixmo_fastai.runtime.text import counted, duration

PLAN_WIDTH, METRIC_WIDTH = len("Validation"), len("Validation accuracy")
"""Lengths of the longest label in a plan and among metrics, so that later rows are aligned."""


def align(rows: Iterable[tuple[str, str]], width: int = 0) -> list[str]:
    """Align labels and texts in two columns; the first is at least `width` characters wide."""
    rows = list(rows)
    width = max([width, *(len(label) for label, _ in rows)])
    return [f"{label:<{width}}  {text}" for label, text in rows]


MIN_IMBALANCE = 2
"""How many times as many training images as the smallest class the largest one must have for the
plan to give the sizes of classes."""
MAX_LENGTH_ERROR = 0.02
"""Relative difference between requested and actual length that the plan does not mention."""


def plan_lines(training: Any, requested_images: int | None = None) -> list[str]:
    """Describe a training before it starts.

    Args:
        training: from `prepare.prepare`.
        requested_images: `train.images_seen` before it was rounded to whole epochs; None if the
            recipe gives the number of epochs.
    """
    recipe = training.recipe
    train, schedule, steps = recipe.train, recipe.schedule, training.steps_per_epoch
    rows = [
        *_setup_rows(training),
        (
            "Training",
            f"{train.epochs} epoch{'s' * (train.epochs > 1)} of {steps} step{'s' * (steps > 1)} "
            f"with {train.batch_size} images: {training.images_seen:,} images seen"
            + _rounding(training.images_seen, requested_images),
        ),
        (
            "Schedule",
            f"{schedule.kind}, learning rate {recipe.lr:.4g}; {_optimizer_name(recipe)}, "
            f"weight decay {recipe.optimizer.weight_decay:g}",
        ),
        *([("Loss", _loss_text(recipe.loss))] if recipe.loss != Loss() else []),
        *([("Weights", kept)] if (kept := _kept_weights(recipe)) else []),
        *expected_rows(recipe),
    ]
    return align(rows, PLAN_WIDTH)


def _rounding(seen: int, requested: int | None) -> str:
    """Describe how whole epochs change a requested length; empty if they hardly do."""
    if requested is None or abs(seen / requested - 1) <= MAX_LENGTH_ERROR:
        return ""
    return f" instead of {requested:,}, since epochs are whole"


def _loss_text(loss: Loss) -> str:
    """Describe a loss."""
    smoothing = f"label smoothing {loss.label_smoothing:g}" if loss.label_smoothing else ""
    options = [f"{name} {value}" for name, value in loss.options.items()]
    weights = "classes weighted equally" if loss.class_weights == "balanced" else ""
    return ", ".join(filter(None, (loss.name, smoothing, *options, weights)))


def _optimizer_name(recipe: Recipe) -> str:
    name = recipe.optimizer.name
    return {"sgd": "SGD", "adamw": "AdamW", "muon": "Muon"}.get(name, name)


def expected_rows(recipe: Recipe) -> list[tuple[str, str]]:
    """Describe the published or measured accuracy of a recipe, if it has one."""
    text = expected_result(recipe)
    return [(expected_label(recipe), text)] if text else []


def _kept_weights(recipe: Recipe) -> str:
    """Describe which weights are kept if not those of the last step."""
    train = recipe.train
    average = f"exponential moving average, decay {train.ema_decay:g}" if train.ema_decay else ""
    best = "from the best epoch on the validation split" if train.select == "best" else ""
    return ", ".join(part for part in (average, best) if part)


def setup_lines(training: Any) -> list[str]:
    """Describe data, network, method and device of a training."""
    return align(_setup_rows(training))


def _setup_rows(training: Any) -> list[tuple[str, str]]:
    recipe, source = training.recipe, training.source
    shape = "x".join(map(str, source.train.image_shape))
    counts = [len(loader.images) for loader in training.learn.dls.loaders]
    calibrating = f", {counts[3]:,} calibration" if len(counts) > 3 else ""
    tested = f"{counts[2]:,} test" if counts[2] else "no labelled test"
    mix = recipe.mix
    members = f"{recipe.model.num_members} member" + "s" * (recipe.model.num_members > 1)
    nets = recipe.model.num_nets
    networks = f"{nets} x {recipe.model.arch}" if nets > 1 else recipe.model.arch
    times = f"{mix.batch_repetitions} times" if mix.batch_repetitions > 1 else "once"
    cropped = " of the original files" if recipe.data.crop_from == "original" else ""
    mixing = ""
    if mix.kind not in ("sum", "linear"):
        mixing = f", {mix.kind} masks with probability {mix.mix_prob:g}"
    mixing += _repetition_text(mix)
    return [
        (
            "Data",
            f"{source.name}: {counts[0]:,} training, {counts[1]:,} validation{calibrating} and "
            f"{tested} images of {shape}, {len(source.classes)} "
            f"{'labels' if source.is_multi_label else 'classes'}",
        ),
        *(() if source.is_multi_label else [*_class_rows(training), *_validation_rows(counts[1])]),
        *source.notes,
        (
            "Network",
            f"{networks}, {members}, {training.num_parameters:,} parameters{_start_text(recipe)}",
        ),
        ("Method", f"{method_name(recipe)}{cropped}, each image {times} per batch{mixing}"),
        (
            "Device",
            f"{training.device}{training.in_processes}, {training.acceleration.describe()}, "
            f"seed {recipe.train.seed}",
        ),
    ]


def _class_rows(training: Any) -> list[tuple[str, str]]:
    """Describe classes of very different size, and those without a validation image."""
    from mixmo_fastai.data.class_files import missing_classes

    source = training.source
    names = source.classes
    images = [loader.images for loader in training.learn.dls.loaders]
    sizes, validation = (each.labels.bincount(minlength=len(names)) for each in images[:2])
    most, fewest = int(sizes.argmax()), int(sizes.argmin())
    rows = []
    if sizes[most] >= MIN_IMBALANCE * sizes[fewest]:
        text = (
            f"from {counted(int(sizes[fewest]), 'training image')} of {names[fewest]!r} to "
            f"{int(sizes[most]):,} of {names[most]!r}; compare by balanced accuracy"
        )
        if training.recipe.loss.class_weights == "none":
            text += "; to weight them equally: --set loss.class_weights=balanced"
        rows.append(("Classes", text))
    counts = dict(zip(names, validation.tolist(), strict=True))
    missing = missing_classes("valid", counts) if len(images[1]) else []
    return rows + [note for note in missing if note not in source.notes]


def _start_text(recipe: Recipe) -> str:
    """Describe the weights that training starts from, if they are not random."""
    if recipe.model.weights:
        return f", starting from {recipe.model.weights}"
    return ", starting from its library's pretrained weights" if recipe.model.pretrained else ""


def _repetition_text(mix: Mix) -> str:
    """Describe at how many positions all members see the same image."""
    last = round_percent(mix.input_repetition)
    if mix.early_repetition is None or mix.early_repetition == mix.input_repetition:
        return f", the same for all members at {last} of positions" if mix.input_repetition else ""
    first, end = map(round_percent, (mix.early_repetition, mix.early_span))
    verb = "falling" if mix.early_repetition > mix.input_repetition else "rising"
    change = "until" if mix.early_shape == "step" else f"{verb} to {last} at"
    return f", the same for all members at {first} of positions {change} {end} of training"


def _validation_rows(num_images: int) -> list[tuple[str, str]]:
    """Describe the precision of the validation accuracy."""
    from mixmo_fastai.metrics.bootstrap import accuracy_half_width

    if not num_images:
        return []
    points = 100 * accuracy_half_width(num_images)
    return [
        (
            "Validation",
            f"{num_images:,} images; 95 % CI of the accuracy: ±{points:.2g} points",
        )
    ]


def incompleteness_lines(notes: Iterable[tuple[str, str]]) -> list[str]:
    """List which images of a data set are missing, skipped or left out.

    Args:
        notes: notes of the `DataSource`.
    """
    return align((note for note in notes if note[0] in _INCOMPLETE), METRIC_WIDTH)


def recipe_lines(recipe: Recipe) -> list[str]:
    """Format every setting of a resolved recipe, one line per section."""
    sections = [
        (k, v)
        for k, v in to_mapping(recipe).items()
        if dataclasses.is_dataclass(getattr(recipe, k)) and k != "expected"
    ]
    return align(
        (f"[{name}]", ", ".join(f"{key}={_brief(value)}" for key, value in section.items()))
        for name, section in sections
    )


def filter_lines(titles: list[str], uses: Sequence[Any], norms: Sequence[Any]) -> list[str]:
    """Format active filters per convolution and the encoders' norms, for one run or two.

    Args:
        titles: title of each run.
        uses: filter use of each run.
        norms: encoder norms of each run, (M, D).
    """
    lines = []
    for title, use, norm in zip(titles, uses, norms, strict=True):
        table = [("", "convolution", *(f"> {round_percent(t)}" for t in use.thresholds))]
        for number, (name, fractions) in enumerate(
            zip(use.layers, use.fractions.tolist(), strict=True)
        ):
            table.append((str(number + 1), name, *map(percent, fractions)))
        table.append(("", "average", *map(percent, use.average.tolist())))
        lines += ["", f"{title}: filters whose L1 norm exceeds a fraction of the layer's largest"]
        lines += columns(table, left=(1,))
        lines += ["", f"{title}: L1 norms of the encoders' filters, over {norm.shape[1]} channels"]
        lines += columns(_encoder_table(norm), left=())
    return lines[1:]


def _encoder_table(norm: Any) -> list[tuple[str, ...]]:
    """Summarise the norms of each encoder, and count the channels in which its norm is largest."""
    table = [("encoder", "mean", "smallest", "largest", "largest in")]
    num_largest = norm.argmax(dim=0).bincount(minlength=len(norm)).tolist()
    for number, (row, count) in enumerate(zip(norm, num_largest, strict=True), 1):
        numbers = (f"{float(value):.3f}" for value in (row.mean(), row.min(), row.max()))
        table.append((str(number), *numbers, f"{count} channel{'s' * (count != 1)}"))
    return table if len(norm) > 1 else [row[:-1] for row in table]


def columns(table: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Align the columns of a table: those in `left` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            f"{cell:<{width}}" if index in left else f"{cell:>{width}}"
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def comparison_lines(compared: Sequence[Any]) -> list[str]:
    """Format runs side by side, and their differences from the first."""
    lines = columns(_comparison_table(compared), left=(0,))
    if any(each.recipe.expected.accuracy is not None for each in compared):
        lines.append("")
        for each in compared:
            if (accuracy := each.recipe.expected.accuracy) is not None:
                remark = " with settings that differ from this run's; see `mixmo eval`"
                changed = remark if changed_settings(each.recipe) else ""
                label = expected_label(each.recipe).lower()
                lines.append(f"{each.run.path}: {label} {percent(accuracy)}{changed}")
    lines += ["", f"Difference from {compared[0].run.path}, 95 % CI (paired bootstrap)"]
    for each in compared[1:]:
        lines += [f"  {each.run.path}", *_difference_lines(each, compared[0])]
        if each.differences["accuracy"] == (0, 0):
            lines.append("    Both are right on the same images, so resampling shows no spread.")
    return lines


def _comparison_table(compared: Sequence[Any]) -> list[tuple[str, ...]]:
    labels = (metric.label for metric in MAIN_METRICS)
    table = [("run", *labels, "parameters", "images seen", "time")]
    for each in compared:
        seen = each.images_seen
        table.append(
            (
                str(each.run.path),
                *(metric.format.value(each.metrics[metric.name]) for metric in MAIN_METRICS),
                f"{each.parameters:,}",
                "-" if seen is None else f"{seen:,}",
                "-" if each.seconds is None else duration(each.seconds),
            )
        )
    return table


def _difference_lines(compared: Any, first: Any) -> list[str]:
    lines = []
    width = max(len(metric.label) for metric in MAIN_METRICS)
    for metric in MAIN_METRICS:
        difference = compared.metrics[metric.name] - first.metrics[metric.name]
        low, high = compared.differences[metric.name]
        number, _, unit = metric.format.difference(difference).partition(" ")
        ends = (metric.format.difference(end).partition(" ")[0] for end in (low, high))
        text = f"{number:>8} {unit:<6}  ({' to '.join(ends)})"
        note = "" if low <= difference <= high else f"; resampling increases {metric.label}"
        lines.append(f"    {metric.label:<{width}}  {text}{note}")
    return lines


_INCOMPLETE = ("Missing", "Skipped", "Left out", "Changed")


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return f"({', '.join(_brief(v) for v in value)})"
    return str(value)
