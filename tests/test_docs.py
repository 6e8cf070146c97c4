"""The pages in docs/ are correct: their code, command lines, tables and names."""

import dataclasses
import io
import json
import math
import re
import runpy
import shlex
import tomllib
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import typer
from datasets import write_image_folder

from mixmo_fastai.cli import fit
from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.program import build_app, run
from mixmo_fastai.config.choices import COW_DEFAULTS, DATASETS, MASK_KINDS, MASK_OPTIONS
from mixmo_fastai.config.load import load_recipe, recipe_from_mapping, recipe_names
from mixmo_fastai.config.recipe import Recipe, default_valid_split
from mixmo_fastai.config.resolve import check_dataset, resolve_recipe
from mixmo_fastai.data.corruptions import BUILT_IN
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.splits import MIN_IMAGES_FOR_TEMPERATURE
from mixmo_fastai.metrics.summary import evaluate_logits

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in (*PAGES, ROOT / "README.md")}
COMMANDS = typer.main.get_command(build_app()).commands
PLACEHOLDERS = {"METHOD": "vanilla", "E": "4"}
FLAGS_OF_OTHER_PROGRAMS = {"--multi_gpu", "--node-rank", "--help"}
UsageError = typer.BadParameter.__mro__[1]

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
EXTENDING = "extending.md"  # its commands need its changes: `test_extending.py`
by_text = pytest.mark.parametrize("name", [name for name in TEXTS if name != EXTENDING])


COMMANDS_BEFORE_CODE = {
    "export.md": [
        "fit digits --arch wrn10_1 --limit 64 --epochs 1 --device cpu --out RUN --quiet",
        "export RUN --to net.pt2",
    ]
}


@pytest.mark.slow
@by_page
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in COMMANDS_BEFORE_CODE.get(page.name, ()):
        assert run(line.split()) == 0
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


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def prose(text):
    """Return a page without its fenced blocks."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def command_lines(text):
    """Yield the arguments of every `mixmo` command in the code blocks of a page."""
    shell = "\n".join(blocks(text, "bash"))
    shell += "\n" + "\n".join(re.findall(r"^    (.*)$", prose(text), flags=re.MULTILINE))
    for line in shell.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            arguments = shlex.split(re.sub(r"\b(METHOD|E)\b", lambda m: PLACEHOLDERS[m[0]], part))
            if ">" in arguments:
                arguments = arguments[: arguments.index(">")]
            if "mixmo_fastai" in arguments:
                yield arguments[arguments.index("mixmo_fastai") + 1 :]
            elif arguments[:1] == ["mixmo"]:
                yield arguments[1:]


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
        check_dataset(parsed["ood"])
    if arguments[0] == "recipes" and parsed["name"]:
        load_recipe(parsed["name"])


@pytest.fixture
def example_files(tmp_path, monkeypatch):
    """Create the files and folders that the pages' command lines name."""
    for folder in ("path/to/images", "cifar10-images", "data/flowers"):
        (tmp_path / folder).mkdir(parents=True)
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


def tables(text):
    """Return the tables of a page as lists of rows, which map column names to cells."""
    matches = re.findall(r"^(\|.*\|)\n\|[-|]+\|\n((?:\|.*\|\n)+)", text, flags=re.MULTILINE)
    return [[dict(zip(cells(head), cells(row), strict=True)) for row in body.splitlines()]
            for head, body in matches]  # fmt: skip


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def table(page, *columns):
    """Return the rows of the tables of a page that have these columns."""
    return [r for rows in tables(TEXTS[page]) for r in rows if set(columns) <= rows[0].keys()]


def names_in(text):
    return re.findall(r"`([^`\n]+)`", text)


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


def check_recipe(name, method, accuracy):
    recipe = load_recipe(name)
    for column in method.keys() - {"recipe", "approach"}:
        section, key = column.strip("`").split(".")
        assert str(getattr(getattr(recipe, section), key)) == method[column].strip("`"), name
    if accuracy == "-":
        assert recipe.expected.accuracy is None, name
        return
    assert f"{100 * recipe.expected.accuracy:.2f}" == accuracy.rstrip("†"), name
    assert recipe.expected.source.startswith("published") == accuracy.endswith("†"), name
    assert ("poster" in recipe.expected.source) != accuracy.endswith("†"), name
    if "digits" not in name:
        assert recipe.title.startswith(method["approach"].partition(" (")[0]), name


def test_table_of_data_sets_matches_the_recipes():
    for row in table("recipes.md", "data set", "`model.arch`"):
        for dataset in names_in(row["data set"]):
            for name in (n for n in recipe_names() if n.startswith(f"{dataset}/")):
                check_training(name, row)


def check_training(name, row):
    recipe, method = load_recipe(name), name.partition("/")[2]
    for column in row.keys() - {"data set"}:
        section, key = column.strip("`").split(".")
        usual, _, other = row[column].partition(", ")
        if other and names_in(other) == [method]:
            usual = other.split()[1]
        actual = getattr(getattr(recipe, section), key)
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


# docs/evaluation.md and the run folder


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Return a finished run and the JSON output of the commands that read it."""
    folder = tmp_path_factory.mktemp("small")
    path, images = folder / "run", folder / "images"
    arguments = ["--arch", "wrn10_1", "--limit", "48", "--batch-size", "16", "--device", "cpu"]
    assert run(["fit", *arguments, "--epochs", "1", "--quiet", "--out", str(path)]) == 0
    write_image_folder(images, classes=("a", "b"), num_train=4, num_test=4)
    options = ["--ood", str(images), "--corruptions", "built-in"]
    return {
        "folder": path,
        "eval": as_json("eval", path, *options),
        "fused": as_json("eval", path, "--fused"),
        "predict": as_json("predict", path, images),
        "report": as_json("report", path),
    }


def as_json(*arguments):
    text = io.StringIO()
    with redirect_stdout(text):
        assert run([*map(str, arguments), "--json"]) == 0
    return json.loads(text.getvalue())


def keys_of(metrics):
    for key, value in metrics.items() if isinstance(metrics, dict) else ():
        yield key
        yield from keys_of(value)


DOCUMENTED = set(names_in(prose(TEXTS["evaluation.md"])))
RANGES = {
    name: row["range"]
    for row in table("evaluation.md", "key", "range")
    for name in names_in(row["key"])
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eval", "fused"])
def test_every_key_of_eval_is_documented(small_run, kind):
    keys = set(keys_of(small_run[kind]))
    assert ("absent" in keys) == (kind == "fused")
    assert keys <= DOCUMENTED, keys - DOCUMENTED
    assert set(BUILT_IN) <= DOCUMENTED


def test_every_key_of_metrics_json_is_documented(small_run):
    metrics = json.loads((small_run["folder"] / "metrics.json").read_text())
    assert set(keys_of(metrics)) <= DOCUMENTED


def test_tables_of_metrics_list_all_keys_of_eval(small_run):
    metrics = small_run["eval"]
    assert set(metrics["test"]) <= RANGES.keys()
    assert set(metrics["ood"]["entropy"]) <= RANGES.keys()
    top_level = {
        name for row in table("evaluation.md", "key", "meaning") for name in names_in(row["key"])
    }
    not_in_every_run = {"absent", "valid_mean_probabilities"}
    assert set(metrics) | not_in_every_run == top_level


def confident_metrics(is_correct):
    """Compute the metrics of two confident members, all correct or all incorrect."""
    labels = torch.arange(8) % 6
    logits = 100 * torch.nn.functional.one_hot(labels if is_correct else (labels + 1) % 6, 6)
    member_logits = torch.stack([logits, logits.flip(0)], dim=1).float()
    return evaluate_logits(torch.stack([logits, logits], dim=1).float(), labels) | {
        "mutual_information": evaluate_logits(member_logits, labels)["mutual_information"]
    }


def test_metrics_are_in_their_ranges_and_reach_the_ends(small_run):
    ends = {"0 to 1": (0, 1), "0 to 2": (0, 2), "0 to ∞": (0, math.inf), "as above": (0, math.inf)}
    ends |= {"0 to log M": (0, math.log(2)), "0.001 to 1000": (0.001, 1000)}
    parts = [small_run["eval"][name] for name in ("test", "valid", "test_mean_probabilities")]
    values_by_name = {}
    for part in (*parts, confident_metrics(is_correct=True), confident_metrics(is_correct=False)):
        for name, values in part.items():
            if name != "absent":
                values_by_name.setdefault(name, []).extend(
                    values if isinstance(values, list) else [values]
                )
    for name, values in values_by_name.items():
        low, high = ends[RANGES[name]]
        assert low - 1e-9 <= min(values), name
        assert max(values) <= high + 1e-9, name
    for name in ("accuracy", "brier", "ece", "aurc", "risk_at_90", "temperature"):
        assert max(values_by_name[name]) == pytest.approx(ends[RANGES[name]][1]), name


def test_columns_of_predictions_are_documented(small_run):
    rows = [names_in(row["column"])[0] for row in table("evaluation.md", "column", "meaning")]
    assert rows == list(small_run["predict"]["predictions"][0])
    assert set(small_run["predict"]) - {"predictions"} <= DOCUMENTED


def test_files_of_a_run_folder_are_documented(small_run):
    rows = {
        name for row in table("recipes.md", "file", "content") for name in names_in(row["file"])
    }
    names = {path.name + "/" * path.is_dir() for path in small_run["folder"].iterdir()}
    assert names == rows - {
        "net-1/",
        "net-2/",
        "logs/",
        "left-out.json",
        "split.json",
    }  # not in every run


def test_min_images_for_a_temperature_is_documented():
    rows = table("evaluation.md", "use it")
    assert f"{MIN_IMAGES_FOR_TEMPERATURE} images" in rows[0]["$T$ is fitted on"]
    assert f"{2 * MIN_IMAGES_FOR_TEMPERATURE} images" in rows[1]["$T$ is fitted on"]
