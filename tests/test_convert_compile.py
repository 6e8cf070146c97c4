"""Converted networks are compiled and exported."""

from functools import partial

import pytest
import torch
from networks import PaddedImage, SmallNetwork, build_backbone

from mixmo_fastai.errors import InputError
from mixmo_fastai.models import convert_to_mixmo


@pytest.fixture
def dynamo():
    """Return torch.compile with a backend for tests; reset the compiler before and after."""
    torch.compiler.reset()
    yield partial(torch.compile, backend="eager")
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_network_rejects_images_that_it_pads(dynamo):
    compiled = dynamo(convert_to_mixmo(PaddedImage()).eval())
    with torch.no_grad(), pytest.raises(InputError, match="images of 64x40 to 64x64"):
        compiled(torch.randn(2, 2, 64, 40))


@pytest.mark.slow
def test_compilation_and_export_without_graph_breaks(dynamo):
    converted, x = convert_to_mixmo(build_backbone("resnet18")).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = converted(x)
        compiled = dynamo(converted, fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        for model in (converted, converted.fuse()):
            exported = torch.export.export(model, (x,)).module()
            torch.testing.assert_close(exported(x), expected, rtol=1e-3, atol=1e-3)


class GraphBreak(SmallNetwork):
    """Cannot be compiled as one graph."""

    def forward(self, x):
        torch._dynamo.graph_break()
        return super().forward(x)


@pytest.mark.slow
def test_compilation_with_graph_breaks(dynamo):
    converted, x = convert_to_mixmo(GraphBreak()).eval(), torch.randn(2, 2, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(dynamo(converted)(x), converted(x))
