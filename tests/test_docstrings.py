"""The examples in the docstrings of metrics, mixing and models run and print what they show."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

METRICS = [
    "metrics.abstention",
    "metrics.accuracy",
    "metrics.bootstrap",
    "metrics.calibration",
    "metrics.conformal",
    "metrics.confusion",
    "metrics.diversity",
    "metrics.label_distribution",
    pytest.param("metrics.fastai", marks=pytest.mark.slow),
    "metrics.multi_label",
    "metrics.ood",
    "metrics.scaling",
    "metrics.selective",
    "metrics.temperature",
]
MIXING_AND_MODELS = [
    pytest.param("mixing.base_losses", marks=pytest.mark.slow),  # imports fastai
    "mixing.batches",
    "mixing.features",
    "mixing.loss",
    "mixing.masks",
    "mixing.msda",
    "mixing.pairing",
    "mixing.per_sample",
    "mixing.ratios",
    "mixing.regions",
    "models.backbone_core",
    "models.conversion_checks",
    "models.convert",
    "models.create",
    "models.filters",
    "models.flops",
    "models.folding",
    "models.forward_record",
    "models.fused",
    "models.ghost_norm",
    "models.norms",
    "models.initialization",
    "models.member_init",
    "models.library",
    "models.mixmo_model",
    "models.part_checks",
    "models.preact_resnet",
    "models.pretrained",
    "models.probe",
    "models.readout",
    "models.reference",
    "models.synced_norm",
    "models.wide_resnet",
]
WITHOUT_EXAMPLE = {
    # Results of functions whose examples show them.
    "models.convert": {"EndLayers"},
    "models.forward_record": {"ForwardRecord", "LayerCall"},
    # An abstract method; the example of the class shows which cores have it.
    "models.readout": {"HasMaps.maps"},
}
RUNNER = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)


def examples_of(module):
    """All docstrings of a module that have examples, by name within the module."""
    tests = doctest.DocTestFinder().find(module, extraglobs={"torch": torch})
    prefix = module.__name__
    return {test.name.removeprefix(prefix).lstrip("."): test for test in tests if test.examples}


def public_members(owner, module, *kinds):
    """Public members that a module or class defines and for which a check of `kinds` holds."""
    return {
        name: member
        for name, member in vars(owner).items()
        if name[0] != "_"
        and getattr(member, "__module__", "") == module.__name__
        and name == member.__name__  # not an alias
        and any(is_kind(member) for is_kind in kinds)
    }


@pytest.mark.parametrize("name", METRICS + MIXING_AND_MODELS)
def test_examples(name):
    module = importlib.import_module(f"mixmo_fastai.{name}")
    for test in examples_of(module).values():
        report = []
        RUNNER.run(test, out=report.append, clear_globs=True)
        assert not report, "".join(report)


@pytest.mark.parametrize("name", METRICS)
def test_every_public_function_and_metric_has_an_example(name):
    module = importlib.import_module(f"mixmo_fastai.{name}")
    metric = [inspect.isclass] if name == "metrics.fastai" else []
    public = public_members(module, module, inspect.isfunction, *metric)
    assert public
    assert public.keys() <= examples_of(module).keys()


@pytest.mark.parametrize("name", MIXING_AND_MODELS)
def test_every_public_function_class_and_documented_method_has_an_example(name):
    module = importlib.import_module(f"mixmo_fastai.{name}")
    classes = public_members(module, module, inspect.isclass)
    methods = {
        f"{class_name}.{method_name}"
        for class_name, owner in classes.items()
        for method_name, method in public_members(owner, module, inspect.isfunction).items()
        if method.__doc__
    }
    public = public_members(module, module, inspect.isfunction).keys() | classes | methods
    assert public
    assert public - examples_of(module).keys() == WITHOUT_EXAMPLE.get(name, set())


def test_every_module_of_mixing_and_models_is_listed():
    listed = {getattr(name, "values", [name])[0] for name in MIXING_AND_MODELS}
    packages = [importlib.import_module(f"mixmo_fastai.{name}") for name in ("mixing", "models")]
    assert listed == {
        f"{package.__name__.removeprefix('mixmo_fastai.')}.{module.name}"
        for package in packages
        for module in pkgutil.iter_modules(package.__path__)
    }
