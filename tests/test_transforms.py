"""Transforms of whole training images."""

import random

import numpy as np
import pytest
import torch
from synthetic import mixmo_dls
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import resized_crop

from mixmo_fastai.config.choices import TRANSFORMS
from mixmo_fastai.config.load import recipe_from_mapping
from mixmo_fastai.config.methods import method_name
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.data.cuts import Augmentation
from mixmo_fastai.data.loaders import ResidentLoader, StreamingLoader
from mixmo_fastai.data.resized_crop import (
    default_scale,
    draw_boxes,
    random_resized_crop,
    resize_boxes,
)
from mixmo_fastai.data.torchvision_transforms import rand_augment
from mixmo_fastai.data.transforms import BatchTransform, ImageTransform, build_transform
from mixmo_fastai.errors import InputError
from mixmo_fastai.training.prepare import prepare

BUILT = [name for name, info in TRANSFORMS.items() if info.target is not None]
PER_IMAGE = [name for name in BUILT if TRANSFORMS[name].is_per_image]
BATCHED = [name for name in BUILT if not TRANSFORMS[name].is_per_image]
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(seed))


def train_batches(name, *, epoch=0, seed=0, loader="auto", copies=1, first_step=0, **settings):
    augmentation = Augmentation(transform=build_transform(name, image_shape=(3, 16, 16)))
    dls = mixmo_dls(augmentation=augmentation, seed=seed, loader=loader, **settings)
    dls.train.set_epoch(epoch)
    return [torch.Tensor(x) for x, _ in dls.train.batches(copies, first_step=first_step)]


def equal(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


class TestRegistry:
    @pytest.mark.parametrize("name", BUILT)
    def test_registry_names_the_kind_of_each_transform(self, name):
        kind = ImageTransform if TRANSFORMS[name].is_per_image else BatchTransform
        assert isinstance(build_transform(name), kind)

    @pytest.mark.parametrize("name", ["none", "standard"])
    def test_crop_and_flip_are_not_transforms(self, name):
        assert build_transform(name) is None

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("name", BUILT)
    def test_every_transform_keeps_shape_and_type(self, name, channels):
        transform = build_transform(name, image_shape=(channels, 9, 12))
        images = random_images(5, channels, 9, 12)
        if isinstance(transform, ImageTransform):
            results = torch.stack([transform.seeded(0, 0)(image, 0) for image in images])
        else:
            results = transform.function(images.clone(), generator())
        assert results.shape == images.shape
        assert results.dtype == torch.uint8
        assert not torch.equal(results, images)

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("randaugmnt", {}, "Did you mean 'randaugment'"),
            ("randaugment", {"magnitud": 3}, "Did you mean 'magnitude'"),
            ("trivialaugment", {"num_ops": 3}, "Allowed: num_magnitude_bins"),
            ("standard", {"padding": 3}, "Allowed: none"),
            ("augmix", {"severity": 11}, "'augmix': severity must be from 1 to 10; got 11"),
            ("augmix", {"alpha": 0}, "alpha must be a number above 0; got 0"),
            ("augmix", {"chain_depth": 0}, "chain_depth, if it is not -1, must be an integer"),
            ("randaugment", {"magnitude": 31}, "magnitude must be below num_magnitude_bins=31"),
            ("randaugment", {"magnitude": "high"}, "magnitude must be an integer, 0 or more"),
            ("randaugment", {"num_ops": -1}, "num_ops must be an integer, 1 or more; got -1"),
            ("trivialaugment", {"num_magnitude_bins": 1}, "an integer, 2 or more; got 1"),
            (
                "aug-transforms",
                {"max_rotate": "wide"},
                r"with options {'max_rotate': 'wide'} fails",
            ),
            ("random-resized-crop", {"scale": [0.5, 2]}, "scale must be two numbers"),
            ("random-resized-crop", {"ratio": [2, 0.5]}, "ratio must be two numbers"),
            ("random-resized-crop", {"scale": 2}, "scale must be two numbers"),
            ("aug-transforms", {"do_flip": True}, r"Use data\.flip"),
            ("aug-transforms", {"size": 8}, r"Use data\.image_size"),
            ("aug-transforms", {"max_rotat": 8}, "max_rotate"),
        ],
    )
    def test_wrong_names_and_options_are_explained(self, name, options, message):
        with pytest.raises(InputError, match=message):
            build_transform(name, options)

    @pytest.mark.parametrize("name", PER_IMAGE)
    def test_unsupported_channels_are_explained(self, name):
        with pytest.raises(InputError, match=r"shape \(5, 8, 8\)"):
            build_transform(name, image_shape=(5, 8, 8))


@pytest.mark.parametrize("transform", ["randaugment", rand_augment, lambda image: image])
def test_other_objects_are_no_transforms(transform):
    with pytest.raises(InputError, match=r"BatchTransform or an ImageTransform"):
        Augmentation(transform=transform)


class TestRandomResizedCrop:
    @pytest.mark.parametrize(
        ("size", "smallest"), [((8, 8), 25 / 64), ((16, 16), 25 / 256), ((32, 32), 0.08)]
    )
    def test_default_areas_leave_enough_pixels(self, size, smallest):
        assert default_scale(*size) == (pytest.approx(smallest), 1.0)
        images = random_images(300, 3, *size)
        explicit = random_resized_crop(scale=default_scale(*size)).function(images, generator(1))
        assert torch.equal(random_resized_crop().function(images, generator(1)), explicit)

    def test_tiny_images_are_not_cropped_by_default(self):
        assert default_scale(4, 4) == (1.0, 1.0)

    @pytest.mark.parametrize("size", [(16, 16), (11, 24)])
    def test_boxes_are_resized_as_by_torchvision(self, size):
        images = random_images(200, 3, *size)
        boxes = draw_boxes(200, size, SCALE, RATIO, generator(1))
        expected = torch.stack(
            [
                resized_crop(image, *box, size=list(size), antialias=True)
                for image, box in zip(images.double(), boxes.tolist(), strict=True)
            ]
        )
        difference = (resize_boxes(images, boxes) - expected).abs()
        assert float(difference.max()) <= 0.5 + 1e-3  # rounded to uint8

    def test_the_whole_image_is_unchanged(self):
        images = random_images(4, 1, 9, 7)
        whole = torch.tensor([0, 0, 9, 7]).expand(4, 4)
        assert torch.equal(resize_boxes(images, whole), images)

    @pytest.mark.parametrize("size", [(32, 32), (20, 48)])
    @pytest.mark.parametrize("scale", [SCALE, (0.6, 0.9)])
    def test_boxes_are_distributed_as_in_torchvision(self, size, scale):
        count = 4000
        boxes = draw_boxes(count, size, scale, RATIO, generator(3)).double()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(5)
            image = torch.zeros(1, *size)
            drawn = [
                RandomResizedCrop.get_params(image, list(scale), list(RATIO)) for _ in range(count)
            ]
        expected = torch.tensor(drawn).double()
        spread = (boxes.var(dim=0) + expected.var(dim=0)).sqrt() / count**0.5
        assert bool(((boxes.mean(dim=0) - expected.mean(dim=0)).abs() < 4 * spread + 1e-9).all())
        torch.testing.assert_close(boxes.std(dim=0), expected.std(dim=0), rtol=0.06, atol=0.02)

    def test_boxes_lie_within_the_image(self):
        top, left, height, width = draw_boxes(5000, (13, 9), SCALE, RATIO, generator()).T
        assert int(min(top.min(), left.min())) == 0
        assert int(min(height.min(), width.min())) >= 1
        assert int((top + height).max()) <= 13
        assert int((left + width).max()) <= 9

    @pytest.mark.parametrize(("size", "box"), [((4, 40), [0, 17, 4, 5]), ((40, 4), [17, 0, 5, 4])])
    def test_images_that_no_box_fits_are_cropped_in_the_centre(self, size, box):
        boxes = draw_boxes(6, size, (1.0, 1.0), RATIO, generator())
        assert boxes.tolist() == [box] * 6
        image = torch.zeros(1, *size)
        assert list(RandomResizedCrop.get_params(image, [1.0, 1.0], list(RATIO))) == box


class TestLoaders:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", BUILT)
    def test_batches_follow_seed_and_epoch(self, name):
        batches = train_batches(name)
        torch.rand(3)
        random.random()
        assert equal(batches, train_batches(name))
        assert not equal(batches, train_batches(name, seed=1))
        assert not equal(batches, train_batches(name, epoch=1))

    @pytest.mark.parametrize("name", BUILT)
    def test_global_generators_are_left_alone(self, name):
        train = mixmo_dls(augmentation=Augmentation(transform=build_transform(name))).train
        before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        assert len([*train.batches()]) > 1
        assert torch.equal(torch.random.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[2]).all()
        if name in BATCHED:  # fastai's loader, which runs the workers, seeds itself from `random`
            assert random.getstate() == before[1]

    @pytest.mark.slow
    @pytest.mark.parametrize("name", BUILT)
    def test_a_pass_that_begins_later_yields_the_same_batches(self, name):
        whole = train_batches(name, batch_size=2)
        assert len(whole) > 20
        for step in (1, 16):
            assert equal(train_batches(name, batch_size=2, first_step=step), whole[step:])

    @pytest.mark.parametrize("name", BATCHED)
    def test_both_loaders_yield_the_same_batches(self, name):
        assert equal(
            train_batches(name, loader="resident"),
            train_batches(name, loader="streaming", num_workers=0),
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("name", PER_IMAGE)
    def test_workers_do_not_change_batches(self, name):
        assert equal(train_batches(name, num_workers=0), train_batches(name, num_workers=2))

    def test_copies_of_an_image_are_transformed_separately(self):
        (first, *_) = train_batches("random-resized-crop", copies=2)
        assert not torch.equal(*first.chunk(2))
        (first, *_) = train_batches("augmix", copies=2)
        assert torch.equal(*first.chunk(2))

    @pytest.mark.parametrize("name", PER_IMAGE)
    def test_transforms_of_single_images_use_the_streaming_loader_in_training(self, name):
        augmentation = Augmentation(transform=build_transform(name))
        kinds = [type(loader) for loader in mixmo_dls(augmentation=augmentation).loaders]
        assert kinds == [StreamingLoader, ResidentLoader, ResidentLoader]
        with pytest.raises(InputError, match="streaming"):
            mixmo_dls(augmentation=augmentation, loader="resident")

    @pytest.mark.parametrize("name", BUILT)
    def test_validation_images_are_not_transformed(self, name):
        augmentation = Augmentation(transform=build_transform(name))
        plain, transformed = mixmo_dls(), mixmo_dls(augmentation=augmentation)
        for (x, _), (y, _) in zip(plain.valid, transformed.valid, strict=True):
            assert torch.equal(x, y)


def digits(*assignments):
    return resolve_recipe("digits", None, {"train.device": "cpu"}, assignments)


class TestRecipes:
    @pytest.mark.parametrize("name", TRANSFORMS)
    def test_crop_and_flip_are_those_of_the_transform(self, name):
        info = TRANSFORMS[name]
        training = prepare(digits(f"data.transform={name}", "model.arch=wrn10_1"))
        assert training.recipe.data.crop_padding == (1 if info.crops else 0)
        assert training.recipe.data.flip is False  # digits must not be mirrored
        assert (training.learn.dls.train.augmentation.transform is not None) == bool(info.target)

    def test_resolved_recipes_are_recipes(self):
        training = prepare(digits("data.transform=none", "model.arch=wrn10_1"))
        again = prepare(training.recipe).recipe
        assert again.data == training.recipe.data

    @pytest.mark.parametrize(
        ("assignments", "message"),
        [
            (["data.transform=cutout"], "data.transform"),
            (["data.transform=randaugment", "data.loader=resident"], "'streaming' or 'auto'"),
            (["data.transform=random-resized-crop", "data.crop_padding=4"], r"data\.crop_padding"),
            (["data.transform=none", "data.flip=true"], r"data\.flip has no effect"),
            (["data.transform_options.magnitude=3"], "has no options"),
        ],
    )
    def test_settings_without_effect_are_refused(self, assignments, message):
        with pytest.raises(InputError, match=message):
            digits(*assignments)

    def test_options_reach_the_transform(self):
        recipe = digits("data.transform=randaugment", "data.transform_options.magnitude=3")
        transform = prepare(recipe).learn.dls.train.augmentation.transform
        assert transform.function.magnitude == 3
        wrong = digits("data.transform=randaugment", "data.transform_options.magnitud=3")
        with pytest.raises(InputError, match=r"data\.transform: .*magnitude"):
            prepare(wrong)

    def test_the_name_of_the_method_has_the_transform(self):
        assert method_name(digits("data.transform=randaugment")) == "Cut-MixMo + RandAugment"
        assert method_name(digits("data.transform=none")) == "Cut-MixMo"

    @pytest.mark.parametrize(("augmix", "name"), [(True, "augmix"), (False, "standard")])
    def test_augmix_of_version_0_1_0_is_read(self, augmix, name):
        recipe = recipe_from_mapping({"data": {"augmix": augmix}}, "recipe.toml")
        assert recipe.data.transform == name
        recipe = digits("data.transform=augmix", f"data.augmix={str(augmix).lower()}")
        assert recipe.data.transform == name
