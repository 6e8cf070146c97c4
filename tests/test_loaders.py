from multiprocessing import get_context

import pytest
import torch
from fastai.callback.core import Callback
from fastai.vision.augment import RandomErasing
from PIL import Image
from small_data import write_image_folder
from synthetic import fastai_dls, image_arrays, mixmo_dls, source

from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.data.cuts import STEPS_AT_ONCE, Augmentation
from mixmo_fastai.data.dataloaders import make_dataloaders
from mixmo_fastai.data.image_folder import read_image_folder
from mixmo_fastai.data.loaders import ResidentLoader, StreamingLoader
from mixmo_fastai.data.repeat import expand
from mixmo_fastai.data.splits import split_validation
from mixmo_fastai.data.torchvision_transforms import augmix
from mixmo_fastai.errors import InputError
from mixmo_fastai.learner.build import mixmo_learner


def loader(kind=ResidentLoader, *, bs=10, augmentation=Augmentation(1, True), seed=0, **kwargs):  # noqa: B008
    data = source()
    return kind(
        data.train,
        classes=data.classes,
        mean=data.mean,
        std=data.std,
        bs=bs,
        shuffle=augmentation is not None,
        augmentation=augmentation,
        seed=seed,
        **kwargs,
    )


def batches(dl, copies=1):
    return [(x.clone(), y.clone()) for x, y in expand(dl, copies).loader]


def same(first, second):
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


class TestBothLoaders:
    @pytest.mark.parametrize("copies", [1, 4])
    def test_streaming_gives_what_resident_gives(self, copies):
        resident, streaming = loader(), loader(StreamingLoader)
        assert same(batches(resident, copies), batches(streaming, copies))

    @pytest.mark.parametrize("num_workers", [1, 2])
    def test_the_number_of_workers_does_not_matter(self, num_workers):
        alone = loader(StreamingLoader)
        helped = loader(StreamingLoader, num_workers=num_workers)
        assert same(batches(alone), batches(helped))

    @pytest.mark.parametrize("kind", [ResidentLoader, StreamingLoader])
    def test_an_epoch_shows_every_image_once_but_for_the_rest(self, kind):
        seen = torch.cat([y for _, y in loader(kind)])
        assert len(seen) == 90  # 96 images, batches of 10
        assert len(loader(kind)) == 9

    @pytest.mark.parametrize("kind", [ResidentLoader, StreamingLoader])
    def test_evaluation_is_in_order_and_what_fastai_would_give(self, kind):
        ours = loader(kind, augmentation=None)
        fastais = ours.new(num_workers=0)
        assert type(fastais).__name__ == "TfmdDL"
        for (x, y), (x_item, y_item) in zip(ours, fastais, strict=True):
            torch.testing.assert_close(torch.Tensor(x), torch.Tensor(x_item), atol=1e-5, rtol=1e-5)
            assert torch.equal(torch.Tensor(y), torch.Tensor(y_item))
            assert type(x) is type(x_item)

    def test_normalisation_uses_the_data_sets_figures(self):
        x, _ = loader(augmentation=None).one_batch()
        pixels, _ = image_arrays(96)
        torch.testing.assert_close(torch.Tensor(x), (pixels[:10] / 255 - 0.3) / 0.25)


class TestAugMix:
    @staticmethod
    def batches(seed=0, epoch=0, **kwargs):
        dl = loader(
            StreamingLoader, augmentation=Augmentation(transform=augmix()), seed=seed, **kwargs
        )
        dl.set_epoch(epoch)
        return batches(dl)

    def test_it_changes_images_and_keeps_labels(self):
        plain = batches(loader(StreamingLoader, augmentation=Augmentation()))
        mixed = self.batches()
        assert all(torch.equal(a[1], b[1]) for a, b in zip(plain, mixed, strict=True))
        differing = [not torch.equal(x, y) for (a, _), (b, _) in zip(plain, mixed, strict=True)
                     for x, y in zip(a, b, strict=True)]  # fmt: skip
        assert sum(differing) > 0.9 * len(differing)

    @pytest.mark.slow
    def test_it_follows_seed_and_epoch_and_nothing_else(self):
        first = self.batches()
        torch.rand(3)
        assert same(first, self.batches())
        assert same(first, self.batches(num_workers=2))
        assert not same(first, self.batches(seed=1))
        assert not same(self.batches(epoch=1), self.batches(epoch=2))

    def test_it_leaves_the_global_generator_alone(self):
        before = torch.random.get_rng_state()
        self.batches()
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_training_alone_is_augmented_by_the_streaming_loader(self):
        dls = mixmo_dls(augmentation=Augmentation(transform=augmix()))
        kinds = [type(dl) for dl in dls.loaders]
        assert kinds == [StreamingLoader, ResidentLoader, ResidentLoader]

    def test_the_recipe_has_it(self):
        recipe = resolve_recipe("digits", None, {"model.num_members": 1}, ["data.augmix=true"])
        assert recipe.data.transform == "augmix"
        with pytest.raises(InputError, match=r"data\.loader='streaming' or 'auto'"):
            resolve_recipe("digits", None, {}, ["data.augmix=true", "data.loader=resident"])


class TestOrder:
    def test_epochs_differ_and_can_be_called_back(self):
        dl = loader()
        first, second = batches(dl), batches(dl)
        assert not same(first, second)
        dl.set_epoch(0)
        assert same(batches(dl), first)
        assert same(batches(dl), second)

    def test_a_look_at_one_batch_moves_nothing(self):
        looked, plain = loader(), loader()
        looked.one_batch()
        assert same(batches(looked), batches(plain))

    def test_seeds_differ(self):
        assert not same(batches(loader(seed=0)), batches(loader(seed=1)))


class TestExpansion:
    def test_copies_are_of_the_same_images_in_the_same_places(self):
        view, copies, _ = expand(loader(augmentation=Augmentation()), 3)
        assert copies == 3
        for x, y in view:
            assert len(x) == 30
            assert torch.equal(y.view(3, 10), y[:10].expand(3, 10))
            assert torch.equal(x[:10], x[20:])  # nothing to augment

    def test_one_copy_is_the_loader_itself(self):
        dl = loader()
        assert expand(dl, 1) == (dl, 1, False)

    def test_loaders_that_cannot_augment_copies_stay_as_they_are(self):
        plain = torch.utils.data.DataLoader(torch.arange(6), batch_size=3)
        assert expand(plain, 4) == (plain, 1, False)

    def test_fastais_loaders_repeat_before_their_batch_transforms(self):
        dl = fastai_dls(after_batch=[RandomErasing(p=1.0, sl=0.2, min_aspect=1.0)]).train
        view, copies, _ = expand(dl, 4)
        assert (len(view), copies) == (len(dl), 4)
        for x, y in view:
            assert torch.equal(y.view(4, 12), y[:12].expand(4, 12))
            assert len(x.flatten(1).unique(dim=0)) == 48
        assert len(dl.one_batch()[0]) == 12

    @pytest.mark.slow
    @pytest.mark.parametrize("start", ["fork", "spawn"])
    def test_fastais_workers_are_started_either_way(self, start, monkeypatch):
        dl = fastai_dls(num_workers=1).train
        monkeypatch.setattr("fastai.data.load.multiprocessing", get_context(start))
        sizes = [len(x) for x, _ in expand(dl, 2).loader]
        assert sizes == [24] * 8


class TestGlobalState:
    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_streaming_leaves_the_global_generator_alone(self, num_workers):
        before = torch.random.get_rng_state()
        list(loader(StreamingLoader, num_workers=num_workers))
        assert torch.equal(torch.random.get_rng_state(), before)


class TestMakeDataloaders:
    def test_three_parts(self):
        dls = mixmo_dls()
        assert [len(dl.images) for dl in dls.loaders] == [87, 9, 30]
        assert dls.c == 3
        assert list(dls.vocab) == ["red", "green", "blue"]

    def test_without_validation_split(self):
        dls = mixmo_dls(valid_split=0)
        assert len(dls.valid) == 0
        assert list(dls.valid) == []

    def test_the_validation_split_does_not_depend_on_the_limit(self):
        whole, limited = mixmo_dls(), mixmo_dls(limit=30)
        assert torch.equal(whole.valid.images.indices, limited.valid.images.indices)

    def test_choice_of_the_loader(self, monkeypatch):
        assert isinstance(mixmo_dls().train, ResidentLoader)
        assert isinstance(mixmo_dls(loader="streaming").train, StreamingLoader)
        monkeypatch.setattr("mixmo_fastai.data.dataloaders.HOST_BUDGET", 1000)
        assert isinstance(mixmo_dls().train, StreamingLoader)

    def test_a_split_of_one_image_per_class_is_refused(self):
        with pytest.raises(InputError, match=r"no class has two .*\n.*\n.*--valid-split 0\."):
            split_validation(source(num_train=3).train, 0.2)

    def test_too_few_images_for_a_batch(self):
        told = "87 training images do not fill one batch of 100 .*\n.*batch_size to 87 or less"
        with pytest.raises(InputError, match=told):
            make_dataloaders(source(), batch_size=100, valid_split=0.1)


class TestFastaisViews:
    def test_predict_shows_the_network_an_image_like_those_of_training(self, tmp_path):
        learn = mixmo_learner(mixmo_dls(), "wrn10_1", seed=0)
        learn.remove_cb(learn.progress)
        with learn.no_logging():
            learn.fit_one_cycle(4, 0.05)
        pixels = learn.dls.valid.images[3].permute(1, 2, 0).numpy()
        label = ["red", "green", "blue"][int(learn.dls.valid.images.labels[3])]
        big = Image.fromarray(pixels).resize((40, 40), Image.Resampling.NEAREST)
        big.save(tmp_path / "big.png")
        for item in (pixels, big, tmp_path / "big.png", str(tmp_path / "big.png")):
            name, index, probabilities = learn.predict(item)
            assert name == label == ["red", "green", "blue"][int(index)]
            assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
        shown = learn.dls.test_dl([big, pixels], num_workers=0).one_batch()[0]
        assert shown.shape == (2, 3, 8, 8)

    def test_an_exported_learner_leaves_the_images_behind(self, tmp_path):
        data = source(num_train=3000, num_test=30, size=32)
        dls = make_dataloaders(data, batch_size=16, device="cpu")
        learn = mixmo_learner(dls, "wrn10_1", seed=0, path=tmp_path)
        learn.export("learner.pkl")
        assert (tmp_path / "learner.pkl").stat().st_size < 2**20  # the images take 9 MB

    def test_a_loader_moves_with_all_it_holds(self):
        for kind in (ResidentLoader, StreamingLoader):
            dl = loader(kind)
            dl.to("meta")
            held = [dl.normalizer.scale, dl.normalizer.shift]
            held += [dl.stored.pixels, dl.labels] if kind is ResidentLoader else []
            assert {tensor.device.type for tensor in held} == {"meta"}
        assert dl.device.type == "meta"

    def test_batches_are_shown(self):
        import fastai.vision.data  # noqa: F401
        import matplotlib as mpl
        import matplotlib.pyplot as plt

        mpl.use("agg")
        mixmo_dls().train.show_batch(max_n=4)
        titles = [axes.get_title() for axes in plt.gcf().axes]
        plt.close("all")
        assert len(titles) == 4
        assert set(titles) <= {"red", "green", "blue"}


class TestDamage:
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_an_image_that_cannot_be_read_is_named_from_a_worker_too(self, tmp_path, num_workers):
        folder = write_image_folder(tmp_path / "images")
        images = read_image_folder(folder, tmp_path, cache_limit=0).train
        dl = StreamingLoader(
            images,
            classes=("a", "b"),
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            bs=2,
            num_workers=num_workers,
        )
        (folder / images.names[-1]).write_bytes(b"no image")
        with pytest.raises(InputError, match=images.names[-1]) as caught:
            list(dl)
        assert len(str(caught.value).splitlines()) <= 3


class TestArrangement:
    """A batch whose positions show the slots that were asked for."""

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", [ResidentLoader, StreamingLoader])
    @pytest.mark.parametrize("alternating", [False, True])
    def test_arranged_batches_are_the_plain_ones_in_another_order(self, kind, alternating):
        augmentation = Augmentation(1, True, alternating_flip=alternating)
        orders = {}

        def arrange(first_step, num_images):
            generator = torch.Generator().manual_seed(first_step)
            slots = torch.randint(4 * num_images, (STEPS_AT_ONCE, 70), generator=generator)
            orders.update(enumerate(slots, start=first_step))
            return slots

        plain = batches(loader(kind, bs=5, augmentation=augmentation), 4)
        dl = loader(kind, bs=5, augmentation=augmentation)
        arranged = [*dl.expanded(4, arrange)]
        assert len(arranged) == len(plain) > STEPS_AT_ONCE
        for step, ((x, y), (plain_x, plain_y)) in enumerate(zip(arranged, plain, strict=True)):
            assert torch.equal(x, plain_x[orders[step]])
            assert torch.equal(y, plain_y[orders[step]])

    @pytest.mark.slow
    def test_alternating_flips_show_an_image_both_ways(self):
        dl = loader(augmentation=Augmentation(0, True, alternating_flip=True))
        for x, _ in dl.expanded(4):
            copies = x.view(4, 10, *x.shape[1:])
            assert torch.equal(copies[0], copies[2])
            assert torch.equal(copies[1], copies[0].flip(-1))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "settings",
        [{}, {"input_repetition": 0.5}, {"batch_repetitions": 1}, {"early_repetition": 1.0}],
    )
    def test_the_callback_trains_on_what_it_would_have_picked_itself(self, settings, monkeypatch):
        """Asked in advance, the loader shows what the callback would pick out of a plain batch."""

        def plain_view(dl, copies, arrange):
            return expand(dl, copies)

        found = []
        for view in (expand, plain_view):
            monkeypatch.setattr("mixmo_fastai.callbacks.mixmo.expand", view)
            dls = mixmo_dls(augmentation=Augmentation(1, True))
            seen = SeenBatches()
            learn = mixmo_learner(dls, "wrn10_1", seed=3, cbs=seen, **settings)
            with learn.no_bar(), learn.no_logging():
                learn.fit(1, 0.0)
            assert learn.mix_mo.is_paired_by_loader == (view is expand)
            found.append(seen.batches)
        assert len(found[0]) > 2
        for ours, plain in zip(*found, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


class SeenBatches(Callback):
    """Keeps what the network is trained on."""

    order, run_valid = 30, False

    def __init__(self):
        super().__init__()
        self.batches = []

    def before_batch(self):
        self.batches.append([part.clone() for part in (*self.learn.xb, *self.learn.yb)])
