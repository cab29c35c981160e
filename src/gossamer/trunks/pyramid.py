"""Stages of falling resolution and growing width: Swin, MetaFormer, ConvNeXt, EfficientFormer and their kin.

`x_i = stage_i(merge_i(x_{i-1}))`, `x_0 = stage_0(stem(x))`, `head(x_last)`
"""

from collections.abc import Sequence
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from gossamer.trunks.blocking import by_parts
from gossamer.trunks.checkpointing import through


class Pyramid(nn.Module):
    """Stem, then stages of blocks joined by merging.

    Args:
        stem: image `(b, i, height, width)` to map `(b, h, w, c)`.
        stages: for each stage, its blocks.
        merges: what stands before each stage but the first.
        norm: on the last map, or None.
        head: map to answer.
        out_norms: norms of the maps that `features` gives, one a stage, or None for the maps as they are.
    """

    checkpointing = False

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Sequence[nn.Module]],
        merges: Sequence[nn.Module],
        *,
        norm: nn.Module | None,
        head: nn.Module,
        out_norms: Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if len(merges) != len(stages) - 1:
            raise ValueError(f"merges must be one fewer than stages; got {len(merges)} for {len(stages)} stages")
        self.stem = stem
        self.stages = nn.ModuleList(nn.Sequential(*blocks) for blocks in stages)
        self.merges = nn.ModuleList(merges)
        self.norm = norm
        self.head = head
        self.out_norms = nn.ModuleList(out_norms) if out_norms is not None else None

    def _maps(self, image: Tensor) -> list[Tensor]:
        x = through(self, by_parts, cast(nn.Sequential, self.stages[0]), self.stem(image))
        maps = [x]
        for merge, stage in zip(self.merges, self.stages[1:], strict=True):
            x = through(self, by_parts, cast(nn.Sequential, stage), merge(x))
            maps.append(x)
        return maps

    def forward(
        self, image: Float[Tensor, "b i height width"]
    ) -> Float[Tensor, "b ..."] | tuple[Float[Tensor, "b ..."], ...]:
        x = self._maps(image)[-1]
        return self.head(x if self.norm is None else self.norm(x))

    def features(self, image: Float[Tensor, "b i height width"]) -> list[Float[Tensor, "b _h _w _c"]]:
        """One map a stage, finest first."""
        maps = self._maps(image)
        if self.out_norms is None:
            return maps
        return [norm(m) for norm, m in zip(self.out_norms, maps, strict=True)]
