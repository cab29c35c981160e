"""BigBird: blocks of tokens see the ends of the sequence, their neighbours, and a few blocks at random.

Source: Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences" (the block form of its appendix D).

- the first and the last block see everything and are seen by everyone; a class token in front lies in the first
- the blocks are laid over the whole sequence, padding included: it is not read, but it moves the last block
- random blocks are drawn per head from a seed, so a saved model reads the same blocks again
- cost grows linearly with tokens; any length (short ones are read whole)
- prunable: heads
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gossamer.mixers.base import register_mixer
from gossamer.mixers.sequence import SequenceMixer
from gossamer.ops.patterns import bigbird_blocks, block_attention


@register_mixer("bigbird", grids=(1,))
class BigBird(SequenceMixer):
    """`y_i = softmax` attention over the blocks that the block of `i` sees: first, last, own, two beside, random.

    Args:
        dim: channels.
        grid: size of the token grid, if known: its blocks are drawn at once (export needs that), others when met.
        heads: attention heads.
        head_dim: channels of a head, `dim / heads` by default.
        block: tokens of a block.
        random: random blocks of each block and head.
        seed: of the random blocks; give the layers of a model different ones.
        qkv_bias: whether the input products add a bias.
        out_bias: whether the output product adds one.

    Raises:
        ValueError: `block` is below 1, `random` below 0, or `heads` does not divide `dim` and no `head_dim` is given.
    """

    head_tables = ("head_ids",)
    head_ids: Tensor

    def __init__(
        self,
        dim: int,
        *,
        grid: tuple[int, ...] | None = None,
        heads: int = 8,
        head_dim: int | None = None,
        block: int = 64,
        random: int = 3,
        seed: int = 0,
        qkv_bias: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, head_dim, qkv_bias=qkv_bias, out_bias=out_bias)
        if block < 1 or random < 0:
            raise ValueError(f"block must be at least 1 and random at least 0, got {block} and {random}")
        self.block, self.random, self.seed = block, random, seed
        self.drawn = heads
        # Which of the drawn heads these are: a pruned model keeps the blocks its heads were trained with.
        self.register_buffer("head_ids", torch.arange(heads))
        self._tables: dict[int, Tensor] = {}
        if grid is not None:
            self.table(-(-math.prod(grid) // block))

    def mix(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n e"],
        mask: Bool[Tensor, "b n"] | None,
        x: Float[Tensor, "b n c"],
    ) -> Float[Tensor, "b h n e"]:
        index = self.table(-(-x.shape[1] // self.block)).to(x.device)[:, self.head_ids]
        return block_attention(q, k, v, index, self.block, dense_rows=(0, -1), mask=mask)

    def table(self, blocks: int) -> Tensor:
        """The key blocks of each block, for all heads that were drawn: `(1, heads, blocks, 5 + random)`."""
        if blocks not in self._tables:
            generator = torch.Generator().manual_seed(self.seed)
            with torch.device("cpu"):  # a model may be built on the meta device, where nothing can be drawn
                self._tables[blocks] = bigbird_blocks(blocks, random=self.random, heads=self.drawn, generator=generator)
        return self._tables[blocks]
