"""MixMo training for fastai: an ensemble's accuracy and calibration at the cost of one network.

The public names are imported on first use, so that `import mixmo_fastai` imports neither torch nor
fastai.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "EMACallback": "averaging",
    "MixMoCallback": "callback",
    "MixMoLoss": "losses",
    "MixMoModel": "models",
    "body_and_heads": "parameter_groups",
    "convert_to_mixmo": "models",
    "create_model": "models",
    "defer_readbacks": "deferred",
    "member_preds": "member_predictions",
    "mixmo_learner": "learner",
    "evaluate_logits": "evaluation",
    "load_fused": "export",
    "Recipe": "recipe",
    "show_pairs": "figures",
    "to_mixmo": "learner",
}
__all__ = ["__version__", *_MODULES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
