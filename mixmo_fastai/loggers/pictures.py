"""Plots of a run for loggers: those of `mixmo show` and of the report, as PNG data."""

import io

from torch import Tensor

from mixmo_fastai.config.methods import method_name
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.learner.preview import Preview
from mixmo_fastai.metrics.confusion import confusion_matrix
from mixmo_fastai.metrics.multi_label import DECISIONS, as_decisions
from mixmo_fastai.plots.png import plot_preview
from mixmo_fastai.report import charts
from mixmo_fastai.report.report_data import read_history
from mixmo_fastai.report.sections import MAX_MATRIX_CLASSES
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.training.prepare import Training


def plot_first_batch(preview: Preview, training: Training) -> dict[str, bytes]:
    """Plot the first batch of a training."""
    recipe, file = training.recipe, io.BytesIO()
    title = f"{method_name(recipe)}: the first batch of {training.source.name}"
    plot_preview(preview, file, title)
    return {"first-batch": file.getvalue()}


def plot_results(
    run: RunFolder, recipe: Recipe, classes: tuple[str, ...], member_logits: Tensor, labels: Tensor
) -> dict[str, bytes]:
    """Plot learning curves, reliability and, for few classes, the confusion matrix.

    Args:
        run: the run folder, with the history of each network.
        recipe: recipe of the run.
        classes: class names, in the order of the logits.
        member_logits: logits of the test set, or of the validation images if it is empty,
            (N, M, K).
        labels: (N,), or (N, K) for several labels per image, each of which is a decision.
    """
    if labels.ndim == 2:
        member_logits, labels = as_decisions(member_logits, labels)
        classes = DECISIONS
    logits = member_logits.double().mean(dim=1)  # (N, K)
    histories = [read_history(network) for network in run.networks()]
    has_members = recipe.model.num_members > 1
    plots = {
        chart.plot.name: chart
        for chart in charts.learning_curves(histories, (), has_members=has_members)
    }
    title = "Reliability"
    plots["reliability"] = charts.reliability("reliability", title, logits, labels, caption="")
    if len(classes) <= MAX_MATRIX_CLASSES:
        plots["confusion"] = charts.confusion(confusion_matrix(logits, labels), classes)
    return {name: chart.png for name, chart in plots.items()}
