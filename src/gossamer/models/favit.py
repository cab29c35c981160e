"""FaViT: a pyramid of overlapping patches whose attention has few keys of three grains.

Source: Qin et al. 2023, "Factorization Vision Transformer: Modeling Long Range Dependency with Local Window Cost"; the
pyramid is that of Wang et al. 2021, "PVTv2: Improved Baselines with Pyramid Vision Transformer".

- no class token and no positions but those that the convolution in the MLP tells; a norm at the end of every stage
- written from the description of the method; its outputs are those of the authors' code, which has no licence
- `pool="official"` averages keys as the released weights know it; see `gossamer.mixers.factorized`
- of maps of 16x16 tokens its attention learns as much as spatial reduction (PVT) of the same cost; of maps of 8x8,
  which its tiles hardly divide, less
- any image: maps too small for reflection are padded by their border, where the authors' code stops
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from math import log, sqrt
from typing import Any

from torch import nn

from gossamer.layers import Block, Classifier, ConvNorm, LayerNorm, PatchEmbed
from gossamer.layers.init import init_transformer
from gossamer.layers.mlp import ConvMlp
from gossamer.mixers import create_mixer, options_for
from gossamer.models._pyramids import BUDGETS, small_pyramid, stage_rates, token_grid
from gossamer.models.registry import State, register_system
from gossamer.trunks import Pyramid


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    found = small_pyramid(spec, size, block=13, step=16, least_patch=2)
    depths, patch, budget = found["depths"], found["patch"], BUDGETS[size]
    # The groups want multiples of 16 channels, a coarse step; the ratio of the MLPs is set with it.
    widths = [(dim, ratio) for dim in range(16, 257, 16) for ratio in (4, 8, 2)]
    while True:
        macs = {pair: _macs(spec, patch, depths, *pair) for pair in widths}
        dim, ratio = min(widths, key=lambda pair: abs(log(macs[pair] / budget)))
        if macs[dim, ratio] < 1.6 * budget:
            break
        patch *= 2
    dims = tuple(dim * 2**i for i in range(len(depths)))
    settings = {
        "patch": patch,
        "dims": dims,
        "depths": depths,
        # The tiled groups have 7 / 16 of the channels: heads of 14 or 28.
        "heads": tuple(d // 32 if d % 32 == 0 and d >= 128 else 1 for d in dims),
        "reductions": (8, 4, 2, 1)[-len(dims) :],
        "mlp_ratios": (ratio,) * len(dims),
        "pool": "per_channel",
        "init_std": None,
    }
    return "favit_b0", {**settings, **spec}


def _macs(spec: dict[str, Any], patch: int, depths: Sequence[int], dim: int, ratio: int) -> float:
    """About what a model costs whose widths double from `dim`; each stage's blocks then cost the same."""
    (rows, columns), *_ = token_grid(spec["img_size"], patch, 1, up=True)
    blocks = sum(depths) * (3 + 2 * ratio) + 4.5 * (len(depths) - 1)
    return rows * columns * (dim * dim * blocks + spec["in_chans"] * _kernel(patch) ** 2 * dim)


def _kernel(patch: int) -> int:
    return min(2 * patch - 1, patch + 3)


def _convert(model: Any, state: State) -> State:
    named: State = {}
    for key, value in state.items():
        place = key.split(".")
        if place[0] == "out":
            # The norm at the end of a stage stands behind its blocks.
            key = f"stages.{place[1]}.{len(model.stages[int(place[1])]) - 1}.{place[2]}"
        if key.startswith("head.") and model.head.fc is None:
            continue
        named[key] = value[:, :, 0, 0] if key.endswith(".mixer.near.1.weight") and value.ndim == 4 else value
    return named


_B0: dict[str, Any] = dict(dims=(32, 64, 128, 256), depths=(2, 2, 6, 2))
_B1: dict[str, Any] = dict(dims=(64, 128, 256, 512), depths=(2, 2, 6, 2))
_B2: dict[str, Any] = dict(dims=(64, 128, 256, 512), depths=(2, 3, 18, 3))
_B3: dict[str, Any] = dict(dims=(96, 192, 384, 768), depths=(2, 3, 14, 3))


@register_system(
    "favit",
    tasks=("image-classification",),
    scale=_scale,
    variants={"favit_b0": _B0, "favit_b1": _B1, "favit_b2": _B2, "favit_b3": _B3},
    rules=[
        (r"^patch_embed1\.", "stem."),
        *((rf"^patch_embed{i + 2}\.proj\.", f"merges.{i}.conv.") for i in range(3)),
        *((rf"^patch_embed{i + 2}\.norm\.", f"merges.{i}.norm.") for i in range(3)),
        *((rf"^block{i + 1}\.", f"stages.{i}.") for i in range(4)),
        *((rf"^norm{i + 1}\.", f"out.{i}.") for i in range(4)),
        (r"\.attn\.kv_g\.", ".mixer.coarse.kv."),
        (r"\.attn\.kv_l\.depth_conv\.", ".mixer.near.0."),
        (r"\.attn\.kv_l\.point_conv\.", ".mixer.near.1."),
        (r"\.attn\.sr\.", ".mixer.coarse.conv."),
        (r"\.attn\.norm\.", ".mixer.coarse.norm."),
        (r"\.attn\.local_conv_g\.", ".mixer.coarse.near."),
        (r"\.attn\.fcs\.(\d)\.", r".mixer.tiled.\1.fc."),
        (r"\.attn\.single_heads\.(\d)\.", r".mixer.tiled.\1.kv."),
        (r"\.attn\.local_convs\.(\d)\.", r".mixer.tiled.\1.near."),
        (r"\.attn\.", ".mixer."),
        (r"\.dwconv\.dwconv\.", ".dw."),
        (r"^head\.", "head.fc."),
    ],
    convert=_convert,
)
def favit(
    *,
    dims: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (2, 2, 6, 2),
    heads: Sequence[int] = (1, 2, 4, 8),
    reductions: Sequence[int] = (8, 4, 2, 1),
    mlp_ratios: Sequence[float] = (8, 6, 4, 4),
    window: int = 7,
    pool: str = "official",
    patch: int = 4,
    drop: float = 0.0,
    drop_path: float = 0.0,
    init_std: float | None = 0.02,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    mixer: str = "factorized",
    mixer_options: dict[str, Any] | None = None,
) -> nn.Module:
    """A FaViT.

    Args:
        reductions: of each stage, by how much the coarse keys lower the resolution and how far apart the far taps are.
        window: taps of a tile on each axis.
        pool: `official`, as the released weights were trained, or `per_channel`.
        patch: step of the first convolution, whose kernel overlaps by up to 3 pixels.
        init_std: deviation of the first weights of linear layers, None for `fan_in ** -0.5`.
        img_size: only mixers bound to a grid need it; the model takes any image.
        num_classes: 0 gives the pooled vector, and a backbone that takes a classifier's weights.
        mixer: what stands in for factorised attention.

    Raises:
        ValueError: the settings of the stages differ in length.
    """
    each = {"dims": dims, "depths": depths, "heads": heads, "reductions": reductions, "mlp_ratios": mlp_ratios}
    if len({len(setting) for setting in each.values()}) > 1:
        raise ValueError(f"settings of the stages must be of one length, got {each}")
    grids = token_grid(img_size, patch, len(dims), up=True)
    norm = partial(nn.LayerNorm, eps=1e-6)
    kernel = _kernel(patch)
    stages: list[list[nn.Module]] = []
    for i, rates in enumerate(stage_rates(drop_path, depths)):
        dim = dims[i]
        own = options_for(mixer, {"heads": heads[i], "reduction": reductions[i], "window": window, "pool": pool})
        blocks: list[nn.Module] = []
        for rate in rates:
            mix = create_mixer(mixer, dim, grid=grids[i], **{**own, **(mixer_options or {})})
            mlp = ConvMlp(dim, int(dim * mlp_ratios[i]), drop=drop)
            blocks.append(Block(dim, mix, mlp, norm=norm, drop_path=rate))
        stages.append([*blocks, norm(dim)])
    model = Pyramid(
        PatchEmbed(in_chans, dims[0], kernel, stride=patch, padding=kernel // 2, norm=LayerNorm),
        stages,
        [ConvNorm(dim, out, 3, stride=2, norm=LayerNorm) for dim, out in pairwise(dims)],
        norm=None,
        head=Classifier(dims[-1], num_classes),
    )
    init_transformer(model, init_std)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan = module.weight[0, 0].numel() * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=sqrt(2 / fan))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
