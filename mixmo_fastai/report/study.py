"""The results of a study as one self-contained HTML page."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.config.schema import to_toml
from mixmo_fastai.report.page import png_uri, render_template
from mixmo_fastai.study.plan import Study
from mixmo_fastai.study.results import Cell
from mixmo_fastai.study.tables import by_length, legend, missing_text, reference_text, table

_BARS = "Means over seeds; bars are their standard deviations."
PLOTS = {
    "images-trained.png": ("Results against the images seen", _BARS),
    "parameters.png": ("Results against the number of parameters", _BARS),
    "calibration.png": (
        "Calibration",
        "Accuracy minus confidence of the predictions of all seeds, in bins of confidence.",
    ),
}
"""Plots of a study, by file: their titles, and what they show."""
_OF_RUNS = ("seed = ", "images_seen = ")


def render(
    study: Study,
    cells: Sequence[Cell],
    reference: str,
    plots: Mapping[str, bytes],
    missing: Sequence[str] = (),
) -> str:
    """Render the results as HTML, with the plots.

    Args:
        study: the study.
        cells: from `results.collect_results`.
        reference: the method from which differences are taken.
        plots: PNGs by the names of `PLOTS`.
        missing: names of the runs that are not finished.
    """
    first = study.runs[0].recipe
    seeds = sorted({seed for cell in cells for seed in cell.seeds})
    lead = (
        f"{Path(first.data.dataset).name}, {len(study.methods)} methods, seeds "
        f"{', '.join(map(str, seeds))}. {reference_text(cells, reference)}"
    )
    recipes = {run.method: _settings(run.recipe) for run in study.runs}
    return render_template(
        "study.html",
        name=study.name,
        lead=lead,
        missing=missing_text(missing) if missing else None,
        tables=[
            (images_seen, (rows[0], rows[1:]))
            for images_seen, group in by_length(cells).items()
            for rows in [table(group, reference)]
        ],
        legend=legend(cells),
        plots=[
            (title, f"{title}; the tables above give the values.", png_uri(plots[name]), note)
            for name, (title, note) in PLOTS.items()
        ],
        recipes=[(method, recipes[method]) for method in study.methods],
    )


def _settings(recipe: Recipe) -> str:
    """Return the settings of a method, without those in which its runs differ."""
    lines = to_toml(recipe).splitlines()
    return "\n".join(line for line in lines if not line.startswith(_OF_RUNS))
