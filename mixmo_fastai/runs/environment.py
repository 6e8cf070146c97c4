"""The versions, device and code revision of a run."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mixmo_fastai.config.recipe import Recipe

PACKAGES = ("mixmo-fastai", "torch", "torchvision", "fastai", "numpy", "safetensors")


def describe_environment(recipe: Recipe, device: str, acceleration: str) -> dict[str, Any]:
    """Return the content of environment.json."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "seed": recipe.train.seed,
        "device": device,
        "acceleration": acceleration,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _git_revision(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Return the git revision of this package, or None if it does not run from a checkout."""
    if not (Path(__file__).parents[2] / ".git").exists():
        return None  # installed, or copied into another repository
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
