import pytest

from mixmo_fastai.config.choices import DATASETS, parse_architecture
from mixmo_fastai.config.load import load_recipe, recipe_home, recipe_names
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.config.schema import to_toml
from mixmo_fastai.errors import InputError

# Top-1 accuracy in percent, from the poster's table or that of the published implementation.
PUBLISHED = {
    "cifar10/vanilla": 96.34,
    "cifar10/mixup": 97.07,
    "cifar10/cutmix": 97.23,
    "cifar10/deep-ensemble": 96.67,
    "cifar10/mimo": 96.74,
    "cifar10/linear-mixmo": 96.88,
    "cifar10/cut-mixmo": 97.51,
    "cifar10/linear-mixmo-cutmix": 97.73,
    "cifar10/cut-mixmo-cutmix": 97.83,
    "cifar100/vanilla": 81.63,
    "cifar100/mixup": 83.43,
    "cifar100/cutmix": 84.05,
    "cifar100/deep-ensemble": 83.17,
    "cifar100/mimo": 83.06,
    "cifar100/linear-mixmo": 82.96,
    "cifar100/cut-mixmo": 85.40,
    "cifar100/linear-mixmo-cutmix": 85.36,
    "cifar100/cut-mixmo-cutmix": 85.77,
    "tinyimagenet/vanilla": 65.78,
    "tinyimagenet/cutmix": 68.95,
    "tinyimagenet/deep-ensemble": 68.38,
    "tinyimagenet/mimo": 68.48,
    "tinyimagenet/linear-mixmo": 68.36,
    "tinyimagenet/cut-mixmo": 70.24,
    "tinyimagenet/vanilla-w1": 62.75,
    "tinyimagenet/vanilla-w2": 64.91,
    "tinyimagenet/linear-mixmo-w1": 62.91,
    "tinyimagenet/linear-mixmo-w2": 67.03,
    "tinyimagenet/cut-mixmo-w1": 64.32,
    "tinyimagenet/cut-mixmo-w2": 69.12,
}
MEASURED = {
    "small-cifar10/vanilla": 61.46,
    "small-cifar10/mixup": 65.64,
    "small-cifar10/cutmix": 61.20,
    "small-cifar10/deep-ensemble-cutmix": 63.59,
    "small-cifar10/cut-mixmo": 64.81,
    "small-cifar10/cut-mixmo-mixup": 64.75,
    "small-cifar10/cut-mixmo-short": 63.49,
    "small-cifar10/cut-mixmo-short-mixup": 63.85,
    "small-cifar10/mimo": 64.40,
    "small-cifar10/linear-mixmo": 64.96,
}
"""Mean accuracies in percent over seeds, from docs/results.md."""
SMALL_METHODS = (
    *("vanilla", "mixup", "cutmix", "deep-ensemble-cutmix"),
    *("mimo", "linear-mixmo", "cut-mixmo", "cut-mixmo-cutmix", "cut-mixmo-mixup"),
    *("cut-mixmo-short", "cut-mixmo-short-mixup"),
)
UNPUBLISHED = {
    *(f"small-cifar10/{method}" for method in SMALL_METHODS),
    "tinyimagenet/mixup",
    *(f"tinyimagenet/{method}-w{w}" for method in ("mixup", "cutmix", "mimo") for w in (1, 2)),
    *(f"digits/{method}" for method in ("vanilla", "mimo", "linear-mixmo", "cut-mixmo")),
}
FINE_TUNED = {
    f"fine-tune/{method}" for method in ("vanilla", "cutmix", "deep-ensemble-cutmix", "cut-mixmo")
}
OF_DATASETS = [name for name in recipe_names() if name not in FINE_TUNED]
METHODS = {  # members, mask kind, MSDA, repetitions
    "vanilla": (1, "sum", "none", 1),
    "mixup": (1, "sum", "mixup", 1),
    "cutmix": (1, "sum", "cutmix", 1),
    "deep-ensemble": (1, "sum", "none", 1),
    "deep-ensemble-cutmix": (1, "sum", "cutmix", 1),
    "mimo": (2, "sum", "none", 4),
    "linear-mixmo": (2, "linear", "none", 4),
    "cut-mixmo": (2, "cutmix", "none", 4),
    "linear-mixmo-cutmix": (2, "linear", "cutmix", 4),
    "cut-mixmo-cutmix": (2, "cutmix", "cutmix", 4),
    "cut-mixmo-mixup": (2, "cutmix", "mixup", 4),
    "cut-mixmo-short": (2, "cutmix", "none", 2),
    "cut-mixmo-short-mixup": (2, "cutmix", "mixup", 2),
}


def split_name(name):
    """Split "tinyimagenet/mimo-w2" into ("tinyimagenet", "mimo", 2)."""
    dataset, method = name.split("/")
    stem, marker, width = method.partition("-w")
    return dataset, stem, int(width) if marker else 3


def test_every_row_of_the_tables_has_a_recipe():
    assert set(recipe_names()) == set(PUBLISHED) | UNPUBLISHED | FINE_TUNED


@pytest.mark.parametrize("name", recipe_names())
def test_expected_accuracy_is_published_measured_or_absent(name):
    recipe = load_recipe(name)
    if (accuracy := (PUBLISHED | MEASURED).get(name)) is not None:
        assert recipe.expected.accuracy == pytest.approx(accuracy / 100, abs=1e-12)
        assert recipe.expected.source.startswith("measured") == (name in MEASURED)
        assert recipe.expected.source
        assert recipe.expected.arch == recipe.model.arch
    else:
        assert recipe.expected.accuracy is None


@pytest.mark.parametrize("name", recipe_names())
def test_settings_match_the_method_name(name):
    recipe, (_, method, _) = load_recipe(name), split_name(name)
    mix = recipe.mix
    members, kind, msda, repetitions = METHODS[method]
    if name == "fine-tune/cut-mixmo":
        repetitions = 2
    assert (
        recipe.model.num_members,
        mix.kind,
        mix.msda,
        mix.batch_repetitions,
    ) == (members, kind, msda, repetitions)
    assert recipe.model.num_nets == (2 if method.startswith("deep-ensemble") else 1)


@pytest.mark.parametrize(
    "name", [n for n in OF_DATASETS if not n.startswith(("digits", "small-cifar10"))]
)
def test_published_schedule_equals_the_published_training(name):
    """Rates, warm-up and milestones equal the published configurations, for one repetition."""
    recipe, (dataset, _, width) = load_recipe(name), split_name(name)
    published = resolve_recipe(recipe=name, assignments=["schedule.kind=published"])
    tiny = dataset == "tinyimagenet"
    assert recipe.model.arch == (f"preact_resnet18_{width}" if tiny else "wrn28_10")
    assert (recipe.train.epochs, recipe.train.batch_size) == ((1200, 100) if tiny else (300, 64))
    repeated_lr = published.lr * recipe.mix.batch_repetitions
    assert repeated_lr == pytest.approx(0.2 if tiny else 0.05)
    assert recipe.optimizer.weight_decay == (1e-4 if tiny else 6e-4)
    copies = recipe.mix.batch_repetitions
    per_copy = (1000, 100_000) if tiny else (782, 50_000)
    assert recipe.warmup_steps(per_copy[1]) == per_copy[0] * copies
    drops = [round(fraction * recipe.train.epochs) for fraction in recipe.schedule.milestones]
    assert drops == ([600, 900] if tiny else [101, 201, 226])


@pytest.mark.parametrize("name", sorted(FINE_TUNED))
def test_fine_tuning_takes_images_and_weights_from_the_command_line(name, tmp_path):
    with pytest.raises(InputError, match=f"The recipe {name} is for images of your own"):
        resolve_recipe(recipe=name)
    (tmp_path / "weights.pth").touch()
    weights = [f"model.weights={tmp_path / 'weights.pth'}", "model.arch=resnet18"]
    recipe = resolve_recipe(str(tmp_path), name, assignments=weights)
    assert recipe.data.dataset == str(tmp_path)
    assert recipe.model.pretrained
    assert recipe.schedule.kind == "fine-tune"
    assert recipe.optimizer.lr is not None
    own = load_recipe(name)
    assert (own.data.dataset, own.model.arch, own.train.epochs) == ("", None, None)


@pytest.mark.parametrize("name", OF_DATASETS)
def test_resolving_does_not_change_a_recipe(name):
    recipe = resolve_recipe(recipe=name)
    assert recipe == load_recipe(name)
    assert recipe.name == name
    assert recipe.title
    assert recipe.data.dataset == name.split("/")[0].removeprefix("small-")
    assert recipe.data.dataset in DATASETS
    assert parse_architecture(recipe.model.arch)


@pytest.mark.parametrize("name", recipe_names())
def test_written_recipe_is_read_back_unchanged(name, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(load_recipe(name)), encoding="utf-8")
    assert load_recipe(path) == load_recipe(name)


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_file_begins_with_accuracy_and_command(name):
    lines = (recipe_home() / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    comment = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    command = next(line for line in comment if "mixmo fit" in line)
    # The command may be followed by two spaces and a remark.
    arguments = command.lstrip("# ").split("  ")[0].split()
    assert arguments[:2] == ["mixmo", "fit"]
    dataset, recipe = (arguments[2], arguments[4]) if len(arguments) > 2 else (None, None)
    if name in FINE_TUNED:
        assert (dataset, recipe) == ("path/to/images", name)
    else:
        assert resolve_recipe(dataset, recipe) == load_recipe(name)
    if name in PUBLISHED:
        assert f"{PUBLISHED[name]:.2f} % top-1 published" in comment[0]
    if name in MEASURED:
        assert f"{MEASURED[name]:.2f} % top-1 measured" in comment[0]
