"""Names after "hf:": those of the Hugging Face Hub, and paths of local files and folders."""

import os
from pathlib import Path

from mixmo_fastai.config.choices import HUB_PREFIX
from mixmo_fastai.errors import InputError

_FILE_SUFFIXES = (".parquet", ".csv", ".safetensors")


def local_path(name: str) -> Path | None:
    """Return the path that a name stands for, or None if it may only be a name of the Hub.

    Args:
        name: the text after "hf:".

    Raises:
        InputError: the name is empty, or it is a path at which nothing exists: it starts with a
            dot, a slash or a tilde, ends in the suffix of a file, or has several slashes.

    Example:
        >>> local_path("me/pets")
        >>> local_path("./nothing")
        Traceback (most recent call last):
        mixmo_fastai.errors.InputError: There is no file or folder './nothing' (hf:./nothing).
    """
    if not name.strip():
        raise InputError(f"{HUB_PREFIX!r} needs a name or a path: hf:USER/NAME, or hf:./FOLDER.")
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):  # unlike Path.exists, also of a text that is too long for a path
        return path
    repository = name.partition("@")[0]  # a revision behind it may have slashes
    is_path = name.startswith((".", "~")) or path.is_absolute() or repository.count("/") > 1
    if is_path or repository.lower().endswith(_FILE_SUFFIXES):
        raise InputError(f"There is no file or folder {name!r} ({HUB_PREFIX}{name}).")
    return None
