import dataclasses
import math
import re
from pathlib import Path

import pytest
from small_data import write_image_folder

from mixmo_fastai.cli import run
from mixmo_fastai.config.defaults import (
    DEFAULTS,
    MAX_CPU_SIDE,
    MAX_VIEWS,
    MIN_IMAGES_SEEN,
    MIN_VIEWS,
    MIN_WIDTH,
    SHORT_SETTINGS,
    default_for,
    fill_defaults,
    has_short_settings,
    images_per_epoch,
    open_settings,
    unmet_requirement,
)
from mixmo_fastai.config.load import load_recipe, override, recipe_from_mapping, recipe_names
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.errors import InputError
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.train import train

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
FOLDER = recipe_from_mapping({"data": {"dataset": "/a/folder"}}, "here")
QUICK = ("--batch-size", "16", "--device", "cpu", "--quiet")


@pytest.fixture(autouse=True)
def working_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MIXMO_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_defaults(recipe, *, side=32, num_images=1000, device="cpu", **more):
    shape = (3, side, side)
    return fill_defaults(recipe, device=device, image_shape=shape, num_images=num_images, **more)


def test_table_in_the_docs_matches_the_code():
    rows = re.findall(
        r"^\| (\d+ px|any) \| `(\w+)` \| ([\d,]+) \| `(\w+)` \| ([\d,]+) \|$", PAGE, re.M
    )
    assert len(rows) == 4
    for max_side, *documented in rows:
        side = 1000 if max_side == "any" else int(max_side.removesuffix(" px"))
        defaults = [default_for(device, (3, side, side)) for device in ("cpu", "cuda")]
        assert documented == [
            text for row in defaults for text in (row.arch, f"{row.images_seen:,}")
        ]
    sides = {int(max_side.removesuffix(" px")) for max_side, *_ in rows if max_side != "any"}
    limits = {row.side for table in DEFAULTS.values() for row in table if row.side < math.inf}
    assert limits <= sides  # each row of the code has a row in the docs


@pytest.mark.parametrize(
    "text",
    [f"{MIN_IMAGES_SEEN:,} images seen", f"{MIN_VIEWS} views of each", f"width of {MIN_WIDTH}"],
)
def test_limits_in_the_docs_match_the_code(text):
    assert text in PAGE
    assert f"{MAX_VIEWS:,} times" in PAGE
    assert f"a side above {MAX_CPU_SIDE} px" in PAGE


@pytest.mark.parametrize(
    ("side", "device", "arch"),
    [
        (8, "cpu", "wrn10_4"),
        (20, "cpu", "wrn10_4"),
        (33, "cpu", "wrn10_4"),
        (64, "cpu", "resnet18"),
        (32, "cuda", "wrn16_8"),
        (64, "cuda", "preact_resnet18_2"),
        (224, "cuda", "resnet50"),
    ],
)
def test_default_network_depends_on_image_size_and_device(side, device, arch):
    assert with_defaults(FOLDER, side=side, device=device).model.arch == arch


def test_image_size_is_the_square_root_of_the_area():
    assert default_for("cpu", (3, 10, 160)) == default_for("cpu", (3, 40, 40))
    assert default_for("cpu", (3, 10, 162)) == default_for("cpu", (3, 64, 64))


@pytest.mark.parametrize(
    ("num_images", "copies", "epochs"),
    [(1000, 4, 62), (1000, 1, 250), (50_000, 4, 1), (10**7, 4, 1), (100, 4, 300), (100, 1, 1200)],
)
def test_default_epochs_depend_on_the_images_seen(num_images, copies, epochs):
    recipe = override(FOLDER, [f"mix.batch_repetitions={copies}"])
    assert with_defaults(recipe, num_images=num_images).train.epochs == epochs


@pytest.mark.parametrize(
    ("name", "num_images", "epochs"),
    [
        ("cutmix", 3000, 20),
        ("cut-mixmo", 500, 62),
        ("cut-mixmo", 1000, 30),  # 59,500 images seen, without incomplete batches
        ("cut-mixmo", 2000, 16),
        ("cut-mixmo", 3000, 16),  # 30 views
        ("cut-mixmo", 40, 750),  # 48,000 images seen: 1,200 views, 32 of 40 images in an epoch
        ("cut-mixmo", 50_000, 2),  # as from random weights: 250,000 images seen
    ],
)
def test_default_length_of_fine_tuning(name, num_images, epochs):
    recipe = override(load_recipe(f"fine-tune/{name}"), ["data.dataset=/a/folder"])
    filled = with_defaults(recipe, num_images=num_images, side=64)
    assert filled.train.epochs == epochs
    if 500 <= num_images <= 3000:
        assert unmet_requirement(filled, images_per_epoch(filled, num_images) * epochs) is None


def test_explicit_settings_are_kept():
    explicit = override(FOLDER, ["model.arch=wrn28_10", "train.epochs=7", "data.image_size=0"])
    assert open_settings(explicit) == []
    assert with_defaults(explicit, scaled_to=64) == explicit
    assert open_settings(FOLDER) == ["data.image_size", "model.arch", "train.epochs"]
    assert open_settings(with_defaults(FOLDER)) == []
    length = override(FOLDER, ["train.images_seen=6000"])  # the epochs follow from it
    assert open_settings(length) == ["data.image_size", "model.arch"]


@pytest.mark.parametrize(
    ("assignments", "epochs"),
    [
        ([], 15),  # 60,000 inputs of 1,000 images, each 4 times
        (["mix.batch_repetitions=1"], 62),  # 15 full batches of 64 images
        (["mix.batch_repetitions=1", "train.batch_size=512"], 117),  # one full batch
        (["model.num_nets=2"], 8),  # 7.6 epochs of each
        (["train.images_seen=100"], 1),
    ],
)
def test_images_seen_set_the_number_of_epochs(assignments, epochs):
    recipe = override(FOLDER, ["train.images_seen=60000", *assignments])
    filled = with_defaults(recipe)
    assert (filled.train.epochs, filled.train.images_seen) == (epochs, None)
    named = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, dataset="cifar10"))
    assert with_defaults(named).train.epochs == epochs


def test_epochs_and_images_seen_replace_each_other():
    seen = resolve_recipe("cifar10", "cifar10/cut-mixmo", assignments=["train.images_seen=90000"])
    assert (seen.train.epochs, seen.train.images_seen) == (None, 90_000)
    Path("recipe.toml").write_text("[train]\nimages_seen = 90_000\n")
    assert resolve_recipe("cifar10", "recipe.toml").train.images_seen == 90_000
    epochs = resolve_recipe("cifar10", "recipe.toml", {"train.epochs": 7}).train
    assert (epochs.epochs, epochs.images_seen) == (7, None)
    with pytest.raises(InputError, match="both set the length of training"):
        override(seen, ["train.epochs=3"])
    with pytest.raises(InputError, match="both set the length of training"):
        resolve_recipe(
            "cifar10", None, {"train.epochs": 3}, assignments=["train.images_seen=90000"]
        )
    with pytest.raises(
        InputError, match=r"^--set: train\.epochs=3 and train\.images_seen=90000 both set"
    ):
        resolve_recipe(
            "cifar10",
            "small-cifar10/cut-mixmo",
            {"train.epochs": 3},
            assignments=["train.images_seen=90000"],
        )


def test_named_data_sets_keep_the_published_settings():
    recipe = recipe_from_mapping({"data": {"dataset": "cifar10"}}, "here")
    filled = with_defaults(recipe)
    assert (filled.model.arch, filled.train.epochs, filled.data.image_size) == ("wrn28_10", 300, 0)
    for name in (n for n in recipe_names() if not n.startswith("fine-tune")):
        shipped = load_recipe(name)
        filled = with_defaults(shipped)
        assert filled.model == shipped.model, name
        if shipped.train.images_seen is None:
            assert filled.train == shipped.train, name


@pytest.mark.parametrize("num_images", [1251, 1300, 1613, 1777, 1800, 2500, 4321, 5000])
def test_default_length_is_enough_for_few_small_images(num_images):
    recipe = override(FOLDER, ["model.num_members=2", "mix.kind=cutmix"])
    filled = with_defaults(recipe, num_images=num_images, side=16)
    images_seen = images_per_epoch(filled, num_images) * filled.train.epochs
    assert unmet_requirement(filled, images_seen) is None
    one_epoch_less = images_seen * (filled.train.epochs - 1) / filled.train.epochs
    assert one_epoch_less < MIN_IMAGES_SEEN
    shorter = override(filled, [f"train.epochs={filled.train.epochs * 9 // 10}"])
    too_short = images_per_epoch(filled, num_images) * shorter.train.epochs
    assert "1,500,000 images seen" in unmet_requirement(shorter, too_short)


@pytest.mark.parametrize("num_images", [6000, 9000, 12_345, 45_000, 187_000, 200_000, 371_000])
def test_default_length_shows_many_small_images_too_seldom(num_images):
    """It has the images seen that two members need, but not the views, which would take hours."""
    recipe = override(FOLDER, ["model.num_members=2", "mix.kind=cutmix"])
    filled = with_defaults(recipe, num_images=num_images, side=16)
    images_seen = images_per_epoch(filled, num_images) * filled.train.epochs
    assert images_seen >= 0.97 * MIN_IMAGES_SEEN
    views = 4 * filled.train.epochs
    assert unmet_requirement(filled, images_seen) == f"about 300 views of each image (here {views})"
    one_epoch_less = images_seen * (filled.train.epochs - 1) / filled.train.epochs
    assert one_epoch_less < MIN_IMAGES_SEEN


@pytest.mark.parametrize(
    ("settings", "epochs", "num_images", "message"),
    [
        ([], 75, 10_000, None),
        ([], 74, 10_000, None),  # nearly: 296 views
        ([], 72, 10_000, "about 300 views of each image (here 288)"),
        ([], 10, 10_000, "about 300 views of each image (here 40)"),
        ([], 300, 1200, "about 1,500,000 images seen (here 1,440,000)"),
        (["mix.batch_repetitions=1"], 300, 10_000, None),
        ("short", 150, 10_000, None),
        ("short", 60, 5000, "about 300 views of each image (here 120)"),  # as measured
        ("short", 75, 10_000, "about 300 views of each image (here 150)"),
        ("short", 290, 1000, "about 600,000 images seen (here 580,000)"),
    ],
)
def test_requirement_of_views(settings, epochs, num_images, message):
    settings = SHORT if settings == "short" else settings
    recipe = override(FOLDER, [*settings, "model.arch=wrn10_4", f"train.epochs={epochs}"])
    images_seen = epochs * recipe.mix.batch_repetitions * num_images
    assert unmet_requirement(recipe, images_seen) == message
    if message and "views" in message:  # narrow networks have a second requirement
        narrow = override(recipe, ["model.arch=wrn10_1"])
        expected = f"{message} and a width of 2 (here 1)"
        assert unmet_requirement(narrow, images_seen) == expected


def test_default_networks_are_wide_enough():
    for table in DEFAULTS.values():
        for row in table:
            recipe = override(FOLDER, [f"model.arch={row.arch}", "train.epochs=300"])
            assert unmet_requirement(recipe, MIN_IMAGES_SEEN) is None


SHORT = [f"mix.{name}={value}" for name, value in SHORT_SETTINGS.items()]


@pytest.mark.parametrize(
    ("changes", "images_seen", "message_parts"),
    [
        (["model.arch=wrn10_1"], 2_000_000, ["a width of 2 (here 1)"]),
        (["model.arch=wrn10_4"], 300_000, ["1,500,000 images seen (here 300,000)"]),
        (["model.arch=wrn10_1"], 1, ["1,500,000 images seen (here 1)", "here 1)"]),
        (["model.arch=resnet18"], 1, ["1,500,000"]),
        ([*SHORT, "model.arch=wrn10_4"], 580_000, ["600,000 images seen (here 580,000)"]),
        ([*SHORT, "mix.early_span=0.5"], 1, ["1,500,000"]),
        ([*SHORT, "mix.early_repetition=0.9"], 1, ["1,500,000"]),
        ([*SHORT, "mix.batch_repetitions=4"], 1, ["1,500,000"]),
    ],
)
def test_unmet_requirements_are_named(changes, images_seen, message_parts):
    recipe = override(FOLDER, ["train.epochs=300", *changes])
    message = unmet_requirement(recipe, images_seen)
    assert all(part in message for part in message_parts)


FINE_TUNED = [*SHORT, "model.weights=net.safetensors", "model.arch=resnet18"]


@pytest.mark.parametrize(
    ("changes", "epochs", "images_seen", "required"),
    [
        (FINE_TUNED, 30, 57_000, "60,000 images seen (here 57,000)"),
        (FINE_TUNED, 30, 59_000, None),  # nearly
        (FINE_TUNED, 15, 60_000, None),
        (FINE_TUNED, 14, 112_000, "30 views of each image (here 28)"),
        (FINE_TUNED, 15, 120_000, None),
        (FINE_TUNED, 1, 200_000, "1,500,000 images seen (here 200,000)"),
        (
            [*FINE_TUNED, "mix.batch_repetitions=4"],
            15,
            240_000,
            "1,500,000 images seen (here 240,000)",
        ),
    ],
)
def test_requirement_of_fine_tuning(changes, epochs, images_seen, required):
    recipe = override(FOLDER, [*changes, f"train.epochs={epochs}"])
    message = unmet_requirement(recipe, images_seen)
    assert message == (required and f"about {required}")


def test_no_requirements_for_one_member_or_the_digits():
    one_member = resolve_recipe("cifar10", flags={"model.num_members": 1})
    assert unmet_requirement(one_member, 1) is None
    assert unmet_requirement(load_recipe("digits/cut-mixmo"), 1) is None


def test_settings_for_short_trainings_have_a_recipe():
    assert has_short_settings(load_recipe("small-cifar10/cut-mixmo-short"))
    assert has_short_settings(load_recipe("small-cifar10/cut-mixmo-short-mixup"))
    recipe = override(FOLDER, [*SHORT, "model.arch=wrn10_4", "train.epochs=150"])
    assert unmet_requirement(recipe, 600_000) is None


# Complete runs


def test_run_on_an_image_folder_stores_the_defaults(working_folder):
    folder = write_image_folder(working_folder / "pets", num_train=8, size=(16, 16))
    assert run(["fit", str(folder), "--epochs", "1", *QUICK, "--out", "here"]) == 0
    recipe = open_run("here").recipe()
    assert open_settings(recipe) == []
    assert (recipe.model.arch, recipe.train.epochs, recipe.data.image_size) == ("wrn10_4", 1, 0)


@pytest.mark.slow
def test_large_images_are_scaled_on_a_cpu(working_folder):
    folder = write_image_folder(working_folder / "pets", num_train=8, size=(72, 80))
    arguments = ["--arch", "wrn10_1", "--epochs", "1", *QUICK]
    assert run(["fit", str(folder), *arguments, "--out", "here"]) == 0
    trained = open_run("here")
    assert trained.recipe().data.image_size == MAX_CPU_SIDE
    assert trained.data_facts().image_shape == (3, MAX_CPU_SIDE, MAX_CPU_SIDE)
    assert run(["eval", "here", "--json"]) == 0
    assert run(["fit", "--resume", "here", "--quiet"]) == 0
    unscaled = ["--set", "data.image_size=0", "--out", "unscaled"]
    assert run(["fit", str(folder), *arguments, *unscaled]) == 0
    assert open_run("unscaled").data_facts().image_shape == (3, 72, 80)


def test_images_are_not_scaled_on_a_gpu(working_folder):
    folder = write_image_folder(working_folder / "pets", num_train=8, size=(72, 80))
    changes = ["model.arch=wrn10_1", "train.batch_size=16", "train.device=cpu"]
    recipe = override(resolve_recipe(str(folder)), changes)
    training = prepare(recipe, working_folder / "data", sized_for="cuda")
    assert training.source.train.image_shape == (3, 72, 80)
    assert training.recipe.data.image_size == 0
    assert training.decided == ("data.image_size", "train.epochs")


def test_open_settings_of_a_run_are_filled_before_training(working_folder):
    folder = write_image_folder(working_folder / "pets", num_train=8, size=(72, 72))
    changes = ["model.arch=wrn10_1", "train.epochs=1", "train.batch_size=16", "train.device=cpu"]
    recipe = override(resolve_recipe(str(folder)), changes)
    created = create_run(recipe, working_folder / "run")
    assert created.recipe().data.image_size is None
    train(prepare(recipe, working_folder / "data"), created)
    assert created.recipe().data.image_size == MAX_CPU_SIDE


def test_run_of_an_earlier_version_keeps_its_image_size(working_folder):
    folder = write_image_folder(working_folder / "pets", num_train=8, size=(72, 72))
    values = dataclasses.asdict(Recipe())["data"] | {"dataset": str(folder), "image_size": 0}
    values = {key: value for key, value in values.items() if value is not None}
    changes = ["model.arch=wrn10_1", "train.epochs=1", "train.batch_size=16", "train.device=cpu"]
    recipe = override(recipe_from_mapping({"data": values}, "here"), changes)
    assert prepare(recipe, working_folder / "data").source.train.image_shape == (3, 72, 72)
