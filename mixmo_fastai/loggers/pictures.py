"""Pictures that follow a run: the drawings of `mixmo show` and of the report, as PNG."""

import io

from torch import Tensor

from mixmo_fastai.confusion import confusion_matrix
from mixmo_fastai.figures import plot_preview
from mixmo_fastai.preview import Preview
from mixmo_fastai.recipe import Recipe
from mixmo_fastai.report import charts
from mixmo_fastai.report.findings import read_history
from mixmo_fastai.report.sections import MOST_CLASSES_IN_A_MATRIX
from mixmo_fastai.runs import RunFolder
from mixmo_fastai.training import Training
from mixmo_fastai.wording import method_name


def plot_first_batch(preview: Preview, training: Training) -> dict[str, bytes]:
    """Draw the first batch as training saw it."""
    recipe, file = training.recipe, io.BytesIO()
    title = f"{method_name(recipe)}: the first batch of {training.source.name}"
    plot_preview(preview, file, title)
    return {"first-batch": file.getvalue()}


def plot_results(
    run: RunFolder, recipe: Recipe, classes: tuple[str, ...], member_logits: Tensor, labels: Tensor
) -> dict[str, bytes]:
    """Draw what a finished training tells: curves, reliability, confusion where it can be read.

    Args:
        run: its folder, with the history of each network.
        recipe: of the training.
        classes: names, in the order of the logits.
        member_logits: of the test set, or of the validation images without one, (N, M, K).
        labels: (N,).
    """
    logits = member_logits.double().mean(dim=1)  # (N, K)
    histories = [read_history(network) for network in run.networks()]
    several = recipe.model.num_members > 1
    drawn = {
        chart.drawing.name: chart
        for chart in charts.learning_curves(histories, (), several=several)
    }
    title = "Reliability"
    drawn["reliability"] = charts.reliability("reliability", title, logits, labels, caption="")
    if len(classes) <= MOST_CLASSES_IN_A_MATRIX:
        drawn["confusion"] = charts.confusion(confusion_matrix(logits, labels), classes)
    return {name: chart.png for name, chart in drawn.items()}
