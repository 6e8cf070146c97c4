"""A GPU that is not there: tensors without data on a device "cuda", and a watch over what is read.

Torch's fake tensors know shapes, types and devices, and compute nothing. What a program would wait
for, a number read back or a copy between host and device, can be seen without a GPU. Two things
need a real one and are stood in for: the backward pass, and the fused optimizer's kernel.
"""

from contextlib import contextmanager

import torch
from synthetic import mixmo_dls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mixmo_fastai.data.cuts import Augmentation
from mixmo_fastai.learner.build import mixmo_learner
from mixmo_fastai.models import create_model
from mixmo_fastai.rng import make_generator

READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "item")


class Watch(TorchDispatchMode):
    """Notes what would make the host wait for the device, or the device for the host."""

    def __init__(self):
        super().__init__()
        self.seen, self.fused_steps = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        before = {t.device.type for t in args if isinstance(t, torch.Tensor)}
        if name in READS and "cuda" in before:
            self.seen.append("read")
        if name == "_local_scalar_dense":
            return 0.5  # whatever it is: there is none
        if name == "_fused_sgd_":
            # As the kernel asks: parameters, gradients and momenta lie alike.
            for tensors in zip(*filter(None, args[:3]), strict=True):
                assert len({(t.shape, t.stride(), t.device) for t in tensors}) == 1
            self.fused_steps += 1
            return None
        out = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and before | {out.device.type} == {"cpu", "cuda"}:
            self.seen.append("to host" if out.device.type == "cpu" else "to device")
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.seen.append("read")  # a boolean index is a nonzero in disguise
        return out


def _generator(*args, device=None, **kwargs):
    on_gpu = device is not None and torch.device(device).type == "cuda"
    return None if on_gpu else make_generator(*args, device=device, **kwargs)


@contextmanager
def learner_on_gpu(monkeypatch, num_steps, **settings):
    """A Learner whose network and data lie on the GPU, with epochs of so many steps."""
    for module in ("callbacks.draws", "data.loaders"):
        monkeypatch.setattr(f"mixmo_fastai.{module}.make_generator", _generator)
    monkeypatch.setattr("mixmo_fastai.models.create.initialize", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "as_subclass", lambda self, kind: self)
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
    """Make networks where they are sent: fake tensors cannot move within a module."""

    def make(*args, **kwargs):
        model = create(*args, **kwargs)
        sent = []

        def to(device=None, *_, memory_format=None, **__):
            if not sent:
                assert torch.device(device).type == "cuda"
                assert memory_format == torch.channels_last
                for module in model.modules():
                    for tensors in (module._parameters, module._buffers):
                        for name, tensor in tensors.items():
                            if tensor is not None:
                                tensors[name] = _moved(tensor, memory_format)
            sent.append(device)
            return model

        model.to = to
        return model

    return make


def _moved(tensor, layout):
    moved = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
    moved = moved.to(memory_format=layout) if tensor.ndim == 4 else moved
    return torch.nn.Parameter(moved) if isinstance(tensor, torch.nn.Parameter) else moved


def _zero_gradients(model):
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
