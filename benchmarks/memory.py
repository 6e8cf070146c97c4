"""Compare the peak memory of tensors in training: two members and one.

python benchmarks/memory.py [--arch wrn16_4] [--batch-size 64] [--device cuda]
                            [--precision bfloat16] [--out FILE.json]

Everything is counted from an empty device: batch, weights, gradients, momentum buffers, features.
Allocations are read from torch's profiler on a CPU, and from the allocator's peak on a GPU, so
results are reproducible to the byte except for allocations chosen by libraries.
"""

import gc
from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
from measure import report
from steps import Setup, step_parser
from torch.profiler import ProfilerActivity, profile

NUM_STEPS = 2  # the first step allocates gradients and momentum buffers
VANILLA, MEMBERS = "vanilla", "M=2"
IN_A_LEARNER = " in a Learner, with its images and prefetched draws"


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Run a function, and return the peak number of bytes of its tensors."""
    gc.collect()  # earlier Learners, which contain reference cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes))


def _make_and_run(make_steps: Callable[[int], Callable[[], object]]) -> None:
    make_steps(NUM_STEPS)()


def main():
    parser = step_parser(__doc__, arch="wrn16_4", batch_size=64)
    args = parser.parse_args()
    setup = Setup.from_arguments(args)
    vanilla, device = setup.replace(num_members=1), setup.acceleration.device
    makers = {
        VANILLA: vanilla.steps,
        MEMBERS: setup.steps,
        VANILLA + IN_A_LEARNER: vanilla.epochs,
        MEMBERS + IN_A_LEARNER: setup.epochs,
    }
    for make_steps in makers.values():  # exclude memory that libraries allocate once and keep
        make_steps(NUM_STEPS)()
    peaks = {
        name: peak_bytes(partial(_make_and_run, make_steps), device)
        for name, make_steps in makers.items()
    }
    ratios = {
        f"{MEMBERS} / {VANILLA},{setting or ' by hand'}": peaks[MEMBERS + setting]
        / peaks[VANILLA + setting]
        for setting in ("", IN_A_LEARNER)
    }
    rows = [(name, f"{peak / 2**20:,.1f} MiB") for name, peak in peaks.items()]
    rows += [(name, f"{ratio:.4f}") for name, ratio in ratios.items()]
    report(
        f"Peak memory of training: {args.arch}, batch {args.batch_size}, "
        f"{setup.acceleration.describe()}; goal: M=2 / vanilla 1.02 or less",
        rows,
        {"bytes": peaks, "ratios": ratios},
        args.out,
    )


if __name__ == "__main__":
    main()
