"""Base class of callbacks that follow a run beyond the fit, such as loggers and displays."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from fastai.callback.core import Callback

from mixmo_fastai.callbacks.epoch import TrainedEpochCallback
from mixmo_fastai.evaluation.logits import LabelledLogits
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.training.state import Position


class RunCallback(TrainedEpochCallback):
    """A callback with events for the whole run, from before the fit until after the evaluation.

    fastai's events end with the fit, and none reports an error or a signal.
    """

    @contextmanager
    def run_context(self, training: Any, run: RunFolder, done: Position) -> Iterator[None]:
        """Wrap the run in a with block; its exceptions are raised at the yield.

        Args:
            training: from `prepare.prepare`. For a deep ensemble, first that of each network,
                then, after all are trained, that of the ensemble.
            run: the run folder.
            done: the position at which training starts.
        """
        yield

    def before_save(self) -> None:
        """Act before a checkpoint is saved."""

    def after_evaluation(self, metrics: Mapping[str, Any], test: LabelledLogits) -> None:
        """Receive the final metrics, and the member logits and labels they were computed from.

        These belong to the test set, or to the validation images if no test image is labelled.
        """


@contextmanager
def entered_run_callbacks(
    cbs: Iterable[Callback], training: Any, run: RunFolder, done: Position
) -> Iterator[list[RunCallback]]:
    """Enter the context of every RunCallback for the duration of a with block, and return them."""
    run_callbacks = [callback for callback in cbs if isinstance(callback, RunCallback)]
    with ExitStack() as stack:
        for callback in run_callbacks:
            stack.enter_context(callback.run_context(training, run, done))
        yield run_callbacks
