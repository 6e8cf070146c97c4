"""The results of a study as Markdown."""

from collections.abc import Sequence

from mixmo_fastai.metrics.table import decimal, percent, points, signed_decimal
from mixmo_fastai.study.results import Cell, Difference

_COLUMNS = {  # metric: title and format
    "accuracy": ("accuracy", percent),
    "nll": ("NLL", decimal),
    "nll_calibrated": ("NLL, calibrated", decimal),
    "ece": ("ECE", percent),
    "ece_calibrated": ("ECE, calibrated", percent),
}
_DIFFERENCES = {"accuracy": ("accuracy", points), "nll": ("NLL", signed_decimal)}


def markdown(name: str, cells: Sequence[Cell], reference: str, num_missing: int = 0) -> str:
    """Format the results: a table for each training length.

    Args:
        name: name of the study.
        cells: from `results.collect_results`.
        reference: the method from which differences are taken.
        num_missing: number of runs that are not finished.
    """
    lines = [f"# {name}", ""]
    if num_missing:
        lines += [f"{num_missing} runs are not finished; their seeds are missing below.", ""]
    for images_seen in dict.fromkeys(cell.images_seen for cell in cells):
        group = [cell for cell in cells if cell.images_seen == images_seen]
        lines += [f"## {images_seen:,} images seen", "", *_table(group, reference), ""]
    lines += [
        "Means over seeds, ± their standard deviation. Calibrated: temperatures fitted on one half "
        "of the test images and applied to the other. In brackets: 95 % bootstrap intervals of the "
        "differences, over test images and seeds; then the standard error from the seeds alone.",
        "",
    ]
    return "\n".join(lines)


def _table(cells: Sequence[Cell], reference: str) -> list[str]:
    columns = [name for name in _COLUMNS if any(name in cell.metrics for cell in cells)]
    titles = [
        "method",
        "seeds",
        *(_COLUMNS[name][0] for name in columns),
        *(f"{title} - {reference}" for title, _ in _DIFFERENCES.values()),
        "parameters",
        "hours",
    ]
    rows = [
        [
            cell.method,
            ", ".join(map(str, cell.seeds)),
            *(_value(cell, name) for name in columns),
            *(_difference(cell, name) for name in _DIFFERENCES),
            f"{cell.parameters:,}",
            f"{sum(cell.hours) / len(cell.hours):.2f}",
        ]
        for cell in cells
    ]
    return [
        f"| {' | '.join(titles)} |",
        f"|{'---|' * len(titles)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _value(cell: Cell, name: str) -> str:
    if name not in cell.metrics:
        return "-"
    form = _COLUMNS[name][1]
    spread = cell.spread(name)
    return form(cell.mean(name)) + ("" if spread is None else f" ± {form(spread)}")


def _difference(cell: Cell, name: str) -> str:
    if cell.differences is None:
        return "-"
    form, found = _DIFFERENCES[name][1], cell.differences[name]
    low, high = map(form, found.interval)
    return f"{form(found.value)} ({low} to {high}){_error_text(found, name)}"


def _error_text(difference: Difference, name: str) -> str:
    if difference.standard_error is None:
        return ""
    form = _DIFFERENCES[name][1]
    return f"; {form(difference.standard_error).removeprefix('+')}"
