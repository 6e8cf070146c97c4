"""The results of a study as Markdown."""

from collections.abc import Callable, Sequence
from statistics import fmean

from mixmo_fastai.evaluation.results import SPLIT_NAMES
from mixmo_fastai.metrics.table import decimal, percent, points, signed_decimal
from mixmo_fastai.runtime.text import counted
from mixmo_fastai.study.results import Cell

_COLUMNS = {  # metric: title and format
    "accuracy": ("accuracy", percent),
    "nll": ("NLL", decimal),
    "nll_calibrated": ("NLL, calibrated", decimal),
    "ece": ("ECE", percent),
    "ece_calibrated": ("ECE, calibrated", percent),
}
MAX_UNEQUAL = 1.05
"""Ratio of the images seen, relative to the planned ones, of two methods of the same length from
which the tables say so."""
MAX_NAMED = 6
"""Number of missing or other runs that are named."""
_DIFFERENCES = {"accuracy": ("accuracy", points), "nll": ("NLL", signed_decimal)}


def markdown(name: str, cells: Sequence[Cell], reference: str, missing: Sequence[str] = ()) -> str:
    """Format the results: a table for each training length.

    Args:
        name: name of the study.
        cells: from `results.collect_results`.
        reference: the method from which differences are taken.
        missing: names of the runs that are not finished.
    """
    lines = [f"# {name}", ""]
    if missing:
        lines += [missing_text(missing), ""]
    if all(cell.method != reference for cell in cells):
        lines += [reference_text(cells, reference), ""]
    for images_seen, group in by_length(cells).items():
        titles, *rows = table(group, reference)
        lines += [
            f"## {images_seen:,} images seen",
            "",
            _row(titles),
            f"|{'---|' * len(titles)}",
            *map(_row, rows),
            "",
        ]
    return "\n".join([*lines, legend(cells), ""])


def missing_text(missing: Sequence[str]) -> str:
    """Return the sentence on runs that are not finished, with the names of the first."""
    runs = f"{counted(len(missing), 'run')} {'is' if len(missing) == 1 else 'are'}"
    return f"{runs} not finished and therefore missing below: {_named(missing)}."


def others_text(others: Sequence[str]) -> str:
    """Return the sentence on finished runs in the folder that the study does not plan."""
    verb = "is" if len(others) == 1 else "are"
    return (
        f"{counted(len(others), 'finished run')} of the folder {verb} not in the study: "
        f"{_named(others)}.\nAfter renaming a method, also rename its files in runs/, "
        "predictions/ and recipes/."
    )


def _named(runs: Sequence[str]) -> str:
    """Return the first names, and the number of others."""
    others = len(runs) - MAX_NAMED
    return f"{', '.join(runs[:MAX_NAMED])}{f' and {others} more' if others > 0 else ''}"


def reference_text(cells: Sequence[Cell], reference: str) -> str:
    """Return the sentence on the method from which differences are taken."""
    if any(cell.method == reference for cell in cells):
        return f"Differences are from {reference}."
    return f"There are no differences: no run of {reference} is finished."


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def legend(cells: Sequence[Cell]) -> str:
    """Explain the values of the tables."""
    split = SPLIT_NAMES[cells[0].split].lower()
    has_spread = any(len(cell.seeds) > 1 for cell in cells)
    averaged = "Means over seeds, ± their standard deviation, on" if has_spread else "One seed, on"
    text = f"{averaged} the {split} images."
    if any(name.endswith("_calibrated") for cell in cells for name in cell.metrics):
        text += (
            f" Calibrated: temperatures fitted on one half of the {split} images and applied to "
            "the other."
        )
    return text + _intervals_text(cells, split) + _lengths_text(cells)


def _intervals_text(cells: Sequence[Cell], split: str) -> str:
    found = [each for cell in cells for each in (cell.differences or {}).values()]
    several = [each for each in found if each.seeds_interval is not None]
    text = ""
    if several:
        text += (
            f" In brackets: 95 % bootstrap interval of the difference over {split} images and "
            "seeds; then the 95 % interval by Welch's t distribution from the seeds alone, which "
            "ignores the choice of images. Read the wider of the two."
        )
    if len(several) < len(found):
        if several:
            text += (
                " A single interval is for a method with one seed, or compared with one, or for "
                "seeds without spread;"
            )
        else:
            text += f" In brackets: 95 % bootstrap interval of the difference over {split} images"
            has_seeds = any(len(cell.seeds) > 1 for cell in cells)
            text += ", and over the seeds of methods with several;" if has_seeds else ";"
        text += " it does not show what other seeds would give."
    return text


def _lengths_text(cells: Sequence[Cell]) -> str:
    text = ""
    longer = [cell.method for cell in cells if cell.images_planned > cell.images_seen]
    if longer:
        names = ", ".join(dict.fromkeys(longer))
        text += f' Each network of {names} sees as many images as the title says (budget "each").'
    ratios = [
        [cell.images_trained / cell.images_planned for cell in group]
        for group in by_length(cells).values()
    ]
    unequal = max(max(each) / min(each) for each in ratios)
    if unequal > MAX_UNEQUAL:
        text += (
            " Lengths are rounded to whole epochs and batches: compared with the title, a method "
            f"saw {100 * (unequal - 1):.0f} % more images than another."
        )
    return text


def by_length(cells: Sequence[Cell]) -> dict[int, list[Cell]]:
    """Group the results by the training length."""
    return {
        images_seen: [cell for cell in cells if cell.images_seen == images_seen]
        for images_seen in dict.fromkeys(cell.images_seen for cell in cells)
    }


def table(cells: Sequence[Cell], reference: str) -> list[list[str]]:
    """Return the texts of a table: its titles, then a row for each method.

    Args:
        cells: of one training length.
        reference: the method from which differences are taken.
    """
    columns = [name for name in _COLUMNS if any(name in cell.metrics for cell in cells)]
    titles = [
        "method",
        "seeds",
        "images",
        *(_COLUMNS[name][0] for name in columns),
        *(f"{title} - {reference}" for title, _ in _DIFFERENCES.values()),
        "parameters",
        "hours",
    ]
    rows = [
        [
            cell.method,
            ", ".join(map(str, cell.seeds)),
            f"{cell.images_trained:,.0f}",
            *(_value(cell, name) for name in columns),
            *(_difference(cell, name) for name in _DIFFERENCES),
            f"{cell.parameters:,}",
            _hours(cell),
        ]
        for cell in cells
    ]
    return [titles, *rows]


def _value(cell: Cell, name: str) -> str:
    if name not in cell.metrics:
        return "-"
    form = _COLUMNS[name][1]
    spread = cell.spread(name)
    return form(cell.mean(name)) + ("" if spread is None else f" ± {form(spread)}")


def _hours(cell: Cell) -> str:
    mean = fmean(cell.hours)
    return f"{mean:.2f}" if mean >= 0.1 else f"{max(mean, 1e-3):.1g}"


def _difference(cell: Cell, name: str) -> str:
    if cell.differences is None:
        return "-"
    form, found = _DIFFERENCES[name][1], cell.differences[name]
    text = f"{form(found.value)} ({_range(found.interval, form)}"
    if found.seeds_interval is not None:
        text += f"; seeds {_range(found.seeds_interval, form)}"
    return f"{text})"


def _range(interval: tuple[float, float], form: Callable[[float], str]) -> str:
    return " to ".join(form(value).removesuffix(" points") for value in interval)
