"""Compare training steps: two members and one, and the Learner and a hand-written loop.

python benchmarks/training_step.py [--arch wrn16_4] [--batch-size 64] [--device cuda]
                                   [--precision bfloat16] [--out FILE.json]

The hand-written loop has the Learner's network, optimizer and precision, and a prepared batch,
without a loader, pairing and masks. The time of the Learner includes all of these.
"""

from measure import RATIO, SECONDS, format_rows, interleaved, paired_ratio, report, spreads
from steps import Setup, step_parser

LAYOUTS = ("channels first", "channels last")


def main():
    parser = step_parser(__doc__, arch="wrn16_4", batch_size=64, repeats=15)
    parser.add_argument("--steps", type=int, default=4, help="steps per epoch of the Learner")
    args = parser.parse_args()
    setup = Setup.from_arguments(args)
    by_hand, learner = f"{args.steps} steps by hand", f"{args.steps} steps of the Learner"
    seconds = interleaved(
        {
            **{
                f"M={members}, {layout}": setup.replace(
                    num_members=members, channels_last=layout == LAYOUTS[1]
                ).steps()
                for members in (1, 2)
                for layout in LAYOUTS
            },
            by_hand: setup.steps(args.steps),
            learner: setup.epochs(args.steps),
        },
        args.repeats,
    )
    ratios = {
        f"M=2 / M=1, {layout}": paired_ratio(seconds[f"M=2, {layout}"], seconds[f"M=1, {layout}"])
        for layout in LAYOUTS
    }
    ratios["Learner / by hand"] = paired_ratio(seconds[learner], seconds[by_hand])
    times = spreads(seconds)
    report(
        f"Training step: {args.arch}, batch {args.batch_size}, {setup.acceleration.describe()}; "
        "goals: at most 1.02 for M=2 / M=1, 1.03 for Learner / by hand",
        format_rows(times, SECONDS) + format_rows(ratios, RATIO),
        {"seconds": times, "ratios": ratios},
        args.out,
    )


if __name__ == "__main__":
    main()
