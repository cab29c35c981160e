"""PVT: a pyramid with global attention in every block, whose keys and values come from a shrunken map.

Source: Wang et al. 2021, "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions";
Wang et al. 2022, "PVTv2: Improved Baselines with Pyramid Vision Transformer" (`v2=True`).

- strides 4, 8, 16, 32; the map is shrunken 8, 4, 2 and 1 times a side before keys and values are made
- v1: patches, learned positions in every stage, a class token in the last. v2: overlapping patches, a depth-wise
  convolution in the MLP, a norm after every stage, no positions, the mean of the last map
- `linear=True` (v2's b2_li): keys and values from a 7x7 map in every stage, cost linear in pixels
- any image from 32 pixels a side (v1; tables are resized bilinearly, rows that fill no patch are left out) or of any
  size (v2, whose maps are rounded up; the authors' code fails where a map is smaller than a reduction cell)
- the authors resize their tables wherever a stage's token number differs from that of stage 1, and not where it does
  not; the former is the identity at the size built for, the latter a defect that is not followed
- `dense=True`, the authors' form for detection: no class token, no classifier, in v1 no norm either
- the mixer of each stage and the norm are exchangeable: SLAB and EcoFormer are this builder with other parts
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import Block, Classifier, ConvNorm, GridPositions, LayerNorm, Mlp, PatchEmbed, resize_positions
from gossamer.layers.init import init_transformer
from gossamer.layers.mlp import ConvMlp
from gossamer.layers.positions import table_layout
from gossamer.mixers import create_mixer, options_for
from gossamer.models._pyramids import small_pyramid, stage_rates, token_grid
from gossamer.models.registry import State, register_system
from gossamer.trunks import Pyramid

# Mixers that read a map and a sequence alike, so that a class token can stand in front.
SEQUENCES = ("spatial_reduction", "attention")


class Stem(PatchEmbed):
    """Patches, of an image with the right channels and large enough for every stage."""

    def __init__(
        self, in_chans: int, dim: int, patch: int, *, overlap: bool, least: int, norm: Callable[[int], nn.Module]
    ) -> None:
        kernel = _overlapping(patch) if overlap else patch
        super().__init__(in_chans, dim, kernel, stride=patch, padding=kernel // 2 if overlap else 0, norm=norm)
        self.least = least

    def forward(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b h w c"]:
        chans, height, width = image.shape[1:]
        if chans != self.proj.in_channels:
            raise ValueError(f"image must have {self.proj.in_channels} channels (in_chans), got {chans}")
        if min(height, width) < self.least:
            raise ValueError(f"image sides must be at least {self.least} pixels, got {height}x{width}")
        return super().forward(image)


class Positions(GridPositions):
    """Learned positions, for another map resized bilinearly: `y = x + P`."""

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        old, new = tuple(self.table.shape[1:3]), tuple(x.shape[1:3])
        if old == new:
            return x + self.table
        return x + resize_positions(self.table.flatten(1, 2), old, new, mode="bilinear").unflatten(1, new)


class ClassToken(nn.Module):
    """`y = [t + p; x]`: the map as a sequence, a learned token and its position in front."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.zeros(1, 1, dim))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b n c"]:
        token = (self.token + self.position).expand(x.shape[0], -1, -1)
        return torch.cat((token, x.flatten(1, 2)), 1)


class TokenPyramid(Pyramid):
    """A pyramid whose last stage has a class token; its last map is given without."""

    def features(self, image: Float[Tensor, "b i height width"]) -> list[Float[Tensor, "b _h _w _c"]]:
        *maps, last = self._maps(image)
        h, w = (side // 2 for side in maps[-1].shape[1:3])
        return [*maps, last[:, 1:].unflatten(1, (h, w))]


def _overlapping(stride: int) -> int:
    """Side of patches that overlap: 7 at stride 4 and 3 at stride 2."""
    return max(3, 2 * stride - 1)


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    found = small_pyramid(spec, size, block=15, step=16, least_patch=2)
    stages = len(found["dims"])
    grids = token_grid(spec["img_size"], found["patch"], stages, up=True)
    settings = {
        "patch": found["patch"],
        "dims": found["dims"],
        "depths": found["depths"],
        "heads": tuple(d // 16 if d % 32 else d // 32 for d in found["dims"]),
        "mlp_ratios": (4,) * stages,
        # About seven keys a side, as in the last stage of the published sizes.
        "ratios": tuple(max(1, min(grid) // 7) for grid in grids),
        "init_std": None,
    }
    return "pvt_v2_b0", {**settings, **spec}


def convert(model: Any, state: State) -> State:
    """Norms of stages to their place, position tables to the model's grids, the class token and its position apart."""
    state = dict(state)
    dense = isinstance(model.head, nn.Identity)
    for key in list(state):
        name, _, rest = key.partition(".")
        if name.startswith("stage_norm"):
            i = int(name[-1]) - 1
            state[f"stages.{i}.{len(model.stages[i]) - 1}.{rest}"] = state.pop(key)
        elif dense and name in ("norm", "head", "cls_token"):
            del state[key]
    own = model.state_dict()
    last = len(model.stages)
    for i in range(1, last + 1):
        table = state.pop(f"pos_embed{i}", None)
        if table is None:
            continue
        place = "stem.1" if i == 1 else f"merges.{i - 2}.1"
        new = tuple(own[f"{place}.table"].shape[1:3])
        slot, old = table_layout(table.shape[1], new)
        if slot and f"merges.{last - 2}.2.token" in own:
            state[f"merges.{last - 2}.2.position"] = table[:, :1]
        state[f"{place}.table"] = resize_positions(table[:, slot:], old, new, mode="bilinear").unflatten(1, new)
    if "cls_token" in state:
        state[f"merges.{last - 2}.2.token"] = state.pop("cls_token")
    return state


RULES: list[tuple[str, str | None]] = [
    (r"^patch_embed1\.", "stem.0."),
    *((rf"^patch_embed{i}\.proj\.", f"merges.{i - 2}.0.conv.") for i in (2, 3, 4)),
    *((rf"^patch_embed{i}\.norm\.", f"merges.{i - 2}.0.norm.") for i in (2, 3, 4)),
    *((rf"^block{i}\.", f"stages.{i - 1}.") for i in (1, 2, 3, 4)),
    (r"^norm([1-4])\.", r"stage_norm\1."),
    (r"\.attn\.sr\.", ".mixer.conv."),
    (r"\.attn\.", ".mixer."),
    (r"\.dwconv\.dwconv\.", ".dw."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]

_TINY: dict[str, Any] = dict(depths=(2, 2, 2, 2))
_SMALL: dict[str, Any] = dict(depths=(3, 4, 6, 3))
_MEDIUM: dict[str, Any] = dict(depths=(3, 4, 18, 3))
_LARGE: dict[str, Any] = dict(depths=(3, 8, 27, 3))
_V2: dict[str, Any] = dict(v2=True)


@register_system(
    "pvt",
    tasks=("image-classification",),
    scale=_scale,
    variants={
        "pvt_tiny": _TINY,
        "pvt_small": _SMALL,
        "pvt_medium": _MEDIUM,
        "pvt_large": _LARGE,
        # Of v1, whatever its name says.
        "pvt_huge_v2": dict(depths=(3, 10, 60, 3), dims=(128, 256, 512, 768), heads=(2, 4, 8, 12)),
        "pvt_v2_b0": {**_V2, **_TINY, "dims": (32, 64, 160, 256)},
        "pvt_v2_b1": {**_V2, **_TINY},
        "pvt_v2_b2": {**_V2, **_SMALL},
        "pvt_v2_b2_li": {**_V2, **_SMALL, "linear": True},
        "pvt_v2_b3": {**_V2, **_MEDIUM},
        "pvt_v2_b4": {**_V2, **_LARGE},
        "pvt_v2_b5": {**_V2, "depths": (3, 6, 40, 3), "mlp_ratios": (4, 4, 4, 4)},
    },
    rules=RULES,
    convert=convert,
)
def pvt(
    *,
    dims: Sequence[int] = (64, 128, 320, 512),
    depths: Sequence[int] = (3, 4, 6, 3),
    heads: Sequence[int] = (1, 2, 5, 8),
    mlp_ratios: Sequence[int] = (8, 8, 4, 4),
    ratios: Sequence[int] = (8, 4, 2, 1),
    patch: int = 4,
    v2: bool = False,
    linear: bool = False,
    token: bool = True,
    drop_path: float = 0.0,
    init_std: float | None = 0.02,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    dense: bool = False,
    norm: Callable[[int], nn.Module] | None = None,
    mixer: str | Sequence[str] = "spatial_reduction",
    mixer_options: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
) -> nn.Module:
    """A Pyramid Vision Transformer.

    Args:
        dims: channels of each stage; `depths`, `heads` and `mlp_ratios` likewise.
        ratios: how many times a side the map of keys and values is smaller, for each stage.
        v2: the second version, see the head of this file.
        linear: keys and values from a 7x7 map, and a ReLU before the MLP's convolution.
        token: read the answer from a class token in the last stage; False, and v2, from the mean of its map.
        init_std: deviation of the first weights, None for `fan_in ** -0.5`.
        dense: no class token, no classifier.
        norm: factory of every norm of the trunk, `LayerNorm` by default.
        mixer: one name, or one a stage.
        mixer_options: its keywords, or those of each stage.

    Raises:
        ValueError: settings differ in length, a class token is wanted of a mixer for maps alone, or the image is too
            small.
    """
    stages = len(dims)
    names = [mixer] * stages if isinstance(mixer, str) else list(mixer)
    if isinstance(mixer_options, dict) or mixer_options is None:
        mixer_options = [mixer_options or {}] * stages
    lengths = {len(v) for v in (dims, depths, heads, mlp_ratios, ratios, names, mixer_options)}
    if lengths != {stages}:
        raise ValueError(
            "dims, depths, heads, mlp_ratios, ratios and mixers must be of one length, got "
            f"{tuple(len(v) for v in (dims, depths, heads, mlp_ratios, ratios, names))}"
        )
    token = token and not v2 and not dense and stages > 1
    if token and names[-1] not in SEQUENCES:
        raise ValueError(
            f"a class token wants a mixer of {SEQUENCES} in the last stage, got {names[-1]!r}; token=False"
        )
    grids = token_grid(img_size, patch, stages, up=v2)
    if not all(grids[-1]):
        raise ValueError(f"image sides must be at least {patch * 2 ** (stages - 1)} pixels, got img_size={img_size}")
    trunk_norm = norm or partial(nn.LayerNorm, eps=1e-6)
    patch_norm = norm or LayerNorm
    least = 1 if v2 else patch * 2 ** (stages - 1)
    kernel, padding = (3, 1) if v2 else (2, 0)
    befores: list[nn.Module] = [Stem(in_chans, dims[0], patch, overlap=v2, least=least, norm=patch_norm)]
    for dim, out in pairwise(dims):
        befores.append(ConvNorm(dim, out, kernel, stride=2, padding=padding, norm=patch_norm))
    if not v2:
        befores = [nn.Sequential(b, Positions(d, grid)) for b, d, grid in zip(befores, dims, grids, strict=True)]
        if token:
            befores[-1].append(ClassToken(dims[-1]))  # type: ignore[operator]
    else:
        befores = [nn.Sequential(b) for b in befores]
    parts: list[list[nn.Module]] = []
    for i, rates in enumerate(stage_rates(drop_path, depths)):
        dim, grid = dims[i], grids[i]
        reduce = "adaptive" if linear else "conv"
        flat = token and i == stages - 1
        offered = {"heads": heads[i], "ratio": ratios[i], "reduce": reduce}
        options = {**options_for(names[i], offered), **mixer_options[i]}
        blocks: list[nn.Module] = []
        for rate in rates:
            mix = create_mixer(names[i], dim, grid=None if flat else grid, **options)
            hidden = int(dim * mlp_ratios[i])
            mlp = ConvMlp(dim, hidden, before=nn.ReLU if linear else None) if v2 else Mlp(dim, hidden)
            blocks.append(Block(dim, mix, mlp, norm=trunk_norm, drop_path=rate))
        parts.append([*blocks, trunk_norm(dim)] if v2 else blocks)
    head = nn.Identity() if dense else Classifier(dims[-1], num_classes, pool="token" if token else "mean")
    trunk = TokenPyramid if token else Pyramid
    model = trunk(befores[0], parts, befores[1:], norm=None if v2 or dense else trunk_norm(dims[-1]), head=head)
    _init(model, init_std, convolutions=v2)
    return model


def _init(model: nn.Module, std: float | None, *, convolutions: bool) -> None:
    init_transformer(model, std)
    for module in model.modules():
        if isinstance(module, Positions):
            nn.init.trunc_normal_(module.table, std=0.02)
        elif isinstance(module, ClassToken):
            nn.init.trunc_normal_(module.token, std=0.02)
            nn.init.trunc_normal_(module.position, std=0.02)
        elif convolutions and isinstance(module, nn.Conv2d):
            fan_out = prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
