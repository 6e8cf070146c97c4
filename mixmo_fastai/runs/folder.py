"""The run folder: all files of a run, readable without this project.

recipe.toml        resolved, everything needed to run it again
environment.json   versions, device, command, seed, git revision
data.json          class names; mean, standard deviation and shape of the images
split.json         for image folders: the training, validation and test images
left-out.json      with --skip-damaged: image files that could not be decoded, with reasons
history.csv        one row per epoch
metrics.json       final metrics
model.safetensors  weights
checkpoint/        state to resume from
log.txt            printed output
logs/              output of `--logger`: metrics per step, plots, and the loggers' own files
report.html        the page written by `mixmo report`
net-1/, net-2/     deep ensembles only: one run folder per network, with its weights, history and
                   checkpoint
"""

import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import Any

from mixmo_fastai.config.load import load_recipe
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.config.schema import to_toml
from mixmo_fastai.errors import InputError, RunFailedError
from mixmo_fastai.runs.data_facts import DataFacts
from mixmo_fastai.runs.files import write_atomically
from mixmo_fastai.runs.output import expand_user


class RunFolder:
    """The folder of one run. Use `create_run` or `open_run` to obtain an instance.

    Args:
        path: the folder.
        is_writer: whether this process writes to the folder. In distributed training only rank 0
            does.
    """

    def __init__(self, path: Path, *, is_writer: bool = True) -> None:
        self.path, self.is_writer = path, is_writer

    @property
    def argument(self) -> str:
        """Path as an argument of a command in messages, quoted if necessary."""
        return quote(str(self.path))

    @property
    def weights(self) -> Path:
        """Path of the trained weights."""
        return self.path / "model.safetensors"

    @property
    def report(self) -> Path:
        """Path of the HTML report."""
        return self.path / "report.html"

    @property
    def logs(self) -> Path:
        """Folder for the output of loggers."""
        return self.path / "logs"

    @property
    def checkpoint(self) -> Path:
        """Folder of the checkpoints to resume from."""
        return self.path / "checkpoint"

    @property
    def has_state(self) -> bool:
        """Whether the run has a checkpoint, intact or not."""
        return any(self.checkpoint.glob("save-*"))

    @property
    def is_finished(self) -> bool:
        """Whether the run has its final metrics."""
        return (self.path / "metrics.json").is_file()

    def check_trained(self) -> None:
        """Check that every network of the run has trained weights.

        Raises:
            InputError: the weights of a network are missing.
        """
        networks = self.networks()
        done = sum(network.weights.is_file() for network in networks)
        if done == len(networks):
            return
        progress = f"{done} of {len(networks)} networks are finished"
        state = progress if len(networks) > 1 else "the run is not finished"
        raise InputError(
            f"{self.path} has no weights yet: {state}.\n"
            f"Continue it: mixmo fit --resume {self.argument}"
        )

    def check_resumable(self) -> None:
        """Check that training can continue from the checkpoints of the run.

        Raises:
            InputError: the run has weights but no checkpoint, as after `mixmo import`.
        """
        for network in self.networks():
            if network.weights.is_file() and not network.has_state:
                raise InputError(
                    f"{network.path} has weights but no checkpoint to resume from: the run was "
                    "imported, or the checkpoint was removed.\n"
                    "The run is unchanged. Use `mixmo eval` to evaluate it."
                )

    def recipe(self) -> Recipe:
        """Read the resolved recipe."""
        return load_recipe(self.path / "recipe.toml")

    def write_recipe(self, recipe: Recipe) -> None:
        """Replace recipe.toml by a fully resolved recipe."""
        self._write("recipe.toml", to_toml(recipe))

    def networks(self) -> list["RunFolder"]:
        """Return one run per network: the networks of a deep ensemble, otherwise this run."""
        num_nets = self.recipe().model.num_nets
        if num_nets == 1:
            return [self]
        paths = [self.path / f"net-{number}" for number in range(1, num_nets + 1)]
        return [RunFolder(path, is_writer=self.is_writer) for path in paths]

    def metrics(self) -> dict[str, Any]:
        """Read the final metrics.

        Raises:
            InputError: the run is not finished, or the file is damaged.
        """
        if not self.is_finished and self.weights.is_file() and not self.has_state:
            raise InputError(
                f"{self.path} has no final metrics: it was imported, or its checkpoint was removed."
                "\n`mixmo eval` and `mixmo export` do not need them."
            )
        if not self.is_finished:
            raise InputError(
                f"{self.path} has no final metrics: the run is not finished.\n"
                f"Continue it: mixmo fit --resume {self.argument}"
            )
        return self._read_json("metrics.json")

    def environment(self) -> dict[str, Any]:
        """Read environment.json; return an empty dictionary if the run has none.

        Raises:
            InputError: the file is damaged.
        """
        exists = (self.path / "environment.json").is_file()
        return self._read_json("environment.json") if exists else {}

    def record_threads(self, number: int, before: int, *, epoch: int, step: int) -> None:
        """Keep `thread_changes` of environment.json up to date when training starts or goes on.

        Changes at or after this position are removed: training goes on before them, from an
        earlier checkpoint.

        Args:
            number: the number from now on, which is appended if it is another one.
            before: the number with which the run began.
            epoch: number of completed epochs.
            step: number of completed steps of the next epoch.

        Raises:
            InputError: the file is damaged.
        """
        environment = self.environment()
        recorded = environment.get("thread_changes", [])
        try:
            changes = [each for each in recorded if (each["epoch"], each["step"]) < (epoch, step)]
            last = changes[-1]["threads"] if changes else before
        except (TypeError, KeyError):
            raise InputError(
                f"{self.path / 'environment.json'} is damaged: each of thread_changes needs epoch, "
                "step and threads."
            ) from None
        if number != last:
            changes.append({"epoch": epoch, "step": step, "threads": number})
        if changes != recorded:
            environment["thread_changes"] = changes
            self._write("environment.json", json.dumps(environment, indent=2) + "\n")

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # invalid JSON or invalid UTF-8
            raise InputError(f"{path} is damaged: {error}.") from error
        if not isinstance(values, dict):
            raise InputError(f"{path} is damaged: it must hold a JSON object.")
        return values

    def data_facts(self) -> "DataFacts | None":
        """Read data.json; return None if the run has none.

        Raises:
            InputError: the file is damaged.
        """
        path = self.path / "data.json"
        try:
            return DataFacts.from_mapping(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} is damaged: {error}.") from error

    def write_data_facts(self, facts: "DataFacts") -> None:
        """Write data.json."""
        self._write("data.json", json.dumps(dataclasses.asdict(facts), indent=2) + "\n")

    def split(self) -> dict[str, Any] | None:
        """Read split.json; return None if the run has none.

        Raises:
            InputError: the file is damaged.
        """
        return self._read_json("split.json") if (self.path / "split.json").is_file() else None

    def write_split(self, parts: Mapping[str, Any]) -> None:
        """Write split.json: the training, validation and test images of a folder."""
        self._write("split.json", json.dumps(parts, indent=1) + "\n")

    def left_out(self) -> dict[str, str] | None:
        """Read the skipped damaged files, with reasons; return None without --skip-damaged.

        Raises:
            InputError: the file is damaged.
        """
        return self._read_json("left-out.json") if (self.path / "left-out.json").is_file() else None

    def write_left_out(self, files: Mapping[str, str]) -> None:
        """Write the skipped damaged files, with reasons."""
        self._write("left-out.json", json.dumps(dict(files), indent=1) + "\n")

    def history(self) -> list[dict[str, str]]:
        """Read the rows of history.csv."""
        path = self.path / "history.csv"
        if not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def append_history(self, row: Mapping[str, Any]) -> None:
        """Append the row of one epoch to history.csv."""
        if not self.is_writer:
            return
        with (
            writing(self.path / "history.csv") as path,
            path.open("a", newline="", encoding="utf-8") as file,
        ):
            is_empty = not file.tell()
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if is_empty:
                writer.writeheader()
            writer.writerow(row)

    def write_history(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace history.csv by these rows, the completed epochs of a resumed run."""
        if not rows:
            if self.is_writer:
                with writing(self.path / "history.csv") as path:
                    path.unlink(missing_ok=True)
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self._write("history.csv", text.getvalue())

    def log(self, line: str) -> None:
        """Append a line to log.txt. Errors are ignored: a log line must not end a run."""
        if not self.is_writer:
            return
        path = self.path / "log.txt"
        # Names of files may be any bytes.
        with suppress(OSError), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write the final metrics."""
        self._write("metrics.json", json.dumps(metrics, indent=2) + "\n")

    def write_weights(self, content: bytes) -> None:
        """Write the trained weights atomically."""
        self._write(self.weights.name, content)

    def write_file(self, name: str, content: str | bytes) -> None:
        """Write another file of the run atomically, if this process writes the run."""
        self._write(name, content)

    def _write(self, name: str, content: str | bytes) -> None:
        if self.is_writer:
            with writing(self.path / name) as path:
                write_atomically(path, content)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Convert an OSError while writing a file or folder of a run into a RunFailedError.

    Raises:
        RunFailedError: the file cannot be written. Files written before are unchanged.
    """
    try:
        yield path
    except OSError as error:
        reason = f"Cannot write {path}: {error.strerror or error}."
        if not path.parent.is_dir():
            reason = f"{path.parent} no longer exists: the run folder was removed or renamed."
        raise RunFailedError(
            f"{reason}\nExisting checkpoints are unchanged. Fix the cause, then continue with "
            "--resume."
        ) from error


def open_run(path: Path | str) -> RunFolder:
    """Open an existing run folder.

    Raises:
        InputError: the path is not a folder, or not a run folder.
    """
    folder = expand_user(path)
    if not os.path.isdir(folder) and (folder.parent / "recipe.toml").is_file():
        raise InputError(
            f"The run {str(folder.parent)!r} has no {folder.name!r}.\n"
            "If the run is not finished, continue it: "
            f"mixmo fit --resume {RunFolder(folder.parent).argument}"
        )
    if not os.path.isdir(folder):
        raise InputError(
            f"There is no run folder {str(path)!r}.\nRuns are in runs/ unless --out was given."
        )
    if not (folder / "recipe.toml").is_file():
        raise InputError(
            f"{str(path)!r} is not a run folder: it has no recipe.toml.\n"
            "Give a folder created by `mixmo fit`."
        )
    return RunFolder(folder)


def open_runs(paths: Sequence[Path | str], subject: str) -> list[RunFolder]:
    """Open two or more distinct run folders.

    Args:
        paths: the run folders.
        subject: the first words of an error message, such as "An ensemble".

    Raises:
        InputError: there are fewer than two paths, a run is given twice, or a path is not a run
            folder.
    """
    check_several(paths, subject)
    folders = [open_run(path) for path in paths]
    resolved = [folder.path.resolve() for folder in folders]
    if duplicate := next((path for path in resolved if resolved.count(path) > 1), None):
        raise InputError(
            f"The run {str(duplicate)!r} is given twice. {subject} needs distinct runs."
        )
    return folders


def check_several(runs: Sequence[object], subject: str) -> None:
    """Check that there are at least two runs; `subject` starts the error, as in "An ensemble"."""
    if len(runs) < 2:
        raise InputError(f"{subject} needs two runs or more; got {len(runs)}.")


def check_same_left_out(first: RunFolder, other: RunFolder) -> None:
    """Check that two runs on one data set skipped the same damaged images.

    Raises:
        InputError: the skipped images differ.
    """
    other_files, first_files = (set(run.left_out() or ()) for run in (other, first))
    if other_files != first_files:
        raise InputError(
            f"{other.path} skipped {len(other_files):,} unreadable images and {first.path} "
            f"{len(first_files):,}, and they differ; see left-out.json in both.\n"
            "Runs that are evaluated together need the same images: train one of them again."
        )
