"""MixMo training for fastai: an ensemble's accuracy and calibration at the price of one network.

The names below are imported when first used, so that `import mixmo_fastai` loads neither torch nor
fastai.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
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
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
