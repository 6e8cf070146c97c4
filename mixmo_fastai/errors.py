"""Exceptions with messages for users, suggestions for misspelt names, and argument checks."""

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from inspect import Parameter, signature
from numbers import Integral, Real
from typing import TypeVar

_AnyError = TypeVar("_AnyError", bound=Exception)


class InputError(ValueError):
    """Raised for an invalid value from the user.

    The message has one to three lines: what is wrong, what is allowed, what to do. The command line
    prints it without a traceback and exits with code 2.
    """


class RunFailedError(RuntimeError):
    """Raised when a run fails for a reason other than invalid input.

    The message has one to three lines. The command line prints it without a traceback and exits
    with code 1.
    """


class RunInterruptedError(Exception):
    """Training was interrupted by the user or a signal; the message says how to resume it.

    Attributes:
        exit_code: exit code of the process.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def remove_fastai_prefix(error: _AnyError) -> _AnyError:
    """Remove the prefix that fastai adds to the message of an error raised in a callback."""
    error.args = (_FASTAI_PREFIX.sub("", str(error)),)
    return error


_FASTAI_PREFIX = re.compile(r"Exception occured in `\w+` when calling event `\w+`:\n\t")


def summarize_error(error: BaseException, max_length: int = 120) -> str:
    """Format an error as its type and the first `max_length` characters of its first line."""
    message = str(error).partition("\n")[0][:max_length].rstrip(".: ")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def check_count(name: str, value: object, minimum: int = 1) -> None:
    """Check that a value is an integer of at least `minimum`.

    Raises:
        InputError: it is not; the message contains `name`.
    """
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or value < minimum:  # type: ignore[operator]
        raise InputError(f"{name} must be an integer, {minimum} or more; got {value!r}.")


def check_fraction(name: str, value: object, *, below_one: bool = False) -> None:
    """Check that a value is a number from 0 to 1; with `below_one`, 1 is not allowed.

    Raises:
        InputError: it is not; the message contains `name`.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1 or (below_one and value == 1):  # type: ignore[operator]
        allowed = "at least 0 and below 1" if below_one else "from 0 to 1"
        raise InputError(f"{name} must be {allowed}; got {value!r}.")


def nearest(
    name: str, choices: Iterable[str], cutoff: float = 0.6, *, shortened: bool = False
) -> str | None:
    """Return the choice closest to a misspelt name, or None if no choice is close.

    Args:
        name: the received name.
        choices: the allowed names.
        cutoff: minimum similarity, from 0 to 1 for equal names.
        shortened: also accept the beginning of the only choice that begins so, and other names that
            people use for a choice.
    """
    by_normalized = {_normalized(choice): choice for choice in choices}
    given = _normalized(name)
    matches = []
    if shortened and len(given) > 2:
        start = _SYNONYMS.get(given, given)
        matches = [each for each in by_normalized if each.startswith(start)]
    if len(matches) != 1:
        matches = get_close_matches(given, by_normalized, n=1, cutoff=cutoff)
    return by_normalized[matches[0]] if matches else None


_SYNONYMS = {"gpu": "cuda"}
"""Names that people use for others."""


def did_you_mean(guess: str | None) -> str:
    """Return a question that follows a sentence, such as " Did you mean 'cutmix'?"; or ""."""
    return f" Did you mean {guess!r}?" if guess else ""


def unknown_name_error(kind: str, name: str, choices: Iterable[str]) -> InputError:
    """Build the error for an unknown name.

    Args:
        kind: the kind of name, such as "mask kind".
        name: the received name.
        choices: the allowed names, in the order in which to list them.
    """
    choices = list(choices)
    guess = nearest(name, choices, shortened=True)
    hint = did_you_mean(guess)
    return InputError(f"Unknown {kind} {name!r}.{hint}\nAllowed: {', '.join(choices)}.")


def unknown_option_error(
    owner: str, option: str, allowed: Iterable[str], cutoff: float = 0.6
) -> InputError:
    """Build the error for an unknown option.

    Args:
        owner: what has options, such as "The optimizer adamw".
        option: the received option.
        allowed: the allowed options.
        cutoff: see `nearest`.
    """
    allowed = list(allowed)
    guess = nearest(option, allowed, cutoff, shortened=True)
    hint = did_you_mean(guess)
    return InputError(
        f"{owner} has no option {option!r}.{hint}\nAllowed: {', '.join(allowed) or 'none'}."
    )


def parameter_names(function: Callable[..., object]) -> list[str] | None:
    """Return the names of a function's parameters; None if it takes any keyword argument."""
    parameters = signature(function).parameters
    takes_any = any(each.kind is Parameter.VAR_KEYWORD for each in parameters.values())
    return None if takes_any else [*parameters]


def signature_mismatch(function: Callable[..., object], *arguments: object) -> str | None:
    """Return why a function does not take these arguments; None if it does, or is a builtin."""
    try:
        signature(function).bind(*arguments)
    except TypeError as error:
        return str(error)
    except ValueError:  # a builtin without a signature
        pass
    return None


def _normalized(name: str) -> str:
    return name.lower().replace("_", "-").replace(" ", "-")
