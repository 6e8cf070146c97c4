"""Flags shared by several commands, with the same name and meaning everywhere."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mixmo_fastai.config.choices import DEVICES
from mixmo_fastai.config.schema import parse_value
from mixmo_fastai.errors import InputError

DATA, NETWORK, TRAINING, OUTPUT = "Data", "Method and network", "Training", "Output"
DECISIONS = "Decisions"

Dataset = Annotated[
    str | None,
    typer.Argument(
        help="digits, cifar10, cifar100, tinyimagenet; a folder of images with one folder per "
        "class, with or without train/, valid/ and test/; a table of labels (CSV, TSV, parquet); "
        "or hf:NAME, a data set of Hugging Face. Default: digits.",
        show_default=False,
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder of the data sets; or set $MIXMO_DATA_DIR.", rich_help_panel=DATA),
]
ValidSplit = Annotated[
    float | None,
    typer.Option(
        help="Fraction of the training set for validation. Default: 0.02, more for small sets.",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
SkipDamaged = Annotated[
    bool | None,
    typer.Option(
        "--skip-damaged",
        help="Skip image files that cannot be decoded.",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
TestSplit = Annotated[
    float | None,
    typer.Option(
        help="Fraction of an image folder for the test set, if it has none. Default: 0.2, or 0 "
        "if it has valid/.",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        help="Use at most N training images, balanced over classes.",
        metavar="N",
        rich_help_panel=DATA,
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe", help="A recipe from `mixmo recipes`, or a file.", rich_help_panel=NETWORK
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change any setting of the recipe; may be repeated.",
        metavar="SECTION.KEY=VALUE",
        rich_help_panel=NETWORK,
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        help="Network, such as wrn28_10, preact_resnet18_3, resnet50 or timm/NAME.",
        rich_help_panel=NETWORK,
    ),
]
Mix = Annotated[
    str | None,
    typer.Option(
        help="How features are mixed: cutmix, linear, sum (MIMO), or another mask kind.",
        metavar="KIND",
        rich_help_panel=NETWORK,
    ),
]
Msda = Annotated[
    str | None,
    typer.Option(
        help="How pixels are mixed within each member: cutmix, mixup or none.",
        metavar="KIND",
        rich_help_panel=NETWORK,
    ),
]
Members = Annotated[
    int | None,
    typer.Option(
        help="Members (subnetworks) of the network; 1 for the vanilla network.",
        rich_help_panel=NETWORK,
    ),
]
Epochs = Annotated[
    int | None, typer.Option(help="Passes over the loader.", rich_help_panel=TRAINING)
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        help="Images the network sees per step, including repeats.", rich_help_panel=TRAINING
    ),
]
Repeat = Annotated[
    int | None,
    typer.Option(
        help="How often each member sees each image of a batch.", rich_help_panel=TRAINING
    ),
]
Lr = Annotated[
    float | None,
    typer.Option(help="Learning rate; with one-cycle, its peak.", rich_help_panel=TRAINING),
]
Seed = Annotated[int | None, typer.Option(help="Random seed.", rich_help_panel=TRAINING)]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.", rich_help_panel=TRAINING)]
Precision = Annotated[
    str | None, typer.Option(help="auto, float32, tf32 or bfloat16.", rich_help_panel=TRAINING)
]
MemoryFormat = Annotated[
    str | None, typer.Option(help="auto, channels-last or contiguous.", rich_help_panel=TRAINING)
]
Compile = Annotated[
    str | None,
    typer.Option("--compile", help="Compile training: auto, on or off.", rich_help_panel=TRAINING),
]
Threads = Annotated[
    str | None,
    typer.Option(
        help="CPU threads: auto or a number; 0 for torch's default.", rich_help_panel=TRAINING
    ),
]
Networks = Annotated[
    str | None,
    typer.Option(
        "--nets",
        help="Train only these networks of a deep ensemble, such as 1,3. Several processes may "
        "fill one --out. The last one evaluates it.",
        metavar="NUMBERS",
        rich_help_panel=OUTPUT,
    ),
]
Loggers = Annotated[
    str | None,
    typer.Option(
        "--logger",
        help="Log to csv, tensorboard, wandb, mlflow or trackio, or several: csv,wandb.",
        metavar="NAMES",
        rich_help_panel=OUTPUT,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=OUTPUT)
]
Quiet = Annotated[
    bool, typer.Option("--quiet", help="Print only the result.", rich_help_panel=OUTPUT)
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks and warnings.", rich_help_panel=OUTPUT)
]


def check_device(device: str | None) -> None:
    """Check the flag --device without importing torch."""
    if device is not None and device not in DEVICES:
        raise typer.BadParameter(f"--device {device!r} must be one of {', '.join(DEVICES)}.")


def flags(**values: Any) -> dict[str, Any]:
    """Map the values of flags to settings of the recipe."""
    if (threads := values.get("threads")) is not None:
        values["threads"] = parse_value(threads)
    return {_SETTINGS[name]: value for name, value in values.items()}


_SETTINGS = {
    "valid_split": "data.valid_split",
    "test_split": "data.test_split",
    "skip_damaged": "data.skip_damaged",
    "limit": "data.limit",
    "arch": "model.arch",
    "members": "model.num_members",
    "mix": "mix.kind",
    "msda": "mix.msda",
    "repeat": "mix.batch_repetitions",
    "epochs": "train.epochs",
    "batch_size": "train.batch_size",
    "seed": "train.seed",
    "device": "train.device",
    "precision": "train.precision",
    "memory_format": "train.memory_format",
    "compiled": "train.compile",
    "threads": "train.threads",
    "lr": "optimizer.lr",
}


def fit_command(dataset: str | None, flags: Mapping[str, Any], assignments: Sequence[str]) -> str:
    """Format a command line of `mixmo fit`, quoted for a shell.

    Args:
        dataset: the argument DATASET, or None.
        flags: values by the name of the parameter; None for flags that are omitted.
        assignments: values of --set.
    """
    words = ["mixmo", "fit", *([dataset] if dataset is not None else [])]
    for name, value in flags.items():
        if value is not None:
            flag = {"compiled": "compile"}.get(name, name).replace("_", "-")
            text = f"{value:g}" if isinstance(value, float) else str(value)
            words += [f"--{flag}"] if value is True else [f"--{flag}", text]
    for assignment in assignments:
        words += ["--set", assignment]
    return shlex.join(words)


def use_flag_names(message: str) -> str:
    """Replace the names of settings in an error message by those of their flags."""
    for flag, setting in _SETTINGS.items():
        name = "compile" if flag == "compiled" else flag.replace("_", "-")
        message = message.replace(f"Command line: {setting} ", f"--{name} ")
    return message


def check_fractions(**values: float | None) -> None:
    """Check that the values of flags are above 0 and below 1; None is not checked.

    Args:
        values: by name of the parameter.

    Raises:
        InputError: a value is out of range.
    """
    for name, value in values.items():
        if value is not None and not 0 < value < 1:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} is {value:g}; it must be above 0 and below 1.")
