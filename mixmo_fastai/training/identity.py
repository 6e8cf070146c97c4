"""Check that a checkpoint belongs to a run: the same recipe, and the same data."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mixmo_fastai.config.load import with_present_names
from mixmo_fastai.config.recipe import Loss, Mix, Schedule
from mixmo_fastai.errors import InputError

PLACES = (("data", "dataset"), ("data", "image_folder"))
"""Settings that say where the data are, which may be moved: fingerprints compare the names, labels
and sizes of the images."""
_MISSING = object()


def check_identity(identity: Mapping[str, Any], state: Mapping[str, Any], path: Path) -> None:
    """Compare what identifies a run with what its checkpoint stores.

    Args:
        identity: recipe of the run, and `data.fingerprint` of its data.
        state: content of state.json.
        path: the checkpoint, for the message.

    Raises:
        InputError: a setting differs, or the data do.
    """
    current, saved = (
        dict(_flattened({name: values.get(name) for name in identity}))
        for values in map(comparable, (identity, state))
    )
    different = [
        key for key in current | saved if current.get(key, _MISSING) != saved.get(key, _MISSING)
    ]
    if different:
        key = different[0]
        raise InputError(
            f"{key} is {_shown(current, key)} now and {_shown(saved, key)} in the checkpoint "
            f"{path}.\nUndo the change, or start a new run."
        )


def comparable(values: Mapping[str, Any]) -> Any:
    """Add settings that did not exist when a recipe was saved, and leave out `PLACES`."""
    plain = json.loads(json.dumps(dict(values)))
    recipe = plain.get("recipe")
    if not isinstance(recipe, dict):
        return plain
    recipe = plain["recipe"] = with_present_names(recipe)
    recipe.setdefault("loss", {})  # a section that older recipes lack
    for section, name, default in _ADDED:
        if isinstance(part := recipe.get(section), dict):
            part.setdefault(name, default)
    for section, name in PLACES:
        if isinstance(part := recipe.get(section), dict):
            part.pop(name, None)
    return plain


_ADDED = (
    *(("data", f"{name}_column", "") for name in ("path", "label", "split", "group")),
    ("data", "fold", ""),
    ("data", "label_delimiter", ""),
    ("model", "pretrained", False),
    ("model", "weights", ""),
    ("data", "skip_damaged", False),
    ("model", "readout", "core"),
    ("model", "perturbation", 0.1),
    *(("loss", name, value) for name, value in vars(Loss()).items()),
    ("optimizer", "name", "sgd"),
    ("data", "transform", "standard"),
    ("data", "crop_from", "auto"),
    # Without fine-tune and an early_repetition, these have no effect.
    ("schedule", "frozen_share", Schedule().frozen_share),
    ("schedule", "body_div", Schedule().body_div),
    ("mix", "early_span", Mix().early_span),
    ("mix", "early_shape", Mix().early_shape),
)
"""Settings that recipes of older checkpoints lack, with the values used at that time."""


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over settings with dotted names, as typed by users: optimizer.lr."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flattened(value, "" if name == "recipe" else f"{name}.")
        else:
            yield name, value


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "missing"
