"""Network names in the installed timm and fastai, read from their source code.

Importing timm takes seconds and imports torch; checking a name should need neither. Standard
library only.
"""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@cache
def timm_networks() -> frozenset[str]:
    """Return the same names as `timm.list_models()`; empty if timm is not installed."""
    return _names("timm", "models/*.py", r"^@register_model\s+def (\w+)\(")


@cache
def fastai_networks() -> frozenset[str]:
    """Return the names of fastai's functions that build classifiers, all of them XResNets."""
    return _names("fastai", "vision/models/xresnet.py", r"^def (x\w+) *\(")


def _names(package: str, files: str, pattern: str) -> frozenset[str]:
    """Return the names that match a pattern in a package's files; empty if unreadable."""
    try:
        spec = find_spec(package)
        root = Path(spec.origin).parent if spec and spec.origin else None
        texts = [path.read_text("utf-8") for path in root.glob(files)] if root else []
    except (OSError, ValueError, ImportError):
        return frozenset()
    return frozenset(name for text in texts for name in re.findall(pattern, text, re.MULTILINE))
