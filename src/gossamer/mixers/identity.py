"""No mixing at all: the control that shows what a block does without any.

Source: Yu et al. 2021, "MetaFormer Is Actually What You Need for Vision", table 5 (identity mapping).
"""

from jaxtyping import Bool, Float
from torch import Tensor

from gossamer.mixers.base import Mixer, register_mixer


@register_mixer("identity", grids=(1, 2, 3), causal=True)
class Identity(Mixer):
    """`y = x`."""

    def __init__(self, dim: int, *, causal: bool = False) -> None:
        super().__init__(dim)

    def forward(
        self, x: Float[Tensor, "b *grid c"], *, mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Float[Tensor, "b *grid c"]:
        return x

    def initial_state(self, batch: int, device=None, dtype=None) -> None:
        return None

    def step(self, x_t: Float[Tensor, "b c"], state: None) -> tuple[Float[Tensor, "b c"], None]:
        return x_t, None
