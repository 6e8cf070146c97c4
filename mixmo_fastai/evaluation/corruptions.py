"""Evaluation of a run on corrupted test images."""

from pathlib import Path
from statistics import mean
from typing import Any

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.summary import MetricInputs
from mixmo_fastai.metrics.table import METRICS

BUILT_IN_NAME = "built-in"
OFFICIAL_SHAPE = (3, 32, 32)


def evaluate_corruptions(finished: Any, corruptions: str) -> dict[str, Any]:
    """Evaluate a run on corrupted test images; see `runs.evaluate_run`.

    Args:
        finished: a `runs.FinishedRun`.
        corruptions: a folder, or "built-in".

    Raises:
        InputError: the files are missing or damaged, or do not match the run's images or classes.
    """
    from mixmo_fastai.data.corruptions import make_corrupted, read_official  # torchvision: 2 s

    test, shape = finished.final_images, finished.source.train.image_shape
    if corruptions != BUILT_IN_NAME and shape != OFFICIAL_SHAPE:
        raise InputError(
            f"--corruptions DIR needs images of 3x32x32; this run has {shape}.\n"
            f"Use --corruptions {BUILT_IN_NAME}."
        )
    corrupted_sets = (
        make_corrupted(test.tensor(), test.labels, finished.device)
        if corruptions == BUILT_IN_NAME
        else read_official(Path(corruptions).expanduser())
    )
    expected = int(test.labels.max()) + 1
    computed = [metric for metric in METRICS if metric.corrupted_name]
    by_kind: dict[str, dict[str, list[float]]] = {}
    for corrupted in corrupted_sets:
        labels = corrupted.labels
        if (count := int(labels.max()) + 1) != expected:  # CIFAR-10-C for CIFAR-100, for example
            raise InputError(
                f"{corruptions} has {count} classes; the images of this run have {expected}."
            )
        logits = finished.logits([finished.loader(corrupted.pixels)])[0][0].double().mean(dim=1)
        inputs, values = MetricInputs(logits, labels), by_kind.setdefault(corrupted.kind, {})
        for metric in computed:
            values.setdefault(metric.name, []).append(metric.compute(inputs))
    types = {
        kind: {**{name: mean(each) for name, each in by_name.items()}, "severities": by_name}
        for kind, by_name in by_kind.items()
    }
    overall = {
        metric.corrupted_name: mean(values[metric.name] for values in types.values())
        for metric in computed
    }
    return {"source": corruptions, **overall, "types": types}
