"""Every benchmark runs, small, and writes its figures; how fast is not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SMALL = {
    "input_pipeline.py": "--batches 2 --repeats 1",
    "training_step.py": "--arch wrn10_1 --batch-size 4 --repeats 1",
    "inference.py": "--arch wrn10_1 --batch-size 4 --repeats 1",
    "memory.py": "--arch wrn10_1 --batch-size 4",
    "growth.py": "--arch wrn10_1 --batch-size 8 --repeats 1 --images 400",
    "evaluation.py": "--images 200 --classes 10 --repeats 1",
    "long_run.py": "--epochs 2 --limit 32",
    "masks.py": "--arch wrn10_1 --batch-size 4 --repeats 1",
}
ON_A_GPU = (
    "--device cpu --arch wrn10_1 --batch-sizes 4 --steps 2 --repeats 1 --batches 2 --side 64 "
    "--no-compile --data digits --recipes vanilla,cut-mixmo --limit 64 --recipe-arch wrn10_1 "
    "--recipe-batch 16 --passes 4"
)
HELPERS = {"measure.py", "steps.py"}


def test_every_benchmark_is_run():
    assert {*SMALL, "gpu.py"} == {path.name for path in BENCHMARKS.glob("*.py")} - HELPERS


def run(name, words, out):
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *words.split(), "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_writes_its_figures(name, tmp_path):
    out = tmp_path / "figures.json"
    done = run(name, SMALL[name], out)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert figures["machine"]["torch"]
    assert len(figures) > 1
    assert "on processor" in done.stdout


def test_the_benchmark_of_a_gpu_runs_whole_on_a_cpu(tmp_path):
    done = run("gpu.py", ON_A_GPU, tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    seen = [figures["recipes"][name]["images_seen"] for name in ("vanilla", "cut-mixmo")]
    assert seen[0] == seen[1] > 0
    for name, check in figures["checks"].items():
        assert isinstance(check, str) or check["difference"] <= check["at most"], name
    assert figures["memory"]["ratio"] < 1.1
    rate = figures["throughput"]["4"]["eager"]["channels last"]["images_per_second"]["median"]
    assert rate > 0


def test_the_compiled_half_of_the_benchmark_of_a_gpu_runs_too(tmp_path):
    """With a backend that compiles in a second."""
    program = (
        "import functools, runpy, sys, torch;"
        "torch.compile = functools.partial(torch.compile, backend='aot_eager');"
        f"sys.path.insert(0, {str(BENCHMARKS)!r});"
        f"runpy.run_path({str(BENCHMARKS / 'gpu.py')!r}, run_name='__main__')"
    )
    words = ON_A_GPU.replace("--no-compile", "--parts checks,throughput").split()
    done = subprocess.run(
        [sys.executable, "-c", program, *words, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert "waits within an epoch, compiled" in figures["checks"]
    compiled = figures["throughput"]["4"]["compiled"]
    assert compiled["compiled"]["images_per_second"]["median"] > 0
    assert "Learner, compiled" in compiled


def test_a_part_that_fails_leaves_the_others(tmp_path):
    words = ON_A_GPU.replace("--data digits", f"--data {tmp_path / 'nowhere'}")
    done = run("gpu.py", f"{words} --parts recipes,memory", tmp_path)
    assert done.returncode == 1
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert "There is no folder" in figures["recipes"]["failed"]
    assert figures["memory"]["ratio"] > 0
