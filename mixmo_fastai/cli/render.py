"""Plans and figures as lines that a person reads."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mixmo_fastai.recipe import Recipe, to_mapping
from mixmo_fastai.resolve import departures
from mixmo_fastai.wording import (
    FIGURES,
    OF_SEVERAL_MEMBERS,
    decimal,
    expectation,
    method_name,
    percent,
)


def align(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Set labels and texts in two columns."""
    rows = list(rows)
    width = max(len(label) for label, _ in rows)
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
        ("Published", expectation(recipe)),
    ]
    return align(rows)


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
            f"{source.name}: {counts[0]:,} training, {counts[1]:,} validation and {counts[2]:,} "
            f"test images of {shape}, {len(source.classes)} classes",
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
    """Show the figures of a run."""
    test, model = figures["test"], recipe.model
    num_members = len(test["member_accuracy"])  # of a deep ensemble, its networks
    rows = [("Test accuracy", percent(test["accuracy"]) + _ENSEMBLE * (num_members > 1))]
    if num_members > 1:
        label = "Networks" if model.num_nets > 1 else "Members"
        rows.append((label, ", ".join(map(percent, test["member_accuracy"]))))
    if "selected_epoch" in figures:
        epochs = figures["selected_epoch"]
        shown = ", ".join(map(str, epochs)) if isinstance(epochs, list) else epochs
        rows.append(("Kept weights", f"epoch {shown}, best on the validation split"))
    if recipe.expected.accuracy is not None:
        rows.append(("Published", expectation(recipe)))
    return align([*rows, *_figure_rows(figures, num_members)])


def filter_lines(titles: list[str], uses: Sequence[Any]) -> list[str]:
    """Show which share of each layer's filters is active, for one run or several."""
    limits = [f"> {100 * t:.0f} %" for t in uses[0].thresholds]
    lines = []
    for title, use in zip(titles, uses, strict=True):
        rows = [*zip(use.layers, use.shares.tolist(), strict=True)]
        rows.append(("average over layers", use.average.tolist()))
        width = max(len(name) for name, _ in rows)
        lines += ["", f"{title}: share of filters whose L1 norm exceeds a part of the largest"]
        lines.append(f"{'':<{width}}" + "".join(f"{limit:>10}" for limit in limits))
        lines += [
            f"{name:<{width}}" + "".join(f"{percent(share):>10}" for share in shares)
            for name, shares in rows
        ]
    return lines[1:]


def comparison_lines(compared: Sequence[Any]) -> list[str]:
    """Show runs side by side, and their differences from the first."""
    heads = ("run", "accuracy", "NLL", "ECE", "parameters", "images seen", "seconds", "published")
    table = [heads]
    for part in compared:
        test, expected = part.figures, part.recipe.expected.accuracy
        table.append(
            (
                str(part.run.path),
                percent(test["accuracy"]),
                decimal(test["nll"]),
                percent(test["ece"]),
                f"{part.parameters:,}",
                "-" if part.images_seen is None else f"{part.images_seen:,}",
                "-" if part.seconds is None else f"{part.seconds:,.0f}",
                "-" if expected is None else f"{percent(expected)}{_star(part.recipe)}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) for row in table]
    if any(part.recipe.expected.accuracy and _star(part.recipe) for part in compared):
        lines += ["", "* published for other settings than this run's; `mixmo eval` names them"]
    lines += ["", f"Less {compared[0].run.path}, 95 % intervals by paired bootstrap:"]
    for part in compared[1:]:
        ends = part.differences
        low, high = (100 * value for value in ends["accuracy"])
        lines.append(
            f"  {part.run.path}: accuracy {low:+.2f} to {high:+.2f} points, "
            f"NLL {ends['nll'][0]:+.4f} to {ends['nll'][1]:+.4f}, "
            f"ECE {100 * ends['ece'][0]:+.2f} to {100 * ends['ece'][1]:+.2f} points"
        )
    return [line.rstrip() for line in lines]


def _star(recipe: Recipe) -> str:
    return "*" if departures(recipe) else ""


def ensemble_lines(names: list[str], figures: Mapping[str, Any]) -> list[str]:
    """Show the figures of several runs as one."""
    test = figures["test"]
    rows = [("Test accuracy", f"{percent(test['accuracy'])} (mean of the runs' logits)")]
    rows += list(zip(names, map(percent, test["member_accuracy"]), strict=True))
    return align([*rows, *_figure_rows(figures, len(names))])


def _figure_rows(figures: Mapping[str, Any], num_members: int) -> list[tuple[str, str]]:
    test = figures["test"]
    unasked = _OF_MANY_CLASSES + (OF_SEVERAL_MEMBERS if num_members == 1 else ())
    rows = []
    for name, label, show, _ in FIGURES[1:]:  # accuracy has a row of its own
        if name in test:
            rows.append((label, show(test[name])))
        elif name in test.get("absent", {}) and name not in unasked:
            rows.append((label, f"none: {test['absent'][name]}"))
    rows += _interval_rows(figures)
    absent = figures.get("absent", {})
    if probabilities := figures.get("test_mean_probabilities"):
        text = ", ".join(f"{label} {show(probabilities[n])}" for n, label, show in _BRIEFLY)
        rows.append(("Mean of p", f"{text}: the members' probabilities averaged instead"))
    for name, label, how in _TEMPERED:
        if name in absent:
            rows.append((label, f"none: {absent[name]}"))
        elif name in figures:
            rows.append((label, _tempered(figures[name], how)))
    rows += _ood_rows(figures.get("ood", {}))
    return [*rows, *_corruption_rows(figures.get("corruptions"))]


def _corruption_rows(corruptions: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Show the figures under corruption, per type and as means over the types."""
    if corruptions is None:
        return []
    rows = [
        (
            "Corrupted",
            f"cA {percent(corruptions['cA'])}, cNLL {corruptions['cNLL']:.4f}, cECE "
            f"{percent(corruptions['cECE'])}: means over {len(corruptions['types'])} types of 5 "
            "severities",
        )
    ]
    for kind, found in corruptions["types"].items():
        each = ", ".join(percent(value) for value in found["severities"]["accuracy"])
        text = f"{percent(found['accuracy'])}, NLL {found['nll']:.4f}, ECE {percent(found['ece'])}"
        rows.append((f"  {kind}", f"{text}; accuracy by severity {each}"))
    return rows


def _ood_rows(ood: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Say how well images of another data set are told from the own ones."""
    rows = []
    for name, label in _UNCERTAINTIES.items():
        if name in ood:
            found = ood[name]
            text = (
                f"AUROC {found['auroc']:.4f}, AUPR {found['aupr']:.4f}, FPR at 95 % "
                f"{percent(found['fpr95'])}: {ood['num_images']:,} images of {ood['dataset']}"
            )
            rows.append((f"OOD {label}", text))
    return rows


def _interval_rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Say how far the test figures would move on other images of the kind."""
    if "intervals" not in figures:
        return []
    parts = [
        f"{label} {show(low)} to {show(high)}"
        for (name, label, show) in _BRIEFLY
        for low, high in [figures["intervals"][name]]
    ]
    return [("95 % intervals", f"{', '.join(parts)} (bootstrap)")]


def _tempered(values: Mapping[str, Any], how: str) -> str:
    temperatures = values.get("temperatures", [values.get("temperature")])
    shown = " and ".join(f"{t:.3f}" for t in temperatures)
    return f"NLL {values['nll']:.4f}, ECE {percent(values['ece'])} at temperature {shown}, {how}"


_ENSEMBLE = " (ensemble, mean of the logits)"
_OF_MANY_CLASSES = ("top5",)
_UNCERTAINTIES = {
    "confidence": "confid.",
    "entropy": "entropy",
    "mutual_information": "inform.",
}
_BRIEFLY = (("accuracy", "accuracy", percent), ("nll", "NLL", decimal), ("ece", "ECE", percent))
_TEMPERED = (
    ("calibrated", "Calibrated", "fitted on the validation split"),
    ("cross_fitted", "Cross-fitted", "each fitted on the other half of the test set, as published"),
)


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return f"({', '.join(_brief(v) for v in value)})"
    return str(value)
