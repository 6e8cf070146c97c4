"""Weights & Biases: a run of it per network, its files in RUN/logs/wandb.

WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and the others hold. Nobody is ever asked to log in: without
a login, and without a connection, the run is kept in its folder, from where `wandb sync` sends it.
"""

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from PIL import Image

from mixmo_fastai.errors import first_line
from mixmo_fastai.loggers.tracker import Step, Subject

PROJECT = "mixmo"
WITHOUT_SENDING = ("offline", "disabled", "dryrun")


class WandbTracker:
    """Log to one run of Weights & Biases, however often training goes on.

    What is logged there cannot be taken back. So the run folder remembers how far each kind has
    come, and what a killed process had logged of steps that are done anew is not logged again. The
    last that such a process logged, wandb itself may have lost: it writes some 32 kB at a time.
    """

    def __init__(self, subject: Subject) -> None:
        (subject.folder / "wandb").mkdir(exist_ok=True)
        self.memory = _Memory(subject.folder / "wandb" / "run.json")
        mode, reason = _choose_mode()
        try:
            self.run = self._begin(subject, mode)
        except wandb.Error as error:
            if mode in WITHOUT_SENDING:
                raise
            mode, reason = "offline", first_line(error)
            self.run = self._begin(subject, mode)
        self.memory.active = mode != "disabled"
        self.memory.keep(id=self.run.id)
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")
        subject.say(self._where(mode, reason))

    def _begin(self, subject: Subject, mode: str) -> Any:
        own_project, own_name, own_group = (
            os.environ.get(name) for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_GROUP")
        )
        known = self.memory.values.get("id")
        return wandb.init(
            reinit="create_new",  # whatever run is open in this process, it is not this one
            dir=subject.folder,  # in which it makes its folder "wandb"
            project=own_project or PROJECT,
            name=own_name or subject.name,
            group=own_group or subject.group,
            config=dict(subject.settings),
            id=known,
            resume="allow" if known and mode not in WITHOUT_SENDING else None,
            mode=mode,
            settings=wandb.Settings(silent=True, console="off"),  # the console is the command's
        )

    def _where(self, mode: str, reason: str) -> str:
        if mode == "disabled":
            return "wandb: disabled."
        if mode in WITHOUT_SENDING:
            because = f" ({reason})" if reason else ""
            return f"wandb: kept on this machine{because}; to send it: wandb sync {self.folder}"
        return f"wandb: {self.run.url}"

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return Path(self.run.dir).parent

    def steps(self, steps: Sequence[Step]) -> None:
        """Log three metrics per step."""
        for step in steps:
            values = {f"train/{name}": getattr(step, name) for name in ("loss", "lr", "momentum")}
            self._log("train", step.step, values)
        self.memory.keep()

    def metrics(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics; the run's summary shows the latest of each."""
        self._log(kind, step, {f"{kind}/{name}": value for name, value in metrics.items()})
        self.memory.keep()

    def pictures(self, step: int, pictures: Mapping[str, bytes]) -> None:
        """Log pictures."""
        images = {name: Image.open(io.BytesIO(png)) for name, png in pictures.items()}
        self._log("pictures", step, {f"pictures/{n}": wandb.Image(i) for n, i in images.items()})
        self.memory.keep()

    def _log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self.memory.passes(kind, step):
            self.run.log({"step": step, **values})

    def close(self, exit_code: int) -> None:
        """Finish the run, which sends what is left; the next signal leaves at once."""
        self.run.finish(exit_code=exit_code)


class _Memory:
    """Which run of the tracker a folder's is, and which step of each kind was logged last."""

    def __init__(self, path: Path) -> None:
        self.path, self.active = path, True
        try:
            self.values = dict(json.loads(path.read_text(encoding="utf-8")))
            self.latest = {str(k): int(v) for k, v in self.values.get("latest", {}).items()}
        except (OSError, ValueError, TypeError, AttributeError):  # not there, or not whole
            self.values, self.latest = {}, {}

    def passes(self, kind: str, step: int) -> bool:
        """Tell whether a step is later than all of its kind so far; it then is the latest."""
        if step <= self.latest.get(kind, -1):
            return False
        self.latest[kind] = step
        return True

    def keep(self, **values: str) -> None:
        """Write it down."""
        if self.active:
            self.values |= {**values, "latest": self.latest}
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.values) + "\n", encoding="utf-8")
            os.replace(temporary, self.path)


def _choose_mode() -> tuple[str, str]:
    """Give the mode that was asked for, but one in which nobody is asked to log in; and why."""
    mode = wandb.setup(wandb.Settings(silent=True)).settings.mode or "online"
    if mode in WITHOUT_SENDING:
        return mode, ""
    try:
        if wandb.login(prompt=False, verify=False):
            return mode, ""
    except wandb.Error as error:
        return "offline", first_line(error)
    return "offline", "there is no login for it"
