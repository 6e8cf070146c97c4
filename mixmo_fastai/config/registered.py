"""Look up the functions and classes that the tables of `choices.py` name."""

from pkgutil import resolve_name
from typing import Any

from mixmo_fastai.errors import InputError, summarize_error


def resolve_registered(kind: str, name: str, target: str) -> Any:
    """Import the object that a table names.

    Args:
        kind: what the table contains, such as "mask kind", for messages.
        name: key in the table.
        target: value in the table: "module:function" or "module:class", of any module that Python
            finds.

    Raises:
        InputError: the text has another form, or there is no such module, function or class.
    """
    problem = "it must have the form 'package.module:name'"
    if ":" in target:
        try:
            return resolve_name(target)
        except (ImportError, AttributeError, ValueError) as error:
            problem = summarize_error(error)
    raise InputError(
        f"The {kind} {name!r} is registered as {target!r}, which cannot be imported: {problem}.\n"
        "Correct the module or the name behind the colon."
    )
