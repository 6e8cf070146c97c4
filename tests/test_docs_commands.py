"""Run the command lines of the README and the docs in order.

To be fast, the data sets are small and generated in their official formats, and a small network is
trained for one epoch. Lines with a launcher run in one process; `test_distributed_launchers.py`
starts several.
"""

import dataclasses
import shutil
from dataclasses import replace

import datasets
import numpy as np
import pytest
import wandb
from pages import EXTENDING, STUDY, TEXTS, blocks, command_lines
from small_data import write_cifar10, write_cifar100, write_image_folder
from test_corruptions import write_official

from mixmo_fastai.cli import fit, lr_find, show
from mixmo_fastai.cli.program import run as program
from mixmo_fastai.config.load import override
from mixmo_fastai.data.sources import SOURCES

pytestmark = pytest.mark.slow

SMALL_SETTINGS = [
    *("model.arch=wrn10_1", "model.pretrained=false", "model.weights=''", "model.perturbation=0.1"),
    *("train.epochs=1", "train.batch_size=8"),
    *("data.limit=20", "data.loader=resident", "train.device=cpu", "train.threads=1"),
]
PAGES = [name for name in TEXTS if name not in (EXTENDING, STUDY) and [*command_lines(TEXTS[name])]]
SETUP_COMMANDS = {  # commands whose results the lines of a page require
    "evaluation.md": [
        "fit cifar10 --recipe cifar10/vanilla --out runs/vanilla",
        "fit cifar10 --recipe cifar10/cut-mixmo --out runs/cut-mixmo",
        "fit cifar10 --out RUN",
    ],
    "export.md": ["fit cifar10 --out RUN"],
    "results.md": [
        "fit cifar10 --recipe cifar10/vanilla --out runs/vanilla",
        "fit cifar10 --recipe cifar10/cut-mixmo --out runs/cut-mixmo",
    ],
    "recipes.md": ["fit digits --out runs/digits-cut-mixmo-1"],
}


def make_small(module):
    """Return a `resolve_recipe` that reduces the resolved recipe to a small one."""
    original = module.resolve_recipe

    def resolve(*args, **kwargs):
        recipe = original(*args, **kwargs)
        recipe = replace(recipe, train=replace(recipe.train, images_seen=None))
        changes = [*SMALL_SETTINGS]
        if "num_nets" not in str(args) and recipe.model.num_nets > 1:
            changes.append("model.num_nets=1")
        return override(recipe, changes)

    return resolve


def write_label_table(path, images, prefix):
    """Write a table of the images of a folder of classes, two for each lesion."""
    files = sorted((path.parents[2] / images).rglob("*.png"))
    rows = [
        f"{prefix}train/{f.parent.name}/{f.stem},{f.parent.name},{i // 2}"
        for i, f in enumerate(files)
    ]
    path.write_text("\n".join(["image,label,lesion", *rows]))


def write_tag_table(path, images):
    """Write a table of the images of a folder of classes, each with its class and a colour."""
    files = sorted((path.parents[2] / images).rglob("*.png"))
    rows = [
        f"images/{f.relative_to(path.parent / 'images').as_posix()},"
        f"{f.parent.name}+{'red' if i % 2 else 'blue'}"
        for i, f in enumerate(files)
    ]
    path.write_text("\n".join(["image,tags", *rows]))


def write_flag_table(path, folder):
    """Write a table of the images of a folder, with one column for each of three labels."""
    names = (f.relative_to(path.parent).as_posix() for f in sorted(folder.rglob("*.png")))
    rows = [f"{name},{i % 2},{i % 3 // 2},{i % 5 // 4}" for i, name in enumerate(names)]
    path.write_text("\n".join(["image,cat,dog,eel", *rows]))


def hugging_face_dataset(folder):
    """Return a data set with the images of a folder of classes."""
    files = sorted(folder.rglob("*.png"))
    names = sorted({path.parent.name for path in files})
    columns = {
        "image": [{"bytes": path.read_bytes(), "path": None} for path in files],
        "label": [path.parent.name for path in files],
    }
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture
def work_dir(tmp_path, monkeypatch):
    """Create a working directory with the files that the lines name, and small data."""
    for name, write in {"cifar10": write_cifar10, "cifar100": write_cifar100}.items():
        archive = write(tmp_path / "data")
        monkeypatch.setitem(SOURCES, name, dataclasses.replace(SOURCES[name], archive=archive))
    for folder in ("path/to/images", "cifar10-images", "tiny-imagenet-200", "data/flowers"):
        write_image_folder(tmp_path / folder, num_train=40, num_test=8)
    for name, column in (("labels", "images/"), ("lesions", "")):
        write_label_table(tmp_path / f"path/to/{name}.csv", "path/to/images/train", column)
    write_tag_table(tmp_path / "path/to/tags.csv", "path/to/images")
    write_flag_table(tmp_path / "path/to/flags.csv", tmp_path / "path/to/images/train")
    pets = hugging_face_dataset(tmp_path / "path/to/images/train")
    pets.save_to_disk(str(tmp_path / "path/to/saved-pets"))
    pets.to_parquet(str(tmp_path / "path/to/pets.parquet"))
    photos = write_image_folder(tmp_path / "photos", num_train=2, num_test=2)
    (tmp_path / "competition").mkdir()
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        shutil.copy(path, tmp_path / f"competition/{number}.png")
    (tmp_path / "competition/test.csv").write_text("id\n0\n1\n2\n")
    next(photos.rglob("*.png")).rename(tmp_path / "cat.png")
    np.save(tmp_path / "cifar10h-counts.npy", np.ones((20, 10)))
    for weights in ("convnext.safetensors", "runs/other/model.safetensors"):
        (tmp_path / weights).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / weights).touch()
    (tmp_path / "votes.csv").write_text("image,label\n12,cat\n")
    write_official(tmp_path / "path/to/CIFAR-10-C", num_images=20, num_classes=10)
    (toml,) = blocks(TEXTS["recipes.md"], "toml")
    (tmp_path / "flowers.toml").write_text(toml, encoding="utf-8")
    for module in (fit, lr_find, show):
        monkeypatch.setattr(module, "resolve_recipe", make_small(module))
    monkeypatch.setenv("MIXMO_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    wandb.teardown()  # otherwise wandb keeps this environment for later tests


def test_pages_with_command_lines_are_found():
    assert {"README.md", "recipes.md", "evaluation.md", "distributed.md"} <= set(PAGES)


@pytest.mark.parametrize("arguments", ["fit digits --epoch 1", "eval nothing", "fit --recipe none"])
def test_invalid_command_line_fails(arguments, work_dir):
    assert program(arguments.split()) != 0


@pytest.mark.parametrize("name", PAGES)
def test_command_lines_run_without_error(name, work_dir, capsys):
    first = [line.split() for line in SETUP_COMMANDS.get(name, ())]
    for arguments in [*first, *command_lines(TEXTS[name])]:
        local_arguments = [
            word.removeprefix("/") if word.startswith("/shared") else word for word in arguments
        ]
        code = program(local_arguments)
        output = capsys.readouterr()
        assert code == 0, f"mixmo {' '.join(arguments)}\n{output.out}{output.err}"
