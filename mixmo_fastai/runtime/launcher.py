"""Numbers that a launcher of processes, such as torchrun, sets as environment variables."""

import os

from mixmo_fastai.errors import InputError


def launcher_number(name: str) -> int:
    """Return the number in an environment variable of a launcher; 0 if it is not set.

    Args:
        name: such as "RANK".

    Raises:
        InputError: it is no number.
    """
    text = os.environ.get(name) or "0"
    if not text.isdecimal():
        raise InputError(
            f"The environment variable {name} must be a number; it is {text!r}.\n"
            "Start the processes with torchrun or accelerate launch, or unset it."
        )
    return int(text)
