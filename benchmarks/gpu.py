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
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_checks import Results, checks, make_setup
from inference import prediction_functions
from input_pipeline import BATCH, MixMoPipeline, make_pixels
from measure import interleaved, machine, paired_ratio, spread, spreads
from memory import peak_bytes
from steps import SIZE, Setup
from torch import nn

from mixmo_fastai.config.load import load_recipe
from mixmo_fastai.mixing.loss import MixMoLoss
from mixmo_fastai.models.flops import BACKWARD_COST, count_flops

RECIPES = ("vanilla", "cutmix", "mimo", "linear-mixmo", "cut-mixmo")


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
