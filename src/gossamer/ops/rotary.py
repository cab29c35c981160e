"""Rotary positions: queries and keys turned by an angle that grows with their position.

Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", section 3.4; Dubey et al. 2024,
"The Llama 3 Herd of Models", section 3.2 (frequencies for longer texts than those trained on).

- only the difference of two positions reaches `q k^T`
- channel i is paired with channel i + d/2, as in released weights, not with its neighbour
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rotary_frequencies(
    dim: int, base: float = 10000.0, scaling: Mapping[str, Any] | None = None
) -> Float[Tensor, " half"]:
    """`f_i = base^(-2i/dim)`, turns per token, slowed down by `scaling`.

    Args:
        dim: channels of a head, even.
        scaling: `{"kind": "linear", "factor": s}` divides all by s. `{"kind": "llama3", "factor": s,
            "low_freq_factor": l, "high_freq_factor": h, "original_max_position_embeddings": n}` divides those that
            turn fewer than l times in n tokens, keeps those that turn more than h times, and blends between.

    Raises:
        ValueError: `dim` is odd, or a scaling that is not known or lacks a value.
    """
    if dim % 2:
        raise ValueError(f"rotary positions need an even head width, got {dim}")
    f = base ** (torch.arange(0, dim, 2, dtype=torch.float32) / -dim)
    if scaling is None:
        return f
    kind = scaling.get("kind")
    if kind not in SCALINGS:
        raise ValueError(f"scaling kind must be one of {', '.join(SCALINGS)}; got {kind!r}")
    if lacking := [name for name in SCALINGS[kind] if name not in scaling]:
        raise ValueError(f"scaling {kind} lacks {', '.join(lacking)}")
    slow = f / scaling["factor"]
    if kind == "linear":
        return slow
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)
    return torch.lerp(slow, f, ((turns - low) / (high - low)).clamp(0, 1))


def rotate(
    x: Float[Tensor, "b h n d"], positions: Float[Tensor, " n"], frequencies: Float[Tensor, " half"]
) -> Float[Tensor, "b h n d"]:
    """`(x_i, x_{i+d/2})` turned by the angle `position * f_i`."""
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
