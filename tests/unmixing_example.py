"""The readouts of `examples/unmixing.py`, for tests."""

import importlib.util
import sys
from pathlib import Path

from mixmo_fastai.config.choices import READOUTS

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "unmixing.py"
_spec = importlib.util.spec_from_file_location("unmixing", SCRIPT)
_module = sys.modules["unmixing"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

Unmixing, NormalizedUnmixing = _module.Unmixing, _module.NormalizedUnmixing
TARGETS = {name: READOUTS.pop(name) for name in ("unmixing", "unmixing-normalized")}
"""Values for `READOUTS`, from which they are removed again."""
