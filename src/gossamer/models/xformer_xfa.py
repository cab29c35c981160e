"""XFormer, reconstructed: inverted residuals for what is near, cross feature attention for what is far.

Source: Zhao et al. 2022, "Lightweight Vision Transformer with Cross Feature Attention" (XFormer; no relation to the
xFormers library).

- a reconstruction: no code was published and no full text could be read. Fixed are the parts the abstract names
  (MobileNetV3 blocks, local-global-fuse blocks with a linear attention); widths and depths are MobileViT's, and come
  within 5 % of the published 5.5 million parameters. The published accuracy is not claimed
- its fuse blocks learn what joins far parts of an image sooner than inverted residuals of more parameters in their
  place; single digits, of 16 pixels a side, those learn a little better
- tokens are pixels of the map: nothing is unfolded into patches, and any image of 32 pixels or more fits
- a deepest stride below 32 (small images) lowers that bound
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import Block, Classifier, ConvNorm, Mlp
from gossamer.layers.blocks import drop_path_rates
from gossamer.layers.conv import SqueezeExcite, channels_last
from gossamer.layers.init import init_transformer
from gossamer.mixers import create_mixer, options_for
from gossamer.models._pyramids import BUDGETS, small_pyramid, token_grid
from gossamer.models.registry import register_system
from gossamer.trunks import Pyramid


class MobileBlock(nn.Module):
    """`y = norm(W2 se(act(norm(D act(norm(W1 x))))))`, plus x where shapes allow: MobileNetV3's inverted residual.

    Source: Howard et al. 2019, "Searching for MobileNetV3", section 5.

    Args:
        dim, out: channels in and out.
        stride: of the depth-wise convolution.
        ratio: inner width relative to `dim`.
        kernel: side of the depth-wise kernel.
    """

    def __init__(self, dim: int, out: int, *, stride: int = 1, ratio: int = 4, kernel: int = 3) -> None:
        super().__init__()
        hidden = dim * ratio
        self.expand = ConvNorm(dim, hidden, 1, bias=False, act=nn.Hardswish)
        self.near = ConvNorm(hidden, hidden, kernel, stride=stride, groups=hidden, bias=False, act=nn.Hardswish)
        self.squeeze = SqueezeExcite(hidden, hidden // 4, act=nn.ReLU, gate=nn.Hardsigmoid)
        self.project = ConvNorm(hidden, out, 1, bias=False)
        self.residual = stride == 1 and dim == out

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j o"]:
        y = self.project(self.squeeze(self.near(self.expand(x))))
        return x + y if self.residual else y


class FuseBlock(nn.Module):
    """`y = F [x; P blocks(L x)]`: L looks near and widens, the blocks look everywhere, F fuses both (XF block).

    Args:
        dim: channels.
        width: channels of the blocks.
        blocks: applied in turn between L and P.
    """

    def __init__(self, dim: int, width: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.near = ConvNorm(dim, dim, 3, groups=dim, bias=False, act=nn.Hardswish)
        self.widen = nn.Linear(dim, width)
        self.blocks = nn.Sequential(*blocks)
        self.narrow = ConvNorm(width, dim, 1, bias=False, act=nn.Hardswish)
        self.fuse = ConvNorm(2 * dim, dim, 3, bias=False, act=nn.Hardswish)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        far = self.narrow(self.blocks(self.widen(self.near(x))))
        return self.fuse(torch.cat((x, far), -1))


class Stem(nn.Module):
    """A 3x3 convolution, then inverted residuals; images no smaller than the deepest stride.

    Args:
        widths: channels after each.
        strides: step of each.
        least: smallest image side.
    """

    def __init__(self, in_chans: int, widths: Sequence[int], strides: Sequence[int], *, ratio: int, least: int) -> None:
        super().__init__()
        self.least = least
        self.conv = ConvNorm(in_chans, widths[0], 3, stride=strides[0], bias=False, act=nn.Hardswish)
        self.blocks = nn.Sequential(
            *(
                MobileBlock(dim, out, stride=stride, ratio=ratio)
                for (dim, out), stride in zip(pairwise(widths), strides[1:], strict=True)
            )
        )

    def forward(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b h w c"]:
        height, width = image.shape[2:]
        if min(height, width) < self.least:
            raise ValueError(f"image sides must be at least {self.least} (the deepest stride), got {height}x{width}")
        return self.blocks(self.conv(channels_last(image).movedim(1, -1)))


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    found = small_pyramid(spec, size, block=30, step=8, least_patch=2)
    patch, depths = found["patch"], found["depths"]
    tokens = -(-spec["img_size"][0] // patch) * -(-spec["img_size"][1] // patch)
    twos = patch.bit_length() - 1
    fused = depths if len(depths) == 1 else (0, *depths[1:])
    # A fuse block costs 21 c^2 a token and 18 c^2 for each of its layers, a mobile block 8 c^2 + 36 c, one that halves
    # the map 6 c^2, the first convolution 9 c for each channel of the image; the stem halves its widths towards it.
    square = 8 * depths[0] + sum(27 + 18 * d for d in fused if d) + 6 * max(0, twos - 1)
    linear = 36 * depths[0] + 9 * spec["in_chans"] * 2 ** max(0, twos - 1) + 18 * 2 ** max(0, twos - 1)
    costs = {dim: tokens * dim * (square * dim + linear) for dim in range(8, 257, 4)}
    first = min(costs, key=lambda dim: abs(costs[dim] - BUDGETS[size]))
    dims = tuple(first * 2**i for i in range(len(depths)))
    settings = {
        "stem_widths": tuple(max(4, first >> i) for i in reversed(range(max(1, twos)))),
        "stem_strides": (2,) * twos or (1,),
        "dims": dims,
        "mobile": (depths[0], *(0 for _ in dims[1:])),
        "widths": tuple((dim * 3 // 2 + 3) // 4 * 4 for dim in dims),
        "depths": fused,
        "last": 2 * dims[-1],
        "init_std": None,
    }
    return "xformer", {**settings, **spec}


@register_system("xformer-xfa", tasks=("image-classification",), scale=_scale, variants={"xformer": {}})
def xformer(
    *,
    stem_widths: Sequence[int] = (16, 32, 64),
    stem_strides: Sequence[int] = (2, 1, 2),
    dims: Sequence[int] = (64, 96, 128, 160),
    mobile: Sequence[int] = (2, 0, 0, 0),
    widths: Sequence[int] = (0, 144, 192, 240),
    depths: Sequence[int] = (0, 2, 4, 3),
    last: int = 640,
    heads: int = 4,
    ratio: int = 4,
    mlp_ratio: float = 2.0,
    drop: float = 0.0,
    drop_path: float = 0.0,
    init_std: float | None = 0.02,
    mixer: str = "cross_feature",
    mixer_options: dict[str, Any] | None = None,
    img_size: int | tuple[int, int] = 256,
    in_chans: int = 3,
    num_classes: int = 1000,
) -> nn.Module:
    """A reconstruction of XFormer.

    Args:
        stem_widths, stem_strides: channels and steps of the first convolution and the inverted residuals behind it.
        dims: channels of each stage; the first are the stem's last.
        mobile: inverted residuals of each stage, behind the one that joins it to the stage before.
        widths, depths: channels and layers of each stage's fuse block, depth 0 for a stage without one.
        last: channels that the last map is widened to before it is pooled.
        ratio: inner width of the inverted residuals.
        init_std: deviation of the first weights of linear layers, None for `fan_in ** -0.5`.
        mixer: what stands in for cross feature attention.
        img_size: only mixers bound to a grid need it.

    Raises:
        ValueError: lists differ in length, the stem does not end in `dims[0]` channels, or an image is too small.
    """
    if not len(dims) == len(mobile) == len(widths) == len(depths):
        raise ValueError(
            f"dims, mobile, widths and depths must be of one length, got {tuple(dims)}, {tuple(mobile)}, "
            f"{tuple(widths)} and {tuple(depths)}"
        )
    if len(stem_widths) != len(stem_strides):
        raise ValueError(
            f"stem_widths and stem_strides must be of one length, got {tuple(stem_widths)} and {tuple(stem_strides)}"
        )
    if stem_widths[-1] != dims[0]:
        raise ValueError(f"stem_widths must end in dims[0], got {tuple(stem_widths)} and {tuple(dims)}")
    options = {**options_for(mixer, {"heads": heads}), **(mixer_options or {})}
    least = 2 ** (len(dims) - 1)
    for stride in stem_strides:
        least *= stride
    rates = iter(drop_path_rates(drop_path, sum(depths)))
    stages = []
    for i, grid in enumerate(token_grid(img_size, least >> (len(dims) - 1), len(dims), up=True)):
        blocks: list[nn.Module] = [MobileBlock(dims[i], dims[i], ratio=ratio) for _ in range(mobile[i])]
        if depths[i]:
            width = widths[i]
            layers = [
                Block(
                    width,
                    create_mixer(mixer, width, grid=grid, **options),
                    Mlp(width, int(width * mlp_ratio), drop=drop),
                    drop_path=next(rates),
                )
                for _ in range(depths[i])
            ]
            blocks.append(FuseBlock(dims[i], width, layers))
        stages.append(blocks)
    model = Pyramid(
        Stem(in_chans, stem_widths, stem_strides, ratio=ratio, least=least),
        stages,
        [MobileBlock(dim, out, stride=2, ratio=ratio) for dim, out in pairwise(dims)],
        norm=ConvNorm(dims[-1], last, 1, bias=False, act=nn.Hardswish),
        head=Classifier(last, num_classes, drop=drop),
    )
    init_transformer(model, init_std)
    return model
