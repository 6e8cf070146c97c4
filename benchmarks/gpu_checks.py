"""Checks of `gpu.py`: a step on the GPU equals the step on the CPU, and no step synchronises."""

import argparse
import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler
from steps import SIZE, Setup
from torch import nn

from mixmo_fastai.callbacks.ema import EMACallback
from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.progress import TrainingDisplay
from mixmo_fastai.mixing.loss import MixMoLoss
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.runtime.acceleration import Acceleration
from mixmo_fastai.runtime.devices import float32_precision
from mixmo_fastai.training.history import HistoryCallback
from mixmo_fastai.training.schedule import one_cycle

Results = dict[str, Any]


def make_setup(args: argparse.Namespace, **changes: Any) -> Setup:
    """Create the default setup: bfloat16, channels last, not compiled, first batch size."""
    acceleration = Acceleration(torch.device(args.device), autocast=torch.bfloat16)
    return Setup(args.arch, args.batch_sizes[0], acceleration=acceleration).replace(**changes)


def checks(args: argparse.Namespace) -> Iterator[Results]:
    """Compare a step with the CPU, and check that an epoch does not synchronise with the GPU."""
    float32, bfloat16 = (_step_difference(args, autocast) for autocast in (None, torch.bfloat16))
    differences = {
        "loss in float32, relative to the CPU": (float32[0], 1e-5),
        "worst gradient in float32": (float32[1], 1e-3),
        "loss in bfloat16": (bfloat16[0], 0.02),
        "worst gradient in bfloat16": (bfloat16[1], 0.5),
        "logits of the fused network": (_fused_difference(args), 1e-5),
        "losses of two runs with the same seed": (
            _repeat_difference(args),
            0.0 if args.device == "cpu" else 0.05,
        ),
    }
    for name, (difference, limit) in differences.items():
        outcome = "passed" if difference <= limit else "FAILED"
        yield {name: {"difference": difference, "limit": limit, "outcome": outcome}}
    yield {"synchronisations within an epoch": _synchronisations(args)}
    if args.compile:
        yield {"synchronisations within an epoch, compiled": _synchronisations(args, compiled=True)}
    failed = [name for name, (difference, limit) in differences.items() if not difference <= limit]
    if failed:
        raise ArithmeticError(f"differences above their limits: {', '.join(failed)}")


def _step_difference(args: argparse.Namespace, autocast: torch.dtype | None) -> tuple[float, float]:
    """Compare loss and worst gradient of one step on the device with float32 on the CPU."""
    setup = make_setup(args, arch="wrn10_2", batch_size=16, autocast=autocast)
    cpu = setup.replace(device=torch.device("cpu"), autocast=None)
    model, batch = cpu.model(), cpu.batch()
    expected = _loss_and_gradients(cpu, model, batch)
    device_model = setup.model()
    device_model.load_state_dict(model.state_dict())
    on_device = [[part.to(setup.acceleration.device) for part in side] for side in batch]
    actual = _loss_and_gradients(setup, device_model, on_device)
    differences = [*map(_relative, actual, expected)]
    return differences[0], max(differences[1:])


def _loss_and_gradients(setup: Setup, model: nn.Module, batch: Any) -> list[torch.Tensor]:
    with setup.acceleration.applied(model.train()):
        loss = MixMoLoss()(model(*batch[0]), *batch[1])
        loss.backward()
    return [t.detach().float().cpu() for t in (loss, *(p.grad for p in model.parameters()))]


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-12))


def _fused_difference(args: argparse.Namespace) -> float:
    setup = make_setup(args, autocast=None)
    model = setup.model().eval()
    x = torch.randn(32, 3, SIZE, SIZE, device=setup.acceleration.device)
    with torch.inference_mode(), float32_precision(tf32=False):
        return _relative(setup.acceleration.move_to_device(model.fuse())(x).cpu(), model(x).cpu())


def _repeat_difference(args: argparse.Namespace) -> float:
    """Return the largest difference between the losses of two Learners with the same seed."""
    setup = make_setup(args, arch="wrn10_1", batch_size=16, autocast=None)
    losses = []
    for _ in range(2):
        learn = setup.learner(args.steps, seed=1)
        with setup.acceleration.applied(learn.model), learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-3)
        losses.append(torch.stack(learn.recorder.losses))
    return float((losses[0] - losses[1]).abs().max())


class _ForbidSynchronisation(Callback):
    """Make torch raise on every synchronisation with the GPU except in the recorder's fetches."""

    order = -20

    def __init__(self, set_mode: Callable[[str], None]) -> None:
        super().__init__()
        self.set_mode, self.fetches = set_mode, 0
        self.num_steps, self.is_watching = 0, False

    def before_fit(self) -> None:
        """Allow synchronisation while the recorder fetches."""
        recorder = self.learn.recorder
        fetch = recorder.fetch

        def fetch_allowed() -> None:
            self.set_mode("default")
            fetch()
            self.fetches += 1
            self.set_mode("error" if self.is_watching else "default")

        recorder.fetch = fetch_allowed

    def before_batch(self) -> None:
        """Start at the third step: the first steps select algorithms and allocate memory."""
        if self.learn.iter >= 2:
            self.set_mode("error")
            self.num_steps, self.is_watching = self.num_steps + 1, True

    def after_train(self) -> None:
        """Stop: the metrics of an epoch are read once at its end."""
        self.is_watching = False
        self.set_mode("default")


class _HistoryWithoutFile(HistoryCallback):
    """The history callback without its file, since this training has no validation."""

    def after_trained_epoch(self) -> None:
        """Write nothing."""


def _synchronisations(args: argparse.Namespace, *, compiled: bool = False) -> str:
    """Train with the callbacks of `mixmo fit` and fastai's progress bar."""
    setup = make_setup(args, arch="wrn10_1", batch_size=16, compiled=compiled)
    on_gpu = setup.acceleration.device.type == "cuda"
    mode = torch.cuda.set_sync_debug_mode if on_gpu else lambda _: None
    watch = _ForbidSynchronisation(mode)
    learn = setup.learner(max(50, args.steps), seed=1, more_cbs=[EMACallback(0.9)])
    rates = ParamScheduler({"lr": one_cycle(1e-4, 1e-3, 1e-5, 0.25)})
    with TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        history = _HistoryWithoutFile(RunFolder(Path(folder)), setup.batch_size)
        display = TrainingDisplay(Output(quiet=True), setup.batch_size)
        try:
            with setup.acceleration.applied(learn.model), learn.no_logging():
                learn.fit(1, 1e-3, cbs=[rates, history, display, watch])
        finally:
            mode("default")
    if not on_gpu:
        return "not measurable without a GPU"
    return f"none in {watch.num_steps} steps including the loader, except {watch.fetches} fetches"
