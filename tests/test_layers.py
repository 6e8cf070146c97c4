"""Imports point down only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mixmo_fastai

PACKAGE = Path(mixmo_fastai.__file__).parent
STDLIB, MATHEMATICS, FASTAI, ASSEMBLY, SHELL = range(5)

LAYERS = {
    "__init__": STDLIB,
    "advice": STDLIB,
    "errors": STDLIB,
    "files": STDLIB,
    "interruption": STDLIB,
    "library_names": STDLIB,
    "locking": STDLIB,
    "metric_table": STDLIB,
    "names": STDLIB,
    "recipe": STDLIB,
    "resolve": STDLIB,
    "runs": STDLIB,
    "schedule": STDLIB,
    "settings": STDLIB,
    "sizing": STDLIB,
    "wording": STDLIB,
    "augment": MATHEMATICS,
    "base_losses": MATHEMATICS,
    "bootstrap": MATHEMATICS,
    "calibration": MATHEMATICS,
    "confusion": MATHEMATICS,
    "diversity": MATHEMATICS,
    "filter_use": MATHEMATICS,
    "losses": MATHEMATICS,
    "mixing": MATHEMATICS,
    "msda": MATHEMATICS,
    "models": MATHEMATICS,
    "pairing": MATHEMATICS,
    "per_sample": MATHEMATICS,
    "processes": MATHEMATICS,
    "randomness": MATHEMATICS,
    "selective": MATHEMATICS,
    "flops": MATHEMATICS,
    "adoption": FASTAI,
    "averaging": FASTAI,
    "callback": FASTAI,
    "data": FASTAI,
    "deferred": FASTAI,
    "distributed": FASTAI,
    "epochs": FASTAI,
    "learner_checks": FASTAI,
    "metrics": FASTAI,
    "muon": MATHEMATICS,
    "optimizers": FASTAI,
    "parameter_groups": FASTAI,
    "preview": FASTAI,
    "selection": FASTAI,
    "acceleration": ASSEMBLY,
    "checkpoints": ASSEMBLY,
    "assessment": ASSEMBLY,
    "comparison": ASSEMBLY,
    "deep_ensemble": ASSEMBLY,
    "detection": ASSEMBLY,
    "evaluation": ASSEMBLY,
    "export": ASSEMBLY,
    "learner": ASSEMBLY,
    "lr_search": ASSEMBLY,
    "member_predictions": ASSEMBLY,
    "prediction": ASSEMBLY,
    "speed": ASSEMBLY,
    "training": ASSEMBLY,
    "recording": ASSEMBLY,
    "resuming": ASSEMBLY,
    "devices": ASSEMBLY,
    "failures": ASSEMBLY,
    "figures": SHELL,
    "loggers": SHELL,
    "report": SHELL,
    "cli": SHELL,
    "__main__": SHELL,
}
ALLOWED_FROM_ELSEWHERE = {
    STDLIB: set(),
    MATHEMATICS: {"torch", "numpy", "torchvision", "timm"},  # the latter two give backbones
    FASTAI: {
        *{"torch", "numpy", "fastai", "fasttransform", "torchvision", "PIL", "sklearn"},
        "accelerate",  # what fastai's distributed training is built on
    },
    ASSEMBLY: {"torch", "numpy", "fastai", "safetensors", "sklearn", "onnxruntime"},
    SHELL: {
        *{"torch", "fastai", "rich", "typer", "matplotlib", "jinja2", "markupsafe", "PIL"},
        "wandb",
    },
}
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
def test_imports_point_down(path):
    layer = LAYERS[part_of(path)]
    for name in imports(path):
        top, *inside = name.split(".")
        if top == "mixmo_fastai":
            own = inside[0] if inside and inside[0] in LAYERS else "__init__"
            assert LAYERS[own] <= layer, f"{path.name} imports {name} from above"
        elif top not in sys.stdlib_module_names:
            allowed = ALLOWED_FROM_ELSEWHERE[layer]
            assert top in allowed, f"{path.name} imports {top}; its layer has {sorted(allowed)}"


def test_every_module_has_a_layer():
    assert {part_of(path) for path in FILES} == set(LAYERS)


def test_importing_the_package_loads_neither_torch_nor_fastai():
    program = (
        "import sys, mixmo_fastai, mixmo_fastai.cli.program, mixmo_fastai.data;"
        "heavy = {'torch', 'fastai', 'numpy', 'matplotlib', 'tensorboard', 'wandb'};"
        "sys.exit(bool(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_public_names_are_there():
    for name in mixmo_fastai.__all__:
        assert getattr(mixmo_fastai, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'mixup'"):
        mixmo_fastai.mixup  # noqa: B018
