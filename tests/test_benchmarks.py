"""Every benchmark runs, small, and writes its figures; how fast is not tested."""

import json
from pathlib import Path

import pytest
from processes import FORK_INSTEAD, TIMEOUT

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SMALL = {
    "input_pipeline.py": "--batches 2 --other-batches 2 --images 2000 --repeats 1 --pause 0",
    "training_step.py": "--arch wrn10_1 --batch-size 4 --repeats 1",
    "inference.py": "--arch wrn10_1 --batch-size 4 --repeats 1",
    "memory.py": "--arch wrn10_1 --batch-size 4",
    "growth.py": "--arch wrn10_1 --batch-size 8 --repeats 1 --images 100",
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


@pytest.fixture
def benchmark(mixmo):
    """A function that runs a benchmark; it gives the exit code and what was printed."""

    def run(name, words, out, prelude=""):
        prelude = FORK_INSTEAD + prelude
        command = mixmo(*words.split(), "--out", out, script=BENCHMARKS / name, prelude=prelude)
        return command.wait(timeout=5 * TIMEOUT), command.printed

    return run


@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_writes_its_figures(name, benchmark, tmp_path):
    out = tmp_path / "figures.json"
    code, said = benchmark(name, SMALL[name], out)
    assert code == 0, said
    figures = json.loads(out.read_text())
    assert figures["machine"]["torch"]
    assert len(figures) > 1
    assert "on processor" in said


def test_the_benchmark_of_a_gpu_runs_whole_on_a_cpu(benchmark, tmp_path):
    code, said = benchmark("gpu.py", ON_A_GPU, tmp_path)
    assert code == 0, said
    figures = json.loads((tmp_path / "results.json").read_text())
    seen = [figures["recipes"][name]["images_seen"] for name in ("vanilla", "cut-mixmo")]
    assert seen[0] == seen[1] > 0
    for name, check in figures["checks"].items():
        assert isinstance(check, str) or check["difference"] <= check["limit"], name
    assert figures["memory"]["ratio"] < 1.1
    rate = figures["throughput"]["4"]["eager"]["channels last"]["images_per_second"]["median"]
    assert rate > 0


def test_the_compiled_half_of_the_benchmark_of_a_gpu_runs_too(benchmark, tmp_path):
    """With a backend that compiles in a second."""
    quick = (
        "import functools, torch;"
        "torch.compile = functools.partial(torch.compile, backend='aot_eager')"
    )
    words = ON_A_GPU.replace("--no-compile", "--parts checks,throughput")
    code, said = benchmark("gpu.py", words, tmp_path, prelude=quick)
    assert code == 0, said
    figures = json.loads((tmp_path / "results.json").read_text())
    assert "synchronisations within an epoch, compiled" in figures["checks"]
    compiled = figures["throughput"]["4"]["compiled"]
    assert compiled["compiled"]["images_per_second"]["median"] > 0
    assert "Learner, compiled" in compiled


def test_a_part_that_fails_leaves_the_others(benchmark, tmp_path):
    words = ON_A_GPU.replace("--data digits", f"--data {tmp_path / 'nowhere'}")
    code, _ = benchmark("gpu.py", f"{words} --parts recipes,memory", tmp_path)
    assert code == 1
    figures = json.loads((tmp_path / "results.json").read_text())
    assert "There is no folder" in figures["recipes"]["failed"]
    assert figures["memory"]["ratio"] > 0
