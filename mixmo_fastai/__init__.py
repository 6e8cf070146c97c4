"""MixMo training for fastai: an ensemble's prediction at the cost of one network.

The public names are imported on first use, so that `import mixmo_fastai` imports neither torch nor
fastai.
"""

from mixmo_fastai.imports import find_former_modules, lazy_names

__version__ = "0.2.0.dev0"

_MODULES = {
    "Brier": "metrics.fastai",
    "Disagreement": "metrics.fastai",
    "ECE": "metrics.fastai",
    "EMACallback": "callbacks.ema",
    "MemberAccuracy": "metrics.fastai",
    "MixMoCallback": "callbacks.mixmo",
    "MixMoLoss": "mixing.loss",
    "MixMoModel": "models",
    "NLL": "metrics.fastai",
    "Abstain": "metrics.abstention",
    "ConformalSets": "metrics.conformal",
    "body_and_heads": "learner.parameter_groups",
    "calibrate_learner": "evaluation.learner_calibration",
    "calibrated_preds": "evaluation.learner_calibration",
    "convert_to_mixmo": "models",
    "create_model": "models",
    "defer_readbacks": "callbacks.deferred",
    "member_preds": "learner.member_preds",
    "mixmo_learner": "learner.build",
    "evaluate_logits": "metrics.summary",
    "load_fused": "export.files",
    "Recipe": "config.recipe",
    "show_pairs": "plots.png",
    "to_mixmo": "learner.build",
}
__all__ = ["__version__", *_MODULES]  # noqa: PLE0604
__getattr__, _ = lazy_names(__name__, _MODULES)
find_former_modules()


def __dir__() -> list[str]:
    return sorted(__all__)
