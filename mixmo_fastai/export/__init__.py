"""Fused networks as files, checked against their run."""

from mixmo_fastai.imports import lazy_names

_MODULES = {
    "ExportedNetwork": "export.files",
    "export_run": "export.files",
    "load_fused": "export.files",
}
__all__ = [*_MODULES]  # noqa: PLE0604
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
