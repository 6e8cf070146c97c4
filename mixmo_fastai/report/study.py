"""The results of a study as one self-contained HTML page."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mixmo_fastai.config.schema import to_toml
from mixmo_fastai.report.page import png_uri, render_template
from mixmo_fastai.study.plan import Study
from mixmo_fastai.study.results import Cell
from mixmo_fastai.study.tables import by_length, legend, missing_text, table

PLOTS = {
    "images-trained.png": "Results against the images seen",
    "parameters.png": "Results against the number of parameters",
    "calibration.png": "Calibration",
}
"""Plots of a study, by file: their titles."""


def render(
    study: Study,
    cells: Sequence[Cell],
    reference: str,
    plots: Mapping[str, bytes],
    num_missing: int = 0,
) -> str:
    """Render the results as HTML, with the plots.

    Args:
        study: the study.
        cells: from `results.collect_results`.
        reference: the method from which differences are taken.
        plots: PNGs by the names of `PLOTS`.
        num_missing: number of runs that are not finished.
    """
    first = study.runs[0].recipe
    seeds = sorted({seed for cell in cells for seed in cell.seeds})
    lead = (
        f"{Path(first.data.dataset).name}, {len(study.methods)} methods, seeds "
        f"{', '.join(map(str, seeds))}. Differences are from {reference}."
    )
    recipes = {run.method: to_toml(run.recipe) for run in reversed(study.runs)}
    return render_template(
        "study.html",
        name=study.name,
        lead=lead,
        missing=missing_text(num_missing) if num_missing else None,
        tables=[
            (images_seen, (rows[0], rows[1:]))
            for images_seen, group in by_length(cells).items()
            for rows in [table(group, reference)]
        ],
        legend=legend(cells),
        plots=[
            (title, f"{title}; the tables above give the values.", png_uri(plots[name]))
            for name, title in PLOTS.items()
        ],
        recipes=[(method, recipes[method]) for method in study.methods],
    )
