"""Compare prediction times: fused and vanilla network, and an ensemble of two networks.

python benchmarks/inference.py [--arch wrn16_4] [--batch-size 64] [--device cuda]
                               [--precision bfloat16] [--out FILE.json]
"""

import torch
from measure import RATIO, format_rows, interleaved, paired_ratio, report, spreads
from steps import CLASSES, SIZE, Setup, step_parser
from torch import nn

MILLISECONDS = "{median:.2f} ms ({min:.2f} to {max:.2f})"
VANILLA, FUSED, MEMBERS, ENSEMBLE = (
    "vanilla",
    "M=2, fused",
    "M=2, not fused",
    "ensemble of 2 networks",
)


class Ensemble(nn.Module):
    """Average the logits of several networks."""

    def __init__(self, *networks):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x):
        return torch.stack([network(x) for network in self.networks]).mean(dim=0)


def prediction_functions(setup):
    """Return a function per network that predicts one batch."""
    vanilla, members = setup.replace(num_members=1), setup.replace(num_members=2).model()
    networks = {
        VANILLA: vanilla.model(),
        FUSED: setup.acceleration.move_to_device(members.eval().fuse()),
        MEMBERS: members,
        ENSEMBLE: Ensemble(vanilla.model(), vanilla.model()),
    }
    x = torch.randn(setup.batch_size, 3, SIZE, SIZE, device=setup.acceleration.device)
    if setup.acceleration.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return {
        name: prediction(network.eval(), x, setup.acceleration)
        for name, network in networks.items()
    }


def prediction(network, x, path):
    """Return a function that runs the network on the images."""

    def run():
        with (
            torch.inference_mode(),
            torch.autocast(path.device.type, path.autocast, path.autocast is not None),
        ):
            logits = network(x)
        assert logits.shape == (len(x), CLASSES)

    return run


def main():
    args = step_parser(__doc__, arch="wrn16_4", batch_size=64, repeats=21).parse_args()
    setup = Setup.from_arguments(args)
    milliseconds = {
        name: [1000 * s for s in values]
        for name, values in interleaved(prediction_functions(setup), args.repeats).items()
    }
    ratios = {
        f"{name} / vanilla": paired_ratio(milliseconds[name], milliseconds[VANILLA])
        for name in (FUSED, MEMBERS, ENSEMBLE)
    }
    ratios["ensemble / fused"] = paired_ratio(milliseconds[ENSEMBLE], milliseconds[FUSED])
    times = spreads(milliseconds)
    report(
        f"Prediction: {args.arch}, batch {args.batch_size}, {setup.acceleration.describe()}; "
        "goal: fused / vanilla from 0.98 to 1.02",
        format_rows(times, MILLISECONDS) + format_rows(ratios, RATIO),
        {"milliseconds": times, "ratios": ratios},
        args.out,
    )


if __name__ == "__main__":
    main()
