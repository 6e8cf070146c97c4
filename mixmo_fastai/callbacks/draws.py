"""The random draws of one training epoch: pairing, masks with loss weights, and MSDA.

Shapes: n distinct images per batch, M members, b batch repetitions, B = b·n batch that the network
sees, C channels, H W image size, D feature channels, h w feature size after the encoder.

Each draw is a function of (seed, stream, epoch, step, rank), so it does not depend on earlier
draws. Slots and cheap masks are drawn for `STEPS_AT_ONCE` steps together, since one large draw is
cheaper than many small ones; which steps are drawn together does not depend on where training
starts.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol, TypeVar

import torch
from fastai.torch_core import rank_distrib
from torch import Tensor

from mixmo_fastai.data.cuts import STEPS_AT_ONCE
from mixmo_fastai.mixing import CHEAP_KINDS, Mixing, Region, draw_mixings
from mixmo_fastai.mixing.msda import MsdaDraw, draw_msda, make_own_image_dominant, own_label_weights
from mixmo_fastai.mixing.pairing import draw_pairings
from mixmo_fastai.rng import Stream, make_generator

Drawn = TypeVar("Drawn")


class DrawSettings(Protocol):
    """The arguments of `MixMoCallback` that the draws depend on; see there."""

    mix: str | Region
    mask_options: Mapping[str, Any]
    alpha: float
    mix_prob: float
    weight_root: float
    batch_repetitions: int
    msda: str | None
    msda_alpha: float
    msda_prob: float


class EpochDraws:
    """The random draws of one epoch.

    Args:
        settings: the callback.
        seed: seed of the fit.
        epoch: number of the epoch, counted over all fits.
        num_members: M.
        num_processes: number of processes that split each batch. They draw the same pairings and
            masks for the whole batch, and each uses its part.
        repetition_at: returns the fraction of positions at which all members see the same image at
            a step of the epoch.
    """

    def __init__(
        self,
        settings: DrawSettings,
        seed: int,
        epoch: int,
        num_members: int,
        *,
        num_processes: int,
        repetition_at: Callable[[int], float],
    ) -> None:
        self.settings, self.seed, self.epoch = settings, seed, epoch
        self.num_members, self.num_processes = num_members, num_processes
        self.repetition_at = repetition_at
        self.latest: dict[str, tuple[Hashable, Any]] = {}  # draws for several steps, by stream

    def slots(self, step: int, num_images: int, device: torch.device) -> Tensor:
        """Return the slots of one step, grouped by member: (M · B,) int64.

        Args:
            step: number of the step in the epoch.
            num_images: n.
            device: device of the slots.
        """
        first = step - step % STEPS_AT_ONCE
        draw = self._drawn_once(
            "pairing",
            (first, num_images, device),
            lambda: self.slots_from(first, num_images, device),
        )
        return draw[step - first]

    def slots_from(self, first_step: int, num_images: int, device: Any) -> Tensor:
        """Draw the slots of `STEPS_AT_ONCE` steps: (steps, M · B) int64; see `slots`."""
        slots = draw_pairings(
            STEPS_AT_ONCE,
            num_images,
            self.num_members,
            self.settings.batch_repetitions,
            [self.repetition_at(first_step + i) for i in range(STEPS_AT_ONCE)],
            generator=self._generator("pairing", first_step, device),
            device=device,
        )
        return slots[:, self._rank_slice(slots.shape[1])].transpose(1, 2).flatten(1)

    def mixing(
        self,
        step: int,
        batch_size: int,
        feature_shape: tuple[int, int, int],
        mix_prob: float,
        device: torch.device,
    ) -> Mixing:
        """Return the masks (B, M, 1 or D, h, w) and loss weights (B, M) of one step.

        Args:
            step: number of the step in the epoch.
            batch_size: B of this process.
            feature_shape: (D, h, w).
            mix_prob: probability that the batch is mixed by regions at this step.
            device: device of the results.
        """
        batch_size *= self.num_processes
        is_cheap = self.settings.mix in CHEAP_KINDS
        num_steps = STEPS_AT_ONCE if is_cheap else 1
        first = step - step % num_steps
        # mix_prob decays from step to step. Expensive masks are drawn for one step, with its
        # probability. Cheap masks are drawn for several steps, with the largest probability;
        # `select` then compares the same uniform number with that of the step.
        max_prob = self.settings.mix_prob if is_cheap else mix_prob
        mixings = self._drawn_once(
            "masks",
            (first, batch_size, feature_shape, device),
            lambda: draw_mixings(
                self.settings.mix,
                self._uniforms(first, num_steps),
                (batch_size, self.num_members),
                feature_shape,
                mix_prob=max_prob,
                alpha=self.settings.alpha,
                weight_root=self.settings.weight_root,
                options=self.settings.mask_options,
                lam_generator=self._generator("lam", first, device),
                mask_generator=self._generator("masks", first, device),
                device=device,
            ),
        )
        masks, weights = mixings.select(step - first, mix_prob)
        own = self._rank_slice(batch_size)
        return Mixing(masks[own], weights[own])

    def msda(self, step: int, inputs: Tensor, masks: Tensor) -> tuple[MsdaDraw, Tensor]:
        """Draw MSDA of one step, and the weights (B, M) of the members' own labels.

        Args:
            step: number of the step in the epoch.
            inputs: (B, M, C, H, W).
            masks: masks of the features, from `mixing`.
        """
        assert self.settings.msda is not None
        draw = draw_msda(
            self.settings.msda,
            *inputs.shape[:2],
            size=inputs.shape[-2:],
            alpha=self.settings.msda_alpha,
            prob=self.settings.msda_prob,
            generator=self._generator("msda", step, inputs.device),
            device=inputs.device,
        )
        own_weights = own_label_weights(draw.masks, masks)
        if self.num_members == 1:
            return draw, own_weights
        return make_own_image_dominant(draw, own_weights)

    def _uniforms(self, first_step: int, num_steps: int) -> list[float]:
        """Draw a number per step; a step is mixed by regions if it is below the probability."""
        generator = self._generator("schedule", first_step, "cpu")
        numbers: list[float] = torch.rand(num_steps, generator=generator).tolist()
        return numbers

    def _drawn_once(self, stream: Stream, key: Hashable, draw: Callable[[], Drawn]) -> Drawn:
        """Return the latest draw of a stream if it has this key; otherwise draw."""
        if stream not in self.latest or self.latest[stream][0] != key:
            self.latest[stream] = key, draw()
        drawn: Drawn = self.latest[stream][1]
        return drawn

    def _rank_slice(self, batch_size: int) -> slice:
        """Return this process's positions in the batch of all processes."""
        size = batch_size // self.num_processes
        start = size * rank_distrib() if self.num_processes > 1 else 0
        return slice(start, start + size)

    def _generator(self, stream: Stream, step: int, device: Any) -> torch.Generator:
        # Processes that split a batch draw the same numbers for the whole batch, except for MSDA,
        # whose partners are images of the same process. All processes use the same schedule.
        is_common = stream == "schedule" or (self.num_processes > 1 and stream != "msda")
        rank = 0 if is_common else rank_distrib()
        return make_generator(self.seed, stream, self.epoch, step, rank, device=device)
