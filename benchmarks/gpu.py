"""Measure correctness, speed and accuracy on a GPU, in one command.

python benchmarks/gpu.py --out DIR [--data FOLDER] [--parts checks,ceilings,…] [--arch wrn28_10]

The parts run in this order. DIR/results.json is written after each part: an interrupted run keeps
its results, a later run adds to them, and recipes are resumed:

  checks      a step on the GPU and the same step on the CPU; no synchronisation within an epoch
  ceilings    matrix products in bfloat16, copies, the network without BatchNorm
  throughput  training: images per second and fraction of the matrix rate, by batch size, memory
              format, compilation, ghost batches; the Learner and a hand-written loop; M=2 and M=1
  inference   the fused network, the vanilla network, and an ensemble of two
  memory      peak of training with two members and one
  input       pairs per second of the loader with masks and weights
  recipes     --data is a folder of images or a data set: recipes at equal images seen
"""

import argparse
import contextlib
import gc
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler
from inference import prediction_functions
from input_pipeline import BATCH, MixMoPipeline, make_pixels
from measure import interleaved, machine, paired_ratio, spread, spreads
from memory import peak_bytes
from steps import SIZE, Setup
from torch import nn

from mixmo_fastai.callbacks.ema import EMACallback
from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.progress import TrainingDisplay
from mixmo_fastai.config.load import load_recipe
from mixmo_fastai.mixing.loss import MixMoLoss
from mixmo_fastai.models.flops import BACKWARD_COST, count_flops
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.runtime.acceleration import Acceleration
from mixmo_fastai.runtime.devices import float32_precision
from mixmo_fastai.training.recording import HistoryCallback
from mixmo_fastai.training.schedule import one_cycle

RECIPES = ("vanilla", "cutmix", "mimo", "linear-mixmo", "cut-mixmo")
Results = dict[str, Any]


def make_setup(args: argparse.Namespace, **changes: Any) -> Setup:
    """Create the default setup: bfloat16, channels last, not compiled, first batch size."""
    acceleration = Acceleration(torch.device(args.device), autocast=torch.bfloat16)
    return Setup(args.arch, args.batch_sizes[0], acceleration=acceleration).replace(**changes)


# Checks


def checks(args: argparse.Namespace) -> Iterator[Results]:
    """Compare a step with the CPU, and check that an epoch does not synchronise with the GPU."""
    float32, bfloat16 = (_step_difference(args, autocast) for autocast in (None, torch.bfloat16))
    differences = {
        "loss in float32, relative to the CPU": (float32[0], 1e-5),
        "worst gradient in float32": (float32[1], 1e-3),
        "loss in bfloat16": (bfloat16[0], 0.02),
        "worst gradient in bfloat16": (bfloat16[1], 0.5),
        "logits of the fused network": (_fused_difference(args), 1e-5),
        "losses of two runs with the same seed": (
            _repeat_difference(args),
            0.0 if args.device == "cpu" else 0.05,
        ),
    }
    for name, (difference, limit) in differences.items():
        outcome = "passed" if difference <= limit else "FAILED"
        yield {name: {"difference": difference, "limit": limit, "outcome": outcome}}
    yield {"synchronisations within an epoch": _synchronisations(args)}
    if args.compile:
        yield {"synchronisations within an epoch, compiled": _synchronisations(args, compiled=True)}
    failed = [name for name, (difference, limit) in differences.items() if not difference <= limit]
    if failed:
        raise ArithmeticError(f"differences above their limits: {', '.join(failed)}")


def _step_difference(args: argparse.Namespace, autocast: torch.dtype | None) -> tuple[float, float]:
    """Compare loss and worst gradient of one step on the device with float32 on the CPU."""
    setup = make_setup(args, arch="wrn10_2", batch_size=16, autocast=autocast)
    cpu = setup.replace(device=torch.device("cpu"), autocast=None)
    model, batch = cpu.model(), cpu.batch()
    expected = _loss_and_gradients(cpu, model, batch)
    device_model = setup.model()
    device_model.load_state_dict(model.state_dict())
    on_device = [[part.to(setup.acceleration.device) for part in side] for side in batch]
    actual = _loss_and_gradients(setup, device_model, on_device)
    differences = [*map(_relative, actual, expected)]
    return differences[0], max(differences[1:])


def _loss_and_gradients(setup: Setup, model: nn.Module, batch: Any) -> list[torch.Tensor]:
    with setup.acceleration.applied(model.train()):
        loss = MixMoLoss()(model(*batch[0]), *batch[1])
        loss.backward()
    return [t.detach().float().cpu() for t in (loss, *(p.grad for p in model.parameters()))]


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-12))


def _fused_difference(args: argparse.Namespace) -> float:
    setup = make_setup(args, autocast=None)
    model = setup.model().eval()
    x = torch.randn(32, 3, SIZE, SIZE, device=setup.acceleration.device)
    with torch.inference_mode(), float32_precision(tf32=False):
        return _relative(setup.acceleration.move_to_device(model.fuse())(x).cpu(), model(x).cpu())


def _repeat_difference(args: argparse.Namespace) -> float:
    """Return the largest difference between the losses of two Learners with the same seed."""
    setup = make_setup(args, arch="wrn10_1", batch_size=16, autocast=None)
    losses = []
    for _ in range(2):
        learn = setup.learner(args.steps, seed=1)
        with setup.acceleration.applied(learn.model), learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-3)
        losses.append(torch.stack(learn.recorder.losses))
    return float((losses[0] - losses[1]).abs().max())


class _ForbidSynchronisation(Callback):
    """Make torch raise on every synchronisation with the GPU except in the recorder's fetches."""

    order = -20

    def __init__(self, set_mode: Callable[[str], None]) -> None:
        super().__init__()
        self.set_mode, self.fetches = set_mode, 0
        self.num_steps, self.is_watching = 0, False

    def before_fit(self) -> None:
        """Allow synchronisation while the recorder fetches."""
        recorder = self.learn.recorder
        fetch = recorder.fetch

        def fetch_allowed() -> None:
            self.set_mode("default")
            fetch()
            self.fetches += 1
            self.set_mode("error" if self.is_watching else "default")

        recorder.fetch = fetch_allowed

    def before_batch(self) -> None:
        """Start at the third step: the first steps select algorithms and allocate memory."""
        if self.learn.iter >= 2:
            self.set_mode("error")
            self.num_steps, self.is_watching = self.num_steps + 1, True

    def after_train(self) -> None:
        """Stop: the metrics of an epoch are read once at its end."""
        self.is_watching = False
        self.set_mode("default")


class _HistoryWithoutFile(HistoryCallback):
    """The history callback without its file, since this training has no validation."""

    def after_trained_epoch(self) -> None:
        """Write nothing."""


def _synchronisations(args: argparse.Namespace, *, compiled: bool = False) -> str:
    """Train with the callbacks of `mixmo fit` and fastai's progress bar."""
    setup = make_setup(args, arch="wrn10_1", batch_size=16, compiled=compiled)
    on_gpu = setup.acceleration.device.type == "cuda"
    mode = torch.cuda.set_sync_debug_mode if on_gpu else lambda _: None
    watch = _ForbidSynchronisation(mode)
    learn = setup.learner(max(50, args.steps), seed=1, more_cbs=[EMACallback(0.9)])
    rates = ParamScheduler({"lr": one_cycle(1e-4, 1e-3, 1e-5, 0.25)})
    with TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        history = _HistoryWithoutFile(RunFolder(Path(folder)), setup.batch_size)
        display = TrainingDisplay(Output(quiet=True), setup.batch_size)
        try:
            with setup.acceleration.applied(learn.model), learn.no_logging():
                learn.fit(1, 1e-3, cbs=[rates, history, display, watch])
        finally:
            mode("default")
    if not on_gpu:
        return "not measurable without a GPU"
    return f"none in {watch.num_steps} steps including the loader, except {watch.fetches} fetches"


# Ceilings


def ceilings(args: argparse.Namespace) -> Results:
    """Measure upper bounds of a training step: products, copies, the network without BatchNorm."""
    device, side = torch.device(args.device), args.side
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(8 * side * side, device=device)
    target = torch.empty_like(source)
    setup = make_setup(args)
    functions = {
        "product": lambda: a @ b,
        "copy": lambda: target.copy_(source),
        "network": _without_batch_norm(setup),
    }
    # Time several calls at once, since one call is short compared with its launch.
    repeated = {name: partial(_repeat, run, args.steps) for name, run in functions.items()}
    seconds = {
        name: [s / args.steps for s in values]
        for name, values in interleaved(repeated, args.repeats).items()
    }
    num_bytes = 2 * source.numel() * source.element_size()
    return {
        "tflops_bfloat16": spread([2 * side**3 / s / 1e12 for s in seconds["product"]]),
        "copy_gb_per_second": spread([num_bytes / s / 1e9 for s in seconds["copy"]]),
        f"images_per_second_without_batch_norm_at_batch_{setup.batch_size}": spread(
            [setup.batch_size / s for s in seconds["network"]]
        ),
    }


def _repeat(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()


def _without_batch_norm(setup: Setup) -> Callable[[], None]:
    """Return forward and backward passes without BatchNorm: convolutions, ReLU and sums."""
    model, (xb, yb) = setup.model(), setup.batch()
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())

    def run() -> None:
        with setup.acceleration.applied(model):
            MixMoLoss()(model(*xb), *yb).backward()
        model.zero_grad()

    return run


# Throughput


def throughput(args: argparse.Namespace) -> Iterator[Results]:
    """Measure all training configurations, interleaved for each batch size."""
    for size in args.batch_sizes:
        torch._dynamo.reset()  # the limit of recompilations is shared by all networks
        plain = make_setup(args, batch_size=size)
        configurations = {
            "float32": plain.replace(autocast=None),
            "channels first": plain.replace(channels_last=False),
            "channels last": plain,
            "vanilla, channels last": plain.replace(num_members=1),
            "ghost batches of 64": plain.replace(ghost_batch_size=min(64, size // 2)),
        }
        compiled = {
            "compiled": plain.replace(compiled=True),
            "vanilla, compiled": plain.replace(compiled=True, num_members=1),
            "compiled, ghost batches of 64": plain.replace(
                compiled=True, ghost_batch_size=min(64, size // 2)
            ),
        }
        if args.eager:
            functions = {
                name: configuration.steps(args.steps)
                for name, configuration in configurations.items()
            }
            functions["Learner, channels last"] = plain.epochs(args.steps)
            yield {str(size): {"eager": _rates(args, functions, size)}}
        if not args.compile:
            continue
        functions = {
            name: configuration.steps(args.steps) for name, configuration in compiled.items()
        }
        functions["Learner, compiled"] = plain.replace(compiled=True).epochs(args.steps)
        start = time.perf_counter()
        for function in functions.values():
            function()
        seconds = time.perf_counter() - start
        yield {
            str(size): {
                "seconds_to_compile_all": seconds,
                "compiled": _rates(args, functions, size),
            }
        }


def _rates(args: argparse.Namespace, functions: dict[str, Callable[[], object]], size: int) -> Any:
    seconds = interleaved(functions, args.repeats)
    images = size * args.steps
    model = make_setup(args, device=torch.device("cpu")).model()
    flops = (1 + BACKWARD_COST) * count_flops(model, (3, SIZE, SIZE))
    results: Results = {}
    for name, values in seconds.items():
        rate = spread([images / s for s in values])
        results[name] = {
            "images_per_second": rate,
            "tflops": rate["median"] * flops / 1e12,
        }
        if args.peak is not None and name != "float32":
            results[name]["fraction_of_peak"] = results[name]["tflops"] / args.peak
    by_hand = next(name for name in ("channels last", "compiled") if name in seconds)
    for name in seconds:
        if name != by_hand:
            results[name]["time_against_" + by_hand.replace(" ", "_")] = paired_ratio(
                seconds[name], seconds[by_hand]
            )
    return results


# The CPU benchmarks, on this device


def inference(args: argparse.Namespace) -> Results:
    """Measure predictions, several per measurement, since one is short."""
    functions = {
        name: partial(_repeat, run, args.steps)
        for name, run in prediction_functions(make_setup(args)).items()
    }
    seconds = interleaved(functions, args.repeats)
    ratios = {name: paired_ratio(values, seconds["vanilla"]) for name, values in seconds.items()}
    return {"seconds": spreads(seconds), "time_against_vanilla": ratios}


def memory(args: argparse.Namespace) -> Results:
    """Compare the peak memory of training with two members and one."""
    setup = make_setup(args)
    peaks = {}
    for members in (1, 2):
        work = setup.replace(num_members=members).steps
        work(1)()
        peaks[f"M={members}"] = peak_bytes(lambda work=work: work(2)(), setup.acceleration.device)
    return {"bytes": peaks, "ratio": peaks["M=2"] / peaks["M=1"]}


def input_pipeline(args: argparse.Namespace) -> Results:
    """Measure pairs per second."""
    pipeline = MixMoPipeline(make_pixels(), args.device)
    seconds = interleaved({"pairs": lambda: pipeline.take(args.batches)}, args.repeats)["pairs"]
    return {"pairs_per_second": spread([args.batches * BATCH / s for s in seconds])}


# Recipes


def recipes(args: argparse.Namespace) -> Iterator[Results]:
    """Train recipes on real images, with equal numbers of images seen."""
    if args.data is None:
        yield {"not run": "--data is not set"}
        return
    for name in args.recipes:
        passes = load_recipe(f"cifar10/{name}").mix.batch_repetitions  # within an epoch
        run = args.out / "runs" / name
        words = [args.data, "--recipe", f"cifar10/{name}", "--arch", args.recipe_arch]
        words += ["--epochs", str(max(1, args.passes // passes)), "--device", args.device]
        words += ["--batch-size", str(args.recipe_batch), "--out", str(run)]
        words += ["--limit", str(args.limit)] if args.limit else []
        words = ["--resume", str(run)] if run.is_dir() else words
        done = subprocess.run(
            [sys.executable, "-m", "mixmo_fastai", "fit", *words, "--json"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ChildProcessError(f"{name}: {done.stderr}")
        yield {name: json.loads(done.stdout)}


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "checks": checks,
    "ceilings": ceilings,
    "throughput": throughput,
    "inference": inference,
    "memory": memory,
    "input": input_pipeline,
    "recipes": recipes,
}


def main() -> None:
    args = _parser().parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("No CUDA device found; use --device cpu to run without a GPU.")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.json"
    results: Results = json.loads(path.read_text()) if path.exists() else {}
    print(", ".join(f"{key} {value}" for key, value in machine().items() if value))
    for part in args.parts:
        results.pop(part, None)
        gc.collect()  # earlier Learners, whose reference cycles keep memory allocated
        if args.device == "cuda":
            torch.cuda.empty_cache()
        start = time.perf_counter()
        try:
            _run(part, args, results)
        except Exception as error:  # continue with the other parts
            results[part] = {**results.get(part, {}), "failed": f"{type(error).__name__}: {error}"}
            print(f"{part} failed: {error}", file=sys.stderr)
        results.setdefault("seconds", {})[part] = round(time.perf_counter() - start, 1)
        if args.peak is None and "tflops_bfloat16" in results.get("ceilings", {}):
            args.peak = results["ceilings"]["tflops_bfloat16"]["median"]
        _write(args.out, results)
    if any("failed" in results[part] for part in args.parts):
        raise SystemExit(1)


def _run(part: str, args: argparse.Namespace, results: Results) -> None:
    measured = PARTS[part](args)
    for group in [measured] if isinstance(measured, dict) else measured:
        for name, value in group.items():
            previous = results.setdefault(part, {}).get(name)
            merged = {**previous, **value} if isinstance(previous, dict) else value
            results[part][name] = merged
            _print(f"{part}: {name}", value)
        _write(args.out, results)


def _print(name: str, value: Any) -> None:
    """Print results as rows; only the main metrics of a trained recipe."""
    if isinstance(value, dict) and "test" in value:
        value = {
            **{key: value[key] for key in ("images_seen", "seconds")},
            **{key: value["test"][key] for key in ("accuracy", "nll", "ece")},
        }
    if not isinstance(value, dict):
        print(f"{name}  {value:,.5g}" if isinstance(value, float) else f"{name}  {value}")
    elif value.keys() == {"min", "median", "max"}:
        print(f"{name}  " + "{median:,.5g} ({min:,.5g} to {max:,.5g})".format(**value))
    else:
        for key, part in value.items():
            _print(f"{name}, {key}", part)
    sys.stdout.flush()


def _write(folder: Path, results: Results) -> None:
    text = json.dumps({**results, "machine": machine()}, indent=2)
    (folder / "results.json").write_text(text + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def parts(text: str) -> list[str]:
        if unknown := [part for part in text.split(",") if part not in PARTS]:
            raise argparse.ArgumentTypeError(
                f"must be among {', '.join(PARTS)}; got {unknown[0]!r}"
            )
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--parts", type=parts, default=[*PARTS], help=",".join(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--arch", default="wrn28_10")
    parser.add_argument("--batch-sizes", type=numbers, default=[256, 512])
    parser.add_argument("--steps", type=int, default=20, help="steps per measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=320, help="batches of the input pipeline")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--eager",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="eager mode in throughput",
    )
    parser.add_argument("--side", type=int, default=8192, help="side of the matrices")
    parser.add_argument("--peak", type=float, help="TFLOP/s of matrix products; default: measured")
    parser.add_argument("--data", help="CIFAR-10 images for the recipes")
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=[*RECIPES])
    parser.add_argument("--recipe-arch", default="wrn28_10")
    parser.add_argument("--recipe-batch", type=int, default=256)
    parser.add_argument(
        "--passes", type=int, default=32, help="passes over all images, including repetitions"
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="maximum number of training images of a recipe"
    )
    return parser


if __name__ == "__main__":
    main()
