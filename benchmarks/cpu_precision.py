"""Compare training steps in bfloat16 and float32 on a CPU, and both with their convolutions alone.

python benchmarks/cpu_precision.py [--archs wrn16_4,wrn10_2] [--batch-size 64] [--threads 1]
                                   [--repeats 7] [--compiled] [--out FILE.json]

The convolutions alone are the forward and backward convolutions of a step, called directly on
tensors of the same shape, layout and precision: no step can be faster. The fractions of the parts
of a step are those of torch's profiler. With --compiled, compiled steps are measured as well. The
output also shows which instructions the CPU and torch have, and the speed of large matrix products
in both precisions.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from measure import RATIO, SECONDS, format_rows, interleaved, paired_ratio, report, spreads
from steps import Setup, check_batch_size, cpu_parser
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mixmo_fastai.runtime.acceleration import Acceleration

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "avx512_fp16", "avx_ne_convert")
MATRIX_SIZE, PROFILED_STEPS = 2048, 3
PARTS = {  # parts of the names of torch's operations; the first that matches counts
    "convolutions": ("conv",),
    "BatchNorm": ("batch_norm",),
    "ReLU": ("clamp_min", "relu", "threshold"),
    "optimizer": ("sgd", "Optimizer", "foreach"),
    "pooling, heads and loss": ("mean", "mm", "log_softmax", "nll_loss", "div", "pow"),
    "sums and mixing": ("aten::add", "aten::mul", "aten::sum", "addcmul"),
    "copies": ("copy", "fill_", "zero_", "clone", "aten::empty", "pad"),
}


class Convolution(NamedTuple):
    """The arguments of one convolution of a step, forward and backward."""

    x: Tensor
    weight: Tensor
    grad: Tensor
    layer: nn.Conv2d
    is_first: bool  # the images need no gradient

    def run(self) -> None:
        """Compute the output and the gradients."""
        layer = self.layer
        F.conv2d(self.x, self.weight, None, layer.stride, layer.padding)
        torch.ops.aten.convolution_backward(
            self.grad,
            self.x,
            self.weight,
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            False,
            (0, 0),
            layer.groups,
            (not self.is_first, True, False),
        )

    @property
    def operations(self) -> int:
        """Operations of a multiply-add count twice; the backward pass has two products or one."""
        per_output = 2 * self.weight[0].numel()
        return self.grad.numel() * per_output * (2 if self.is_first else 3)


def convolutions(setup: Setup) -> list[Convolution]:
    """Record the convolutions of a step."""
    model, ((images, masks), _) = setup.model().train(), setup.batch()
    dtype = setup.acceleration.autocast or torch.float32
    recorded = []

    def record(layer: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        x, weight, grad = (
            tensor.detach().to(dtype).contiguous(memory_format=torch.channels_last)
            for tensor in (inputs[0], layer.weight, output)
        )
        recorded.append(Convolution(x, weight, grad, layer, x.shape[1] == images.shape[2]))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(record)
    with torch.no_grad(), setup.acceleration.applied(model):
        model(images, masks)
    return recorded


def profiled(step: Callable[[], None]) -> dict[str, float]:
    """Return the fractions of a step's time that its parts take, by torch's profiler."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        start = time.perf_counter()
        for _ in range(PROFILED_STEPS):
            step()
        microseconds = 1e6 * (time.perf_counter() - start)
    fractions = dict.fromkeys([*PARTS, "others"], 0.0)
    for event in recorded.key_averages():
        names = (part for part, words in PARTS.items() if any(word in event.key for word in words))
        fractions[next(names, "others")] += event.self_cpu_time_total / microseconds
    # What the profiler attributes to no operation is the time of Python between them.
    return {**fractions, "Python": max(0.0, 1 - sum(fractions.values()))}


def run_all(recorded: list[Convolution]) -> Callable[[], None]:
    """Return a function that runs all convolutions."""

    def run() -> None:
        for each in recorded:
            each.run()

    return run


def measure_arch(arch: str, args: argparse.Namespace) -> dict[str, object]:
    """Measure the steps of a network and print a table."""
    functions, parts, operations, compilation = {}, {}, 0, {}
    for name, autocast in PRECISIONS.items():
        acceleration = Acceleration(torch.device("cpu"), autocast=autocast, threads=args.threads)
        setup = Setup(arch, args.batch_size, acceleration=acceleration)
        recorded = convolutions(setup)
        operations = sum(each.operations for each in recorded)
        functions |= {f"step, {name}": setup.steps(), f"convolutions, {name}": run_all(recorded)}
        parts[name] = profiled(functions[f"step, {name}"])
        if args.compiled:
            functions[f"compiled step, {name}"] = step = setup.replace(compiled=True).steps()
            start = time.perf_counter()
            step()
            compilation[name] = time.perf_counter() - start
    seconds = interleaved(functions, args.repeats)
    ratios = {
        **{
            f"step / compiled step, {name}": paired_ratio(
                seconds[f"step, {name}"], seconds[f"compiled step, {name}"]
            )
            for name in compilation
        },
        "step, float32 / bfloat16": paired_ratio(
            seconds["step, float32"], seconds["step, bfloat16"]
        ),
        "convolutions, float32 / bfloat16": paired_ratio(
            seconds["convolutions, float32"], seconds["convolutions, bfloat16"]
        ),
        **{
            f"convolutions / step, {name}": paired_ratio(
                seconds[f"convolutions, {name}"], seconds[f"step, {name}"]
            )
            for name in PRECISIONS
        },
    }
    times = spreads(seconds)
    rates = {
        name: operations / times[f"convolutions, {name}"]["median"] / 1e9 for name in PRECISIONS
    }
    print(f"{arch}, batch {args.batch_size}, 32x32; goals: 1.9 for the steps, 0.80 of each step")
    rows = format_rows(times, SECONDS) + format_rows(ratios, RATIO)
    rows += [(f"convolutions, {name}", f"{rate:.0f} GFLOP/s") for name, rate in rates.items()]
    rows += [
        (part, ", ".join(f"{parts[name][part]:6.1%} of {name}" for name in PRECISIONS))
        for part in parts["float32"]
    ]
    rows += [(f"compilation, {name}", f"{each:.0f} s") for name, each in compilation.items()]
    for name, text in rows:
        print(f"  {name:<34}{text}")
    return {
        "seconds": times,
        "ratios": ratios,
        "gflops": rates,
        "parts": parts,
        "compilation_seconds": compilation,
    }


def matrix_rates(repeats: int) -> dict[str, float]:
    """Measure large matrix products in both precisions, in GFLOP/s."""
    functions = {}
    for name, dtype in PRECISIONS.items():
        a, b = (torch.randn(MATRIX_SIZE, MATRIX_SIZE).to(dtype or torch.float32) for _ in range(2))
        functions[name] = lambda a=a, b=b: a @ b
    times = spreads(interleaved(functions, repeats))
    return {name: 2 * MATRIX_SIZE**3 / times[name]["median"] / 1e9 for name in PRECISIONS}


def cpu_flags() -> list[str]:
    """Return the instruction sets of the CPU that matter here."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not on Linux
        return []
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return [flag for flag in FLAGS if flag in line.split()]


def main():
    parser = cpu_parser(__doc__, repeats=7)
    parser.add_argument("--archs", default="wrn16_4,wrn10_2")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--compiled", action="store_true", help="measure compiled steps as well")
    args = parser.parse_args()
    check_batch_size(args.batch_size)
    torch.set_num_threads(args.threads)
    results = {arch: measure_arch(arch, args) for arch in args.archs.split(",")}
    matrices = matrix_rates(args.repeats)
    capability = torch.backends.cpu.get_cpu_capability()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    rows = [
        *((f"matrices, {name}", f"{rate:.0f} GFLOP/s") for name, rate in matrices.items()),
        ("instructions of the CPU", ", ".join(cpu_flags()) or "unknown"),
        ("kernels of torch", capability + (f", oneDNN limited to {limit}" if limit else "")),
    ]
    report(
        "This machine",
        rows,
        {"networks": results, "matrix_gflops": matrices, "cpu_flags": cpu_flags()},
        args.out,
    )


if __name__ == "__main__":
    main()
