"""Simulate a GPU with tensors without data on device "cuda", and record synchronisations.

Torch's fake tensors have a shape, a dtype and a device, but compute nothing. Operations that make
the host and the device wait for each other, such as reading a value or copying between them, are
thus found without a GPU. The backward pass and the fused optimizer's kernel, which need a real GPU,
are replaced.
"""

from contextlib import contextmanager

import pytest
import torch
from synthetic import mixmo_dls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mixmo_fastai.data.cuts import Augmentation
from mixmo_fastai.learner.build import mixmo_learner
from mixmo_fastai.models import create_model
from mixmo_fastai.rng import make_generator

READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "item")


class SyncRecorder(TorchDispatchMode):
    """Record operations that make the host and the device wait for each other."""

    def __init__(self):
        super().__init__()
        self.seen, self.fused_steps = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        before = {t.device.type for t in args if isinstance(t, torch.Tensor)}
        if name in READS and "cuda" in before:
            self.seen.append("read")
        if name == "_local_scalar_dense":
            return 0.5  # any number, since fake tensors have no values
        if name == "equal":
            return True
        if name == "_fused_sgd_":
            # The kernel requires equal layouts of parameters, gradients and momenta.
            for tensors in zip(*filter(None, args[:3]), strict=True):
                assert len({(t.shape, t.stride(), t.device) for t in tensors}) == 1
            self.fused_steps += 1
            return None
        out = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and before | {out.device.type} == {"cpu", "cuda"}:
            self.seen.append("to host" if out.device.type == "cpu" else "to device")
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.seen.append("read")  # a boolean index calls nonzero
        return out


def _generator(*args, device=None, **kwargs):
    on_gpu = device is not None and torch.device(device).type == "cuda"
    return None if on_gpu else make_generator(*args, device=device, **kwargs)


@contextmanager
def learner_on_gpu(monkeypatch, num_steps, **settings):
    """Build a Learner whose network and data are on the GPU, with num_steps steps per epoch."""
    for module in ("callbacks.draws", "data.loaders"):
        monkeypatch.setattr(f"mixmo_fastai.{module}.make_generator", _generator)
    monkeypatch.setattr("mixmo_fastai.models.create.initialize", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "as_subclass", lambda self, kind: self)
    if torch.__version__.startswith("2.6.") and not torch.cuda.is_available():
        pytest.skip("torch 2.6 asks the driver, also for tensors without data")
    dls = mixmo_dls(batch_size=80 // num_steps, augmentation=Augmentation(1, True))
    with FakeTensorMode(allow_non_fake_inputs=True):
        for loader in dls.loaders:
            loader.to("cuda")
        dls.device = torch.device("cuda")
        monkeypatch.setattr("mixmo_fastai.learner.arch.create_model", _on_gpu(create_model))
        learn = mixmo_learner(dls, "wrn10_1", seed=1, **settings)
        learn._backward = lambda: _zero_gradients(learn.model)
        yield learn


def _on_gpu(create):
    """Replace the tensors of new networks in `to`: modules cannot move fake tensors."""

    def create_on_gpu(*args, **kwargs):
        model = create(*args, **kwargs)
        devices = []

        def to(device=None, *_, memory_format=None, **__):
            if not devices:
                assert torch.device(device).type == "cuda"
                assert memory_format == torch.channels_last
                for module in model.modules():
                    for tensors in (module._parameters, module._buffers):
                        for name, tensor in tensors.items():
                            if tensor is not None:
                                tensors[name] = _move(tensor, memory_format)
            devices.append(device)
            return model

        model.to = to
        return model

    return create_on_gpu


def _move(tensor, memory_format):
    moved = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
    moved = moved.to(memory_format=memory_format) if tensor.ndim == 4 else moved
    return torch.nn.Parameter(moved) if isinstance(tensor, torch.nn.Parameter) else moved


def _zero_gradients(model):
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
