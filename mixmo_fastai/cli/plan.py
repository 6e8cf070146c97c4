"""Output of `mixmo fit` before training (the plan) and after it (the next steps)."""

import csv
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.render import METRIC_WIDTH, PLAN_WIDTH, align, plan_lines, recipe_lines
from mixmo_fastai.config.choices import DATASETS
from mixmo_fastai.config.defaults import unmet_requirement
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.config.resolve import changed_settings
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.runtime.text import estimated_duration
from mixmo_fastai.training.advice import advise, members_advice

LONG_SECONDS = 3600.0
"""Duration of a training on a CPU from which a shorter one is suggested, in seconds."""


def print_plan(
    training: Any,
    output: Output,
    run: RunFolder,
    *,
    resume: bool = False,
    nets: Sequence[int] | None = None,
    threads: Any = None,
    requested_images: int | None = None,
) -> Any:
    """Print what will be trained and how long it will take; log all settings.

    Args:
        training: from `prepare.prepare`.
        output: console of the command.
        run: the run folder.
        resume: the run is resumed.
        nets: numbers of the networks that are trained; None for all.
        threads: the `threads.ThreadChoice`; None if the number was given, or kept on resuming.
        requested_images: see `plan_lines`.

    Returns:
        The measured `speed.Speed`, or None if no steps were timed.
    """
    chosen = [*threads_lines(threads), *_precision_lines(training, run, resume=resume)]
    plan = plan_lines(training, requested_images)
    for line in [*plan, *_defaults_lines(training), *chosen]:
        output.print(line)
    if not resume and (line := _too_small_line(training)):
        output.print(line)
    speed = _print_time(training, output, run, nets, resume=resume)
    output.print()
    for line in [*recipe_lines(training.recipe), ""]:
        output.log(line)
    return speed


def _defaults_lines(training: Any) -> list[str]:
    """List the settings that were chosen by default, and how to change them."""
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
    text = f"{_join(parts)}, chosen for {device}; change with {_join(flags)}"
    return [_row("Defaults", text)]


def _precision_lines(training: Any, run: RunFolder, *, resume: bool) -> list[str]:
    """Describe the precision if it was chosen by measurement, and whether the CPU is another."""
    measured = run.environment().get("measured_precision")
    if not isinstance(measured, dict):
        return _slow_precision_lines(training)
    precision, ratio = measured.get("precision"), measured.get("ratio")
    if precision != training.recipe.train.precision or not isinstance(ratio, float):
        return []  # the user has changed the recipe or the file
    if resume:
        from mixmo_fastai.runtime.devices import cpu_name

        if (before := measured.get("cpu")) == (now := cpu_name()):
            return []
        return [_row("Precision", f"{precision} is kept; it was chosen on {before}, this is {now}")]
    if precision == "bfloat16":
        text = f"bfloat16, measured to be {ratio:.2f} times as fast as float32"
    elif ratio < 1:
        text = f"float32, measured to be {1 / ratio:.2f} times as fast as bfloat16"
    else:
        text = f"float32; bfloat16 was measured to be only {ratio:.2f} times as fast"
    return [_row("Precision", f"{text}; change with --precision")]


def _slow_precision_lines(training: Any) -> list[str]:
    """Warn of bfloat16 on an x86 CPU that only emulates it."""
    import torch

    if training.recipe.train.precision != "bfloat16" or training.device.type != "cpu":
        return []
    is_x86 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if not is_x86 or torch.cpu._is_avx512_bf16_supported():
        return []
    text = "bfloat16 is slower than float32 on this CPU, which lacks AVX512-BF16"
    return [_row("Precision", f"{text}; --precision auto measures both")]


def timing_announced(output: Output) -> Callable[[], None]:
    """Return a function that says once that steps are timed."""

    @cache
    def announce() -> None:
        output.print("Timing training steps, to choose the fastest settings …")

    return announce


def threads_lines(choice: Any) -> list[str]:
    """Describe the number of threads that was chosen, unless `choice` is None."""
    return [] if choice is None else [_row("Threads", threads_text(choice))]


def threads_text(choice: Any) -> str:
    """Describe the number of threads that was chosen, and why."""
    limit = "" if choice.limit in ("CPUs", "torch's default") else f" ({choice.limit})"
    number, is_new = choice.threads, choice.before is None
    now = "" if is_new else " now"
    text = str(number) if is_new else f"{number} instead of {choice.before}"
    change = "; change with --threads" if is_new else ""
    if choice.available == 1:
        return f"{text}, the only one available{now}{limit}"
    is_all = number == choice.available
    if is_all:
        text += f", all that are available{now}{limit}"
    elif is_new:
        text += f" of {choice.available}{limit}"
    elif choice.available < choice.before:
        text += f", of {choice.available} available now{limit}"
    if choice.ratio is None:
        return f"{text}; fewer were not timed{change}"
    if choice.ratio < 1:
        other = f"{choice.compared} measured to be only {1 / choice.ratio:.2f} times as fast"
        return f"{text}; {other}{change}"
    ratio = f"{choice.ratio:.2f}" if choice.ratio < 10 else f"{choice.ratio:.0f}"
    return f"{text}, measured to be {ratio} times as fast as {choice.compared}{change}"


def _too_small_line(training: Any) -> str | None:
    """Return advice if network or training is too small for members; None for shipped recipes."""
    recipe = training.recipe
    if recipe.name and not changed_settings(recipe):
        return None
    seen = training.images_seen // recipe.model.num_nets
    requirement = unmet_requirement(recipe, seen)
    return _row("Advice", members_advice(recipe, requirement, seen)) if requirement else None


def _print_time(
    training: Any, output: Output, run: RunFolder, nets: Sequence[int] | None, *, resume: bool
) -> Any:
    """Time a few steps and print how long the run will take; do nothing under --quiet."""
    if output.quiet:
        return None
    from mixmo_fastai.training.speed import measure_speed, seconds_left, shorter_training

    speed = measure_speed(training)
    if speed is None:
        return None
    done = epochs_done(run, training.recipe, nets) if resume or nets else 0
    seconds = seconds_left(training, speed, done)
    output.print(_row("Time", _time_text(speed, seconds, resume)))
    if training.device.type == "cpu" and seconds > LONG_SECONDS and not resume:
        shorter = shorter_training(training, speed)
        if shorter is not None:
            output.print(_row("", _shorter_text(shorter)), style="bold")
    return speed if speed.is_timed else None


def epochs_done(run: RunFolder, recipe: Recipe, nets: Sequence[int] | None) -> int:
    """Count the epochs of all networks, including those that are not to be trained here.

    A damaged history, which resuming replaces, counts 0.
    """
    done = 0
    for number, network in enumerate(run.networks(), start=1):
        if nets is not None and number not in nets:
            done += recipe.train.epochs or 0
            continue
        with suppress(ValueError, csv.Error):
            done += len(network.history())
    return done


def _time_text(speed: Any, seconds: float, resume: bool) -> str:
    text = estimated_duration(seconds) + " remaining" * resume
    if not speed.is_timed:
        return text if seconds < LONG_SECONDS else f"{text}, estimated from the FLOPs"
    text += f" at {_rounded(speed.images_per_second)} images/s"
    return f"{text} or less: timed without compilation" if speed.is_lower_bound else text


def _shorter_text(shorter: Any) -> str:
    flags = [f"--arch {shorter.arch}"] if shorter.arch else []
    flags.append(f"--epochs {shorter.epochs}")
    flags += [f"--limit {shorter.limit}"] if shorter.limit else []
    return f"For about 20 minutes: {' '.join(flags)}"


def _rounded(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _row(label: str, text: str, width: int = PLAN_WIDTH) -> str:
    return align([(label, text)], width)[0]


def _join(parts: list[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def print_next_steps(output: Output, run: RunFolder, recipe: Recipe, images_seen: int) -> None:
    """Print commands to continue with after a finished run, and at most one line of advice.

    Args:
        output: console of the command.
        run: the finished run.
        recipe: recipe of the run.
        images_seen: number of images seen by all networks in training.
    """
    network, seen = run.networks()[0], images_seen // recipe.model.num_nets
    facts = run.data_facts()
    several = facts is not None and facts.is_multi_label
    if advice := advise(recipe, network.history(), seen, is_multi_label=several):
        output.print(_row("Advice", advice, METRIC_WIDTH))
    commands = (
        f"mixmo eval {run.argument}",
        f"mixmo report {run.argument}",
        f"mixmo predict {run.argument} IMAGE…",
        # For a deep ensemble, export its first network: no single network equals the ensemble.
        f"mixmo export {network.argument} --to net.safetensors",
    )
    for number, command in enumerate(commands):
        output.print_command(_row("" if number else "Next", command, METRIC_WIDTH))
