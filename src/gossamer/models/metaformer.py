"""MetaFormer: the transformer block with any token mixer; PoolFormer mixes by average pooling alone.

Source: Yu et al. 2021, "MetaFormer Is Actually What You Need for Vision".

- a mixer for each stage, any registered one: pooling (PoolFormer), identity, attention, spatial maps (the hybrids)
- overlapping 7x7 stem and 3x3 merging without norms; LayerScale on both branches
- norm over a whole sample (one group), or over the channels of a token where attention is among the mixers
- attention stages have one learned position map, in front of the first of them
- official code keeps channels first and writes the MLP as 1x1 convolutions; here channels are last
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from gossamer.layers import Block, Classifier, Conv, GridPositions, GroupNorm1, LayerNorm, Mlp, PatchEmbed
from gossamer.layers.embed import pair
from gossamer.layers.init import init_transformer
from gossamer.layers.positions import resize_positions
from gossamer.mixers import create_mixer, mixer_keywords
from gossamer.models._pyramids import keep_backbone, small_pyramid, stage_rates
from gossamer.models.registry import State, register_system
from gossamer.trunks import Pyramid

HEAD_DIM = 32


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    found = small_pyramid(spec, size, block=8, step=8)
    patch = found["patch"]
    # The stem overlaps: a patch of s pixels is read with a margin of about half of it.
    kernel = patch + 2 * (patch // 2) + 1
    small = {"stem": (kernel, patch, patch // 2 + (patch == 1)), "dims": found["dims"], "depths": found["depths"]}
    return "poolformer_s12", {
        **small,
        "mixers": ("pool",) * len(found["dims"]),
        "layer_scale": None,
        "init_std": None,
        **spec,
    }


def _convert(model: Any, state: State) -> State:
    """Names the authors' flat list `network` (stages, merges and position maps in turn) by what its entries are."""
    named = {key: value for key, value in state.items() if not key.startswith("network.")}
    stage = -1
    for entry in sorted({int(key.split(".")[1]) for key in state if key.startswith("network.")}):
        part = {k.split(".", 2)[2]: v for k, v in state.items() if k.startswith(f"network.{entry}.")}
        if "pos_embed" in part:
            key = f"merges.{stage}.1.table" if stage >= 0 else "stem.1.table"
            named[key] = _resized(part["pos_embed"], model, key)
        elif "proj.weight" in part:
            named.update({f"merges.{stage}.0.{key.removeprefix('proj.')}": value for key, value in part.items()})
        else:
            stage += 1
            for key, value in part.items():
                # The authors' 1x1 convolutions are linear layers here.
                named[f"stages.{stage}.{key}"] = value[:, :, 0, 0] if value.ndim == 4 and ".mlp." in key else value
    if "stem.1.table" in named:
        named = {re.sub(r"^stem\.(proj)", r"stem.0.\1", key): value for key, value in named.items()}
    return keep_backbone(model, named, "norm.", "head.")


def _resized(table: Tensor, model: nn.Module, key: str) -> Tensor:
    own = model.state_dict().get(key)
    flat = table.flatten(2).transpose(1, 2)
    old = (table.shape[2], table.shape[3])
    new = old if own is None else (own.shape[1], own.shape[2])
    return resize_positions(flat, old, new).unflatten(1, new)


_S12: dict[str, Any] = dict(depths=(2, 2, 6, 2), dims=(64, 128, 320, 512))
_S24: dict[str, Any] = dict(depths=(4, 4, 12, 4), dims=(64, 128, 320, 512))
_S36: dict[str, Any] = dict(depths=(6, 6, 18, 6), dims=(64, 128, 320, 512), layer_scale=1e-6)
_M36: dict[str, Any] = dict(depths=(6, 6, 18, 6), dims=(96, 192, 384, 768), layer_scale=1e-6)
_M48: dict[str, Any] = dict(depths=(8, 8, 24, 8), dims=(96, 192, 384, 768), layer_scale=1e-6)
_PPPA: dict[str, Any] = dict(**_S12, mixers=("pool", "pool", "pool", "attention"), norm="layer")
_PPAA: dict[str, Any] = dict(**_S12, mixers=("pool", "pool", "attention", "attention"), norm="layer")
_PPPF: dict[str, Any] = dict(**_S12, mixers=("pool", "pool", "pool", "spatial_fc"))
_PPFF: dict[str, Any] = dict(**_S12, mixers=("pool", "pool", "spatial_fc", "spatial_fc"))


@register_system(
    "metaformer",
    tasks=("image-classification",),
    scale=_scale,
    variants={
        "poolformer_s12": _S12,
        "poolformer_s24": _S24,
        "poolformer_s36": _S36,
        "poolformer_m36": _M36,
        "poolformer_m48": _M48,
        "metaformer_id_s12": dict(**_S12, mixers=("identity",) * 4),
        "metaformer_pppa_s12": _PPPA,
        "metaformer_ppaa_s12": _PPAA,
        "metaformer_pppf_s12": _PPPF,
        "metaformer_ppff_s12": _PPFF,
        # the authors' own names
        "metaformer_pppa_s12_224": _PPPA,
        "metaformer_ppaa_s12_224": _PPAA,
        "metaformer_pppf_s12_224": _PPPF,
        "metaformer_ppff_s12_224": _PPFF,
    },
    rules=[
        (r"^patch_embed\.", "stem."),
        (r"\.token_mixer\.", ".mixer."),
        (r"\.layer_scale_([12])$", r".scale\1"),
        (r"^norm0\.", "out_norms.0."),
        (r"^norm2\.", "out_norms.1."),
        (r"^norm4\.", "out_norms.2."),
        (r"^norm6\.", "out_norms.3."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ],
    convert=_convert,
)
def metaformer(
    *,
    depths: Sequence[int] = (2, 2, 6, 2),
    dims: Sequence[int] = (64, 128, 320, 512),
    mixers: Sequence[str] | str = "pool",
    mixer_options: dict[str, Any] | None = None,
    norm: Literal["group", "layer"] = "group",
    layer_scale: float | None = 1e-5,
    mlp_ratio: float = 4.0,
    stem: tuple[int, int, int] = (7, 4, 2),
    drop: float = 0.0,
    drop_path: float = 0.0,
    init_std: float | None = 0.02,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    dense: bool = False,
) -> nn.Module:
    """A MetaFormer.

    Args:
        mixers: name of each stage's mixer, or one name for all.
        mixer_options: keywords for every mixer that takes them; heads are 32 channels wide unless said here.
        norm: `group`, over a whole sample, or `layer`, over the channels of each token.
        stem: kernel, stride and padding of the first convolution.
        init_std: deviation of the first weights, None for `fan_in ** -0.5`.
        img_size: position maps and spatial maps are made for it; pooling and identity take any size.
        dense: a norm for each map that `features` gives, and no classifier; position maps are resized to the image.

    Raises:
        ValueError: `depths`, `dims` and `mixers` differ in length, `norm` is neither of the two, or the image is too
            small for the stem.
    """
    names = [mixers] * len(dims) if isinstance(mixers, str) else list(mixers)
    if not len(depths) == len(dims) == len(names):
        raise ValueError(f"depths, dims and mixers must be of one length, got {tuple(depths)}, {tuple(dims)}, {names}")
    if norm not in ("group", "layer"):
        raise ValueError(f"norm must be 'group' or 'layer', got {norm!r}")
    make_norm = GroupNorm1 if norm == "group" else LayerNorm
    kernel, stride, padding = stem
    if not (kernel and stride):
        raise ValueError(f"stem must be kernel, stride and padding, the first two at least 1, got {stem}")
    grid = tuple((side + 2 * padding - kernel) // stride + 1 for side in pair(img_size))
    if min(grid) < 1:
        raise ValueError(f"image sides must be at least {kernel - 2 * padding} for this stem, got img_size={img_size}")
    first_attention = names.index("attention") if "attention" in names else None
    embed: nn.Module = PatchEmbed(in_chans, dims[0], kernel, stride=stride, padding=padding)
    if first_attention == 0:
        embed = nn.Sequential(embed, GridPositions(dims[0], grid, resize=dense))
    merges, stages = [], []
    for i, (dim, name, rates) in enumerate(zip(dims, names, stage_rates(drop_path, depths), strict=True)):
        if i:
            grid = tuple((side + 1) // 2 for side in grid)
            merges.append(nn.Sequential(Conv(dims[i - 1], dim, 3, stride=2)))
            if i == first_attention:
                merges[-1].append(GridPositions(dim, grid, resize=dense))
        options = _options(name, dim, mixer_options or {})
        stages.append(
            [
                Block(
                    dim,
                    create_mixer(name, dim, grid=grid, **options),
                    Mlp(dim, int(dim * mlp_ratio), drop=drop),
                    norm=make_norm,
                    layer_scale=layer_scale,
                    drop_path=rate,
                )
                for rate in rates
            ]
        )
    model = Pyramid(
        embed,
        stages,
        merges,
        norm=None if dense else make_norm(dims[-1]),
        head=nn.Identity() if dense else Classifier(dims[-1], num_classes),
        out_norms=[make_norm(dim) for dim in dims] if dense else None,
    )
    init_transformer(model, init_std)
    return model


def _options(name: str, dim: int, given: dict[str, Any]) -> dict[str, Any]:
    known = mixer_keywords(name)
    default: dict[str, Any] = {"heads": max(1, dim // HEAD_DIM), "qkv_bias": False} if name == "attention" else {}
    if "heads" in known:
        default.setdefault("heads", max(1, dim // HEAD_DIM))
    return {**default, **{key: value for key, value in given.items() if key in known}}
