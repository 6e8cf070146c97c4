import dataclasses
import math
import re
from pathlib import Path

import pytest
from datasets import write_image_folder

from mixmo_fastai.cli import run
from mixmo_fastai.config.defaults import (
    DEFAULTS,
    MAX_CPU_SIDE,
    MAX_VIEWS,
    MIN_IMAGES_SEEN,
    MIN_WIDTH,
    default_for,
    fill_defaults,
    open_settings,
    unmet_requirement,
)
from mixmo_fastai.config.load import load_recipe, override, recipe_from_mapping, recipe_names
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.train import train

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
FOLDER = recipe_from_mapping({"data": {"dataset": "/a/folder"}}, "here")
QUICK = ("--batch-size", "16", "--device", "cpu", "--quiet")


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    monkeypatch.setenv("MIXMO_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def decided(recipe, *, side=32, num_images=1000, device="cpu", **more):
    shape = (3, side, side)
    return fill_defaults(recipe, device=device, image_shape=shape, num_images=num_images, **more)


def test_the_table_of_the_docs_is_that_of_the_code():
    rows = re.findall(
        r"^\| (\d+ px|any) \| `(\w+)` \| ([\d,]+) \| `(\w+)` \| ([\d,]+) \|$", PAGE, re.M
    )
    assert len(rows) == 4
    for most, *told in rows:
        side = 1000 if most == "any" else int(most.removesuffix(" px"))
        found = [default_for(device, (3, side, side)) for device in ("cpu", "cuda")]
        assert told == [text for row in found for text in (row.arch, f"{row.images_seen:,}")]
    sides = {int(most.removesuffix(" px")) for most, *_ in rows if most != "any"}
    ends = {row.side for table in DEFAULTS.values() for row in table if row.side < math.inf}
    assert ends <= sides  # or a row of the docs would hide one of the code


@pytest.mark.parametrize("text", [f"{MIN_IMAGES_SEEN:,} images seen", f"width of {MIN_WIDTH}"])
def test_the_rule_of_the_docs_is_that_of_the_code(text):
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
def test_the_network_follows_from_image_size_and_device(side, device, arch):
    assert decided(FOLDER, side=side, device=device).model.arch == arch


def test_the_size_of_an_image_is_that_of_the_square_of_its_area():
    assert default_for("cpu", (3, 10, 160)) == default_for("cpu", (3, 40, 40))
    assert default_for("cpu", (3, 10, 162)) == default_for("cpu", (3, 64, 64))


@pytest.mark.parametrize(
    ("num_images", "copies", "epochs"),
    [(1000, 4, 62), (1000, 1, 250), (50_000, 4, 1), (10**7, 4, 1), (100, 4, 300), (100, 1, 1200)],
)
def test_epochs_follow_from_the_images_seen(num_images, copies, epochs):
    recipe = override(FOLDER, [f"mix.batch_repetitions={copies}"])
    assert decided(recipe, num_images=num_images).train.epochs == epochs


def test_what_is_given_stays():
    given = override(FOLDER, ["model.arch=wrn28_10", "train.epochs=7", "data.image_size=0"])
    assert open_settings(given) == []
    assert decided(given, scaled_to=64) == given
    assert open_settings(FOLDER) == ["data.image_size", "model.arch", "train.epochs"]
    assert open_settings(decided(FOLDER)) == []


def test_named_data_sets_keep_the_published_settings():
    recipe = recipe_from_mapping({"data": {"dataset": "cifar10"}}, "here")
    whole = decided(recipe)
    assert (whole.model.arch, whole.train.epochs, whole.data.image_size) == ("wrn28_10", 300, 0)
    for name in recipe_names():
        shipped = load_recipe(name)
        own = decided(shipped)
        assert (own.model, own.train) == (shipped.model, shipped.train), name


def test_a_default_network_is_wide_enough_for_its_members():
    for table in DEFAULTS.values():
        for row in table:
            recipe = override(FOLDER, [f"model.arch={row.arch}"])
            assert unmet_requirement(recipe, MIN_IMAGES_SEEN) is None


@pytest.mark.parametrize(
    ("changes", "images_seen", "parts"),
    [
        (["model.arch=wrn10_2"], 2_000_000, ["a width of 4 (here 2)"]),
        (["model.arch=wrn10_4"], 300_000, ["1,500,000 images seen (here 300,000)"]),
        (["model.arch=wrn10_1"], 1, ["1,500,000 images seen (here 1)", "here 1)"]),
        (["model.arch=resnet18"], 1, ["1,500,000"]),
    ],
)
def test_what_several_members_lack_is_told(changes, images_seen, parts):
    lacks = unmet_requirement(override(FOLDER, changes), images_seen)
    assert all(part in lacks for part in parts)


def test_one_member_lacks_nothing_and_digits_are_easy():
    one = resolve_recipe("cifar10", flags={"model.num_members": 1})
    assert unmet_requirement(one, 1) is None
    assert unmet_requirement(load_recipe("digits/cut-mixmo"), 1) is None


# Of a whole run


def test_a_folder_trains_with_what_the_table_says_and_its_run_holds_it(place):
    folder = write_image_folder(place / "pets", num_train=8, size=(16, 16))
    assert run(["fit", str(folder), "--epochs", "1", *QUICK, "--out", "here"]) == 0
    recipe = open_run("here").recipe()
    assert open_settings(recipe) == []
    assert (recipe.model.arch, recipe.train.epochs, recipe.data.image_size) == ("wrn10_4", 1, 0)


@pytest.mark.slow
def test_large_images_are_scaled_on_a_cpu_and_stay_so(place):
    folder = write_image_folder(place / "pets", num_train=8, size=(72, 80))
    words = ["--arch", "wrn10_1", "--epochs", "1", *QUICK]
    assert run(["fit", str(folder), *words, "--out", "here"]) == 0
    made = open_run("here")
    assert made.recipe().data.image_size == MAX_CPU_SIDE
    assert made.data_facts().image_shape == (3, MAX_CPU_SIDE, MAX_CPU_SIDE)
    assert run(["eval", "here", "--json"]) == 0
    assert run(["fit", "--resume", "here", "--quiet"]) == 0
    own = ["--set", "data.image_size=0", "--out", "own"]
    assert run(["fit", str(folder), *words, *own]) == 0
    assert open_run("own").data_facts().image_shape == (3, 72, 80)


def test_a_gpu_keeps_the_size_of_images(place):
    folder = write_image_folder(place / "pets", num_train=8, size=(72, 80))
    changes = ["model.arch=wrn10_1", "train.batch_size=16", "train.device=cpu"]
    recipe = override(resolve_recipe(str(folder)), changes)
    training = prepare(recipe, place / "data", sized_for="cuda")
    assert training.source.train.image_shape == (3, 72, 80)
    assert training.recipe.data.image_size == 0
    assert training.decided == ("data.image_size", "train.epochs")


def test_a_run_that_was_described_with_open_settings_gets_them_before_it_trains(place):
    folder = write_image_folder(place / "pets", num_train=8, size=(72, 72))
    changes = ["model.arch=wrn10_1", "train.epochs=1", "train.batch_size=16", "train.device=cpu"]
    recipe = override(resolve_recipe(str(folder)), changes)
    made = create_run(recipe, place / "run")
    assert made.recipe().data.image_size is None
    train(prepare(recipe, place / "data"), made)
    assert made.recipe().data.image_size == MAX_CPU_SIDE


def test_a_run_of_an_earlier_version_keeps_the_size_of_its_images(place):
    folder = write_image_folder(place / "pets", num_train=8, size=(72, 72))
    values = dataclasses.asdict(Recipe())["data"] | {"dataset": str(folder), "image_size": 0}
    values = {key: value for key, value in values.items() if value is not None}
    changes = ["model.arch=wrn10_1", "train.epochs=1", "train.batch_size=16", "train.device=cpu"]
    recipe = override(recipe_from_mapping({"data": values}, "here"), changes)
    assert prepare(recipe, place / "data").source.train.image_shape == (3, 72, 72)
