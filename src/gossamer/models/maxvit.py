"""MaxViT: every block is a convolution, attention inside windows, and attention on a lattice over the whole map.

Source: Tu et al. 2022, "MaxViT: Multi-Axis Vision Transformer".

- windows and lattices of 7x7 tokens (12x12 at 384 pixels, 16x16 at 512): cost linear in pixels, and global reach where
  no side of a map is longer than 49 tokens (at 224 pixels: from the second stage on)
- each stage begins with a strided block; strides 4, 8, 16, 32
- the authors' code is TensorFlow: SAME padding, GELU by tanh. Weights load from timm's `maxvit_*_tf_*` files; their
  bias tables count key minus query and are turned round, and resized (bilinear) for another window
- batch norms forget as the authors' (momentum 0.01 in PyTorch's sense; timm's have 0.1), and drop path grows as theirs,
  `rate * block / blocks`, never reaching `rate`
- strict as released (windows must divide every map), or `pad=True` for any image
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import lcm
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import BatchNorm, Block, Classifier, DropPath, Mlp, resize_positions
from gossamer.layers.conv import Conv2d, SqueezeExcite, channels_last
from gossamer.layers.embed import pair
from gossamer.layers.linear import linear
from gossamer.mixers import create_mixer
from gossamer.mixers.window import WindowAttention
from gossamer.models._pyramids import BUDGETS, small_pyramid
from gossamer.models.registry import State, register_system
from gossamer.ops.grid import pad_same
from gossamer.trunks import Pyramid

Gelu: Callable[[], nn.Module] = partial(nn.GELU, approximate="tanh")
Norm: Callable[[int], nn.Module] = partial(BatchNorm, eps=1e-3, momentum=0.01)


class SameConv(Conv2d):
    """A 3x3 convolution with TensorFlow's SAME padding: at step 2, a map of even sides is padded at its end only."""

    def __init__(self, dim: int, out: int, *, stride: int = 1, groups: int = 1, bias: bool = True) -> None:
        super().__init__(dim, out, 3, stride, int(stride == 1), groups=groups, bias=bias)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j o"]:
        x = x if self.stride == (1, 1) else pad_same(x, 3, self.stride[0])
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class Stem(nn.Module):
    """`conv2(gelu(norm(conv1(image))))`, the first convolution at step `stride`.

    Args:
        multiple: what image sides must be a multiple of, None for any.
    """

    norm_pairs = (("conv1", "norm1"),)

    def __init__(self, in_chans: int, dim: int, *, stride: int, multiple: int | None) -> None:
        super().__init__()
        self.multiple = multiple
        self.conv1 = SameConv(in_chans, dim, stride=stride)
        self.norm1 = Norm(dim)
        self.act = Gelu()
        self.conv2 = SameConv(dim, dim)

    def forward(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b h w c"]:
        if self.multiple is not None:
            _refuse_misfit((image.shape[2], image.shape[3]), self.multiple)
        x = self.conv1(channels_last(image).movedim(1, -1))
        return self.conv2(self.act(self.norm1(x)))


class MBConv(nn.Module):
    """`y = pool(x) W_s + W_3 se(gelu(norm(D gelu(norm(W_1 norm(x))))))`, D a depth-wise convolution at step `stride`.

    Source: Sandler et al. 2018, "MobileNetV2"; with a norm in front and squeeze-and-excitation as MaxViT has it.

    Args:
        dim, out: channels in and out; `4 * out` inside.
        stride: of the convolution; at 1 the shortcut is `x` itself.
    """

    norm_pairs = (("conv1", "norm1"), ("conv2", "norm2"))

    def __init__(self, dim: int, out: int, *, stride: int = 1, expansion: int = 4, drop_path: float = 0.0) -> None:
        super().__init__()
        hidden = expansion * out
        self.stride = stride
        self.shortcut = nn.Linear(dim, out) if dim != out else None
        self.pre_norm = Norm(dim)
        self.conv1 = nn.Linear(dim, hidden, bias=False)
        self.norm1 = Norm(hidden)
        self.act = Gelu()
        self.conv2 = SameConv(hidden, hidden, stride=stride, groups=hidden, bias=False)
        self.norm2 = Norm(hidden)
        self.se = SqueezeExcite(hidden, max(1, out // 4))
        self.conv3 = nn.Linear(hidden, out)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j o"]:
        short = x
        if self.stride > 1:
            # At odd borders the mean is over what exists, as in TensorFlow.
            short = F.avg_pool2d(x.movedim(-1, 1), self.stride, ceil_mode=True).movedim(1, -1)
        if self.shortcut is not None:
            short = linear(self.shortcut, short)
        y = self.act(self.norm1(linear(self.conv1, self.pre_norm(x))))
        y = self.se(self.act(self.norm2(self.conv2(y))))
        return short + self.drop_path(linear(self.conv3, y))


class MaxViTBlock(nn.Module):
    """Convolution, then a window-attention block, then a grid-attention block."""

    def __init__(
        self, dim: int, out: int, *, stride: int, heads: int, window: int, grid: tuple[int, int], drop_path: float
    ) -> None:
        super().__init__()
        self.conv = MBConv(dim, out, stride=stride, drop_path=drop_path)
        self.window, self.grid = (
            Block(
                out,
                create_mixer(name, out, heads=heads, window=window, grid=grid),
                Mlp(out, 4 * out, act=Gelu),
                drop_path=drop_path,
            )
            for name in ("window", "grid_attention")
        )

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j o"]:
        return self.grid(self.window(self.conv(x)))


def _refuse_misfit(size: tuple[int, int], multiple: int) -> None:
    if size[0] % multiple or size[1] % multiple:
        raise ValueError(
            f"image sides must be a multiple of {multiple} (strides and window), got {size[0]}x{size[1]}; "
            "build with pad=True for any size"
        )


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    found = small_pyramid(spec, size, block=12, step=16, least_patch=2)
    height, width = pair(spec["img_size"])
    rows, columns = -(-height // found["patch"]), -(-width // found["patch"])
    # Lattices reach far already on large maps, so one halving is enough.
    depths = {"xs": (1, 1), "s": (1, 2), "m": (2, 3), "l": (3, 5)}[size][: len(found["dims"])]
    # On n tokens a block of width c costs 34 n c^2: 10 in its convolutions, 24 in its two transformer layers.
    dim = round((BUDGETS[size] / (34 * rows * columns * sum(depths))) ** 0.5 / 16) * 16
    dim = min(max(16, dim), {"xs": 64, "s": 96, "m": 128, "l": 192}[size])
    window = min((8, 7, 6, 5, 4), key=lambda w: (-rows % w / rows + -columns % w / columns, -w))
    settings = {
        "strides": _strides(found["patch"], len(depths)),
        "stem": 16,
        "dims": tuple(dim * 2**i for i in range(len(depths))),
        "depths": depths,
        "head_dim": 16 if dim % 32 else 32,
        "window": window,
        "pad": True,
        "init_std": None,
    }
    return "maxvit_t", {**settings, **spec}


def _strides(patch: int, stages: int) -> tuple[int, ...]:
    """Steps of the stem and of each stage that together make patches of `patch` pixels before the first stage."""
    first = 4 if patch % 8 == 0 else 2 if patch % 2 == 0 else patch
    return (first, patch // first, *[2] * (stages - 1))


def _convert(model: Any, state: State) -> State:
    modules = dict(model.named_modules())
    for key, value in state.items():
        owner, _, name = key.rpartition(".")
        module = modules.get(owner)
        if isinstance(module, WindowAttention) and name == "bias_table":
            # (heads, rows, columns), key minus query; ours is (rows * columns, heads), query minus key.
            table = value.flip(1, 2).flatten(1).T[None]
            old, new = value.shape[1:], tuple(2 * side - 1 for side in module.size)
            state[key] = resize_positions(table, old, new, mode="bilinear")[0]
        elif isinstance(module, nn.Linear) and value.ndim == 4:
            # 1x1 convolutions.
            state[key] = value.flatten(1)
    return state


_T: dict[str, Any] = dict(depths=(2, 2, 5, 2), dims=(64, 128, 256, 512), stem=64)
_S: dict[str, Any] = dict(depths=(2, 2, 5, 2), dims=(96, 192, 384, 768), stem=64)
_B: dict[str, Any] = dict(depths=(2, 6, 14, 2), dims=(96, 192, 384, 768), stem=64)
_L: dict[str, Any] = dict(depths=(2, 6, 14, 2), dims=(128, 256, 512, 1024), stem=128)
_XL: dict[str, Any] = dict(depths=(2, 6, 14, 2), dims=(192, 384, 768, 1536), stem=192)
_SIZES = {"tiny": _T, "small": _S, "base": _B, "large": _L, "xlarge": _XL}


@register_system(
    "maxvit",
    tasks=("image-classification",),
    scale=_scale,
    variants={
        "maxvit_t": _T,
        "maxvit_s": _S,
        "maxvit_b": _B,
        "maxvit_l": _L,
        "maxvit_xl": _XL,
        # timm's names
        **{
            f"maxvit_{name}_tf_{side}": {**settings, "img_size": side, "window": side // 32}
            for name, settings in _SIZES.items()
            for side in (224, 384, 512)
        },
    },
    rules=[
        (r"^head\.norm\.", "head.0.norm."),
        (r"^head\.pre_logits\.fc\.", "head.0.fc."),
        (r"^head\.fc\.", "head.2."),
        (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
        (r"\.conv\.shortcut\.expand\.", ".conv.shortcut."),
        (r"\.conv([13])_1x1\.", r".conv\1."),
        (r"\.conv2_kxk\.", ".conv2."),
        (r"\.attn_block\.", ".window."),
        (r"\.attn_grid\.", ".grid."),
        (r"\.attn\.rel_pos\.relative_position_bias_table$", ".mixer.bias_table"),
        (r"\.attn\.(qkv|proj)\.", r".mixer.\1."),
    ],
    convert=_convert,
)
def maxvit(
    *,
    depths: Sequence[int] = (2, 2, 5, 2),
    dims: Sequence[int] = (64, 128, 256, 512),
    stem: int = 64,
    strides: Sequence[int] = (2, 2, 2, 2, 2),
    head_dim: int = 32,
    window: int = 7,
    drop_path: float = 0.0,
    init_std: float | None = 0.02,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    pad: bool = False,
) -> nn.Module:
    """A MaxViT.

    Args:
        depths, dims: blocks and channels of each stage.
        stem: channels of the stem.
        strides: steps of the stem and of the first block of each stage.
        head_dim: channels of an attention head.
        window: side of windows and lattices in tokens.
        init_std: deviation of the first weights, None for `fan_in ** -0.5`.
        num_classes: 0 gives the pooled vector behind the head's first layer.
        pad: take any image, by padding maps to whole windows; small maps take smaller windows.

    Raises:
        ValueError: `depths`, `dims` and `strides` do not match, `head_dim` does not divide a width, or the image does
            not fit without `pad`.
    """
    if len(depths) != len(dims) or len(strides) != len(dims) + 1:
        raise ValueError(
            f"depths and dims must be of one length and strides one longer, got {tuple(depths)}, {tuple(dims)} and "
            f"{tuple(strides)}"
        )
    if not all(depths) or not stem:
        raise ValueError(f"depths and stem must be at least 1, got {tuple(depths)} and {stem}")
    if any(dim % head_dim for dim in dims):
        raise ValueError(f"head_dim must divide every width, got {head_dim} for {tuple(dims)}")
    multiple, total = None, strides[0]
    if not pad:
        multiple = 1
        for stride in strides[1:]:
            total *= stride
            multiple = lcm(multiple, total * window)
        _refuse_misfit(pair(img_size), multiple)
    h, w = (-(-side // strides[0]) for side in pair(img_size))
    stages: list[list[nn.Module]] = []
    before, place = stem, 0
    for dim, depth, stride in zip(dims, depths, strides[1:], strict=True):
        h, w = -(-h // stride), -(-w // stride)
        # Strict maps are whole windows; the table is then made for `window`, whatever `img_size` is.
        grid = (h, w) if pad else (window, window)
        stage: list[nn.Module] = []
        for i in range(depth):
            rate = drop_path * place / sum(depths)
            stage.append(
                MaxViTBlock(
                    before,
                    dim,
                    stride=1 if i else stride,
                    heads=dim // head_dim,
                    window=window,
                    grid=grid,
                    drop_path=rate,
                )
            )
            before, place = dim, place + 1
        stages.append(stage)
    head = nn.Sequential(Classifier(dims[-1], dims[-1], norm=nn.LayerNorm), nn.Tanh())
    if num_classes:
        head.append(nn.Linear(dims[-1], num_classes))
    model = Pyramid(
        Stem(in_chans, stem, stride=strides[0], multiple=multiple),
        stages,
        [nn.Identity() for _ in dims[1:]],
        norm=None,
        head=head,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=init_std or module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, WindowAttention):
            nn.init.normal_(module.bias_table, std=0.02)
    return model
