"""Settings: nested frozen dataclasses with strict validation, read from and written to TOML.

Errors name the source, the allowed values and the closest valid name. Standard library only.
"""

import dataclasses
import math
import tomllib
import types
import typing
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field, fields
from typing import Any

from mixmo_fastai.errors import InputError, did_you_mean, nearest


def number_field(
    default: Any,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    finite: bool = True,
    words: tuple[str, ...] = (),
) -> Any:
    """Declare a field for a number, or a tuple of numbers, in a range.

    Args:
        default: default value; None for an optional number.
        low: lower bound.
        high: upper bound, inclusive.
        open_low: whether the lower bound is exclusive.
        finite: whether infinity is refused.
        words: strings that are accepted instead of an integer.
    """
    limits: dict[str, Any] = {"low": low, "high": high, "open_low": open_low, "finite": finite}
    if words:
        limits["words"] = words
    return field(default=default, metadata=limits)


def text_field(default: str = "") -> Any:
    """Declare a field for a string that may be written as a whole number, such as a name 3."""
    return field(default=default, metadata={"numbers": True})


def choice_field(default: str, choices: Iterable[str]) -> Any:
    """Declare a field for a string that must be one of `choices`.

    Args:
        default: default value.
        choices: the allowed strings; of a table, also those added later.
    """
    allowed = choices if isinstance(choices, Mapping) else tuple(choices)
    return field(default=default, metadata={"choices": allowed})


def build_settings(kind: type, values: Mapping[str, Any], source: str) -> Any:
    """Build settings from nested values, checking every key, type and range.

    Args:
        kind: a dataclass whose fields are values or other dataclasses.
        values: nested values, as read from TOML.
        source: where the values come from, such as a file; error messages name it.

    Raises:
        InputError: a key is unknown or a value invalid.
    """
    return _Reader(kind, source).read(kind, values)


class _Reader:
    """Builds nested dataclasses; keeps the root and the source for error messages."""

    def __init__(self, root: type, source: str) -> None:
        self.root, self.source = root, source

    def read(self, kind: type, values: Mapping[str, Any], prefix: str = "") -> Any:
        hints = typing.get_type_hints(kind)
        known = {f.name: f for f in fields(kind)}
        built = {}
        for key, value in values.items():
            if key not in known:
                raise _unknown_key_error(self.root, f"{prefix}{key}", self.source)
            if dataclasses.is_dataclass(hints[key]):
                section = typing.cast(type, hints[key])
                built[key] = self._section(section, value, f"{prefix}{key}")
            else:
                label = f"{self.source}: {prefix}{key}"
                built[key] = _check_value(value, hints[key], known[key].metadata, label)
        return kind(**built)

    def _section(self, kind: type, value: Any, name: str) -> Any:
        if not isinstance(value, Mapping):
            raise InputError(
                f"{self.source}: {name} must be a section; got {_format(value)}.\n"
                f"Set its keys separately, for example {name}.{fields(kind)[0].name}."
            )
        return self.read(kind, value, f"{name}.")


def _unknown_key_error(root: type, key: str, source: str) -> InputError:
    names = [
        f"{f.name}.{g.name}" if dataclasses.is_dataclass(f.default) else f.name
        for f in fields(root)
        for g in (fields(f.default) if dataclasses.is_dataclass(f.default) else [f])
    ]
    section, _, last = key.rpartition(".")
    allowed = [n for n in names if n.rpartition(".")[0] == section] if section else []
    same = [n for n in names if n.rpartition(".")[2] == last]  # of another section
    # Within a section, a long common prefix says nothing.
    guess = _nearest_key(last, allowed) if allowed else nearest(key, names)
    full_name = next(iter(same), guess) or _nearest_key(last, names)
    hint = did_you_mean(full_name)
    choices = allowed or sorted({n.partition(".")[0] for n in names})
    return InputError(f"{source}: unknown key {key!r}.{hint}\nAllowed: {', '.join(choices)}.")


def _nearest_key(last: str, names: Sequence[str]) -> str | None:
    """Return the full name whose last part is nearest, if one is near."""
    guess = nearest(last, [name.rpartition(".")[2] for name in names])
    return next((name for name in names if guess == name.rpartition(".")[2]), None)


def _check_value(value: Any, hint: Any, metadata: Mapping[str, Any], label: str) -> Any:
    """Convert a value to the type of its field, and check choices and range."""
    if words := metadata.get("words"):
        if value in words:
            return value
        if type(value) is not int:
            allowed = " or ".join(map(repr, words))
            raise InputError(f"{label} is {_format(value)}; it must be an integer or {allowed}.")
    if metadata.get("numbers") and _is_number(value) and value == value // 1:
        value = str(int(value))
    value = _convert(value, hint, label)
    numbers = value if isinstance(value, tuple) else (value,)
    if "choices" in metadata and value not in metadata["choices"]:
        guess = nearest(str(value), metadata["choices"], shortened=True)
        suggestion = did_you_mean(guess)
        allowed = ", ".join(metadata["choices"])
        may_be_registered = guess is None and isinstance(metadata["choices"], Mapping)
        program = "\nIf a program of yours registers it, run that program." * may_be_registered
        raise InputError(f"{label} is {_format(value)}.{suggestion}\nAllowed: {allowed}.{program}")
    if "low" in metadata and value is not None:
        for number in numbers:
            _check_range(number, metadata, label)
    return value


def _check_range(number: float, metadata: Mapping[str, Any], label: str) -> None:
    low, high = metadata["low"], metadata["high"]
    is_above_low = number > low if metadata["open_low"] else number >= low
    if is_above_low and number <= high and (number < math.inf or not metadata["finite"]):
        return
    relation = "above" if metadata["open_low"] else "at least"
    upper = f" and at most {high}" if high < math.inf else " and finite"
    raise InputError(f"{label} is {_format(number)}; it must be {relation} {low}{upper}.")


def _convert(value: Any, hint: Any, label: str) -> Any:
    """Convert a value to the hinted type; only numbers, lists and tables are converted."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        if typing.get_origin(kind) is tuple:
            if isinstance(value, list | tuple) and all(_is_number(v) for v in value):
                return tuple(_as_float(v) for v in value)
        elif typing.get_origin(kind) is dict:
            if isinstance(value, Mapping) and all(map(_is_table_value, value.values())):
                return dict(value)
        elif kind is float and _is_number(value):
            return _as_float(value)
        elif kind is str and isinstance(value, str):
            _check_no_control_characters(value, label)
            return value
        elif kind is not float and type(value) is kind:
            return value
    expected = " or ".join(
        _TYPE_NAMES.get(typing.get_origin(k) or k, "?") for k in kinds if k is not type(None)
    )
    raise InputError(f"{label} is {_format(value)}; it must be {expected}.")


_TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    tuple: "a list of numbers",
    dict: "a table of numbers, strings and lists of numbers",
}


def _is_table_value(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_number, value))
    return isinstance(value, bool | str) or _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer with hundreds of digits
        return math.inf if value > 0 else -math.inf


def _check_no_control_characters(value: str, label: str) -> None:
    """Refuse control characters and surrogates, which are invalid in file names and log lines."""
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        raise InputError(
            f"{label} is {_format(value)}; it must be a string without control characters."
        )


def _format(value: Any) -> str:
    """Format a value for an error message, truncated to 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer with thousands of digits
        return "a huge number"
    return text if len(text) <= 80 else f"{text[:77]}..."


def to_mapping(settings: Any) -> dict[str, Any]:
    """Convert settings to nested dictionaries; omit settings that are None."""

    def drop_none(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: drop_none(item) for key, item in value.items() if item is not None}
        return value

    mapping: dict[str, Any] = drop_none(dataclasses.asdict(settings))
    return mapping


def differing_settings(first: Any, second: Any) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield each setting that differs between two recipes; the section "expected" is left out.

    Yields:
        its section, its key, and both values; None for a setting that is open.
    """
    values, others = to_mapping(first), to_mapping(second)
    for section in [name for name, each in values.items() if isinstance(each, dict)]:
        if section == "expected":
            continue
        here, there = values[section], others.get(section, {})
        for key in dict.fromkeys([*here, *there]):
            if (old := here.get(key)) != (new := there.get(key)):
                yield section, key, old, new


def to_toml(settings: Any) -> str:
    """Format settings as TOML that `build_settings` can read; omit settings that are None."""
    lines = []
    for key, value in to_mapping(settings).items():
        if isinstance(value, dict):
            lines += ["", f"[{key}]", *(f"{k} = {_toml_value(v)}" for k, v in value.items())]
        else:
            lines.append(f"{key} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def parse_value(text: str) -> Any:
    """Parse a TOML value; text that is not valid TOML is returned as a string.

    Surrounding spaces are removed, except if there is nothing else: a space is a delimiter.
    """
    text = text.strip() or text
    try:
        parsed = tomllib.loads(f"value = {text}")
    except TOML_ERRORS:
        return text
    return parsed["value"] if len(parsed) == 1 else text


TOML_ERRORS = (ValueError, RecursionError)
"""Errors that tomllib raises for invalid TOML, huge integers, deep nesting or invalid bytes."""


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + "".join(_TOML_ESCAPES.get(c, c) for c in value) + '"'
    if isinstance(value, tuple | list):
        return f"[{', '.join(_toml_value(v) for v in value)}]"
    if isinstance(value, Mapping):
        return (
            f"{{ {', '.join(f'{_toml_value(k)} = {_toml_value(v)}' for k, v in value.items())} }}"
        )
    return repr(value)


_TOML_ESCAPES = {
    "\\": "\\\\",
    '"': '\\"',
    **{chr(code): f"\\u{code:04x}" for code in [*range(32), 127]},
}


def drop_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries whose value is not None."""
    return {name: value for name, value in values.items() if value is not None}
