"""One width from end to end: ViT, text classifiers, language models, hybrids (a mixer list gives them).

`head(norm(block_L(… block_1(stem(x)))))`
"""

from collections.abc import Sequence
from typing import Any, cast

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from gossamer.trunks.checkpointing import through


class Isotropic(nn.Module):
    """Stem, blocks of one width, norm, head.

    Args:
        stem: input to `(tokens (b, *grid, c), mask or None)`.
        blocks: applied in turn, each given the mask when there is one; a block with `reduces` true takes
            `(x, mask=, sizes=)` and gives all three back, with as many tokens as it leaves.
        norm: on the tokens after the last block, or None.
        head: `(tokens, mask) -> answer`; where tokens were merged it is given their `sizes=` too.
    """

    checkpointing = False

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module], *, norm: nn.Module | None, head: nn.Module):
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = head

    def encode(self, x: Shaped[Tensor, "b ..."]) -> tuple[Tensor, Tensor | None]:
        """The tokens after the last block and norm, and their mask."""
        return self._encode(x)[:2]

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, mask, sizes = through(self, _in_turn, self.blocks, *self.stem(x), None)
        return (x if self.norm is None else self.norm(x)), mask, sizes

    def forward(self, x: Shaped[Tensor, "b ..."]) -> Float[Tensor, "b ..."] | tuple[Float[Tensor, "b ..."], ...]:
        tokens, mask, sizes = self._encode(x)
        return self.head(tokens, mask) if sizes is None else self.head(tokens, mask, sizes=sizes)

    def features(self, x: Float[Tensor, "b i height width"]) -> list[Float[Tensor, "b h w c"]]:
        """The one map an isotropic image model has, learned tokens removed."""
        tokens, _ = self.encode(x)
        if tokens.ndim == 4:
            return [tokens]
        h, w = cast(Any, self.stem).grid
        if tokens.shape[1] < h * w:
            raise ValueError(f"tokens were reduced to {tokens.shape[1]}; there is no {h}x{w} map left")
        return [tokens[:, -h * w :].unflatten(1, (h, w))]


def _in_turn(blocks: nn.ModuleList, x: Tensor, mask: Tensor | None, sizes: Tensor | None) -> tuple[Any, Any, Any]:
    for block in blocks:
        if getattr(block, "reduces", False):
            x, mask, sizes = block(x, mask=mask, sizes=sizes)
        else:
            x = block(x) if mask is None else block(x, mask=mask)
    return x, mask, sizes
