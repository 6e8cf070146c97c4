"""Fused networks as files, checked against their run.

files         export to safetensors, ONNX and torch.export; loading
images        standardised images for checks and calibration
onnx_network  an ONNX file as a module, run by onnxruntime
header        the header of these files
formats       writers of .safetensors, .onnx and .pt2
int8          quantisation of an ONNX file, with a limit on the loss of accuracy
thresholds    the calibration of a run in exported files
hub, card     folders in the layout of the Hugging Face Hub, with a model card
"""

from mixmo_fastai.imports import lazy_names

_MODULES = {
    "ExportedNetwork": "export.files",
    "export_run": "export.files",
    "load_fused": "export.files",
}
__all__ = [*_MODULES]  # noqa: PLE0604
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
