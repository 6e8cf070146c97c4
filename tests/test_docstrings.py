"""The examples in the docstrings of the metrics run and print what they show."""

import doctest
import importlib
import inspect

import pytest
import torch

MODULES = [
    "metrics.accuracy",
    "metrics.bootstrap",
    "metrics.calibration",
    "metrics.confusion",
    "metrics.diversity",
    pytest.param("metrics.fastai", marks=pytest.mark.slow),
    "metrics.ood",
    "metrics.selective",
    "metrics.temperature",
]
RUNNER = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)


def examples_of(module):
    """All docstrings of a module that have examples, by name within the module."""
    tests = doctest.DocTestFinder().find(module, extraglobs={"torch": torch})
    prefix = module.__name__
    return {test.name.removeprefix(prefix).lstrip("."): test for test in tests if test.examples}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(f"mixmo_fastai.{name}")
    for test in examples_of(module).values():
        report = []
        RUNNER.run(test, out=report.append, clear_globs=True)
        assert not report, "".join(report)


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_and_metric_has_an_example(name):
    module = importlib.import_module(f"mixmo_fastai.{name}")
    public = {
        key
        for key, value in vars(module).items()
        if key[0] != "_"
        and getattr(value, "__module__", "") == module.__name__
        and (inspect.isfunction(value) or (name == "metrics.fastai" and inspect.isclass(value)))
    }
    assert public
    assert public <= examples_of(module).keys()
