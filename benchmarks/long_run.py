"""Measure whether late epochs of a run take longer than early ones.

python benchmarks/long_run.py [--arch wrn10_1] [--epochs 200] [--limit 320] [--out FILE.json]

Trains many short epochs on the digits, including checkpoints and history. The wall-clock time of
each epoch is read from the run's history.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import SECONDS, format_rows, report, spread

from mixmo_fastai.runs.folder import open_run


def epoch_seconds(args, folder):
    """Train, and return the seconds of each epoch, from the end of the previous epoch."""
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
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        seconds = epoch_seconds(args, Path(folder))
    num_epochs = max(1, args.epochs // 5)
    early, late = seconds[1 : 1 + num_epochs] or seconds, seconds[-num_epochs:]
    times = {f"epochs 2 to {1 + len(early)}": spread(early), f"last {len(late)}": spread(late)}
    medians = [value["median"] for value in times.values()]
    report(
        f"Seconds per epoch over {args.epochs} epochs: {args.arch}, {args.limit} images; "
        "goal: no increase",
        [*format_rows(times, SECONDS), ("last / first, medians", f"{medians[1] / medians[0]:.3f}")],
        {"seconds": times, "ratio": medians[1] / medians[0]},
        args.out,
    )


if __name__ == "__main__":
    main()
