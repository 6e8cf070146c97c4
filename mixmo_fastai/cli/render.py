"""Plans and metrics as lines of text."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mixmo_fastai.recipe import Recipe, to_mapping
from mixmo_fastai.resolve import departures
from mixmo_fastai.wording import (
    FIGURES,
    OF_SEVERAL_MEMBERS,
    PART_NAMES,
    decimal,
    duration,
    expectation,
    final_figures,
    method_name,
    percent,
    points,
    round_percent,
    signed,
    temperature_remark,
)

PLAN_WIDTH, FIGURE_WIDTH = len("Validation"), len("Validation accuracy")
"""Characters of the longest label in a plan and among metrics, so that later rows line up."""


def align(rows: Iterable[tuple[str, str]], width: int = 0) -> list[str]:
    """Set labels, of some width at least, and texts in two columns."""
    rows = list(rows)
    width = max([width, *(len(label) for label, _ in rows)])
    return [f"{label:<{width}}  {text}" for label, text in rows]


def plan_lines(training: Any) -> list[str]:
    """Say what a run is going to do."""
    recipe = training.recipe
    train, schedule = recipe.train, recipe.schedule
    rows = [
        *_setup_rows(training),
        (
            "Training",
            f"{train.epochs} epoch{'s' * (train.epochs > 1)} of {training.steps_per_epoch} steps "
            f"with {train.batch_size} images: {training.images_seen:,} images seen",
        ),
        (
            "Schedule",
            f"{schedule.kind}, learning rate {recipe.lr:.4g}; SGD, weight decay "
            f"{recipe.optimizer.weight_decay:g}",
        ),
        *([("Weights", kept)] if (kept := _kept_weights(recipe)) else []),
        *_published_rows(recipe),
    ]
    return align(rows, PLAN_WIDTH)


def _published_rows(recipe: Recipe) -> list[tuple[str, str]]:
    text = expectation(recipe)
    return [("Published", text)] if text else []


def _kept_weights(recipe: Recipe) -> str:
    """Say which weights are kept where it is not those of the last step."""
    train = recipe.train
    average = f"exponential moving average, decay {train.ema_decay:g}" if train.ema_decay else ""
    best = "of the epoch that is best on the validation split" if train.select == "best" else ""
    return ", ".join(part for part in (average, best) if part)


def setup_lines(training: Any) -> list[str]:
    """Say what is trained on what, without how long."""
    return align(_setup_rows(training))


def _setup_rows(training: Any) -> list[tuple[str, str]]:
    recipe, source = training.recipe, training.source
    shape = "x".join(map(str, source.train.image_shape))
    counts = [len(loader.images) for loader in training.learn.dls.loaders]
    tested = f"{counts[2]:,} test" if counts[2] else "no labelled test"
    mix = recipe.mix
    members = f"{recipe.model.num_members} member" + "s" * (recipe.model.num_members > 1)
    nets = recipe.model.num_nets
    networks = f"{nets} times {recipe.model.arch}" if nets > 1 else recipe.model.arch
    times = f"{mix.batch_repetitions} times" if mix.batch_repetitions > 1 else "once"
    mixing = ""
    if mix.kind not in ("sum", "linear"):
        mixing = f", {mix.kind} masks with probability {mix.mix_prob:g}"
    return [
        (
            "Data",
            f"{source.name}: {counts[0]:,} training, {counts[1]:,} validation and {tested} images "
            f"of {shape}, {len(source.classes)} classes",
        ),
        *_validation_rows(counts[1]),
        *source.notes,
        ("Network", f"{networks}, {members}, {training.num_parameters:,} parameters"),
        ("Method", f"{method_name(recipe)}, every image {times} in a batch{mixing}"),
        (
            "Device",
            f"{training.device}{training.in_processes}, {training.acceleration.describe()}, "
            f"seed {recipe.train.seed}",
        ),
    ]


def _validation_rows(num_images: int) -> list[tuple[str, str]]:
    """Say how coarse the validation accuracy is."""
    from mixmo_fastai.bootstrap import accuracy_half_width

    if not num_images:
        return []
    points = 100 * accuracy_half_width(num_images)
    return [
        (
            "Validation",
            f"its accuracy, of {num_images:,} images, is known to ±{points:.2g} points "
            "(95 % interval)",
        )
    ]


def incompleteness_lines(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Show which images of a data set are missing, skipped or left out.

    Args:
        notes: of `DataSource`.
    """
    return align((note for note in notes if note[0] in _INCOMPLETE), FIGURE_WIDTH)


def recipe_lines(recipe: Recipe) -> list[str]:
    """Show every setting of a resolved recipe, a line per section."""
    sections = [
        (k, v)
        for k, v in to_mapping(recipe).items()
        if dataclasses.is_dataclass(getattr(recipe, k)) and k != "expected"
    ]
    return align(
        (f"[{name}]", ", ".join(f"{key}={_brief(value)}" for key, value in section.items()))
        for name, section in sections
    )


def figure_lines(figures: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Show the metrics of a run, with what was asked for by `--ood` and `--corruptions` first."""
    part, test = final_figures(figures)
    model, accuracy = recipe.model, f"{PART_NAMES[part]} accuracy"
    num_members = len(test["member_accuracy"])  # of a deep ensemble, its networks
    asked = _ood_lines(figures.get("ood", {})) + _corruption_lines(
        figures.get("corruptions"), PART_NAMES[part].lower()
    )
    rows = [(accuracy, percent(test["accuracy"]) + _ENSEMBLE * (num_members > 1))]
    if num_members > 1:
        label = "Networks" if model.num_nets > 1 else "Members"
        rows.append((label, ", ".join(map(percent, test["member_accuracy"]))))
    if "selected_epoch" in figures:
        epochs = figures["selected_epoch"]
        shown = ", ".join(map(str, epochs)) if isinstance(epochs, list) else epochs
        where = "the validation split" if part == "test" else "these images, which flatters them"
        rows.append(("Kept weights", f"epoch {shown}, best on {where}"))
    rows += _published_rows(recipe)
    return [*asked, *align([*rows, *_figure_rows(figures, num_members)], FIGURE_WIDTH)]


def filter_lines(titles: list[str], uses: Sequence[Any], norms: Sequence[Any]) -> list[str]:
    """Show active filters per convolution and the encoders' norms, for one run or two.

    Args:
        titles: of the runs.
        uses: filter use of each run.
        norms: encoder norms of each run, (M, D).
    """
    lines = []
    for title, use, norm in zip(titles, uses, norms, strict=True):
        table = [("", "convolution", *(f"> {round_percent(t)}" for t in use.thresholds))]
        for number, (name, shares) in enumerate(
            zip(use.layers, use.fractions.tolist(), strict=True)
        ):
            table.append((str(number + 1), name, *map(percent, shares)))
        table.append(("", "average", *map(percent, use.average.tolist())))
        lines += ["", f"{title}: filters whose L1 norm exceeds a fraction of the layer's largest"]
        lines += columns(table, left=(1,))
        lines += ["", f"{title}: L1 norms of the encoders' filters, over {norm.shape[1]} channels"]
        lines += columns(_encoder_table(norm), left=())
    return lines[1:]


def _encoder_table(norm: Any) -> list[tuple[str, ...]]:
    """Summarise the norms of each encoder, and in how many channels its norm is the largest."""
    table = [("encoder", "mean", "smallest", "largest", "largest of all in")]
    owned = norm.argmax(dim=0).bincount(minlength=len(norm)).tolist()
    for number, (row, count) in enumerate(zip(norm, owned, strict=True), 1):
        numbers = (f"{float(value):.3f}" for value in (row.mean(), row.min(), row.max()))
        table.append((str(number), *numbers, f"{count} channel{'s' * (count != 1)}"))
    return table if len(norm) > 1 else [row[:-1] for row in table]


def columns(table: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Align a table: some columns to the left, the others, numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            f"{cell:<{width}}" if place in left else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def comparison_lines(compared: Sequence[Any]) -> list[str]:
    """Show runs side by side, and their differences from the first."""
    lines = columns(_results_of(compared), left=(0,))
    if any(part.recipe.expected.accuracy is not None for part in compared):
        lines.append("")
        for part in compared:
            if (accuracy := part.recipe.expected.accuracy) is not None:
                star = " with other settings than this run's; `mixmo eval` names them"
                changed = star if departures(part.recipe) else ""
                lines.append(f"{part.run.path}: published {percent(accuracy)}{changed}")
    lines += ["", f"Difference from {compared[0].run.path}, 95 % CI (paired bootstrap)"]
    for part in compared[1:]:
        lines += [f"  {part.run.path}", *_difference_lines(part, compared[0])]
    return lines


def _results_of(compared: Sequence[Any]) -> list[tuple[str, ...]]:
    table = [("run", "accuracy", "NLL", "ECE", "parameters", "images seen", "time")]
    for part in compared:
        test, seen = part.figures, part.images_seen
        table.append(
            (
                str(part.run.path),
                percent(test["accuracy"]),
                decimal(test["nll"]),
                percent(test["ece"]),
                f"{part.parameters:,}",
                "-" if seen is None else f"{seen:,}",
                "-" if part.seconds is None else duration(part.seconds),
            )
        )
    return table


def _difference_lines(part: Any, first: Any) -> list[str]:
    lines = []
    for name, label, in_points in (
        ("accuracy", "accuracy", 1),
        ("nll", "NLL", 0),
        ("ece", "ECE", 1),
    ):
        difference, (low, high) = part.figures[name] - first.figures[name], part.differences[name]
        if in_points:
            text = f"{points(difference):>15}  ({100 * low:+.2f} to {100 * high:+.2f})"
        else:
            text = f"{signed(difference):>8}         ({signed(low)} to {signed(high)})"
        note = "" if low <= difference <= high else "; resampling adds to ECE"
        lines.append(f"    {label:<8}  {text}{note}")
    return lines


def ensemble_lines(names: list[str], figures: Mapping[str, Any]) -> list[str]:
    """Show the figures of several runs as one."""
    part, test = final_figures(figures)
    label = f"{PART_NAMES[part]} accuracy"
    rows = [(label, f"{percent(test['accuracy'])} (mean of the runs' logits)")]
    rows += list(zip(names, map(percent, test["member_accuracy"]), strict=True))
    return align([*rows, *_figure_rows(figures, len(names))])


def _figure_rows(figures: Mapping[str, Any], num_members: int) -> list[tuple[str, str]]:
    part, test = final_figures(figures)
    unasked = _OF_MANY_CLASSES + (OF_SEVERAL_MEMBERS if num_members == 1 else ())
    rows = []
    for name, label, show, _ in FIGURES[1:]:  # accuracy has a row of its own
        if name in test:
            rows.append((label, show(test[name])))
        elif name in test.get("absent", {}) and name not in unasked:
            rows.append((label, f"none: {test['absent'][name]}"))
    rows += _interval_rows(figures)
    absent = figures.get("absent", {})
    if probabilities := figures.get(f"{part}_mean_probabilities"):
        text = ", ".join(f"{label} {show(probabilities[n])}" for n, label, show in _BRIEFLY)
        rows.append(("Mean of p", f"{text}: the members' probabilities averaged instead"))
    for name, label, how in _TEMPERED:
        if name in absent:
            rows.append((label, f"none: {absent[name]}"))
        elif name in figures:
            rows.append((label, _tempered(figures[name], how)))
            if remark := temperature_remark(figures[name]):
                rows.append(("", remark))
    return rows


def _corruption_lines(corruptions: Mapping[str, Any] | None, part: str) -> list[str]:
    """Show the metrics under corruption: the means over the types, then each type."""
    if corruptions is None:
        return []
    types = corruptions["types"]
    lines = [
        f"Corrupted {part} images ({corruptions['source']}), mean of {len(types)} types of 5 "
        "severities",
        f"cA {percent(corruptions['cA'])}, cNLL {decimal(corruptions['cNLL'])}, "
        f"cECE {percent(corruptions['cECE'])}",
        "",
    ]
    table = [("", "accuracy", "NLL", "ECE", "accuracy in %, severity 1 to 5")]
    for kind, found in types.items():
        each = "  ".join(f"{100 * value:5.2f}" for value in found["severities"]["accuracy"])
        texts = percent(found["accuracy"]), decimal(found["nll"]), percent(found["ece"])
        table.append((kind, *texts, each))
    return [*lines, *columns(table, left=(0, 4)), ""]


def _ood_lines(ood: Mapping[str, Any]) -> list[str]:
    """Show how well each uncertainty separates images of another data set from the run's own."""
    if not ood:
        return []
    table = [("uncertainty", "AUROC", "AUPR", "FPR at 95 %")]
    for name, label in _UNCERTAINTIES.items():
        if name in ood:
            table.append((label, *(percent(ood[name][key]) for key in ("auroc", "aupr", "fpr95"))))
    heading = f"Out-of-distribution: {ood['num_images']:,} images of {ood['dataset']}"
    absent = [f"{_UNCERTAINTIES[n]}: none, as {why}" for n, why in ood.get("absent", {}).items()]
    return [heading, *columns(table, left=(0,)), *absent, ""]


def _interval_rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Show 95 % confidence intervals of the main metrics."""
    if "intervals" not in figures:
        return []
    parts = [
        f"{label} {show(low)} to {show(high)}"
        for (name, label, show) in _BRIEFLY
        for low, high in [figures["intervals"][name]]
    ]
    return [("95 % CI", f"{', '.join(parts)} (bootstrap)")]


def _tempered(values: Mapping[str, Any], how: str) -> str:
    temperatures = values.get("temperatures", [values.get("temperature")])
    shown = " and ".join(f"{t:.3f}" for t in temperatures)
    plural = "s" * (len(temperatures) > 1)
    text = f"NLL {decimal(values['nll'])}, ECE {percent(values['ece'])}"
    return f"{text} at temperature{plural} {shown}, {how}"


_INCOMPLETE = ("Missing", "Skipped", "Left out", "Changed")
_ENSEMBLE = " (ensemble, mean of the logits)"
_OF_MANY_CLASSES = ("top5",)
_UNCERTAINTIES = {
    "confidence": "1 - confidence",
    "entropy": "entropy",
    "mutual_information": "mutual information",
}
_BRIEFLY = (("accuracy", "accuracy", percent), ("nll", "NLL", decimal), ("ece", "ECE", percent))
_TEMPERED = (
    ("calibrated", "Calibrated", "fitted on the validation split"),
    ("cross_fitted", "Cross-fitted", "each fitted on the other half of these images, as published"),
)


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return f"({', '.join(_brief(v) for v in value)})"
    return str(value)
