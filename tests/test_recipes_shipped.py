import pytest

from mixmo_fastai.names import DATASETS, parse_architecture
from mixmo_fastai.recipe import load_recipe, recipe_home, recipe_names, to_toml
from mixmo_fastai.resolve import METHODS, resolve_recipe

PUBLISHED = {  # top-1 in percent with WRN-28-10
    "cifar10/vanilla": 96.34,
    "cifar10/mimo": 96.74,
    "cifar10/linear-mixmo": 96.88,
    "cifar10/cut-mixmo": 97.51,
    "cifar100/vanilla": 81.63,
    "cifar100/mimo": 83.06,
    "cifar100/linear-mixmo": 82.96,
    "cifar100/cut-mixmo": 85.40,
}
KINDS = {method: kind for kind, method in METHODS.items()} | {"vanilla": "sum"}


def test_every_published_row_has_a_recipe():
    assert set(recipe_names()) >= set(PUBLISHED) | {"digits/cut-mixmo"}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_published_recipe_has_its_figure(name):
    recipe, (dataset, method) = load_recipe(name), name.split("/")
    assert recipe.expected.accuracy == pytest.approx(PUBLISHED[name] / 100, abs=1e-12)
    assert recipe.expected.source
    assert recipe.expected.arch == recipe.model.arch == "wrn28_10"
    assert recipe.data.dataset == dataset
    assert recipe.mix.kind == KINDS[method]
    is_single = method == "vanilla"
    assert (recipe.model.num_members == 1) == is_single
    assert (recipe.mix.batch_repetitions, recipe.train.epochs) == (1 if is_single else 4, 300)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_resolves_as_it_is(name):
    recipe = resolve_recipe(recipe=name)
    assert recipe == load_recipe(name)
    assert recipe.name == name
    assert recipe.title
    assert recipe.data.dataset == name.split("/")[0]
    assert recipe.data.dataset in DATASETS
    assert parse_architecture(recipe.model.arch)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_survives_its_own_file(name, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(load_recipe(name)), encoding="utf-8")
    assert load_recipe(path) == load_recipe(name)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_opens_with_figure_and_command(name):
    lines = (recipe_home() / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    comment = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    command = next(line for line in comment if "mixmo fit" in line)
    # The command is followed by spaces and a remark, or by nothing.
    words = command.lstrip("# ").split("  ")[0].split()
    assert words[:2] == ["mixmo", "fit"]
    dataset, named = (words[2], words[4]) if len(words) > 2 else (None, None)
    assert resolve_recipe(dataset, named) == load_recipe(name)
    if name in PUBLISHED:
        assert f"{PUBLISHED[name]:.2f} % top-1 published" in comment[0]
