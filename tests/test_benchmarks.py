"""Run each benchmark at a small size; measured speeds are not tested."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import FORK_INSTEAD, TIMEOUT

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SMALL_ARGUMENTS = {
    "input_pipeline.py": "--batches 2 --other-batches 2 --images 2000 --repeats 1 --pause 0",
    "photo_loader.py": "--sizes 500x375 --images 8 --side 16 --batch-size 2 --repeats 1 --pause 0 "
    "--workers 1",
    "training_step.py": "--arch wrn10_1 --batch-size 4 --repeats 1",
    "inference.py": "--arch wrn10_1 --batch-size 4 --repeats 1",
    "memory.py": "--arch wrn10_1 --batch-size 4",
    "cpu_precision.py": "--archs wrn10_1 --batch-size 4 --repeats 1",
    "growth.py": "--arch wrn10_1 --batch-size 8 --repeats 1 --images 100",
    "evaluation.py": "--images 200 --classes 10 --repeats 1",
    "long_run.py": "--epochs 2 --limit 32",
    "busy.py": "--arch wrn10_1 --epochs 1 --limit 64 --busy 1",
    "edge.py": "--archs wrn10_1 --size 8 --batch-sizes 1,2 --repeats 1",
    "masks.py": "--arch wrn10_1 --batch-size 4 --repeats 1",
}
GPU_ARGUMENTS = (
    "--device cpu --arch wrn10_1 --batch-sizes 4 --steps 2 --repeats 1 --batches 2 --side 64 "
    "--no-compile --data digits --recipes vanilla,cut-mixmo --limit 64 --recipe-arch wrn10_1 "
    "--recipe-batch 16 --passes 4"
)
SMALL_IMAGES = f"""
import sys
sys.path.insert(1, {str(BENCHMARKS)!r})  # the folder of the script replaces the first entry
import input_pipeline, steps
steps.SIZE = 16
input_pipeline.make_pixels.__defaults__ = (2000,)
"""
HELPERS = {"gpu_checks.py", "measure.py", "steps.py"}


def test_all_benchmarks_are_listed():
    assert {*SMALL_ARGUMENTS, "gpu.py", "peers.py"} == {
        path.name for path in BENCHMARKS.glob("*.py")
    } - HELPERS


@pytest.fixture
def benchmark(mixmo):
    """Return a function that runs a benchmark and returns its exit code and output."""

    def run(name, arguments, out, prelude=""):
        prelude = FORK_INSTEAD + prelude
        command = mixmo(*arguments.split(), "--out", out, script=BENCHMARKS / name, prelude=prelude)
        return command.wait(timeout=5 * TIMEOUT), command.printed

    return run


@pytest.mark.parametrize("name", SMALL_ARGUMENTS)
def test_benchmark_writes_its_results(name, benchmark, tmp_path):
    out = tmp_path / "results.json"
    code, output = benchmark(name, SMALL_ARGUMENTS[name], out)
    assert code == 0, output
    results = json.loads(out.read_text())
    assert results["machine"]["torch"]
    assert len(results) > 1
    assert "on processor" in output


SPIN = f"""
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by processes in the background
sys.path.insert(0, {str(BENCHMARKS)!r})
from busy import spinning
with spinning(2) as pids:
    print(*pids, flush=True)
    if sys.argv[1] == "error":
        raise SystemExit(3)
    time.sleep(60)
"""


@pytest.mark.parametrize("end", ["error", "SIGINT", "SIGKILL"])
def test_spinning_processes_end_with_the_benchmark(end):
    command = [sys.executable, "-c", SPIN, end]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        if end != "error":
            process.send_signal(getattr(signal, end))
        assert process.wait(timeout=TIMEOUT) != 0
    deadline = time.monotonic() + TIMEOUT
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid):
    """Check whether a process runs; one that has ended may wait for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_peers_are_compared(benchmark, tmp_path):
    pytest.importorskip("torch_uncertainty", reason="its extra is not installed")
    out = tmp_path / "results.json"
    code, output = benchmark("peers.py", "--arch wrn10_1 --batch-size 4 --repeats 1", out)
    assert code == 0, output
    ratios = json.loads(out.read_text())["ratios"]
    assert len(ratios) == 5
    assert min(ratio["median"] for ratio in ratios.values()) > 0


def test_missing_peer_is_named(benchmark, tmp_path):
    without = "import sys; sys.modules['torch_uncertainty'] = None\n"
    code, output = benchmark("peers.py", "", tmp_path / "results.json", without)
    assert code == 1
    assert output.splitlines()[-1].endswith("pip install -e '.[benchmarks]'")


def test_gpu_benchmark_runs_on_a_cpu(benchmark, tmp_path):
    code, output = benchmark("gpu.py", GPU_ARGUMENTS, tmp_path, prelude=SMALL_IMAGES)
    assert code == 0, output
    results = json.loads((tmp_path / "results.json").read_text())
    seen = [results["recipes"][name]["images_seen"] for name in ("vanilla", "cut-mixmo")]
    assert seen[0] == seen[1] > 0
    for name, check in results["checks"].items():
        assert isinstance(check, str) or check["difference"] <= check["limit"], name
    assert results["memory"]["ratio"] < 1.1
    rate = results["throughput"]["4"]["eager"]["channels last"]["images_per_second"]["median"]
    assert rate > 0


def test_compiled_part_of_the_gpu_benchmark_runs_on_a_cpu(benchmark, tmp_path):
    """Use a backend that generates no code; eager mode is measured by the test above."""
    fast_backend = (
        "import functools, torch;torch.compile = functools.partial(torch.compile, backend='eager')"
    )
    arguments = GPU_ARGUMENTS.replace("--no-compile", "--no-eager --parts checks,throughput")
    code, output = benchmark("gpu.py", arguments, tmp_path, prelude=SMALL_IMAGES + fast_backend)
    assert code == 0, output
    results = json.loads((tmp_path / "results.json").read_text())
    assert "synchronisations within an epoch, compiled" in results["checks"]
    compiled = results["throughput"]["4"]["compiled"]
    assert compiled["compiled"]["images_per_second"]["median"] > 0
    assert "Learner, compiled" in compiled


def test_failed_part_does_not_stop_the_others(benchmark, tmp_path):
    arguments = GPU_ARGUMENTS.replace("--data digits", f"--data {tmp_path / 'missing'}")
    arguments = f"{arguments} --parts recipes,memory"
    code, _ = benchmark("gpu.py", arguments, tmp_path, prelude=SMALL_IMAGES)
    assert code == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert "There is no folder" in results["recipes"]["failed"]
    assert results["memory"]["ratio"] > 0
