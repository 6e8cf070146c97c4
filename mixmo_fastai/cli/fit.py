"""`mixmo fit`: train."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.plan import epochs_done, print_next_steps, print_plan, timing_announced
from mixmo_fastai.cli.render import METRIC_WIDTH, align
from mixmo_fastai.cli.render_metrics import metric_lines
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.config.schema import differing_settings
from mixmo_fastai.errors import InputError, RunInterruptedError
from mixmo_fastai.loggers import parse_loggers
from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.create import check_free, create_run
from mixmo_fastai.runs.folder import RunFolder, open_run
from mixmo_fastai.runs.lock import locked, starting
from mixmo_fastai.runs.output import expand_user
from mixmo_fastai.runtime.launcher import launcher_number
from mixmo_fastai.runtime.signals import exit_code_of, handling_signals


def fit(
    dataset: opt.Dataset = None,
    *,
    recipe: opt.RecipeName = None,
    arch: opt.Arch = None,
    mix: opt.Mix = None,
    msda: opt.Msda = None,
    members: opt.Members = None,
    assignments: opt.Assignments = None,
    data_dir: opt.DataDir = None,
    valid_split: opt.ValidSplit = None,
    test_split: opt.TestSplit = None,
    skip_damaged: opt.SkipDamaged = None,
    limit: opt.Limit = None,
    epochs: opt.Epochs = None,
    batch_size: opt.BatchSize = None,
    repeat: opt.Repeat = None,
    lr: opt.Lr = None,
    seed: opt.Seed = None,
    device: opt.Device = None,
    precision: opt.Precision = None,
    memory_format: opt.MemoryFormat = None,
    compiled: opt.Compile = None,
    threads: opt.Threads = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Run folder. Default: runs/<data set>-<method>-<n>.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Resume an interrupted run.", metavar="RUN", rich_help_panel=opt.OUTPUT),
    ] = None,
    nets: opt.Networks = None,
    logger: opt.Loggers = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Train a network, evaluate it once on the test set, and write a run folder.

    Without arguments, it trains Cut-MixMo on the included digits, in under a minute.
    """
    settings = opt.flags(
        arch=arch, mix=mix, msda=msda, members=members, valid_split=valid_split,
        test_split=test_split, skip_damaged=skip_damaged, limit=limit,
        epochs=epochs, batch_size=batch_size, repeat=repeat, lr=lr, seed=seed, device=device,
        precision=precision, memory_format=memory_format, compiled=compiled, threads=threads,
    )  # fmt: skip
    output = Output(as_json=as_json, quiet=quiet)
    loggers = () if logger is None else parse_loggers(logger)
    numbers = None if nets is None else parse_nets(nets)
    if resume is not None:
        _check_no_settings([dataset, recipe, assignments, out, *settings.values()])
        _resume(open_run(resume), data_dir, loggers, output, numbers)
        return
    resolved = resolve_recipe(dataset, recipe, settings, assignments or ())
    if numbers is None:
        check_free(out)
        _start(resolved, out, data_dir, loggers, output, nets=None)
    else:
        _start_or_join(resolved, out, data_dir, loggers, output, nets=numbers)


def _start_or_join(
    recipe: Recipe,
    out: Path | None,
    data_dir: Path | None,
    loggers: Sequence[str],
    output: Output,
    *,
    nets: Sequence[int],
) -> None:
    """Train networks of a run that other processes may have started, or start just now."""
    path = _check_can_be_shared(recipe, nets, out)
    with starting(path) as let_others_join:
        if not (path / "recipe.toml").is_file():
            check_free(path)
            _start(recipe, path, data_dir, loggers, output, nets=nets, created=let_others_join)
            return
    run = open_run(path)
    check_same_settings(recipe, run)
    _resume(run, data_dir, loggers, output, nets)


def parse_nets(text: str) -> list[int]:
    """Parse the numbers of networks, such as "1,3".

    Raises:
        InputError: it has another form.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"--nets takes numbers of networks, such as 1,3; got {text!r}.")
    return list(dict.fromkeys(map(int, parts)))


def _check_can_be_shared(recipe: Recipe, numbers: Sequence[int], out: Path | None) -> Path:
    """Check that several processes can train networks of one run; return its folder.

    Raises:
        InputError: they cannot.
    """
    from mixmo_fastai.training.ensemble import check_nets

    check_nets(numbers, recipe.model.num_nets)
    if out is None:
        raise InputError("--nets needs --out RUN, the folder that all networks share.")
    if launcher_number("WORLD_SIZE") > 1:
        raise InputError(
            "--nets trains each network in one process; a launcher has started several.\n"
            "Start one command per network."
        )
    return expand_user(out)


def check_same_settings(recipe: Recipe, run: RunFolder) -> None:
    """Check that the settings which a recipe does not leave open are those of a run.

    Raises:
        InputError: a setting differs.
    """
    for section, key, wanted, found in differing_settings(recipe, run.recipe()):
        is_open = wanted in (None, "auto") or (section, key) == ("train", "images_seen")
        if not is_open:
            raise InputError(
                f"{run.path} is a run with {section}.{key}={found!r}, not {wanted!r}.\n"
                "Use the same settings for all of its networks, or another --out."
            )


def _check_no_settings(values: list[Any]) -> None:
    if any(value is not None for value in values):
        raise InputError(
            "--resume uses the settings of the run's recipe; omit all other arguments.\n"
            "Only --data-dir, --nets, --logger, --json, --quiet and --debug can be combined with "
            "it."
        )


def _start(
    recipe: Recipe,
    out: Path | None,
    data_dir: Path | None,
    loggers: Sequence[str],
    output: Output,
    *,
    nets: Sequence[int] | None,
    created: Callable[[], None] = lambda: None,
) -> None:
    """Create a run and train; `created` is called once others can join it."""
    with _prepared(recipe, data_dir, output) as (prepared, is_rank0):
        from mixmo_fastai.learner.optimizers import check_optimizer_settings
        from mixmo_fastai.runtime.processes import run_on_rank0
        from mixmo_fastai.training.precision import choose_precision
        from mixmo_fastai.training.threads import choose_threads
        from mixmo_fastai.training.train import describe_run

        check_optimizer_settings(prepared.learn.opt_func, prepared.recipe.lr)
        announce = timing_announced(output)
        threaded, threads = choose_threads(prepared, announce=announce)
        training, times = choose_precision(threaded, announce)
        measured = {"chosen_threads": threads, "measured_precision": times}
        path = run_on_rank0(lambda: _make_folder(training, out, measured))
        output.run = run = RunFolder(path, is_writer=is_rank0)
        if nets is not None:
            describe_run(training, run)
        created()
        with _errors_logged(run, nets):
            speed = print_plan(
                training, output, run, nets=nets, threads=threads,
                requested_images=recipe.train.images_seen,
            )  # fmt: skip
            _train(training, run, loggers, output, speed, nets=nets, resume=False)


def _make_folder(training: Any, out: Path | None, measured: Mapping[str, Any]) -> Path:
    """Create the run folder of a training; `measured` are choices of settings, or None, by name."""
    device, how = training.device_name, training.acceleration.describe()
    more = {name: each.as_dict() for name, each in measured.items() if each is not None}
    return create_run(training.recipe, out, device=device, acceleration=how, **more).path


def _resume(
    run: RunFolder,
    data_dir: Path | None,
    loggers: Sequence[str],
    output: Output,
    nets: Sequence[int] | None,
) -> None:
    recipe, networks = run.recipe(), run.networks()
    # Those that this process trains in.
    folders = [run, *(each for each in networks if each.path != run.path and each.path.is_dir())]
    if nets is not None:
        from mixmo_fastai.training.ensemble import check_nets

        check_nets(nets, recipe.model.num_nets)
        networks = [networks[number - 1] for number in nets]
        folders = [network for network in networks if network.path.is_dir()]
    run.check_resumable()
    is_rank0 = launcher_number("RANK") == 0
    with ExitStack() as stack:
        for folder in folders if is_rank0 else ():
            stack.enter_context(locked(folder.path))  # no other process may write checkpoints
        for network in networks:
            CheckpointStore(network.checkpoint).newest()  # raises before any data is read
    with _prepared(recipe, data_dir, output, run) as (prepared, is_rank0):
        from mixmo_fastai.training.threads import keep_threads

        output.run = run = RunFolder(run.path, is_writer=is_rank0)
        with _errors_logged(run, nets):
            left = 1 - epochs_done(run, recipe, nets) / (recipe.train.epochs * len(run.networks()))
            announce = timing_announced(output)
            training, threads = keep_threads(prepared, run.environment(), left, announce)
            speed = print_plan(training, output, run, resume=True, nets=nets, threads=threads)
            _print_networks(run, output)
            _train(training, run, loggers, output, speed, nets=nets, resume=True)


@contextmanager
def _prepared(
    recipe: Recipe, data_dir: Path | None, output: Output, resumed: RunFolder | None = None
) -> Iterator[tuple[Any, bool]]:
    """Prepare training in all processes that were started together.

    Yields:
        The training, and whether this process is rank 0, the only one that prints and writes.
    """
    from mixmo_fastai.runtime.devices import choose_device
    from mixmo_fastai.runtime.processes import joined_process_group

    with joined_process_group(choose_device(recipe.train.device)) as processes:
        from mixmo_fastai.cli.reading import reading_shown
        from mixmo_fastai.training.prepare import prepare
        from mixmo_fastai.training.threads import reduced_threads

        output.is_silent = not processes.is_rank0
        threads = None if resumed is None else reduced_threads(recipe, resumed.environment())
        with reading_shown(output):
            training = prepare(recipe, data_dir, resumed, threads=threads)
        yield training, processes.is_rank0


def _print_networks(run: RunFolder, output: Output) -> None:
    """Print how many networks of a deep ensemble are finished."""
    networks = run.networks()
    if len(networks) > 1:
        finished = sum(network.is_finished for network in networks)
        output.print(f"Resuming: {finished} of {len(networks)} networks are finished.")


def _describe_saved(run: RunFolder) -> str:
    """Describe whether an interrupted run has a saved state."""
    saved = any(network.has_state for network in run.networks())
    return "Interrupted. The state is saved" if saved else "Interrupted. Nothing was saved yet"


@contextmanager
def _errors_logged(run: RunFolder, nets: Sequence[int] | None) -> Iterator[None]:
    """Write the reason for an early end to the run's log, and tell the user how to resume."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        message = "Interrupted."
        if run.is_writer:
            flag = f" --nets {','.join(map(str, nets))}" if nets else ""
            command = f"mixmo fit --resume {run.argument}{flag}"
            message = f"{_describe_saved(run)}; resume with: {command}"
        run.log(message)
        raise RunInterruptedError(message, exit_code_of(interruption)) from None
    except Exception as error:
        run.log(f"{type(error).__name__}: {error}")
        raise


def _train(
    training: Any,
    run: RunFolder,
    loggers: Sequence[str],
    output: Output,
    speed: Any,
    *,
    resume: bool,
    nets: Sequence[int] | None,
) -> None:
    """Train with a progress display, and print the result."""
    from mixmo_fastai.cli.progress import TrainingDisplay
    from mixmo_fastai.training.ensemble import train_nets, train_run

    output.print(f"Run folder: {run.path}")
    display = TrainingDisplay(output, training.recipe.train.batch_size, speed)
    cbs: list[Any] = [display]
    if loggers:
        from mixmo_fastai.loggers.callback import LoggingCallback

        cbs.append(LoggingCallback(loggers, output.print))
    try:
        with handling_signals(output.print) as stop:
            shown = {"cbs": cbs, "stop": stop, "say": output.print}
            metrics: dict[str, Any] | None
            if nets is None:
                metrics = train_run(training, run, resume=resume, **shown)
            else:
                metrics = train_nets(training, run, nets, **shown)
    finally:
        display.close()
    if metrics is None:
        output.print_result([], {"run": str(run.path)})
        return
    output.print_result(
        [
            "",
            *metric_lines(metrics, training.recipe, is_brief=True),
            *align([("Run folder", str(run.path))], METRIC_WIDTH),
        ],
        {"run": str(run.path), **metrics},
    )
    if not output.as_json:  # the JSON result must be the only output
        print_next_steps(output, run, training.recipe, metrics["images_seen"])
