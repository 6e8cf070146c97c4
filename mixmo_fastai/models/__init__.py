"""Networks: MixMoModel, which combines encoders, core and heads, and the published backbones.

To add a backbone, add a file here that returns encoders, core and heads, and a branch in
`create_model`.
"""

from mixmo_fastai.models.create import build_model, create_model
from mixmo_fastai.models.mixmo_model import MixMoModel
from mixmo_fastai.models.surgery import convert_to_mixmo

__all__ = ["MixMoModel", "build_model", "convert_to_mixmo", "create_model"]
