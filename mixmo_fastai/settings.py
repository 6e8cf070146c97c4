"""Settings: nested frozen dataclasses that are read strictly, and written as TOML.

Every error names the place, what is allowed and the nearest name. Standard library only.
"""

import dataclasses
import math
import tomllib
import types
import typing
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import field, fields
from typing import Any

from mixmo_fastai.errors import InputError, nearest


def number(
    default: Any,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    finite: bool = True,
) -> Any:
    """Declare a number, or a tuple of numbers, with its range.

    Args:
        default: the value where nothing is said; None for a number that may be left open.
        low: lowest value.
        high: highest value.
        open_low: whether `low` itself is refused.
        finite: whether infinity is refused.
    """
    limits = {"low": low, "high": high, "open_low": open_low, "finite": finite}
    return field(default=default, metadata=limits)


def choice(default: str, choices: Iterable[str]) -> Any:
    """Declare a text that is one of a few."""
    return field(default=default, metadata={"choices": tuple(choices)})


def build(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """Make settings from nested values, checking every key, type and range.

    Args:
        kind: a dataclass whose fields are values or other dataclasses.
        values: as read from TOML.
        where: what errors name as their place, such as a file.

    Raises:
        InputError: naming place, key, allowed values and the nearest name.
    """
    return _Reader(kind, where).read(kind, values)


class _Reader:
    def __init__(self, root: type, where: str) -> None:
        self.root, self.where = root, where

    def read(self, kind: type, values: Mapping[str, Any], prefix: str = "") -> Any:
        hints = typing.get_type_hints(kind)
        known = {f.name: f for f in fields(kind)}
        built = {}
        for key, value in values.items():
            if key not in known:
                raise _unknown_key(self.root, f"{prefix}{key}", self.where)
            if dataclasses.is_dataclass(hints[key]):
                section = typing.cast(type, hints[key])
                built[key] = self._section(section, value, f"{prefix}{key}")
            else:
                place = f"{self.where}: {prefix}{key}"
                built[key] = _checked(value, hints[key], known[key].metadata, place)
        return kind(**built)

    def _section(self, kind: type, value: Any, name: str) -> Any:
        if not isinstance(value, Mapping):
            raise InputError(
                f"{self.where}: {name} must be a section, not {_shown(value)}.\n"
                f"Give its keys one by one, as in {name}.{fields(kind)[0].name}."
            )
        return self.read(kind, value, f"{name}.")


def _unknown_key(root: type, key: str, where: str) -> InputError:
    names = [
        f"{f.name}.{g.name}" if dataclasses.is_dataclass(f.default) else f.name
        for f in fields(root)
        for g in (fields(f.default) if dataclasses.is_dataclass(f.default) else [f])
    ]
    guess = nearest(key, names) or nearest(
        key.rpartition(".")[2], [n.split(".")[-1] for n in names]
    )
    whole = next((n for n in names if n == guess or n.endswith(f".{guess}")), None)
    hint = f" Did you mean {whole!r}?" if whole else ""
    section = key.rpartition(".")[0]
    allowed = [n for n in names if n.rpartition(".")[0] == section] if section else []
    choices = allowed or sorted({n.partition(".")[0] for n in names})
    return InputError(f"{where}: unknown key {key!r}.{hint}\nAllowed: {', '.join(choices)}.")


def _checked(value: Any, hint: Any, metadata: Mapping[str, Any], place: str) -> Any:
    value = _typed(value, hint, place)
    numbers = value if isinstance(value, tuple) else (value,)
    if "choices" in metadata and value not in metadata["choices"]:
        guess = nearest(str(value), metadata["choices"])
        asked = f" Did you mean {guess!r}?" if guess else ""
        allowed = ", ".join(metadata["choices"])
        raise InputError(f"{place} is {_shown(value)}.{asked}\nAllowed: {allowed}.")
    if "low" in metadata and value is not None:
        for number in numbers:
            _check_range(number, metadata, place)
    return value


def _check_range(number: float, metadata: Mapping[str, Any], place: str) -> None:
    low, high = metadata["low"], metadata["high"]
    above = number > low if metadata["open_low"] else number >= low
    if above and number <= high and (number < math.inf or not metadata["finite"]):
        return
    relation = "above" if metadata["open_low"] else "at least"
    upper = f" and at most {high}" if high < math.inf else " and finite"
    raise InputError(f"{place} is {_shown(number)}; it must be {relation} {low}{upper}.")


def _typed(value: Any, hint: Any, place: str) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        if typing.get_origin(kind) is tuple:
            if isinstance(value, list | tuple) and all(_is_number(v) for v in value):
                return tuple(_as_float(v) for v in value)
        elif kind is float and _is_number(value):
            return _as_float(value)
        elif kind is str and isinstance(value, str):
            return _plain_text(value, place)
        elif kind is not float and type(value) is kind:
            return value
    wanted = " or ".join(
        _TYPE_NAMES.get(k, "a list of numbers") for k in kinds if k is not type(None)
    )
    raise InputError(f"{place} is {_shown(value)}; it must be {wanted}.")


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf if value > 0 else -math.inf


def _plain_text(value: str, place: str) -> str:
    """Refuse what neither a file name nor a line of text can hold."""
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        raise InputError(f"{place} is {_shown(value)}; it must be text without control characters.")
    return value


def _shown(value: Any) -> str:
    """Show a value as briefly as an error message wants it."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "a huge number"
    return text if len(text) <= 80 else f"{text[:77]}..."


def to_mapping(settings: Any) -> dict[str, Any]:
    """Give all settings but those that are None, nested as in TOML."""

    def compact(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: compact(part) for key, part in value.items() if part is not None}
        return value

    compacted: dict[str, Any] = compact(dataclasses.asdict(settings))
    return compacted


def to_toml(settings: Any) -> str:
    """Write every setting, so that the same settings are read back."""
    lines = []
    for key, value in to_mapping(settings).items():
        if isinstance(value, dict):
            lines += ["", f"[{key}]", *(f"{k} = {_toml_value(v)}" for k, v in value.items())]
        else:
            lines.append(f"{key} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def parse_value(text: str) -> Any:
    """Read a value as TOML has it; anything else is text."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except NOT_TOML:
        return text
    return parsed["value"] if len(parsed) == 1 else text


NOT_TOML = (ValueError, RecursionError)
"""What tomllib raises: its own error, and others on endless digits, nesting or broken bytes."""


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + "".join(_TOML_ESCAPES.get(c, c) for c in value) + '"'
    if isinstance(value, tuple | list):
        return f"[{', '.join(_toml_value(v) for v in value)}]"
    return repr(value)


_TOML_ESCAPES = {
    "\\": "\\\\",
    '"': '\\"',
    **{chr(code): f"\\u{code:04x}" for code in [*range(32), 127]},
}
