"""Learning-rate range test: a mock training with a growing rate, after which all is as before."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from fastai.callback.schedule import minimum, slide, steep, valley

from mixmo_fastai.acceleration import Acceleration
from mixmo_fastai.errors import InputError
from mixmo_fastai.training import Training

SUGGESTIONS = (valley, slide, steep, minimum)
NUM_ALWAYS_CUT = 5
"""fastai leaves out the last points, where the loss runs off."""


@dataclass(frozen=True)
class LrSearch:
    """What a range test saw.

    Attributes:
        lrs: learning rate of each step.
        losses: smoothed training loss of each step, per member.
        suggestions: rate by the name of fastai's method that suggests it.
    """

    lrs: list[float]
    losses: list[float]
    suggestions: dict[str, float]


def search_lr(
    training: Training, *, num_steps: int = 100, start: float = 1e-6, end: float = 10.0
) -> LrSearch:
    """Raise the learning rate step by step and watch the loss.

    Weights and optimizer are as before afterwards, and so are later draws, since none depends on
    what ran before it.

    Args:
        training: from `prepare`.
        num_steps: steps of the test; it stops early where the loss runs off.
        start: first learning rate.
        end: last learning rate.

    Raises:
        InputError: the loss ran off before there was anything to see.
    """
    learn = training.learn
    before, learn.path = learn.path, Path()
    with tempfile.TemporaryDirectory() as folder:  # fastai parks the weights in a file
        learn.path = Path(folder)
        try:
            with _acceleration(training).applied(learn.model):
                suggested = learn.lr_find(
                    start_lr=start,
                    end_lr=end,
                    num_it=num_steps,
                    show_plot=False,
                    suggest_funcs=SUGGESTIONS,
                )
        except IndexError as error:  # fastai's methods found too few points
            raise InputError(
                f"The loss ran off within the first steps from {start:g}.\n"
                f"Start lower, as in --start {start / 100:g}, or take more --steps."
            ) from error
        finally:
            learn.path = before
    losses = torch.stack([torch.as_tensor(v) for v in learn.recorder.losses]).flatten().cpu()
    num_finite = int(losses.isfinite().cumprod(0).sum())  # up to where the loss ran off
    return LrSearch(
        lrs=[float(rate) for rate in learn.recorder.lrs[:num_finite]],
        losses=losses[:num_finite].tolist(),
        suggestions={name: float(rate) for name, rate in suggested._asdict().items()},
    )


def _acceleration(training: Training) -> Acceleration:
    """Take the training's own, but for a compilation that only the whole of it pays for."""
    asked = training.recipe.train.compile == "on"
    return replace(training.acceleration, compiled=asked)
