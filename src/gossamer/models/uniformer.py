"""UniFormer: one block for images and video; its token mixer is a learned neighbourhood first, attention later.

Source: Li et al. 2022, "UniFormer: Unified Transformer for Efficient Spatiotemporal Representation Learning"; the image
and dense forms are of Li et al. 2022, "UniFormer: Unifying Convolution and Self-attention for Visual Recognition".

- `x = x + D x`, `x = x + mixer(norm x)`, `x = x + mlp(norm x)`: positions are a depth-wise convolution in every block
- stages 1-2 aggregate 5x5(x5) neighbourhoods behind batch norms, stages 3-4 attend over all tokens, of all frames
- `video=True` takes clips `(b, c, t, height, width)` of any length; the stem halves t, rounded up. Image weights are
  inflated: spread over the kernel's frames (`average`) or put at its middle frame (`center`)
- `split=True` divides attention into one over time and one over space; `overlap=True` lets merging see three frames
- `dense=True` is the authors' backbone for detection: a norm for each map, no classifier, stage 3 with `windows`
- sides must be a multiple of 32, as the authors' stem cuts off what is left over; `pad=True` fills up with zeros,
  `dense=True` cuts as they do; the convolutional stem takes any size
- 1x1 convolutions are linear layers here; LayerScale, a switch of the official file, stands in global blocks only
- `keep=0.5` is the light form (XXS and XS) for images, whose global blocks attend to half of their tokens
  (`_uniformer_light.py`); in training it gives two answers, of the last map and of the class token
- uniformer_xs costs 1.93 GMACs at 224 pixels where the repository prints 2.0; its other figures agree within 2 %
- not here: the light form for video, and the extra head of token labelling
- tasks know no video yet: the video variants can be built, loaded and measured, and `gossamer fit` takes images
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from math import gcd
from typing import Any, cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import BatchNorm, Block, Classifier, ConvNorm, LayerNorm, Mlp
from gossamer.layers.conv import Conv2d, channels_last
from gossamer.layers.init import init_transformer
from gossamer.layers.positions import ConvPositions
from gossamer.mixers import create_mixer, options_for
from gossamer.mixers.attention import Attention
from gossamer.models._pyramids import keep_backbone, small_pyramid, stage_rates, token_grid
from gossamer.models._uniformer_light import ClassToken, LightBlock, halved, in_turn
from gossamer.models.registry import State, register_system
from gossamer.ops.grid import pad_to_multiple
from gossamer.trunks import Pyramid
from gossamer.trunks.blocking import by_parts
from gossamer.trunks.checkpointing import through

# Every which block of a hybrid stage 3 attends to the whole map.
HYBRID_STEP = 4


class UniBlock(Block):
    """A pre-norm block behind positions: `x = x + D x` first, D a depth-wise convolution 3 tokens wide."""

    def __init__(self, dim: int, mixer: nn.Module, mlp: nn.Module, *, axes: int, **options: Any) -> None:
        super().__init__(dim, mixer, mlp, **options)
        self.positions = ConvPositions(dim, axes=axes)

    def forward(self, x: Float[Tensor, "b *grid c"], **given: Any) -> Float[Tensor, "b *grid c"]:
        return super().forward(self.positions(x), **given)


class SplitBlock(UniBlock):
    """Attention over time, then over space: `u = x + T(norm x)`, `x = x + S(norm u)`, `x = x + mlp(norm x)`.

    The spatial sum starts from `x`, not from `u`. The temporal branch starts at zero: its queries, keys and values are
    zero at first, and its output product is all ones, so that the first gradients reach them.
    """

    def __init__(self, dim: int, mixer: nn.Module, mlp: nn.Module, *, time_mixer: nn.Module, **options: Any) -> None:
        super().__init__(dim, mixer, mlp, **options)
        self.time_norm = options["norm"](dim)
        self.time_mixer = time_mixer

    # Split attention reads no mask.
    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "b t h w c"]
    ) -> Float[Tensor, "b t h w c"]:
        x = self.positions(x)
        b, t, h, w, c = x.shape
        places = x.permute(0, 2, 3, 1, 4).reshape(b * h * w, t, c)
        places = self._add(places, self.time_mixer(self.time_norm(places)), None)
        frames = places.view(b, h, w, t, c).permute(0, 3, 1, 2, 4).reshape(b * t, h * w, c)
        y = self._add(x.reshape(b * t, h * w, c), self.mixer(self.norm1(frames)), self.scale1)
        y = y.view(b, t, h, w, c)
        return self._add(y, self.mlp(self.norm2(y)), self.scale2)


class PatchMerge(nn.Module):
    """`norm(conv(x))` on a map or clip, kernel as wide as its step in space.

    Args:
        frames: frames of the kernel and of its step; None for images.
        pad: fill a map that `patch` does not divide up with zeros.
    """

    def __init__(
        self, dim: int, out: int, patch: int, *, frames: tuple[int, int] | None = None, pad: bool = False
    ) -> None:
        super().__init__()
        if frames is None:
            self.conv: nn.Module = Conv2d(dim, out, patch, patch)
            self.size: tuple[int, ...] = (patch, patch)
        else:
            kernel, step = frames
            self.conv = nn.Conv3d(dim, out, (kernel, patch, patch), (step, patch, patch), (kernel // 2, 0, 0))
            self.size = (1, patch, patch)
        self.norm = LayerNorm(out)
        self.pad = pad

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *_grid o"]:
        if self.pad:
            x = pad_to_multiple(x, self.size)
        return self.norm(self.conv(x.movedim(-1, 1)).movedim(1, -1))


class UniFormer(Pyramid):
    """The pyramid, for images `(b, i, height, width)` or, with `axes=3`, clips `(b, i, t, height, width)`.

    Args:
        axes: grid axes.
        multiple: what the sides of the input must be a multiple of.
        inflation: how image weights become video weights.
    """

    def __init__(self, *parts: Any, axes: int, multiple: int, inflation: str, **options: Any) -> None:
        super().__init__(*parts, **options)
        self.axes = axes
        self.multiple = multiple
        self.inflation = inflation

    def forward(self, x: Float[Tensor, "b i *size"]) -> Float[Tensor, "b k"] | Float[Tensor, "b *grid c"]:
        y = self._maps(self._checked(x))[-1]
        return self.head(y if self.norm is None else self.norm(y))

    def features(self, x: Float[Tensor, "b i *size"]) -> list[Float[Tensor, "b *_grid _c"]]:
        """One map a stage, finest first."""
        maps = self._maps(self._checked(x))
        return maps if self.out_norms is None else [norm(m) for norm, m in zip(self.out_norms, maps, strict=True)]

    def _checked(self, x: Tensor) -> Tensor:
        if x.ndim != self.axes + 2:
            form = "(b, channels, frames, height, width)" if self.axes == 3 else "(b, channels, height, width)"
            raise ValueError(f"the model takes {form}, got shape {tuple(x.shape)}")
        height, width = x.shape[-2:]
        if height % self.multiple or width % self.multiple:
            raise ValueError(
                f"image sides must be a multiple of {self.multiple} (patch and merging), got {height}x{width}; "
                "build with pad=True for any size"
            )
        return x


class LightUniFormer(UniFormer):
    """A UniFormer for images whose global stages hold `LightBlock`s.

    Args:
        token: the class token that runs through them.
        local_stages: how many stages are not global.
        ceil: maps of odd sides are rounded up in merging.
    """

    def __init__(self, *parts: Any, token: ClassToken, local_stages: int, ceil: bool, **options: Any) -> None:
        super().__init__(*parts, **options)
        self.token = token
        self.local_stages = local_stages
        self.ceil = ceil

    # In training there are two answers.
    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "b i *size"]
    ) -> Float[Tensor, "b ..."] | tuple[Float[Tensor, "b k"], Float[Tensor, "b k"]]:
        maps, token = self._maps_and_token(self._checked(x))
        answer = self.head(maps[-1] if self.norm is None else self.norm(maps[-1]))
        return (answer, self.token(token)) if self.training and self.token.fc is not None else answer

    def _maps(self, image: Tensor) -> list[Tensor]:
        return self._maps_and_token(image)[0]

    def _maps_and_token(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        x = self.stem(image)
        token = self.token.start.expand(x.shape[0], -1, -1)
        score: Tensor | None = None
        maps: list[Tensor] = []
        for index, stage in enumerate(self.stages):
            blocks = cast(nn.Sequential, stage)
            x = self.merges[index - 1](x) if index else x
            if index < self.local_stages:
                x = through(self, by_parts, blocks, x)
            else:
                if index > self.local_stages:
                    token = self.token.widen[index - self.local_stages - 1](token)
                    h, w = maps[-1].shape[1:3]
                    score = None if score is None else halved(score, (h, w), ceil=self.ceil)
                x, token, score = through(self, in_turn, blocks, x, token, score)
            maps.append(x)
        return maps, token


class Channels(nn.Module):
    """The input with its channels last, in memory too."""

    def forward(self, x: Float[Tensor, "b i *size"]) -> Float[Tensor, "b *size i"]:
        if x.ndim == 4:
            return channels_last(x).movedim(1, -1)
        return x.movedim(1, -1).contiguous()


def inflate(weight: Float[Tensor, "o i h w"], frames: int, how: str = "average") -> Float[Tensor, "o i {frames} h w"]:
    """The kernel of an image as one of a clip: `weight / frames` at each frame, or itself at the middle one alone.

    On a clip that stands still both answer as the image's kernel does; `average` needs every frame to exist.

    Raises:
        ValueError: `how` is neither `average` nor `center`.
    """
    if how not in ("average", "center"):
        raise ValueError(f"how must be average or center, got {how!r}")
    if how == "average":
        return (weight / frames)[:, :, None].repeat(1, 1, frames, 1, 1)
    before = frames // 2
    return F.pad(weight[:, :, None], (0, 0, 0, 0, before, frames - 1 - before))


def _convert(model: Any, state: State) -> State:
    own = model.state_dict()
    inflated = False
    for key, value in state.items():
        if key not in own or own[key].shape == value.shape:
            continue
        if own[key].ndim == 2 and own[key].numel() == value.numel():
            # 1x1 convolutions.
            state[key] = value.view(own[key].shape)
        elif own[key].ndim == 5 and value.ndim == 4:
            state[key] = inflate(value, own[key].shape[2], model.inflation)
            inflated = True
    if inflated:
        # A start for other classes: the head stays as it was made.
        for key in ("head.fc.weight", "head.fc.bias"):
            if key not in own:
                state.pop(key, None)
            elif key in state and state[key].shape != own[key].shape:
                state[key] = own[key]
    return keep_backbone(model, state, "norm.", "head.", "token.norm.", "token.fc.")


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    found = small_pyramid(spec, size, block=11, step=8, least_patch=2)
    # Attention over the larger maps would cost more than all the rest.
    local_stages = min(2, len(found["dims"]) - 1)
    head_dim = next(d for d in (32, 16, 8) if all(dim % d == 0 for dim in found["dims"][local_stages:]))
    settings = {
        "patch": found["patch"],
        "dims": found["dims"],
        "depths": found["depths"],
        "local_stages": local_stages,
        "head_dim": head_dim,
        "pad": True,
        "init_std": None,
    }
    return "uniformer_small", {**settings, **spec}


_S: dict[str, Any] = dict(depths=(3, 4, 8, 3))
_S_PLUS: dict[str, Any] = dict(depths=(3, 5, 9, 3), conv_stem=True)
_B: dict[str, Any] = dict(depths=(5, 8, 20, 7))
_XXS: dict[str, Any] = dict(dims=(56, 112, 224, 448), depths=(2, 5, 8, 2), head_dim=28)
_XS: dict[str, Any] = dict(dims=(64, 128, 256, 512), depths=(3, 5, 9, 3), head_dim=32)
_LIGHT: dict[str, Any] = dict(mlp_ratio=3.0, conv_stem=True, keep=0.5)
_K400: dict[str, Any] = dict(video=True, num_classes=400)
_K600: dict[str, Any] = dict(video=True, num_classes=600)


@register_system(
    "uniformer",
    tasks=("image-classification",),
    scale=_scale,
    variants={
        "uniformer_s_image": _S,
        "uniformer_s_plus_image": {**_S_PLUS, "head_dim": 32},
        "uniformer_b_image": _B,
        "uniformer_xxs": {**_XXS, **_LIGHT},
        "uniformer_xs": {**_XS, **_LIGHT},
        # Clips of any length fit; the number says on how many frames a variant was trained.
        "uniformer_s_video8": {**_S, **_K400},
        "uniformer_s_video16": {**_S, **_K400},
        "uniformer_b_video16": {**_B, **_K400},
        "uniformer_s_split_video16": {**_S, **_K400, "split": True},
        "uniformer_s_std_video16": {**_S, **_K400, "overlap": True},
        # the authors' own names
        "uniformer_small": _S,
        "uniformer_small_plus": {**_S_PLUS, "head_dim": 32},
        "uniformer_small_plus_dim64": _S_PLUS,
        "uniformer_base": _B,
        "uniformer_base_ls": {**_B, "layer_scale": 1e-6},
        "uniformer_small_k400_8x8": {**_S, **_K400},
        "uniformer_small_k400_16x4": {**_S, **_K400},
        "uniformer_small_k600_16x4": {**_S, **_K600},
        "uniformer_base_k400_8x8": {**_B, **_K400},
        "uniformer_base_k400_16x4": {**_B, **_K400},
        "uniformer_base_k600_16x4": {**_B, **_K600},
    },
    rules=[
        (r"^patch_embed1\.proj\.(weight|bias)$", r"stem.1.conv.\1"),
        (r"^patch_embed1\.norm\.", "stem.1.norm."),
        # The convolutional stem: convolution and norm, twice, an activation between.
        (r"^patch_embed1\.proj\.0\.", "stem.1.conv."),
        (r"^patch_embed1\.proj\.1\.", "stem.1.norm."),
        (r"^patch_embed1\.proj\.3\.", "stem.2.conv."),
        (r"^patch_embed1\.proj\.4\.", "stem.2.norm."),
        *((rf"^patch_embed{i + 2}\.proj\.(0\.)?(weight|bias)$", rf"merges.{i}.conv.\2") for i in range(3)),
        *((rf"^patch_embed{i + 2}\.(proj\.1|norm)\.", f"merges.{i}.norm.") for i in range(3)),
        *((rf"^blocks{i + 1}\.", f"stages.{i}.") for i in range(4)),
        *((rf"^norm{i + 1}\.", f"out_norms.{i}.") for i in range(4)),
        (r"^cls_token$", "token.start"),
        (r"^cls_upsample\.", "token.widen.0."),
        (r"^norm_cls\.", "token.norm."),
        (r"^head_cls\.", "token.fc."),
        (r"\.pos_embed\.", ".positions.conv."),
        (r"^(stages\.[01]\.\d+)\.conv1\.", r"\1.mixer.value."),
        (r"^(stages\.[01]\.\d+)\.attn\.", r"\1.mixer.affinity."),
        (r"^(stages\.[01]\.\d+)\.conv2\.", r"\1.mixer.proj."),
        (r"\.t_norm\.", ".time_norm."),
        (r"\.t_attn\.", ".time_mixer."),
        (r"\.attn\.", ".mixer."),
        (r"\.gamma_([12])$", r".scale\1"),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ],
    convert=_convert,
)
def uniformer(
    *,
    dims: Sequence[int] = (64, 128, 320, 512),
    depths: Sequence[int] = (3, 4, 8, 3),
    local_stages: int = 2,
    head_dim: int = 64,
    patch: int = 4,
    kernel: int = 5,
    mlp_ratio: float = 4.0,
    conv_stem: bool = False,
    keep: float | None = None,
    layer_scale: float | None = None,
    drop_path: float = 0.0,
    init_std: float | None = 0.02,
    video: bool = False,
    split: bool = False,
    overlap: bool = False,
    inflation: str = "average",
    dense: bool = False,
    windows: str = "none",
    window: int = 14,
    pad: bool = False,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    mixer: str = "local_aggregator",
    mixer_options: dict[str, Any] | None = None,
) -> nn.Module:
    """A UniFormer.

    Args:
        dims, depths: channels and blocks of each stage.
        local_stages: how many stages, the first, aggregate neighbourhoods; the others attend.
        head_dim: channels of an attention head.
        patch: side of the stem's patches in pixels.
        kernel: neighbourhood width of the local stages, in tokens (and frames).
        conv_stem: overlapping 3x3 convolutions in place of patches, by steps of 2 (`patch` is then 4); images only.
        keep: the light form: share of the tokens that global blocks attend to, None for all; images only, and merging
            stays without overlap behind a convolutional stem.
        layer_scale: first value of the scales of global blocks.
        init_std: deviation of the first weights of global blocks, None for `fan_in ** -0.5`.
        video: three grid axes, time first.
        split: attend over time and over space in turn; video only.
        overlap: merging sees three frames, not one (the authors' `std`); video only.
        inflation: how `load_official` turns image weights into video weights.
        dense: a norm for each map that `features` gives, and no classifier.
        windows: in stage 3, attention inside windows in `all` blocks, or in all but every fourth (`hybrid`).
        window: side of those windows in tokens.
        pad: fill up what patches and merging do not divide with zeros.
        img_size: only mixers bound to a grid need it; the model takes any image.
        mixer: what mixes tokens in the local stages.

    Raises:
        ValueError: `dims` and `depths` differ in length, `head_dim` does not divide a global stage's channels, or
            options are given together that exclude each other.
    """
    if len(dims) != len(depths):
        raise ValueError(f"dims and depths must be of one length, got {tuple(dims)} and {tuple(depths)}")
    if not 0 <= local_stages <= len(dims):
        raise ValueError(f"local_stages must be in 0..{len(dims)}, got {local_stages}")
    for dim in dims[local_stages:]:
        if dim % head_dim:
            raise ValueError(f"head_dim must divide the channels of global stages, got head_dim={head_dim}, dim={dim}")
    if windows not in ("none", "all", "hybrid"):
        raise ValueError(f"windows must be none, all or hybrid, got {windows!r}")
    if inflation not in ("average", "center"):
        raise ValueError(f"inflation must be average or center, got {inflation!r}")
    if (split or overlap) and not video:
        raise ValueError("split and overlap are of video; give video=True")
    if video and (conv_stem or windows != "none"):
        raise ValueError("conv_stem and windows are of images; got video=True")
    if keep is not None and not 0 < keep < 1:
        raise ValueError(f"keep must be between 0 and 1, got {keep}")
    if keep is not None and (video or windows != "none" or layer_scale is not None or local_stages == len(dims)):
        raise ValueError("keep is of global stages of images, without video, windows or layer_scale")
    axes = 3 if video else 2
    norm = partial(nn.LayerNorm, eps=1e-6)
    stages: list[list[nn.Module]] = []
    # Of clips the number of frames is not known before they come.
    grids: Sequence[tuple[int, int] | None] = (
        [None] * len(dims) if video else token_grid(img_size, patch, len(dims), up=pad or conv_stem)
    )
    for index, (dim, grid, rates) in enumerate(zip(dims, grids, stage_rates(drop_path, depths), strict=True)):
        blocks: list[nn.Module] = []
        for place, rate in enumerate(rates):
            mlp = Mlp(dim, int(dim * mlp_ratio))
            shared: dict[str, Any] = dict(axes=axes, drop_path=rate)
            if index < local_stages:
                own = options_for(mixer, {"kernel": kernel, "axes": axes, "heads": gcd(dim, max(1, dim // head_dim))})
                mix = create_mixer(mixer, dim, grid=grid, **{**own, **(mixer_options or {})})
                blocks.append(UniBlock(dim, mix, mlp, norm=BatchNorm, **shared))
                continue
            shared |= {"norm": norm, "layer_scale": layer_scale}
            windowed = index == 2 and (windows == "all" or (windows == "hybrid" and (place + 1) % HYBRID_STEP))
            heads = dim // head_dim
            if keep is not None:
                light = LightBlock(dim, Attention(dim, heads=heads), mlp, keep=keep, norm=norm, drop_path=rate)
                blocks.append(light)
                continue
            if windowed:
                mix = create_mixer("plain_window", dim, heads=heads, window=window)
            else:
                mix = create_mixer("attention", dim, heads=heads)
            if split:
                time = create_mixer("attention", dim, heads=heads)
                blocks.append(SplitBlock(dim, mix, mlp, time_mixer=time, **shared))
            else:
                blocks.append(UniBlock(dim, mix, mlp, **shared))
        stages.append(blocks)
    stem: nn.Module
    if conv_stem:
        first = ConvNorm(in_chans, dims[0] // 2, 3, stride=2, act=nn.GELU)
        stem = nn.Sequential(Channels(), first, ConvNorm(dims[0] // 2, dims[0], 3, stride=2))
    else:
        stem = nn.Sequential(
            Channels(), PatchMerge(in_chans, dims[0], patch, frames=(3, 2) if video else None, pad=pad)
        )
    merges: list[nn.Module]
    if conv_stem and keep is None:
        merges = [ConvNorm(a, b, 3, stride=2) for a, b in pairwise(dims)]
    else:
        frames = (3 if overlap else 1, 1) if video else None
        merges = [PatchMerge(a, b, 2, frames=frames, pad=pad) for a, b in pairwise(dims)]
    build: Any = UniFormer
    if keep is not None:
        token = ClassToken(list(dims[local_stages:]), 0 if dense else num_classes)
        build = partial(LightUniFormer, token=token, local_stages=local_stages, ceil=pad)
    model = build(
        stem,
        stages,
        merges,
        norm=None if dense else BatchNorm(dims[-1]),
        head=nn.Identity() if dense else Classifier(dims[-1], num_classes),
        out_norms=[norm(dim) for dim in dims] if dense else None,
        axes=axes,
        multiple=1 if pad or dense or conv_stem else patch * 2 ** (len(dims) - 1),
        inflation=inflation,
    )
    _initialise(model, local_stages, init_std)
    return model


def _initialise(model: UniFormer, local_stages: int, std: float | None) -> None:
    # The products of local blocks are convolutions with the authors, and stay as those are made.
    parts = [model] if std is None else [*model.stages[local_stages:], model.head]
    if std is not None and isinstance(model, LightUniFormer):
        parts.append(model.token)
    for part in parts:
        init_transformer(part, std)
    for block in model.modules():
        if isinstance(block, SplitBlock):
            time: Any = block.time_mixer
            for value in (time.qkv.weight, time.qkv.bias, time.proj.bias):
                nn.init.zeros_(value)
            nn.init.ones_(time.proj.weight)
