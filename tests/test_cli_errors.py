import os
import shutil
from pathlib import Path

import pytest
import torch
from small_data import write_image_folder

from mixmo_fastai.cli import run
from mixmo_fastai.config.load import load_recipe, override
from mixmo_fastai.models import create_model
from mixmo_fastai.runs import checkpoints as store_module
from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.weights import save_weights

HINT = "--help` for the allowed arguments"
AT_MOST = "less than or equal to 1000000"

# Arguments, then parts of the message: the problem and the remedy.
NAMES = [
    ("fit cifra10", "data set 'cifra10'", "Did you mean 'cifar10'"),
    ("fit ./none", "no folder './none'", "one subfolder per class"),
    ("fit file", "'file' is a file, not a folder", "or one of: digits"),
    ("fit --device gpu", "device", "Did you mean 'cuda'"),
    ("fit --arch wrn28_1o", "architecture 'wrn28_1o'", "Did you mean 'wrn28_10'"),
    ("fit --arch wrn29_10", "6n+4", "Nearest: wrn28_10 or wrn34_10"),
    ("fit --arch preact_resnet34_1", "depth 18", "preact_resnet18_3"),
    ("fit --mix cutmx", "mask kind 'cutmx'", "Did you mean 'cutmix'"),
    ("fit --recipe cifar100/cutmixmo", "no recipe", "Did you mean 'cifar100/cut-mixmo'"),
    ("fit --recipe none.toml", "no recipe 'none.toml'", "mixmo recipes"),
    ("fit --recipe broken.toml", "not valid TOML", "mixmo recipes NAME"),
    ("fit --recipe wrong.toml", "unknown key 'train.epocs'", "Did you mean 'train.epochs'"),
    ("fit --device tpu", "'tpu'", "Allowed: auto, cpu, cuda"),
    ("fit --precision half", "'half'", "Allowed: auto, float32, tf32, bfloat16"),
    ("recipes cifar10/vanila", "no recipe", "Did you mean 'cifar10/vanilla'"),
    ("train", "No such command 'train'", HINT),
    ("fit --eppochs 3", "--eppochs", "--epochs"),
    ("eval", "Missing argument", HINT),
    ("eval trained --device tpu", "'tpu'", "auto, cpu, cuda"),
]
ASSIGNMENTS = [
    ("fit --set train.epocs=3", "unknown key 'train.epocs'", "Did you mean 'train.epochs'"),
    ("fit --set optimiser.lr=3", "unknown key 'optimiser'", "Did you mean 'optimizer"),
    ("fit --set lr", "'lr'", "write section.key=value"),
    ("fit --set train.epochs=many", "'many'", "must be an integer"),
    ("fit --set train.epochs=1.5", "1.5", "must be an integer"),
    ("fit --set mix.alpha=-1", "mix.alpha is -1", "must be at least"),
    ("fit --set data.flip=maybe", "'maybe'", "true or false"),
    ("fit --set train=3", "'train' is a section", "train.epochs=5"),
    ("fit --set optimizer=adamw", "'optimizer' is a section", "--set optimizer.name=adamw"),
    ("recipes --set train.epochs=5", "--set changes one recipe", "mixmo recipes NAME --set"),
    ("recipes digits/cut-mixmo --set train.epochs=0", "train.epochs is 0", "at least 1"),
    ("fit --set optimizer.momentum=0", "above 0; got 0", "optimizer.nesterov=false"),
    ("fit --set data.dataset=cifra10", "data set 'cifra10'", "Did you mean 'cifar10'"),
    ("fit --set model.num_nets=0", "model.num_nets is 0", "at least 1"),
    ("fit --set model.num_nets=-2", "model.num_nets is -2", "at least 1"),
    ("fit --set model.num_nets=1.5", "model.num_nets is 1.5", "integer"),
    ("fit --set mix.block_size=5", "not an option of mix.kind='cutmix'", "has no options"),
    ("fit --mix cow --set mix.block_size=5", "not an option of mix.kind='cow'", "sigma_min"),
    ("fit --mix patchup --set mix.block_size=4", "mix.block_size is 4", "must be odd"),
    ("fit --mix cow --set mix.sigma_min=20", "mix.sigma_min is 20", "sigma_max is 16"),
    ("fit --mix cow --set mix.area_max=0.1", "mix.area_max is 0.1", "must not exceed"),
    ("fit --set train.ema_decay=1", "train.ema_decay is 1", "at most"),
    ("fit --set train.select=test", "train.select is 'test'", "Allowed: last, best"),
    ("fit --valid-split 0 --set train.select=best", "validation split", "data.valid_split"),
]
NUMBERS = [
    ("fit --epochs 0", "--epochs is 0", "at least 1"),
    ("fit --epochs x", "--epochs", "integer"),
    ("fit --batch-size 0", "--batch-size is 0", "at least 1"),
    ("fit --batch-size 30", "not a multiple of mix.batch_repetitions=4", "Nearest: 32"),
    ("fit --batch-size 64 --repeat 5", "mix.batch_repetitions=5", "Nearest: 65"),
    ("fit --batch-size 65536", "do not fill one batch of 16384", "the batch size: --batch-size "),
    ("fit --repeat 0", "--repeat is 0", "at least 1"),
    ("fit --members 0", "--members is 0", "at least 1"),
    ("fit --members 65", "--members is 65", "at most 64"),
    ("fit --members 1 --mix cutmix", "needs model.num_members of 2", "use mix.kind='sum'"),
    ("fit --lr 0", "--lr is 0.0", "above 0"),
    ("fit --lr -1", "--lr is -1.0", "above 0"),
    ("fit --lr nan", "--lr is nan", "above 0"),
    ("fit --lr inf", "--lr is inf", "at most"),
    ("fit --seed -1", "--seed is -1", "at least 0"),
    ("fit --limit -1", "--limit is -1", "at least 0"),
    ("fit --limit 3", "3 training images do not fill", "raise --limit"),
    ("fit --valid-split 1", "--valid-split is 1.0", "at most 0.9"),
    ("fit --valid-split -0.5", "--valid-split is -0.5", "at least 0"),
    ("lr-find --batch-size 30", "not a multiple", "Nearest: 32"),
    ("lr-find --steps 5", "--steps", "30"),
    ("lr-find --start 0", "--start", ("greater than or equal to", "not in the range x>=1e-12")),
    ("lr-find --start 1 --end 0.1", "--start 1 must be below --end 0.1", HINT),
    ("lr-find --end nan", "--end", (AT_MOST, "--start 1e-06 must be below --end nan")),
    ("lr-find --end inf", "--end", (AT_MOST, "x<=1000000")),
]
DEVICES = [
    ("fit --device cuda", "no CUDA device", "--device cpu"),
    ("lr-find --device cuda", "no CUDA device", "--device cpu"),
    ("fit --precision tf32", "CUDA", "--precision float32"),
]
PLACES = [
    ("fit --out trained", "already a run", "--resume RUN"),
    ("fit --out notes", "not empty", "--out DIR"),
    ("fit --out file", "'file' is not a folder", "--out DIR"),
    ("fit --out file/run", "'file' is not a folder", "--out DIR"),
    ("fit --out file/deep/run", "'file' is not a folder", "--out DIR"),
    ("lr-find --out image.png", "exists and was not changed", "another --out"),
    ("lr-find --out none/a.png", "no folder 'none'", "Create it first"),
    ("lr-find --out file/a.png", "no folder 'file'", "Create it first"),
    ("lr-find --out a.jpg", "'a.jpg'", "must end in .png"),
    ("eval none", "no run folder 'none'", "runs/"),
    ("eval file", "no run folder 'file'", "runs/"),
    ("eval notes", "no recipe.toml", "mixmo fit"),
    ("eval trained", "no weights yet", "mixmo fit --resume trained"),
    ("eval damaged", "not valid TOML", "mixmo recipes NAME"),
    ("fit --resume none", "no run folder 'none'", "runs/"),
    ("fit --resume notes", "no recipe.toml", "mixmo fit"),
    ("fit --resume trained --epochs 3", "--resume uses the settings", "omit all other"),
    ("fit --resume trained --seed 1", "--resume uses the settings", "--data-dir, --nets, --logger"),
    ("fit digits --resume trained", "--resume uses the settings", "omit all other"),
    ("fit --resume trained --set train.epochs=3", "--resume uses the settings", "omit all other"),
    ("fit --resume trained --out other", "--resume uses the settings", "omit all other"),
]
FOLDERS = [
    ("fit {folders}/one-class", "only one class with images, 'cat'", "two classes or more"),
    ("fit {folders}/empty", "is empty: it has no class folders", "An image folder must hold"),
    ("fit {folders}/no-images", "only one class with images, 'cat'", "two classes or more"),
    ("fit {folders}/no-test", "has no test/, but tset/", "rename it to test/"),
    ("fit {folders}/other-classes", "class 'fish'", "Rename the class folder"),
    ("fit {folders}/two-valid", "val/ and valid/", "Move the other"),
    ("fit {folders}/own-test --test-split 0.2", "--test-split is for", "Remove"),
    ("fit digits --test-split 0.2", "'digits' has a test set", "Remove --test-split"),
    ("fit --test-split 1", "--test-split is 1", "at most 0.9"),
    (
        "fit {folders}/bare --test-split 0 --valid-split 0",
        "neither labelled test images nor validation images",
        "Hold some",
    ),
    (
        "fit {folders}/bare --valid-split 0 --set train.select=best",
        "needs validation images, and none are left",
        "Increase data.valid_split",
    ),
    (
        "fit digits --limit 64 --valid-split 0.01 --set train.select=best "
        "--set data.calibration_split=0.9",
        "needs validation images, and none are left",
        "reduce data.calibration_split",
    ),
    ("fit {folders}/undecodable --batch-size 8", "002.png", "Replace it"),
    ("lr-find {folders}/undecodable --batch-size 8", "002.png", "Replace it"),
]


RUNS = [
    ("eval finished --ood cifra10", "data set 'cifra10'", "Did you mean 'cifar10'"),
    ("eval finished --ood digits", "trained on digits", "give --ood another"),
    ("eval finished --corruptions none", "images of 3x32x32", "built-in"),
    ("eval finished --label-distribution none.csv", "no file 'none.csv'", ""),
    ("eval finished --label-distribution image.png", "must end in", ".csv"),
    ("eval emptied", "emptied has no weights yet", "mixmo fit --resume"),
    ("eval truncated", "model.safetensors cannot be read", ""),
    ("eval other", "does not match the recipe", ""),
    ("eval unclear", "recipe.toml is not valid TOML", "mixmo recipes NAME"),
    ("eval finished --device tpu", "'tpu'", "auto, cpu, cuda"),
    ("ensemble finished", "needs two runs or more", ""),
    ("ensemble finished finished", "given twice", "distinct runs"),
    ("ensemble finished none", "no run folder 'none'", "runs/"),
    ("ensemble finished trained", "no weights yet", "mixmo fit --resume trained"),
    ("compare finished", "needs two runs or more", ""),
    ("compare finished none", "no run folder 'none'", "runs/"),
    ("compare finished finished/", "given twice", "distinct runs"),
    ("compare finished trained --out a.jpg", "'a.jpg'", "must end in .png"),
    ("inspect none", "no run folder 'none'", "runs/"),
    ("inspect trained", "no weights yet", "mixmo fit --resume trained"),
    ("inspect truncated", "model.safetensors cannot be read", ""),
    ("inspect finished finished finished", "one or two runs", "got 3"),
    ("inspect finished --out image.png", "exists and was not changed", "another --out"),
    ("predict none file", "no run folder 'none'", "runs/"),
    ("predict finished none.png", "no image or folder 'none.png'", ""),
    ("predict finished notes", "No image was found", "Give image files"),
    ("predict trained image.png", "no weights yet", "mixmo fit --resume trained"),
    ("predict finished image.png --out a.txt", "'a.txt'", "must end in .csv or .json"),
    ("predict finished image.png --out none/a.csv", "no folder 'none'", "Create it first"),
    ("predict file.safetensors image.png", "no exported network", "'file.safetensors'"),
    ("predict broken.safetensors image.png", "cannot be read", ""),
    ("predict finished/model.safetensors image.png", "not an exported network", "mixmo export"),
    ("report none", "no run folder 'none'", "runs/"),
    ("report trained", "no weights yet", "mixmo fit --resume trained"),
    ("report finished --out file", "exists and was not changed", "another --out"),
    ("report finished --out a.pdf", "'a.pdf'", "must end in .html"),
    ("export finished --to net.bin", "'net.bin'", ".safetensors, .onnx, .pt2"),
    ("export finished --to file", "'file'", ".safetensors, .onnx, .pt2"),
    ("export finished --to none/net.onnx", "no folder 'none'", "Create it first"),
    ("export finished", "--to", HINT),
    ("export trained --to net.onnx", "no weights yet", "mixmo fit --resume trained"),
    ("export other --to net.onnx", "does not match the recipe", ""),
    ("import none.ckpt --arch wrn10_1 --dataset cifar10", "none.ckpt", "No such file"),
    ("import file --arch wrn10_1 --dataset cifar10", "cannot be loaded safely", "published"),
    ("import file --arch wrn10_1 --dataset imagenet", "--dataset 'imagenet'", "cifar100"),
    ("import file --arch wrn11_1 --dataset cifar10", "6n+4", "Nearest"),
    ("import finished --arch wrn10_1 --dataset cifar10", "Cannot read finished", "directory"),
    ("import file --arch wrn10_1 --dataset cifar10 --out notes", "not empty", "--out DIR"),
    ("show --mix cutmx", "mask kind 'cutmx'", "Did you mean 'cutmix'"),
    ("show --count 0", "--count", "1"),
    ("show --out image.png", "exists and was not changed", "another --out"),
    ("fit --resume finished", "finished has weights but no checkpoint", "mixmo eval"),
    ("fit --resume foreign", "foreign/checkpoint", "start a new run"),
    ("fit --resume damaged-checkpoint", "No checkpoint in", "start a new run"),
    ("fit --resume future", "has format 99", "version that wrote it"),
    ("fit --recipe notes", "no recipe 'notes'", "mixmo recipes"),
    ("fit --recipe image.png", "not valid TOML", "mixmo recipes NAME"),
    ("fit --data-dir file", "file is a file", "--data-dir"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Write image folders, each with another error."""
    root = tmp_path_factory.mktemp("folders")
    write_image_folder(root / "one-class", classes=["cat"])
    (root / "empty").mkdir()
    write_image_folder(root / "no-images")
    for image in (root / "no-images/train/dog").iterdir():
        image.unlink()
    write_image_folder(root / "no-test", test_name="tset")
    write_image_folder(root / "other-classes")
    (root / "other-classes/test/dog").rename(root / "other-classes/test/fish")
    for name in ("val", "valid"):
        write_image_folder(root / "two-valid", test_name=name)
    write_image_folder(root / "own-test")
    write_image_folder(root / "bare", num_train=20)
    shutil.rmtree(root / "bare/test")
    write_image_folder(root / "undecodable")
    (root / "undecodable/train/dog/002.png").write_bytes(b"not an image")
    return root


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepare the folder that `folder` copies, once, since creating runs is slow."""
    work = tmp_path_factory.mktemp("prepared") / "work"
    (work / "notes").mkdir(parents=True)
    for name in ("file", "image.png", "notes/today.txt"):
        (work / name).write_text("precious")
    (work / "broken.toml").write_text("[train\n")
    (work / "wrong.toml").write_text("[train]\nepocs = 3\n")
    for name in ("trained", "damaged"):
        create_run(load_recipe("digits/cut-mixmo"), work / name)
    (work / "damaged" / "recipe.toml").write_text("[train\n")
    (work / "broken.safetensors").write_bytes(b"not tensors")
    create_runs(work)
    return work


@pytest.fixture
def folder(prepared, monkeypatch, tmp_path):
    """Copy the prepared folder and make it the working directory."""
    monkeypatch.setenv("MIXMO_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    work = shutil.copytree(prepared, tmp_path / "work")
    monkeypatch.chdir(work)
    return work


RUN_NAMES = "finished emptied truncated other unclear foreign damaged-checkpoint future"


def create_runs(work):
    """Create finished runs and runs with errors."""
    recipe = override(load_recipe("digits/cut-mixmo"), ["model.arch=wrn10_1"])
    runs = {name: create_run(recipe, work / name) for name in RUN_NAMES.split()}
    for name in ("finished", "truncated", "other"):
        save_weights(create_model("wrn10_1", 10, 2, 1), runs[name])
    os.truncate(runs["truncated"].weights, 1000)
    save_weights(create_model("wrn10_2", 10, 2, 1), runs["other"])
    (work / "unclear" / "recipe.toml").write_text("\0")
    (work / "foreign" / "checkpoint").mkdir()
    (work / "foreign" / "checkpoint" / "state.pkl").write_bytes(b"")
    for name in ("damaged-checkpoint", "future"):
        store = CheckpointStore(runs[name].checkpoint)
        store.save([("state.json", b"{}")])
    (work / "damaged-checkpoint/checkpoint/save-000001/state.json").write_text("{ }")
    manifest = work / "future/checkpoint/save-000001/manifest.json"
    manifest.write_text(store_module._signed({"format": 99, "files": {}}))


def contents(folder: Path):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


ALL_CASES = [*NAMES, *ASSIGNMENTS, *NUMBERS, *DEVICES, *PLACES, *FOLDERS, *RUNS]


@pytest.mark.parametrize("extra", [[], ["--json"]], ids=["plain", "json"])
@pytest.mark.parametrize("case", ALL_CASES)
def test_invalid_input_is_explained_and_changes_no_file(folder, folders, capsys, case, extra):
    arguments, problem, remedy = case
    before = contents(folder), contents(folders)
    assert run([*arguments.format(folders=folders).split(), *extra]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Error: ")
    assert "Traceback" not in err
    assert problem in err
    # Of several texts, those of newer and of older versions of typer, one is shown.
    assert any(text in err for text in ([remedy] if isinstance(remedy, str) else remedy))
    lines = err.splitlines()
    assert len(lines) <= 3
    assert all(len(line.replace(str(folders), "…")) <= 200 for line in lines)
    assert (contents(folder), contents(folders)) == before


def test_ctrl_c_while_data_is_read_changes_no_file(folder, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    before = contents(folder)
    monkeypatch.setattr("mixmo_fastai.training.prepare.prepare", interrupt)
    assert run(["fit"]) == 130
    assert "Interrupted." in capsys.readouterr().err
    assert contents(folder) == before
