"""Every benchmark runs, small, and writes its figures; how fast is not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SMALL = {
    "input_pipeline.py": ["--batches", "2", "--repeats", "1"],
    "training_step.py": ["--arch", "wrn10_1", "--batch-size", "2", "--repeats", "1"],
    "evaluation.py": ["--images", "200", "--classes", "10", "--repeats", "1"],
    "masks.py": ["--arch", "wrn10_1", "--batch-size", "2", "--repeats", "1"],
}


def test_every_benchmark_is_run():
    assert set(SMALL) == {path.name for path in BENCHMARKS.glob("*.py")} - {"measure.py"}


@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_writes_its_figures(name, tmp_path):
    out = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *SMALL[name], "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert figures["machine"]["torch"]
    assert len(figures) > 1
    assert "on processor" in done.stdout
