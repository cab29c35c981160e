"""DuoFormer: a transformer over the levels of a convolutional network, first inside each region, then between regions.

Source: Tang et al. 2025, "DuoFormer: Leveraging Hierarchical Representations by Local and Global Attention Vision
Transformer".

- every place of the coarsest map is a region; its tokens are the positions of the last 2, 3 or 4 maps that lie in it,
  coarse to fine: 1 + 4 (+ 16 (+ 64)), and one scale token in front
- `depth` blocks attend over the tokens of one region (local); its scale token then stands for it, and `depth` blocks
  attend over regions and a class token (global)
- the scale token is one learned vector, or (`scale_token="channel"`) made of all maps at once, one for each region
- the authors' repository could not be read; layout, names and outputs are those of a public fork. That fork's global
  blocks are bare attention with neither norm nor residual, and its head scores the class token before its norm:
  `style="released"`. The paper speaks of transformer blocks: `style="standard"` is pre-norm with residuals and an MLP,
  and a normed head
- ResNet-18 with three or four scales, or with channel tokens, does not run in the fork (a projection is missing, maps
  are, or one is too narrow); here all follow the sizes of the maps
- the tokens of the 2x2 map lie column by column, those of the others row by row, as the weights were trained
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gossamer.layers import Block, Classifier, ConvNorm, Mlp, resize_positions
from gossamer.layers.blocks import drop_path_rates
from gossamer.layers.conv import Conv, max_pool
from gossamer.layers.embed import pair
from gossamer.layers.init import init_transformer
from gossamer.layers.linear import linear
from gossamer.layers.resnet import RESNET_RULES, Kind, ResNet, init_resnet
from gossamer.mixers import create_mixer
from gossamer.models.registry import State, register_system

Norm = partial(nn.LayerNorm, eps=1e-6)


def regions(x: Float[Tensor, "b h w c"], side: int) -> Float[Tensor, "b i j n c"]:
    """The tokens of each square of `side` positions: column by column for a side of 2, row by row otherwise.

    Raises:
        ValueError: `side` does not divide the map.
    """
    if x.shape[1] % side or x.shape[2] % side:
        raise ValueError(f"map must be a multiple of {side}, got {x.shape[1]}x{x.shape[2]}")
    squares = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return squares.permute(0, 1, 3, *((4, 2) if side == 2 else (2, 4)), 5).flatten(3, 4)


class Bare(nn.Module):
    """A mixer with neither norm nor residual, the fork's global block."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return self.mixer(x)


class BareClassifier(Classifier):
    """The fork's head: the class token is scored as it is, its norm is not used."""

    def forward(
        self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None, sizes: Tensor | None = None
    ) -> Float[Tensor, "b k"]:
        return x[:, 0] if self.fc is None else self.fc(x[:, 0])


class ChannelToken(nn.Module):
    """A token for each region: all maps brought to the coarsest by convolution and pooling, then four convolutions.

    The map at three steps above the coarsest takes two convolutions of stride 2, that at two steps one, and each of the
    finer maps a pooling of 2x2.
    """

    def __init__(self, dims: Sequence[int], dim: int) -> None:
        super().__init__()
        self.downs = nn.ModuleList(
            nn.ModuleList(Conv(d, d, 3, stride=2) for _ in range(max(0, len(dims) - 2 - i))) for i, d in enumerate(dims)
        )
        widths = [sum(dims), dim, dim, dim, dim]
        self.mix = nn.Sequential(*(ConvNorm(a, b, 3, act=nn.ReLU) for a, b in pairwise(widths)))

    def forward(self, maps: Sequence[Float[Tensor, "b _h _w _c"]]) -> Float[Tensor, "b h w c"]:
        parts = []
        for i, (x, downs) in enumerate(zip(maps, self.downs, strict=True)):
            for down in downs:  # type: ignore[attr-defined]
                x = down(x)
            parts.append(x if i == len(maps) - 1 else max_pool(x, 2, 2, 0))
        return self.mix(torch.cat(parts, -1))


class DuoFormer(nn.Module):
    """Maps, tokens of regions, local blocks, global blocks, head; see the head of this file."""

    def __init__(
        self,
        net: ResNet,
        dim: int,
        *,
        scales: int,
        grid: tuple[int, int],
        local: Sequence[nn.Module],
        blocks: Sequence[nn.Module],
        channel: bool,
        head: nn.Module,
        pad: bool,
    ) -> None:
        super().__init__()
        self.net = net
        self.stride = net.stride
        self.grid = grid
        self.pad = pad
        self.sides = [2**i for i in range(scales)]
        count = sum(s * s for s in self.sides)
        self.projections = nn.ModuleList(nn.Linear(d, dim) for d in reversed(net.dims[-scales:]))
        self.channel = ChannelToken(net.dims, dim) if channel else None
        self.scale_token = None if channel else nn.Parameter(torch.empty(1, 1, 1, dim))
        self.scale_positions = nn.Parameter(torch.empty(1, 1, count + 1, dim))
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, grid[0] * grid[1] + 1, dim))
        self.local = nn.ModuleList(local)
        self.blocks = nn.ModuleList(blocks)
        self.head = head

    def forward(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b k"]:
        x = self.encode(self.net(self._fit(image)))
        return self.head(x)

    def features(self, image: Float[Tensor, "b i height width"]) -> list[Float[Tensor, "b _h _w _c"]]:
        """The maps of the convolutional network, and last the regions after the global blocks."""
        maps = self.net(self._fit(image))
        x = self.encode(maps)[:, 1:]
        return [*maps, x.unflatten(1, maps[-1].shape[1:3])]

    def tokens(self, maps: Sequence[Float[Tensor, "b _h _w _c"]]) -> Float[Tensor, "b i j n c"]:
        """The tokens of each region, coarse to fine, the scale token first."""
        coarse_first = list(reversed(maps))
        parts = [
            linear(fc, regions(m, side).contiguous())
            for fc, m, side in zip(self.projections, coarse_first, self.sides, strict=False)
        ]
        b, i, j = parts[0].shape[:3]
        if self.channel is not None:
            token = self.channel(maps)[:, :, :, None]
        else:
            token = self.scale_token[:, None].expand(b, i, j, -1, -1)  # type: ignore[index]
        return torch.cat((token, *parts), 3) + self.scale_positions[:, None]

    def encode(self, maps: Sequence[Float[Tensor, "b _h _w _c"]]) -> Float[Tensor, "b n c"]:
        """The class token and the regions after the global blocks."""
        x = self.tokens(maps)
        b, i, j = x.shape[:3]
        x = x.flatten(0, 2)
        for block in self.local:
            x = block(x)
        x = torch.cat((self.class_token.expand(b, -1, -1), x[:, 0].unflatten(0, (b, i * j))), 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return x

    def _fit(self, image: Tensor) -> Tensor:
        height, width = image.shape[2:]
        want = (self.grid[0] * self.stride, self.grid[1] * self.stride)
        if self.pad:
            return F.pad(image, (0, want[1] - width, 0, want[0] - height))
        if height % self.stride or width % self.stride:
            raise ValueError(f"image sides must be multiples of {self.stride}, got {height}x{width}")
        if (height, width) != want:
            raise ValueError(f"positions are for {want[0]}x{want[1]}, got {height}x{width}; give img_size=")
        return image


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    # Some four regions a side, of 1 + 4 tokens, whatever the image.
    stride = max(1, 2 * round(max(pair(spec["img_size"])) / 32))
    width, dim, depth = {"xs": (16, 48, 1), "s": (24, 96, 2), "m": (32, 128, 4), "l": (48, 192, 5)}[size]
    settings = {
        "backbone": ("basic", (1, 1, 1)),
        "width": width,
        "stem_stride": stride,
        "scales": 2,
        "dim": dim,
        "depth": depth,
        "heads": dim // (16 if dim % 32 else 32),
        "pad": True,
        "init_std": None,
    }
    return "duoformer_r18_s2", {**settings, **spec}


def _convert(model: Any, state: State) -> State:
    own = model.state_dict()
    for key, value in state.items():
        if key.startswith("projections.") and value.ndim == 4:
            # 1x1 convolutions are linear maps here.
            state[key] = value.flatten(1)
        elif key == "positions" and value.shape != own[key].shape:
            side = round((value.shape[1] - 1) ** 0.5)
            state[key] = resize_positions(value, (side, side), model.grid, prefix=1)
    return state


@register_system(
    "duoformer",
    tasks=("image-classification",),
    scale=_scale,
    variants={
        f"duoformer_r{n}_s{scales}{'_channel' if token == 'channel' else ''}": dict(
            backbone=f"resnet{n}", scales=scales, scale_token=token
        )
        for n in (18, 50)
        for scales in (2, 3, 4)
        for token in ("random", "channel")
    },
    rules=[
        (r"^resnet_projector\.0\.", "net.stem.conv."),
        (r"^resnet_projector\.1\.", "net.stem.norm."),
        *((rf"^resnet_projector\.{i + 4}\.", f"net.stages.{i}.") for i in range(4)),
        *RESNET_RULES,
        # Coarse to fine here.
        *((rf"^projection\.proj_heads{i}\.", f"projections.{3 - i}.") for i in range(4)),
        (r"^channel_token$", "scale_token"),
        (r"^chann(?:el)?_proj1\.conv1\.", "channel.downs.0.0."),
        (r"^chann(?:el)?_proj1\.conv2\.", "channel.downs.0.1."),
        (r"^chann(?:el)?_proj2\.conv1\.", "channel.downs.1.0."),
        (r"^chann(?:el)?_proj_all\.nConvs\.", "channel.mix."),
        (r"^vision_transformer\.", ""),
        (r"^pos_embed_for_scale$", "scale_positions"),
        (r"^cls_token$", "class_token"),
        (r"^pos_embed$", "positions"),
        (r"^scale_?[bB]locks\.", "local."),
        (r"\.attn\.", ".mixer."),
        (r"^fc_norm\.", "head.norm."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ],
    convert=_convert,
)
def duoformer(
    *,
    backbone: str | tuple[Kind, Sequence[int]] = "resnet50",
    width: int = 64,
    stem_stride: int | None = None,
    scales: int = 4,
    scale_token: Literal["random", "channel"] = "random",
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    mlp_ratio: float = 4.0,
    style: Literal["standard", "released"] = "standard",
    layer_scale: float | None = None,
    drop_path: float = 0.0,
    init_std: float | None = 0.02,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    pad: bool = False,
) -> nn.Module:
    """A DuoFormer.

    Args:
        backbone: a name of `layers.resnet.RESNETS`, or kind of block and depths.
        width: channels inside the first stage.
        stem_stride: None for ResNet's stem; a number, 1 or even, makes it one convolution of that stride.
        scales: maps whose positions become tokens, the coarsest and those before it.
        scale_token: one learned vector, or made of all maps.
        depth: local blocks, and as many global ones.
        style: global blocks and head of a `standard` transformer, or those of the fork's `released` code.
        init_std: deviation of the first weights, None for `fan_in ** -0.5`.
        pad: fill images up to whole regions.

    Raises:
        ValueError: `scales` is not 2, 3 or 4 or more than there are maps, or the image is not made of whole regions.
    """
    net = ResNet(backbone, width=width, in_chans=in_chans, stride=stem_stride)
    if scales not in (2, 3, 4) or scales > len(net.dims):
        raise ValueError(f"scales must be 2, 3 or 4, of {len(net.dims)} maps; got {scales}")
    if scale_token not in ("random", "channel"):
        raise ValueError(f"scale_token must be random or channel, got {scale_token!r}")
    height, wide = pair(img_size)
    if not pad and (height % net.stride or wide % net.stride):
        raise ValueError(f"image sides must be multiples of {net.stride}, got {height}x{wide}; or give pad=True")

    def block(rate: float) -> nn.Module:
        mlp = Mlp(dim, int(dim * mlp_ratio))
        mixer = create_mixer("attention", dim, heads=heads)
        return Block(dim, mixer, mlp, norm=Norm, layer_scale=layer_scale, drop_path=rate)

    rates = drop_path_rates(drop_path, 2 * depth)
    released = style == "released"
    model = DuoFormer(
        net,
        dim,
        scales=scales,
        grid=(-(-height // net.stride), -(-wide // net.stride)),
        local=[block(rate) for rate in rates[:depth]],
        blocks=[
            Bare(create_mixer("attention", dim, heads=heads)) if released else block(rate) for rate in rates[depth:]
        ],
        channel=scale_token == "channel",
        head=(BareClassifier if released else Classifier)(dim, num_classes, pool="token", norm=Norm),
        pad=pad,
    )
    init_transformer(model, init_std)
    for fc in model.projections:
        assert isinstance(fc, nn.Linear)
        nn.init.kaiming_normal_(fc.weight)
        nn.init.normal_(fc.bias, std=1e-6)
    for table in (model.scale_positions, model.positions, model.class_token, model.scale_token):
        if table is not None:
            nn.init.trunc_normal_(table, std=0.036)
    if model.channel is not None:
        init_resnet(model.channel)
    return model
