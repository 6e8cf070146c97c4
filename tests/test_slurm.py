"""The scripts of docs/distributed.md, with programs in place of SLURM's srun and scontrol."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import SLOW_STEPS
from processes import TIMEOUT

from mixmo_fastai.runs.folder import RunFolder, open_run

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[1] / "docs" / "distributed.md"
SCRIPTS = {
    re.search("# (.*)", block.partition("\n")[2])[1]: block
    for block in re.findall(r"```bash\n(#!/bin/bash.*?)```", PAGE.read_text(), re.DOTALL)
}
SRUN = """#!{python}
import os, signal, subprocess, sys
signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # like that of SLURM, it survives the warning
count = int(os.environ["SLURM_NTASKS"])
tasks = [
    subprocess.Popen(
        sys.argv[1:],
        env={{**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}},
        preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_DFL),
    )
    for rank in range(count)
]
open("pids", "w").write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then echo 127.0.0.1; else echo "$@" >> requeued; fi
"""
MIXMO = """#!{python}
import sys
from mixmo_fastai.cli import main
{slow}
words = sys.argv[1:]
if "--resume" not in words:
    words[words.index("cifar100")] = "digits"
    at = words.index("--recipe") + 1
    words[at] = {{"cifar100/deep-ensemble": "digits/vanilla"}}.get(words[at], "digits/cut-mixmo")
    words += "--arch wrn10_1 --limit 64 --batch-size 32 --epochs 3 --device cpu --threads 1".split()
sys.argv[1:] = words
main()
"""


class Cluster:
    """A folder with the programs that the scripts call."""

    def __init__(self, folder, *, num_tasks=1):
        self.folder, self.num_tasks = folder, num_tasks
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "mixmo": MIXMO}.items():
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            is_python = text is not SCONTROL
            path.write_text(
                text.format(python=sys.executable, slow=SLOW_STEPS) if is_python else text
            )
            path.chmod(0o755)

    def submit(self, name, run, **variables):
        """Start a script as a job."""
        script = self.folder / name
        port = 20000 + os.getpid() % 10000
        if not script.exists():  # bash reads a script while it runs
            script.write_text(SCRIPTS[name].replace("29500", str(port)))
        environment = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "SLURM_NTASKS": str(self.num_tasks),
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_CPUS_PER_TASK": "1",
            **variables,
        }
        log = (self.folder / "log.txt").open("a")
        with log:
            return subprocess.Popen(
                ["bash", str(script), str(run)],
                cwd=self.folder, env=environment, stdout=log, stderr=log,
            )  # fmt: skip

    @property
    def log(self):
        return (self.folder / "log.txt").read_text()

    def warn(self, run):
        """Send SIGUSR1 to the tasks after the first epoch, as SLURM does before the time limit."""
        deadline = time.monotonic() + TIMEOUT
        while not run.history():
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)
        for pid in (self.folder / "pids").read_text().split():
            os.kill(int(pid), signal.SIGUSR1)

    def requeued(self):
        path = self.folder / "requeued"
        return path.read_text().splitlines() if path.exists() else []


def test_scripts_are_found():
    assert [*SCRIPTS] == ["one-gpu.sh", "many-gpus.sh", "ensemble.sh"]
    assert all("#SBATCH --signal=USR1@300 --requeue" in script for script in SCRIPTS.values())


@pytest.mark.parametrize(("name", "num_tasks"), [("one-gpu.sh", 1), ("many-gpus.sh", 2)])
def test_job_is_requeued_before_its_limit_and_continues(tmp_path, name, num_tasks):
    cluster, run = Cluster(tmp_path, num_tasks=num_tasks), RunFolder(tmp_path / "run")
    job = cluster.submit(name, run.path)
    cluster.warn(run)
    assert job.wait(TIMEOUT) == 138, cluster.log
    assert cluster.requeued() == ["requeue 77"]
    assert "Interrupted. The state is saved" in cluster.log
    assert not run.is_finished
    assert cluster.submit(name, run.path).wait(TIMEOUT) == 0, cluster.log
    assert cluster.requeued() == ["requeue 77"]
    assert "Resuming: 1 of 3 epochs" in cluster.log
    assert len(open_run(run.path).history()) == 3
    assert run.is_finished
    assert ("in 2 processes" in cluster.log) == (num_tasks == 2)


def test_array_fills_a_deep_ensemble(tmp_path):
    cluster, run = Cluster(tmp_path), RunFolder(tmp_path / "run")
    jobs = [
        cluster.submit("ensemble.sh", run.path, SLURM_ARRAY_TASK_ID=str(number))
        for number in range(1, 5)
    ]
    for job in jobs:
        assert job.wait(2 * TIMEOUT) == 0, cluster.log
    assert run.is_finished
    assert all(network.is_finished for network in run.networks())
    assert len(run.networks()) == 4
    assert cluster.requeued() == []
