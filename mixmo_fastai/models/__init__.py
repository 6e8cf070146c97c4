"""Networks: MixMoModel, which combines encoders, core and heads, and the published backbones.

To add a backbone, write a file here like `wide_resnet.py`, with a stem and a core, and add a branch
to `create.py`.
"""

from mixmo_fastai.models.convert import convert_to_mixmo
from mixmo_fastai.models.create import build_model, create_model
from mixmo_fastai.models.mixmo_model import MixMoModel

__all__ = ["MixMoModel", "build_model", "convert_to_mixmo", "create_model"]
