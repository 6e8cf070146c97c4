"""Images for prediction: files, folders, and tables whose rows name images, without labels."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from mixmo_fastai.config.choices import is_table
from mixmo_fastai.data.file_finder import FileFinder
from mixmo_fastai.data.listing import Skipped
from mixmo_fastai.data.loose_images import files_of, no_images_error
from mixmo_fastai.data.table_columns import find_path_column
from mixmo_fastai.data.text_tables import filled, read_text_table
from mixmo_fastai.errors import InputError

ADVICE = "Use one row per image, with a column for its path."
SAVE_IMAGES = "If it holds images, save them as files."


class NamedImage(NamedTuple):
    """An image to predict.

    Attributes:
        name: the path of the file, or what a table calls it.
        path: the file; None if there is no such image.
    """

    name: str
    path: Path | None


def find_named_images(
    paths: Iterable[Path],
    skipped: Skipped | None = None,
    *,
    image_folder: Path | None = None,
    path_column: str = "",
) -> list[NamedImage]:
    """List images: the given files, those in folders, and those that tables name.

    The images of a table are in the order of its rows, also those that occur in several; other
    images are as in `find_images`. Missing images of a table have no path.

    Args:
        paths: files, folders and tables that `read_text_table` reads.
        skipped: collects the skipped files of folders.
        image_folder: folder to which the paths in tables are relative; by default, that of each.
        path_column: column of tables that holds the paths, where it exists; others are found as in
            a table of labels.

    Raises:
        InputError: a path does not exist, no image is found, or a table cannot be read, has no
            column of paths, an empty path, or a name that several images have.
    """
    found: list[NamedImage] = []
    skipped = Skipped() if skipped is None else skipped
    for path in paths:
        if path.is_file() and is_table(path):
            found += _read_table(path, image_folder or path.parent, path_column)
        else:
            found += [NamedImage(str(file), file) for file in files_of(path, skipped)]
    if not found:
        raise no_images_error(skipped)
    return found


def _read_table(path: Path, root: Path, column: str) -> Iterator[NamedImage]:
    if not root.is_dir():
        raise InputError(f"There is no folder {str(root)!r}.")
    table, finder = read_text_table(path, ADVICE, holds_images=SAVE_IMAGES), FileFinder(root)
    index = table.header.index(find_path_column(table, finder, column))
    for position, fields in table.rows:
        where = table.where(position)
        name = filled(fields[index], "path", where)
        file = finder.find(name, where)
        yield NamedImage(name, None if file is None else root / file)
