import copy
import gc
import pickle

import fastai.callback.fp16
import oracle
import pytest
import torch
from fastai.callback.core import Callback, CancelTrainException, event
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import minimum
from fastai.callback.tracker import EarlyStoppingCallback, TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner, Recorder, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.vision.augment import RandomErasing
from fasttransform import Transform
from synthetic import fastai_dls, mixmo_dls
from torch import nn

from mixmo_fastai.callbacks.best_epoch import BestEpochCallback
from mixmo_fastai.callbacks.deferred import DeferredRecorder, defer_readbacks
from mixmo_fastai.callbacks.ema import EMACallback
from mixmo_fastai.callbacks.mixmo import MixMoCallback, scheduled_mix_prob
from mixmo_fastai.data.repeat import expand
from mixmo_fastai.errors import InputError
from mixmo_fastai.learner.build import mixmo_learner
from mixmo_fastai.metrics import fastai as metrics
from mixmo_fastai.mixing.loss import MixMoLoss
from mixmo_fastai.models import create_model
from mixmo_fastai.training.checkpointing import CheckpointCallback, StopInValidation
from mixmo_fastai.training.history import HistoryCallback
from mixmo_fastai.training.resume import ResumeCallback, StepOffset


def make_learner(dls=None, *, cbs=(), callback=None, num_members=2, seed=0, **kwargs):
    """Build a Learner as a user does, with the callback added."""
    dls = dls or mixmo_dls()
    random = torch.Generator().manual_seed(3)
    model = create_model("wrn10_1", dls.c, num_members, generator=random)
    callback = callback or MixMoCallback(seed=seed)
    kwargs.setdefault("loss_func", CrossEntropyLossFlat())
    learn = Learner(dls, model, cbs=[callback, *cbs], metrics=[accuracy], **kwargs)
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    return learn


class BatchRecorder(Callback):
    """Record the inputs and outputs of the network and the targets of the loss."""

    order, run_valid = 1000, False

    def __init__(self):
        super().__init__()
        self.seen = []

    def after_pred(self):
        self.seen.append((*self.learn.xb, *self.learn.yb, self.learn.pred.detach()))


class RaiseAt(Callback):
    """Raise an error in the middle of an epoch."""

    run_valid = False

    def __init__(self, error, step=2):
        super().__init__()
        self.error, self.step = error, step

    def after_pred(self):
        if self.learn.train_iter == self.step:
            raise self.error


def state(learn):
    return {name: tensor.clone() for name, tensor in learn.model.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class TestTrainingBatches:
    def test_shapes_of_inputs_masks_and_targets(self):
        recorder = BatchRecorder()
        make_learner(cbs=[recorder]).fit(1, 0.01)
        inputs, masks, targets, weights, pred = recorder.seen[0]
        assert inputs.shape == (48, 2, 3, 8, 8)  # 12 images, each 4 times, for 2 members
        assert masks.shape == (48, 2, 1, 8, 8)
        assert targets.shape == weights.shape == (48, 2)
        assert pred.shape == (48, 2, 3)
        torch.testing.assert_close(masks.sum(1), torch.ones(48, 1, 8, 8))
        torch.testing.assert_close(weights.sum(1), torch.full((48,), 2.0))

    @pytest.mark.parametrize("make", [mixmo_dls, fastai_dls])
    def test_members_see_all_images_equally_often_with_their_labels(self, make):
        recorder = BatchRecorder()
        make_learner(make(), cbs=[recorder]).fit(1, 0.01)
        for inputs, _, targets, _, _ in recorder.seen:
            # The class of an image is its strongest colour, also after crop and flip.
            assert torch.equal(inputs.mean((3, 4)).argmax(2), targets)
            counts = [targets[:, member].bincount(minlength=3) for member in range(2)]
            assert torch.equal(*counts)

    def test_own_loader_augments_each_copy_separately(self):
        recorder = BatchRecorder()
        make_learner(cbs=[recorder]).fit(1, 0.01)
        inputs = recorder.seen[0][0]
        distinct = inputs.flatten(0, 1).flatten(1).unique(dim=0)
        assert len(distinct) > 12 * 8 * 0.6  # 12 images, 8 copies; there are 18 crops and flips

    def test_batch_transforms_of_the_user_augment_each_copy_separately(self):
        class AddNoise(Transform):
            def encodes(self, x: torch.Tensor):
                return x + torch.rand_like(x) * 0.1 if x.is_floating_point() else x

        dls, recorder = fastai_dls(after_batch=[AddNoise()]), BatchRecorder()
        make_learner(dls, cbs=[recorder]).fit(1, 0.01)
        inputs = recorder.seen[0][0]
        assert len(inputs.flatten(0, 1).flatten(1).unique(dim=0)) == 12 * 8
        assert len(dls.train.one_batch()[0]) == 12  # the user's loader is unchanged

    def test_training_transforms_of_the_user_run_on_copies(self):
        """fastai sets the split of a pipeline at the start of each pass."""
        recorder = BatchRecorder()
        make_learner(
            fastai_dls(after_batch=[RandomErasing(p=1.0, sl=0.2, min_aspect=1.0)]), cbs=[recorder]
        ).fit(1, 0.01)
        for inputs, *_ in recorder.seen:
            assert len(inputs.flatten(0, 1).flatten(1).unique(dim=0)) == 12 * 8

    def test_torch_loader(self):
        foreign = fastai_dls()
        pairs = [(torch.Tensor(x), torch.tensor(int(y))) for x, y in foreign.train_ds]
        torch_dl = torch.utils.data.DataLoader(pairs, batch_size=12, shuffle=True, drop_last=True)
        dls, recorder = DataLoaders(torch_dl, torch_dl, device=torch.device("cpu")), BatchRecorder()
        learn = mixmo_learner(
            dls, "wrn10_1", num_classes=3, loss_func=CrossEntropyLossFlat(), cbs=recorder
        )
        learn.remove_cb(learn.progress)
        with learn.no_logging():
            learn.fit(1, 0.01)
        inputs, _, targets, *_ = recorder.seen[0]
        assert inputs.shape == (48, 2, 3, 8, 8)
        assert torch.equal(inputs.mean((3, 4)).argmax(2), targets)

    def test_masks_of_sum_and_linear_are_constant(self):
        for mix, expected in (("sum", 1), ("linear", 48)):
            recorder = BatchRecorder()
            make_learner(cbs=[recorder], callback=MixMoCallback(mix, seed=0)).fit(1, 0.01)
            masks = recorder.seen[0][1]
            assert masks[:, 0, 0].flatten(1).unique(dim=0).shape[0] == expected
            assert bool((masks == masks[..., :1, :1]).all())  # equal at all positions

    @pytest.mark.slow
    @pytest.mark.parametrize("mix", ["cutmix", "noise"])
    def test_masks_do_not_depend_on_the_step_at_which_drawing_begins(self, mix):
        """Drawing begins at another step if a run is resumed within an epoch."""

        class DiscardDraws(Callback):
            order, run_valid = 0, False

            def before_batch(self):
                if self.learn.iter % 3 == 2:
                    self.learn.mix_mo.draws.latest.clear()

        seen = []
        for cbs in ([], [DiscardDraws()]):
            recorder = BatchRecorder()
            callback = MixMoCallback(mix, mix_prob=0.6, decay_start=0.2, seed=0)
            make_learner(mixmo_dls(batch_size=3), cbs=[recorder, *cbs], callback=callback).fit(
                2, 0.0
            )
            seen.append([step[1] for step in recorder.seen])
        assert len(seen[0]) > 32
        assert all(torch.equal(*masks) for masks in zip(*seen, strict=True))

    @pytest.mark.slow
    def test_half_of_the_batches_have_binary_masks(self):
        callback = MixMoCallback(seed=0, batch_repetitions=1)
        recorder = BatchRecorder()
        make_learner(mixmo_dls(batch_size=2), cbs=[recorder], callback=callback).fit(4, 0.01)
        binary = [
            bool(((m == 0) | (m == 1)).all())
            for _, m, *_ in recorder.seen[: len(recorder.seen) // 2]
        ]
        assert len(binary) > 70
        assert 0.3 < sum(binary) / len(binary) < 0.7

    def test_mask_options_apply_to_region_masks_only(self):
        recorder = BatchRecorder()
        callback = MixMoCallback("patchup", mix_prob=0.5, seed=0, mask_options={"block_size": 1})
        make_learner(callback=callback, cbs=[recorder]).fit(3, 0.01)
        masks = [seen[1] for seen in recorder.seen]
        binary = [m for m in masks if ((m == 0) | (m == 1)).all()]
        assert 0 < len(binary) < len(masks)
        # Neighbouring positions differ; they rarely would with blocks of 7x7.
        alone = torch.cat(binary)[:, :1].sub(torch.cat(binary)[:, :1].roll(1, -1)).abs().mean()
        assert alone > 0.2

    def test_one_member_has_unit_masks_and_weights(self):
        recorder = BatchRecorder()
        callback = MixMoCallback("sum", batch_repetitions=1, seed=0)
        make_learner(cbs=[recorder], callback=callback, num_members=1).fit(1, 0.01)
        inputs, masks, _, weights, _ = recorder.seen[0]
        assert inputs.shape == (12, 1, 3, 8, 8)
        assert bool((masks == 1).all())
        assert bool((weights == 1).all())

    def test_three_members(self):
        recorder = BatchRecorder()
        make_learner(cbs=[recorder], num_members=3).fit(1, 0.01)
        assert recorder.seen[0][0].shape == (48, 3, 3, 8, 8)


class TestDeterminism:
    def test_fits_with_equal_seeds_are_bit_equal(self):
        first, second = make_learner(seed=5), make_learner(seed=5)
        for learn in (first, second):
            learn.fit(2, 0.01)
        assert equal(state(first), state(second))
        other = make_learner(seed=6)
        other.fit(2, 0.01)
        assert not equal(state(first), state(other))

    def test_fits_do_not_depend_on_calls_in_between(self, tmp_path):
        plain, disturbed = make_learner(), make_learner(path=tmp_path)
        plain.fit(1, 0.01)
        plain.fit(1, 0.01)

        disturbed.lr_find(num_it=12, show_plot=False, suggest_funcs=minimum, stop_div=False)
        torch.rand(17)
        disturbed.fit(1, 0.01)
        disturbed.get_preds()
        disturbed.validate()
        disturbed.dls.train.one_batch()
        torch.manual_seed(99)
        disturbed.fit(1, 0.01)
        assert equal(state(plain), state(disturbed))

    def test_second_fit_uses_new_draws(self):
        recorder = BatchRecorder()
        learn = make_learner(cbs=[recorder])
        learn.fit(1, 0.0)
        learn.fit(1, 0.0)
        half = len(recorder.seen) // 2
        assert not torch.equal(recorder.seen[0][1], recorder.seen[half][1])
        assert learn.mix_mo.epochs_trained == 2

    def test_global_seed_is_used_if_the_seed_is_none(self):
        draws = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            recorder = BatchRecorder()
            make_learner(cbs=[recorder], callback=MixMoCallback()).fit(1, 0.01)
            draws.append(recorder.seen[0][1])
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])

    def test_learners_without_seed_depend_on_the_global_generator(self):
        torch.manual_seed(0)
        first, second = (mixmo_learner(mixmo_dls(), "wrn10_1") for _ in "ab")
        assert not equal(state(first), state(second))
        torch.manual_seed(0)
        again = mixmo_learner(mixmo_dls(), "wrn10_1")
        assert equal(state(first), state(again))

    def test_lr_find_uses_new_draws_in_each_epoch(self, tmp_path):
        recorder = BatchRecorder()
        learn = make_learner(
            mixmo_dls(batch_size=40), cbs=[recorder], path=tmp_path
        )  # two steps an epoch
        learn.lr_find(num_it=8, show_plot=False, suggest_funcs=minimum, stop_div=False)
        first_steps = [masks.flatten(1) for _, masks, *_ in recorder.seen[::2]]
        distinct = {tuple(m[:, ::7].flatten().tolist()) for m in first_steps}
        assert len(distinct) == len(first_steps) == 4

    @pytest.mark.parametrize("kind", ["cutmix", "cow", "linear"])
    def test_creating_a_callback_does_not_use_the_global_generator(self, kind):
        before = torch.get_rng_state()
        MixMoCallback(kind, msda="mixup")
        assert torch.equal(torch.get_rng_state(), before)

    def test_fit_does_not_use_the_global_generator(self):
        learn = make_learner()
        before = torch.random.get_rng_state()
        learn.fit(1, 0.01)
        assert torch.equal(torch.random.get_rng_state(), before)


class LossRecorder(Callback):
    """Record the batch, loss and gradients of each step."""

    order, run_valid = 40, False  # before the Recorder

    def __init__(self):
        super().__init__()
        self.batches, self.losses, self.gradients = [], [], []

    def after_pred(self):
        self.batches.append((self.learn.pred.detach().clone(), *self.learn.yb))

    def before_step(self):
        self.gradients.append([p.grad.clone() for p in self.learn.model.parameters()])

    def after_batch(self):
        self.losses.append(self.learn.loss.detach())


class TestRecordedLoss:
    @pytest.mark.parametrize("num_members", [1, 2, 3])
    @pytest.mark.parametrize("recorder", [Recorder, DeferredRecorder])
    def test_recorded_loss_is_per_member(self, num_members, recorder):
        loss_recorder = LossRecorder()
        mix = "sum" if num_members == 1 else "cutmix"
        learn = make_learner(
            cbs=[loss_recorder], num_members=num_members, callback=MixMoCallback(mix, seed=0)
        )
        if recorder is DeferredRecorder:
            defer_readbacks(learn)
        learn.fit(1, 0.01)
        assert type(learn.recorder) is recorder
        expected = [
            oracle.loss(*(part.numpy() for part in batch)) / num_members
            for batch in loss_recorder.batches
        ]
        assert [loss.item() for loss in loss_recorder.losses] == pytest.approx(expected, rel=1e-5)
        smooth, count = 0.0, 0
        for value, found in zip(expected, learn.recorder.losses, strict=True):
            smooth, count = 0.02 * value + 0.98 * smooth, count + 1
            assert found.item() == pytest.approx(smooth / (1 - 0.98**count), rel=1e-4)
        assert learn.recorder.values[0][0] == pytest.approx(learn.recorder.losses[-1].item())

    @pytest.mark.parametrize("num_members", [2, 3])
    def test_gradient_is_that_of_the_sum_over_members(self, num_members):
        recorder = LossRecorder()
        learn = make_learner(cbs=[recorder], num_members=num_members)

        class ByHand(Callback):
            order = 41

            def before_step(self):
                loss = learn.loss_func(learn.model(*learn.xb), *learn.yb)
                by_hand = torch.autograd.grad(loss, [*learn.model.parameters()])
                for actual, expected in zip(recorder.gradients[-1], by_hand, strict=True):
                    assert torch.equal(actual, expected)

        learn.fit(1, 0.01, cbs=ByHand())
        assert len(recorder.gradients) == len(learn.dls.train)

    @pytest.mark.parametrize("num_members", [1, 2, 4])
    def test_recorded_loss_is_comparable_with_the_validation_loss(self, num_members):
        mix = "sum" if num_members == 1 else "cutmix"
        learn = make_learner(num_members=num_members, callback=MixMoCallback(mix, seed=0))
        learn.fit(1, 0.0)
        train, valid, *_ = learn.recorder.values[0]
        assert train == pytest.approx(valid, rel=0.4)

    def test_lr_find_records_the_loss_per_member(self, tmp_path):
        recorder = LossRecorder()
        learn = make_learner(cbs=[recorder], path=tmp_path)
        learn.lr_find(show_plot=False, num_it=10, start_lr=1e-8, end_lr=1e-7)
        losses = [oracle.loss(*(part.numpy() for part in batch)) / 2 for batch in recorder.batches]
        assert learn.recorder.losses[0].item() == pytest.approx(losses[0], rel=1e-4)

    def test_callbacks_monitor_the_recorded_loss(self):
        """`min_delta` distinguishes the recorded loss from the sum over members."""
        watch = EarlyStoppingCallback(monitor="train_loss", min_delta=0.2, patience=1)
        learn = make_learner(cbs=[watch])
        learn.fit(3, 0.0)
        assert watch.best == pytest.approx(learn.recorder.values[0][0])
        assert watch.best < 1.6  # ln 3 is 1.1
        assert learn.epoch == 1

    def test_terminate_on_nan_callback_stops_training(self):
        class Fail(Callback):
            order, run_valid = 8, False

            def after_loss(self):
                if self.learn.train_iter == 3:
                    self.learn.loss = self.learn.loss * float("inf")

        learn = make_learner(cbs=[Fail(), TerminateOnNaNCallback()])
        learn.fit(2, 0.01)
        assert learn.train_iter < len(learn.dls.train)

    def test_accumulated_gradients_are_those_of_the_sum_over_batches(self):
        """Make one step per two batches; with a learning rate of 0 the weights do not change."""
        recorder = LossRecorder()
        accumulated = make_learner(cbs=[recorder, GradientAccumulation(96)])
        accumulated.fit(1, 0.0)
        plain = LossRecorder()
        make_learner(cbs=[plain]).fit(1, 0.0)
        assert [*map(float, recorder.losses)] == pytest.approx(
            [*map(float, plain.losses)], rel=1e-5
        )
        for together, first, second in zip(
            recorder.gradients[0], plain.gradients[0], plain.gradients[1], strict=True
        ):
            torch.testing.assert_close(together, (first + second) / 2, rtol=1e-3, atol=1e-5)

    def test_recorded_loss_in_mixed_precision(self, monkeypatch):
        monkeypatch.setattr(
            fastai.callback.fp16, "autocast", lambda *_, dtype: torch.autocast("cpu", dtype=dtype)
        )
        recorder = LossRecorder()
        make_learner(cbs=[recorder]).to_bf16().fit(1, 0.0)
        expected = [
            oracle.loss(*(part.numpy() for part in batch)) / 2 for batch in recorder.batches
        ]
        assert [loss.item() for loss in recorder.losses] == pytest.approx(expected, rel=1e-4)


class TestCleanup:
    def test_loss_is_wrapped_once(self):
        base = CrossEntropyLossFlat()
        learn = make_learner(loss_func=base)
        learn.fit(1, 0.01)
        wrapped = learn.loss_func
        assert isinstance(wrapped, MixMoLoss)
        assert wrapped.base is base
        learn.fit(1, 0.01)
        assert learn.loss_func is wrapped

    @pytest.mark.slow
    @pytest.mark.parametrize("make", [mixmo_dls, fastai_dls])
    @pytest.mark.parametrize(
        "error", [KeyboardInterrupt(), RuntimeError("boom"), CancelTrainException()]
    )
    def test_fit_after_an_interruption_equals_a_first_fit(self, make, error):
        interrupted = make_learner(make(), cbs=[RaiseAt(error)])
        before = {name: vars(dl).get("after_batch") for name, dl in loaders(interrupted)}
        if isinstance(error, CancelTrainException):
            interrupted.fit(1, 0.01)
            reset_epochs(interrupted)
        else:
            with pytest.raises(type(error)):
                interrupted.fit(1, 0.01)
        gc.collect()
        assert {name: vars(dl).get("after_batch") for name, dl in loaders(interrupted)} == before
        assert len(interrupted.dls.train.one_batch()[0]) == 12
        assert interrupted.loss_func.reduction == "mean"

        fresh = make_learner(make())
        for learn in (interrupted, fresh):
            learn.remove_cbs(RaiseAt)
            reset(learn)
            learn.fit(1, 0.01)
        assert equal(state(interrupted), state(fresh))

    def test_interruption_while_a_batch_is_fetched(self):
        dls = fastai_dls()
        calls = []

        def interrupt(batch):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return batch

        dls.train.after_batch.add(Transform(interrupt))
        pipeline = vars(dls.train)["after_batch"]
        learn = make_learner(dls)
        with pytest.raises(KeyboardInterrupt):
            learn.fit(1, 0.01)
        assert vars(dls.train)["after_batch"] is pipeline

    def test_evaluation_batches_are_not_changed(self):
        learn = make_learner()
        learn.fit(1, 0.01)
        preds, targets = learn.get_preds()
        assert preds.shape == (len(learn.dls.valid.images), 3)
        torch.testing.assert_close(preds.sum(1), torch.ones(len(preds)))
        assert targets.ndim == 1
        _, _, losses = learn.get_preds(with_loss=True)
        assert losses.shape == targets.shape
        assert learn.loss_func.reduction == "mean"
        loss, ensemble_accuracy = learn.validate()
        assert loss == pytest.approx(losses.mean().item(), rel=1e-4)
        assert ensemble_accuracy == pytest.approx(
            (preds.argmax(1) == targets).float().mean().item()
        )

    def test_lr_find_does_not_advance_the_schedule(self, tmp_path):
        class MixProbRecorder(Callback):
            order, run_valid = 1000, False
            probabilities = ()

            def before_batch(self):
                self.probabilities += (self.learn.mix_mo.current_mix_prob(),)

        recorder = MixProbRecorder()
        learn = make_learner(cbs=[recorder], path=tmp_path)
        learn.lr_find(num_it=20, show_plot=False, suggest_funcs=minimum, stop_div=False)
        assert set(recorder.probabilities) == {0.5}
        assert learn.mix_mo.epochs_trained == 0

    @pytest.mark.filterwarnings("ignore:load_learner. uses Python's insecure pickle")
    def test_learner_is_exported_and_loaded(self, tmp_path):
        learn = make_learner(path=tmp_path)
        learn.fit(1, 0.01)
        x = learn.dls.valid.one_batch()[0]
        expected = learn.model.eval()(x)
        learn.export("learner.pkl")
        loaded = load_learner(tmp_path / "learner.pkl")
        torch.testing.assert_close(loaded.model.eval()(x), expected)


def loaders(learn):
    return [("train", learn.dls.train), ("valid", learn.dls.valid)]


def reset_epochs(learn):
    """Reset the count of epochs, since a cancelled epoch counts as trained."""
    learn.mix_mo.epochs_trained = 0


def reset(learn):
    random = torch.Generator().manual_seed(3)
    learn.model.load_state_dict(
        create_model("wrn10_1", learn.dls.c, 2, generator=random).state_dict()
    )
    learn.opt = None
    learn.dls.train.rng.seed(0) if hasattr(learn.dls.train, "rng") else None


class TestSchedule:
    def test_mix_prob_is_constant_and_then_decays_to_zero(self):
        assert scheduled_mix_prob(0.0, 0.5, 11 / 12) == 0.5
        assert scheduled_mix_prob(11 / 12, 0.5, 11 / 12) == 0.5
        assert scheduled_mix_prob(23 / 24, 0.5, 11 / 12) == pytest.approx(0.25)
        assert scheduled_mix_prob(1.0, 0.5, 11 / 12) == 0
        assert scheduled_mix_prob(1 + 1e-9, 0.5, 11 / 12) == 0
        assert scheduled_mix_prob(1.0, 0.7, 1.0) == 0.7
        assert scheduled_mix_prob(1 + 1e-9, 0.7, 1.0) == 0.7

    def test_schedule_applies_in_training(self):
        callback = MixMoCallback(mix_prob=1.0, decay_start=0.0, seed=0)
        recorder = BatchRecorder()
        make_learner(mixmo_dls(batch_size=2), cbs=[recorder], callback=callback).fit(2, 0.01)
        binary = [bool(((m == 0) | (m == 1)).all()) for _, m, *_ in recorder.seen]
        third = len(binary) // 3
        assert sum(binary[:third]) > 2 * sum(binary[-third:])


class TestInvalidInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"mix": "cutmx"}, "Did you mean 'cutmix'"),
            ({"alpha": 0}, "alpha"),
            ({"mix_prob": 1.5}, "mix_prob must be from 0 to 1; got 1.5"),
            ({"decay_start": -0.1}, "decay_start"),
            ({"weight_root": 0.5}, "weight_root"),
            ({"batch_repetitions": 0}, "batch_repetitions"),
            ({"input_repetition": 2}, "input_repetition"),
            ({"mask_options": 5}, "mask_options must map names to values; got 5"),
            ({"mask_options": {"block_size": 3}}, "'cutmix'.\nIt has no options"),
            (
                {"mix": "patchup", "mask_options": {"block_size": 2}},
                "block_size must be an odd integer",
            ),
            ({"mix": "cow", "mask_options": {"sigma": 2}}, "Unknown option 'sigma'"),
        ],
    )
    def test_arguments_out_of_range_are_refused(self, arguments, message):
        with pytest.raises(InputError, match=message):
            MixMoCallback(**arguments)

    def test_other_models_are_refused(self):
        learn = Learner(fastai_dls(), nn.Linear(2, 2), loss_func=nn.CrossEntropyLoss())
        learn.add_cb(MixMoCallback())
        with pytest.raises(InputError, match=r"\AMixMoCallback needs a MixMoModel; .* Linear"):
            learn.fit(1)

    def test_optimizer_of_another_model_is_refused(self):
        flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
        learn = Learner(fastai_dls(), flat, loss_func=nn.CrossEntropyLoss())
        learn.remove_cb(learn.progress)
        with learn.no_logging():
            learn.fit(1)
            learn.model = create_model("wrn10_1", 3)
            learn.add_cb(MixMoCallback())
            with pytest.raises(InputError, match=r"learn.create_opt\(\)"):
                learn.fit(1)
            learn.create_opt()
            learn.fit(1)

    def test_two_callbacks_are_refused(self):
        with pytest.raises(InputError, match="more than one MixMoCallback"):
            make_learner(cbs=[MixMoCallback()]).fit(1)

    def test_mixup_callback_of_fastai_is_refused(self):
        with pytest.raises(InputError, match="MixUp cannot be combined"):
            make_learner(cbs=[MixUp()]).fit(1)

    def test_mixing_kinds_with_one_member_are_refused(self):
        with pytest.raises(InputError, match="needs at least two members"):
            make_learner(num_members=1).fit(1)
        with pytest.raises(InputError, match="needs at least two members"):
            mixmo_learner(mixmo_dls(), "wrn10_1", num_members=1)

    def test_loaders_without_classes_require_num_classes(self):
        plain = torch.utils.data.DataLoader([(torch.zeros(3, 8, 8), 0)] * 4, batch_size=2)
        dls = DataLoaders(plain, plain)
        with pytest.raises(InputError, match="num_classes=10"):
            mixmo_learner(dls, "wrn10_1", loss_func=CrossEntropyLossFlat())


class TestMixmoLearner:
    def test_training_reaches_a_high_accuracy(self):
        learn = mixmo_learner(mixmo_dls(), "wrn10_1", seed=0)
        learn.remove_cb(learn.progress)
        with learn.no_logging():
            learn.fit_one_cycle(4, 0.05)
        _, ensemble, members = learn.validate()
        assert ensemble > 0.9
        assert members > 0.9

    def test_arguments_reach_callback_and_learner(self):
        learn = mixmo_learner(
            mixmo_dls(), "wrn10_1", mix="linear", num_members=3, alpha=5.0, seed=1, lr=0.25, wd=0.1
        )
        assert (learn.mix_mo.mix, learn.mix_mo.alpha, learn.lr, learn.wd) == (
            "linear",
            5,
            0.25,
            0.1,
        )
        assert learn.model.num_members == 3
        assert isinstance(learn.loss_func, MixMoLoss)

    def test_default_optimizer_is_the_published_one(self):
        learn = mixmo_learner(mixmo_dls(), "wrn10_1", seed=1)
        learn.create_opt()
        group = learn.opt.opt.param_groups[0]
        assert isinstance(learn.opt.opt, torch.optim.SGD)
        assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 6e-4)
        groups = learn.opt.opt.param_groups
        assert sum(len(g["params"]) for g in groups) == len(list(learn.model.parameters()))

    def test_seed_determines_the_initial_weights(self):
        first, second = (mixmo_learner(mixmo_dls(), "wrn10_1", seed=4) for _ in "ab")
        assert equal(state(first), state(second))

    @pytest.mark.filterwarnings("ignore:You are shadowing an attribute")
    def test_hooks_that_read_activations(self):
        learn = make_learner(cbs=[ActivationStats(with_hist=False)])
        learn.fit(1, 0.01)
        assert len(learn.activation_stats.stats) > 0

    def test_channels_are_read_from_fastai_loaders(self):
        learn = mixmo_learner(fastai_dls(), "wrn10_1", loss_func=CrossEntropyLossFlat())
        assert learn.model.in_channels == 3


class TestMemberAccuracy:
    def test_member_accuracy_is_the_mean_over_members(self):
        learn = make_learner()
        learn.metrics = [accuracy, metrics.MemberAccuracy()]
        learn.fit(1, 0.01)
        _, _, value = learn.validate(ds_idx=2)
        num_correct, num_seen = 0.0, 0
        learn.model.eval()
        for x, y in learn.dls[2]:
            logits = learn.model.member_logits(x)
            num_correct += (logits.argmax(2) == y[:, None]).float().mean(1).sum().item()
            num_seen += len(y)
        assert value == pytest.approx(num_correct / num_seen)


@pytest.mark.parametrize(
    "kind",
    [
        MixMoCallback,
        HistoryCallback,
        CheckpointCallback,
        StopInValidation,
        ResumeCallback,
        StepOffset,
        EMACallback,
        BestEpochCallback,
    ],
)
def test_public_methods_are_events_or_documented_extras(kind):
    """fastai silently ignores misspelt events."""
    extras = {"current_mix_prob"}
    extras |= {"state_tensors", "load_state_tensors", "finish", "restore", "training_weights"}
    extras |= {"after_trained_epoch", "state", "load_state", "stop_diverged", "act"}
    extras |= {"save"}
    methods = {name for name, value in vars(kind).items() if callable(value) and name[0] != "_"}
    assert methods - extras <= set(vars(event))


@pytest.mark.parametrize("make", [mixmo_dls, fastai_dls])
def test_loader_views_can_be_copied_and_have_the_attributes_of_the_loader(make):
    loader = make().train
    view = expand(loader, 2).loader
    assert len(copy.copy(view)) == len(loader)
    assert view.bs == loader.bs
    assert isinstance(view, type(loader)) or view.loader is loader
    with pytest.raises(AttributeError, match="missing_attribute"):
        view.missing_attribute  # noqa: B018
    assert len(pickle.loads(pickle.dumps(view))) == len(loader)
