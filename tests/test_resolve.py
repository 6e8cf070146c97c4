from dataclasses import replace

import pytest

from mixmo_fastai.config.choices import DATASETS
from mixmo_fastai.config.defaults import fill_defaults
from mixmo_fastai.config.load import load_recipe, override, recipe_from_mapping, recipe_names
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.config.resolve import (
    changed_settings,
    check_dataset,
    check_ood,
    recipes_for_one_member,
    resolve_recipe,
)
from mixmo_fastai.config.schema import to_toml
from mixmo_fastai.errors import InputError


def test_default_is_cut_mixmo_on_the_digits():
    assert resolve_recipe() == load_recipe("digits/cut-mixmo")


def test_main_command_is_the_published_recipe():
    flags = {"model.arch": "wrn28_10", "mix.kind": "cutmix", "train.epochs": None}
    recipe = resolve_recipe("cifar100", flags=flags)
    assert recipe == load_recipe("cifar100/cut-mixmo")
    assert recipe.expected.accuracy == 0.8540


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
@pytest.mark.parametrize(
    ("flags", "method"),
    [
        ({}, "cut-mixmo"),
        ({"mix.kind": "cutmix"}, "cut-mixmo"),
        ({"mix.kind": "linear"}, "linear-mixmo"),
        ({"mix.kind": "sum"}, "mimo"),
        ({"model.num_members": 2}, "cut-mixmo"),
        ({"model.num_members": 1}, "vanilla"),
        ({"model.num_members": 1, "mix.kind": "sum"}, "vanilla"),
    ],
)
def test_mask_kind_and_members_select_the_recipe(dataset, flags, method):
    assert resolve_recipe(dataset, flags=flags) == load_recipe(f"{dataset}/{method}")


def test_data_set_without_recipe_uses_the_defaults(tmp_path):
    recipe = resolve_recipe(str(tmp_path), flags={"mix.kind": "linear"})
    values = {"data": {"dataset": str(tmp_path)}, "mix": {"kind": "linear"}}
    assert recipe == recipe_from_mapping(values, "here")
    single = resolve_recipe(str(tmp_path), flags={"model.num_members": 1})
    assert (single.mix.kind, single.mix.batch_repetitions) == ("sum", 1)
    assert single.train == Recipe().train


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"model.num_members": 1, "mix.msda": "cutmix"}, "cutmix"),
        ({"model.num_members": 1, "mix.msda": "mixup"}, "mixup"),
        ({"mix.msda": "cutmix"}, "cut-mixmo-cutmix"),
        ({"mix.kind": "linear", "mix.msda": "cutmix"}, "linear-mixmo-cutmix"),
    ],
)
def test_msda_selects_the_recipe(flags, name):
    assert resolve_recipe("cifar100", flags=flags).name == f"cifar100/{name}"


def test_mask_kind_without_recipe_uses_the_default_training():
    cow = resolve_recipe("digits", flags={"mix.kind": "cow"})
    default = load_recipe("digits/cut-mixmo")
    assert (cow.mix.kind, cow.name) == ("cow", "")
    assert (cow.train, cow.model, cow.optimizer) == (
        default.train,
        default.model,
        default.optimizer,
    )


def test_changed_settings_of_a_shipped_recipe_are_listed():
    recipe = resolve_recipe(
        "cifar10", None, {"train.epochs": 1, "data.limit": 100, "train.seed": 7}, ["mix.alpha=1"]
    )
    assert changed_settings(recipe) == ["data.limit", "mix.alpha", "train.epochs"]
    assert changed_settings(load_recipe("cifar10/mimo")) == []
    filled_in = {"data.valid_split": 0.02}  # as in the recipe of a run
    assert changed_settings(resolve_recipe("cifar10", "cifar10/mimo", filled_in)) == []
    allowed = {"schedule.kind": "published", "data.valid_split": 0.0, "train.threads": 2}
    assert changed_settings(resolve_recipe("cifar10", "cifar10/mimo", allowed)) == []


@pytest.mark.parametrize("name", [n for n in recipe_names() if n.startswith("small-cifar10/")])
def test_run_of_a_shipped_length_in_images_is_unchanged(name):
    recipe = resolve_recipe("cifar10", name)
    assert changed_settings(recipe) == []
    resolved = fill_defaults(recipe, device="cpu", image_shape=(3, 16, 16), num_images=2000)
    data = replace(resolved.data, crop_padding=2, flip=True)
    resolved = replace(resolved, data=data)
    assert resolved.train.images_seen is None
    assert changed_settings(resolved) == []
    longer = replace(resolved.train, epochs=resolved.train.epochs + 1)
    assert changed_settings(replace(resolved, train=longer)) == ["train.epochs"]
    padded = replace(resolved, data=replace(data, crop_padding=4))
    assert changed_settings(padded) == ["data.crop_padding"]
    # The limit applies to the images that the validation split leaves.
    part = replace(resolved, data=replace(data, valid_split=0.1))
    assert changed_settings(part) == ["data.valid_split"]


def test_recipe_for_own_images_keeps_its_name(tmp_path):
    recipe = resolve_recipe(str(tmp_path), "fine-tune/cut-mixmo")
    assert (recipe.name, changed_settings(recipe)) == ("fine-tune/cut-mixmo", ["data.dataset"])
    assert recipes_for_one_member(recipe) == ["fine-tune/vanilla", "fine-tune/cutmix"]
    assert resolve_recipe(str(tmp_path), "small-cifar10/cut-mixmo").name == ""


def test_settings_of_image_files_do_not_apply_to_a_named_data_set(tmp_path):
    settings = ["data.test_split=0.25", "data.label_column=kind"]
    settings += ["data.crop_from=original", "data.transform=random-resized-crop"]
    recipe = override(recipe_from_mapping({"data": {"dataset": str(tmp_path)}}, "it"), settings)
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    file = str(tmp_path / "recipe.toml")
    for recipe in (
        resolve_recipe("digits", file),
        resolve_recipe(None, file, {}, ["data.dataset=digits"]),
    ):
        found = recipe.data
        assert (found.test_split, found.label_column, found.crop_from) == (None, "", "auto")
    kept = resolve_recipe(str(tmp_path), str(tmp_path / "recipe.toml")).data
    assert (kept.test_split, kept.label_column) == (0.25, "kind")
    assigned = resolve_recipe("digits", str(tmp_path / "recipe.toml"), {}, settings[:1])
    assert assigned.data.test_split == 0.25  # refused when the data is read


@pytest.mark.parametrize("name", ["it.csv", "hf:someone/birds", "hf:it.parquet"])
def test_out_of_distribution_images_are_a_name_or_a_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it.csv").touch()
    with pytest.raises(InputError, match="tables of labels and hf: data sets are not supported"):
        check_ood([name], "digits")
    (tmp_path / "birds").mkdir()
    assert check_ood(["birds", "cifar10"], "digits") is None


def test_assignments_override_flags_and_flags_override_the_recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[train]\nepochs = 7\nseed = 7\nbatch_size = 80\n")
    flags = {"train.epochs": 8, "train.seed": 8, "train.device": None}
    recipe = resolve_recipe(None, str(path), flags, ["train.epochs=9"])
    assert (recipe.train.epochs, recipe.train.seed, recipe.train.batch_size) == (9, 8, 80)
    assert recipe.train.device == "auto"


def test_data_set_argument_overrides_the_recipe():
    recipe = resolve_recipe("digits", "cifar100/mimo")
    expected = load_recipe("cifar100/mimo")
    assert recipe.data.dataset == "digits"
    assert (recipe.model, recipe.mix, recipe.train) == (
        expected.model,
        expected.mix,
        expected.train,
    )


@pytest.mark.parametrize("name", [*DATASETS, "."])
def test_known_data_sets_and_folders_are_valid(name):
    assert check_dataset(name) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifra10", "Did you mean 'cifar10'"),
        ("zzz", "Allowed: digits, cifar10, cifar100, tinyimagenet"),
        ("./none", r"no folder '\./none'"),
        ("~nobody/x", "no folder '~nobody/x'"),
        ("a" * 300, "Unknown data set"),
        ("a\0b", "Unknown data set"),
        ("", "Unknown data set ''"),
    ],
)
def test_unknown_data_sets_are_rejected(name, message):
    with pytest.raises(InputError, match=message):
        resolve_recipe(name)


def test_file_is_not_a_data_set(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file' is a file, not a folder\.\nPass a folder"):
        check_dataset(str(tmp_path / "file"))
    with pytest.raises(InputError, match="There is no folder"):
        check_dataset(str(tmp_path / "none"))


def test_data_set_is_checked_in_assignments_and_files(tmp_path):
    with pytest.raises(InputError, match="Did you mean 'cifar10'"):
        resolve_recipe(assignments=["data.dataset=cifra10"])
    (tmp_path / "mine.toml").write_text('[data]\ndataset = "cifra10"\n')
    with pytest.raises(InputError, match="Did you mean 'cifar10'"):
        resolve_recipe(recipe=str(tmp_path / "mine.toml"))


@pytest.mark.parametrize("recipe", [None, "cifar100/mimo"])
def test_unknown_mask_kind_suggests_a_similar_name(recipe):
    with pytest.raises(InputError, match="Did you mean 'cutmix'"):
        resolve_recipe(None, recipe, {"mix.kind": "cutmx"})


def test_changed_method_has_no_name_and_no_expected_accuracy():
    changed = resolve_recipe("cifar100", "cifar100/cut-mixmo", {"mix.kind": "linear"})
    assert changed.expected.accuracy is None
    assert changed.name == ""
    other_data = resolve_recipe("cifar10", "cifar100/cut-mixmo")
    assert other_data.expected.accuracy is None
    same_method = resolve_recipe("cifar100", "cifar100/cut-mixmo", {"model.arch": "wrn16_4"})
    assert same_method.expected.accuracy == 0.8540


@pytest.mark.parametrize(
    ("name", "flags", "assignments", "is_kept"),
    [
        ("small-cifar10/cut-mixmo", {"model.arch": "wrn10_2"}, [], False),
        ("tinyimagenet/cut-mixmo", {}, ["model.arch=preact_resnet18_1"], False),
        ("small-cifar10/cut-mixmo", {"data.limit": 500}, [], False),
        ("small-cifar10/cut-mixmo", {"model.arch": "wrn10_4"}, ["optimizer.lr=0.1"], True),
        ("cifar10/cut-mixmo", {"data.limit": 500}, [], True),
    ],
)
def test_title_never_states_another_network(name, flags, assignments, is_kept):
    recipe, shipped = resolve_recipe(None, name, flags, assignments), load_recipe(name)
    assert recipe.title == (shipped.title if is_kept else "")
    assert (recipe.name, recipe.expected) == (name, shipped.expected)


@pytest.mark.parametrize("assignment", ["model.arch=wrn10_2", "model.num_members=3"])
def test_assigned_title_is_kept(assignment):
    recipe = resolve_recipe(None, "digits/cut-mixmo", {}, [assignment, "title=Mine, WRN-10-2"])
    assert recipe.title == "Mine, WRN-10-2"


def test_title_without_network_is_kept(tmp_path):
    file = tmp_path / "kew.toml"
    file.write_text('title = "Flowers of Kew"\n[model]\narch = "wrn10_2"\n')
    assert resolve_recipe(None, str(file), {"model.arch": "wrn10_1"}).title == "Flowers of Kew"


def test_folders_are_stored_as_absolute_paths(tmp_path, monkeypatch):
    (tmp_path / "flowers").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_recipe("flowers").data.dataset == str(tmp_path / "flowers")


def test_weight_root_may_be_infinite():
    recipe = resolve_recipe("digits", None, None, ["mix.weight_root=inf"])
    assert recipe.mix.weight_root == float("inf")


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"mix.kind": "linear"}, "digits/linear-mixmo"),
        ({"mix.kind": "sum"}, "digits/mimo"),
        ({"model.num_members": 1}, "digits/vanilla"),
        ({}, "digits/cut-mixmo"),
    ],
)
def test_digits_have_a_recipe_for_each_method(flags, name):
    assert resolve_recipe(None, None, flags).name == name


@pytest.mark.parametrize("name", ["adamw", "torch/RAdam"])
def test_another_optimizer_needs_its_own_learning_rate(name):
    """The recipe of the digits has the learning rate of SGD."""
    assignment = f"optimizer.name={name}"
    with pytest.raises(InputError, match=rf"optimizer\.name='{name}' needs optimizer\.lr"):
        resolve_recipe("digits", None, {}, [assignment])
    assert resolve_recipe("digits", None, {"optimizer.lr": 0.002}, [assignment]).lr == 0.002
    assert resolve_recipe("digits", None, {}, [assignment, "optimizer.lr=0.003"]).lr == 0.003
    assert resolve_recipe("digits", None, {}, ["optimizer.name=sgd"]).lr == 0.1


@pytest.mark.parametrize("name", ["adamw", "torch/RAdam"])
def test_another_optimizer_of_a_recipe_without_a_learning_rate(name):
    """The recipes of CIFAR derive the learning rate of SGD from the batch size."""
    assignments = ["optimizer.lr=0.003", f"optimizer.name={name}"]
    assert load_recipe("cifar10/cut-mixmo").optimizer.lr is None
    assert resolve_recipe("cifar10", None, {}, assignments).lr == 0.003
    with pytest.raises(InputError, match=rf"optimizer\.name='{name}' needs optimizer\.lr"):
        resolve_recipe("cifar10", None, {}, assignments[1:])


def recipe_file(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("lr", [{"optimizer.lr": 0.1}, {}])
@pytest.mark.parametrize("name", ["sgd", "muon", "torch/RAdam"])
def test_another_optimizer_drops_the_settings_of_the_recipes_optimizer(tmp_path, name, lr):
    text = '[optimizer]\nname = "adamw"\nlr = 0.001\noptions = {betas = [0.8, 0.9]}\n'
    assignments = [f"optimizer.name={name}", *([] if lr else ["optimizer.lr=0.1"])]
    resolved = resolve_recipe(None, recipe_file(tmp_path, text), lr, assignments)
    assert resolved.optimizer.options == {}
    assert resolved.optimizer.lr == 0.1
    kept = resolve_recipe(None, recipe_file(tmp_path, text), {}, ["optimizer.lr=0.1"])
    assert kept.optimizer.options == {"betas": [0.8, 0.9]}


def test_another_optimizer_drops_momentum(tmp_path):
    path = recipe_file(tmp_path, "[optimizer]\nmomentum = 0.95\nnesterov = false\n")
    resolved = resolve_recipe(None, path, {"optimizer.lr": 0.1}, ["optimizer.name=adamw"])
    assert (resolved.optimizer.momentum, resolved.optimizer.nesterov) == (0.9, True)


@pytest.mark.parametrize("name", ["standard", "trivialaugment"])
def test_another_transform_drops_the_options_of_the_recipes_transform(tmp_path, name):
    text = '[data]\ntransform = "randaugment"\ntransform_options = {magnitude = 5}\n'
    path = recipe_file(tmp_path, text)
    resolved = resolve_recipe(None, path, {}, [f"data.transform={name}"])
    assert resolved.data.transform_options == {}
    same = resolve_recipe(None, path, {}, ["data.transform=randaugment"])
    assert same.data.transform_options == {"magnitude": 5}
    emptied = resolve_recipe(None, path, {}, ["data.transform_options={}"])
    assert emptied.data.transform_options == {}


def test_augmix_of_version_0_1_0_beside_another_transform_is_refused():
    with pytest.raises(InputError, match=r"another data\.transform is set"):
        resolve_recipe("digits", None, {}, ["data.transform=randaugment", "data.augmix=true"])


@pytest.mark.parametrize("assignments", [[], ["model.num_members=1"]])
@pytest.mark.parametrize("family", ["cifar10", "fine-tune"])
def test_one_member_with_a_recipe_for_several_names_the_right_recipes(
    family, assignments, tmp_path
):
    flags = {} if assignments else {"model.num_members": 1}
    with pytest.raises(InputError) as error:
        resolve_recipe(str(tmp_path), f"{family}/cut-mixmo", flags, assignments)
    message = str(error.value)
    assert message.startswith(f"The recipe {family}/cut-mixmo is for several members.\n")
    text = {
        "cifar10": "cifar10/mixup, cifar10/vanilla or cifar10/cutmix",
        "fine-tune": "fine-tune/vanilla or fine-tune/cutmix",
    }[family]
    assert message.endswith(f"\nFor one member, use the recipe {text}.")
    for name in text.replace(" or", ",").split(", "):
        assert load_recipe(name).model.num_members == 1


@pytest.mark.parametrize("assignment", ["data.label_delimiter= ", 'data.label_delimiter=" "'])
def test_a_space_is_a_delimiter(assignment):
    assert resolve_recipe("digits", assignments=[assignment]).data.label_delimiter == " "
    assert override(load_recipe("digits/mimo"), [assignment]).data.label_delimiter == " "


def test_one_member_may_be_chosen_with_its_mixing():
    assignments = ["model.num_members=1", "mix.kind=sum", "mix.batch_repetitions=1"]
    recipe = resolve_recipe("cifar10", "cifar10/cut-mixmo", assignments=assignments)
    assert (recipe.model.num_members, recipe.mix.kind) == (1, "sum")


@pytest.mark.parametrize(
    ("assignments", "perturbation"),
    [
        ([], 1.0),
        (["model.pretrained=false"], 0.1),
        (["model.pretrained=false", "model.arch=resnet18", "model.weights=net.pth"], 1.0),
        (["model.perturbation=0.5"], 0.5),
    ],
)
def test_perturbation_of_a_recipe_is_for_pretrained_weights(assignments, perturbation):
    recipe = resolve_recipe("digits", "fine-tune/cut-mixmo", {}, assignments, must_exist=False)
    assert recipe.model.perturbation == perturbation


def test_an_assigned_perturbation_without_weights_is_refused():
    assignments = ["model.pretrained=false", "model.perturbation=0.5"]
    with pytest.raises(InputError, match=r"model\.perturbation=0\.5 has no effect without"):
        resolve_recipe("digits", "fine-tune/cut-mixmo", {}, assignments)
