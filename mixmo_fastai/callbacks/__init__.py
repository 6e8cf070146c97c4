"""fastai callbacks that work in any Learner.

mixmo       MixMoCallback: pairs the images of a batch and draws the masks that mix them
draws       its random draws: pairing, masks, loss weights, MSDA
ema         EMACallback: moving average of the weights
best_epoch  selection of the best epoch on the validation split
freeze      the heads alone are trained at first
deferred    fastai's Recorder and progress bar without device synchronisation
epoch       base class of callbacks that act once per trained epoch
checks      checks that a Learner can train a MixMo network
plain_errors  how errors of callbacks are raised
"""

from mixmo_fastai.imports import lazy_names

_MODULES = {
    "BestEpochCallback": "callbacks.best_epoch",
    "EMACallback": "callbacks.ema",
    "MixMoCallback": "callbacks.mixmo",
    "defer_readbacks": "callbacks.deferred",
}
__all__ = [*_MODULES]  # noqa: PLE0604
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
