"""How far a run was logged, kept with the run for its resumed parts."""

import json
import os
from pathlib import Path


class Progress:
    """The id that a service gave to a run, and the last logged step of each kind.

    Entries of most services cannot be deleted. Steps that are repeated after a crash are therefore
    not logged again.

    Args:
        path: JSON file in which they are kept; its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.is_active = path, True
        try:
            self.values = dict(json.loads(path.read_text(encoding="utf-8")))
            self.latest = {str(k): int(v) for k, v in self.values.get("latest", {}).items()}
        except (OSError, ValueError, TypeError, AttributeError):  # missing or damaged
            self.values, self.latest = {}, {}

    def advance(self, kind: str, step: int) -> bool:
        """Return whether a step is later than all logged steps of its kind; if so, record it."""
        if step <= self.latest.get(kind, -1):
            return False
        self.latest[kind] = step
        return True

    def save(self, **values: str) -> None:
        """Write the progress to its file."""
        if self.is_active:
            self.values |= {**values, "latest": self.latest}
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.values) + "\n", encoding="utf-8")
            os.replace(temporary, self.path)
