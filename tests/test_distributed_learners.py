"""A Learner in several processes: its metrics, and fastai's `distrib_ctx`."""

from types import SimpleNamespace

import pytest
import torch
from launches import start_processes, wait_for_all

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.summary import evaluate_logits

pytestmark = pytest.mark.slow

__all__ = ["start_processes"]  # fixtures


def test_metrics_that_cannot_be_summed_are_refused():
    from fastai.metrics import F1Score

    from mixmo_fastai.learner.distributed import SummedMetrics

    summed = SummedMetrics()
    summed.learn = SimpleNamespace(recorder=SimpleNamespace(_valid_mets=[F1Score()]))
    with pytest.raises(InputError, match="cannot be summed"):
        summed.after_validate()


def test_a_process_without_validation_images_adds_nothing(monkeypatch):
    from mixmo_fastai.learner.distributed import SummedMetrics
    from mixmo_fastai.metrics.fastai import ECE

    idle, busy = ECE(), ECE()
    busy.sums, busy.num_seen = torch.arange(15.0, dtype=torch.float64), 30
    expected = busy.value
    gathered = [[0.0, 0.0], [busy.sums, 30.0]]
    monkeypatch.setattr("mixmo_fastai.learner.distributed.all_gather", lambda sums: gathered)
    for metric in (idle, busy):
        summed = SummedMetrics()
        summed.learn = SimpleNamespace(recorder=SimpleNamespace(_valid_mets=[metric]))
        summed.after_validate()
        assert metric.value == expected


SHARED = """
import sys

import torch
import torch.distributed as dist
from synthetic import mixmo_dls
from mixmo_fastai import ECE, NLL, Brier, Disagreement, MemberAccuracy, mixmo_learner
from mixmo_fastai.learner.distributed import shared
from mixmo_fastai.models.mixmo_model import unwrap

dist.init_process_group("gloo")
learn = mixmo_learner(
    mixmo_dls(), "wrn10_1", seed=0,
    metrics=[NLL(), Brier(), ECE(), MemberAccuracy(), Disagreement()],
)
with shared(learn), learn.no_bar(), learn.no_logging():
    learn.fit(1, 0.05)
    values = [*learn.validate(ds_idx=2)]
    model = unwrap(learn.model).eval()
    with torch.no_grad():
        found = [(model.member_logits(x), y) for x, y in learn.dls[2]]
logits, labels = (torch.cat(parts) for parts in zip(*found))
torch.save((values[1:], torch.Tensor(logits), torch.Tensor(labels).long()), f"{dist.get_rank()}.pt")
dist.barrier()
sys.exit(0)
"""


@pytest.mark.parametrize("count", [2, 3])
def test_streaming_metrics_are_those_of_all_images(start_processes, tmp_path, count):
    wait_for_all(start_processes(prelude=SHARED, count=count))
    stored = [torch.load(tmp_path / f"{rank}.pt") for rank in range(count)]
    for values, logits, labels in stored:
        assert len(labels) == 30
        assert values == stored[0][0]
        assert_equal_to_evaluate_logits(values, logits, labels)


def assert_equal_to_evaluate_logits(values, logits, labels):
    found = evaluate_logits(logits, labels)
    found["member_accuracy"] = sum(found["member_accuracy"]) / logits.shape[1]
    names = ("nll", "brier", "ece", "member_accuracy", "disagreement")
    assert values == pytest.approx([found[name] for name in names], abs=1e-6)


FASTAI_PROGRAM = """
import sys

import torch
import torch.distributed as dist
from fastai import distributed as fastai_distributed
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import TensorImage
from fasttransform import Transform
from synthetic import fastai_dls

from mixmo_fastai.callbacks.mixmo import MixMoCallback
from mixmo_fastai.metrics.fastai import ECE, NLL, Brier, Disagreement, MemberAccuracy
from mixmo_fastai.models import create_model


def broadcast_on_cpus(self, values, rank):  # fastai's method moves them to a GPU
    values = torch.tensor(values)
    dist.broadcast(values, rank)
    return values.tolist()


class AddNoise(Transform):
    split_idx = 0

    def encodes(self, x: TensorImage):
        return x + torch.rand_like(x) / 600


class BatchRecorder(Callback):
    run_valid, order = False, 50

    def __init__(self):
        super().__init__()
        self.seen, self.masks, self.shapes = [], [], set()

    def after_pred(self):
        inputs, masks = self.learn.xb
        self.seen.append(inputs[:, :, 0, 0, 0])
        self.masks.append(masks)
        self.shapes.add((tuple(inputs.shape), tuple(self.learn.pred.shape)))


class ShareBuffers(Callback):  # the statistics of BatchNorm differ without sync_bn
    def before_validate(self):
        for buffer in self.learn.model.buffers():
            dist.broadcast(buffer, 0)


fastai_distributed.DistributedDL._broadcast = broadcast_on_cpus
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)  # processes may have different seeds
model = create_model("wrn10_1", 3, generator=torch.Generator().manual_seed(0))
recorder = BatchRecorder()
learn = Learner(
    fastai_dls(after_batch=[AddNoise()]), model, torch.nn.CrossEntropyLoss(),
    cbs=[MixMoCallback(), recorder, ShareBuffers()],
    metrics=[NLL(), Brier(), ECE(), MemberAccuracy(), Disagreement(), accuracy],
)
with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_bar(), learn.no_logging():
    learn.fit(2, 0.05)
    last = learn.recorder.values[-1]
    metrics = learn.validate()
    valid = fastai_dls().valid
    with torch.no_grad():
        batches = [(learn.model.member_logits(x), y) for x, y in valid]
    logits, labels = (torch.cat(parts) for parts in zip(*batches))
torch.save(
    {
        "last": [*last], "valid": (torch.Tensor(logits), torch.Tensor(labels).long()),
        "seen": recorder.seen, "masks": recorder.masks, "shapes": recorder.shapes,
        "metrics": [*metrics],
        "weights": {n: p.detach() for n, p in learn.model.named_parameters()},
        "logits": learn.model.eval()(torch.ones(2, 3, 8, 8)).detach(),
    },
    f"seen-{rank}.pt",
)
dist.barrier()
sys.exit(0)
"""


def test_distrib_ctx_of_fastai(start_processes, tmp_path):
    """Each process pairs and mixes the images of its part of fastai's batch."""
    wait_for_all(start_processes(prelude=FASTAI_PROGRAM))
    first, second = (
        torch.load(tmp_path / f"seen-{rank}.pt", weights_only=False) for rank in range(2)
    )
    assert (
        first["shapes"] == second["shapes"] == {((48, 2, 3, 8, 8), (48, 2, 3))}
    )  # 12 images, 4 times
    assert len(first["seen"]) == 2 * 96 // 2 // 12
    for first_batch, second_batch in zip(first["seen"], second["seen"], strict=True):
        for batch in (first_batch, second_batch):
            assert len(batch.unique()) > 48 * 2 - 5  # each copy has its own noise
            values, counts = (batch * 255).floor().unique(return_counts=True)
            assert len(values) > 1
            assert bool((counts % 8 == 0).all())  # each image is used by two members, four times
            assert not torch.equal(batch[:, 0], batch[:, 1])
    assert not any(torch.equal(*pair) for pair in zip(first["masks"], second["masks"], strict=True))
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name
    assert first["metrics"] == pytest.approx(second["metrics"], rel=1e-5)
    for saved in (first, second):  # images that fastai repeats to fill the last batch count once
        assert len(saved["valid"][1]) == 30
        assert_equal_to_evaluate_logits(saved["last"][2:7], *saved["valid"])


def test_distrib_ctx_of_fastai_refuses_own_loaders(start_processes):
    program = """
import sys
from fastai import distributed
from synthetic import mixmo_dls
from mixmo_fastai import mixmo_learner
from mixmo_fastai.errors import InputError

distributed.DistributedDL._broadcast = lambda self, values, rank: values
learn = mixmo_learner(mixmo_dls(), "wrn10_1")
try:
    with learn.distrib_ctx(sync_bn=False, cpu=True):
        learn.fit(1)
except InputError as error:
    print(error)
    sys.exit(0)
sys.exit("no error was raised")
"""
    commands = start_processes(prelude=program)
    wait_for_all(commands)
    assert all("Use `shared(learn)`" in command.printed for command in commands)


AVERAGED = """
import sys

import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.distributed import *
from fastai.optimizer import Adam
from synthetic import mixmo_dls
from mixmo_fastai import EMACallback, mixmo_learner
from mixmo_fastai.learner.distributed import shared
from mixmo_fastai.models.mixmo_model import unwrap

dist.init_process_group("gloo")


class Compare(Callback):
    order = 90

    def before_validate(self):
        state = unwrap(self.learn.model).state_dict()
        averages = self.learn.ema.averages
        names = [name for name, _ in unwrap(self.learn.model).named_parameters()]
        self.learn.compared.append(all(torch.equal(state[n], averages[n]) for n in names))


learn = mixmo_learner(
    mixmo_dls(), "wrn10_1", seed=0, opt_func=Adam, ghost_batch_size=4, metrics=[],
    cbs=[EMACallback(0.8), Compare()],
)
learn.compared = []
with shared(learn), learn.no_bar(), learn.no_logging():
    learn.fit(3, 0.01)
weights = {name: tensor for name, tensor in unwrap(learn.model).named_parameters()}
torch.save((learn.compared, weights), f"{dist.get_rank()}.pt")
dist.barrier()
sys.exit(0)
"""


def test_averages_are_validated_in_all_processes_with_ghost_batches(start_processes, tmp_path):
    wait_for_all(start_processes(prelude=AVERAGED, count=2))
    (first, weights), (second, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second == [True] * 3
    assert all(torch.equal(weights[name], others[name]) for name in weights)
