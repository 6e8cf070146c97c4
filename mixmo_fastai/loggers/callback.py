"""The callback that gives loggers what they log."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from mixmo_fastai.checkpoints.state import Position
from mixmo_fastai.evaluation import LabelledLogits
from mixmo_fastai.interruption import exit_code_of
from mixmo_fastai.loggers import LOGGERS
from mixmo_fastai.loggers.pictures import picture_of_batch, pictures_of_result
from mixmo_fastai.loggers.tracker import Step, Subject, Tracker
from mixmo_fastai.preview import Preview, preview_of
from mixmo_fastai.recipe import Recipe
from mixmo_fastai.recording import HistoryCallback, RunCallback
from mixmo_fastai.runs import RunFolder
from mixmo_fastai.settings import to_mapping
from mixmo_fastai.training import Training
from mixmo_fastai.wording import method_name


class LoggingCallback(RunCallback):
    """Log steps, epochs, final figures and pictures of each network of a run.

    Losses stay on the device until the recorder fetches its own, so that no step waits for this.
    Of several processes that train together the first logs, its own share of each step's loss. A
    logger that fails is left out from there on; training never ends by one.

    Args:
        names: of loggers.
        say: told where a tracker's run is, and what fails.
    """

    order = 57  # after the history has its row, before a checkpoint, which may end the fit

    def __init__(self, names: Iterable[str], say: Callable[[str], None]) -> None:
        super().__init__()
        self.names, self.say = tuple(names), say
        self.trackers: dict[str, Tracker] = {}
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget the network before."""
        self.pending: list[tuple[Step, Tensor]] = []  # their losses are on the device still
        self.first_batch: Preview | None = None
        self.epochs = []  # one that was cut short

    @contextmanager
    def run_context(self, training: Training, run: RunFolder, done: Position) -> Iterator[None]:
        """Open the trackers of a run, and close them however it ends."""
        if not run.is_writer:
            yield
            return
        self.begin_anew()
        self.followed, self.run_folder = training, run
        self.num_done = done.epoch * training.steps_per_epoch + done.step
        exit_code = 1
        try:
            self._open()
            if done.epoch and not done.step and (rows := run.history()):
                # Where epochs meet, what is void begins at the same place as this row.
                self._log_epoch(self.num_done, rows[-1])
            yield
            exit_code = 0
        except KeyboardInterrupt as interruption:
            exit_code = exit_code_of(interruption)
            raise
        finally:
            self._flush()
            self._tell(lambda tracker: tracker.close(exit_code))
            self.trackers = {}
            del self.followed, self.run_folder  # or the network would outlive its training

    def _open(self) -> None:
        run, recipe = self.run_folder, self.followed.recipe
        path, group = run.path.resolve(), None
        if (path.parent / "recipe.toml").is_file():
            group = path.parent.name
        for name in self.names:
            try:
                run.logs.mkdir(exist_ok=True)
                self.trackers[name] = LOGGERS[name].load()(
                    Subject(
                        folder=run.logs.resolve(),
                        name=f"{group}/{path.name}" if group else path.name,
                        group=group,
                        settings=_settings(recipe),
                        done=self.num_done,
                        say=self.say,
                    )
                )
            except Exception as error:
                self._say_failed(name, error)

    def before_batch(self) -> None:
        """Keep the first batch as the network sees it; it is drawn when no clock runs."""
        if self.trackers and self.learn.epoch == 0 and self.learn.iter == 0:
            with self._surely("the picture of the first batch"):
                self.first_batch = preview_of(self.learn)

    def after_batch(self) -> None:
        """Note the step; log all that are noted when the recorder has just waited anyway."""
        if not self.trackers:
            return
        hypers = self.learn.opt.hypers[-1]
        step = self.learn.epoch * len(self.learn.dls.train) + self.learn.iter
        noted = Step(step, self.learn.epoch + 1, 0.0, hypers["lr"], hypers["mom"])
        self.pending.append((noted, self.learn.loss.detach().as_subclass(Tensor)))
        if not self.learn.recorder.pending:
            self._log_steps()

    def before_save(self) -> None:
        """Log the steps that a checkpoint holds: training may go on after it."""
        self._log_steps()

    def after_trained_epoch(self) -> None:
        """Log the epoch's row of the history."""
        if not self.trackers:
            return
        self._flush()
        history = next(cb for cb in self.learn.cbs if isinstance(cb, HistoryCallback))
        self._log_epoch((self.learn.epoch + 1) * len(self.learn.dls.train), history.latest)

    def after_evaluation(self, figures: Mapping[str, Any], test: LabelledLogits) -> None:
        """Log the final figures, and draw what they tell."""
        if not self.trackers or test is None:
            return
        training, run = self.followed, self.run_folder
        step = training.recipe.train.epochs * training.steps_per_epoch
        numbers = dict(_numbers(figures))
        self._tell(lambda tracker: tracker.figures("final", step, numbers))
        with self._surely("the pictures of the result"):
            drawn = pictures_of_result(run, training.recipe, training.source.classes, *test)
            self._tell(lambda tracker: tracker.pictures(step, drawn))

    def _flush(self) -> None:
        """Log what is noted, and draw what is kept."""
        self._log_steps()
        if self.first_batch is not None and self.trackers:
            with self._surely("the picture of the first batch"):
                drawn = picture_of_batch(self.first_batch, self.followed)
                self._tell(lambda tracker: tracker.pictures(0, drawn))
        self.first_batch = None

    def _log_steps(self) -> None:
        """Bring the losses to the host in one copy, and log their steps."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        with self._surely("the losses of some steps"):
            losses = torch.stack([loss for _, loss in pending]).cpu()
            pairs = zip(pending, losses.tolist(), strict=True)
            steps = [step._replace(loss=loss) for (step, _), loss in pairs]
            self._tell(lambda tracker: tracker.steps(steps))

    def _log_epoch(self, step: int, row: Mapping[str, Any]) -> None:
        figures = {n: float(v) for n, v in row.items() if v != "" and n != "epoch"}
        self._tell(lambda tracker: tracker.figures("epoch", step, figures))

    def _tell(self, action: Callable[[Tracker], None]) -> None:
        """Do something with each tracker; leave out those that fail."""
        for name, tracker in [*self.trackers.items()]:
            try:
                action(tracker)
            except Exception as error:
                self._say_failed(name, error)
                del self.trackers[name]
                with suppress(Exception):
                    tracker.close(1)

    @contextmanager
    def _surely(self, what: str) -> Iterator[None]:
        """Go on with training, whatever is wrong with something that was to be logged."""
        try:
            yield
        except Exception as error:
            self.say(f"--logger: {what} could not be logged: {_in_a_line(error)}")

    def _say_failed(self, name: str, error: Exception) -> None:
        self.say(f"--logger {name} failed and is left out from here on: {_in_a_line(error)}")


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Give the settings of a recipe by the names that a person types, as optimizer.lr."""
    sections = to_mapping(recipe)
    flat: dict[str, Any] = {"method": method_name(recipe)}
    for name, value in sections.items():
        named = isinstance(value, Mapping)
        flat |= {f"{name}.{key}": v for key, v in value.items()} if named else {name: value}
    return {**flat, "optimizer.lr": recipe.lr}  # which may follow from the batch size


def _numbers(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Give the numbers among nested figures by their paths, as test/nll and member_accuracy/1."""
    for key, value in figures.items():
        parts = dict(enumerate(value, start=1)) if isinstance(value, list) else value
        if isinstance(parts, Mapping):
            yield from _numbers(parts, f"{prefix}{key}/")
        elif isinstance(parts, int | float):
            yield f"{prefix}{key}", float(parts)
