import dataclasses
import math
import re
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmo_fastai.config.load import (
    find_recipe,
    load_recipe,
    override,
    recipe_from_mapping,
    recipe_home,
    recipe_names,
)
from mixmo_fastai.config.recipe import Recipe, default_valid_split
from mixmo_fastai.config.schema import to_mapping, to_toml
from mixmo_fastai.errors import InputError

DEFAULTS = Recipe()
SECTIONS = [f.name for f in dataclasses.fields(Recipe) if dataclasses.is_dataclass(f.default)]
SETTINGS = {
    f"{section}.{f.name}": getattr(getattr(DEFAULTS, section), f.name)
    for section in SECTIONS
    for f in dataclasses.fields(getattr(DEFAULTS, section))
}

# (setting, value as TOML, part of the message)
INVALID_VALUES = [
    ("train.epochs", "0", "at least 1"),
    ("train.epochs", "1.5", "an integer"),
    ("train.epochs", "true", "an integer"),
    ("train.epochs", "many", "an integer"),
    ("train.batch_size", "0", "at least 1 and at most 65536"),
    ("train.seed", "-1", "at least 0"),
    ("train.seed", f"0x{'f' * 5000}", "a huge number"),
    ("train.device", "cud", "Did you mean 'cuda'"),
    ("train.device", "1", "a string"),
    ("train.precision", "float16", "Allowed: auto, float32, tf32, bfloat16"),
    ("data.valid_split", "0.95", "at most 0.9"),
    ("data.valid_split", "-0.1", "at least 0"),
    ("data.limit", "-1", "at least 0"),
    ("data.flip", "1", "true or false"),
    ("data.loader", "stream", "Did you mean 'streaming'"),
    ("data.crop_padding", "-1", "at least 0"),
    ("data.dataset", '"a\\nb"', "without control characters"),
    ("model.num_members", "0", "at least 1"),
    ("model.arch", "wrn28_1o", "Did you mean 'wrn28_10'"),
    ("model.arch", "wrn29_10", "Nearest: wrn28_10 or wrn34_10"),
    ("mix.kind", "cutmx", "Did you mean 'cutmix'"),
    ("mix.alpha", "0", "at least 0.001"),
    ("mix.alpha", "nan", "at least 0.001"),
    ("mix.mix_prob", "1.1", "at most 1"),
    ("mix.weight_root", "0.5", "at least 1"),
    ("mix.weight_root", "nan", "at least 1"),
    ("mix.batch_repetitions", "0", "at least 1"),
    ("optimizer.lr", "0", "above 0"),
    ("optimizer.lr", "inf", "at most"),
    ("optimizer.lr", "9" * 400, "at most"),
    ("optimizer.base_lr", "-1e-3", "above 0"),
    ("optimizer.nesterov", "yes", "true or false"),
    ("schedule.kind", "onecycle", "Did you mean 'one-cycle'"),
    ("schedule.gamma", "0", "above 0"),
    ("schedule.momentums", "0.9", "a list of numbers"),
    ("schedule.momentums", "[0.9, 'x', 0.9]", "a list of numbers"),
    ("schedule.momentums", "[0.9, 0.8]", "three numbers"),
    ("schedule.momentums", "[0.9, 0.8, 1.1]", "at most 1"),
    ("schedule.milestones", "[0.5, 0.2]", "ascending order"),
    ("expected.accuracy", "85.4", "at most 1"),
]

UNKNOWN_KEYS = [
    ("train.epocs", "Did you mean 'train.epochs'"),
    ("optimiser.lr", "Did you mean 'optimizer"),
    ("epochs", "Did you mean 'train.epochs'"),
    ("lr", "Did you mean 'optimizer.lr'"),
    ("mix.kinds", "Did you mean 'mix.kind'"),
    ("train.zzzzzz", "Allowed: train.epochs, train.images_seen"),
    ("a.b.c", "Allowed: data, expected, loss, mix"),
    ("train.", "unknown key 'train.'"),
    (".", "unknown key"),
]


@pytest.mark.parametrize(("setting", "value", "message_part"), INVALID_VALUES)
def test_invalid_values_are_explained(setting, value, message_part):
    with pytest.raises(InputError) as caught:
        override(DEFAULTS, [f"{setting}={value}"], "here")
    message = str(caught.value)
    assert message.startswith(f"here: {setting}")
    assert message_part in message
    assert len(message.splitlines()) <= 3
    assert max(map(len, message.splitlines())) <= 200


@pytest.mark.parametrize(("key", "message_part"), UNKNOWN_KEYS)
def test_unknown_keys_suggest_a_similar_key(key, message_part):
    with pytest.raises(InputError, match="unknown key") as caught:
        override(DEFAULTS, [f"{key}=1"])
    assert message_part in str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "message_part"),
    [
        ("lr", "write section.key=value"),
        ("=3", "write section.key=value"),
        ("train.epochs.more=3", "'epochs' is not a section"),
        ("name.more=3", "'name' is not a section"),
        ("train={epochs=3}", "'train' is a section"),
        ("train=3", "'train' is a section"),
    ],
)
def test_malformed_assignments_are_rejected(assignment, message_part):
    with pytest.raises(InputError, match=message_part) as caught:
        override(DEFAULTS, [assignment])
    assert "train.epochs=5" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message_part"),
    [
        ({"train": {"batch_size": 30}}, "Nearest: 32"),
        ({"train": {"batch_size": 2}}, "Nearest: 4"),
        ({"model": {"num_members": 1}}, "use mix.kind='sum'"),
        ({"optimizer": {"momentum": 0}}, "optimizer.nesterov=false"),
        ({"data": 3}, "data must be a section; got 3"),
        ({"data": {"dataset": {}}}, "data.dataset is {}; it must be a string"),
    ],
)
def test_inconsistent_values_are_rejected(values, message_part):
    with pytest.raises(InputError, match=r"^file\.toml: ") as caught:
        recipe_from_mapping(values, "file.toml")
    assert message_part in str(caught.value)


def test_long_values_are_shortened_in_messages():
    with pytest.raises(InputError) as caught:
        recipe_from_mapping({"train": {"epochs": "x" * 10_000}}, "here")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("num_images", "expected"),
    [
        *((2, 0.2), (400, 0.2), (500, 0.2), (800, 0.125), (1000, 0.1), (4000, 0.025)),
        *((5000, 0.02), (50_000, 0.02), (100_000, 0.02), (0, 0.2)),
    ],
)
def test_default_validation_split_is_larger_for_small_data_sets(num_images, expected):
    assert default_valid_split(num_images) == expected


def test_learning_rate_depends_on_batch_size_and_repetitions():
    assert pytest.approx(0.05 * 64 / 64 / 4 * 2) == DEFAULTS.lr
    published = override(DEFAULTS, ["schedule.kind=published", "train.batch_size=128"])
    assert published.lr == pytest.approx(0.05 * 128 / 64 / 4)
    single = override(DEFAULTS, ["mix.batch_repetitions=1", "schedule.peak=3"])
    assert single.lr == pytest.approx(0.05 * 3)
    assert override(DEFAULTS, ["optimizer.lr=0.7", "schedule.peak=3"]).lr == 0.7


def test_loader_batch_size_is_a_fraction_of_the_batch_size():
    assert (DEFAULTS.loader_batch_size, DEFAULTS.train.batch_size) == (16, 64)


def test_override_keeps_other_settings():
    recipe = load_recipe("cifar100/mimo")
    changed = override(recipe, ["train.epochs = 5", "expected.source=some text", "name=other"])
    assert (changed.train.epochs, changed.expected.source, changed.name) == (
        5,
        "some text",
        "other",
    )
    assert override(changed, ["train.epochs=300", f"name={recipe.name}"]) == dataclasses.replace(
        recipe, expected=changed.expected
    )


def test_assignment_with_a_line_break_sets_no_second_key():
    with pytest.raises(InputError, match=r"train\.epochs is '3\\ntrain"):
        override(DEFAULTS, ["train.epochs=3\ntrain.seed=4"])


@pytest.mark.parametrize("extra", [[], ["optimizer.lr=1e-7", "data.flip=false", 'title=a"\\é€😀']])
def test_written_recipe_is_read_back_unchanged(tmp_path, extra):
    recipe = override(load_recipe("cifar100/cut-mixmo"), extra)
    (tmp_path / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.toml") == recipe


@pytest.mark.parametrize(
    ("content", "message_part"),
    [
        (b"train", "is not valid TOML"),
        (b"\xff", "is not valid TOML"),
        (b"value = " + b"9" * 5000, "is not valid TOML"),
        (b"value = " + b"[" * 5000, "is not valid TOML"),
        (b"[train]\nepocs = 3", "Did you mean 'train.epochs'"),
    ],
)
def test_error_names_an_invalid_recipe_file(tmp_path, content, message_part):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message_part) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    "name", ["cifar100/cutmixmo", "cut-mixmo", "", ".", "~nobody/x", "a" * 300]
)
def test_missing_recipe_is_rejected(name):
    with pytest.raises(InputError, match=r"There is no recipe(.|\n)*mixmo recipes"):
        load_recipe(name)


def test_similar_recipe_is_suggested():
    with pytest.raises(InputError, match="Did you mean 'cifar100/cut-mixmo'"):
        find_recipe("cifar100/cutmixmo")


def test_shipped_recipe_loaded_by_path_has_its_name(monkeypatch):
    monkeypatch.chdir(recipe_home())
    by_path = load_recipe("cifar10/mimo.toml")
    assert by_path.name == "cifar10/mimo"
    assert by_path == load_recipe("cifar10/mimo")


def test_mapping_omits_unset_settings():
    assert "lr" not in to_mapping(DEFAULTS)["optimizer"]
    assert to_mapping(DEFAULTS)["expected"] == {"source": "", "arch": ""}
    assert recipe_from_mapping(to_mapping(DEFAULTS), "here") == DEFAULTS


def test_defaults_and_shipped_recipes_are_valid():
    assert recipe_from_mapping({}, "here") == DEFAULTS
    for name in recipe_names():
        assert load_recipe(name).name == name


PLAIN_TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=20)
ANY_VALUE = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.dates(),
        st.sampled_from([10**400, -(10**400), math.inf, math.nan]),
        st.sampled_from([value for value in SETTINGS.values() if value is not None]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.one_of(
    st.sampled_from([name.rpartition(".")[2] for name in SETTINGS]), st.text(max_size=6)
)
SECTION = st.one_of(st.dictionaries(KEYS, ANY_VALUE, max_size=4), ANY_VALUE)
ANY_MAPPING = st.dictionaries(
    st.one_of(st.sampled_from([*SECTIONS, "name", "title"]), st.text(max_size=6)),
    SECTION,
    max_size=4,
)


def check_valid_or_rejected(make):
    try:
        recipe = make()
    except InputError as error:
        message = str(error)
    else:
        message = "none"
        assert recipe_from_mapping(tomllib.loads(to_toml(recipe)), "again") == recipe
    assert 1 <= len(message.splitlines()) <= 3


@settings(deadline=None)
@given(ANY_MAPPING)
def test_any_mapping_is_valid_or_rejected(values):
    check_valid_or_rejected(lambda: recipe_from_mapping(values, "here"))


@settings(deadline=None)
@given(st.sampled_from(sorted(SETTINGS)), ANY_VALUE)
def test_any_value_of_a_known_key_is_valid_or_rejected(setting, value):
    section, name = setting.split(".")
    check_valid_or_rejected(lambda: recipe_from_mapping({section: {name: value}}, "here"))


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_text_as_assignment_is_valid_or_rejected(text):
    check_valid_or_rejected(lambda: override(DEFAULTS, [text]))


@settings(deadline=None)
@given(st.sampled_from(sorted(SETTINGS)), st.one_of(PLAIN_TEXT, st.text(), st.floats().map(str)))
def test_any_text_as_value_is_valid_or_rejected(setting, text):
    check_valid_or_rejected(lambda: override(DEFAULTS, [f"{setting}={text}"]))


@settings(deadline=None)
@given(title=PLAIN_TEXT, lr=st.floats(min_value=0, exclude_min=True, max_value=1e30))
def test_any_title_and_rate_are_read_back_unchanged(title, lr):
    recipe = recipe_from_mapping({"title": title, "optimizer": {"lr": lr}}, "here")
    assert (recipe.title, recipe.lr) == (title, lr)
    assert recipe_from_mapping(tomllib.loads(to_toml(recipe)), "again") == recipe


class TestOptimizers:
    """`[optimizer]` with a name and options."""

    def recipe_with(self, *assignments):
        return override(Recipe(), [f"optimizer.{assignment}" for assignment in assignments])

    def test_name_and_options_are_read_back_unchanged(self):
        recipe = self.recipe_with(
            "name=adamw", "lr=0.002", "options.betas=[0.9, 0.95]", "options.eps=1e-6"
        )
        assert recipe.optimizer.options == {"betas": [0.9, 0.95], "eps": 1e-6}
        assert recipe_from_mapping(tomllib.loads(to_toml(recipe)), "test") == recipe

    def test_default_is_read_back_unchanged(self):
        assert recipe_from_mapping(tomllib.loads(to_toml(Recipe())), "test") == Recipe()

    @pytest.mark.parametrize("name", ["torch/RAdam", "fastai/ranger"])
    def test_optimizers_of_libraries(self, name):
        assert self.recipe_with(f"name={name}", "lr=0.001").optimizer.name == name

    @pytest.mark.parametrize(
        ("assignments", "message"),
        [
            (["name=adam", "lr=1"], "optimizer.name: Unknown optimizer 'adam'"),
            (["name=torch/", "lr=1"], "Unknown optimizer 'torch/'"),
            (["name=adamw"], r"'adamw' needs optimizer.lr \(--lr\)"),
            (["name=adamw", "lr=1", "momentum=0.8"], "optimizer.momentum is a setting of sgd"),
            (["name=adamw", "lr=1", "nesterov=false"], "optimizer.nesterov is a setting of sgd"),
            (["options.eps=1"], "options is for optimizers other than sgd"),
            (["name=adamw", "lr=1", "options=3"], "is a section"),
            (
                ["name=adamw", "lr=1", "options.weight_decay=1"],
                "options.weight_decay is not allowed",
            ),
            (["name=fastai/Adam", "lr=1", "options.lr=1"], "options.lr is not allowed"),
            (["name=adamw", "lr=1", "options.a={b=1}"], "table of numbers"),
        ],
    )
    def test_invalid_settings_are_rejected(self, assignments, message):
        with pytest.raises(InputError, match=message):
            self.recipe_with(*assignments)


def test_settings_in_a_wrong_section_suggest_the_right_one():
    sections = {
        field.name: {inner.name for inner in dataclasses.fields(field.default)}
        for field in dataclasses.fields(Recipe)
        if dataclasses.is_dataclass(field.default)
    }
    pairs = [
        (section, name)
        for section, own in sections.items()
        for names in sections.values()
        for name in names - own
    ]
    assert len(pairs) > 300
    for section, name in pairs:
        with pytest.raises(InputError, match="unknown key") as caught:
            override(DEFAULTS, [f"{section}.{name}=1"])
        assert re.search(rf"Did you mean '(\w+\.)?{name}'\?\n", str(caught.value))
