"""Networks: MixMoModel, which combines encoders, core and heads, and the published backbones.

mixmo_model                    the multi-input multi-output network; part_checks: check its parts
create                         networks from architecture names
wide_resnet, preact_resnet     the published backbones; initialization: their initial weights
library                        classifiers of torchvision and timm by name
pretrained                     files of weights: of a plain network, or of a MixMo network
convert                        any network with a first convolution and a last linear layer;
                               member_init: initial weights of its encoders and heads
forward_record, probe          find these layers; conversion_checks: check the converted network
backbone_core                  the part of a network between these layers
readout                        how the heads read the feature maps of the core
fused                          fuse into a plain network for inference
folding                        fold BatchNorm into convolutions, for inference
ghost_norm, synced_norm        BatchNorm over groups of a batch, and over processes; norms
reference                      weights of the published implementation
filters, flops                 filter use; number of operations

To add a backbone, write a file here like `wide_resnet.py`, with a stem and a core, and add a branch
to `create.py`.
"""

from mixmo_fastai.models.convert import convert_to_mixmo
from mixmo_fastai.models.create import build_model, create_model
from mixmo_fastai.models.mixmo_model import MixMoModel

__all__ = ["MixMoModel", "build_model", "convert_to_mixmo", "create_model"]
