"""Metrics of logits and labels.

accuracy     top-1 and top-5 accuracy
calibration  NLL, Brier, ECE, TACE
temperature  temperature scaling
diversity    ratio error, disagreement, mutual information of the members
selective    failure AUROC, risk-coverage
confusion    confusion matrix, most confused classes
summary      all metrics: `evaluate_logits`
ood          out-of-distribution detection: AUROC, AUPR, FPR at 95 % TPR
bootstrap    confidence intervals
label_distribution  cross-entropy, KL divergence, Brier, total variation against human labels
multi_label  metrics of several labels per image; label_results: as rows of text
fastai       metrics for a Learner
table        the table of all metrics: how each is computed, displayed and compared
"""

from mixmo_fastai.imports import lazy_names

_MODULES = {
    "Brier": "metrics.fastai",
    "Disagreement": "metrics.fastai",
    "ECE": "metrics.fastai",
    "MemberAccuracy": "metrics.fastai",
    "NLL": "metrics.fastai",
}
__all__ = [*_MODULES]  # noqa: PLE0604
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
