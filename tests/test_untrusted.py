"""Files from untrusted sources: no code in them is executed, and errors are readable."""

import ast
import json
import os
import pickle
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import EDITS, FEW_EXAMPLES, JSON, check_read_or_rejected, mutated
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import load_file, save
from small_data import write_image_folder
from test_reference import published_names

import mixmo_fastai
from mixmo_fastai.cli import run as program
from mixmo_fastai.data.image_folder import read_image_folder
from mixmo_fastai.data.sources import load_source
from mixmo_fastai.errors import InputError
from mixmo_fastai.export.files import export_run, load_fused
from mixmo_fastai.models import create_model
from mixmo_fastai.models.reference import read_reference_checkpoint
from mixmo_fastai.report.report_data import read_history
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.runs.weights import load_network

pytestmark = pytest.mark.slow


class HarmfulPickle:
    """A pickle that creates a folder when it is loaded."""

    def __init__(self, created_folder):
        self.folder = str(created_folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Create a run on an image folder, its exported network and a published checkpoint."""
    root = tmp_path_factory.mktemp("finished")
    write_image_folder(root / "pets", num_train=20, num_test=4, size=(8, 8))
    (root / "votes.csv").write_text("image,label\ncat/000.png,dog\n")
    write_image_folder(root / "others", num_train=1, num_test=4, size=(8, 8))
    flags = "--arch wrn10_1 --batch-size 16 --epochs 1 --device cpu --valid-split 0.1 --quiet"
    arguments = ["fit", str(root / "pets"), *flags.split(), "--data-dir", str(root / "data")]
    assert program([*arguments, "--out", str(root / "run")]) == 0
    shutil.copytree(root / "run", root / "second")  # for `mixmo compare`
    export_run(RunFolder(root / "run"), root / "net.safetensors", root / "data")
    published = published_names(create_model("wrn10_1", 10))
    torch.save({"classifier_state_dict": published}, root / "net.ckpt")
    return root


def all_files(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def commands(root):
    """Yield all commands that read a run, an exported network, a published checkpoint or images."""
    run, data = str(root / "run"), ["--data-dir", str(root / "data")]
    image = str(next((root / "pets/test").rglob("*.png")))
    yield ["eval", run, *data]
    yield ["eval", run, *data, "--ood", str(root / "others")]
    yield ["eval", run, *data, "--label-distribution", str(root / "votes.csv")]
    yield ["predict", run, image]
    yield ["predict", str(root / "net.safetensors"), image]
    yield ["inspect", run, "--out", str(root / "inspect.png")]
    yield ["report", run, *data]
    yield ["export", run, *data, "--to", str(root / "other.safetensors")]
    yield ["compare", run, str(root / "second"), *data, "--out", str(root / "compare.png")]
    yield ["import", str(root / "net.ckpt"), "--arch", "wrn10_1", "--dataset", "cifar10"]
    yield ["fit", "--resume", run, *data]


FILE_NAMES = [
    *["run/recipe.toml", "run/environment.json", "run/data.json", "run/split.json"],
    *["run/history.csv", "votes.csv"],
    *["run/calibration.json", "run/calibration.safetensors"],
    *["run/metrics.json", "run/model.safetensors", "run/log.txt", "net.safetensors", "net.ckpt"],
    *["state.json", "history.json", "model.safetensors", "optimizer.safetensors", "manifest.json"],
    *["train.npy", "test.npy", "facts.json", "pets/train/cat/000.png", "pets/test/cat/000.png"],
    "others/test/cat/000.png",
]


class OpenedFiles:
    """Record the paths of the files that Python or safetensors opens in a `with` block."""

    def __init__(self, patch):
        self.paths, self.is_recording = set(), False
        sys.addaudithook(self._record)  # cannot be removed
        for name, module in [*sys.modules.items()]:
            if name.startswith(("mixmo_fastai", "safetensors")) and "safe_open" in vars(module):
                patch.setattr(module, "safe_open", self._open_tensors)  # not a function of Python

    def _open_tensors(self, path, *args, **kwargs):
        self._record("open", [str(path)])
        return safe_open(path, *args, **kwargs)

    def _record(self, event, arguments):
        if self.is_recording and event == "open" and isinstance(arguments[0], str):
            self.paths.add(os.path.abspath(arguments[0]))

    def __enter__(self):
        self.paths, self.is_recording = set(), True
        return self

    def __exit__(self, *_):
        self.is_recording = False


@pytest.fixture(scope="module")
def opened_by_commands(finished, tmp_path_factory):
    """Return the paths of the files that each command opens if all are intact."""
    opened = []
    with restored(finished), pytest.MonkeyPatch.context() as patch:
        files = OpenedFiles(patch)
        patch.chdir(tmp_path_factory.mktemp("intact"))
        patch.setattr(Figure, "draw", lambda *_: None)
        for arguments in commands(finished):
            with files:
                assert program(arguments) == 0, arguments
            opened.append(files.paths)
    read = {path for paths in opened for path in paths if path.endswith(".safetensors")}
    assert read >= {str(finished / name) for name in ("run/model.safetensors", "net.safetensors")}
    return opened


@contextmanager
def restored(root):
    """Restore a folder after the block; a copy elsewhere would not do, since runs contain paths."""
    backup = root.with_suffix(".backup")
    shutil.copytree(root, backup)
    try:
        yield
    finally:
        shutil.rmtree(root)
        backup.rename(root)


OPENED_UNKNOWN = ".png"  # changed images are read instead of the cache


def paths_of(root, name):
    """Return the files of a name in the run, its checkpoints, the cache and the data."""
    if (root / name).is_file():
        return [root / name]
    paths = [p for p in root.rglob(name) if "checkpoint" in p.parts or "mixmo-cache" in p.parts]
    assert paths, name
    return paths


def test_every_kind_of_file_is_listed(finished):
    listed = {path for name in FILE_NAMES for path in paths_of(finished, name)}
    unlisted = {path for path in finished.rglob("*") if path.is_file()} - listed
    unlisted = {path for path in unlisted if "second" not in path.parts}
    assert {path.suffix for path in unlisted} == {".png"}


@pytest.mark.parametrize("pickler", ["plain", "torch", "numpy"])
@pytest.mark.parametrize("name", FILE_NAMES)
def test_pickles_are_never_executed(
    finished, opened_by_commands, tmp_path, monkeypatch, capsys, name, pickler
):
    """A command is run if it opens the file when all files are intact."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        Figure, "draw", lambda *_: None
    )  # saves half of the time; all files are read before
    created_folder = tmp_path / "created"
    with restored(finished):
        paths = paths_of(finished, name)
        for path in paths:
            path.unlink()
            write_pickle(path, pickler, HarmfulPickle(created_folder))
        for arguments, opened in zip(commands(finished), opened_by_commands, strict=True):
            if opened.isdisjoint(map(str, paths)) and not name.endswith(OPENED_UNKNOWN):
                continue
            code = program(arguments)
            _, err = capsys.readouterr()
            assert not created_folder.exists(), arguments
            assert code in (0, 1, 2), arguments
            assert "Traceback" not in err
            assert len(err.splitlines()) <= 3, err
            assert code == 0 or err.startswith("Error: "), err
            assert "Add --debug" not in err, err  # an unexpected error


def write_pickle(path, pickler, harmful):
    if pickler == "plain":
        path.write_bytes(pickle.dumps(harmful))
    elif pickler == "torch":
        torch.save({"classifier_state_dict": harmful, "state_dict": harmful}, path)
    else:
        with path.open("wb") as file:
            np.save(file, np.array([harmful], dtype=object), allow_pickle=True)


def test_only_three_modules_unpickle_and_all_are_restricted():
    """CIFAR files are unpickled after their checksum, weights only as tensors."""
    calls = {}
    package = Path(mixmo_fastai.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute | ast.Name):
                text = ast.unparse(node)
                if text in ("pickle.Unpickler", "pickle.load", "pickle.loads", "torch.load"):
                    calls.setdefault(path.relative_to(package).as_posix(), []).append(text)
            if isinstance(node, ast.Call):
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get("allow_pickle", "False") == "False"
                if ast.unparse(node.func) == "torch.load":
                    assert keywords["weights_only"] == "True"
    assert calls == {
        "data/cifar.py": ["pickle.Unpickler"],
        "models/reference.py": ["torch.load"],
        "models/pretrained.py": ["torch.load"],
    }


READERS = {
    "recipe.toml": lambda run: run.recipe(),
    "environment.json": lambda run: run.environment(),
    "data.json": lambda run: run.data_facts(),
    "metrics.json": lambda run: run.metrics(),
    "history.csv": read_history,
    "model.safetensors": load_network,
}


@pytest.mark.parametrize("name", READERS)
@FEW_EXAMPLES
@given(content=st.binary(max_size=200), edits=EDITS, truncate=st.booleans(), table=JSON)
def test_any_content_of_run_files_is_read_or_rejected(
    finished, tmp_path, name, content, edits, truncate, table
):
    run = RunFolder(tmp_path / "run")
    if not run.path.exists():
        shutil.copytree(finished / "run", run.path)
    original = (finished / "run" / name).read_bytes()
    for new in (content, mutated(original, edits), original[: edits[0][0] % (len(original) + 1)]):
        (run.path / name).write_bytes(new)
        check_read_or_rejected(lambda: READERS[name](run))
    if name.endswith(".json"):
        (run.path / name).write_text(json.dumps(table))
        check_read_or_rejected(lambda: READERS[name](run))


NAMES = st.sampled_from(["train", "test", "cat", "dog", "a.png", "b.jpg", "c.txt", ".d", "é.png"])
TREE = st.recursive(
    st.binary(max_size=40) | st.just("image"),
    lambda inner: st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=14,
)


def write_tree(tree, path, image):
    if isinstance(tree, dict):
        path.mkdir()
        for name, part in tree.items():
            write_tree(part, path / name, image)
    else:
        path.write_bytes(image if tree == "image" else tree)


@FEW_EXAMPLES
@given(tree=st.fixed_dictionaries({}, optional={"train": TREE, "test": TREE, "val": TREE}))
def test_any_content_of_image_folders_is_read_or_rejected(finished, tmp_path_factory, tree):
    image = next((finished / "pets").rglob("*.png")).read_bytes()
    root = tmp_path_factory.mktemp("tree")
    write_tree(tree, root / "folder", image)
    check_read_or_rejected(lambda: read_image_folder(root / "folder", root / "data"))


@FEW_EXAMPLES
@given(content=st.binary(max_size=300), edits=EDITS)
def test_any_content_of_images_is_read_or_rejected(finished, tmp_path_factory, content, edits):
    root = tmp_path_factory.mktemp("images")
    folder = Path(shutil.copytree(finished / "pets", root / "pets"))
    path = next((folder / "train").rglob("*.png"))
    for new in (content, mutated(path.read_bytes(), edits)):
        path.write_bytes(new)
        check_read_or_rejected(lambda: read_image_folder(folder, root / "data"))


@pytest.mark.parametrize("file_name", ["net.safetensors", "net.ckpt"])
@FEW_EXAMPLES
@given(content=st.binary(max_size=200), edits=EDITS)
def test_any_content_of_network_files_is_read_or_rejected(
    finished, tmp_path, file_name, content, edits
):
    read = load_fused if file_name.endswith("safetensors") else read_reference_checkpoint
    original, path = (finished / file_name).read_bytes(), tmp_path / file_name
    for new in (
        content,
        mutated(original, edits),
        mutated(original, [(p % 600, v) for p, v in edits]),
    ):
        path.write_bytes(new)
        check_read_or_rejected(lambda: read(path))


def test_tensor_names_with_paths_write_no_files(finished, tmp_path):
    """A tensor name that looks like a path is treated as a plain name."""
    tensors = load_file(finished / "run/model.safetensors")
    path = tmp_path / "run"
    shutil.copytree(finished / "run", path)
    (path / "model.safetensors").write_bytes(save({**tensors, "../../outside": torch.zeros(1)}))
    with pytest.raises(InputError, match="does not match the recipe"):
        load_network(RunFolder(path))
    assert not (tmp_path / "outside").exists()


def test_digits_load_without_untrusted_files():
    assert len(load_source("digits").classes) == 10
