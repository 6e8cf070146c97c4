"""The three Learners of the tests of fastai's features, and what their training does."""

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from synthetic import CLASSES, image_arrays, source
from torch import nn

from mixmo_fastai import MixMoCallback, create_model, mixmo_learner, to_mixmo
from mixmo_fastai.data.dataloaders import make_dataloaders


@pytest.fixture
def hidden_plots():
    import matplotlib.pyplot as plt

    before = plt.get_backend()
    plt.switch_backend("agg")
    yield
    plt.close("all")
    plt.switch_backend(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of image files of several sizes, with one folder per class."""
    root = tmp_path_factory.mktemp("blocks")
    pixels, labels = image_arrays(36, size=16)
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        path = root / CLASSES[label] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        image_file = Image.fromarray(image.permute(1, 2, 0).numpy())
        image_file.resize((16 + number % 5, 16 + number % 3), Image.Resampling.NEAREST).save(path)
    return root


def folder_dls(folder):
    return ImageDataLoaders.from_folder(
        folder, valid_pct=0.25, seed=8, bs=6, num_workers=0, device="cpu",
        item_tfms=Resize(16), batch_tfms=aug_transforms(size=12, flip_vert=True),
    )  # fmt: skip


def user_learner(folder, path, *, cbs=(), **kwargs):
    """Build a Learner as fastai users do, with the callback added."""
    dls = folder_dls(folder)
    model = create_model("wrn10_1", dls.c, generator=torch.Generator().manual_seed(3))
    return Learner(
        dls, model, cbs=[MixMoCallback(seed=0), *cbs], metrics=accuracy, path=path, **kwargs
    )


def converted_learner(folder, path, *, cbs=(), **kwargs):
    """Build a plain Learner and convert it."""
    dls = folder_dls(folder)
    layers = (
        [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
        + [nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU()]
        + [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, dls.c)]
    )
    learn = Learner(dls, nn.Sequential(*layers), cbs=[*cbs], metrics=accuracy, path=path, **kwargs)
    return to_mixmo(learn, independent=True, seed=0)


def package_learner(folder, path, *, cbs=(), **kwargs):
    images = source(num_train=48)
    dls = make_dataloaders(images, batch_size=8, valid_split=0.2, device="cpu")
    return mixmo_learner(dls, "wrn10_1", seed=0, cbs=cbs, path=path, **kwargs)


LEARNERS = [user_learner, converted_learner, package_learner]


@pytest.fixture(params=LEARNERS)
def make_learner(request):
    return request.param


@pytest.fixture
def make(make_learner, folder, tmp_path):
    """Return a function that builds a Learner without printed output."""

    def build(**kwargs):
        set_seed(0)  # fastai's loaders shuffle with Python's global generator
        learn = make_learner(folder, tmp_path, **kwargs)
        learn.logger = lambda *_: None
        learn.remove_cbs(ProgressCallback)
        return learn

    return build


@pytest.fixture(scope="module")
def trained_weights():
    """Return the weights of trained Learners, by the functions that build them."""
    return {}


@pytest.fixture
def make_trained(make_learner, make, trained_weights):
    """Return a function that builds a Learner with the weights of a trained one."""

    def build():
        if make_learner not in trained_weights:
            learn = make()
            learn.fit_one_cycle(6, 0.05)
            trained_weights[make_learner] = copy_weights(learn)
        learn = make()
        learn.model.load_state_dict(trained_weights[make_learner])
        return learn

    return build


class StepRecorder(Callback):
    """Record learning rates, losses, gradient norms and dtypes of all training steps."""

    order, run_valid = 60, False  # after fastai's ParamScheduler and Recorder

    def __init__(self):
        super().__init__()
        self.lrs, self.losses, self.norms = [], [], []
        self.dtypes = set()

    def after_pred(self):
        self.dtypes.add(self.learn.pred.dtype)

    def before_step(self):
        gradients = [p.grad for p in self.learn.model.parameters() if p.grad is not None]
        self.norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        self.lrs.append([hyper["lr"] for hyper in self.learn.opt.hypers])

    def after_batch(self):
        self.losses.append(self.learn.loss.item())


def copy_weights(learn):
    return {name: tensor.clone() for name, tensor in learn.model.state_dict().items()}


def equal_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def without_norms(learn, names):
    """Remove the names of normalisation layers, which fastai trainable even when frozen."""
    modules = learn.model.named_modules()
    norms = {name for name, module in modules if isinstance(module, nn.BatchNorm2d)}
    return {name for name in names if name.rpartition(".")[0] not in norms}


def accuracy_of(learn):
    predictions, targets = learn.get_preds()
    return (predictions.argmax(1) == targets).float().mean().item()
