"""Build Learners that train MixMo networks.

build             `mixmo_learner`, `to_mixmo`, and the Learner of a recipe
arch              networks from a name, a function or a module
loaders           what the loaders tell about images, targets and classes
optimizers, muon  optimizers by name
parameter_groups  parameter groups, including those of a converted Learner
member_preds      predictions of each member
preview           the first batch as seen in training
distributed       training in several processes
"""

from mixmo_fastai.imports import lazy_names

_MODULES = {
    "body_and_heads": "learner.parameter_groups",
    "learner_from_recipe": "learner.build",
    "mixmo_learner": "learner.build",
    "shared": "learner.distributed",
    "to_mixmo": "learner.build",
}
__all__ = [*_MODULES]  # noqa: PLE0604
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
