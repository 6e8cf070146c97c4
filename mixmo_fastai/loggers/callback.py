"""The callback that passes steps, metrics and plots to loggers."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from mixmo_fastai.config.methods import method_name
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.config.schema import to_mapping
from mixmo_fastai.evaluation.logits import LabelledLogits
from mixmo_fastai.learner.preview import Preview, preview_current_batch
from mixmo_fastai.loggers import LOGGERS
from mixmo_fastai.loggers.pictures import plot_first_batch, plot_results
from mixmo_fastai.loggers.tracker import Step, TrackedRun, Tracker
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.runtime.signals import exit_code_of
from mixmo_fastai.training.history import HistoryCallback
from mixmo_fastai.training.prepare import Training
from mixmo_fastai.training.run_callbacks import RunCallback
from mixmo_fastai.training.state import Position


class LoggingCallback(RunCallback):
    """Log steps, epochs, final metrics and plots of each network of a run.

    Losses stay on the device until the Recorder copies its own, so logging adds no synchronisation.
    In distributed training rank 0 logs, with the loss of its own part of each batch. A logger that
    fails is disabled; it never ends training.

    Args:
        names: names of loggers.
        report: prints a line for the user: the location of a tracker's run, and failures.
    """

    order = 57  # after the history has its row, before a checkpoint, which may end the fit

    def __init__(self, names: Iterable[str], report: Callable[[str], None]) -> None:
        super().__init__()
        self.names, self.report = tuple(names), report
        self.trackers: dict[str, Tracker] = {}
        self.reset_state()

    def reset_state(self) -> None:
        """Discard the state of the previous network."""
        self.pending: list[tuple[Step, Tensor]] = []  # losses still on the device
        self.first_batch: Preview | None = None
        self.epochs = []  # drops an interrupted epoch

    @contextmanager
    def run_context(self, training: Training, run: RunFolder, done: Position) -> Iterator[None]:
        """Open the trackers of a run, and close them even if it fails."""
        if not run.is_writer:
            yield
            return
        self.reset_state()
        self.current_training, self.run_folder = training, run
        self.num_done = done.epoch * training.steps_per_epoch + done.step
        exit_code = 1
        try:
            self._open()
            if done.epoch and not done.step and (rows := run.history()):
                # Trackers discard entries from this step on, which includes the last epoch's row.
                self._log_epoch(self.num_done, rows[-1])
            yield
            exit_code = 0
        except KeyboardInterrupt as interruption:
            exit_code = exit_code_of(interruption)
            raise
        finally:
            self._flush()
            self._for_each_tracker(lambda tracker: tracker.close(exit_code))
            self.trackers = {}
            del self.current_training, self.run_folder  # so that the network can be freed

    def _open(self) -> None:
        run, recipe = self.run_folder, self.current_training.recipe
        path, group = run.path.resolve(), None
        if (path.parent / "recipe.toml").is_file():
            group = path.parent.name
        for name in self.names:
            try:
                run.logs.mkdir(exist_ok=True)
                self.trackers[name] = LOGGERS[name].load()(
                    TrackedRun(
                        folder=run.logs.resolve(),
                        name=f"{group}/{path.name}" if group else path.name,
                        group=group,
                        settings=_flat_settings(recipe),
                        steps_done=self.num_done,
                        report=self.report,
                    )
                )
            except Exception as error:
                self._report_failure(name, error)

    def before_batch(self) -> None:
        """Keep the first batch as the network sees it; it is plotted outside the timed steps."""
        if self.trackers and self.learn.epoch == 0 and self.learn.iter == 0:
            with self._errors_reported("the plot of the first batch"):
                self.first_batch = preview_current_batch(self.learn)

    def after_batch(self) -> None:
        """Record the step; log the recorded steps when the Recorder has just synchronised."""
        if not self.trackers:
            return
        hypers = self.learn.opt.hypers[-1]
        step = self.learn.epoch * len(self.learn.dls.train) + self.learn.iter
        recorded = Step(step, self.learn.epoch + 1, 0.0, hypers["lr"], hypers.get("mom", 0.0))
        self.pending.append((recorded, self.learn.loss.detach().as_subclass(Tensor)))
        if not self.learn.recorder.pending:
            self._log_steps()

    def before_save(self) -> None:
        """Log the steps that the checkpoint includes, since training may resume after it."""
        self._log_steps()

    def after_trained_epoch(self) -> None:
        """Log the epoch's row of the history."""
        if not self.trackers:
            return
        self._flush()
        history = next(cb for cb in self.learn.cbs if isinstance(cb, HistoryCallback))
        self._log_epoch((self.learn.epoch + 1) * len(self.learn.dls.train), history.latest)

    def after_evaluation(self, metrics: Mapping[str, Any], test: LabelledLogits) -> None:
        """Log and plot the final metrics."""
        if not self.trackers or test is None:
            return
        training, run = self.current_training, self.run_folder
        step = training.recipe.train.epochs * training.steps_per_epoch
        numbers = dict(_flatten_numbers(metrics))
        self._for_each_tracker(lambda tracker: tracker.log_metrics("final", step, numbers))
        with self._errors_reported("the plots of the result"):
            plots = plot_results(run, training.recipe, training.source.classes, *test)
            self._for_each_tracker(lambda tracker: tracker.log_images(step, plots))

    def _flush(self) -> None:
        """Log the recorded steps and the plot of the first batch."""
        self._log_steps()
        if self.first_batch is not None and self.trackers:
            with self._errors_reported("the plot of the first batch"):
                plots = plot_first_batch(self.first_batch, self.current_training)
                self._for_each_tracker(lambda tracker: tracker.log_images(0, plots))
        self.first_batch = None

    def _log_steps(self) -> None:
        """Copy the losses to the CPU at once, and log their steps."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        with self._errors_reported("the losses of some steps"):
            losses = torch.stack([loss for _, loss in pending]).cpu()
            pairs = zip(pending, losses.tolist(), strict=True)
            steps = [step._replace(loss=loss) for (step, _), loss in pairs]
            self._for_each_tracker(lambda tracker: tracker.log_steps(steps))

    def _log_epoch(self, step: int, row: Mapping[str, Any]) -> None:
        metrics = {n: float(v) for n, v in row.items() if v != "" and n != "epoch"}
        self._for_each_tracker(lambda tracker: tracker.log_metrics("epoch", step, metrics))

    def _for_each_tracker(self, action: Callable[[Tracker], None]) -> None:
        """Apply an action to each tracker; disable those that fail."""
        for name, tracker in [*self.trackers.items()]:
            try:
                action(tracker)
            except Exception as error:
                self._report_failure(name, error)
                del self.trackers[name]
                with suppress(Exception):
                    tracker.close(1)

    @contextmanager
    def _errors_reported(self, description: str) -> Iterator[None]:
        """Report errors of the block instead of raising them, so that training continues."""
        try:
            yield
        except Exception as error:
            self.report(f"--logger: {description} could not be logged: {_one_line(error)}")

    def _report_failure(self, name: str, error: Exception) -> None:
        self.report(f"--logger {name} failed and is now disabled: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _flat_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of a recipe by their full names, such as optimizer.lr."""
    sections = to_mapping(recipe)
    flat: dict[str, Any] = {"method": method_name(recipe)}
    for name, value in sections.items():
        is_section = isinstance(value, Mapping)
        flat |= {f"{name}.{key}": v for key, v in value.items()} if is_section else {name: value}
    return {**flat, "optimizer.lr": recipe.lr}  # its default depends on the batch size


def _flatten_numbers(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers in nested metrics by their paths: test/nll, member_accuracy/1."""
    for key, value in metrics.items():
        entries = dict(enumerate(value, start=1)) if isinstance(value, list) else value
        if isinstance(entries, Mapping):
            yield from _flatten_numbers(entries, f"{prefix}{key}/")
        elif isinstance(entries, int | float):
            yield f"{prefix}{key}", float(entries)
