"""Imports point down only."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import mixmo_fastai

PACKAGE = Path(mixmo_fastai.__file__).parent
NUMERIC = {"torch", "numpy"}
VISION = {"torchvision", "PIL"}
FASTAI = {"fastai", "fasttransform"}

PACKAGES = {
    # Each imports from the packages above it, and from these libraries.
    "imports": set(),
    "__init__": set(),
    "errors": set(),
    "config": set(),
    "rng": NUMERIC,
    "mixing": NUMERIC,
    "models": NUMERIC | {"torchvision", "timm", "safetensors"},
    "runtime": NUMERIC,
    "metrics": NUMERIC | FASTAI | {"sklearn", "scipy"},
    "runs": NUMERIC | {"safetensors", "filelock"},
    "data": NUMERIC | FASTAI | VISION | {"sklearn", "pyarrow", "datasets"},
    "callbacks": NUMERIC | FASTAI,
    "learner": NUMERIC | FASTAI | {"accelerate"},
    "export": NUMERIC | {"safetensors", "onnx", "onnxruntime", "huggingface_hub", "httpx"},
    "evaluation": NUMERIC | FASTAI,
    "training": NUMERIC | FASTAI | {"safetensors"},
    "study": NUMERIC | {"safetensors", "scipy"},
    "plots": {"torch", "fastai", "matplotlib", "PIL"},
    "report": NUMERIC | {"matplotlib", "jinja2", "markupsafe", "PIL"},
    "loggers": {"torch", "fastai", "PIL", "wandb", "mlflow", "trackio"},
    "cli": {"torch", "fastai", "rich", "typer"},
    "__main__": set(),
}
ORDER = list(PACKAGES)
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    package = part_of(path)
    for name in imports(path):
        top, *inside = name.split(".")
        if top == "mixmo_fastai":
            imported = inside[0] if inside and inside[0] in PACKAGES else "__init__"
            assert ORDER.index(imported) <= ORDER.index(package), (
                f"{path.name} imports {name}, but {package} is before {imported}"
            )
        elif top not in sys.stdlib_module_names:
            assert top in PACKAGES[package], (
                f"{path.name} imports {top}; {package} may import {sorted(PACKAGES[package])}"
            )


def test_every_package_has_a_row():
    assert {part_of(path) for path in FILES} == set(PACKAGES)


def test_importing_the_package_loads_neither_torch_nor_fastai():
    program = (
        "import sys, mixmo_fastai, mixmo_fastai.cli.program, mixmo_fastai.data;"
        "heavy = {'torch', 'fastai', 'numpy', 'matplotlib', 'tensorboard', 'wandb'};"
        "sys.exit(bool(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.slow
def test_evaluation_and_plots_import_neither_torchvision_nor_the_tracer_of_torch():
    """Each of them takes one to two seconds; training needs torch._dynamo for torch.optim."""
    program = (
        "import sys, mixmo_fastai.evaluation.runs, mixmo_fastai.evaluation.predict;"
        "import mixmo_fastai.report.page, mixmo_fastai.plots.png, mixmo_fastai.export.files;"
        "import mixmo_fastai.training.train, mixmo_fastai.models;"
        "sys.exit(bool({'torch._dynamo', 'torchvision'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_public_names_of_packages_are_there(name):
    package = (
        importlib.import_module("mixmo_fastai" if name == "__init__" else f"mixmo_fastai.{name}")
        if name != "__main__"
        else mixmo_fastai
    )
    for public_name in getattr(package, "__all__", ()):
        assert getattr(package, public_name) is not None


def test_public_names_are_there():
    for name in mixmo_fastai.__all__:
        assert getattr(mixmo_fastai, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'mixup'"):
        mixmo_fastai.mixup  # noqa: B018
