"""S2AFormer, reconstructed: a convolution for what is near, strip self-attention for what is far, in every block.

Source: Xu et al. 2025, "S2AFormer: Strip Self-Attention for Efficient Vision Transformer".

- a reconstruction: no code was published and no full text could be read. The block follows the abstract; widths,
  depths and ratios were fitted to the published parameters and multiply-adds, which they meet within 1 %. The
  published accuracies are not claimed
- the published multiply-adds grow by 1.31 from 224 to 256 pixels, these by 1.31 to 1.33: the authors' attention may be
  cheaper still
- batch norms fold away for deployment (`gossamer.layers.fold.fold_batch_norm`), but for those in front of an attention
  with a shrunken map
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import BatchNorm, Block, Classifier, ConvNorm, GroupNorm1, Mlp
from gossamer.layers.init import init_transformer
from gossamer.layers.stem import ConvStem
from gossamer.mixers.strip_attention import StripAttention
from gossamer.models._pyramids import BUDGETS, small_pyramid, stage_rates
from gossamer.models.registry import register_system
from gossamer.trunks import Pyramid


class Local(nn.Module):
    """`y = x + W gelu(norm(D x))`, D a depth-wise 3x3 convolution (LIM)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.near = ConvNorm(dim, dim, 3, groups=dim, act=nn.GELU)
        self.fc = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        return x + self.fc(self.near(x))


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    found = small_pyramid(spec, size, block=9, step=8, least_patch=2)
    patch, depths = found["patch"], found["depths"]
    tokens = -(-spec["img_size"][0] // patch) * -(-spec["img_size"][1] // patch)
    twos = patch.bit_length() - 1
    # A block costs 8 to 9 c^2 a token, a merge 4.5, a stem convolution behind the first 9 to 36.
    stem = sum(9 * 4**i for i in range(max(0, twos - 1)))
    cost = tokens * (8.7 * sum(depths) + 4.5 * (len(depths) - 1) + stem)
    first = min(range(8, 257, 4), key=lambda dim: abs(cost * dim * dim - BUDGETS[size]))
    settings = {
        "dims": tuple(first * 2**i for i in range(len(depths))),
        "depths": depths,
        "heads": (1, 2, 4, 8)[: len(depths)] if first < 32 else (2, 4, 8, 16)[: len(depths)],
        "ratios": (8, 4, 2, 1)[-len(depths) :],
        "mlp_ratio": 3,
        "stem_widths": (first,) * max(1, twos),
        "stem_strides": (2,) * twos or (1,),
        "init_std": None,
    }
    return "s2aformer_mini", {**settings, **spec}


@register_system(
    "s2aformer",
    tasks=("image-classification",),
    scale=_scale,
    variants={
        "s2aformer_mini": dict(dims=(32, 64, 96, 448), depths=(2, 2, 4, 2), mlp_ratio=3),
        "s2aformer_t": dict(dims=(32, 64, 128, 384), depths=(2, 2, 8, 2)),
        "s2aformer_xs": dict(dims=(40, 80, 128, 416), depths=(2, 2, 8, 2)),
        "s2aformer_s": dict(dims=(72, 108, 144, 576), depths=(2, 2, 6, 2)),
        "s2aformer_m": dict(dims=(80, 160, 352, 512), depths=(2, 3, 9, 3)),
    },
)
def s2aformer(
    *,
    dims: Sequence[int] = (32, 64, 128, 384),
    depths: Sequence[int] = (2, 2, 8, 2),
    heads: Sequence[int] = (1, 2, 4, 8),
    ratios: Sequence[int] = (8, 4, 2, 1),
    qk_dim: int = 1,
    mlp_ratio: float = 4.0,
    norm: Literal["batch", "group"] = "batch",
    stem_widths: Sequence[int] | None = None,
    stem_strides: Sequence[int] = (2, 2),
    drop: float = 0.0,
    drop_path: float = 0.0,
    init_std: float | None = 0.02,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
) -> nn.Module:
    """A reconstruction of S2AFormer.

    Args:
        heads, ratios: heads of each stage's attention, and side of the cells that become one key each.
        qk_dim: channels of a head's queries and keys.
        norm: in front of the branches: over the batch, or over each sample as one group.
        stem_widths, stem_strides: channels and steps of the stem's convolutions; half and all of `dims[0]` by default.
        init_std: deviation of the first weights of linear layers, None for `fan_in ** -0.5`.
        img_size: not needed; the model takes any image.

    Raises:
        ValueError: lists differ in length, or heads do not divide the channels.
    """
    if not len(dims) == len(depths) == len(heads) == len(ratios):
        raise ValueError(
            f"dims, depths, heads and ratios must be of one length, got {tuple(dims)}, {tuple(depths)}, "
            f"{tuple(heads)} and {tuple(ratios)}"
        )
    kind = {"batch": BatchNorm, "group": GroupNorm1}[norm]
    stages = []
    for dim, count, ratio, rates in zip(dims, heads, ratios, stage_rates(drop_path, depths), strict=True):
        blocks: list[nn.Module] = []
        for rate in rates:
            mix = StripAttention(dim, heads=count, ratio=ratio, qk_dim=qk_dim)
            mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
            blocks += [Local(dim), Block(dim, mix, mlp, norm=kind, drop_path=rate)]
        stages.append(blocks)
    model = Pyramid(
        ConvStem(in_chans, stem_widths or (dims[0] // 2, dims[0]), stem_strides, act=nn.GELU),
        stages,
        [ConvNorm(dim, out, 3, stride=2) for dim, out in pairwise(dims)],
        norm=None,
        head=Classifier(dims[-1], num_classes),
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    init_transformer(model, init_std)
    return model
