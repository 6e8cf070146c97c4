"""Data of studies: equal test images, moved folders, and results without the data."""

from dataclasses import replace

import pytest
from label_tables import simple_rows, write_images, write_table
from test_study_results import TEXT, random_predictions, write_run

from mixmo_fastai.cli import run as program
from mixmo_fastai.data.fingerprint import fingerprint_of
from mixmo_fastai.data.run_data import read_source
from mixmo_fastai.data.sources import load_source
from mixmo_fastai.errors import InputError, RunFailedError
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.data_facts import DataFacts
from mixmo_fastai.runs.lock import locked
from mixmo_fastai.study.execute import Executor, check_one_label_per_image
from mixmo_fastai.study.plan import read_study
from mixmo_fastai.study.predictions import Predictions
from mixmo_fastai.study.records import check_not_moved, check_unchanged, write_record
from mixmo_fastai.study.results import collect_results

WEIGHTS = """
[methods.plain]
recipe = "fine-tune/vanilla"
set = ["model.arch=resnet18", "model.weights=net.safetensors"]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(TEXT)
    return path


@pytest.fixture
def study(file):
    return read_study(file)


@pytest.fixture
def out(study, tmp_path):
    """The folder of a finished study."""
    for number, run in enumerate(study.runs):
        write_run(tmp_path / "out", run, random_predictions(10 * number))
    return tmp_path / "out"


def test_runs_on_other_images_are_not_compared(study, out):
    last = random_predictions(1)
    rolled = Predictions(last.labels.roll(1), last.correct, last.confidence, last.nll)
    message = "mixed-1000-seed2 was evaluated on other images than"
    write_run(out, study.runs[-1], rolled)
    with pytest.raises(InputError, match=message):
        collect_results(study, out)
    known = replace(last, images="10 images, checksum a")  # those of the others are not known
    write_run(out, study.runs[-1], known)
    collect_results(study, out)
    write_run(out, study.runs[-2], replace(random_predictions(2), images="checksum b"))
    with pytest.raises(InputError, match="was evaluated on other images than"):
        collect_results(study, out)


def test_data_set_may_be_in_another_folder(file, tmp_path):
    out, images = tmp_path / "results", tmp_path / "images"
    images.mkdir()
    moved = tmp_path / "elsewhere" / "images"
    moved.mkdir(parents=True)
    for run in read_study(file, str(images)).runs:
        write_run(out, run, random_predictions(run.seed))
    assert len(collect_results(read_study(file, str(moved)), out)) == 2
    other = tmp_path / "others"
    other.mkdir()
    with pytest.raises(InputError, match=r"with the data set 'images'; the study now has 'others'"):
        collect_results(read_study(file, str(other)), out)


def test_fingerprints_are_kept_in_the_files(tmp_path):
    images = load_source("digits").test
    known = replace(random_predictions(1), images=fingerprint_of(images))
    path = tmp_path / "one.safetensors"
    path.write_bytes(known.to_bytes())
    assert Predictions.read(path).images == fingerprint_of(images)
    path.write_bytes(random_predictions(1).to_bytes())
    assert Predictions.read(path).images == ""


def test_results_need_neither_data_nor_weights(file, tmp_path, capsys):
    images, weights = tmp_path / "images", tmp_path / "net.safetensors"
    images.mkdir()
    weights.touch()
    file.write_text(
        TEXT.partition("[methods.plain]")[0] + WEIGHTS.replace("net.safetensors", str(weights))
    )
    arguments = ["study", str(file), "--out", str(tmp_path / "out"), "--dataset", str(images)]
    for run in read_study(file, str(images)).runs:
        write_run(tmp_path / "out", run, random_predictions(run.seed))
    images.rmdir()
    weights.unlink()
    assert program([*arguments, "--summary"]) == 0
    assert "| plain | 0, 1, 2 |" in capsys.readouterr().out
    assert program(arguments) == 2
    assert "There is no folder" in capsys.readouterr().err


def test_interrupted_runs_need_their_data_where_it_was(file, tmp_path):
    former, present = tmp_path / "former" / "images", tmp_path / "present" / "images"
    for folder in (former, present):
        folder.mkdir(parents=True)
    out = tmp_path / "results"
    runs = read_study(file, str(former)).runs
    for run in runs:
        write_run(out, run, random_predictions(run.seed))
    (runs[0].folder(out).path / "metrics.json").unlink()
    moved = read_study(file, str(present))
    check_not_moved(moved.runs[0], out)  # still there
    former.rmdir()
    assert len(collect_results(moved, out)) == 2
    lines = []
    with locked(runs[0].folder(out).path):  # another process has the data where it was
        Executor(out, print_line=lines.append).train(moved.runs)
    assert lines == [f"{runs[0].name}: another process trains it"]
    with pytest.raises(RunFailedError) as error:
        Executor(out, print_line=lines.append).train(moved.runs)
    assert f"{runs[0].name}: was started with {former}, which no" in str(error.value)
    assert len(str(error.value).splitlines()) == 3
    assert lines[-1].startswith(f"{runs[0].name}: failed. ")


def test_runs_with_a_state_do_not_need_their_weights(file, tmp_path):
    weights = tmp_path / "former.pth"
    weights.write_bytes(b"")
    file.write_text(TEXT + f'set = ["model.weights={weights}"]\n')
    run = next(run for run in read_study(file).runs if run.recipe.model.weights)
    write_record(run, tmp_path)
    run.folder(tmp_path).path.mkdir(parents=True)
    other = replace(run, recipe=replace(run.recipe, model=replace(run.recipe.model, weights="x")))
    weights.unlink()
    with pytest.raises(InputError, match=r"former\.pth, which no longer exists"):
        check_not_moved(other, tmp_path)
    (run.folder(tmp_path).checkpoint / "save-1").mkdir(parents=True)
    check_not_moved(other, tmp_path)


def test_other_data_sets_of_the_hub_are_noticed(tmp_path):
    file = tmp_path / "study.toml"
    file.write_text('images_seen = [8]\n[methods.plain]\nrecipe = "small-cifar10/vanilla"\n')
    (run,) = read_study(file, "hf:alice/pets").runs
    run.folder(tmp_path).path.mkdir(parents=True)
    write_record(run, tmp_path)
    check_unchanged([run], tmp_path)
    with pytest.raises(
        InputError, match=r"'hf:alice/pets'; .*'hf:bob/pets'.\n.*--dataset hf:alice"
    ):
        check_unchanged(read_study(file, "hf:bob/pets").runs, tmp_path)


def test_removed_settings_are_noticed(file, tmp_path):
    file.write_text(TEXT + 'set = ["mix.early_repetition=1"]\n')
    for run in read_study(file).runs:
        write_run(tmp_path, run, random_predictions(run.seed))
    file.write_text(TEXT)
    with pytest.raises(InputError) as error:
        collect_results(read_study(file), tmp_path)
    assert str(error.value).startswith(
        "mixed-1000-seed0 was started with mix.early_repetition=1.0; the study now has no "
        "mix.early_repetition.\n"
    )


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data", "num_workers", 1),
        ("train", "threads", 1),
        ("train", "compile", "off"),
        ("train", "memory_format", "channels-first"),
    ],
)
def test_settings_of_the_machine_may_change(study, out, section, key, value):
    recipe = study.runs[0].recipe
    part = replace(getattr(recipe, section), **{key: value})
    changed = replace(recipe, **{section: part})
    assert changed != recipe
    check_unchanged([replace(study.runs[0], recipe=changed)], out)


def test_the_message_about_changed_settings_says_what_to_do(file, study, out):
    file.write_text(TEXT.replace('"model.arch=wrn10_1"', '"model.arch=wrn10_2"'))
    changed = read_study(file).runs
    with pytest.raises(InputError, match=r"use another --out, or undo the change"):
        check_unchanged(changed, out)
    (out / "runs" / study.runs[0].name / "metrics.json").unlink()
    with pytest.raises(InputError, match=rf"delete .*{study.runs[0].name} to train the run again"):
        check_unchanged(changed, out)


def test_other_expected_figures_are_no_other_settings(study, out):
    run = study.runs[0]
    expected = replace(run.recipe.expected, accuracy=0.9)
    changed = replace(run, recipe=replace(run.recipe, expected=expected))
    assert run.recipe != changed.recipe
    write_record(changed, out)
    check_unchanged([run], out)


@pytest.mark.parametrize(
    ("setting", "is_refused"),
    [
        ("data.label_column=kind", False),
        ("data.label_column=tags", True),
        ("data.label_column=colour", False),
        ("data.label_delimiter=+", True),
    ],
)
def test_tables_are_read_with_the_settings_of_the_runs(tmp_path, setting, is_refused):
    write_images(tmp_path, [f"photos/{index:02d}.png" for index in range(24)])
    colours = ("red+blue", "red", "blue")
    rows = [
        [path, kind, "a|b" if index % 2 else "a", colours[index % 3]]
        for index, (path, kind) in enumerate(simple_rows())
    ]
    header = ["path", "kind", "tags", "colour"]
    if "delimiter" in setting:  # the column is guessed
        header[3] = "label"
    table = write_table(tmp_path / "labels.csv", header, rows)
    file = tmp_path / "study.toml"
    text = 'images_seen = [8]\nset = ["{}"]\n[methods.plain]\nrecipe = "small-cifar10/vanilla"\n'
    file.write_text(text.format(setting))
    runs = read_study(file, str(table)).runs
    assert read_source(runs[0].recipe, None).is_multi_label == is_refused
    if is_refused:
        with pytest.raises(InputError, match=r"one label per image; those of .*labels\.csv may"):
            check_one_label_per_image(runs, tmp_path / "out")
    else:
        check_one_label_per_image(runs, tmp_path / "out")


@pytest.mark.parametrize("is_multi_label", [False, True])
def test_tables_of_started_runs_are_not_read_again(tmp_path, study, is_multi_label):
    run = study.runs[0]
    run = replace(run, recipe=replace(run.recipe, data=replace(run.recipe.data, dataset="no.csv")))
    classes = ("cat", "dog")
    folder = create_run(run.recipe, run.folder(tmp_path).path)
    folder.write_data_facts(
        DataFacts(classes, (0.5,), (0.2,), (1, 8, 8), is_multi_label=is_multi_label)
    )
    if is_multi_label:
        with pytest.raises(InputError, match=r"one label per image"):
            check_one_label_per_image([run], tmp_path)
    else:
        check_one_label_per_image([run], tmp_path)


def test_a_file_whose_name_cannot_be_that_of_the_study(tmp_path):
    path = tmp_path / "my study.toml"
    path.write_text(TEXT.replace('name = "made-up"', ""))
    with pytest.raises(InputError, match=r"letters.*\nThe file has no name, so that of the"):
        read_study(path)


@pytest.mark.parametrize("fixed", [None, "validation", "test"])
def test_methods_have_equal_validation_images_if_they_are_evaluated_on_them(tmp_path, fixed):
    parts = [""] if fixed is None else ["train", fixed]
    write_images(
        tmp_path / "images", [f"{part}/{c}/1.png".lstrip("/") for part in parts for c in "ab"]
    )
    text = f'''
dataset = "{tmp_path / "images"}"
images_seen = [1000]
set = ["data.test_split=0"]
[methods.a]
recipe = "digits/vanilla"
set = ["data.valid_split=0.2"]
[methods.b]
recipe = "digits/vanilla"
set = ["data.valid_split=0.3"]
'''
    (tmp_path / "study.toml").write_text(text)
    if fixed is not None:
        assert len(read_study(tmp_path / "study.toml").runs) == 2
        return
    with pytest.raises(InputError, match=r"data\.valid_split differs between methods: 0.2, 0.3"):
        read_study(tmp_path / "study.toml")
