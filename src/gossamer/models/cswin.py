"""CSWin Transformer: a pyramid whose heads attend inside vertical and horizontal stripes, wider from stage to stage.

Source: Dong et al. 2021, "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows".

- stripes 1, 2 and 7 tokens wide (12 for 7 at 384 pixels), the last stage attends over the whole map
- overlapping convolutions embed and merge; strides 4, 8, 16, 32; positions come from a convolution of the values
- three forms of one code path. Strict, as released for classification: stripes must divide the maps, and a stage whose
  map is as large as its stripe attends over all of it. `pad=True`: the same for any image. `dense=True`, the authors'
  form for segmentation: any image, only the last stage attends over the whole map, a norm for each map, no classifier
- nothing is bound to a size, so weights of 224 pixels load at any other
- the MACs printed for cswin_l (31.5 G, and 96.8 G at 384 pixels) are those of 30 blocks in the third stage; with the 32
  of the released weights, and of the 173 M parameters, there are 33.1 G and 101.8 G
- the authors' dense class doubles widths with heads, so it has no cswin_l (whose heads stay at 24); here it has
"""

from collections.abc import Sequence
from itertools import pairwise
from math import lcm
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import Block, Classifier, ConvNorm, LayerNorm, Mlp, PatchEmbed
from gossamer.layers.embed import pair
from gossamer.layers.init import init_transformer
from gossamer.mixers import create_mixer
from gossamer.models._pyramids import keep_backbone, small_pyramid, stage_rates
from gossamer.models.registry import State, register_system
from gossamer.trunks import Pyramid


class Stem(PatchEmbed):
    """Overlapping patches: a convolution nearly twice as wide as its step.

    Args:
        multiple: what image sides must be a multiple of, None for any.
    """

    def __init__(self, in_chans: int, dim: int, patch: int, *, multiple: int | None) -> None:
        super().__init__(in_chans, dim, 2 * patch - 1, stride=patch, padding=patch // 2, norm=LayerNorm)
        self.multiple = multiple

    def forward(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b h w c"]:
        if self.multiple is not None:
            _refuse_misfit((image.shape[2], image.shape[3]), self.multiple)
        return super().forward(image)


def _refuse_misfit(size: tuple[int, int], multiple: int) -> None:
    if size[0] % multiple or size[1] % multiple:
        raise ValueError(
            f"image sides must be a multiple of {multiple} (merging and stripes), got {size[0]}x{size[1]}; "
            "build with pad=True or dense=True for any size"
        )


def _grids(img_size: int | tuple[int, int], patch: int, stages: int) -> list[tuple[int, int]]:
    h, w = ((side + 2 * (patch // 2) - 2 * patch + 1) // patch + 1 for side in pair(img_size))
    return [(-(-h // 2**i), -(-w // 2**i)) for i in range(stages)]


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    found = small_pyramid(spec, size, block=14, step=16, least_patch=2)
    grids = _grids(spec["img_size"], found["patch"], len(found["dims"]))
    settings = {
        "patch": found["patch"],
        "embed_dim": found["dims"][0],
        "depths": found["depths"],
        "heads": tuple(_even_heads(dim) for dim in found["dims"]),
        "stripes": tuple(max(1, min(grid) // 7) for grid in grids),
        "pad": True,
        "init_std": None,
    }
    return "cswin_t", {**settings, **spec}


def _even_heads(dim: int) -> int:
    """As many heads, two at least, as are 16 channels wide or more."""
    return 2 * max(n for n in range(1, max(1, dim // 32) + 1) if dim // 2 % n == 0)


def _convert(model: Any, state: State) -> State:
    return keep_backbone(model, state, "norm.", "head.")


_T: dict[str, Any] = dict(embed_dim=64, depths=(1, 2, 21, 1), heads=(2, 4, 8, 16))
_S: dict[str, Any] = dict(embed_dim=64, depths=(2, 4, 32, 2), heads=(2, 4, 8, 16))
_B: dict[str, Any] = dict(embed_dim=96, depths=(2, 4, 32, 2), heads=(4, 8, 16, 32))
_L: dict[str, Any] = dict(embed_dim=144, depths=(2, 4, 32, 2), heads=(6, 12, 24, 24))
_384: dict[str, Any] = dict(img_size=384, stripes=(1, 2, 12, 12))


@register_system(
    "cswin",
    tasks=("image-classification",),
    scale=_scale,
    variants={
        "cswin_t": _T,
        "cswin_s": _S,
        "cswin_b": _B,
        "cswin_l": _L,
        "cswin_b_384": {**_B, **_384},
        "cswin_l_384": {**_L, **_384},
        # the authors' own names
        "CSWin_64_12211_tiny_224": _T,
        "CSWin_64_24322_small_224": _S,
        "CSWin_96_24322_base_224": _B,
        "CSWin_144_24322_large_224": _L,
        "CSWin_96_24322_base_384": {**_B, **_384},
        "CSWin_144_24322_large_384": {**_L, **_384},
    },
    rules=[
        (r"^stage1_conv_embed\.0\.", "stem.proj."),
        (r"^stage1_conv_embed\.2\.", "stem.norm."),
        *((rf"^stage{i + 1}\.", f"stages.{i}.") for i in range(4)),
        *((rf"^merge{i + 1}\.", f"merges.{i}.") for i in range(3)),
        *((rf"^norm{i + 1}\.", f"out_norms.{i}.") for i in range(4)),
        (r"^(stages\.\d+\.\d+)\.(qkv|proj)\.", r"\1.mixer.\2."),
        (r"\.attns\.(\d)\.get_v\.", r".mixer.lepe.\1."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ],
    convert=_convert,
)
def cswin(
    *,
    embed_dim: int = 64,
    depths: Sequence[int] = (1, 2, 21, 1),
    heads: Sequence[int] = (2, 4, 8, 16),
    stripes: Sequence[int] = (1, 2, 7, 7),
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
) -> nn.Module:
    """A CSWin Transformer.

    Args:
        heads: heads of each stage, even where it has stripes.
        stripes: width of each stage's stripes in tokens; the last stage has none, whatever its entry says.
        init_std: deviation of the linear layers' first weights, None for `fan_in ** -0.5`.
        pad: take any image, by padding maps to whole stripes.
        dense: any image, a norm for each map that `features` gives, and no classifier.

    Raises:
        ValueError: `depths`, `heads` and `stripes` differ in length, heads are odd, or the image does not fit without
            `pad` or `dense`.
    """
    if not len(depths) == len(heads) == len(stripes):
        raise ValueError(
            f"depths, heads and stripes must be of one length, got {tuple(depths)}, {tuple(heads)} and {tuple(stripes)}"
        )
    stages, dims = len(depths), [embed_dim * 2**i for i in range(len(depths))]
    grids = _grids(img_size, patch, stages)
    widths: list[int | None] = [
        None if i == stages - 1 or (not dense and grid == (stripe, stripe)) else stripe
        for i, (grid, stripe) in enumerate(zip(grids, stripes, strict=True))
    ]
    multiple = None
    if not (pad or dense):
        strides = [patch * 2**i for i in range(stages)]
        multiple = lcm(strides[-1], *(s * width for s, width in zip(strides, widths, strict=True) if width))
        _refuse_misfit(pair(img_size), multiple)
    model = Pyramid(
        Stem(in_chans, embed_dim, patch, multiple=multiple),
        [
            [
                Block(
                    dim,
                    create_mixer("cross_shaped", dim, heads=count, stripe=width),
                    Mlp(dim, int(dim * mlp_ratio), drop=drop),
                    norm=LayerNorm,
                    drop_path=rate,
                )
                for rate in rates
            ]
            for dim, count, width, rates in zip(dims, heads, widths, stage_rates(drop_path, depths), strict=True)
        ],
        [ConvNorm(dim, out, 3, stride=2, norm=LayerNorm) for dim, out in pairwise(dims)],
        norm=None if dense else LayerNorm(dims[-1]),
        head=nn.Identity() if dense else Classifier(dims[-1], num_classes),
        out_norms=[LayerNorm(dim) for dim in dims] if dense else None,
    )
    init_transformer(model, init_std)
    return model
