"""Trackio logger: one Trackio run per network, in Trackio's own folder or on a Hugging Face Space.

TRACKIO_DIR, TRACKIO_SPACE_ID and the other variables of Trackio are respected; the project is
TRACKIO_PROJECT or "mixmo".
"""

import io
import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

import trackio
from PIL import Image

from mixmo_fastai.loggers.progress import Progress
from mixmo_fastai.loggers.rows import RowTracker
from mixmo_fastai.loggers.tracker import TrackedRun

PROJECT = "mixmo"


class TrackioTracker(RowTracker):
    """Log to one Trackio run, including all resumed parts of the training.

    Steps that are repeated after a crash are not logged again.
    """

    def __init__(self, run: TrackedRun) -> None:
        self.progress = Progress(run.folder / "trackio.json")
        project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        name, resume = self.progress.values.get("id"), "allow"
        if name is None:
            name, resume = _unused_name(project, run.name), "never"
        with redirect_stdout(io.StringIO()):  # only the command prints
            self.run = trackio.init(
                project=project,
                name=name,
                group=run.group,
                config=dict(run.settings),
                resume=resume,
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        self.progress.save(id=name)
        run.report(f"trackio: run {name}; show with: trackio show --project {project}")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Log one row."""
        self.run.log(dict(values), step=step)

    def picture(self, image: Image.Image) -> Any:
        """Return an image for a row."""
        return trackio.Image(image)

    def close(self, exit_code: int) -> None:
        """Finish the run, which writes pending data."""
        with redirect_stdout(io.StringIO()):
            trackio.finish()


def _unused_name(project: str, name: str) -> str:
    """Return a name that no run of the project has, since runs are continued by their names."""
    try:
        names = {each.name for each in trackio.Api().runs(project)}
    except Exception:  # there is no such project
        return name
    unused = (name, *(f"{name}-{number}" for number in range(2, len(names) + 3)))
    return next(each for each in unused if each not in names)
