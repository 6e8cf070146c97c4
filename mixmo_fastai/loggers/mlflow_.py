"""MLflow logger: one MLflow run per network, in RUN/logs/mlflow.db or on a tracking server.

MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and the variables of MLflow's client are respected. The
user interface is that of the package mlflow; mlflow-skinny suffices for logging.
"""

import logging
import os
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from mixmo_fastai.loggers.progress import Progress
from mixmo_fastai.loggers.tracker import Step, TrackedRun

EXPERIMENT = "mixmo"
_ATTEMPTS = 4
_KEPT = "/:\\ "
MAX_METRICS, MAX_PARAMS, MAX_VALUE = 1000, 100, 500
"""Limits of one request, and of the length of a parameter, of the oldest supported server."""


class MlflowTracker:
    """Log to one MLflow run, including all resumed parts of the training.

    Entries of MLflow runs cannot be deleted, so steps that are repeated after a crash are not
    logged again.
    """

    def __init__(self, run: TrackedRun) -> None:
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # only the command prints
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        local = f"sqlite:///{quote(str(run.folder / 'mlflow.db'), safe=_KEPT)}"
        self.progress = Progress(run.folder / "mlflow.json")
        if uri is None and self.progress.values.get("id") is None:
            # A process that was stopped while it created the tables leaves them incomplete.
            (run.folder / "mlflow.db").unlink(missing_ok=True)
        self.client = MlflowClient(tracking_uri=uri or local)
        self.run_id = self._find_run() or self._create_run(run, None if uri else run.folder)
        self.progress.save(id=self.run_id)
        command = shlex.join(["mlflow", "ui", "--backend-store-uri", local])
        where = uri or f"stored locally; show with: {command}"
        run.report(f"mlflow: {where}")

    def _find_run(self) -> str | None:
        """Continue the run of an earlier part; return None if there is none."""
        run_id = self.progress.values.get("id")
        if run_id is None:
            return None
        try:
            self.client.update_run(run_id, status="RUNNING")
        except MlflowException:  # another server, or the run was deleted
            self.progress.latest = {}
            return None
        return str(run_id)

    def _create_run(self, run: TrackedRun, folder: Path | None) -> str:
        """Create a run, and its experiment if there is none.

        Args:
            run: the run to log.
            folder: folder of a local database, for its files; None if a server decides.
        """
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        artifacts = None if folder is None else (folder / "mlflow-files").as_uri()
        experiment_id = self._experiment(name, artifacts)
        tags = {} if run.group is None else {"group": run.group}
        created = self.client.create_run(experiment_id, run_name=run.name, tags=tags)
        run_id = str(created.info.run_id)
        params = [Param(name, str(value)[:MAX_VALUE]) for name, value in run.settings.items()]
        for start in range(0, len(params), MAX_PARAMS):
            self.client.log_batch(run_id, params=params[start : start + MAX_PARAMS])
        return run_id

    def _experiment(self, name: str, artifacts: str | None) -> str:
        """Return the id of an experiment, creating it unless another process does so meanwhile."""
        for attempt in range(_ATTEMPTS):
            try:
                if (found := self.client.get_experiment_by_name(name)) is not None:
                    return str(found.experiment_id)
                return str(self.client.create_experiment(name, artifacts))
            except Exception:  # it exists now, or another process creates the tables
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(1 + attempt)
        raise AssertionError

    def log_steps(self, steps: Sequence[Step]) -> None:
        """Log loss, learning rate and momentum of each step."""
        new = [step for step in steps if self.progress.advance("train", step.step)]
        names = ("loss", "lr", "momentum")
        self._log(
            [
                Metric(f"train/{n}", getattr(step, n), _now(), step.step)
                for step in new
                for n in names
            ]
        )

    def log_metrics(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics."""
        if self.progress.advance(kind, step):
            self._log([Metric(f"{kind}/{n}", v, _now(), step) for n, v in metrics.items()])

    def _log(self, metrics: Sequence[Metric]) -> None:
        for start in range(0, len(metrics), MAX_METRICS):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + MAX_METRICS])
        self.progress.save()

    def log_images(self, step: int, images: Mapping[str, bytes]) -> None:
        """Log plots as files in the folder pictures."""
        if not self.progress.advance("pictures", step):
            return
        with tempfile.TemporaryDirectory() as folder:
            for name, png in images.items():
                path = Path(folder, f"{name}.png")
                path.write_bytes(png)
                self.client.log_artifact(self.run_id, str(path), "pictures")
        self.progress.save()

    def close(self, exit_code: int) -> None:
        """Set the status of the run."""
        status = {0: "FINISHED", 1: "FAILED"}.get(exit_code, "KILLED")
        self.client.set_tag(self.run_id, "exit_code", str(exit_code))
        self.client.set_terminated(self.run_id, status)


def _now() -> int:
    return int(time.time() * 1000)
