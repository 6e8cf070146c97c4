"""fastai callback that pairs the images of a batch and draws the masks that mix their features.

Shapes: n distinct images per batch, M members, b batch repetitions, B = b·n batch that the network
sees, C channels, H W image size, D feature channels, h w feature size after the encoder.
Source: Ramé, Sun, Cord, "MixMo", ICCV 2021.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from fastai.callback.core import Callback
from torch import Tensor

from mixmo_fastai.callbacks.checks import check_batch, check_callbacks, check_optimizer
from mixmo_fastai.callbacks.draws import EpochDraws
from mixmo_fastai.callbacks.plain_errors import PlainErrorCallback
from mixmo_fastai.data.loaders import BatchLoader
from mixmo_fastai.data.repeat import expand
from mixmo_fastai.errors import InputError, check_fraction
from mixmo_fastai.metrics.fastai import StreamingMetric
from mixmo_fastai.metrics.members import add_member_logits
from mixmo_fastai.mixing import (
    Mixing,
    Region,
    check_kind,
    check_options,
    draw_lam,
    draw_masks,
    loss_weights,
)
from mixmo_fastai.mixing.loss import MixMoLoss
from mixmo_fastai.mixing.msda import check_msda, gather_partners, mix_images
from mixmo_fastai.mixing.pairing import check_pairing, num_copies, scheduled_repetition
from mixmo_fastai.models.mixmo_model import MixMoModel, unwrap
from mixmo_fastai.models.readout import set_readout_progress
from mixmo_fastai.rng import fresh_seed
from mixmo_fastai.runtime.processes import broadcast_from_rank0, process_group


class MixMoCallback(PlainErrorCallback):
    """Pair and mix the training batches of a Learner whose model is a `MixMoModel`.

    Each training batch becomes inputs (B, M, C, H, W) with masks (B, M, 1 or D, h, w), and targets
    (B, M) with loss weights (B, M). The pairing has the same distribution with every loader, but
    not the augmentation of an image's copies:

    - A loader of this package, as `mixmo fit` uses, pairs while it loads: it asks `EpochDraws`
      which image each member sees at each position, and returns M·B images in this order, each
      cropped and flipped separately.
    - Another fastai loader returns M·B images, b copies per member, augmented separately by its
      batch transforms; this callback pairs them.
    - Any other loader returns n images; this callback pairs them, and all copies are the same.

    In validation the network gets one image for all members, as without this callback; the
    callbacks of `metrics/members.py`, which this one adds, then provide the logits of the members.

    The Learner's loss is wrapped in `MixMoLoss` when the first fit begins and stays wrapped.
    Gradients are those of the sum over members; `MeanLoss` divides the recorded loss by M.

    The network sees B = batch_repetitions · n inputs per step: a loader with batch size 16 yields
    the published batch size of 64. Batch transforms are applied to each copy of an image
    separately, item transforms once per image.

    Args:
        mix: mask kind, one of `mixing.MASK_KINDS`, or a function with the signature of those in
            `mixing/regions.py`; "sum" is MIMO and the only kind that supports one member.
        alpha: concentration of the mixing ratios, lam ~ Dirichlet(alpha).
        mix_prob: probability that a batch is mixed by the regions of `mix`, such as boxes; other
            batches are mixed linearly. The kinds "sum" and "linear" have no regions and ignore it.
        decay_start: fraction of each fit after which mix_prob decays linearly, to 0 at the end.
        weight_root: r of the loss weights; 1 weights members by the means of their masks, infinity
            weights them equally.
        batch_repetitions: b.
        input_repetition: fraction of positions at which all members see the same image.
        early_repetition: this fraction at the start of each fit, from which it changes to
            `input_repetition`; None for no change. fastai's `fine_tune` is two fits.
        early_span: fraction of the fit after which it is `input_repetition`.
        early_shape: "step", "linear" or "cosine", the shape of the change.
        msda: "cutmix" or "mixup" to mix each member's image and label with those of another image
            of the same member; None for no MSDA.
        msda_alpha: the ratio of the member's own image is Beta(msda_alpha, msda_alpha).
        msda_prob: probability of MSDA, per sample and member.
        mask_options: options of the mask kind, such as {"block_size": 5} for "patchup"; see
            `mixing.draw_masks`.
        seed: seed of all draws; if None, it is drawn when the first fit begins, from torch's global
            generator, which `set_seed` seeds.

    Raises:
        InputError: an argument is out of range; when a fit begins: the model is not a `MixMoModel`,
            the loss cannot be weighted, a metric of `metrics.fastai` is undefined for the
            loss, or the Learner also has one of fastai's Mix callbacks.
    """

    # After callbacks that read self.x; before fastai's MixedPrecision (10) enters autocast, since
    # masks and loss weights are drawn in float32.
    order, run_valid = 9, False
    draws: EpochDraws | None = None  # those of the current epoch
    # Predictions and targets of the last step, if fastai's training metrics are enabled.
    _flat: tuple[Tensor | None, Tensor | None] = (None, None)
    # Callbacks in Learners exported by version 0.1.0 do not have these attributes.
    early_repetition: float | None = None
    early_span, early_shape = 0.4, "linear"

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
        early_repetition: float | None = None,
        early_span: float = 0.4,
        early_shape: str = "linear",
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
        generator = torch.Generator()  # the checks must not draw from the global generator
        if isinstance(mix, str):
            lam = torch.full((1, 2), 0.5)
            draw_masks(mix, lam, (2, 8, 8), generator=generator, **self.mask_options)
        else:  # not called here, since it may require another feature size
            check_options(mix, self.mask_options)
        check_pairing(1, batch_repetitions, input_repetition)
        check_fraction("early_repetition", early_repetition or 0.0)
        check_fraction("early_span", early_span)
        unchanged = MixMoCallback.early_span, MixMoCallback.early_shape
        if early_repetition is None and (early_span, early_shape) != unchanged:
            raise InputError("early_span and early_shape have no effect without early_repetition.")
        if early_repetition is not None and early_span == 0:
            raise InputError("early_span is 0, so that early_repetition has no effect.")
        scheduled_repetition(0.0, input_repetition, early_repetition, early_span, early_shape)
        check_fraction("mix_prob", mix_prob)
        check_fraction("decay_start", decay_start)
        check_fraction("msda_prob", msda_prob)
        loss_weights(torch.ones(1, 1), weight_root)
        draw_lam(1, 1, alpha, generator=generator)
        msda = None if msda == "none" else msda  # recipes write None as "none"
        if msda is not None:
            check_msda(msda, msda_alpha, msda_prob)
        self.mix, self.alpha, self.mix_prob, self.decay_start = mix, alpha, mix_prob, decay_start
        self.weight_root, self.batch_repetitions = weight_root, batch_repetitions
        self.input_repetition, self.early_repetition = input_repetition, early_repetition
        self.early_span, self.early_shape, self.seed = early_span, early_shape, seed
        self.msda, self.msda_alpha, self.msda_prob = msda, msda_alpha, msda_prob
        self.epochs_trained = 0  # of all fits, with those skipped by start_epoch; not of lr_find
        self.fit_seed = seed
        self.copies_in_batch, self.is_paired_by_loader = 1, False

    def before_fit(self) -> None:
        """Check the Learner, and wrap its loss if it is not wrapped yet."""
        network = unwrap(self.learn.model)
        if not isinstance(network, MixMoModel):
            raise InputError(
                f"MixMoCallback needs a MixMoModel; the Learner has a {type(network).__name__}.\n"
                "Remove it: learn.remove_cb(MixMoCallback). A plain or fused network needs none.\n"
                "Then convert the Learner: to_mixmo(learn). Or build one: mixmo_learner(dls, arch)."
            )
        check_kind(self.mix, network.num_members)
        if sum(isinstance(other, MixMoCallback) for other in self.learn.cbs) > 1:
            raise InputError("The Learner has more than one MixMoCallback; remove the others.")
        check_callbacks(self.learn.cbs)
        add_companions(self.learn)
        if not isinstance(self.learn.loss_func, MixMoLoss):
            device = next(network.parameters()).device
            self.learn.loss_func = MixMoLoss(self.learn.loss_func).to(device)
        for metric in self.learn.metrics:
            if isinstance(metric, StreamingMetric):
                metric.check(self.learn)

    def before_train(self) -> None:
        """Make the epoch's loader return every image M·b times, paired if it can pair."""
        check_optimizer(self.learn)
        if self.fit_seed is None:
            self.fit_seed = broadcast_from_rank0(fresh_seed())
        loader = self.learn.dl
        if isinstance(getattr(loader, "dl", None), BatchLoader):  # in fastai's DistributedDL
            raise InputError(
                "This loader splits its batches among processes itself, so fastai's distrib_ctx "
                "must not split them.\n"
                "Use `shared(learn)` of mixmo_fastai.learner.distributed instead."
            )
        num_processes = 1  # that split each batch of the loader
        if isinstance(loader, BatchLoader):
            loader.set_epoch(self._epoch)
            num_processes = process_group().count
            self._check_divisible(loader.bs, num_processes)
        draws = EpochDraws(
            self,
            self.fit_seed,
            self._epoch,
            self._num_members,
            num_processes=num_processes,
            repetition_at=partial(self._repetition_at, num_steps=len(loader)),
        )
        copies = num_copies(self._num_members, self.batch_repetitions)
        # A loader of this package calls this function every `STEPS_AT_ONCE` batches, for the slots
        # in which `BatchLoader.batches` then puts the copies; others never call it.
        arrange = partial(draws.slots_from, device=getattr(loader, "device", None))
        # fastai sets `Learner.dl` before every epoch, so this view lasts for one epoch only.
        expansion = expand(loader, copies, arrange)
        self.learn.dl, self.copies_in_batch, self.is_paired_by_loader = expansion
        self.draws = draws

    def before_batch(self) -> None:
        """Pair the images if the loader has not, draw masks and MSDA, compute loss weights.

        The network then mixes features with the masks; the loss multiplies the members' losses by
        the weights.
        """
        check_batch(len(self.learn.xb), len(self.learn.yb))
        progress = 1.0 if self._is_search else self.learn.pct_train
        set_readout_progress(unwrap(self.learn.model), progress)
        x, y = self.learn.xb[0].as_subclass(Tensor), self.learn.yb[0].as_subclass(Tensor)
        inputs, targets = self._paired(x, y)
        masks, weights = self._draw_mixing(inputs)
        if self.msda is None:
            self.learn.xb, self.learn.yb = (inputs, masks), (targets, weights)
            return
        draw, own_weights = self._epoch_draws.msda(self.learn.iter, inputs, masks)
        pasted_targets = gather_partners(targets, draw.partners)
        self.learn.xb = (mix_images(inputs, draw), masks)
        self.learn.yb = (targets, weights, pasted_targets, own_weights)

    def _paired(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images (B, M, C, H, W) and targets (B, M) that the members see."""
        if not self.is_paired_by_loader:
            x, y = self._drawn_pairing(x, y)
        # Of the M·B images, the first B are those of member 0, and so on. Members remain the outer
        # dimension in memory, so that each encoder's batch is contiguous.
        by_member = (self._num_members, -1)
        return x.unflatten(0, by_member).transpose(0, 1), y.unflatten(0, by_member).transpose(0, 1)

    def _drawn_pairing(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the pairing of a batch that the loader did not pair; apply it: (M·B, …) each."""
        num_images = len(x) // self.copies_in_batch
        slots = self._epoch_draws.slots(self.learn.iter, num_images, x.device)
        # A loader that cannot copy returns n images, and each slot shows its image as it is.
        indices = slots if self.copies_in_batch > 1 else slots % num_images
        return x.index_select(0, indices), y[indices]

    def _draw_mixing(self, inputs: Tensor) -> Mixing:
        """Return the masks (B, M, 1 or D, h, w) and loss weights (B, M) of this step."""
        feature_shape = unwrap(self.learn.model).mask_shape(*inputs.shape[-2:])
        mix_prob = self.current_mix_prob()
        return self._epoch_draws.mixing(
            self.learn.iter, len(inputs), feature_shape, mix_prob, inputs.device
        )

    def after_batch(self) -> None:
        """Flatten the members into the batch axis if fastai's training metrics are enabled."""
        recorder = getattr(self.learn, "recorder", None)
        if recorder is None or not recorder.train_metrics:
            return
        # For a batch that a callback skipped, fastai counts the last predictions again.
        if self.learn.pred is not self._flat[0]:
            self._flat = self.learn.pred.flatten(0, 1), self.learn.yb[0].flatten(0, 1)  # (B · M, …)
        self.learn.pred, self.learn.yb = self._flat[0], (self._flat[1],)

    def after_train(self) -> None:
        """Count trained epochs."""
        if not self._is_search:
            self.epochs_trained = self._epoch + 1
        self._drop_draws()

    def after_cancel_fit(self) -> None:
        """Drop the draws; a finished lr_find is cancelled, too."""
        self._drop_draws()

    def _drop_draws(self) -> None:
        self.draws, self._flat = None, (None, None)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state, without draws that an interrupted fit left."""
        return {**vars(self), "draws": None, "_flat": (None, None)}

    def _check_divisible(self, num_images: int, num_processes: int) -> None:
        if (batch := num_images * self.batch_repetitions) % num_processes:
            raise InputError(
                f"A batch of {batch} images cannot be split evenly among {num_processes} "
                "processes.\nUse a batch size that is a multiple of the number of processes."
            )

    def current_mix_prob(self) -> float:
        """Return the scheduled probability of mixing by regions; it does not decay in `lr_find`."""
        if self._is_search:
            return self.mix_prob
        return scheduled_mix_prob(self.learn.pct_train, self.mix_prob, self.decay_start)

    def _repetition_at(self, step: int, num_steps: int) -> float:
        """Return the scheduled input repetition at a step of this epoch, which has `num_steps`."""
        late, early = self.input_repetition, self.early_repetition
        if early is None or self._is_search:
            return late
        # Not pct_train, since loaders draw the pairing of several steps in advance.
        progress = (self.learn.epoch + step / max(1, num_steps)) / max(1, self.learn.n_epoch)
        return scheduled_repetition(progress, late, early, self.early_span, self.early_shape)

    @property
    def _is_search(self) -> bool:
        """Whether this is an `lr_find`, in which nothing is scheduled but the learning rate."""
        return hasattr(self.learn, "lr_finder")

    @property
    def _num_members(self) -> int:
        return int(unwrap(self.learn.model).num_members)

    @property
    def _epoch(self) -> int:
        """Number of epochs before this one, including those of a current `lr_find`.

        A fit that continues another one, `fit(…, start_epoch=k)`, has skipped k epochs.
        """
        if self._is_search:
            return self.epochs_trained + int(self.learn.epoch)
        return max(self.epochs_trained, int(self.learn.epoch))

    @property
    def _epoch_draws(self) -> EpochDraws:
        assert self.draws is not None, "before_train was not called"
        return self.draws


class MixMoGuard(PlainErrorCallback):
    """Raise an error if a MixMo network is trained after its `MixMoCallback` was removed.

    Without the callback, all members would be trained on the same images. `to_mixmo`,
    `mixmo_learner` and the callback itself add the guard. Evaluation is not affected.
    """

    order = 9

    def before_train(self) -> None:
        """Check that the Learner has a `MixMoCallback` if the network has several members."""
        network = unwrap(self.learn.model)
        if not isinstance(network, MixMoModel) or network.num_members == 1:
            return
        if not any(isinstance(other, MixMoCallback) for other in self.learn.cbs):
            raise InputError(
                f"The network has {network.num_members} members, but the Learner has no "
                "MixMoCallback that pairs their images.\nAdd one: learn.add_cb(MixMoCallback()).\n"
                "For a plain network: learn.model = learn.model.fuse(), then learn.create_opt()."
            )


class MeanLoss(Callback):
    """Divide the training loss by M, so that it is comparable with a validation loss.

    Before all other callbacks, so that none reads or skips the sum over members. fastai records
    `learn.loss`; its gradient is that of `learn.loss_grad`, which remains the sum.
    """

    order, run_valid = -100, False

    def after_loss(self) -> None:
        """Divide the recorded loss."""
        if any(isinstance(other, MixMoCallback) for other in self.learn.cbs):
            self.learn.loss = self.learn.loss / unwrap(self.learn.model).num_members


def add_companions(learn: Any) -> None:
    """Add `MixMoGuard`, `MeanLoss` and those of `metrics.members` to a Learner without them."""
    for kind in (MixMoGuard, MeanLoss):
        if not any(isinstance(other, kind) for other in learn.cbs):
            learn.add_cb(kind())
    add_member_logits(learn)


def scheduled_mix_prob(progress: float, mix_prob: float, decay_start: float) -> float:
    """Return mix_prob until `decay_start`; then decay linearly to 0 at the end of training.

    Args:
        progress: completed fraction of training, in [0, 1].
        mix_prob: probability before the decay.
        decay_start: fraction of training at which the decay begins; 1 for no decay.
    """
    if progress <= decay_start or decay_start == 1:
        return mix_prob
    return mix_prob * max(0.0, 1 - progress) / (1 - decay_start)
