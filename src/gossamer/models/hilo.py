"""LITv2: a pyramid without attention where maps are large, with HiLo attention where they are small.

Source: Pan et al. 2022, "Fast Vision Transformers with HiLo Attention"; the pyramid is that of Pan et al. 2021, "Less
is More: Pay Less Attention in Vision Transformers".

- stages 1 and 2 are MLPs with a depth-wise convolution alone, which is also what tells positions; stages 3 and 4 attend
- merging is a deformable 2x2 convolution: each tap reads beside its place, by offsets that start at zero. The authors
  train the layer of the offsets at a hundredth of the rate; here it has the rate of all others
- three forms of one code path. Strict, as released for classification: maps must be even before they are halved.
  `pad=True`: any image, maps padded. `dense=True`, the authors' form for detection and segmentation: any image, the
  last line of an odd map is left to the offsets alone, a norm for each map, no classifier
- the authors' classification code takes square images only; nothing here needs it
"""

from collections.abc import Sequence
from itertools import pairwise
from math import sqrt
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import BatchNorm, Block, Classifier, Conv, LayerNorm
from gossamer.layers.init import init_transformer
from gossamer.layers.mlp import ConvMlp
from gossamer.mixers import create_mixer, options_for
from gossamer.models._pyramids import keep_backbone, small_pyramid, stage_rates, token_grid
from gossamer.models.registry import State, register_system
from gossamer.models.swin import Stem
from gossamer.ops.deform import deform_conv
from gossamer.ops.grid import pad_to_multiple
from gossamer.trunks import Pyramid

Odd = Literal["refuse", "pad", "drop"]


class DeformConv(nn.Conv2d):
    """`y_p = b + sum_t W_t x(stride p + t + offset_{p, t})`, the offsets a convolution of x with the same kernel."""

    def __init__(self, dim: int, out: int, kernel: int, *, stride: int) -> None:
        super().__init__(dim, out, kernel, stride)
        self.offset = Conv(dim, 2 * kernel * kernel, kernel, stride=stride, padding=0)
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j o"]:
        offsets = self.offset(x).unflatten(-1, (-1, 2))
        return deform_conv(x, offsets, self.weight, self.bias, stride=self.stride[0])


class DeformMerging(nn.Module):
    """`y = gelu(norm(deform_conv_2x2(x)))`.

    Args:
        odd: what happens to maps of odd sides: `refuse`, `pad` them with zeros at the end, or `drop` the last line.
    """

    norm_pairs = (("conv", "norm"),)

    def __init__(self, dim: int, out: int, *, odd: Odd) -> None:
        super().__init__()
        self.odd = odd
        self.conv = DeformConv(dim, out, 2, stride=2)
        self.norm = BatchNorm(out)
        self.act = nn.GELU()

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j o"]:
        h, w = x.shape[1:3]
        if self.odd == "refuse" and (h % 2 or w % 2):
            raise ValueError(
                f"maps must be even before they are halved, got {h}x{w}; build with pad=True or dense=True"
            )
        return self.act(self.norm(self.conv(pad_to_multiple(x, (2, 2)) if self.odd == "pad" else x)))


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    found = small_pyramid(spec, size, block=12, step=8, least_patch=2)
    stages = len(found["dims"])
    dim = found["dims"][0]
    settings = {
        "patch": found["patch"],
        "embed_dim": dim,
        "depths": found["depths"],
        "heads": tuple(d // next(w for w in (32, 16, 8) if d % w == 0) for d in found["dims"]),
        "windows": (0, 2, 2, 1)[:stages] if stages > 3 else (0, 2, 1)[3 - stages :],
        "pad": True,
        "init_std": None,
    }
    return "litv2_s", {**settings, **spec}


def _convert(model: Any, state: State) -> State:
    named: State = {}
    for key, value in state.items():
        place = key.split(".")
        if place[0] == "stages" and model.stages[int(place[1])][int(place[2])].mlp is None:
            # A block of one branch: its only norm is the first, its convolution mixes the tokens.
            key = key.replace(".norm2.", ".norm1.").replace(".mlp.", ".mixer.")
        named[key] = value
    return keep_backbone(model, named, "norm.", "head.")


_S: dict[str, Any] = dict(embed_dim=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24))
_M: dict[str, Any] = dict(embed_dim=96, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24))
_B: dict[str, Any] = dict(embed_dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32))


@register_system(
    "hilo",
    tasks=("image-classification",),
    scale=_scale,
    variants={
        "litv2_s": _S,
        "litv2_m": _M,
        "litv2_b": _B,
        "litv2_b_384": {**_B, "img_size": 384},
        # the authors' own names
        "litv2_small": _S,
        "litv2_medium": _M,
        "litv2_base": _B,
        "litv2_base_384": {**_B, "img_size": 384},
    },
    rules=[
        (r"^patch_embed\.", "stem."),
        (r"^layers\.(\d+)\.blocks\.", r"stages.\1."),
        (r"^layers\.(\d+)\.downsample\.dconv\.conv_offset\.", r"merges.\1.conv.offset."),
        (r"^layers\.(\d+)\.downsample\.dconv\.", r"merges.\1.conv."),
        (r"^layers\.(\d+)\.downsample\.norm_layer\.", r"merges.\1.norm."),
        (r"\.attn\.h_", ".mixer.high."),
        (r"\.attn\.l_", ".mixer.low."),
        (r"\.dwconv\.dwconv\.", ".dw."),
        (r"^norm([0-3])\.", r"out_norms.\1."),
        (r"^head\.", "head.fc."),
    ],
    convert=_convert,
)
def hilo(
    *,
    embed_dim: int = 96,
    depths: Sequence[int] = (2, 2, 6, 2),
    heads: Sequence[int] = (3, 6, 12, 24),
    windows: Sequence[int] = (0, 0, 2, 1),
    alpha: float = 0.9,
    patch: int = 4,
    mlp_ratio: float = 4.0,
    drop: float = 0.0,
    drop_path: float = 0.0,
    init_std: float | None = 0.02,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    pad: bool = False,
    dense: bool = False,
    mixer: str = "hilo",
    mixer_options: dict[str, Any] | None = None,
) -> nn.Module:
    """A LITv2.

    Args:
        heads: heads of each stage.
        windows: window side of each stage in tokens; 1 is global attention, 0 no attention.
        alpha: share of the low-frequency heads.
        init_std: deviation of the first weights, None for `fan_in ** -0.5`.
        img_size: only mixers bound to a grid need it.
        pad: take any image, by padding odd maps before they are halved.
        dense: any image, a norm for each map that `features` gives, and no classifier.
        mixer: what stands in for HiLo where there is attention.

    Raises:
        ValueError: `depths`, `heads` and `windows` differ in length.
    """
    if not len(depths) == len(heads) == len(windows):
        raise ValueError(
            f"depths, heads and windows must be of one length, got {tuple(depths)}, {tuple(heads)}, {tuple(windows)}"
        )
    dims = [embed_dim * 2**i for i in range(len(depths))]
    grids = token_grid(img_size, patch, len(depths), up=pad)
    stages = []
    for dim, count, window, grid, rates in zip(
        dims, heads, windows, grids, stage_rates(drop_path, depths), strict=True
    ):
        own = options_for(mixer, {"heads": count, "window": window, "alpha": alpha})
        blocks = []
        for rate in rates:
            mlp = ConvMlp(dim, int(dim * mlp_ratio), drop=drop)
            if window:
                mix = create_mixer(mixer, dim, grid=grid, **{**own, **(mixer_options or {})})
                blocks.append(Block(dim, mix, mlp, norm=LayerNorm, drop_path=rate))
            else:
                blocks.append(Block(dim, mlp, None, norm=LayerNorm, drop_path=rate))
        stages.append(blocks)
    odd: Odd = "drop" if dense else "pad" if pad else "refuse"
    model = Pyramid(
        Stem(in_chans, embed_dim, patch, multiple=None, norm=LayerNorm),
        stages,
        [DeformMerging(dim, out, odd=odd) for dim, out in pairwise(dims)],
        norm=None if dense else LayerNorm(dims[-1]),
        head=nn.Identity() if dense else Classifier(dims[-1], num_classes),
        out_norms=[LayerNorm(dim) for dim in dims] if dense else None,
    )
    init_transformer(model, init_std)
    for module in model.modules():
        if isinstance(module, ConvMlp):
            # Variance 2 / fan_out, the fan of a depth-wise 3x3 kernel.
            nn.init.normal_(module.dw.get_parameter("weight"), std=sqrt(2 / 9))
            nn.init.zeros_(module.dw.get_parameter("bias"))
    return model
