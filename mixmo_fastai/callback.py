"""MixMo in any fastai Learner: pairs the images of a batch and mixes their features.

Shapes: n images from the loader, M members, b batch repetitions, B = b·n batch that the network
sees, C channels, H W image size, D feature channels, h w feature size after the encoder.
Source: Ramé, Sun, Cord, "MixMo", ICCV 2021.
"""

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.torch_core import rank_distrib
from torch import Tensor

from mixmo_fastai.data.expansion import expand
from mixmo_fastai.data.loaders import STEPS_AT_ONCE, BatchLoader
from mixmo_fastai.errors import InputError, plain
from mixmo_fastai.learner_checks import check_batch, check_callbacks, check_optimizer
from mixmo_fastai.losses import MixMoLoss
from mixmo_fastai.mixing import (
    QUICK_KINDS,
    DrawnMixings,
    Mixing,
    Region,
    check_kind,
    check_options,
    draw_lam,
    draw_masks,
    draw_mixings,
    loss_weights,
)
from mixmo_fastai.models.mixmo_model import MixMoModel, unwrap
from mixmo_fastai.msda import (
    MsdaDraw,
    check_msda,
    draw_msda,
    label_shares,
    make_own_image_major,
    mix_images,
    take_partners,
)
from mixmo_fastai.pairing import check_pairing, draw_pairings, num_copies
from mixmo_fastai.processes import broadcast_from_rank0, process_group
from mixmo_fastai.randomness import Stream, fresh_seed, make_generator

Device = torch.device | str | None


class _InWords(Callback):
    """A callback whose errors for users come without fastai's preface."""

    def __call__(self, event_name: str) -> Any:
        """Run an event."""
        try:
            return super().__call__(event_name)
        except InputError as error:
            raise plain(error) from None


class MixMoCallback(_InWords):
    """Pair and mix the training batches of a Learner whose model is a `MixMoModel`.

    Each training batch (n, C, H, W) becomes inputs (B, M, C, H, W) with masks (B, M, 1 or D, h, w),
    and targets (B, M) with weights (B, M). Batches of evaluation are left alone, and so is the
    Learner's loss, but for being wrapped once, for good, in `MixMoLoss`. The gradient is that of
    the sum over members; `learn.loss`, and with it every training loss that fastai records, shows
    or monitors, is divided by M.

    The network sees B = batch_repetitions · n images per step: a loader with 16 images a batch
    gives the published batch of 64. Each copy of an image goes through the loader's batch
    transforms by itself; what a loader does item by item is done once per image.

    Args:
        mix: mask kind, one of `mixing.MASK_KINDS`, or a function that draws regions as those of
            `mixing/regions.py` do; "sum" is MIMO, and the only kind for one member.
        alpha: concentration of the mixing ratios, lam ~ Dirichlet(alpha).
        mix_prob: probability that a batch is mixed with `mix` where that is a region of one member,
            such as a box; it is mixed linearly otherwise.
        decay_start: share of training after which mix_prob falls linearly to 0 at the end.
        weight_root: r of the loss weights; 1 weighs members by lam, infinity alike.
        batch_repetitions: b.
        input_repetition: share of positions at which all members see the same image.
        msda: "cutmix" or "mixup" mixes each member's image with another one of the same member, and
            its label by what the mask lets through; None for neither.
        msda_alpha: the own image's ratio is Beta(msda_alpha, msda_alpha).
        msda_prob: probability of it, per sample and member.
        mask_options: of the mask kind, such as {"block_size": 5} for "patchup"; see
            `mixing.draw_masks`.
        seed: of all draws; None draws one from torch's global generator, which `set_seed` sets,
            when the first fit begins.

    Raises:
        InputError: an argument is out of range; when a fit begins, the model is not a `MixMoModel`,
            the loss cannot be weighed, or one of fastai's own Mix callbacks is there as well.
    """

    # After callbacks that read self.x, before mixed precision (10) opens its autocast region.
    order, run_valid = 9, False

    def __init__(
        self,
        mix: str | Region = "cutmix",
        *,
        alpha: float = 2.0,
        mix_prob: float = 0.5,
        decay_start: float = 11 / 12,
        weight_root: float = 3.0,
        batch_repetitions: int = 4,
        input_repetition: float = 0.0,
        msda: str | None = None,
        msda_alpha: float = 1.0,
        msda_prob: float = 0.5,
        mask_options: Mapping[str, float] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_kind(mix, num_members=2)
        if mask_options is not None and not isinstance(mask_options, Mapping):
            raise InputError(f"mask_options must map names to values; got {mask_options!r}.")
        self.mask_options = dict(mask_options or {})
        trial = torch.Generator()  # the global one is the user's
        if isinstance(mix, str):
            lam = torch.full((1, 2), 0.5)
            draw_masks(mix, lam, (2, 8, 8), generator=trial, **self.mask_options)
        else:
            check_options(mix, self.mask_options)  # it may be for maps of one size
        check_pairing(1, batch_repetitions, input_repetition)
        _check_shares(mix_prob=mix_prob, decay_start=decay_start, msda_prob=msda_prob)
        loss_weights(torch.ones(1, 1), weight_root)
        draw_lam(1, 1, alpha, generator=trial)
        msda = None if msda == "none" else msda  # as recipes call it
        if msda is not None:
            check_msda(msda, msda_alpha, msda_prob)
        self.mix, self.alpha, self.mix_prob, self.decay_start = mix, alpha, mix_prob, decay_start
        self.weight_root, self.batch_repetitions = weight_root, batch_repetitions
        self.input_repetition, self.seed = input_repetition, seed
        self.msda, self.msda_alpha, self.msda_prob = msda, msda_alpha, msda_prob
        self.epochs_trained = 0  # over all fits; a search for a learning rate does not count
        self.fit_seed = seed
        self.copies_in_batch, self.arranged = 1, False
        self.sharers = 1  # processes that share each batch of the loader
        self.drawn_slots: tuple[Any, Tensor] | None = None
        self.drawn_mixings: tuple[Any, DrawnMixings] | None = None

    def before_fit(self) -> None:
        """Check what the Learner is made of, and wrap its loss once."""
        network = unwrap(self.learn.model)
        if not isinstance(network, MixMoModel):
            raise InputError(
                f"MixMoCallback needs a MixMoModel; the Learner has a {type(network).__name__}.\n"
                "Build it with mixmo_learner(dls, arch) or create_model(arch, num_classes)."
            )
        check_kind(self.mix, network.num_members)
        if sum(isinstance(other, MixMoCallback) for other in self.learn.cbs) > 1:
            raise InputError("There is more than one MixMoCallback; remove the others.")
        check_callbacks(self.learn.cbs)
        keep_guard(self.learn)
        if not isinstance(self.learn.loss_func, MixMoLoss):
            device = next(network.parameters()).device
            self.learn.loss_func = MixMoLoss(self.learn.loss_func).to(device)

    def before_train(self) -> None:
        """Let the epoch's loader give every image as often as the members need it."""
        check_optimizer(self.learn)
        if self.fit_seed is None:
            self.fit_seed = broadcast_from_rank0(fresh_seed())
        loader = self.learn.dl
        if isinstance(getattr(loader, "dl", None), BatchLoader):  # in fastai's DistributedDL
            raise InputError(
                "This loader shares its batches among processes itself; fastai's distrib_ctx would "
                "take them apart.\nTrain within `shared(learn)` of mixmo_fastai.distributed."
            )
        if isinstance(loader, BatchLoader):
            loader.set_epoch(self._epoch)
            self.sharers = process_group().count
            self._check_shares(loader.bs)
        # `Learner.dl` is set anew for every pass, so this view never outlives the epoch.
        copies = num_copies(self._num_members, self.batch_repetitions)
        device = getattr(loader, "device", None)

        def arrange(first_step: int, num_images: int) -> Tensor:
            return self.draw_slots(first_step, num_images, device)

        self.learn.dl, self.copies_in_batch, self.arranged = expand(loader, copies, arrange)
        self.drawn_slots = self.drawn_mixings = None  # of another fit, perhaps

    def before_batch(self) -> None:
        """Replace inputs and targets by pairs, masks and weights."""
        check_batch(len(self.learn.xb), len(self.learn.yb))
        x, y = (part[0].as_subclass(Tensor) for part in (self.learn.xb, self.learn.yb))
        # Member by member in memory, so that each encoder finds its batch contiguous.
        by_member = (self._num_members, -1)
        if not self.arranged:
            slots = self._slots_of_step(len(x) // self.copies_in_batch, x.device)
            x, y = x.index_select(0, slots), y[slots]
        inputs, targets = (part.unflatten(0, by_member).transpose(0, 1) for part in (x, y))
        masks, weights = self._mixing_of_step(len(inputs), x)
        if self.msda is None:
            self.learn.xb, self.learn.yb = (inputs, masks), (targets, weights)
            return
        draw, shares = self.draw_msda(inputs, masks)
        pasted_targets = take_partners(targets, draw.partners)
        self.learn.xb = (mix_images(inputs, draw), masks)
        self.learn.yb = (targets, weights, pasted_targets, shares)

    def after_loss(self) -> None:
        """Record the loss per member, comparable with a validation loss.

        fastai keeps the loss to record apart from the loss to differentiate, which stays the sum.
        """
        self.learn.loss = self.learn.loss / self._num_members

    def after_batch(self) -> None:
        """Show fastai's metrics in training, if they are wanted, the members one by one."""
        recorder = getattr(self.learn, "recorder", None)
        if recorder is not None and recorder.train_metrics:
            self.learn.pred = self.learn.pred.flatten(0, 1)  # (B · M, K)
            self.learn.yb = (self.learn.yb[0].flatten(0, 1),)

    def after_train(self) -> None:
        """Count the epochs that trained."""
        if not hasattr(self.learn, "lr_finder"):
            self.epochs_trained += 1

    def _check_shares(self, num_images: int) -> None:
        if (batch := num_images * self.batch_repetitions) % self.sharers:
            raise InputError(
                f"A batch of {batch} images cannot be shared evenly by {self.sharers} processes.\n"
                "Take a batch size that is a multiple of their number."
            )

    def _own_part(self, batch_size: int) -> slice:
        """Give the positions of a whole batch that are this process's."""
        own = batch_size // self.sharers
        start = own * rank_distrib() if self.sharers > 1 else 0
        return slice(start, start + own)

    def _slots_of_step(self, num_images: int, device: Device) -> Tensor:
        """Take this step's slots, (M · B,), out of those drawn for some steps at a time."""
        first = self.learn.iter - self.learn.iter % STEPS_AT_ONCE
        place = (self._epoch, first, num_images, device)
        if self.drawn_slots is None or self.drawn_slots[0] != place:
            self.drawn_slots = place, self.draw_slots(first, num_images, device)
        return self.drawn_slots[1][self.learn.iter - first]

    def draw_slots(self, first_step: int, num_images: int, device: Device) -> Tensor:
        """Draw which slots of a batch are seen here, member by member: (steps, M · B).

        For `STEPS_AT_ONCE` steps, since many small draws cost more than a large one.
        """
        slots = draw_pairings(
            STEPS_AT_ONCE,
            num_images,
            self._num_members,
            self.batch_repetitions,
            self.input_repetition,
            generator=self._generator("pairing", device, first_step),
            device=device,
        )
        slots = slots[:, self._own_part(slots.shape[1])].transpose(1, 2).flatten(1)
        return slots if self.copies_in_batch > 1 else slots % num_images

    def _mixing_of_step(self, batch_size: int, x: Tensor) -> Mixing:
        """Take this step's masks and weights out of those drawn for some steps at a time.

        Drawn for the batch of all processes, of which this one has its part.
        """
        batch_size *= self.sharers
        at_once = STEPS_AT_ONCE if self.mix in QUICK_KINDS else 1
        first = self.learn.iter - self.learn.iter % at_once
        place = (self._epoch, first, batch_size, x.shape[-2:], x.device)
        # Of what is dear to draw, nothing is drawn in vain; of the rest, it must not depend on the
        # step at which it is drawn.
        most = self.mix_prob if at_once > 1 else self.current_mix_prob()
        if self.drawn_mixings is None or self.drawn_mixings[0] != place:
            drawn = self.draw_mixings(first, at_once, batch_size, x, most)
            self.drawn_mixings = place, drawn
        whole = self.drawn_mixings[1].of(self.learn.iter - first, self.current_mix_prob())
        own = self._own_part(batch_size)
        return Mixing(whole.masks[own], whole.weights[own])

    def draw_mixings(
        self, first_step: int, num_steps: int, batch_size: int, x: Tensor, mix_prob: float
    ) -> DrawnMixings:
        """Draw masks and loss weights of some steps with images like those of `x`.

        Whether a step is mixed by regions is decided on the host: by a number that is drawn here,
        and the probability at that step, of which `mix_prob` is the largest.
        """
        schedule = self._generator("schedule", "cpu", first_step)
        return draw_mixings(
            self.mix,
            torch.rand(num_steps, generator=schedule).tolist(),
            (batch_size, self._num_members),
            unwrap(self.learn.model).mask_shape(*x.shape[-2:]),
            mix_prob=mix_prob,
            alpha=self.alpha,
            weight_root=self.weight_root,
            options=self.mask_options,
            lam_generator=self._generator("lam", x.device, first_step),
            mask_generator=self._generator("masks", x.device, first_step),
            device=x.device,
        )

    def draw_msda(self, inputs: Tensor, masks: Tensor) -> tuple[MsdaDraw, Tensor]:
        """Draw the mixing of pixels, and the shares (B, M) that it leaves the own labels."""
        assert self.msda is not None
        draw = draw_msda(
            self.msda,
            *inputs.shape[:2],
            size=inputs.shape[-2:],
            alpha=self.msda_alpha,
            prob=self.msda_prob,
            generator=self._generator("msda", inputs.device),
            device=inputs.device,
        )
        shares = label_shares(draw.masks, masks)
        return make_own_image_major(draw, shares) if self._num_members > 1 else (draw, shares)

    def current_mix_prob(self) -> float:
        """Tell the scheduled probability of mixing by regions; a rate search sees no decay."""
        if hasattr(self.learn, "lr_finder"):
            return self.mix_prob
        return scheduled_mix_prob(self.learn.pct_train, self.mix_prob, self.decay_start)

    @property
    def _num_members(self) -> int:
        return int(unwrap(self.learn.model).num_members)

    @property
    def _epoch(self) -> int:
        """Epochs trained before this one; a search for a learning rate goes on from there."""
        searched = self.learn.epoch if hasattr(self.learn, "lr_finder") else 0
        return self.epochs_trained + searched

    def _generator(
        self, stream: Stream, device: Device, step: int | None = None
    ) -> torch.Generator:
        step = self.learn.iter if step is None else step
        assert self.fit_seed is not None
        # Processes that share a batch draw all of it alike, but for pixels that are mixed with
        # those of other images, which each has only of its own. All must mix a batch alike.
        alike = stream == "schedule" or (self.sharers > 1 and stream != "msda")
        rank = 0 if alike else rank_distrib()
        return make_generator(self.fit_seed, stream, self._epoch, step, rank, device=device)


class MixMoGuard(_InWords):
    """Refuse to train a MixMo network in a Learner that has lost its `MixMoCallback`.

    Without one, all members would be trained on the same images. `to_mixmo`, `mixmo_learner` and
    the callback itself put it into the Learner; evaluation is left alone.
    """

    order = 9

    def before_train(self) -> None:
        """Check that a `MixMoCallback` is there, if the network has several members."""
        network = unwrap(self.learn.model)
        if not isinstance(network, MixMoModel) or network.num_members == 1:
            return
        if not any(isinstance(other, MixMoCallback) for other in self.learn.cbs):
            raise InputError(
                f"The network has {network.num_members} members, and the Learner no MixMoCallback "
                "to give them images of their own.\nAdd one: learn.add_cb(MixMoCallback()).\n"
                "For a plain network: learn.model = learn.model.fuse(), then learn.create_opt()."
            )


def keep_guard(learn: Any) -> None:
    """Put a `MixMoGuard` into a Learner, if it has none."""
    if not any(isinstance(other, MixMoGuard) for other in learn.cbs):
        learn.add_cb(MixMoGuard())


def scheduled_mix_prob(progress: float, mix_prob: float, decay_start: float) -> float:
    """Give mix_prob until `decay_start` of training, then a line down to 0 at its end.

    Args:
        progress: share of training done, in [0, 1].
        mix_prob: the probability before the decay.
        decay_start: share of training at which the decay begins; 1 for none.
    """
    if progress <= decay_start or decay_start == 1:
        return mix_prob
    return mix_prob * max(0.0, 1 - progress) / (1 - decay_start)


def _check_shares(**shares: float) -> None:
    for name, value in shares.items():
        if not isinstance(value, Real) or not 0 <= value <= 1:
            raise InputError(f"{name} must be from 0 to 1; got {value!r}.")
