"""What tests against the authors' code share: random weights by rule, golden tensors, manifests of checkpoints.

Golden files hold what the authors' code computed from `seeded_state` weights, so the weights need not be stored.
"""

import gzip
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

MANIFESTS = Path(os.environ.get("GOSSAMER_MANIFESTS", Path(__file__).parents[2] / "shared" / "manifests"))
GOLDEN = Path(__file__).parent / "golden"


def seeded_state(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights for the keys of a checkpoint, each drawn from a generator seeded by the key's CRC-32.

    Matrices and convolutions have deviation `fan_in ** -0.5`; vectors named `weight`, variances and scales lie near 1,
    other vectors and means near 0; a tensor of no axes is a counter.
    """
    state = {}
    for key, shape in shapes.items():
        noise = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        name = key.rpartition(".")[2]
        if not shape:
            state[key] = torch.tensor(1)
            continue
        if len(shape) > 1:
            value = noise * prod(shape[1:]) ** -0.5
        elif name == "running_var":
            value = 0.5 + noise.abs()
        elif name == "bias" or name == "running_mean":
            value = 0.1 * noise
        else:
            value = 1 + 0.1 * noise
        state[key] = value.to(dtype)
    return state


def seeded_input(name: str, shape: Sequence[int]) -> Tensor:
    """The normal noise, single precision, that the golden file `name` was computed from."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def probe(*outputs: Tensor) -> Tensor:
    """The number whose gradients golden files hold: `sum_i sin(i) y_i` over each output."""
    return sum((y * torch.arange(y.numel()).to(y.dtype).sin().view(y.shape)).sum() for y in outputs)


def golden(name: str) -> dict[str, Any]:
    """The arrays of `tests/golden/NAME.npz` as tensors; the entry `shapes` (keys and shapes) as a dict."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {
            key: json.loads(str(file[key])) if key == "shapes" else torch.from_numpy(file[key]) for key in file.files
        }


@cache
def manifest(slug: str) -> dict[str, dict[str, Any]]:
    """The variants of `shared/manifests/SLUG.json[.gz]`; the test is skipped where manifests are absent."""
    for suffix in (".json", ".json.gz"):
        path = MANIFESTS / f"{slug}{suffix}"
        if path.exists():
            data = path.read_bytes()
            return json.loads(gzip.decompress(data) if suffix.endswith("gz") else data)["variants"]
    pytest.skip(f"no manifest of {slug} in {MANIFESTS}; set GOSSAMER_MANIFESTS")
