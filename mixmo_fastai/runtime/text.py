"""Format times and long names."""


def estimated_duration(seconds: float) -> str:
    """Format an estimated time in its largest unit: 4,000 is "about 67 min"."""
    if seconds < 10:
        return "a few seconds"
    unit, decimals, name = next(row[1:] for row in _DURATIONS if seconds < row[0])
    return f"about {seconds / unit:.{decimals}f} {name}"


_MINUTE, _HOUR, _DAY = 60, 3600, 86_400


_DURATIONS = (
    (100, 1, 0, "s"),
    (100 * _MINUTE, _MINUTE, 0, "min"),
    (10 * _HOUR, _HOUR, 1, "h"),
    (48 * _HOUR, _HOUR, 0, "h"),
    (1000 * _DAY, _DAY, 0, "days"),
    (float("inf"), 365 * _DAY, 0, "years"),
)
"""Upper limit of each row in seconds; seconds per unit, number of decimals and name of the unit."""


def printable(text: str) -> str:
    """Replace the bytes of file names that are not UTF-8 by "?", for pages and plots."""
    return text.encode(errors="replace").decode()


def truncate(name: str, length: int) -> str:
    """Make a name `printable`, with at most `length` characters, the last of them "…"."""
    name = printable(name)
    return name if len(name) <= length else f"{name[: length - 1]}…"


def counted(number: int, noun: str) -> str:
    """Format a number of things: 2 and "run" are "2 runs"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """Format a time: 192 is "3.2 min"."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
