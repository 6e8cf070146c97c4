"""Checkpoints on disk are complete and intact, or skipped, wherever a process ends."""

import json
import os
import shutil

import pytest
import torch
from disk_faults import CONTENT, run_and_kill
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from short_runs import EVERYTHING, TINY, assert_same, fit

from mixmo_fastai.config.load import load_recipe, override
from mixmo_fastai.config.schema import to_mapping
from mixmo_fastai.errors import InputError
from mixmo_fastai.runs import checkpoints as store_module
from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.training.identity import comparable
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.train import train

pytestmark = pytest.mark.slow


def read(saved):
    return {name: (saved.path / name).read_bytes() for name in saved.files}


@pytest.fixture(scope="module")
def uninterrupted_run(tmp_path_factory):
    recipe = override(TINY, [*EVERYTHING, "train.epochs=2", "data.limit=32"])
    run = create_run(recipe, tmp_path_factory.mktemp("uninterrupted") / "run")
    fit(run)
    return run


@pytest.fixture(scope="module")
def stopped_run(uninterrupted_run, tmp_path_factory):
    """Train a run that saved three times, keeping two checkpoints; return it and its next save."""
    folder = tmp_path_factory.mktemp("stopped_run")
    run = create_run(uninterrupted_run.recipe(), folder / "run")
    fit(run, (0, 1))
    fit(run, (1, 1), resume=True)
    shutil.copytree(run.path, folder / "later")
    later = open_run(folder / "later")
    fit(later, (1, 3), resume=True)
    return run, [*read(CheckpointStore(later.checkpoint).newest()).items()]


def copy_run(run, folder):
    shutil.copytree(run.path, folder)
    return open_run(folder)


def names(run):
    return sorted(path.name for path in run.checkpoint.iterdir())


def test_two_checkpoints_are_kept(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoint")
    assert store.newest() is None
    for number in range(5):
        store.save([("state.json", b"%d" % number)])
        assert read(store.newest()) == {"state.json": b"%d" % number}
    assert sorted(p.name for p in store.folder.iterdir()) == ["save-000004", "save-000005"]


def test_hidden_files_of_file_managers_are_ignored(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoint")
    store.folder.mkdir()
    (store.folder / ".DS_Store").write_bytes(b"icons")
    assert store.newest() is None
    (store.folder / ".DS_Store").unlink()
    for number in range(2):
        store.save([("state.json", b"%d" % number)])
    for folder in store.folder.iterdir():
        (folder / ".DS_Store").write_bytes(b"icons")
        (folder / ".ipynb_checkpoints").mkdir()
        (folder / ".ipynb_checkpoints" / "state-checkpoint.json").touch()
    assert read(store.newest()) == {"state.json": b"1"}
    store.save([("state.json", b"2")])
    assert read(store.newest()) == {"state.json": b"2"}
    assert sorted(p.name for p in store.folder.iterdir()) == ["save-000002", "save-000003"]


@pytest.mark.parametrize("half", [False, True])
def test_process_may_be_killed_at_any_operation_of_a_save(
    uninterrupted_run, stopped_run, tmp_path, half
):
    """Kill the process at each operation; the resumed run equals an uninterrupted one.

    Training is resumed once for each set of files that crashes leave behind.
    """
    run, later = stopped_run
    before = read(CheckpointStore(run.checkpoint).newest())
    outcomes, resumed, fatal, done = [], set(), 0, False
    while not done:
        fatal += 1
        run_copy = copy_run(run, tmp_path / f"run-{fatal}")
        store = CheckpointStore(run_copy.checkpoint)
        done = not run_and_kill(lambda store=store: store.save(later), fatal, half=half)
        found = read(store.newest())
        assert found in (before, dict(later))
        outcomes.append(found == dict(later))
        state = (
            outcomes[-1],
            *sorted(str(p.relative_to(run_copy.path)) for p in run_copy.checkpoint.rglob("*")),
        )
        if state not in resumed:
            resumed.add(state)
            fit(run_copy, resume=True)
            assert_same(uninterrupted_run, run_copy)
            assert len(names(run_copy)) == 2  # all other files of the crash were removed
        shutil.rmtree(run_copy.path)
    assert fatal > 30  # a save has more than 30 operations
    assert outcomes == sorted(outcomes)  # from some operation on, the new checkpoint is complete
    assert {False, True} == set(outcomes)
    assert len(resumed) > 3


def test_two_crashes_leave_an_intact_checkpoint(stopped_run, tmp_path):
    """A process may crash that finds the files of an earlier crash."""
    run, later = stopped_run
    for first in range(1, 40, 5):
        for second in range(1, 40, 8):
            run_copy = copy_run(run, tmp_path / "run")
            store = CheckpointStore(run_copy.checkpoint)
            for fatal in (first, second):
                run_and_kill(lambda store=store: store.save(later), fatal)
                assert store.newest() is not None
            shutil.rmtree(run_copy.path)


def truncate(folder, sixteenths):
    """Truncate a checkpoint as if its files, in sorted order, were one file."""
    paths = sorted(folder.iterdir())
    left = sum(path.stat().st_size for path in paths) * sixteenths // 16
    for path in paths:
        size = path.stat().st_size
        os.truncate(path, min(size, left))
        left -= min(size, left)


@pytest.mark.parametrize("sixteenths", range(16))
def test_truncated_checkpoint_is_skipped(uninterrupted_run, stopped_run, tmp_path, sixteenths):
    run_copy = copy_run(stopped_run[0], tmp_path / "run")
    truncate(CheckpointStore(run_copy.checkpoint).newest().path, sixteenths)
    messages = []
    train(prepare(run_copy.recipe()), run_copy, resume=True, say=messages.append)
    assert_same(uninterrupted_run, run_copy)
    assert messages[0].startswith("The checkpoint save-000003 is damaged and was set aside: ")
    assert messages[1].endswith("(from the earlier checkpoint save-000002).")


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "state.json", "history.json", "model.safetensors", "optimizer.safetensors"],
)
def test_changed_byte_is_detected(stopped_run, tmp_path, name):
    run_copy = copy_run(stopped_run[0], tmp_path / "run")
    store = CheckpointStore(run_copy.checkpoint)
    path = store.newest().path / name
    content = path.read_bytes()
    for position in torch.randint(len(content), (25,)).tolist():
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :]
        )
        saved = store.newest()
        assert saved.path.name == "save-000002"
        assert list(saved.skipped) == ["save-000003"]


@pytest.mark.parametrize("change", ["missing", "more", "a folder"])
def test_missing_and_unlisted_files_are_detected(stopped_run, tmp_path, change):
    run_copy = copy_run(stopped_run[0], tmp_path / "run")
    store = CheckpointStore(run_copy.checkpoint)
    folder = store.newest().path
    if change == "more":
        (folder / "other").write_text("")
    else:
        (folder / "state.json").unlink()
    if change == "a folder":
        (folder / "state.json").mkdir()
    assert list(store.newest().skipped) == ["save-000003"]


def test_damaged_checkpoint_is_set_aside_until_two_others_exist(tmp_path):
    store = CheckpointStore(tmp_path)
    for _ in range(2):
        store.save(CONTENT)
    (tmp_path / "save-000002" / "state.json").write_text("")
    store.set_aside(store.newest().skipped)
    assert names_of(tmp_path) == ["damaged-save-000002", "save-000001"]
    store.save(CONTENT)
    assert names_of(tmp_path) == ["save-000001", "save-000002"]
    assert not store.newest().skipped


def names_of(folder):
    return sorted(path.name for path in folder.iterdir())


def test_files_are_unchanged_if_all_checkpoints_are_damaged(stopped_run, tmp_path):
    run_copy = copy_run(stopped_run[0], tmp_path / "run")
    for path in run_copy.checkpoint.glob("*/state.json"):
        path.write_text("{}")
    before = {path: path.read_bytes() for path in run_copy.path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"No checkpoint in .* is intact; the newest, save-000003"):
        fit(run_copy, resume=True)
    assert {p: p.read_bytes() for p in run_copy.path.rglob("*") if p.is_file()} == before


def test_format_of_another_version_is_refused(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(CONTENT)
    monkeypatch.setattr(store_module, "FORMAT", 7)
    store.save(CONTENT)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"save-000002 has format 7; this version .* format 2"):
        store.newest()


@pytest.mark.parametrize("name", ["../outside", "", ".", "a/b"])
def test_manifest_lists_only_files_of_its_folder(tmp_path, name):
    store = CheckpointStore(tmp_path)
    path = store.save(CONTENT)
    listed = {name: {"size": 0, "sha256": "0"}}
    (path / "manifest.json").write_text(store_module._manifest(listed))
    with pytest.raises(InputError, match="not a file of a checkpoint"):
        store.newest()


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=300) | st.text(alphabet='{}[]":,0a', max_size=40))
def test_invalid_manifest_is_an_input_error(content, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    path = CheckpointStore(folder).save(CONTENT)
    (path / "manifest.json").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    with pytest.raises(InputError, match="No checkpoint"):
        CheckpointStore(folder).newest()


def replace_file(run, name, change):
    """Save a new, intact checkpoint in which one file is changed."""
    store = CheckpointStore(run.checkpoint)
    content = read(store.newest())
    new = change(content.get(name))
    content = {key: value for key, value in content.items() if key != name}
    store.save([*content.items(), *([(name, new)] if new is not None else [])])


def edit_json(**changes):
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


def without_key(key):
    def change(content):
        values = json.loads(content)
        del values[key]
        return json.dumps(values).encode()

    return change


def edit_tensors(tmp_path, change):
    def replace(content):
        (tmp_path / "in").write_bytes(content)
        save_file(change(load_file(tmp_path / "in")), tmp_path / "out")
        return (tmp_path / "out").read_bytes()

    return replace


CHANGES = {
    "no state": ("state.json", lambda c: None, "lacks state.json"),
    "no average": ("ema.safetensors", lambda c: None, "lacks ema.safetensors"),
    "no best epoch": ("best_epoch.safetensors", lambda c: None, "lacks best_epoch"),
    "additional file": ("scaler.safetensors", lambda c: b"", "unexpected file scaler.safetensors"),
    "not a table": ("state.json", lambda c: b"[1]", "is not valid"),
    "not JSON": ("state.json", lambda c: b"{", "cannot be read"),
    "deep JSON": ("state.json", lambda c: b"[" * 100_000, "cannot be read"),
    "no step": ("state.json", without_key("step"), "is not valid"),
    "negative step": ("state.json", edit_json(step=-1), "is not valid"),
    "step too large": ("state.json", edit_json(step=99), "this run has 2 epochs of 4 steps"),
    "epoch too large": ("state.json", edit_json(epoch=3), "this run has 2 epochs of 4 steps"),
    "other length": ("state.json", edit_json(steps_per_epoch=9), "of 9 of epoch"),
    "other groups": ("state.json", edit_json(hypers=[]), "0 parameter groups"),
    "no rates": ("state.json", edit_json(hypers=[{}]), "is not valid"),
    "no recipe": ("state.json", without_key("recipe"), "missing in the checkpoint"),
    "other data": (
        "state.json",
        edit_json(data={"train": "9 images"}),
        "data.classes is '10 classes",
    ),
    "no rows": ("history.json", lambda c: b"{}", "history.json of the checkpoint is not valid"),
    "not tensors": ("model.safetensors", lambda c: b"", "cannot be read"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_invalid_checkpoint_is_refused(stopped_run, tmp_path, case):
    run_copy = copy_run(stopped_run[0], tmp_path / "run")
    name, change, message = CHANGES[case]
    replace_file(run_copy, name, change)
    check_refused(run_copy, message)


def check_refused(run, message):
    """Check that resuming is refused and changes no file."""
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message) as caught:
        fit(run, resume=True)
    assert len(str(caught.value).splitlines()) <= 3
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("part", ["model", "optimizer", "ema", "best_epoch"])
@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "type"])
def test_tensors_that_do_not_match_are_refused(stopped_run, tmp_path, part, change):
    def altered(tensors):
        name = next(name for name, tensor in tensors.items() if tensor.ndim == 4)
        if change == "missing":
            del tensors[name]
        elif change == "unknown":
            tensors["other.weight"] = tensors[name].clone()
        elif change == "shape":
            tensors[name] = torch.zeros(1, 2, 3, 4)
        else:
            tensors[name] = tensors[name].double()
        return tensors

    run_copy = copy_run(stopped_run[0], tmp_path / "run")
    replace_file(run_copy, f"{part}.safetensors", edit_tensors(tmp_path, altered))
    check_refused(run_copy, r"another network|not match the recipe|as torch.float64")


def test_changed_recipe_is_refused_with_both_values(stopped_run, tmp_path):
    run_copy = copy_run(stopped_run[0], tmp_path / "run")
    path = run_copy.path / "recipe.toml"
    path.write_text(path.read_text().replace("epochs = 2", "epochs = 4"))
    check_refused(run_copy, "train.epochs is 4 now and 2 in the checkpoint")


def test_momentum_is_restored_in_the_layout_of_its_parameter(stopped_run, tmp_path):
    """Fused optimizers require it."""
    run_copy = copy_run(stopped_run[0], tmp_path / "run")
    training = prepare(run_copy.recipe())
    train(training, run_copy, resume=True)
    state = training.learn.opt.opt.state
    assert len(state) == len([*training.learn.model.parameters()])
    for parameter, buffers in state.items():
        assert buffers["momentum_buffer"].stride() == parameter.stride()
        assert not buffers["momentum_buffer"].requires_grad


def test_only_settings_of_later_versions_get_defaults():
    recipe = to_mapping(load_recipe("digits/cut-mixmo"))
    del recipe["model"]["pretrained"], recipe["train"]["epochs"]
    filled = comparable({"recipe": recipe, "data": {}})
    assert filled["recipe"]["model"]["pretrained"] is False
    assert "epochs" not in filled["recipe"]["train"]


def test_only_the_place_of_the_data_is_not_compared():
    recipe = json.loads(json.dumps(to_mapping(load_recipe("digits/cut-mixmo"))))
    compared = comparable({"recipe": recipe, "data": {"train": "3 images"}})
    assert compared["data"] == {"train": "3 images"}
    for section, values in recipe.items():
        if section != "data":
            assert compared["recipe"][section] == values
    assert recipe["data"].keys() - compared["recipe"]["data"].keys() == {"dataset", "image_folder"}
