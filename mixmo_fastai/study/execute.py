"""Train the runs of a study: one process of `mixmo fit` each, several at a time.

Every run is an ordinary run folder, `FOLDER/runs/NAME`. Finished runs are skipped, interrupted ones
are resumed, and runs that another process trains, also on another machine, are left to it.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mixmo_fastai.data.label_tables import is_table, read_label_table
from mixmo_fastai.errors import InputError, RunFailedError, RunInterruptedError
from mixmo_fastai.runs.lock import locked
from mixmo_fastai.runtime.cpus import available_cpus
from mixmo_fastai.runtime.signals import exit_code_of
from mixmo_fastai.study.plan import PlannedRun
from mixmo_fastai.study.records import check_unchanged, write_record

POLL_SECONDS = 0.2
SECONDS_TO_STOP = 600
"""How long interrupted runs may take to save their states."""


def check_one_label_per_image(runs: Sequence[PlannedRun]) -> None:
    """Check that no run is on a table of several labels per image, before any is trained.

    Raises:
        InputError: one is.
    """
    for dataset in sorted({run.recipe.data.dataset for run in runs}):
        if is_table(dataset) and read_label_table(Path(dataset)).multi is not None:
            raise InputError(
                f"mixmo study is for one label per image; those of {dataset} may have several."
            )


@dataclass
class Executor:
    """Trains runs.

    Attributes:
        folder: folder of the study.
        jobs: number of runs at a time; with several, each has an equal part of the cores, unless
            OMP_NUM_THREADS is set.
        data_dir: as for `mixmo fit`.
        print_line: prints a line.
        failed: names of the runs that failed, with the last line of their output.
    """

    folder: Path
    jobs: int = 1
    data_dir: Path | None = None
    print_line: Callable[[str], None] = print
    failed: dict[str, str] = field(default_factory=dict)
    _log_starts: dict[str, int] = field(default_factory=dict)

    def train(self, runs: Sequence[PlannedRun]) -> None:
        """Train the runs that are not finished and that no other process trains.

        Raises:
            InputError: a run was started with other settings; see `check_unchanged`.
            RunFailedError: some runs failed; the others were trained.
            RunInterruptedError: interrupted; the runs have saved their states.
        """
        check_unchanged(runs, self.folder)
        check_one_label_per_image(runs)
        waiting = [run for run in runs if not run.folder(self.folder).is_finished]
        total, active = len(waiting), {}
        started = 0
        try:
            while waiting or active:
                while waiting and len(active) < self.jobs:
                    run = waiting.pop(0)
                    started += 1
                    if is_in_use(run.folder(self.folder).path):
                        self.print_line(f"{run.name}: another process trains it")
                        continue
                    self.print_line(f"{run.name}: training, {started} of {total}")
                    active[self._start(run)] = run
                time.sleep(POLL_SECONDS)
                for process in [each for each in active if each.poll() is not None]:
                    self._finish(active.pop(process), process.returncode)
        except KeyboardInterrupt as interruption:
            self._stop(list(active))
            raise RunInterruptedError(
                "Interrupted. The states are saved; continue with the same command.",
                exit_code_of(interruption),
            ) from None
        if self.failed:
            reasons = "".join(f"\n{name}: {reason}" for name, reason in [*self.failed.items()][:2])
            raise RunFailedError(f"{len(self.failed)} of {total} runs failed.{reasons}")

    def _start(self, run: PlannedRun) -> "subprocess.Popen[bytes]":
        path = run.folder(self.folder).path
        if (path / "recipe.toml").exists():
            arguments = ["--resume", str(path)]
        else:
            arguments = ["--recipe", str(write_record(run, self.folder)), "--out", str(path)]
        if self.data_dir is not None:
            arguments += ["--data-dir", str(self.data_dir)]
        environment = {**os.environ}
        if self.jobs > 1:
            environment.setdefault(
                "OMP_NUM_THREADS", str(max(1, available_cpus().count // self.jobs))
            )
        with self._log(run).open("ab") as output:
            self._log_starts[run.name] = output.tell()
            return subprocess.Popen(
                [sys.executable, "-m", "mixmo_fastai", "fit", "--quiet", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                # Only this process gets the signals of the terminal, and passes one on.
                start_new_session=True,
            )

    def _log(self, run: PlannedRun) -> Path:
        path = self.folder / "logs" / f"{run.name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _finish(self, run: PlannedRun, code: int) -> None:
        folder = run.folder(self.folder)
        if folder.is_finished:
            self.print_line(
                f"{run.name}: finished in {folder.metrics()['seconds'] / 60:.1f} minutes"
            )
        elif is_in_use(folder.path):  # another process was faster
            self.print_line(f"{run.name}: another process trains it")
        else:
            output = self._log(run).read_bytes()[self._log_starts[run.name] :]
            lines = output.decode("utf-8", errors="replace").split("\n")
            errors = [line for line in lines if line.startswith("Error:")]
            self.failed[run.name] = (errors or [f"exit code {code}; see {self._log(run)}"])[-1]
            self.print_line(f"{run.name}: failed. {self.failed[run.name]}")

    def _stop(self, processes: Sequence["subprocess.Popen[bytes]"]) -> None:
        if processes:
            self.print_line("Stopping the runs; they save their states.")
        for process in processes:
            if process.poll() is None:
                # Not SIGINT, which a shell lets processes in its background ignore.
                process.terminate()
        deadline = time.monotonic() + SECONDS_TO_STOP
        for process in processes:
            try:
                process.wait(max(1, deadline - time.monotonic()))
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                process.kill()
                process.wait()


def is_in_use(folder: Path) -> bool:
    """Check whether another process trains in a folder."""
    if not folder.is_dir():
        return False
    try:
        with locked(folder):
            return False
    except InputError:
        return True
