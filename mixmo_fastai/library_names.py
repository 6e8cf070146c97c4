"""Names of networks in the installed timm and fastai, read from their source.

Importing timm takes seconds and brings torch along, and a refused name should cost neither.
Standard library only.
"""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@cache
def timm_networks() -> frozenset[str]:
    """List the networks of the installed timm, as `timm.list_models()`; none without timm."""
    return _names("timm", "models/*.py", r"^@register_model\s+def (\w+)\(")


@cache
def fastai_networks() -> frozenset[str]:
    """List fastai's own functions that make classifiers, all of them XResNets."""
    return _names("fastai", "vision/models/xresnet.py", r"^def (x\w+) *\(")


def _names(package: str, files: str, definition: str) -> frozenset[str]:
    """Collect what definitions in a package's files name; nothing if it cannot be read."""
    try:
        spec = find_spec(package)
        root = Path(spec.origin).parent if spec and spec.origin else None
        texts = [each.read_text("utf-8") for each in root.glob(files)] if root else []
    except (OSError, ValueError, ImportError):
        return frozenset()
    return frozenset(name for text in texts for name in re.findall(definition, text, re.MULTILINE))
