"""Runs on images with several labels: what they predict, and what is not defined for them."""

from collections.abc import Mapping

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.label_results import LABELS, in_use
from mixmo_fastai.metrics.multi_label import DEFAULT_THRESHOLD, LabelDecisions
from mixmo_fastai.runs.folder import RunFolder


def check_one_label(run: RunFolder, action: str) -> None:
    """Check that the images of a run have one label each.

    Args:
        run: the run.
        action: what is defined for these only, such as "mixmo compare".

    Raises:
        InputError: they have several.
    """
    facts = run.data_facts()
    if facts is not None and facts.is_multi_label:
        raise InputError(
            f"{action} is for one label per image; those of {run.path} may have several.\n"
            f"See its metrics: mixmo eval {run.argument}"
        )


def check_not_requested(run: RunFolder, requested: Mapping[str, object]) -> None:
    """Check that no evaluation is requested that is defined for one label per image only.

    Args:
        run: a run on images with several labels.
        requested: whether each option of `mixmo eval` is, by its name.

    Raises:
        InputError: one is.
    """
    for name, is_requested in requested.items():
        if is_requested:
            check_one_label(run, f"mixmo eval --{name}")


def label_decisions(run: RunFolder, num_classes: int, *, raw: bool = False) -> LabelDecisions:
    """Return which labels a run predicts, from its metrics.json.

    Args:
        run: a finished run.
        num_classes: K.
        raw: the probabilities are not calibrated; the decisions stay the same.

    Raises:
        InputError: metrics.json is damaged.
    """
    default = {"thresholds": [DEFAULT_THRESHOLD] * num_classes}
    try:
        entry = run.metrics().get(LABELS, default)
        found = LabelDecisions.from_mapping(in_use(entry), num_classes)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{run.path / 'metrics.json'} is damaged: {error}.") from error
    return found.with_temperature(1.0) if raw else found
