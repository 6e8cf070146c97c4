"""What only a GPU can tell, in one command: is it right, how fast is it, what does it learn.

python benchmarks/gpu.py --out DIR [--data FOLDER] [--parts checks,ceilings,…] [--arch wrn28_10]

Parts, in this order; DIR/figures.json is written after each, so that a run that is cut short leaves
what it had, and a later one adds to it; recipes go on where they were:

  checks      a step on the GPU against the same step on the CPU; no wait within an epoch's steps
  ceilings    matrix products in bfloat16, copies, the network without BatchNorm
  throughput  training: images per second and share of the matrix rate, by batch, layout,
              compilation, ghost batches; the Learner against a loop by hand; M=2 against M=1
  inference   the fused network against the vanilla one and an ensemble of two
  memory      peak of training with two members against one
  input       pairs per second of the loader with masks and weights
  recipes     --data, a folder of images or a data set's name: recipes at equal images seen
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
from inference import subjects_of
from input_pipeline import BATCH, Ours, make_pixels
from measure import interleaved, machine, paired_ratio, spread, spreads
from memory import peak_bytes
from steps import SIZE, Setup
from torch import nn

from mixmo_fastai.acceleration import Acceleration
from mixmo_fastai.averaging import EMACallback
from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.progress import TrainingDisplay
from mixmo_fastai.devices import products
from mixmo_fastai.flops import BACKWARD_COST, count_flops
from mixmo_fastai.losses import MixMoLoss
from mixmo_fastai.recipe import load_recipe
from mixmo_fastai.recording import HistoryCallback
from mixmo_fastai.runs import RunFolder
from mixmo_fastai.schedule import one_cycle

RECIPES = ("vanilla", "cutmix", "mimo", "linear-mixmo", "cut-mixmo")
Figures = dict[str, Any]


def setup_of(args: argparse.Namespace, **changes: Any) -> Setup:
    """Give the setup that is measured: bfloat16, channels last, not compiled, the first batch."""
    path = Acceleration(torch.device(args.device), autocast=torch.bfloat16)
    return Setup(args.arch, args.batch_sizes[0], path=path).but(**changes)


# Checks


def checks(args: argparse.Namespace) -> Iterator[Figures]:
    """Compare a step with the CPU's, and let torch refuse every wait within an epoch's steps."""
    plain, rounded = (_step_difference(args, autocast) for autocast in (None, torch.bfloat16))
    differences = {
        "loss in float32, relative to the CPU's": (plain[0], 1e-5),
        "worst gradient in float32": (plain[1], 1e-3),
        "loss in bfloat16": (rounded[0], 0.02),
        "worst gradient in bfloat16": (rounded[1], 0.5),
        "logits of the fused network": (_fused_difference(args), 1e-5),
        "losses of one seed, twice": (_repeats(args), 0.0 if args.device == "cpu" else 0.05),
    }
    for name, (difference, limit) in differences.items():
        kept = "kept" if difference <= limit else "NOT KEPT"
        yield {name: {"difference": difference, "at most": limit, "limit": kept}}
    yield {"waits within an epoch": _waits(args)}
    if args.compile:
        yield {"waits within an epoch, compiled": _waits(args, compiled=True)}
    wrong = [name for name, (difference, limit) in differences.items() if not difference <= limit]
    if wrong:
        raise ArithmeticError(f"too far from what they must be: {', '.join(wrong)}")


def _step_difference(args: argparse.Namespace, autocast: torch.dtype | None) -> tuple[float, float]:
    """Compare loss and worst gradient of one step on the device with float32 on the CPU."""
    setup = setup_of(args, arch="wrn10_2", batch_size=16, autocast=autocast)
    cpu = setup.but(device=torch.device("cpu"), autocast=None)
    model, batch = cpu.model(), cpu.batch()
    expected = _loss_and_gradients(cpu, model, batch)
    twin = setup.model()
    twin.load_state_dict(model.state_dict())
    on_device = [[part.to(setup.path.device) for part in side] for side in batch]
    found = _loss_and_gradients(setup, twin, on_device)
    differences = [*map(_relative, found, expected)]
    return differences[0], max(differences[1:])


def _loss_and_gradients(setup: Setup, model: nn.Module, batch: Any) -> list[torch.Tensor]:
    with setup.path.applied(model.train()):
        loss = MixMoLoss()(model(*batch[0]), *batch[1])
        loss.backward()
    return [t.detach().float().cpu() for t in (loss, *(p.grad for p in model.parameters()))]


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def _fused_difference(args: argparse.Namespace) -> float:
    setup = setup_of(args, autocast=None)
    model = setup.model().eval()
    x = torch.randn(32, 3, SIZE, SIZE, device=setup.path.device)
    with torch.inference_mode(), products(tf32=False):
        return _relative(setup.path.place(model.fuse())(x).cpu(), model(x).cpu())


def _repeats(args: argparse.Namespace) -> float:
    """The largest difference between the losses of two Learners of one seed."""
    setup = setup_of(args, arch="wrn10_1", batch_size=16, autocast=None)
    losses = []
    for _ in range(2):
        learn = setup.learner(args.steps, seed=1)
        with setup.path.applied(learn.model), learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-3)
        losses.append(torch.stack(learn.recorder.losses))
    return float((losses[0] - losses[1]).abs().max())


class _NoWaiting(Callback):
    """Let torch raise wherever the program waits for the GPU, but in the recorder's own fetches."""

    order = -20

    def __init__(self, set_mode: Callable[[str], None]) -> None:
        super().__init__()
        self.set_mode, self.watched, self.fetches = set_mode, 0, 0

    def before_fit(self) -> None:
        """Let the recorder fetch."""
        recorder = self.learn.recorder
        fetch = recorder.fetch

        def fetch_unwatched() -> None:
            self.set_mode("default")
            fetch()
            self.fetches += 1
            self.set_mode("error" if self.watched else "default")

        recorder.fetch = fetch_unwatched

    def before_batch(self) -> None:
        """Watch from the third step on; the first ones choose algorithms and take memory."""
        if self.learn.iter >= 2:
            self.set_mode("error")
            self.watched += 1

    def after_train(self) -> None:
        """Stop; an epoch's figures are read once."""
        self.watched_in_all, self.watched = self.watched, 0
        self.set_mode("default")


class _Unwritten(HistoryCallback):
    """What a run does at every step for its history, which here has no validation to tell of."""

    def after_trained_epoch(self) -> None:
        """Write nothing."""


def _waits(args: argparse.Namespace, *, compiled: bool = False) -> str:
    """Train with all that `mixmo fit` has, and with fastai's bar."""
    setup = setup_of(args, arch="wrn10_1", batch_size=16, compiled=compiled)
    on_gpu = setup.path.device.type == "cuda"
    mode = torch.cuda.set_sync_debug_mode if on_gpu else lambda _: None
    watch = _NoWaiting(mode)
    learn = setup.learner(max(50, args.steps), seed=1, more_cbs=[EMACallback(0.9)])
    rates = ParamScheduler({"lr": one_cycle(1e-4, 1e-3, 1e-5, 0.25)})
    with TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        history = _Unwritten(RunFolder(Path(folder)), setup.batch_size)
        display = TrainingDisplay(Output(quiet=True), setup.batch_size)
        try:
            with setup.path.applied(learn.model), learn.no_logging():
                learn.fit(1, 1e-3, cbs=[rates, history, display, watch])
        finally:
            mode("default")
    seen = f"none in {watch.watched_in_all} steps, loader included, but {watch.fetches} fetches"
    return seen if on_gpu else "not to be seen without a GPU"


# Ceilings


def ceilings(args: argparse.Namespace) -> Figures:
    """Measure what bounds a training step: products, copies, all but BatchNorm."""
    device, side = torch.device(args.device), args.side
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(8 * side * side, device=device)
    target = torch.empty_like(source)
    setup = setup_of(args)
    subjects = {
        "product": lambda: a @ b,
        "copy": lambda: target.copy_(source),
        "network": _without_batch_norm(setup),
    }
    # Many per time: one is short beside what starts it.
    several = {name: partial(_repeat, run, args.steps) for name, run in subjects.items()}
    seconds = {
        name: [s / args.steps for s in values]
        for name, values in interleaved(several, args.repeats).items()
    }
    moved = 2 * source.numel() * source.element_size()
    return {
        "tflops_bfloat16": spread([2 * side**3 / s / 1e12 for s in seconds["product"]]),
        "copy_gb_per_second": spread([moved / s / 1e9 for s in seconds["copy"]]),
        f"images_per_second_without_batch_norm_at_batch_{setup.batch_size}": spread(
            [setup.batch_size / s for s in seconds["network"]]
        ),
    }


def _repeat(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()


def _without_batch_norm(setup: Setup) -> Callable[[], None]:
    """Forward and backward of the network without BatchNorm: convolutions, ReLU and sums."""
    model, (xb, yb) = setup.model(), setup.batch()
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())

    def run() -> None:
        with setup.path.applied(model):
            MixMoLoss()(model(*xb), *yb).backward()
        model.zero_grad()

    return run


# Throughput


def throughput(args: argparse.Namespace) -> Iterator[Figures]:
    """Measure training from the plain way to the fastest; all ways of one batch size in turns."""
    for size in args.batch_sizes:
        torch._dynamo.reset()  # its limit of recompilations is one for all networks
        plain = setup_of(args, batch_size=size)
        ways = {
            "float32": plain.but(autocast=None),
            "channels first": plain.but(channels_last=False),
            "channels last": plain,
            "vanilla, channels last": plain.but(num_members=1),
            "ghost batches of 64": plain.but(ghost_batch_size=min(64, size // 2)),
        }
        compiled = {
            "compiled": plain.but(compiled=True),
            "vanilla, compiled": plain.but(compiled=True, num_members=1),
            "compiled, ghost batches of 64": plain.but(
                compiled=True, ghost_batch_size=min(64, size // 2)
            ),
        }
        if args.eager:
            subjects = {name: way.steps(args.steps) for name, way in ways.items()}
            subjects["Learner, channels last"] = plain.epochs(args.steps)
            yield {str(size): {"eager": _rates(args, subjects, size)}}
        if not args.compile:
            continue
        subjects = {name: way.steps(args.steps) for name, way in compiled.items()}
        subjects["Learner, compiled"] = plain.but(compiled=True).epochs(args.steps)
        began = time.perf_counter()
        for subject in subjects.values():
            subject()
        seconds = time.perf_counter() - began
        yield {
            str(size): {
                "seconds_to_compile_all": seconds,
                "compiled": _rates(args, subjects, size),
            }
        }


def _rates(args: argparse.Namespace, subjects: dict[str, Callable[[], object]], size: int) -> Any:
    seconds = interleaved(subjects, args.repeats)
    images = size * args.steps
    model = setup_of(args, device=torch.device("cpu")).model()
    flops = (1 + BACKWARD_COST) * count_flops(model, (3, SIZE, SIZE))
    figures: Figures = {}
    for name, values in seconds.items():
        rate = spread([images / s for s in values])
        figures[name] = {
            "images_per_second": rate,
            "tflops": rate["median"] * flops / 1e12,
        }
        if args.peak is not None and name != "float32":
            figures[name]["share_of_peak"] = figures[name]["tflops"] / args.peak
    by_hand = next(name for name in ("channels last", "compiled") if name in seconds)
    for name in seconds:
        if name != by_hand:
            figures[name]["time_against_" + by_hand.replace(" ", "_")] = paired_ratio(
                seconds[name], seconds[by_hand]
            )
    return figures


# The benchmarks of the CPU, here


def inference(args: argparse.Namespace) -> Figures:
    """Measure predictions, many per time, since one is short."""

    subjects = {
        name: partial(_repeat, run, args.steps) for name, run in subjects_of(setup_of(args)).items()
    }
    seconds = interleaved(subjects, args.repeats)
    ratios = {name: paired_ratio(values, seconds["vanilla"]) for name, values in seconds.items()}
    return {"seconds": spreads(seconds), "time_against_vanilla": ratios}


def memory(args: argparse.Namespace) -> Figures:
    """Compare peaks of training."""
    setup = setup_of(args)
    peaks = {}
    for members in (1, 2):
        work = setup.but(num_members=members).steps
        work(1)()
        peaks[f"M={members}"] = peak_bytes(lambda work=work: work(2)(), setup.path.device)
    return {"bytes": peaks, "ratio": peaks["M=2"] / peaks["M=1"]}


def input_pipeline(args: argparse.Namespace) -> Figures:
    """Measure pairs per second."""
    ours = Ours(make_pixels(), args.device)
    seconds = interleaved({"pairs": lambda: ours.take(args.batches)}, args.repeats)["pairs"]
    return {"pairs_per_second": spread([args.batches * BATCH / s for s in seconds])}


# Recipes


def recipes(args: argparse.Namespace) -> Iterator[Figures]:
    """Train recipes on real images, each seeing as many."""
    if args.data is None:
        yield {"not run": "--data names no images"}
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
        raise SystemExit("torch finds no GPU here; --device cpu runs everything without one.")
    args.out.mkdir(parents=True, exist_ok=True)
    known = args.out / "figures.json"
    figures: Figures = json.loads(known.read_text()) if known.exists() else {}
    print(", ".join(f"{key} {value}" for key, value in machine().items() if value))
    for part in args.parts:
        figures.pop(part, None)
        gc.collect()  # Learners of before, which hold themselves and their memory
        if args.device == "cuda":
            torch.cuda.empty_cache()
        began = time.perf_counter()
        try:
            _run(part, args, figures)
        except Exception as error:  # the other parts have their own to say
            figures[part] = {**figures.get(part, {}), "failed": f"{type(error).__name__}: {error}"}
            print(f"{part} failed: {error}", file=sys.stderr)
        figures.setdefault("seconds", {})[part] = round(time.perf_counter() - began, 1)
        if args.peak is None and "tflops_bfloat16" in figures.get("ceilings", {}):
            args.peak = figures["ceilings"]["tflops_bfloat16"]["median"]
        _write(args.out, figures)
    if any("failed" in figures[part] for part in args.parts):
        raise SystemExit(1)


def _run(part: str, args: argparse.Namespace, figures: Figures) -> None:
    found = PARTS[part](args)
    for some in [found] if isinstance(found, dict) else found:
        for name, value in some.items():
            known = figures.setdefault(part, {}).get(name)
            merged = {**known, **value} if isinstance(known, dict) else value
            figures[part][name] = merged
            _print(f"{part}: {name}", value)
        _write(args.out, figures)


def _print(name: str, value: Any) -> None:
    """Print figures as rows; of a trained recipe, the foremost."""
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


def _write(folder: Path, figures: Figures) -> None:
    text = json.dumps({**figures, "machine": machine()}, indent=2)
    (folder / "figures.json").write_text(text + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def parts(text: str) -> list[str]:
        if strange := [part for part in text.split(",") if part not in PARTS]:
            raise argparse.ArgumentTypeError(f"{strange[0]!r} is none of {', '.join(PARTS)}")
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--parts", type=parts, default=[*PARTS], help=",".join(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--arch", default="wrn28_10")
    parser.add_argument("--batch-sizes", type=numbers, default=[256, 512])
    parser.add_argument("--steps", type=int, default=20, help="per time that is taken")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=320, help="of the input pipeline")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--eager", action=argparse.BooleanOptionalAction, default=True, help="in throughput"
    )
    parser.add_argument("--side", type=int, default=8192, help="of the matrices")
    parser.add_argument("--peak", type=float, help="TFLOP/s of matrix products; else as measured")
    parser.add_argument("--data", help="for the recipes: images of CIFAR-10")
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=[*RECIPES])
    parser.add_argument("--recipe-arch", default="wrn28_10")
    parser.add_argument("--recipe-batch", type=int, default=256)
    parser.add_argument("--passes", type=int, default=32, help="over all images, repetitions too")
    parser.add_argument("--limit", type=int, default=0, help="training images of a recipe")
    return parser


if __name__ == "__main__":
    main()
