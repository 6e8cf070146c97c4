"""Files, commands and names in the README exist, and its code runs."""

import re
import tomllib
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import pytest
from fastai.callback.core import Callback

import mixmo_fastai
from mixmo_fastai.cli.program import _COMMANDS
from mixmo_fastai.config.choices import DATASETS, MASK_KINDS
from mixmo_fastai.config.load import load_recipe
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.config.schema import to_mapping

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TREE = re.search(r"```\n(mixmo_fastai/.*?)```", CONTRIBUTING, flags=re.DOTALL)[1]


def tree_paths():
    for line in TREE.splitlines():
        name = line.split()[0]
        yield f"mixmo_fastai/{name}" if line.startswith("  ") else name


@pytest.mark.parametrize("path", list(tree_paths()))
def test_files_in_the_layout_exist(path):
    assert (ROOT / path).exists()


def test_layout_is_complete():
    listed = {path.rstrip("/") for path in tree_paths()}
    modules = {
        f"mixmo_fastai/{path.name}"
        for path in (ROOT / "mixmo_fastai").iterdir()
        if not path.name.startswith("__") and (path.suffix == ".py" or path.is_dir())
    }
    assert modules <= listed


def test_callbacks_are_listed_with_their_orders():
    listed = {
        name: int(order)
        for order, names in re.findall(r"^\| (-?\d+) \| (`\w.*?) \| ", CONTRIBUTING, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", names)
    }
    for module in walk_packages(mixmo_fastai.__path__, "mixmo_fastai."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    expected = {
        kind.__name__: kind.order
        for kind in subclasses(Callback)
        if kind.__module__.startswith("mixmo_fastai.") and not kind.__name__.startswith("_")
    }
    bases = {"TrainedEpochCallback", "RunCallback", "PlainErrorCallback"}
    assert listed == {name: order for name, order in expected.items() if name not in bases}
    assert list(listed.values()) == sorted(listed.values())


def subclasses(kind):
    for subclass in kind.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_all_commands_are_listed():
    named = set(re.findall(r"^\| `mixmo ([\w-]+)", README, flags=re.MULTILINE))
    assert named == set(_COMMANDS)


def test_all_datasets_and_mask_kinds_are_listed():
    for name in (*DATASETS, *MASK_KINDS):
        assert f"`{name}`" in README, name


def test_both_commands_create_an_environment():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prefix = "python3 -m venv .venv && . .venv/bin/activate && "
    commands = re.findall(rf"^    {re.escape(prefix)}(.*)$", README, flags=re.MULTILINE)
    assert commands == [
        "pip install . && mixmo fit",
        'pip install -e ".[dev]" && python -m pytest -n auto',
    ]
    assert "mixmo" in project["scripts"]
    assert "dev" in project["optional-dependencies"]


def test_main_command_is_the_published_recipe():
    recipe = resolve_recipe("cifar100", None, {"model.arch": "wrn28_10", "mix.kind": "cutmix"})
    assert to_mapping(recipe) == to_mapping(load_recipe("cifar100/cut-mixmo"))


@pytest.mark.slow
def test_code_runs():
    names = {}
    for block in CODE:
        quick = block.replace("fit_one_cycle(3,", "fit_one_cycle(1,")
        quick = quick.replace("valid_split=0.1)", "valid_split=0.1, limit=200)")
        exec(compile(quick, "README.md", "exec"), names)
    assert names["learn"].model.num_members == 2
    assert names["learn"].mix_mo.epochs_trained == 1


def test_every_listed_learner_feature_has_a_test():
    (table,) = re.findall(r"\| feature \|.*?\n\n", README, flags=re.DOTALL)
    first_cells = [row.split("|")[1] for row in table.strip().splitlines()[2:]]
    features = [name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)]
    patterns = ("test_learner_features*.py", "test_distributed*.py")
    files = [file for pattern in patterns for file in (ROOT / "tests").glob(pattern)]
    sources = "".join(file.read_text(encoding="utf-8") for file in files)
    tests = re.findall(r"^def test_(\w+)\(", sources, flags=re.MULTILINE)
    assert len(features) > 25
    for feature in features:
        snake_case = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", feature).lower()
        assert any(re.search(rf"(^|_){snake_case}($|_)", test) for test in tests), feature
