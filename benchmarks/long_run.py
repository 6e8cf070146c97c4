"""Whether an epoch late in a run takes longer than an early one.

python benchmarks/long_run.py [--arch wrn10_1] [--epochs 200] [--limit 320] [--out FILE.json]

A run of many short epochs on the digits, checkpoint and history included; the wall clock of each
epoch is from the run's own history.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import SECONDS, report, rows_of, spread

from mixmo_fastai.runs import open_run


def seconds_of_epochs(args, folder):
    """Train, and give the seconds of each epoch from the end of the one before."""
    run = folder / "run"
    words = ["fit", "digits", "--arch", args.arch, "--epochs", str(args.epochs), "--quiet"]
    words += ["--limit", str(args.limit), "--batch-size", "32", "--device", args.device]
    subprocess.run(
        [sys.executable, "-m", "mixmo_fastai", *words, "--out", str(run)],
        check=True,
        capture_output=True,
    )
    return [float(row["seconds"]) for row in open_run(run).history()]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="wrn10_1")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--limit", type=int, default=320, help="training images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="of the figures as JSON")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        seconds = seconds_of_epochs(args, Path(folder))
    part = max(1, args.epochs // 5)
    first, late = seconds[1 : 1 + part] or seconds, seconds[-part:]
    times = {f"epochs 2 to {1 + len(first)}": spread(first), f"the last {len(late)}": spread(late)}
    medians = [value["median"] for value in times.values()]
    report(
        f"Seconds of an epoch over a run of {args.epochs}: {args.arch}, {args.limit} images; "
        "goal: as many at its end",
        [*rows_of(times, SECONDS), ("last / first, of medians", f"{medians[1] / medians[0]:.3f}")],
        {"seconds": times, "ratio": medians[1] / medians[0]},
        args.out,
    )


if __name__ == "__main__":
    main()
