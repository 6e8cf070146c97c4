"""Small tables of labels with their images."""

import csv

import pytest
from PIL import Image

LABELS = ("cat", "dog", "eel")


def write_images(folder, names):
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index % 256, index // 256, 0)).save(path)


def write_table(path, header, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


@pytest.fixture
def folder(tmp_path):
    """Images photos/00.png … photos/23.png, whose first channel is their number."""
    write_images(tmp_path, [f"photos/{index:02d}.png" for index in range(24)])
    return tmp_path


def simple_rows(count=24):
    return [[f"photos/{index:02d}.png", LABELS[index % 3]] for index in range(count)]
