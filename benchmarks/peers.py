"""Compare with the MIMO of torch-uncertainty: a training step and a prediction.

python benchmarks/peers.py [--arch wrn16_4] [--batch-size 64] [--threads 1] [--repeats 11]
                           [--out FILE.json]

Needs: pip install -e ".[benchmarks]". Both sides train a WideResNet of the same depth and width,
with two members on 32x32 images, by hand: pairing, masks, forward and backward pass, SGD. A batch
of 64 shows 16 images four times per member. The networks have the same convolutions except for the
first, which is one of 6 channels there and two of 3 channels here; there, BatchNorm follows the
convolutions instead of preceding them. The prediction here is that of `mixmo predict`: the fused
network, channels last, with folded BatchNorm. torch-uncertainty is measured in its default,
float32; here both precisions are. Ratios above 1 mean that torch-uncertainty takes longer.
"""

from collections.abc import Callable

import torch
from cpu_precision import PRECISIONS
from measure import RATIO, SECONDS, format_rows, interleaved, paired_ratio, report, spreads
from steps import CLASSES, LR, REPETITIONS, SIZE, Setup, check_batch_size, cpu_parser
from torch import nn

from mixmo_fastai.config.choices import parse_architecture
from mixmo_fastai.learner.optimizers import sgd
from mixmo_fastai.mixing import draw_lam, draw_masks, loss_weights
from mixmo_fastai.mixing.loss import MixMoLoss
from mixmo_fastai.mixing.pairing import draw_pairing
from mixmo_fastai.models.folding import fold_batch_norm
from mixmo_fastai.runtime.acceleration import Acceleration
from mixmo_fastai.runtime.devices import keep_freed_memory

try:
    from torch_uncertainty.models.classification.resnet.utils import ResNetStyle
    from torch_uncertainty.models.classification.wideresnet.mimo import _MIMOWideResNet
    from torch_uncertainty.transforms import MIMOBatchFormat
except ImportError:
    _MIMOWideResNet = None

MEMBERS = 2
PEER = "torch-uncertainty, MIMO"


def peer_network(arch: str) -> nn.Module:
    """Create torch-uncertainty's network of a depth and width, such as wrn16_4."""
    parsed = parse_architecture(arch)
    return _MIMOWideResNet(
        depth=parsed.depth,
        widen_factor=parsed.width,
        in_channels=3,
        num_classes=CLASSES,
        num_estimators=MEMBERS,
        conv_bias=False,
        dropout_rate=0.0,
        style=ResNetStyle.CIFAR,
    )


def peer_step(arch: str, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """Return a training step of torch-uncertainty."""
    network, loss_func = peer_network(arch).train(), nn.CrossEntropyLoss()
    pair = MIMOBatchFormat(MEMBERS, rho=0.0, batch_repeat=REPETITIONS)
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, momentum=0.9, nesterov=True)

    def run() -> None:
        inputs, targets = pair((images, labels))
        loss_func(network(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def own_step(
    setup: Setup, mix: str, images: torch.Tensor, labels: torch.Tensor
) -> Callable[[], None]:
    """Return a training step of this package."""
    network, loss_func = setup.model().train(), MixMoLoss()
    optimizer = sgd()(network.parameters(), lr=LR).opt
    shape = network.mask_shape(SIZE, SIZE)
    count = len(images)

    def run() -> None:
        # Members first in memory, so that each encoder's batch is contiguous.
        slots = draw_pairing(count, MEMBERS, REPETITIONS).T % count
        inputs = images[slots.flatten()].unflatten(0, slots.shape).transpose(0, 1)
        masks, means = draw_masks(mix, draw_lam(setup.batch_size, MEMBERS, 2.0), shape)
        with setup.acceleration.applied(network):
            logits = network(inputs, masks)
        loss_func(logits, labels[slots.T], loss_weights(means, 3.0)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def predictions(setup: Setup) -> dict[str, Callable[[], None]]:
    """Return a function per network that predicts a batch."""
    x = torch.randn(setup.batch_size, 3, SIZE, SIZE)
    last = x.contiguous(memory_format=torch.channels_last)
    network = setup.model().eval().fuse()
    peer, folded = peer_network(setup.arch).eval(), fold_batch_norm(network, last[:8])

    def run(network: nn.Module, images: torch.Tensor) -> Callable[[], None]:
        def predict() -> None:
            with torch.inference_mode():
                network(images)

        return predict

    return {f"{PEER}: prediction": run(peer, x), "fused: prediction": run(folded, last)}


def main() -> None:
    parser = cpu_parser(__doc__, repeats=11)
    parser.add_argument("--arch", default="wrn16_4")
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    if _MIMOWideResNet is None:
        raise SystemExit("peers.py needs torch-uncertainty: pip install -e '.[benchmarks]'")
    check_batch_size(args.batch_size)
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # for both sides
    count = args.batch_size // REPETITIONS
    images, labels = torch.randn(count, 3, SIZE, SIZE), torch.randint(CLASSES, (count,))
    last = images.contiguous(memory_format=torch.channels_last)
    functions = {f"{PEER}: step": peer_step(args.arch, images, labels)}
    for name, autocast in PRECISIONS.items():
        setup = Setup(
            args.arch,
            args.batch_size,
            acceleration=Acceleration(torch.device("cpu"), autocast=autocast),
        )
        for kind, mix in (("MIMO", "sum"), ("Cut-MixMo", "cutmix")):
            functions[f"{kind}, {name}: step"] = own_step(setup, mix, last, labels)
    functions |= predictions(Setup(args.arch, args.batch_size))
    seconds = interleaved(functions, args.repeats)
    ratios = {
        f"{PEER} / {name}": paired_ratio(seconds[f"{PEER}: {name.partition(': ')[2]}"], values)
        for name, values in seconds.items()
        if not name.startswith(PEER)
    }
    times = spreads(seconds)
    report(
        f"{args.arch}, batch {args.batch_size}, {MEMBERS} members, {args.threads} thread(s)",
        format_rows(times, SECONDS) + format_rows(ratios, RATIO),
        {"seconds": times, "ratios": ratios},
        args.out,
    )


if __name__ == "__main__":
    main()
