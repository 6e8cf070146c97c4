"""Cost of a training step: two members against one, and the Learner against a loop by hand.

python benchmarks/training_step.py [--arch wrn16_4] [--batch-size 64] [--device cuda]
                                   [--precision bfloat16] [--out FILE.json]

The loop by hand has the Learner's network, optimizer and precision, and a batch that is ready: it
pays for no loader, no pairing and no masks. The Learner pays for all of it.
"""

from measure import RATIO, SECONDS, interleaved, paired_ratio, report, rows_of, spreads
from steps import Setup, parser_of_steps

LAYOUTS = ("channels first", "channels last")


def main():
    parser = parser_of_steps(__doc__, arch="wrn16_4", batch_size=64, repeats=15)
    parser.add_argument("--steps", type=int, default=4, help="of an epoch of the Learner")
    args = parser.parse_args()
    setup = Setup.from_arguments(args)
    by_hand, learner = f"{args.steps} steps by hand", f"{args.steps} steps of the Learner"
    seconds = interleaved(
        {
            **{
                f"M={members}, {layout}": setup.but(
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
        f"Training step: {args.arch}, batch {args.batch_size}, {setup.path.describe()}; "
        "goals: M=2 / M=1 1.02, Learner / by hand 1.03, or less",
        rows_of(times, SECONDS) + rows_of(ratios, RATIO),
        {"seconds": times, "ratios": ratios},
        args.out,
    )


if __name__ == "__main__":
    main()
