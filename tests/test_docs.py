"""The pages in docs/ are correct: their code, command lines, tables and names."""

import dataclasses
import re
import runpy
import tomllib
from pathlib import Path

import pytest
import typer
from pages import EXTENDING, PAGES, ROOT, TEXTS, blocks, command_lines, names_in, prose, table

from mixmo_fastai.cli import fit
from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.program import build_app
from mixmo_fastai.cli.program import run as program
from mixmo_fastai.config import choices
from mixmo_fastai.config.choices import COW_DEFAULTS, DATASETS, MASK_KINDS, MASK_OPTIONS
from mixmo_fastai.config.load import load_recipe, recipe_from_mapping, recipe_names
from mixmo_fastai.config.recipe import Recipe, default_valid_split
from mixmo_fastai.config.resolve import check_ood, resolve_recipe
from mixmo_fastai.errors import InputError

COMMANDS = typer.main.get_command(build_app()).commands
FLAGS_OF_OTHER_PROGRAMS = {"--multi_gpu", "--node-rank", "--help"}
UsageError = typer.BadParameter.__mro__[1]

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
by_text = pytest.mark.parametrize("name", [name for name in TEXTS if name != EXTENDING])


COMMANDS_BEFORE_CODE = {
    "export.md": [
        "fit digits --arch wrn10_1 --limit 64 --epochs 1 --device cpu --out RUN --quiet",
        "export RUN --to net.pt2",
        "push RUN --to hub-folder",
    ]
}


@pytest.fixture
def restored_tables():
    """Remove the names that the code of a page registers."""
    names = ("MASK_REGIONS", "NETWORKS", "READOUTS", "TRANSFORMS", "LOSSES", "OPTIMIZERS")
    tables = [getattr(choices, name) for name in names]
    before = [dict(each) for each in tables]
    yield
    for each, entries in zip(tables, before, strict=True):
        each.clear()
        each.update(entries)


@pytest.mark.slow
@by_page
def test_code_runs(page, tmp_path, monkeypatch, restored_tables):
    monkeypatch.chdir(tmp_path)
    for line in COMMANDS_BEFORE_CODE.get(page.name, ()):
        assert program(line.split()) == 0
    for number, block in enumerate(blocks(TEXTS[page.name], "python")):
        exec(compile(block, f"{page.name}, block {number}", "exec"), {})


@by_page
def test_named_files_exist(page):
    text = TEXTS[page.name]
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for name in re.findall(r"`((?:tests|docs|benchmarks|recipes|mixmo_fastai)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("name", TEXTS)
def test_linked_headings_exist(name):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", TEXTS[name]):
        headings = re.findall(r"^#+ (.+)$", TEXTS[Path(target or name).name], re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


# Command lines


def check_command_line(arguments):
    """Parse the arguments of a command, and run the checks that precede its work."""
    assert arguments[0] in COMMANDS, arguments
    parsed = COMMANDS[arguments[0]].make_context(arguments[0], arguments[1:]).params
    opt.check_device(parsed.get("device"))
    flags = {name: parsed[name] for name in opt._SETTINGS if name in parsed}
    if parsed.get("resume"):
        fit._check_no_settings(
            [parsed["dataset"], parsed["recipe"], parsed["out"], *flags.values()]
        )
    elif "dataset" in parsed and "assignments" in parsed:
        settings, assignments = opt.flags(**flags), parsed["assignments"] or ()
        resolve_recipe(parsed["dataset"], parsed["recipe"], settings, assignments)
    if parsed.get("ood"):
        check_ood(parsed["ood"], "cifar10")
    if arguments[0] == "recipes" and parsed["name"]:
        load_recipe(parsed["name"])


@pytest.fixture
def example_files(tmp_path, monkeypatch):
    """Create the files and folders that the pages' command lines name."""
    for folder in ("path/to/images", "cifar10-images", "tiny-imagenet-200", "data/flowers"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("labels.csv", "lesions.csv", "tags.csv", "flags.csv"):
        (tmp_path / "path/to" / name).touch()
    for weights in ("convnext.safetensors", "runs/other/model.safetensors"):
        (tmp_path / weights).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / weights).touch()
    (recipe,) = blocks(TEXTS["recipes.md"], "toml")
    (tmp_path / "flowers.toml").write_text(recipe, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@by_text
def test_command_lines_are_valid(name, example_files):
    for arguments in command_lines(TEXTS[name]):
        check_command_line(arguments)


def test_command_lines_are_found():
    lines = {name: [" ".join(w) for w in command_lines(text)] for name, text in TEXTS.items()}
    assert "fit" in lines["README.md"]  # after pip install . &&
    resolved = "fit cifar10-images --recipe cifar10/vanilla --arch wrn10_1 --epochs 4"
    assert resolved in lines["results.md"]
    assert any(line.endswith("--out /shared/runs/cut-mixmo") for line in lines["distributed.md"])
    assert "eval RUN --json" in lines["evaluation.md"]


@pytest.mark.parametrize(
    "line",
    [
        "fti",
        "fit --epoch 3",
        "fit --epochs three",
        "fit --epochs 0",
        "fit --mix cutmx",
        "fit --recipe cifar10/none",
        "fit --set train.epoch=3",
        "fit --device gpu",
        "fit cifra10",
        "fit --resume RUN --epochs 3",
        "eval",
        "eval RUN --ood cifra10",
        "show --count 99",
        "recipes cifar10/none",
    ],
)
def test_invalid_command_lines_are_detected(line, example_files):
    with pytest.raises((AssertionError, UsageError, InputError)):
        check_command_line(line.split())


@by_text
def test_commands_and_flags_in_sentences_exist(name):
    parameters = [parameter for command in COMMANDS.values() for parameter in command.params]
    known = {flag for parameter in parameters for flag in parameter.opts} | FLAGS_OF_OTHER_PROGRAMS
    spans = names_in(prose(TEXTS[name]))
    for span in spans:
        if span.startswith("mixmo "):
            assert span.split()[1] in COMMANDS or span.split()[1].startswith("--"), span
        if span.startswith(("mixmo ", "--")):
            flags = set(re.findall(r"(?<!\S)--[\w-]+", span))
            assert flags <= known, span


# Tables


def value(cell):
    """Parse a cell as TOML, with fractions; "-" is None."""
    if cell == "-":
        return None
    text = re.sub(r"(\d+)/(\d+)", lambda m: repr(int(m[1]) / int(m[2])), cell.strip("`"))
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


# docs/recipes.md

METHODS = {names_in(row["recipe"])[0]: row for row in table("recipes.md", "`mix.kind`")}
EXPECTED_ACCURACIES = {names_in(row["recipe"])[0]: row for row in table("recipes.md", "`cifar10/`")}


def all_settings():
    """Yield the name, field and default of every setting."""
    for field in dataclasses.fields(Recipe):
        if dataclasses.is_dataclass(field.default):
            for inner in dataclasses.fields(field.default):
                yield f"{field.name}.{inner.name}", inner, getattr(field.default, inner.name)
        else:
            yield field.name, field, field.default


def test_every_setting_is_documented_with_its_default():
    rows = {names_in(row["setting"])[0]: row for row in table("recipes.md", "setting", "default")}
    assert rows.keys() == {name for name, *_ in all_settings()}
    flags = {setting: flag for flag, setting in opt._SETTINGS.items()}
    for name, field, default in all_settings():
        row = rows[name]
        documented = value(row["default"])
        assert documented == (list(default) if isinstance(default, tuple) else default), name
        assert type(documented) is type(default) or isinstance(default, tuple), name
        assert row["meaning"], name
        assert set(field.metadata.get("choices", ())) <= {*names_in(row["meaning"])}, name
        flag = {"compiled": "compile"}.get(flags.get(name), flags.get(name))
        assert row["flag"] == (f"`--{flag.replace('_', '-')}`" if flag else ""), name


def test_defaults_of_mask_options_are_documented():
    rows = {names_in(row["setting"])[0]: row for row in table("recipes.md", "setting", "default")}
    for name, default in {**COW_DEFAULTS, "block_size": 7}.items():
        assert rows[f"mix.{name}"]["meaning"].endswith(f"; {default:g}")


def test_tables_of_recipes_match_the_recipes():
    names_by_column = {
        "`cifar10/`": "cifar10/{}",
        "`cifar100/`": "cifar100/{}",
        "`digits/`": "digits/{}",
        "`small-cifar10/`": "small-cifar10/{}",
        "`fine-tune/`": "fine-tune/{}",
    }
    names_by_column["`tinyimagenet/`"] = "tinyimagenet/{}"
    names_by_column |= {f"its `-w{w}`": f"tinyimagenet/{{}}-w{w}" for w in (1, 2)}
    documented = set()
    assert METHODS.keys() == EXPECTED_ACCURACIES.keys()
    for method, row in EXPECTED_ACCURACIES.items():
        for column, name in names_by_column.items():
            if row[column]:
                check_recipe(name.format(method), METHODS[method], row[column])
                documented.add(name.format(method))
    assert documented == set(recipe_names())


def value_of(cell, name):
    """Return the value in a cell such as "4, `fine-tune` 2", where that of one name differs."""
    usual, _, other = cell.partition(", ")
    return other.split()[1] if other and names_in(other) == [name] else usual


def check_recipe(name, method, accuracy):
    recipe = load_recipe(name)
    for column in method.keys() - {"recipe", "approach"}:
        section, key = column.strip("`").split(".")
        documented = value_of(method[column], name.partition("/")[0])
        assert str(getattr(getattr(recipe, section), key)) == documented.strip("`"), name
    if accuracy == "-":
        assert recipe.expected.accuracy is None, name
        return
    assert f"{100 * recipe.expected.accuracy:.2f}" == accuracy.rstrip("†*"), name
    marks = {"published implementation": "†", "MixMo (ICCV 2021), poster": "", "measured": "*"}
    (mark,) = [mark for text, mark in marks.items() if recipe.expected.source.startswith(text)]
    assert accuracy.lstrip("0123456789.") == mark, name
    if "digits" not in name:
        assert recipe.title.startswith(re.split(r" \(|, ", method["approach"])[0]), name


def test_table_of_data_sets_matches_the_recipes():
    for row in table("recipes.md", "data set", "`model.arch`"):
        for dataset in names_in(row["data set"]):
            for name in (n for n in recipe_names() if n.startswith(f"{dataset}/")):
                check_training(name, row)


def check_training(name, row):
    recipe, method = load_recipe(name), name.partition("/")[2]
    for column in row.keys() - {"data set"}:
        section, key = column.strip("`").split(".")
        usual = value_of(row[column], method)
        actual = getattr(getattr(recipe, section), key)
        if usual == "-":
            assert actual is None, (name, column)
            continue
        if key == "valid_split" and actual is None:
            actual = default_valid_split(DATASETS[recipe.data.dataset].num_images[0])
        if key == "arch" and (width := re.search(r"-w(\d)$", name)):
            actual = re.sub(r"\d$", "3", actual) if actual.endswith(width[1]) else actual
        assert actual == value(usual), (name, column)


def test_example_of_a_custom_recipe_is_valid():
    (block,) = blocks(TEXTS["recipes.md"], "toml")
    assert recipe_from_mapping(tomllib.loads(block), "recipes.md").name == "flowers"


# docs/method.md


def test_every_mask_kind_is_documented():
    rows = table("method.md", "kind")
    assert [name for row in rows for name in names_in(row["kind"])] == list(MASK_KINDS)
    documented = {
        name: names_in(" ".join(row.values())) for row in rows for name in names_in(row["kind"])
    }
    for kind, options in MASK_OPTIONS.items():
        assert set(options) <= set(documented[kind])


def test_image_of_masks_shows_every_mask_kind(tmp_path):
    script = runpy.run_path(str(ROOT / "docs/images/masks.py"))
    assert [kind for kind, num_members in script["PANELS"] if num_members == 2] == list(MASK_KINDS)
    script["main"](tmp_path / "masks.png")
    for image in (tmp_path / "masks.png", ROOT / "docs/images/masks.png"):
        assert image.read_bytes().startswith(b"\x89PNG")
        assert 5_000 < image.stat().st_size < 60_000


def test_image_of_measured_results_shows_the_runs_in_the_repository(tmp_path):
    script = runpy.run_path(str(ROOT / "docs/images/when.py"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for method in script["METHODS"]:
        values = script["accuracies"](script["read_runs"](method))
        assert f"{sum(values) / len(values):.2f}" in text
    script["main"](tmp_path / "when.png")
    for image in (tmp_path / "when.png", ROOT / "docs/images/when.png"):
        assert image.read_bytes().startswith(b"\x89PNG")
        assert 5_000 < image.stat().st_size < 60_000
