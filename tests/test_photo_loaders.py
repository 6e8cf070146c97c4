"""Training on photographs: crops of the files by the streaming loader, and their setting."""

import pickle

import numpy as np
import pytest
import torch
from photos import (
    read_upright,
    smooth_image,
    write_photos,
)
from short_runs import assert_same, fit
from torchvision.transforms.v2 import functional as tv

from mixmo_fastai.cli.render import setup_lines
from mixmo_fastai.config.load import override, recipe_from_mapping
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.data import decoding
from mixmo_fastai.data.cuts import Augmentation
from mixmo_fastai.data.dataloaders import make_dataloaders
from mixmo_fastai.data.image_folder import read_image_folder
from mixmo_fastai.data.image_sets import ArrayImages, files_of
from mixmo_fastai.data.loaders import ResidentLoader, StreamingLoader
from mixmo_fastai.data.pixel_reader import pixel_reader
from mixmo_fastai.data.resized_crop import random_resized_crop
from mixmo_fastai.errors import InputError
from mixmo_fastai.rng import make_generator
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.training.prepare import prepare

SIDE = 16


def pixels_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def difference(first, second):
    return (first.int() - second.int()).abs().float()


def torchvision_crop(image, box, side=SIDE):
    top, left, height, width = box
    return tv.resized_crop(image, top, left, height, width, [side, side])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos") / "photos", per_class=12)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def train_loader(photos, home):
    """Return a function that builds a loader of crops from the files of the training images."""

    def build(*, flip=False, batch_size=4, seed=0, num_workers=0, cache_limit=2**30, limit=0):
        source = read_image_folder(photos, home, image_size=SIDE, cache_limit=cache_limit)
        return make_dataloaders(
            source,
            batch_size=batch_size,
            valid_split=0.1,
            limit=limit,
            augmentation=Augmentation(flip=flip, transform=random_resized_crop().from_original()),
            seed=seed,
            device="cpu",
            num_workers=num_workers,
        ).train

    return build


def batches(loader, *args, epoch=0, **kwargs):
    loader.set_epoch(epoch)
    return [(torch.Tensor(x), y.clone()) for x, y in loader.batches(*args, **kwargs)]


def same(first, second):
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


class TestStreaming:
    def test_batches_are_those_of_torchvision_for_the_same_boxes(self, train_loader):
        loader, copies, epoch = train_loader(), 3, 5
        files, transform = files_of(loader.images), loader.augmentation.transform
        order = loader.order(epoch).split(4)
        found = batches(loader, copies, epoch=epoch)
        assert len(found) == 5
        for (x, y), indices in zip(found, order, strict=False):
            assert torch.equal(y, loader.images.labels[indices].repeat(copies))
            pixels = (x * loader.std.view(3, 1, 1) + loader.mean.view(3, 1, 1)) * 255
            for position, index in enumerate(indices.tolist()):
                upright = read_upright(files.root / files.names[index])
                generator = make_generator(0, "transform", epoch, index)
                drawn = transform.draw(copies, upright.size[::-1], generator)
                for copy in range(copies):
                    expected = pixels_of(torchvision_crop(upright, drawn[copy].tolist()))
                    window = pixels[copy * 4 + position].round()
                    # The photographs are too small for JPEG files to be reduced by much.
                    assert difference(window, expected).mean() < 3

    def test_boxes_reach_beyond_the_centre(self, tmp_path):
        """A wide image is red at its ends, which no centre crop shows."""
        wide = np.zeros((40, 200, 3), np.uint8)
        wide[:, :70] = wide[:, 130:] = (255, 0, 0)
        for name in ("a/0", "a/1", "b/0", "b/1"):
            path = tmp_path / f"wide/train/{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            decoding.Image.fromarray(wide).save(path)
        source = read_image_folder(tmp_path / "wide", tmp_path, image_size=SIDE, test_split=0)
        assert not source.train.tensor()[:, 0].any()
        crops = Augmentation(transform=random_resized_crop().from_original())
        dls = make_dataloaders(
            source, batch_size=4, valid_split=0, augmentation=crops, device="cpu", num_workers=0
        )
        red = [(x[:, 0].mean((1, 2)) > 1).sum() for _ in range(10) for x, _ in dls.train]
        assert sum(red) > 10

    @pytest.mark.slow
    @pytest.mark.parametrize("num_workers", [1, 2])
    def test_workers_do_not_change_batches(self, train_loader, num_workers):
        alone = batches(train_loader(flip=True), 2)
        assert same(alone, batches(train_loader(flip=True, num_workers=num_workers), 2))

    def test_a_pass_that_begins_later_yields_the_same_batches(self, train_loader):
        loader = train_loader(flip=True, batch_size=1)
        whole = batches(loader, 2, epoch=3)
        assert len(whole) > 17
        for step in (1, 15, 16, 17):
            assert same(whole[step:], batches(loader, 2, epoch=3, first_step=step))

    def test_draws_are_those_of_the_image_in_any_batch(self, train_loader):
        by_size = []
        for size in (1, 5):
            loader = train_loader(batch_size=size)
            order = loader.order(0).tolist()
            windows = torch.cat([x for x, _ in batches(loader)])
            by_size.append(dict(zip(order, windows, strict=False)))
        assert all(torch.equal(by_size[0][index], window) for index, window in by_size[1].items())

    def test_workers_can_be_started_without_fork(self, train_loader):
        """As on macOS and Windows, where the reader is sent to them."""
        loader = train_loader()
        transform = loader.augmentation.transform
        read = pixel_reader(loader.images, transform, copies=2, seed=0, epoch=1)
        sent = pickle.loads(pickle.dumps(read))
        assert torch.equal(sent([3, 0]), read([3, 0]))

    def test_cached_pixels_do_not_matter(self, train_loader):
        assert same(batches(train_loader()), batches(train_loader(cache_limit=0)))

    def test_draws_follow_seed_and_epoch_and_leave_global_generators_alone(self, train_loader):
        before = torch.random.get_rng_state()
        first = batches(train_loader())
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.rand(3)
        assert same(first, batches(train_loader()))
        assert not same(first, batches(train_loader(), epoch=1))
        assert not same(first, batches(train_loader(seed=1)))

    def test_slots_are_arranged_like_those_of_other_loaders(self, train_loader):
        """Half of the slots, as of one of two processes."""
        loader = train_loader(flip=True)
        slots = torch.randperm(12, generator=torch.Generator().manual_seed(0))[:6]
        arranged = batches(loader, 3, lambda step, count: slots.expand(16, -1))
        expected = [(x[slots], y[slots]) for x, y in batches(loader, 3)]
        assert same(arranged, expected)

    def test_flips_mirror_windows(self, train_loader):
        plain, flipped = (batches(train_loader(flip=flip), 2) for flip in (False, True))
        mirrored = 0
        for (x, _), (y, _) in zip(plain, flipped, strict=True):
            for first, second in zip(x, y, strict=True):
                is_mirrored = torch.equal(first.flip(2), second)
                assert is_mirrored or torch.equal(first, second)
                mirrored += is_mirrored
        assert 5 < mirrored < 35

    @pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
    def test_a_file_damaged_during_training_is_named(self, tmp_path, num_workers):
        folder = write_photos(tmp_path / "photos")
        source = read_image_folder(folder, tmp_path / "home", image_size=SIDE)
        (folder / source.train.name(2)).write_bytes(b"no image")
        dls = make_dataloaders(
            source,
            batch_size=8,
            valid_split=0,
            augmentation=Augmentation(transform=random_resized_crop().from_original()),
            device="cpu",
            num_workers=num_workers,
        )
        with pytest.raises(InputError, match=source.train.name(2)):
            list(dls.train)

    def test_images_without_files_are_refused(self, photos, home):
        source = read_image_folder(photos, home, image_size=SIDE)
        images = source.train
        names = tuple(map(images.name, range(len(images))))
        arrays = ArrayImages(images.tensor(), images.labels, names)
        source = type(source)(**{**vars(source), "train": arrays})
        crops = Augmentation(transform=random_resized_crop().from_original())
        with pytest.raises(InputError, match="need images that are files"):
            make_dataloaders(source, batch_size=4, augmentation=crops, device="cpu")
        with pytest.raises(InputError, match="streaming"):
            make_dataloaders(
                source, batch_size=4, augmentation=crops, device="cpu", loader="resident"
            )


CROP = "data.transform=random-resized-crop"


def recipe_for(folder, *assignments):
    settings = {"model.arch": "wrn10_1", "train.epochs": 2, "train.batch_size": 8}
    settings |= {"train.device": "cpu", "mix.batch_repetitions": 2, "data.valid_split": 0.1}
    assignments = [f"data.image_size={SIDE}", "data.num_workers=0", *assignments]
    return resolve_recipe(str(folder), None, settings, assignments)


class TestRecipes:
    @pytest.mark.parametrize(
        ("assignments", "crop_from", "kind"),
        [
            ([CROP], "original", StreamingLoader),
            ([CROP, "data.crop_from=original"], "original", StreamingLoader),
            ([CROP, "data.crop_from=resized"], "resized", ResidentLoader),
            ([CROP, "data.loader=resident"], "auto", ResidentLoader),
            ([CROP, "data.loader=streaming"], "original", StreamingLoader),
            ([], "auto", ResidentLoader),
        ],
        ids=str,
    )
    def test_photographs_are_cropped_from_their_files(
        self, photos, home, assignments, crop_from, kind
    ):
        training = prepare(recipe_for(photos, *assignments), home)
        assert training.recipe.data.crop_from == crop_from
        train, *others = training.learn.dls.loaders
        assert type(train) is kind
        if "data.loader=streaming" not in assignments:
            assert {type(loader) for loader in others} == {ResidentLoader}

    def test_images_of_one_size_are_cropped_as_before(self, tmp_path):
        for label in ("cat", "dog"):
            for index in range(10):
                path = tmp_path / f"small/{label}/{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                smooth_image(SIDE, SIDE, index).save(path)
        training = prepare(recipe_for(tmp_path / "small", CROP), tmp_path / "home")
        assert training.recipe.data.crop_from == "auto"
        assert isinstance(training.learn.dls.train, ResidentLoader)

    @pytest.mark.parametrize("crop_from", ["original", "resized"])
    def test_the_plan_names_the_original_files(self, photos, home, crop_from):
        training = prepare(recipe_for(photos, CROP, f"data.crop_from={crop_from}"), home)
        (line,) = [line for line in setup_lines(training) if line.startswith("Method")]
        assert ("RandomResizedCrop of the original files" in line) == (crop_from == "original")

    def test_options_reach_the_crops(self, photos, home):
        whole = [f"data.transform_options.{text}" for text in ("scale=[1, 1]", "ratio=[0.1, 10]")]
        training = prepare(recipe_for(photos, CROP, *whole), home)
        transform = training.learn.dls.train.augmentation.transform
        drawn = transform.draw(20, (30, 50), torch.Generator().manual_seed(0))
        assert (drawn[:, 2] * drawn[:, 3]).min() == 1500

    @pytest.mark.parametrize(
        ("assignments", "message"),
        [
            (["data.crop_from=original"], "no effect"),
            ([CROP, "data.crop_from=original", "data.loader=resident"], "'streaming' or 'auto'"),
            ([CROP, "data.crop_from=centre"], r"data\.crop_from"),
        ],
        ids=str,
    )
    def test_settings_without_effect_are_refused(self, photos, assignments, message):
        with pytest.raises(InputError, match=message):
            recipe_for(photos, *assignments)

    def test_data_without_files_cannot_be_cropped_from_them(self):
        settings = {"train.device": "cpu", "model.arch": "wrn10_1"}
        recipe = resolve_recipe("digits", None, settings, [CROP, "data.crop_from=original"])
        with pytest.raises(InputError, match=r"data\.crop_from"):
            prepare(recipe)

    @pytest.mark.slow
    @pytest.mark.parametrize("stop_at", [(0, 2), (1, 1)], ids=str)
    def test_runs_are_resumed_exactly(self, photos, home, tmp_path, stop_at):
        recipe = prepare(recipe_for(photos, CROP), home).recipe

        def prepare_at_home(recipe):
            return prepare(recipe, home)

        whole, stopped = (create_run(recipe, tmp_path / name) for name in ("whole", "stopped"))
        steps = fit(whole, prepare=prepare_at_home)
        first = fit(stopped, stop_at, prepare=prepare_at_home)
        assert first + fit(stopped, resume=True, prepare=prepare_at_home) == steps
        assert_same(whole, stopped)

    @pytest.mark.slow
    def test_runs_from_before_the_setting_keep_their_crops(self, photos, home, tmp_path):
        resolved = prepare(recipe_for(photos, CROP, "data.crop_from=resized"), home).recipe
        old = override(resolved, ["data.crop_from=auto"])
        run = create_run(old, tmp_path / "old")
        text = (run.path / "recipe.toml").read_text().splitlines()
        kept = [line for line in text if not line.startswith("crop_from")]
        assert len(kept) == len(text) - 1
        (run.path / "recipe.toml").write_text("\n".join(kept) + "\n")
        training = prepare(run.recipe(), home, run)
        assert training.recipe.data.crop_from == "auto"
        assert isinstance(training.learn.dls.train, ResidentLoader)
        assert prepare(recipe_from_mapping({}, "x")).recipe.data.crop_from == "auto"
