"""Errors that a person can act on, and the nearest-name suggestion they carry."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import TypeVar

_AnyError = TypeVar("_AnyError", bound=Exception)


class InputError(ValueError):
    """A value that came from the user cannot be used.

    The message is one to three lines: what was wrong, what is allowed, what to do. The command
    line prints it without a traceback and exits with code 2.
    """


class RunFailedError(RuntimeError):
    """A run could not go on, through no fault of its input alone.

    The message is one to three lines. The command line prints it without a traceback and exits with
    code 1.
    """


def plain(error: _AnyError) -> _AnyError:
    """Take off what fastai puts before the message of an error that a callback raises."""
    error.args = (_PREFACE.sub("", str(error)),)
    return error


_PREFACE = re.compile(r"Exception occured in `\w+` when calling event `\w+`:\n\t")


def first_line(error: BaseException, most: int = 120) -> str:
    """Give the kind of an error that somebody else's code raised, and its message's first line."""
    said = str(error).partition("\n")[0][:most].rstrip(".: ")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def check_count(name: str, value: object) -> None:
    """Check that something is a whole number, 1 or more.

    Raises:
        InputError: it is not; `name` says what it is.
    """
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be a whole number, 1 or more; got {value!r}.")


def nearest(name: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Find the choice that `name` most probably meant, or None where nothing is close.

    Args:
        name: what was received.
        choices: the names that are allowed.
        cutoff: how close it must be, from 0 to 1 for equal.
    """
    by_folded = {_fold(choice): choice for choice in choices}
    matches = get_close_matches(_fold(name), by_folded, n=1, cutoff=cutoff)
    return by_folded[matches[0]] if matches else None


def unknown(what: str, name: str, choices: Iterable[str]) -> InputError:
    """Build the error for a name that is not among the choices.

    Args:
        what: the kind of thing that was named, as in "mask kind".
        name: what was received.
        choices: the names that are allowed, in the order in which to list them.
    """
    choices = list(choices)
    guess = nearest(name, choices)
    hint = f" Did you mean {guess!r}?" if guess else ""
    return InputError(f"Unknown {what} {name!r}.{hint}\nAllowed: {', '.join(choices)}.")


def _fold(name: str) -> str:
    return name.lower().replace("_", "-").replace(" ", "-")
