"""Peak of the memory that tensors take in training: two members against one.

python benchmarks/memory.py [--arch wrn16_4] [--batch-size 64] [--device cuda]
                            [--precision bfloat16] [--out FILE.json]

Everything counts from an empty device on: batch, weights, gradients, momenta, features. On a CPU
each allocation is taken from torch's profiler, on a GPU the peak from its allocator, so that
figures repeat to the byte but for what libraries choose.
"""

import gc
from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
from measure import report
from steps import Setup, parser_of_steps
from torch.profiler import ProfilerActivity, profile

NUM_STEPS = 2  # gradients and momenta come with the first
VANILLA, MEMBERS = "vanilla", "M=2"
IN_A_LEARNER = " in a Learner, with its images and what it draws ahead"


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Run something, and give the most bytes of tensors that it held at once."""
    gc.collect()  # Learners of before, which hold themselves
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes))


def _make_and_run(make: Callable[[int], Callable[[], object]]) -> None:
    make(NUM_STEPS)()


def main():
    parser = parser_of_steps(__doc__, arch="wrn16_4", batch_size=64)
    args = parser.parse_args()
    setup = Setup.from_arguments(args)
    vanilla, device = setup.but(num_members=1), setup.path.device
    makers = {
        VANILLA: vanilla.steps,
        MEMBERS: setup.steps,
        VANILLA + IN_A_LEARNER: vanilla.epochs,
        MEMBERS + IN_A_LEARNER: setup.epochs,
    }
    for make in makers.values():  # what libraries keep for good is not of one of them
        make(NUM_STEPS)()
    peaks = {
        name: peak_bytes(partial(_make_and_run, make), device) for name, make in makers.items()
    }
    ratios = {
        f"{MEMBERS} / {VANILLA},{where or ' by hand'}": peaks[MEMBERS + where]
        / peaks[VANILLA + where]
        for where in ("", IN_A_LEARNER)
    }
    rows = [(name, f"{peak / 2**20:,.1f} MiB") for name, peak in peaks.items()]
    rows += [(name, f"{ratio:.4f}") for name, ratio in ratios.items()]
    report(
        f"Peak memory of training: {args.arch}, batch {args.batch_size}, {setup.path.describe()}; "
        "goal: M=2 / vanilla 1.02 or less",
        rows,
        {"bytes": peaks, "ratios": ratios},
        args.out,
    )


if __name__ == "__main__":
    main()
