"""Train the runs of a study: one process of `mixmo fit` each, several at a time.

Every run is an ordinary run folder, `FOLDER/runs/NAME`. Finished runs are skipped, interrupted ones
are resumed, and runs that another process trains, also on another machine, are left to it: a
process claims a run before it starts it.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mixmo_fastai.config.choices import is_table
from mixmo_fastai.data.hub_dataset import is_hub_dataset
from mixmo_fastai.data.table_columns import TableColumns, columns_of
from mixmo_fastai.data.table_images import read_table
from mixmo_fastai.errors import InputError, RunFailedError, RunInterruptedError
from mixmo_fastai.runs.lock import claim, locked
from mixmo_fastai.runtime.cpus import available_cpus
from mixmo_fastai.runtime.signals import StopRequest, exit_code_of, handling_signals
from mixmo_fastai.study.plan import PlannedRun
from mixmo_fastai.study.records import (
    check_not_moved,
    check_unchanged,
    write_record,
    writing_study,
)

POLL_SECONDS = 0.2
SECONDS_TO_STOP = 600
"""How long interrupted runs may take to save their states."""


def check_one_label_per_image(runs: Sequence[PlannedRun], folder: Path) -> None:
    """Check that no run is on images with several labels, before any is trained.

    Args:
        runs: the runs; the tables of those that were not started are read with their settings.
        folder: folder of the study.

    Raises:
        InputError: one is, or its table cannot be read.
    """
    tables: dict[tuple[str, TableColumns], bool] = {}
    for run in runs:
        data, facts = run.recipe.data, run.folder(folder).data_facts()
        if facts is not None:
            is_multi_label = facts.is_multi_label
        elif is_table(data.dataset) or is_hub_dataset(data.dataset):
            key = data.dataset, columns_of(data)
            if key not in tables:
                tables[key] = read_table(*key).multi is not None
            is_multi_label = tables[key]
        else:
            continue
        if is_multi_label:
            raise InputError(
                f"mixmo study is for one label per image; those of {data.dataset} may have several."
            )


@dataclass(frozen=True)
class _ActiveRun:
    """A run in training: its process, and the function that ends the claim on it."""

    run: PlannedRun
    process: "subprocess.Popen[bytes]"
    end_claim: Callable[[], None]


@dataclass
class Executor:
    """Trains runs.

    Attributes:
        folder: folder of the study.
        jobs: number of runs at a time; with several, each has an equal part of the cores, unless
            OMP_NUM_THREADS is set.
        data_dir: as for `mixmo fit`.
        print_line: prints a line.
        program: file of the program whose command `fit` trains; None for `mixmo`.
        failed: names of the runs that failed, with the reason.
    """

    folder: Path
    jobs: int = 1
    data_dir: Path | None = None
    print_line: Callable[[str], None] = print
    program: str | None = None
    failed: dict[str, str] = field(default_factory=dict)
    _num_killed: int = 0
    _log_starts: dict[str, int] = field(default_factory=dict)

    def train(self, runs: Sequence[PlannedRun]) -> None:
        """Train the runs that are not finished and that no other process trains.

        Raises:
            InputError: a run was started with other settings, see `check_unchanged`, or its images
                may have several labels.
            RunFailedError: some runs failed or their data was moved, and the others were trained;
                or a file cannot be written, and the runs have saved their states.
            RunInterruptedError: interrupted; the runs have saved their states.
        """
        check_unchanged(runs, self.folder)
        waiting = [run for run in runs if not run.folder(self.folder).is_finished]
        check_one_label_per_image(waiting, self.folder)
        total = len(waiting)
        try:
            # A signal raised at once could come between the start of a run and its registration,
            # and a second one, which a terminal or a parent may send too, while runs are stopped.
            with handling_signals() as stop, stop.deferred():
                self._train(waiting, stop)
        except KeyboardInterrupt as error:
            raise RunInterruptedError(self._interrupted(), exit_code_of(error)) from None
        if self.failed:
            reasons = "".join(f"\n{name}: {reason}" for name, reason in [*self.failed.items()][:2])
            raise RunFailedError(f"{len(self.failed)} of {total} runs failed.{reasons}")

    def _interrupted(self) -> str:
        """Return the message of an interrupted study."""
        state = "The states are saved"
        if self._num_killed:
            state = (
                f"Runs killed, since they did not stop within {SECONDS_TO_STOP} s: "
                f"{self._num_killed}; the last states are kept"
            )
        return f"Interrupted. {state}; continue with the same command."

    def _train(self, waiting: list[PlannedRun], stop: StopRequest) -> None:
        """Train runs until none is left or a signal was received; then stop those in training."""
        total = len(waiting)
        active: list[_ActiveRun] = []
        left: list[PlannedRun] = []  # to other processes, which may be stopped meanwhile
        try:
            while (waiting or active) and stop.number is None:
                while waiting and len(active) < self.jobs and stop.number is None:
                    run = waiting.pop(0)
                    number = total - len(waiting) - len(left)
                    if started := self._start_if_free(run, f"{number} of {total}"):
                        active.append(started)
                    elif run.name not in self.failed:
                        left.append(run)
                if not active:
                    break
                time.sleep(POLL_SECONDS)
                for ended in [each for each in active if each.process.poll() is not None]:
                    active.remove(ended)
                    try:
                        self._finish(ended.run, ended.process.returncode)
                    finally:
                        ended.end_claim()
                if not waiting and not active:  # time has passed, so look again
                    waiting, left = [r for r in left if not r.folder(self.folder).is_finished], []
        finally:
            self._stop(active)

    def _start_if_free(self, run: PlannedRun, position: str) -> _ActiveRun | None:
        """Start a run, unless it is finished meanwhile or another process trains it.

        One that was started with other settings, or whose data was moved, fails.
        """
        folder = run.folder(self.folder)
        with writing_study(folder.path):
            end_claim = claim(folder.path)
        if end_claim is None:
            self.print_line(f"{run.name}: another process trains it")
            return None
        try:
            if folder.is_finished:
                self.print_line(f"{run.name}: another process has trained it")
            elif is_in_use(folder.path):  # by `mixmo fit`
                self.print_line(f"{run.name}: another process trains it")
            elif problem := self._problem(run):
                self._fail(run, problem)
            else:
                self.print_line(f"{run.name}: training, {position}")
                return _ActiveRun(run, self._start(run), end_claim)
        except BaseException:
            end_claim()
            raise
        end_claim()
        return None

    def _problem(self, run: PlannedRun) -> str | None:
        """Return why a run cannot go on that this or another process started, or None."""
        try:
            check_unchanged([run], self.folder)  # once more: the study may have changed meanwhile
            check_not_moved(run, self.folder)
        except InputError as error:
            return str(error).removeprefix(f"{run.name} ")
        return None

    def _start(self, run: PlannedRun) -> "subprocess.Popen[bytes]":
        path = run.folder(self.folder).path
        if (path / "recipe.toml").exists():
            arguments = ["--resume", str(path)]
        else:
            arguments = ["--recipe", str(write_record(run, self.folder)), "--out", str(path)]
        if self.data_dir is not None:
            arguments += ["--data-dir", str(self.data_dir)]
        program = [self.program] if self.program else ["-m", "mixmo_fastai"]
        environment = {**os.environ}
        if self.jobs > 1:
            environment.setdefault(
                "OMP_NUM_THREADS", str(max(1, available_cpus().count // self.jobs))
            )
        with writing_study(self._log(run)):
            self._log(run).parent.mkdir(parents=True, exist_ok=True)
            output = self._log(run).open("ab")
        with output:
            self._log_starts[run.name] = output.tell()
            return subprocess.Popen(
                [sys.executable, *program, "fit", "--quiet", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                # Only this process gets the signals of the terminal, and passes one on.
                start_new_session=True,
            )

    def _log(self, run: PlannedRun) -> Path:
        return self.folder / "logs" / f"{run.name}.txt"

    def _finish(self, run: PlannedRun, code: int) -> None:
        folder = run.folder(self.folder)
        if folder.is_finished:
            self.print_line(
                f"{run.name}: finished in {folder.metrics()['seconds'] / 60:.1f} minutes"
            )
        elif is_in_use(folder.path):  # started by `mixmo fit` after the check
            self.print_line(f"{run.name}: another process trains it")
        else:
            output = b""
            with suppress(OSError):
                output = self._log(run).read_bytes()[self._log_starts[run.name] :]
            lines = output.decode("utf-8", errors="replace").split("\n")
            errors = [line for line in lines if line.startswith("Error:")]
            self._fail(run, (errors or [f"exit code {code}; see {self._log(run)}"])[-1])

    def _fail(self, run: PlannedRun, reason: str) -> None:
        self.failed[run.name] = reason
        self.print_line(f"{run.name}: failed. {reason}")

    def _stop(self, active: Sequence[_ActiveRun]) -> None:
        processes = [each.process for each in active]
        for process in processes:
            if process.poll() is None:
                # Not SIGINT, which a shell lets processes in its background ignore.
                process.terminate()
        if processes:
            with suppress(OSError):  # a terminal or pipe that was closed
                self.print_line("Stopping the runs; they save their states.")
        deadline = time.monotonic() + SECONDS_TO_STOP
        for process in processes:
            try:
                process.wait(max(1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                self._num_killed += 1
        for each in active:
            each.end_claim()


def is_in_use(folder: Path) -> bool:
    """Check whether another process trains in a folder."""
    if not folder.is_dir():
        return False
    try:
        with locked(folder):
            return False
    except InputError:
        return True
