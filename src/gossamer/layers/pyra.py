"""Parallel yielding re-activation: tokens that are about to be merged are rescaled, by channel and by token.

Source: Xiong et al. 2024, "PYRA: Parallel Yielding Re-Activation for Training-Inference Efficient Task Adaptation",
section 3.2.

- a new block merges as `MergingBlock` does: `b` starts at zero, and with it every token weight
- 4 r c multiplications in a forward pass, and r + 3 c parameters
- padding, which is dropped, has no part in the weights
"""

import math

import torch
from torch import Tensor, nn

from gossamer.layers.blocks import Block
from gossamer.layers.reduce import MergingBlock
from gossamer.ops import tokens as ops


class PyraBlock(MergingBlock):
    """`x_s <- x_s + x_s w_c w_t` for the r tokens that go, before they are added to their partners `x_t`.

    `w_c = 2 sigmoid(a^T z)` is one weight a channel, `w_t = 2 sigmoid(z b^T) - 1` one a token, `z = norm(x_s + x_t)`;
    tokens are multiplied by their sizes throughout.

    Args:
        r: tokens to merge where `tokens` come in, at least 1; never more, for `a` has a row for each.
        tokens: how many are expected.
        protect: leading tokens that are never merged.

    Raises:
        ValueError: `r` is below 1.
    """

    def __init__(self, block: Block, r: int, *, tokens: int, protect: int = 0) -> None:
        super().__init__(block, r, tokens=tokens, protect=protect)
        if r < 1:
            raise ValueError(f"r must be at least 1, got {r}")
        like = next(block.mixer.parameters())
        dim, given = block.mixer.dim, {"device": like.device, "dtype": like.dtype}
        self.a = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(r, 1, **given), a=math.sqrt(5)))
        self.b = nn.Parameter(torch.zeros(1, dim, **given))
        self.norm = nn.LayerNorm(dim, **given)

    def count(self, n: int) -> int:
        return min(self.r, super().count(n))

    def moved(self, x: Tensor, sizes: Tensor, found: ops.Matching) -> Tensor:
        weighted = x * sizes[..., None]
        goes = ops.take(weighted, found.gone)
        z = self.norm(goes + ops.take(weighted, found.stay.gather(1, found.into)))
        if found.real is not None:
            z = z * found.real[..., None]
        channels = 2 * torch.sigmoid((z * self.a[: z.shape[1]]).sum(1, keepdim=True))
        alone = 2 * torch.sigmoid(z @ self.b.t()) - 1
        return goes + goes * channels * alone
