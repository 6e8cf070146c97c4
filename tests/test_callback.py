import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from fastai.callback.core import Callback, event
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import minimum
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.augment import RandomErasing
from fasttransform import Transform
from learners import BatchRecorder, SkipBackward, equal, make_learner, state
from synthetic import fastai_dls, mixmo_dls

from mixmo_fastai.callbacks.best_epoch import BestEpochCallback
from mixmo_fastai.callbacks.ema import EMACallback
from mixmo_fastai.callbacks.mixmo import MixMoCallback, MixMoGuard, scheduled_mix_prob
from mixmo_fastai.data.repeat import expand
from mixmo_fastai.learner.build import mixmo_learner
from mixmo_fastai.training.checkpointing import CheckpointCallback, StopInValidation
from mixmo_fastai.training.history import HistoryCallback
from mixmo_fastai.training.resume import ResumeCallback, StepOffset


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
            callbacks = [recorder, SkipBackward(), *cbs]
            make_learner(mixmo_dls(batch_size=3), cbs=callbacks, callback=callback).fit(2, 0.0)
            seen.append([step[1] for step in recorder.seen])
        assert len(seen[0]) > 32
        assert all(torch.equal(*masks) for masks in zip(*seen, strict=True))

    @pytest.mark.slow
    def test_half_of_the_batches_have_binary_masks(self):
        callback = MixMoCallback(seed=0, batch_repetitions=1)
        recorder = BatchRecorder()
        cbs = [recorder, SkipBackward()]
        make_learner(mixmo_dls(batch_size=2), cbs=cbs, callback=callback).fit(4, 0.01)
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


class TestSchedule:
    def test_mix_prob_is_constant_and_then_decays_to_zero(self):
        assert scheduled_mix_prob(0.0, 0.5, 11 / 12) == 0.5
        assert scheduled_mix_prob(11 / 12, 0.5, 11 / 12) == 0.5
        assert scheduled_mix_prob(23 / 24, 0.5, 11 / 12) == pytest.approx(0.25)
        assert scheduled_mix_prob(1.0, 0.5, 11 / 12) == 0
        assert scheduled_mix_prob(1 + 1e-9, 0.5, 11 / 12) == 0
        assert scheduled_mix_prob(1.0, 0.7, 1.0) == 0.7
        assert scheduled_mix_prob(1 + 1e-9, 0.7, 1.0) == 0.7

    def test_repetition_follows_the_steps_of_the_fit(self):
        callback = MixMoCallback(early_repetition=1.0, early_span=1.0)  # from 1 to 0, linearly
        callback.learn = SimpleNamespace(epoch=1, n_epoch=4)
        actual = [callback._repetition_at(step, num_steps=5) for step in range(5)]
        assert actual == pytest.approx([0.75, 0.7, 0.65, 0.6, 0.55])
        callback.learn = SimpleNamespace(epoch=0, n_epoch=1)
        assert [callback._repetition_at(step, num_steps=1) for step in (0, 1)] == [1.0, 0.0]
        assert callback._repetition_at(0, num_steps=0) == 1.0

    def test_schedule_applies_in_training(self):
        callback = MixMoCallback(mix_prob=1.0, decay_start=0.0, seed=0)
        recorder = BatchRecorder()
        cbs = [recorder, SkipBackward()]
        make_learner(mixmo_dls(batch_size=2), cbs=cbs, callback=callback).fit(2, 0.01)
        binary = [bool(((m == 0) | (m == 1)).all()) for _, m, *_ in recorder.seen]
        third = len(binary) // 3
        assert sum(binary[:third]) > 2 * sum(binary[-third:])


def test_defaults_are_those_of_the_paper():
    callback = MixMoCallback()
    assert (callback.mix, callback.alpha, callback.mix_prob) == ("cutmix", 2.0, 0.5)
    assert callback.decay_start == 11 / 12
    assert (callback.weight_root, callback.batch_repetitions) == (3.0, 4)
    assert (callback.input_repetition, callback.early_repetition) == (0.0, None)
    for owner in (callback, MixMoCallback):  # of the class: for pickled callbacks without them
        assert (owner.early_span, owner.early_shape) == (0.4, "linear")
    assert (callback.msda, callback.msda_alpha, callback.msda_prob) == (None, 1.0, 0.5)


def test_callbacks_act_before_autocast_and_in_training_only():
    assert MixMoCallback.order < MixedPrecision.order
    assert MixMoGuard.order <= MixMoCallback.order
    assert not MixMoCallback.run_valid


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
