"""Weights & Biases logger: one W&B run per network, with files in RUN/logs/wandb.

WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and other variables are respected. The user is never
prompted to log in: without a login or a connection, the run is stored in its folder, and
`wandb sync` uploads it.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb
from PIL import Image

from mixmo_fastai.errors import summarize_error
from mixmo_fastai.loggers.progress import Progress
from mixmo_fastai.loggers.rows import RowTracker
from mixmo_fastai.loggers.tracker import TrackedRun

PROJECT = "mixmo"
OFFLINE_MODES = ("offline", "disabled", "dryrun")


class WandbTracker(RowTracker):
    """Log to one W&B run, including all resumed parts of the training.

    Entries of W&B runs cannot be deleted. The run folder therefore records the last logged step of
    each kind, and steps that are repeated after a crash are not logged again. The last entries
    before a crash may be lost, since wandb writes about 32 kB at a time.
    """

    def __init__(self, run: TrackedRun) -> None:
        (run.folder / "wandb").mkdir(exist_ok=True)
        self.progress = Progress(run.folder / "wandb" / "run.json")
        mode, reason = _choose_mode()
        try:
            self.wandb_run = self._start(run, mode)
        except wandb.Error as error:
            if mode in OFFLINE_MODES:
                raise
            mode, reason = "offline", summarize_error(error)
            self.wandb_run = self._start(run, mode)
        self.progress.is_active = mode != "disabled"
        self.progress.save(id=self.wandb_run.id)
        self.wandb_run.define_metric("step", hidden=True)
        self.wandb_run.define_metric("*", step_metric="step")
        run.report(self._describe_location(mode, reason))

    def _start(self, run: TrackedRun, mode: str) -> Any:
        env_project, env_name, env_group = (
            os.environ.get(name) for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_GROUP")
        )
        run_id = self.progress.values.get("id")
        return wandb.init(
            reinit="create_new",  # do not reuse another run that is open in this process
            dir=run.folder,  # wandb creates its folder "wandb" in it
            project=env_project or PROJECT,
            name=env_name or run.name,
            group=env_group or run.group,
            config=dict(run.settings),
            id=run_id,
            resume="allow" if run_id and mode not in OFFLINE_MODES else None,
            mode=mode,
            settings=wandb.Settings(silent=True, console="off"),  # only the command prints
        )

    def _describe_location(self, mode: str, reason: str) -> str:
        if mode == "disabled":
            return "wandb: disabled."
        if mode in OFFLINE_MODES:
            remark = f" ({reason})" if reason else ""
            return f"wandb: stored locally{remark}; upload with: wandb sync {self.folder}"
        return f"wandb: {self.wandb_run.url}"

    @property
    def folder(self) -> Path:
        """The folder of the W&B run."""
        return Path(self.wandb_run.dir).parent

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Log one row, with the step as a value."""
        self.wandb_run.log({"step": step, **values})

    def picture(self, image: Image.Image) -> Any:
        """Return an image for a row."""
        return wandb.Image(image)

    def close(self, exit_code: int) -> None:
        """Finish the W&B run, which uploads pending data; the next signal exits immediately."""
        self.wandb_run.finish(exit_code=exit_code)


def _choose_mode() -> tuple[str, str]:
    """Return the requested mode, or "offline" and the reason if it would prompt for a login."""
    mode = wandb.setup(wandb.Settings(silent=True)).settings.mode or "online"
    if mode in OFFLINE_MODES:
        return mode, ""
    try:
        if wandb.login(prompt=False, verify=False):
            return mode, ""
    except wandb.Error as error:
        return "offline", summarize_error(error)
    return "offline", "not logged in"
