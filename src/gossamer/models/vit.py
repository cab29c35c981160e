"""ViT and DeiT: the plain vision transformer, the baseline every vision claim is held against.

Source: Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words"; Touvron et al. 2020, "Training data-efficient image
transformers" (DeiT); Touvron et al. 2022, "DeiT III" (LayerScale, position table without a class row).

- pre-norm blocks, class token, learned positions; a distilled DeiT has a second token and head, averaged in eval mode
- any registered mixer can take attention's place; one that works on maps keeps the map and pools its mean
- names and layout of official weights are timm's, which are the authors' own
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import Block, Classifier, Mlp, PatchEmbed, TokenStem, resize_positions
from gossamer.layers.blocks import drop_path_rates
from gossamer.layers.distilled import DistilledClassifier
from gossamer.layers.embed import pair
from gossamer.layers.init import init_transformer
from gossamer.mixers import create_mixer, options_for
from gossamer.models.registry import State, register_system
from gossamer.trunks import Isotropic


class PaddedPatches(PatchEmbed):
    """Patches of an image that is first filled up with zeros, below and to the right, to whole patches."""

    def forward(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b h w c"]:
        patch = self.proj.kernel_size[0]
        return super().forward(F.pad(image, (0, -image.shape[3] % patch, 0, -image.shape[2] % patch)))


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    target, depth, widest = {"xs": (5, 2, 96), "s": (28, 4, 128), "m": (95, 6, 192), "l": (320, 10, 256)}[size]
    height, width = spec["img_size"]
    # Some eight patches a side.
    patch = max(1, round(max(height, width) / 8))
    tokens = -(-height // patch) * -(-width // patch) + 1

    def macs(dim: int) -> int:
        pixels = spec["in_chans"] * patch * patch * (tokens - 1)
        return dim * (pixels + depth * tokens * (12 * dim + 2 * tokens))

    dim = min(range(32, widest + 1, 32), key=lambda d: abs(macs(d) - target * 1e6))
    pad = bool(height % patch or width % patch)
    return "vit_tiny_patch16_224", {"patch": patch, "dim": dim, "depth": depth, "heads": dim // 32, "pad": pad, **spec}


def _convert(model: Any, state: State) -> State:
    table = state.get("stem.positions")
    if table is not None and table.shape != model.stem.positions.shape:
        prefix = model.stem.tokens.shape[1] if model.stem.position_tokens else 0
        side = round((table.shape[1] - prefix) ** 0.5)
        state["stem.positions"] = resize_positions(table, (side, side), model.stem.grid, prefix=prefix)
    tokens = [state.pop(k) for k in ("stem.cls_token", "stem.dist_token", "stem.reg_token") if k in state]
    if tokens:
        state["stem.tokens"] = torch.cat(tokens, 1)
    return state


_TINY: dict[str, Any] = dict(dim=192, depth=12, heads=3)
_SMALL: dict[str, Any] = dict(dim=384, depth=12, heads=6)
_MEDIUM: dict[str, Any] = dict(dim=512, depth=12, heads=8)
_BASE: dict[str, Any] = dict(dim=768, depth=12, heads=12)
_LARGE: dict[str, Any] = dict(dim=1024, depth=24, heads=16)
_HUGE: dict[str, Any] = dict(dim=1280, depth=32, heads=16, patch=14)
_DEIT3: dict[str, Any] = dict(layer_scale=1e-6, position_tokens=False)


@register_system(
    "deit",
    tasks=("image-classification",),
    scale=_scale,
    variants={
        "vit_tiny_patch16_224": _TINY,
        "vit_small_patch16_224": _SMALL,
        "vit_small_patch32_224": {**_SMALL, "patch": 32},
        "vit_base_patch8_224": {**_BASE, "patch": 8},
        "vit_base_patch16_224": _BASE,
        "vit_base_patch16_384": {**_BASE, "img_size": 384},
        "vit_base_patch32_224": {**_BASE, "patch": 32},
        "vit_large_patch16_224": _LARGE,
        # Released without a classifier.
        "vit_huge_patch14_224": {**_HUGE, "num_classes": 0},
        "deit_tiny_patch16_224": _TINY,
        "deit_small_patch16_224": _SMALL,
        "deit_base_patch16_224": _BASE,
        "deit_base_patch16_384": {**_BASE, "img_size": 384},
        "deit_tiny_distilled_patch16_224": {**_TINY, "distilled": True},
        "deit_small_distilled_patch16_224": {**_SMALL, "distilled": True},
        "deit_base_distilled_patch16_224": {**_BASE, "distilled": True},
        "deit_base_distilled_patch16_384": {**_BASE, "distilled": True, "img_size": 384},
        "deit3_small_patch16_224": {**_SMALL, **_DEIT3},
        "deit3_small_patch16_384": {**_SMALL, **_DEIT3, "img_size": 384},
        "deit3_medium_patch16_224": {**_MEDIUM, **_DEIT3},
        "deit3_base_patch16_224": {**_BASE, **_DEIT3},
        "deit3_base_patch16_384": {**_BASE, **_DEIT3, "img_size": 384},
        "deit3_large_patch16_224": {**_LARGE, **_DEIT3},
        "deit3_large_patch16_384": {**_LARGE, **_DEIT3, "img_size": 384},
        "deit3_huge_patch14_224": {**_HUGE, **_DEIT3},
    },
    rules=[
        (r"^patch_embed\.proj\.", "stem.embed.proj."),
        (r"^(cls_token|dist_token|reg_token)$", r"stem.\1"),
        (r"^pos_embed$", "stem.positions"),
        (r"\.attn\.", ".mixer."),
        (r"\.ls([12])\.gamma$", r".scale\1"),
        (r"\.gamma_([12])$", r".scale\1"),
        (r"^head_dist\.", "head.distilled."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ],
    convert=_convert,
)
def vit(
    *,
    dim: int = 192,
    depth: int = 12,
    heads: int = 3,
    patch: int = 16,
    mlp_ratio: float = 4.0,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    distilled: bool = False,
    registers: int = 0,
    pad: bool = False,
    layer_scale: float | None = None,
    position_tokens: bool = True,
    drop: float = 0.0,
    drop_path: float = 0.0,
    eps: float = 1e-6,
    norm: Callable[[int], nn.Module] | None = None,
    mixer: str | Sequence[str] = "attention",
    mixer_options: dict[str, Any] | None = None,
) -> nn.Module:
    """A plain vision transformer.

    Args:
        registers: learned tokens behind the class token that no head reads.
        pad: fill an image that `patch` does not divide up with zeros.
        norm: factory of every norm, `LayerNorm` with `eps` by default.
        mixer: name of the mixer, or one name a layer for a hybrid.
        mixer_options: its keywords; `heads` is given to mixers that take it.

    Raises:
        ValueError: `patch` does not divide the image and `pad` is False, or a mixer list is not `depth` long.
    """
    height, width = pair(img_size)
    if not pad and (height % patch or width % patch):
        raise ValueError(f"patch must divide the image; got patch={patch}, img_size={height}x{width}; or give pad=True")
    names = [mixer] * depth if isinstance(mixer, str) else list(mixer)
    if len(names) != depth:
        raise ValueError(f"mixer must be one name or {depth} names (depth), got {len(names)}")
    grid = (-(-height // patch), -(-width // patch))
    # Plain attention reads a sequence with its class token; any other mixer is given the map.
    flat = all(name == "attention" for name in names)
    tokens = (1 + distilled + registers) if flat else 0
    stem = TokenStem(
        (PaddedPatches if pad else PatchEmbed)(in_chans, dim, patch),
        dim,
        grid,
        tokens=tokens,
        position_tokens=position_tokens,
        drop=drop,
        flat=flat,
    )
    norm = norm or partial(nn.LayerNorm, eps=eps)
    blocks = []
    for name, rate in zip(names, drop_path_rates(drop_path, depth), strict=True):
        options = {**options_for(name, {"heads": heads}), **(mixer_options or {})}
        mix = create_mixer(name, dim, grid=None if flat else grid, **options)
        mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        blocks.append(Block(dim, mix, mlp, norm=norm, layer_scale=layer_scale, drop_path=rate))
    if distilled:
        head: nn.Module = DistilledClassifier(dim, num_classes, pool="token")
    else:
        head = Classifier(dim, num_classes, pool="token" if flat else "mean")
    model = Isotropic(stem, blocks, norm=norm(dim), head=head)
    init_transformer(model)
    return model
