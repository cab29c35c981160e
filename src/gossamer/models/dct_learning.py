"""Learning in the frequency domain: a convolutional network reads cosine coefficients of blocks in place of pixels.

Source: Xu et al. 2020, "Learning in the Frequency Domain".

- the strided stem is left out; channels of one frequency each, at an eighth of the image's side, enter the first stage
- static selection keeps 6 to 64 of the 192 channels (`SUBSETS`: luma and low frequencies); `gate=True` is the learned
  selection that such lists come from: each sample opens or closes each channel, by a straight-through Gumbel choice in
  training and the likelier side after it; `gate.share` is what a loss adds to make channels close
- two inputs: coefficients `(b, channels, h / 8, w / 8)`, as in the paper, or (`pixels=True`) images, transformed and
  normalised inside; statistics are measured in training, and images a block does not divide are filled up with zeros
- libjpeg's quality 100 rounds coefficients; here nothing is rounded. Sides are multiples of 8, not of 16: chroma is
  that of the image at twice its size, so that its half resolution has whole blocks too
- the described ResNet halves its maps in three stages (56, 28, 14, 7, 3.9 GMACs); the released code's does not in the
  second (56, 56, 28, 14, 13.5 GMACs): `released=True`, for which the released weights were trained
- tiny images are not what it is for: of 32x32 pixels, 24 channels teach a small network less than the mean-reduced RGB
  image of as many numbers (CIFAR-10, 4,000 images: 41 % against 45 % with blocks of 8, 46 % against 48 % with 4)
- the authors' gate is not in their released file, so its names come from the paper's description
- ResNet-50 and MobileNetV2 on RGB are the paper's baselines
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import BatchNorm, Classifier, ConvNorm
from gossamer.layers.conv import channels_last
from gossamer.layers.embed import pair
from gossamer.layers.mobile import InvertedResidual
from gossamer.layers.resnet import (
    RESNET_RULES,
    Kind,
    ResNetStem,
    init_resnet,
    resnet,
    resnet_dims,
    resnet_stages,
)
from gossamer.layers.stem import ConvStem
from gossamer.models._pyramids import small_pyramid
from gossamer.models.registry import State, register_system
from gossamer.ops.frequency import block_dct, jpeg_channels
from gossamer.ops.grid import pad_to_multiple
from gossamer.trunks import Pyramid


def _square(*rows: int) -> tuple[int, ...]:
    """The first `rows[u]` coefficients of row u of an 8x8 block."""
    return tuple(8 * u + v for u, count in enumerate(rows) for v in range(count))


SUBSETS: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    6: (_square(2, 2), _square(1)),
    24: (_square(4, 4, 4, 4), _square(2, 2)),
    32: (_square(5, 5, 5, 4, 3), _square(3, 2)),
    48: (_square(6, 6, 6, 6, 4, 4), _square(3, 3, 2)),
    64: (_square(7, 7, 6, 6, 6, 6, 6), _square(3, 3, 2, 2)),
    192: (_square(*[8] * 8), _square(*[8] * 8)),
}
"""The kept coefficients of luma, and of each chroma, by how many channels they are together."""

# Inner ratio, width, repeats and first stride of MobileNetV2's groups of blocks, by stage.
_MOBILE: tuple[tuple[tuple[int, int, int, int], ...], ...] = (
    ((1, 16, 1, 1),),
    ((6, 24, 2, 2),),
    ((6, 32, 3, 2),),
    ((6, 64, 4, 2), (6, 96, 3, 1)),
    ((6, 160, 3, 2), (6, 320, 1, 1)),
)
_MOBILE_STEM, _MOBILE_HEAD = 32, 1280


class FrequencyGate(nn.Module):
    """`y = g x`, `g` in {0, 1} for each sample and channel, chosen by `l = w relu(norm(W mean(x))) + b` (off, on).

    In training `g` is a sample of softmax(l), with the gradient of the softmax; otherwise it is the likelier side.

    Attributes:
        share: mean of `g` in the last training pass, with its gradient.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, dim)
        self.norm = BatchNorm(dim)
        self.weight = nn.Parameter(torch.randn(dim, 2) * 0.001)
        self.bias = nn.Parameter(torch.tensor([0.1, 2.0]).repeat(dim, 1))
        self.share: Tensor | None = None

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        gates = self.gates(x)
        self.share = gates.mean() if self.training else None
        return x * gates[:, None, None]

    def gates(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b c"]:
        """Which channels are open."""
        seen = F.relu(self.norm(self.fc(x.mean((1, 2)))))
        logits = torch.addcmul(self.bias, seen[..., None], self.weight)
        if self.training:
            return F.gumbel_softmax(logits, hard=True)[..., 1]
        return (logits[..., 1] > logits[..., 0]).to(x.dtype)


class Coefficients(nn.Module):
    """Coefficients as they come, one channel a frequency."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Float[Tensor, "b i height width"]) -> Float[Tensor, "b h w c"]:
        if x.shape[1] != self.channels:
            raise ValueError(f"input must have {self.channels} frequency channels, got {x.shape[1]}")
        return channels_last(x).movedim(1, -1)


class Frequencies(nn.Module):
    """An image's coefficients, each channel less its mean and over its deviation on the training data."""

    def __init__(self, in_chans: int, channels: int, block: int) -> None:
        super().__init__()
        self.block = block
        self.keep = kept(in_chans, channels, block)
        self.norm = BatchNorm(channels, affine=False)

    def forward(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b h w c"]:
        x = pad_to_multiple(image.movedim(1, -1), (self.block, self.block))
        if len(self.keep) == 3:
            # The images are normalised already: there is no half range to take away.
            return self.norm(jpeg_channels(x, self.block, self.keep, centre=0.0))
        planes = [block_dct(x[..., i : i + 1], self.block, k)[:, :, :, 0] for i, k in enumerate(self.keep)]
        return self.norm(torch.cat(planes, -1))


def kept(planes: int, channels: int, block: int) -> list[tuple[int, ...]]:
    """The coefficients kept of each plane, `channels` together; of RGB the planes are luma and two chroma.

    For blocks of 8 and RGB these are the authors' lists where there is one; otherwise low frequencies come first, and a
    chroma keeps a quarter of what luma keeps.

    Raises:
        ValueError: there are not that many coefficients.
    """
    if not planes <= channels <= planes * block * block:
        raise ValueError(f"channels must be {planes} to {planes * block * block} for blocks of {block}, got {channels}")
    if planes == 3 and block == 8 and channels in SUBSETS:
        luma, chroma = SUBSETS[channels]
        return [luma, chroma, chroma]
    order = sorted(range(block * block), key=lambda f: (f // block + f % block, f))
    if planes == 3:
        each = max(1, channels // 6, -(-(channels - block * block) // 2))
        counts = [channels - 2 * each, each, each]
    else:
        counts = [channels // planes + (i < channels % planes) for i in range(planes)]
    return [tuple(sorted(order[:count])) for count in counts]


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    found = small_pyramid(spec, size, block=18, step=8)
    block = found["patch"]
    settings = {
        "backbone": ("basic", found["depths"]),
        "width": found["dims"][0],
        "channels": min(spec["in_chans"] * block * block, max(spec["in_chans"], 64)),
        "block": block,
        "pixels": True,
    }
    return "resnet50_dct24", {**settings, **spec}


def _convert(model: Any, state: State) -> State:
    own = model.state_dict()
    state = _rename_mobile(state)
    for key, value in state.items():
        if key not in own:
            continue
        if key.startswith("stem.1.") and own[key].numel() == value.numel():
            # The gate's 1x1 convolutions: a linear map, and two outputs for each channel.
            state[key] = value.view(own[key].shape)
        elif key.startswith("stages.0.0.") and value.ndim == 4 and own[key].shape[1] < value.shape[1]:
            # A network on fewer channels starts from the first ones, as the authors' does from ImageNet weights.
            state[key] = value[:, : own[key].shape[1]]
    return state


def _rename_mobile(state: State) -> State:
    places = [(i, j) for i, groups in enumerate(_MOBILE) for j in range(sum(repeats for _, _, repeats, _ in groups))]
    # Blocks are counted through, behind the stem where there is one.
    first = int(any(key.startswith("features.0.0.") for key in state))
    renamed = {}
    for key, value in state.items():
        if found := re.fullmatch(r"features\.(\d+)\.conv\.(\d+)\.(\w+)", key):
            block, part = int(found[1]) - first, int(found[2])
            names = ("depthwise", "project") if block == 0 else ("expand", "depthwise", "project")
            i, j = places[block]
            key = f"stages.{i}.{j}.{names[part // 3]}.{('conv', 'norm')[part % 3]}.{found[3]}"
        elif key.startswith("features.0."):
            key = key.replace("features.0.0.", "stem.convs.0.conv.").replace("features.0.1.", "stem.convs.0.norm.")
        renamed[key] = value
    return renamed


@register_system(
    "dct-learning",
    tasks=("image-classification",),
    scale=_scale,
    variants={
        "resnet50_rgb": dict(channels=None, img_size=224),
        **{f"resnet50_dct{n}": dict(channels=n) for n in (192, 64, 48, 32, 24, 6)},
        "resnet50_dct192_gate": dict(channels=192, gate=True),
        "mobilenetv2_rgb": dict(backbone="mobilenetv2", channels=None, img_size=224),
        **{f"mobilenetv2_dct{n}": dict(backbone="mobilenetv2", channels=n, img_size=896) for n in (192, 32, 24)},
    },
    rules=[
        (r"^conv1\.", "stem.conv."),
        (r"^bn1\.", "stem.norm."),
        *((rf"^(?:layer{i + 1}|model\.{i})\.", f"stages.{i}.") for i in range(4)),
        *RESNET_RULES,
        (r"^inp_GM\.inp_gate\.0\.", "stem.1.fc."),
        (r"^inp_GM\.inp_gate\.1\.", "stem.1.norm."),
        (r"^inp_GM\.inp_gate_l\.", "stem.1."),
        (r"^conv\.0\.", "norm.conv."),
        (r"^conv\.1\.", "norm.norm."),
        (r"^(?:fc|classifier)\.", "head.fc."),
    ],
    convert=_convert,
)
def dct_learning(
    *,
    backbone: str | tuple[Kind, Sequence[int]] = "resnet50",
    channels: int | None = 24,
    width: int = 64,
    gate: bool = False,
    released: bool = False,
    pixels: bool = False,
    block: int = 8,
    img_size: int | tuple[int, int] = 448,
    in_chans: int = 3,
    num_classes: int = 1000,
) -> nn.Module:
    """A classifier of frequency channels, or of an RGB image.

    Args:
        backbone: `mobilenetv2`, a name of `layers.resnet.RESNETS`, or kind of block and depths of a ResNet.
        channels: frequency channels that enter the first stage; None for pixels through the usual stem.
        width: channels inside the first stage of a ResNet.
        gate: let each sample choose among the channels.
        released: a ResNet's second stage keeps its map's size, as in the released code.
        pixels: the input is an image, not its coefficients.
        block: side of the transformed blocks in pixels, with `pixels`.

    Raises:
        ValueError: no list of that many channels, or a setting that the input does not have.
    """
    if channels is None and (gate or pixels):
        raise ValueError("gate and pixels are for frequency channels; give channels=")
    if channels is not None and not pixels and channels not in SUBSETS:
        raise ValueError(f"channels must be one of {', '.join(map(str, SUBSETS))}, got {channels}; or give pixels=True")
    height, wide = pair(img_size)
    if channels is not None and not pixels and (height % 8 or wide % 8):
        raise ValueError(f"image sides must be multiples of 8 for coefficients, got {height}x{wide}")
    mobile = backbone == "mobilenetv2"
    if channels is None:
        stem: nn.Module = (
            ConvStem(in_chans, [_MOBILE_STEM], [2], bias=False, act=nn.ReLU6) if mobile else ResNetStem(in_chans, width)
        )
        dim = _MOBILE_STEM if mobile else width
    else:
        stem = nn.Sequential(Frequencies(in_chans, channels, block) if pixels else Coefficients(channels))
        if gate:
            stem.append(FrequencyGate(channels))
        dim = channels
    norm: nn.Module | None = None
    if mobile:
        stages, last = _mobile_stages(dim)
        norm = ConvNorm(last, _MOBILE_HEAD, 1, bias=False, act=nn.ReLU6)
        head = Classifier(_MOBILE_HEAD, num_classes, drop=0.2)
    else:
        kind, depths = resnet(backbone)
        stages = resnet_stages(kind, depths, width, dim, strides=(1, 1, 2, 2) if released else (1, 2, 2, 2))
        head = Classifier(resnet_dims(kind, depths, width)[-1], num_classes)
    model = Pyramid(stem, stages, [nn.Identity()] * (len(stages) - 1), norm=norm, head=head)
    init_resnet(model)
    return model


def _mobile_stages(dim: int) -> tuple[list[list[nn.Module]], int]:
    stages = []
    for groups in _MOBILE:
        blocks: list[nn.Module] = []
        for ratio, out, repeats, stride in groups:
            for j in range(repeats):
                blocks.append(InvertedResidual(dim, out, ratio=ratio, stride=stride if j == 0 else 1))
                dim = out
        stages.append(blocks)
    return stages, dim
