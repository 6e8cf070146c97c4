"""Checkpoints on disk: complete and intact, or passed over, wherever a process ends."""

import json
import os
import shutil
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_resuming import EVERYTHING, TINY, assert_same, fit

from mixmo_fastai.config.load import load_recipe, override
from mixmo_fastai.config.schema import to_mapping
from mixmo_fastai.errors import InputError
from mixmo_fastai.runs import checkpoints as store_module
from mixmo_fastai.runs import files
from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.state import _with_defaults
from mixmo_fastai.training.train import train

pytestmark = pytest.mark.slow

OPERATIONS = ("mkdir", "open", "write", "fsync", "rename", "link", "unlink", "rmdir")
CONTENT = [("state.json", b'{"a": 1}'), ("model.safetensors", bytes(range(256)) * 40)]


class Deadly:
    """The os module as `files` sees it; its n-th operation on the disk is never done.

    With `half`, a write is half done first.
    """

    def __init__(self, fatal=None, *, half=False):
        self.fatal, self.half, self.count = fatal, half, 0

    def __getattr__(self, name):
        own = getattr(os, name)
        return (lambda *args: self.do(name, own, args)) if name in OPERATIONS else own

    def do(self, name, own, args):
        self.count += 1
        if self.count == self.fatal:
            if name == "write" and self.half:
                own(args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*args)


def die_within(action, fatal, *, half=False):
    """Run an action in a process that is killed at its n-th operation; tell whether it was."""
    child = os.fork()
    if child == 0:
        files.os = Deadly(fatal, half=half)
        action()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def read(saved):
    return {name: (saved.path / name).read_bytes() for name in saved.files}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    recipe = override(TINY, [*EVERYTHING, "train.epochs=2", "data.limit=32"])
    run = create_run(recipe, tmp_path_factory.mktemp("whole") / "run")
    fit(run)
    return run


@pytest.fixture(scope="module")
def stopped(uninterrupted, tmp_path_factory):
    """A run with three saves behind it, of which two are kept, and the next that it makes."""
    folder = tmp_path_factory.mktemp("stopped")
    run = create_run(uninterrupted.recipe(), folder / "run")
    fit(run, (0, 1))
    fit(run, (1, 1), resume=True)
    shutil.copytree(run.path, folder / "later")
    later = open_run(folder / "later")
    fit(later, (1, 3), resume=True)
    return run, [*read(CheckpointStore(later.checkpoint).newest()).items()]


def copied(run, folder):
    shutil.copytree(run.path, folder)
    return open_run(folder)


def names(run):
    return sorted(path.name for path in run.checkpoint.iterdir())


def test_two_saves_are_kept(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoint")
    assert store.newest() is None
    for number in range(5):
        store.save([("state.json", b"%d" % number)])
        assert read(store.newest()) == {"state.json": b"%d" % number}
    assert sorted(p.name for p in store.folder.iterdir()) == ["save-000004", "save-000005"]


@pytest.mark.parametrize("half", [False, True])
def test_a_process_may_end_at_any_operation_of_a_save(uninterrupted, stopped, tmp_path, half):
    """Each of them is a crash, and each time the run ends as if there had been none.

    Training is resumed once for each set of files that crashes leave behind.
    """
    run, later = stopped
    before = read(CheckpointStore(run.checkpoint).newest())
    outcomes, resumed, fatal, done = [], set(), 0, False
    while not done:
        fatal += 1
        mine = copied(run, tmp_path / f"run-{fatal}")
        store = CheckpointStore(mine.checkpoint)
        done = not die_within(lambda store=store: store.save(later), fatal, half=half)
        found = read(store.newest())
        assert found in (before, dict(later))
        outcomes.append(found == dict(later))
        state = (
            outcomes[-1],
            *sorted(str(p.relative_to(mine.path)) for p in mine.checkpoint.rglob("*")),
        )
        if state not in resumed:
            resumed.add(state)
            fit(mine, resume=True)
            assert_same(uninterrupted, mine)
            assert len(names(mine)) == 2  # whatever the crash left behind is gone
        shutil.rmtree(mine.path)
    assert fatal > 30  # that many operations a save has
    assert outcomes == sorted(outcomes)  # once there, it stays
    assert {False, True} == set(outcomes)
    assert len(resumed) > 3


class Disk:
    """The os module as `files` sees it, noting what is on the disk for good.

    A file's content is there when the file was flushed, and a name when its folder was.
    """

    def __init__(self):
        self.paths, self.dirty, self.unnamed, self.renames = {}, set(), {}, []

    def __getattr__(self, name):
        own = getattr(os, name)
        return getattr(self, f"do_{name}", own) if name in OPERATIONS else own

    def do_open(self, path, *args):
        is_new = not os.path.exists(path)
        handle = os.open(path, *args)
        self.paths[handle] = str(path)
        if is_new:
            self.unnamed.setdefault(os.path.dirname(path), set()).add(str(path))
        return handle

    def do_write(self, handle, content):
        self.dirty.add(self.paths[handle])
        return os.write(handle, content)

    def do_mkdir(self, path):
        os.mkdir(path)
        self.unnamed.setdefault(os.path.dirname(path), set()).add(str(path))

    def do_fsync(self, handle):
        os.fsync(handle)
        self.dirty.discard(self.paths[handle])
        self.unnamed.pop(self.paths[handle], None)

    def do_rename(self, source, target):
        inside = {path for path in self.dirty if path.startswith(str(source))}
        assert not inside, "renamed before its content was flushed"
        assert not self.unnamed.get(str(source)), "renamed before its names were flushed"
        os.rename(source, target)
        self.renames.append(str(target))
        self.unnamed.setdefault(os.path.dirname(target), set()).add(str(target))

    def do_unlink(self, path):
        os.unlink(path)
        self.dirty.discard(str(path))
        for names in self.unnamed.values():
            names.discard(str(path))

    def do_rmdir(self, path):
        if str(path) not in self.renames[-1:]:
            assert not self.unnamed.get(os.path.dirname(path), set()) - {str(path)}, (
                "removed before the name of what replaces it was flushed"
            )
        os.rmdir(path)

    def do_link(self, source, target):
        assert str(source) not in self.dirty
        os.link(source, target)
        self.unnamed.setdefault(os.path.dirname(target), set()).add(str(target))


def test_what_was_saved_survives_a_loss_of_power(tmp_path, monkeypatch):
    """Everything is flushed before it takes its name, and its name before anything is removed."""
    disk = Disk()
    monkeypatch.setattr(files, "os", disk)
    run = create_run(TINY, tmp_path / "run")
    assert not disk.dirty
    assert not any(disk.unnamed.values())
    for number in range(4):
        CheckpointStore(run.checkpoint).save(CONTENT)
        assert not disk.dirty
        assert not any(disk.unnamed.values()), number
    assert len([name for name in disk.renames if "save-" in name]) == 4


def test_a_run_that_a_crash_left_half_made_is_no_run(tmp_path):
    fatal, done = 0, False
    while not done:
        fatal += 1
        path = tmp_path / f"run-{fatal}"
        done = not die_within(lambda path=path: create_run(TINY, path), fatal, half=True)
        if (path / "recipe.toml").exists():
            assert open_run(path).recipe() == TINY
        else:
            with pytest.raises(InputError):
                open_run(path)
    assert fatal > 8


def test_where_there_are_no_links_one_process_claims_a_name(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", refuse)
    files.write_new(tmp_path / "file", "whole")
    assert (tmp_path / "file").read_text() == "whole"
    with pytest.raises(FileExistsError):
        files.write_new(tmp_path / "file", "other")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_crash_of_a_crash(stopped, tmp_path):
    """What a crash leaves behind may be found by a process that crashes as well."""
    run, later = stopped
    for first in range(1, 40, 5):
        for second in range(1, 40, 8):
            mine = copied(run, tmp_path / "run")
            store = CheckpointStore(mine.checkpoint)
            for fatal in (first, second):
                die_within(lambda store=store: store.save(later), fatal)
                assert store.newest() is not None
            shutil.rmtree(mine.path)


def cut(folder, sixteenths):
    """Cut a checkpoint off: files in their order, as if they were one."""
    paths = sorted(folder.iterdir())
    left = sum(path.stat().st_size for path in paths) * sixteenths // 16
    for path in paths:
        size = path.stat().st_size
        os.truncate(path, min(size, left))
        left -= min(size, left)


@pytest.mark.parametrize("sixteenths", range(16))
def test_a_checkpoint_that_was_cut_off_is_passed_over(uninterrupted, stopped, tmp_path, sixteenths):
    mine = copied(stopped[0], tmp_path / "run")
    cut(CheckpointStore(mine.checkpoint).newest().path, sixteenths)
    said = []
    train(prepare(mine.recipe()), mine, resume=True, say=said.append)
    assert_same(uninterrupted, mine)
    assert said[0].startswith("The checkpoint save-000003 is damaged and was set aside: ")
    assert said[1].endswith("(from the earlier checkpoint save-000002).")


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "state.json", "history.json", "model.safetensors", "optimizer.safetensors"],
)
def test_a_byte_that_turned_is_noticed(stopped, tmp_path, name):
    mine = copied(stopped[0], tmp_path / "run")
    store = CheckpointStore(mine.checkpoint)
    path = store.newest().path / name
    content = path.read_bytes()
    for place in torch.randint(len(content), (25,)).tolist():
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        saved = store.newest()
        assert saved.path.name == "save-000002"
        assert list(saved.skipped) == ["save-000003"]


@pytest.mark.parametrize("change", ["missing", "more", "a folder"])
def test_files_that_are_not_listed_are_noticed(stopped, tmp_path, change):
    mine = copied(stopped[0], tmp_path / "run")
    store = CheckpointStore(mine.checkpoint)
    folder = store.newest().path
    if change == "more":
        (folder / "other").write_text("")
    else:
        (folder / "state.json").unlink()
    if change == "a folder":
        (folder / "state.json").mkdir()
    assert list(store.newest().skipped) == ["save-000003"]


def test_a_damaged_one_is_set_aside_until_two_others_are_there(tmp_path):
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


def test_where_all_are_damaged_nothing_is_changed(stopped, tmp_path):
    mine = copied(stopped[0], tmp_path / "run")
    for path in mine.checkpoint.glob("*/state.json"):
        path.write_text("{}")
    before = {path: path.read_bytes() for path in mine.path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"No checkpoint in .* is intact; the newest, save-000003"):
        fit(mine, resume=True)
    assert {p: p.read_bytes() for p in mine.path.rglob("*") if p.is_file()} == before


def test_a_format_of_another_version_is_refused_by_name(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(CONTENT)
    monkeypatch.setattr(store_module, "FORMAT", 7)
    store.save(CONTENT)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"save-000002 has format 7; this version .* format 2"):
        store.newest()


@pytest.mark.parametrize("name", ["../outside", "", ".", "a/b"])
def test_a_manifest_names_files_of_its_own_folder_only(tmp_path, name):
    store = CheckpointStore(tmp_path)
    path = store.save(CONTENT)
    listed = {name: {"size": 0, "sha256": "0"}}
    (path / "manifest.json").write_text(store_module._manifest(listed))
    with pytest.raises(InputError, match="not a file of a checkpoint"):
        store.newest()


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=300) | st.text(alphabet='{}[]":,0a', max_size=40))
def test_whatever_a_manifest_holds_is_an_error_that_says_so(content, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    path = CheckpointStore(folder).save(CONTENT)
    (path / "manifest.json").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    with pytest.raises(InputError, match="No checkpoint"):
        CheckpointStore(folder).newest()


def replaced(run, name, change):
    """Put another content into the newest checkpoint, as an intact one."""
    store = CheckpointStore(run.checkpoint)
    content = read(store.newest())
    new = change(content.get(name))
    content = {key: value for key, value in content.items() if key != name}
    store.save([*content.items(), *([(name, new)] if new is not None else [])])


def edited(**changes):
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


def without(key):
    def change(content):
        values = json.loads(content)
        del values[key]
        return json.dumps(values).encode()

    return change


def retensored(tmp_path, change):
    def replace(content):
        (tmp_path / "in").write_bytes(content)
        save_file(change(load_file(tmp_path / "in")), tmp_path / "out")
        return (tmp_path / "out").read_bytes()

    return replace


CHANGES = {
    "no state": ("state.json", lambda c: None, "lacks state.json"),
    "no average": ("ema.safetensors", lambda c: None, "lacks ema.safetensors"),
    "no best epoch": ("best_epoch.safetensors", lambda c: None, "lacks best_epoch"),
    "one part more": ("scaler.safetensors", lambda c: b"", "unexpected file scaler.safetensors"),
    "no table": ("state.json", lambda c: b"[1]", "is not valid"),
    "no JSON": ("state.json", lambda c: b"{", "cannot be read"),
    "deep JSON": ("state.json", lambda c: b"[" * 100_000, "cannot be read"),
    "no step": ("state.json", without("step"), "is not valid"),
    "negative step": ("state.json", edited(step=-1), "is not valid"),
    "step beyond": ("state.json", edited(step=99), "this run has 2 epochs of 4 steps"),
    "epoch beyond": ("state.json", edited(epoch=3), "this run has 2 epochs of 4 steps"),
    "other length": ("state.json", edited(steps_per_epoch=9), "of 9 of epoch"),
    "other groups": ("state.json", edited(hypers=[]), "0 parameter groups"),
    "no rates": ("state.json", edited(hypers=[{}]), "is not valid"),
    "no recipe": ("state.json", without("recipe"), "missing in the checkpoint"),
    "other data": ("state.json", edited(data={"train": "9 images"}), "data.classes is '10 classes"),
    "no rows": ("history.json", lambda c: b"{}", "history.json of the checkpoint is not valid"),
    "no tensors": ("model.safetensors", lambda c: b"", "cannot be read"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_resuming_is_strict(stopped, tmp_path, case):
    mine = copied(stopped[0], tmp_path / "run")
    name, change, message = CHANGES[case]
    replaced(mine, name, change)
    refused(mine, message)


def refused(run, message):
    """Check that nothing is resumed, and nothing changed."""
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message) as caught:
        fit(run, resume=True)
    assert len(str(caught.value).splitlines()) <= 3
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("part", ["model", "optimizer", "ema", "best_epoch"])
@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "type"])
def test_every_tensor_must_fit(stopped, tmp_path, part, change):
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

    mine = copied(stopped[0], tmp_path / "run")
    replaced(mine, f"{part}.safetensors", retensored(tmp_path, altered))
    refused(mine, r"another network|not match the recipe|as torch.float64")


def test_another_recipe_is_refused_with_both_values(stopped, tmp_path):
    mine = copied(stopped[0], tmp_path / "run")
    path = mine.path / "recipe.toml"
    path.write_text(path.read_text().replace("epochs = 2", "epochs = 4"))
    refused(mine, "train.epochs is 4 now and 2 in the checkpoint")


def test_momentum_comes_back_in_the_layout_of_its_parameter(stopped, tmp_path):
    """A fused optimizer takes no other."""
    mine = copied(stopped[0], tmp_path / "run")
    training = prepare(mine.recipe())
    train(training, mine, resume=True)
    state = training.learn.opt.opt.state
    assert len(state) == len([*training.learn.model.parameters()])
    for parameter, own in state.items():
        assert own["momentum_buffer"].stride() == parameter.stride()
        assert not own["momentum_buffer"].requires_grad


def test_only_settings_that_came_later_are_filled_in():
    recipe = to_mapping(load_recipe("digits/cut-mixmo"))
    del recipe["model"]["pretrained"], recipe["train"]["epochs"]
    filled = _with_defaults({"recipe": recipe, "data": {}})
    assert filled["recipe"]["model"]["pretrained"] is False
    assert "epochs" not in filled["recipe"]["train"]
