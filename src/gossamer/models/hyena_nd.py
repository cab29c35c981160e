"""Hyena N-D in a vision transformer: long gated convolutions over the map take the place of attention.

Source: Zimerman and Wolf 2023, "Multi-Dimensional Hyena for Spatial Inductive Bias".

- a plain ViT without class token whose blocks mix by Hyena; hybrids have attention in some blocks
- `direction="seq"`: even blocks look back, into the lower orthant, and odd ones the other way round, so that two of
  them see everything
- answers from the mean over tokens and convolves as written in the paper; `official=True` reads the first token and
  divides each long convolution by twice the side, as the authors' code does
- maps need not be square; with `pad=True` any image fits
- the authors released no weights; the variants are the runs of their README and of their counted operators
"""

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gossamer.layers import Block, Classifier, Mlp, PatchEmbed, TokenStem, resize_positions
from gossamer.layers.blocks import drop_path_rates
from gossamer.layers.embed import pair
from gossamer.layers.init import init_transformer
from gossamer.mixers import create_mixer
from gossamer.mixers.hyena import Direction, Kind, Window
from gossamer.models.registry import State, register_system
from gossamer.models.vit import PaddedPatches
from gossamer.trunks import Isotropic

Method = Literal["hyena2d", "hyena2dattn", "attnhyena2d", "onebyone"]


class FirstToken(Classifier):
    """The class scores of a map's first token."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__(dim, num_classes, pool="token")

    def forward(
        self, x: Float[Tensor, "b *grid c"], mask: Bool[Tensor, "b *grid"] | None = None, sizes: Tensor | None = None
    ) -> Float[Tensor, "b k"]:
        return super().forward(x.flatten(1, -2))


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    target, depth, widest = {"xs": (5, 2, 96), "s": (28, 4, 128), "m": (95, 6, 192), "l": (320, 10, 256)}[size]
    height, width = spec["img_size"]
    # Some eight patches a side.
    patch = max(1, round(max(height, width) / 8))
    tokens = -(-height // patch) * -(-width // patch)

    def macs(dim: int) -> int:
        return dim * tokens * (spec["in_chans"] * patch * patch + depth * (12 * dim + 27))

    dim = min(range(32, widest + 1, 16), key=lambda d: abs(macs(d) - target * 1e6))
    pad = bool(height % patch or width % patch)
    options = {"patch": patch, "dim": dim, "depth": depth, "heads": max(1, dim // 32), "pad": pad, "init_std": None}
    return "deit_tiny_hyena2d_seq_joint", {**options, **spec}


def _convert(model: Any, state: State) -> State:
    for key, own in model.state_dict().items():
        if key.endswith((".deltas", ".shift")):
            # One row an axis; the authors have a tensor each.
            state[key] = torch.cat([state[f"{key}.{i}"].flatten(0, -2) for i in range(len(own))])
        elif key in state and state[key].shape != own.shape:
            state[key] = _fitted(model, key, state[key], own)
    # Fixed windows are made, not loaded.
    return {key: value for key, value in state.items() if not key.endswith((".0", ".1"))}


def _fitted(model: Any, key: str, value: Tensor, own: Tensor) -> Tensor:
    if key == "stem.positions":
        side = round(value.shape[1] ** 0.5)
        return resize_positions(value, (side, side), model.stem.grid)
    if key.endswith(".filter.positions"):
        if value.shape[1] != len(own):
            # Almost linear in the place: another length is an interpolation.
            value = F.interpolate(value.mT, len(own), mode="linear", align_corners=True).mT
        return value[0]
    if key.endswith(".filter.kernel"):
        # The authors keep one filter more than there are convolutions.
        return value[: len(own)]
    if key.endswith(".filter.bias") and value.ndim == 2:
        return value.flatten()[: len(own)]
    return value.view(own.shape) if value.numel() == own.numel() else value


_TINY: dict[str, Any] = dict(dim=192, depth=12, heads=3)


@register_system(
    "hyena-nd",
    tasks=("image-classification",),
    scale=_scale,
    variants={
        "deit_tiny_hyena2d_seq_product": dict(filter="product", **_TINY),
        "deit_tiny_hyena2d_seq_joint": dict(filter="joint", **_TINY),
        "deit_tiny_hyena2d_4dir_joint": dict(filter="joint", direction="4dir", **_TINY),
        "deit_tiny_hyena2dattn_seq_joint": dict(filter="joint", method="hyena2dattn", **_TINY),
    },
    rules=[
        (r"\.pos_emb\.t$", None),
        # One vector of frequencies, which the authors' files hold once for each sine.
        (r"\.Yimplicit_filter\.[135]\.freq$", None),
        (r"implicit_filter\.[35]\.freq$", None),
        (r"^pos_embed$", "stem.positions"),
        (r"^patch_embed\.", "stem.embed."),
        (r"\.attn\.filter$", ".mixer.filter.kernel"),
        (r"\.attn\.bias$", ".mixer.filter.bias"),
        (r"\.attn\.", ".mixer."),
        (r"\.linear_mix\.", ".mix."),
        (r"\.short_filter\.", ".short."),
        (r"\.filter_fn\.", ".filter."),
        (r"\.pos_emb\.z$", ".positions"),
        (r"\.X?implicit_filter\.1\.freq$", ".freq"),
        (r"\.X?implicit_filter\.", ".mlps.0."),
        (r"\.Yimplicit_filter\.", ".mlps.1."),
        *((rf"(\.mlps\.\d)\.{2 * i}\.", rf"\1.{i}.") for i in (1, 2, 3)),
        (r"\.Ymodulation\.(deltas|shift)$", r".\1.1"),
        (r"\.X?modulation\.X?(deltas|shift)$", r".\1.0"),
        (r"\.modulation\.Ydeltas$", ".deltas.1"),
        (r"^head\.", "head.fc."),
    ],
    convert=_convert,
)
def hyena_nd(
    *,
    dim: int = 192,
    depth: int = 12,
    heads: int = 3,
    patch: int = 16,
    mlp_ratio: float = 4.0,
    method: Method = "hyena2d",
    filter: Kind = "product",
    direction: Direction = "seq",
    window: Window = "standard",
    sqrt_decay: bool = False,
    order: int = 2,
    hidden: int = 64,
    official: bool = False,
    pad: bool = False,
    drop: float = 0.0,
    drop_path: float = 0.0,
    init_std: float | None = 0.02,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
) -> nn.Module:
    """A vision transformer of Hyena blocks.

    Args:
        heads: of the attention of hybrids.
        method: which blocks mix by Hyena: `hyena2d` all, `hyena2dattn` those up to the middle one, `attnhyena2d` those
            behind it, `onebyone` the even ones; the others attend.
        filter, direction, window, sqrt_decay, order, hidden: of the Hyena operator.
        official: as the authors' code does, see above; square images only.
        pad: fill an image that `patch` does not divide up with zeros.
        init_std: deviation of the first weights, None for `fan_in ** -0.5`.

    Raises:
        ValueError: `patch` does not divide the image and `pad` is False, `official` and the image is not square, or
            no such `method`.
    """
    height, width = pair(img_size)
    if not pad and (height % patch or width % patch):
        raise ValueError(f"patch must divide the image; got patch={patch}, img_size={height}x{width}; or give pad=True")
    if official and height != width:
        raise ValueError(f"official needs square images, got img_size={height}x{width}")
    if method not in ("hyena2d", "hyena2dattn", "attnhyena2d", "onebyone"):
        raise ValueError(f"method must be hyena2d, hyena2dattn, attnhyena2d or onebyone, got {method!r}")
    grid = (-(-height // patch), -(-width // patch))
    options: dict[str, Any] = dict(
        order=order,
        hidden=hidden,
        filter=filter,
        window=window,
        sqrt_decay=sqrt_decay,
        drop=drop,
        scale=0.5 / grid[0] if official else 1.0,
    )
    norm = partial(nn.LayerNorm, eps=1e-6)
    blocks = []
    for i, rate in enumerate(drop_path_rates(drop_path, depth)):
        odd = i % 2 == 1
        behind = i > depth // 2
        if {"hyena2d": True, "hyena2dattn": not behind, "attnhyena2d": behind, "onebyone": not odd}[method]:
            way = "standard" if direction == "seq" and odd else direction
            mix = create_mixer("hyena", dim, grid=grid, direction=way, **options)
        else:
            mix = create_mixer("attention", dim, heads=heads, drop=drop)
        blocks.append(Block(dim, mix, Mlp(dim, int(dim * mlp_ratio), drop=drop), norm=norm, drop_path=rate))
    embed = (PaddedPatches if pad else PatchEmbed)(in_chans, dim, patch)
    model = Isotropic(
        TokenStem(embed, dim, grid, tokens=0, drop=drop, flat=False),
        blocks,
        norm=norm(dim),
        head=(FirstToken if official else Classifier)(dim, num_classes),
    )
    init_transformer(model, init_std)
    return model
