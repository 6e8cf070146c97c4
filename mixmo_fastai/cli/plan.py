"""What `mixmo fit` says before it trains, and what to do after it."""

import csv
import shlex
from contextlib import suppress
from typing import Any

from mixmo_fastai.advice import advise, members_advice
from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.render import FIGURE_WIDTH, PLAN_WIDTH, align, plan_lines, recipe_lines
from mixmo_fastai.names import DATASETS
from mixmo_fastai.recipe import Recipe
from mixmo_fastai.resolve import departures
from mixmo_fastai.runs import RunFolder
from mixmo_fastai.sizing import too_small_for_members
from mixmo_fastai.wording import estimated_duration

LONG_SECONDS = 3600.0
"""From here on, a training on a CPU is answered with a shorter one."""


def say_plan(training: Any, output: Output, run: RunFolder, *, resume: bool = False) -> Any:
    """Say what a run is going to do, and how long it will take; all settings go to its log.

    Args:
        training: of `training.prepare`.
        output: of the command.
        run: its folder.
        resume: whether it goes on.

    Returns:
        its `speed.Speed`, if steps were timed.
    """
    for line in [*plan_lines(training), *_chosen_lines(training)]:
        output.say(line)
    if not resume and (line := _too_small_line(training)):
        output.say(line)
    speed = _say_time(training, output, run, resume=resume)
    output.say()
    for line in [*recipe_lines(training.recipe), ""]:
        output.note(line)
    return speed


def _chosen_lines(training: Any) -> list[str]:
    """Say which settings nobody has given, and how to give them."""
    recipe, decided = training.recipe, training.decided
    if recipe.data.dataset in DATASETS:
        return []
    flags, parts = [], []
    if "model.arch" in decided:
        parts.append(recipe.model.arch)
        flags.append("--arch")
    if "train.epochs" in decided:
        parts.append(f"{recipe.train.epochs} epochs")
        flags.append("--epochs")
    if "data.image_size" in decided and (side := recipe.data.image_size):
        parts.append(f"images scaled to {side}x{side}")
        flags.append("--set data.image_size=N")
    if not parts:
        return []
    device = "a GPU" if training.device.type == "cuda" else "a CPU"
    text = f"{_listed(parts)}, by default on {device}; change with {_listed(flags)}"
    return [_row("Chosen", text)]


def _too_small_line(training: Any) -> str | None:
    """Say what several members lack here, unless it is a recipe of this project as it stands."""
    recipe = training.recipe
    if recipe.name and not departures(recipe):
        return None
    seen = training.images_seen // recipe.model.num_nets
    lacks = too_small_for_members(recipe, seen)
    return _row("Advice", members_advice(recipe, lacks)) if lacks else None


def _say_time(training: Any, output: Output, run: RunFolder, *, resume: bool) -> Any:
    """Time a few steps, and say how long the run will take; nothing where nobody listens."""
    if output.quiet:
        return None
    from mixmo_fastai.speed import measure_speed, seconds_left, shorter_training

    speed = measure_speed(training)
    if speed is None:
        return None
    done = _epochs_done(run) if resume else 0
    seconds = seconds_left(training, speed, done)
    output.say(_row("Time", _time_text(speed, seconds, resume)))
    if training.device.type == "cpu" and seconds > LONG_SECONDS and not resume:
        shorter = shorter_training(training, speed)
        if shorter is not None:
            output.say(_row("", _shorter_text(shorter)), style="bold")
    return speed if speed.is_timed else None


def _epochs_done(run: RunFolder) -> int:
    """Count the epochs of all networks; 0 of a damaged history, which resuming replaces."""
    done = 0
    for network in run.networks():
        with suppress(ValueError, csv.Error):
            done += len(network.history())
    return done


def _time_text(speed: Any, seconds: float, resume: bool) -> str:
    text = estimated_duration(seconds) + " from here on" * resume
    if not speed.is_timed:
        return text if seconds < LONG_SECONDS else f"{text}, as far as its operations tell"
    text += f" at {_rounded(speed.images_per_second)} images/s"
    return f"{text} or less: it is timed without compilation" if speed.is_lower_bound else text


def _shorter_text(shorter: Any) -> str:
    flags = [f"--arch {shorter.arch}"] if shorter.arch else []
    flags.append(f"--epochs {shorter.epochs}")
    flags += [f"--limit {shorter.limit}"] if shorter.limit else []
    return f"For about 20 minutes: {' '.join(flags)}"


def _rounded(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _row(label: str, text: str, width: int = PLAN_WIDTH) -> str:
    return align([(label, text)], width)[0]


def _listed(parts: list[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def say_next(output: Output, run: RunFolder, recipe: Recipe, images_seen: int) -> None:
    """Say which commands go on from a finished run, and at most one line of advice.

    Args:
        output: of the command.
        run: that is finished.
        recipe: of it.
        images_seen: by all of its networks.
    """
    network, seen = run.networks()[0], images_seen // recipe.model.num_nets
    if advice := advise(recipe, network.history(), seen):
        output.say(_row("Advice", advice, FIGURE_WIDTH))
    path, exported = shlex.quote(str(run.path)), shlex.quote(str(network.path))
    commands = (
        f"mixmo report {path}",
        f"mixmo predict {path} IMAGE…",
        # Of a deep ensemble, its first network; no single network equals all of it.
        f"mixmo export {exported} --to net.safetensors",
    )
    for number, command in enumerate(commands):
        output.say_command(_row("" if number else "Next", command, FIGURE_WIDTH))
