"""The run folder: everything that a run leaves, readable without this project.

recipe.toml        resolved, everything needed to run it again
environment.json   versions, device, command, seed, git revision
data.json          classes, mean, deviation and shape of the images
split.json         which images of a folder train, validate and test
left-out.json      image files that cannot be decoded and were left out, with reasons; if
                   --skip-damaged was given
history.csv        one row per epoch
metrics.json       final figures
model.safetensors  weights
checkpoint/        state to resume from
log.txt            what was printed
logs/              what `--logger` leaves: steps and pictures, and the files of trackers
report.html        the page that `mixmo report` writes
net-1/, net-2/     of a deep ensemble: each network's own run folder, which has its weights,
                   history and checkpoint
"""

import csv
import dataclasses
import io
import itertools
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mixmo_fastai.errors import InputError, RunFailedError
from mixmo_fastai.files import flush_folder, make_folder, write_atomically, write_new
from mixmo_fastai.recipe import Recipe, load_recipe, to_toml
from mixmo_fastai.wording import METHOD_NAMES

PACKAGES = ("mixmo-fastai", "torch", "torchvision", "fastai", "numpy", "safetensors")


@dataclass(frozen=True)
class DataFacts:
    """What a network must know of its data to predict without it.

    Attributes:
        classes: names, in the order of the logits.
        mean, std: per channel, of pixels in [0, 1].
        image_shape: (C, H, W).
    """

    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_shape: tuple[int, ...]

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "DataFacts":
        """Read what `dataclasses.asdict` gave, from JSON.

        Raises:
            ValueError: it is something else, or cannot be so.
        """
        try:
            parts = [values[name] for name in ("classes", "mean", "std", "image_shape")]
            if not all(isinstance(part, list | tuple) for part in parts):
                raise ValueError("it holds no lists of what the network must know of its data")
            names, *figures = parts
            mean, std = (tuple(float(v) for v in figure) for figure in figures[:2])
            facts = cls(tuple(map(str, names)), mean, std, tuple(int(v) for v in figures[2]))
        except (LookupError, TypeError, ArithmeticError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        facts._check()
        return facts

    def _check(self) -> None:
        """Refuse what no data can be like."""
        if len(self.classes) < 2:
            raise ValueError(f"it names {len(self.classes)} classes")
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise ValueError(f"images cannot have the shape {self.image_shape}")
        if not len(self.mean) == len(self.std) == self.image_shape[0]:
            raise ValueError("mean and std must have one value per channel")
        if not all(map(math.isfinite, self.mean)) or not all(0 < v < math.inf for v in self.std):
            raise ValueError("mean must be finite and std above zero")


class RunFolder:
    """One run's folder. Make one with `create_run` or `open_run`.

    Args:
        path: where it is.
        is_writer: whether this process writes it; one that trains along leaves that to the first.
    """

    def __init__(self, path: Path, *, is_writer: bool = True) -> None:
        self.path, self.is_writer = path, is_writer

    @property
    def weights(self) -> Path:
        """The file of trained weights."""
        return self.path / "model.safetensors"

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.path / "report.html"

    @property
    def logs(self) -> Path:
        """The folder of what loggers leave."""
        return self.path / "logs"

    @property
    def checkpoint(self) -> Path:
        """The folder of the state to resume from."""
        return self.path / "checkpoint"

    @property
    def has_state(self) -> bool:
        """Whether there is a checkpoint to resume from, intact or not."""
        return any(self.checkpoint.glob("save-*"))

    @property
    def is_finished(self) -> bool:
        """Whether it has its final figures."""
        return (self.path / "metrics.json").is_file()

    def check_trained(self) -> None:
        """Check that every network has its weights.

        Raises:
            InputError: one has none; the message says how to continue.
        """
        networks = self.networks()
        done = sum(network.weights.is_file() for network in networks)
        if done == len(networks):
            return
        several = f"{done} of {len(networks)} networks are finished"
        state = several if len(networks) > 1 else "the run is not finished"
        raise InputError(
            f"{self.path} has no weights yet: {state}.\nContinue it: mixmo fit --resume {self.path}"
        )

    def check_resumable(self) -> None:
        """Check that a training can go on here.

        Raises:
            InputError: the run has weights and no state that led to them, as an imported one.
        """
        for network in self.networks():
            if network.weights.is_file() and not network.has_state:
                raise InputError(
                    f"{network.path} has weights, but no state to resume from: it was imported, or "
                    "its checkpoint was removed.\nNothing was changed; `mixmo eval` evaluates it."
                )

    def recipe(self) -> Recipe:
        """Read the resolved recipe."""
        return load_recipe(self.path / "recipe.toml")

    def write_recipe(self, recipe: Recipe) -> None:
        """Replace the recipe by one in which nothing is left open."""
        self._write("recipe.toml", to_toml(recipe))

    def networks(self) -> list["RunFolder"]:
        """Give the run of each network: the parts of a deep ensemble, else this run alone."""
        num_nets = self.recipe().model.num_nets
        if num_nets == 1:
            return [self]
        paths = [self.path / f"net-{number}" for number in range(1, num_nets + 1)]
        return [RunFolder(path, is_writer=self.is_writer) for path in paths]

    def metrics(self) -> dict[str, Any]:
        """Read the final figures.

        Raises:
            InputError: the run is not finished, or the file is damaged.
        """
        if not self.is_finished:
            raise InputError(f"{self.path} has no final figures: the run is not finished.")
        return self._read_json("metrics.json")

    def environment(self) -> dict[str, Any]:
        """Read what the run was made with; empty in a run that did not write it.

        Raises:
            InputError: the file is damaged.
        """
        has_one = (self.path / "environment.json").is_file()
        return self._read_json("environment.json") if has_one else {}

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # of JSON and of UTF-8 alike
            raise InputError(f"{path} is damaged: {error}.") from error
        if not isinstance(values, dict):
            raise InputError(f"{path} is damaged: it holds no table of values.")
        return values

    def data_facts(self) -> "DataFacts | None":
        """Read what the network must know of its data; None in a run that did not write it.

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
        """Write what the network must know of its data."""
        self._write("data.json", json.dumps(dataclasses.asdict(facts), indent=2) + "\n")

    def split(self) -> dict[str, Any] | None:
        """Read which images of a folder train, validate and test; None in a run without split.json.

        Raises:
            InputError: the file is damaged.
        """
        return self._read_json("split.json") if (self.path / "split.json").is_file() else None

    def write_split(self, parts: Mapping[str, Any]) -> None:
        """Write which images of a folder train, validate and test."""
        self._write("split.json", json.dumps(parts, indent=1) + "\n")

    def left_out(self) -> dict[str, str] | None:
        """Read which damaged files were left out, with reasons; None in a run that did not ask.

        Raises:
            InputError: the file is damaged.
        """
        return self._read_json("left-out.json") if (self.path / "left-out.json").is_file() else None

    def write_left_out(self, files: Mapping[str, str]) -> None:
        """Write which damaged files are left out, with reasons."""
        self._write("left-out.json", json.dumps(dict(files), indent=1) + "\n")

    def history(self) -> list[dict[str, str]]:
        """Read the rows of history.csv."""
        path = self.path / "history.csv"
        if not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def append_history(self, row: Mapping[str, Any]) -> None:
        """Add one epoch to history.csv."""
        if not self.is_writer:
            return
        with (
            writing(self.path / "history.csv") as path,
            path.open("a", newline="", encoding="utf-8") as file,
        ):
            is_new = not file.tell()
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)

    def write_history(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace history.csv by the rows of the epochs that a resumed run has done."""
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
        """Add a line to log.txt; no run ends because that cannot be done."""
        if not self.is_writer:
            return
        with suppress(OSError), (self.path / "log.txt").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def write_metrics(self, figures: Mapping[str, Any]) -> None:
        """Write the final figures."""
        self._write("metrics.json", json.dumps(figures, indent=2) + "\n")

    def write_weights(self, content: bytes) -> None:
        """Write the trained weights, replacing the file in one step."""
        self._write(self.weights.name, content)

    def _write(self, name: str, content: str | bytes) -> None:
        if self.is_writer:
            with writing(self.path / name) as path:
                write_atomically(path, content)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Write a file or folder of a run; what was saved before stays whatever happens.

    Raises:
        RunFailedError: the system does not let it; the message says why.
    """
    try:
        yield path
    except OSError as error:
        reason = f"Cannot write {path}: {error.strerror or error}."
        if not path.parent.is_dir():
            reason = f"{path.parent} is gone: somebody has removed or renamed the run folder."
        raise RunFailedError(
            f"{reason}\nWhat was saved before is as it was; continue with --resume when the cause "
            "is put right."
        ) from error


def create_run(
    recipe: Recipe, path: Path | None = None, *, device: str = "", acceleration: str = ""
) -> RunFolder:
    """Make a new run folder and write down what will be run, and where.

    Args:
        recipe: resolved.
        path: the folder itself; where not given, the first free `runs/<data set>-<name>-<n>`.
        device: what it runs on, in words.
        acceleration: how it trains there, in words: precision, memory format, compilation.

    Raises:
        InputError: the folder exists and holds something, or cannot be made.
    """
    try:
        folder = _claim(path) if path is not None else _claim_next(Path("runs"), run_label(recipe))
        _write_recipe(folder / "recipe.toml", recipe)
        environment = describe_environment(recipe, device, acceleration)
        write_atomically(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"Cannot write the run folder {path or 'runs/'}: {error.strerror}.\n"
            "Choose another place with --out DIR."
        ) from error
    return RunFolder(folder)


def check_free(path: Path | None) -> None:
    """Check that a run folder can be made at a path, or below `runs/` where none is given.

    Raises:
        InputError: there is something already, or nothing can be written there.
    """
    if path is None:
        _check_writable(Path("runs"))
        return
    path = _expanded(path)
    if path.is_dir() and any(path.iterdir()):
        kind = "already a run" if (path / "recipe.toml").exists() else "not empty"
        raise InputError(
            f"The folder {str(path)!r} is {kind}; nothing in it was changed.\n"
            "Choose another --out DIR, or continue a run with --resume RUN."
        )
    _check_writable(path)


def free_file(path: Path | None, stem: str, suffix: str, flag: str = "--out") -> Path:
    """Choose a file that does not exist yet: the given one, or the first free name of a stem.

    Raises:
        InputError: the given one exists, has another suffix, or its folder does not exist.
    """
    if path is None:
        names = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
        paths = (Path(f"{name}{suffix}") for name in names)
        return _writable_file(next(path for path in paths if not path.exists()))
    path = _expanded(path)
    if os.path.lexists(path):
        raise InputError(f"{str(path)!r} exists and was not changed. Choose another {flag}.")
    if path.suffix.lower() != suffix:
        raise InputError(f"{flag} {str(path)!r} must end in {suffix}.")
    if not path.parent.is_dir():
        raise InputError(
            f"There is no folder {str(path.parent)!r} for {flag} {path.name}.\nMake it first."
        )
    return _writable_file(path, flag)


def _writable_file(path: Path, flag: str = "--out") -> Path:
    """Check that a file can be made, by making it and taking it away."""
    try:
        path.touch(exist_ok=False)
        path.unlink()
    except OSError as error:
        raise InputError(
            f"Cannot write {str(path)!r}: {error.strerror}.\nChoose another place with {flag} FILE."
        ) from error
    return path


def open_run(path: Path | str) -> RunFolder:
    """Open an existing run folder.

    Raises:
        InputError: the path is not a folder, or not one of a run.
    """
    folder = _expanded(path)
    if not os.path.isdir(folder) and (folder.parent / "recipe.toml").is_file():
        raise InputError(
            f"The run {str(folder.parent)!r} has no {folder.name!r}, or none yet.\n"
            f"Continue it where it is not finished: mixmo fit --resume {folder.parent}"
        )
    if not os.path.isdir(folder):
        raise InputError(f"There is no run folder {str(path)!r}.\nBy default, runs lie in runs/.")
    if not (folder / "recipe.toml").is_file():
        raise InputError(
            f"{str(path)!r} is not a run folder: it has no recipe.toml.\n"
            "Give a folder that `mixmo fit` made."
        )
    return RunFolder(folder)


def open_runs(paths: Sequence[Path | str], what: str) -> list[RunFolder]:
    """Open the run folders of something that takes two runs or more, each once.

    Args:
        paths: of the run folders.
        what: takes them, as the first words of an error: "An ensemble".

    Raises:
        InputError: there are fewer than two, one is given twice, or one is not a run folder.
    """
    check_several(paths, what)
    folders = [open_run(path) for path in paths]
    places = [folder.path.resolve() for folder in folders]
    if twice := next((place for place in places if places.count(place) > 1), None):
        raise InputError(f"The run {str(twice)!r} is given twice; {what.lower()} takes each once.")
    return folders


def check_several(runs: Sequence[object], what: str) -> None:
    """Check that there are two runs or more for what takes them: "An ensemble"."""
    if len(runs) < 2:
        raise InputError(f"{what} needs two runs or more; got {len(runs)}.")


def check_same_left_out(first: RunFolder, other: RunFolder) -> None:
    """Check that two runs on one data set have left out the same damaged images.

    Raises:
        InputError: they have not.
    """
    own, expected = (set(run.left_out() or ()) for run in (other, first))
    if own != expected:
        raise InputError(
            f"{other.path} has left out {len(own):,} unreadable images, and {first.path} "
            f"{len(expected):,}, not the same ones; see left-out.json in both.\n"
            "Runs that are evaluated together must share their images: train one of them again."
        )


def run_label(recipe: Recipe) -> str:
    """Name a run: its data set, and its recipe or method."""
    dataset = Path(recipe.data.dataset).name or "data"
    return f"{dataset}-{recipe.name.rpartition('/')[2] or _method_label(recipe)}"


def _method_label(recipe: Recipe) -> str:
    """Name a method by what is mixed, how many networks and members there are."""
    model, mix = recipe.model, recipe.mix
    pixels = [mix.msda] if mix.msda != "none" else []
    if model.num_members > 1:
        parts = [METHOD_NAMES.get(mix.kind, f"{mix.kind}-MixMo").lower(), *pixels]
    else:
        parts = pixels or ["vanilla"]
    return "-".join(parts) + (f"-x{model.num_nets}" if model.num_nets > 1 else "")


def describe_environment(recipe: Recipe, device: str, acceleration: str) -> dict[str, Any]:
    """Tell what a run is made with."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "seed": recipe.train.seed,
        "device": device,
        "acceleration": acceleration,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _git_revision(),
    }


def _expanded(path: Path | str) -> Path:
    whole = Path(os.path.expanduser(path))  # pathlib's own raises where there is no such user
    if longest := next((part for part in whole.parts if len(os.fsencode(part)) > 255), None):
        raise InputError(
            f"The name {longest[:40]!r}… is too long for a file. Choose a shorter one."
        )
    return whole


def _check_writable(path: Path) -> None:
    """Check that a folder is or can be made at a path, from what exists of it."""
    existing = next(place for place in (path, *path.parents) if os.path.exists(place))
    if existing.is_dir() and os.access(existing, os.W_OK):
        return
    problem = "cannot be written to" if existing.is_dir() else "is not a folder"
    raise InputError(
        f"Cannot make the run folder {str(path)!r}: {str(existing)!r} {problem}.\n"
        "Choose another place with --out DIR."
    )


def _claim(path: Path) -> Path:
    check_free(path)
    path = _expanded(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    make_folder(path)
    return path


def _write_recipe(path: Path, recipe: Recipe) -> None:
    """Make a folder a run's, which only one process can."""
    try:
        write_new(path, to_toml(recipe))
    except FileExistsError as error:
        raise InputError(
            f"Another process has just taken {str(path.parent)!r}.\nChoose another --out DIR."
        ) from error


def _claim_next(parent: Path, label: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        try:
            (parent / f"{label}-{number}").mkdir()
        except FileExistsError:
            number += 1
        else:
            flush_folder(parent)
            return parent / f"{label}-{number}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The revision of this package's own checkout, where it runs from one."""
    if not (Path(__file__).parents[1] / ".git").exists():
        return None  # installed, or copied into somebody else's repository
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
