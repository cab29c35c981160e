"""ResNet: stages of convolutions with shortcuts, whole or without its stem, giving a map a stage.

Source: He et al. 2015, "Deep Residual Learning for Image Recognition", in the form of torchvision (stride in the 3x3
convolution of a bottleneck).

- `RESNET_RULES` turn torchvision's names inside a stage into those of `Basic` and `Bottleneck`
- batch norms fold into the convolutions before them
"""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers.conv import Conv, ConvNorm, channels_last, max_pool
from gossamer.layers.norms import BatchNorm
from gossamer.layers.stem import ConvStem

Kind = Literal["basic", "bottleneck"]

RESNETS: dict[str, tuple[Kind, tuple[int, ...]]] = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
}

RESNET_RULES: tuple[tuple[str, str], ...] = (
    (r"(stages\.\d+\.\d+)\.conv(\d)\.(?=\w+$)", r"\1.conv\2.conv."),
    (r"(stages\.\d+\.\d+)\.bn(\d)\.", r"\1.conv\2.norm."),
    (r"(stages\.\d+\.\d+)\.downsample\.0\.", r"\1.shortcut.conv."),
    (r"(stages\.\d+\.\d+)\.downsample\.1\.", r"\1.shortcut.norm."),
)


class Basic(nn.Module):
    """`y = relu(norm(W2 relu(norm(W1 x))) + shortcut(x))`, both convolutions 3x3."""

    def __init__(self, dim: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = ConvNorm(dim, width, 3, stride=stride, bias=False)
        self.conv2 = ConvNorm(width, width, 3, bias=False)
        self.shortcut = _shortcut(dim, width, stride)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j o"]:
        y = self.conv2(F.relu(self.conv1(x)))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Bottleneck(nn.Module):
    """`y = relu(norm(W3 relu(norm(W2 relu(norm(W1 x))))) + shortcut(x))`: 1x1, 3x3, and 1x1 to four times the width."""

    def __init__(self, dim: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = ConvNorm(dim, width, 1, bias=False)
        self.conv2 = ConvNorm(width, width, 3, stride=stride, bias=False)
        self.conv3 = ConvNorm(width, 4 * width, 1, bias=False)
        self.shortcut = _shortcut(dim, 4 * width, stride)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j o"]:
        y = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNetStem(nn.Module):
    """A convolution 7x7 by stride 2, then max-pooling 3x3 by stride 2: a map at stride 4."""

    norm_pairs = (("conv", "norm"),)

    def __init__(self, in_chans: int, width: int) -> None:
        super().__init__()
        self.conv = Conv(in_chans, width, 7, stride=2, bias=False)
        self.norm = BatchNorm(width)

    def forward(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b h w c"]:
        x = self.norm(self.conv(channels_last(image).movedim(1, -1)))
        return max_pool(F.relu(x), 3, 2, 1)


class ResNet(nn.Module):
    """A ResNet without its classifier: a map a stage, at strides 4, 8, 16, 32 with the usual stem.

    Args:
        name: one of `RESNETS`, or its kind and depths.
        width: channels inside the first stage, doubled in each that follows.
        stride: None for the usual stem; a number, 1 or even, makes the stem one convolution of that stride.

    Raises:
        ValueError: no such name, or an odd stride above 1.
    """

    def __init__(
        self,
        name: str | tuple[Kind, Sequence[int]] = "resnet50",
        *,
        width: int = 64,
        in_chans: int = 3,
        stride: int | None = None,
    ) -> None:
        super().__init__()
        kind, depths = resnet(name)
        self.stem: nn.Module
        if stride is None:
            self.stem = ResNetStem(in_chans, width)
        else:
            if stride != 1 and stride % 2:
                raise ValueError(f"stride of the stem must be 1 or even, got {stride}")
            self.stem = ConvStem(in_chans, [width], [stride], bias=False)
        self.stride = (stride or 4) * 2 ** (len(depths) - 1)
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in resnet_stages(kind, depths, width, width))
        self.dims = resnet_dims(kind, depths, width)
        init_resnet(self)

    def forward(self, image: Float[Tensor, "b i height width"]) -> list[Float[Tensor, "b _h _w _c"]]:
        x = self.stem(image)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def resnet(name: str | tuple[Kind, Sequence[int]]) -> tuple[Kind, Sequence[int]]:
    """Kind and depths of a ResNet.

    Raises:
        ValueError: no such name.
    """
    if not isinstance(name, str):
        return name
    if name not in RESNETS:
        raise ValueError(f"ResNet must be one of {', '.join(RESNETS)}; got {name!r}")
    return RESNETS[name]


def resnet_dims(kind: Kind, depths: Sequence[int], width: int) -> list[int]:
    """Channels of the map of each stage."""
    return [(4 if kind == "bottleneck" else 1) * width * 2**i for i in range(len(depths))]


def resnet_stages(
    kind: Kind, depths: Sequence[int], width: int, dim: int, *, strides: Sequence[int] = (1, 2, 2, 2)
) -> list[list[nn.Module]]:
    """The blocks of each stage.

    Args:
        dim: channels of the input.
        strides: of each stage's first block.
    """
    block = Bottleneck if kind == "bottleneck" else Basic
    stages: list[list[nn.Module]] = []
    for i, (depth, out) in enumerate(zip(depths, resnet_dims(kind, depths, width), strict=True)):
        stages.append([block(out if j else dim, width * 2**i, stride=1 if j else strides[i]) for j in range(depth)])
        dim = out
    return stages


def init_resnet(model: nn.Module) -> None:
    """`W ~ N(0, 2 / (out * kernel))` for every convolution (He et al. 2015)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _shortcut(dim: int, out: int, stride: int) -> nn.Module | None:
    return ConvNorm(dim, out, 1, stride=stride, bias=False) if stride > 1 or dim != out else None
