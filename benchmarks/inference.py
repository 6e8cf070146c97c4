"""Cost of a prediction: the fused network against the vanilla one, and against an ensemble of two.

python benchmarks/inference.py [--arch wrn16_4] [--batch-size 64] [--device cuda]
                               [--precision bfloat16] [--out FILE.json]
"""

import torch
from measure import RATIO, interleaved, paired_ratio, report, rows_of, spreads
from steps import CLASSES, SIZE, Setup, parser_of_steps
from torch import nn

MILLISECONDS = "{median:.2f} ms ({min:.2f} to {max:.2f})"
VANILLA, FUSED, MEMBERS, ENSEMBLE = (
    "vanilla",
    "M=2, fused",
    "M=2, as it was trained",
    "ensemble of 2 networks",
)


class Ensemble(nn.Module):
    """Networks whose logits are averaged."""

    def __init__(self, *networks):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x):
        return torch.stack([network(x) for network in self.networks]).mean(dim=0)


def subjects_of(setup):
    """Give a prediction of a batch by each network."""
    vanilla, members = setup.but(num_members=1), setup.but(num_members=2).model()
    networks = {
        VANILLA: vanilla.model(),
        FUSED: setup.path.move_to_device(members.eval().fuse()),
        MEMBERS: members,
        ENSEMBLE: Ensemble(vanilla.model(), vanilla.model()),
    }
    x = torch.randn(setup.batch_size, 3, SIZE, SIZE, device=setup.path.device)
    if setup.path.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return {name: prediction(network.eval(), x, setup.path) for name, network in networks.items()}


def prediction(network, x, path):
    """Give a function that shows the images to the network."""

    def run():
        with (
            torch.inference_mode(),
            torch.autocast(path.device.type, path.autocast, path.autocast is not None),
        ):
            logits = network(x)
        assert logits.shape == (len(x), CLASSES)

    return run


def main():
    args = parser_of_steps(__doc__, arch="wrn16_4", batch_size=64, repeats=21).parse_args()
    setup = Setup.from_arguments(args)
    milliseconds = {
        name: [1000 * s for s in values]
        for name, values in interleaved(subjects_of(setup), args.repeats).items()
    }
    ratios = {
        f"{name} / vanilla": paired_ratio(milliseconds[name], milliseconds[VANILLA])
        for name in (FUSED, MEMBERS, ENSEMBLE)
    }
    ratios["ensemble / fused"] = paired_ratio(milliseconds[ENSEMBLE], milliseconds[FUSED])
    times = spreads(milliseconds)
    report(
        f"Prediction: {args.arch}, batch {args.batch_size}, {setup.path.describe()}; "
        "goal: fused / vanilla from 0.98 to 1.02",
        rows_of(times, MILLISECONDS) + rows_of(ratios, RATIO),
        {"milliseconds": times, "ratios": ratios},
        args.out,
    )


if __name__ == "__main__":
    main()
