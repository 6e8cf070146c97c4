"""The statistics of `SyncedBatchNorm2d` are those of the whole batch."""

import pytest
import torch
from launches import start_processes, wait_for_all

from mixmo_fastai.models.synced_norm import SyncedBatchNorm2d, sync_batch_norm

pytestmark = pytest.mark.slow

__all__ = ["start_processes"]  # fixtures

NORM_PROGRAM = """
import torch
import torch.distributed as dist
from torch import nn
from mixmo_fastai.models.synced_norm import (
    SyncedBatchNorm1d, SyncedBatchNorm2d, SyncedBatchNormAct2d
)
dist.init_process_group("gloo")
rank = dist.get_rank()
given = torch.load("given.pt")
norm = KIND(5, momentum=MOMENTUM)
if isinstance(norm, SyncedBatchNormAct2d):
    norm.drop, norm.act = nn.Identity(), nn.ReLU()
norm.load_state_dict(given["state"])
x = given["x"].chunk(2)[rank].clone().requires_grad_()
out = norm(x)
(out * given["weights"].chunk(2)[rank]).sum().backward()
torch.save([out.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.state_dict()],
           f"found-{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("kind", "momentum"),
    [("2d", 0.1), ("2d", None), ("1d", 0.1), ("Act2d", 0.1)],
)
def test_synced_statistics_equal_those_of_the_whole_batch(
    start_processes, tmp_path, kind, momentum
):
    random = torch.Generator().manual_seed(0)
    size = (8, 5) if kind == "1d" else (8, 5, 3, 4)
    x, weights = (torch.randn(size, generator=random) for _ in range(2))
    x = x * 3 + 7
    norm = (torch.nn.BatchNorm1d if kind == "1d" else torch.nn.BatchNorm2d)(5, momentum=momentum)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(5, generator=random) + 0.5)
        norm.bias.copy_(torch.randn(5, generator=random))
    torch.save({"state": norm.state_dict(), "x": x, "weights": weights}, tmp_path / "given.pt")
    program = NORM_PROGRAM.replace("MOMENTUM", str(momentum))
    program = program.replace("KIND", f"SyncedBatchNorm{kind}")
    wait_for_all(start_processes("fit", "--help", prelude=program))
    found = [torch.load(tmp_path / f"found-{rank}.pt") for rank in range(2)]
    x.requires_grad_()
    out = norm(x).relu() if kind == "Act2d" else norm(x)
    (out * weights).sum().backward()
    torch.testing.assert_close(torch.cat([part[0] for part in found]), out.detach())
    torch.testing.assert_close(torch.cat([part[1] for part in found]), x.grad)
    for place, own in ((2, norm.weight.grad), (3, norm.bias.grad)):
        torch.testing.assert_close(found[0][place] + found[1][place], own)
    for part in found:
        torch.testing.assert_close(part[4], norm.state_dict())


def test_synced_norm_in_one_process_equals_batch_norm():
    norm = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    x = torch.randn(4, 3, 2, 2)
    expected = norm(x)
    assert type(sync_batch_norm(norm)[0]) is SyncedBatchNorm2d
    torch.testing.assert_close(norm(x), expected)
