"""Predictions and metrics of trained networks.

logits              member logits of every image of a loader
splits              metrics of a run's splits, calibrated
multi_label         metrics of images with several labels
runs                evaluation of finished runs, alone or together as a deep ensemble
logit_files         logits of every member and image, as a file
label_distribution  metrics of a run against label distributions
ood                 out-of-distribution images, and how well a run detects them
compare             comparison of runs on the same test images
predict             predictions for image files
results             the final metrics of a run
"""

from mixmo_fastai.imports import lazy_names

_MODULES = {
    "collect_member_logits": "evaluation.logits",
    "evaluate_logits": "metrics.summary",
    "evaluate_splits": "evaluation.splits",
    "evaluate_run": "evaluation.runs",
    "compare_runs": "evaluation.compare",
    "predict_images": "evaluation.predict",
}
__all__ = [*_MODULES]  # noqa: PLE0604
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
