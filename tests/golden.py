"""Reference values of the published implementation, if they are available."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
NETWORKS = ("wrn10_1_m2", "wrn16_2_m3", "wrn16_1_vanilla", "preact_resnet18_1_m2")

needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="reference values of the published implementation not available"
)


def facts(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def arrays(name):
    with np.load(GOLDEN / f"{name}.npz") as stored:
        return {key: torch.from_numpy(stored[key]) for key in stored.files}


def published_weights(name):
    """Compute the weights of the published network from the names of its tensors."""
    stored = facts(name)
    return {
        tensor: torch.from_numpy(_weight(f"{stored['salt']}/{tensor}", tensor, tuple(shape)))
        for tensor, shape in stored["state_dict"]
    }


def _weight(key, tensor, shape):
    if tensor.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype=np.int64)
    random = np.random.RandomState(zlib.crc32(key.encode()))
    normal = np.asarray(random.standard_normal(shape), dtype=np.float32)
    if tensor.endswith((".running_mean", ".bias")):
        return np.float32(0.1) * normal
    if tensor.endswith(".running_var"):
        return 1 + np.float32(0.1) * np.abs(normal)
    if len(shape) == 1:
        return 1 + np.float32(0.1) * normal
    return normal * np.float32(np.sqrt(2 / np.prod(shape[1:])))
