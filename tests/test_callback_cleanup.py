"""`MixMoCallback` leaves a Learner as it was, after interruptions too."""

import gc

import pytest
import torch
from fastai.callback.core import Callback, CancelTrainException
from fastai.callback.schedule import minimum
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat
from fasttransform import Transform
from learners import RaiseAt, equal, make_learner, state
from synthetic import fastai_dls, mixmo_dls

from mixmo_fastai.mixing.loss import MixMoLoss
from mixmo_fastai.models import create_model


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
