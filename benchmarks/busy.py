"""Compare the default number of threads with fixed ones while other programs keep the cores busy.

python benchmarks/busy.py [--busy 2] [--epochs 15] [--repeats 1] [--out FILE.json]

Starts spinning processes, by default one per core, and trains the digits with `--threads auto` and
with one, half and all of the available threads. Times are those of `mixmo fit` without its imports.
The spinning processes end with this program, however that ends.
"""

import argparse
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import RATIO, SECONDS, format_rows, paired_ratio, report, spread

from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.runtime.acceleration import thread_limit
from mixmo_fastai.training.threads import candidates

SPIN = """
import os
parent = int(os.environ["SPIN_FOR"])
while os.getppid() == parent:  # otherwise the benchmark was killed
    for _ in range(100_000):
        pass
"""
FIT = """
import sys, time
from mixmo_fastai.cli import run
from mixmo_fastai.cli import fit, progress
from mixmo_fastai.training import ensemble, precision, speed, threads
started = time.perf_counter()
code = run(sys.argv[1:])
print("seconds", time.perf_counter() - started)
sys.exit(code)
"""


@contextmanager
def spinning(count):
    """Keep cores busy in a with block, each process on one of the cores in turn."""
    processes = []
    try:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        environment = {**os.environ, "SPIN_FOR": str(os.getpid())}
        for number in range(count):
            processes.append(subprocess.Popen([sys.executable, "-c", SPIN], env=environment))
            if cores:
                os.sched_setaffinity(processes[-1].pid, {cores[number % len(cores)]})
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def fit_seconds(args, threads, folder, limit):
    """Train, and return the seconds and the number of threads; infinite seconds above the limit."""
    words = ["fit", "digits", "--arch", args.arch, "--epochs", args.epochs, "--limit", args.limit]
    words += ["--device", "cpu", "--threads", threads, "--quiet", "--out", folder]
    command = [sys.executable, "-c", FIT, *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return math.inf, threads
        finally:
            process.kill()
    if process.returncode:
        sys.exit(output)
    seconds = float(output.rpartition("\nseconds ")[2].split()[0])
    return seconds, open_run(folder).recipe().train.threads


def measure_round(args, numbers, folder):
    """Return the seconds with each number of threads and with auto, and the number auto chose."""
    seconds, limit = {}, args.seconds
    for number in numbers:
        seconds[number], _ = fit_seconds(args, number, folder / str(number), limit)
        # Only the fastest counts; a slower one may take 50 times as long.
        limit = min(limit, 2 * seconds[number] + 30)
    best = min(seconds.values())
    limit = min(args.seconds, 5 * best + 30)
    seconds["auto"], chosen = fit_seconds(args, "auto", folder / "auto", limit)
    return seconds, chosen


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    limit = thread_limit()
    parser.add_argument("--busy", type=int, help="spinning processes; by default one per core")
    parser.add_argument("--arch", default="wrn10_2")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--limit", type=int, default=0, help="training images; 0 for all")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=900, help="maximum time of one training")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    busy = limit.count if args.busy is None else args.busy
    numbers, rounds = candidates(limit.count), []
    load = [round(each, 1) for each in os.getloadavg()]  # before: what other programs do
    with TemporaryDirectory() as folder, spinning(busy):
        for repeat in range(args.repeats):
            rounds.append(measure_round(args, numbers, Path(folder) / str(repeat)))
    seconds = {name: [times[name] for times, _ in rounds] for name in (*numbers, "auto")}
    best = [min(times[number] for number in numbers) for times, _ in rounds]
    ratio = paired_ratio(seconds["auto"], best)
    spreads = {str(name): spread(values) for name, values in seconds.items()}
    finished = {name: each for name, each in spreads.items() if each["max"] < math.inf}
    rows = format_rows(finished, SECONDS)
    rows += [(name, "stopped, slower than others") for name in spreads if name not in finished]
    chosen = [number for _, number in rounds]
    rows += [("auto chose", ", ".join(map(str, chosen)))]
    rows += [("auto / best", RATIO.format(**ratio) + "; goal 1.1")]
    report(
        f"Digits, {args.arch}, {args.epochs} epochs, {limit.count} threads available, {busy} "
        f"spinning processes; load of other programs {load[0]} to {load[2]}",
        rows,
        {"seconds": finished, "chosen": chosen, "ratio": ratio, "busy": busy, "load": load},
        args.out,
    )


if __name__ == "__main__":
    main()
