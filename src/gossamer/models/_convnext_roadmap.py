"""The way from ResNet-50 to ConvNeXt-T, step by step: each step keeps what the ones before it changed.

Source: Liu et al. 2022, "A ConvNet for the 2020s", section 2 and figure 2.

- between stages, the first block of a stage strides in its spatial convolution, as a ResNet's does, until the last
  step gives merging layers of their own; that step is ConvNeXt-T itself
- a convolution has a bias where no norm follows it
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import BatchNorm, Classifier, Conv, ConvNorm
from gossamer.layers.conv import channels_last, max_pool
from gossamer.trunks import Pyramid

STEPS = (
    "resnet50",
    "stage_ratio",
    "patchify",
    "depthwise",
    "inverted",
    "depthwise_first",
    "kernel7",
    "gelu",
    "one_activation",
    "one_norm",
    "layer_norm",
    "downsampling",
)
"""`depthwise` widens the network to 96 channels too; `downsampling` is ConvNeXt-T."""


class RoadBlock(nn.Module):
    """`y = act(x + c3(act(c2(act(c1(x))))))`, or with one activation `y = x + c3(act(c2(c1(x))))`.

    The three convolutions are 1x1, spatial, 1x1, or the spatial one first.

    Args:
        hidden: channels inside.
        groups: of the spatial convolution, None for depth-wise.
        first: the spatial convolution comes first, on the block's own channels.
        busy: activations and norms after every convolution, the former after the sum too; `(acts, norms)`.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        hidden: int,
        *,
        stride: int,
        kernel: int,
        groups: int | None,
        first: bool,
        act: Callable[[], nn.Module],
        norm: Callable[[int], nn.Module],
        busy: tuple[bool, bool],
    ) -> None:
        super().__init__()
        inner = dim if first else hidden
        spatial = (inner, inner, kernel, stride, groups or inner)
        points = [(dim, hidden, 1, 1, 1), (hidden, out, 1, 1, 1)]
        plan = [spatial, *points] if first else [points[0], spatial, points[1]]
        acts, norms = busy
        parts: list[nn.Module] = []
        for i, (a, b, k, s, g) in enumerate(plan):
            normed = norms or i == 0
            acted = i < 2 if acts else i == 1
            parts.append(Conv(a, b, k, stride=s, groups=g, bias=not normed))
            parts += [norm(b)] if normed else []
            parts += [act()] if acted else []
        self.branch = nn.Sequential(*parts)
        self.shortcut: nn.Module | None = None
        if stride > 1 or dim != out:
            self.shortcut = ConvNorm(dim, out, 1, stride=stride, bias=False, norm=norm)
        self.act = act() if acts else None

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j o"]:
        y = self.branch(x) + (x if self.shortcut is None else self.shortcut(x))
        return y if self.act is None else self.act(y)


class RoadStem(nn.Module):
    """A convolution 7x7 by 2 with max-pooling by 2, or 4x4 patches; a norm, and an activation where there are many."""

    def __init__(self, in_chans: int, dim: int, *, patches: bool, act: bool, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.patches = patches
        kernel, stride, padding = (4, 4, 0) if patches else (7, 2, 3)
        self.conv = ConvNorm(in_chans, dim, kernel, stride=stride, padding=padding, bias=False, norm=norm)
        self.act = act

    def forward(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b h w c"]:
        x = self.conv(channels_last(image).movedim(1, -1))
        x = F.relu(x) if self.act else x
        return x if self.patches else max_pool(x, 3, 2, 1)


def roadmap_network(step: str, dim: int = 96, *, in_chans: int = 3, num_classes: int = 1000) -> nn.Module:
    """The network at `step`, before `downsampling`.

    Args:
        dim: channels of the first stage from `depthwise` on; two thirds of it before, the paper's 96 and 64.

    Raises:
        ValueError: no such step.
    """
    if step not in STEPS[:-1]:
        raise ValueError(f"roadmap must be one of {', '.join(STEPS)}; got {step!r}")
    done = {name: STEPS.index(step) >= i for i, name in enumerate(STEPS)}
    width = dim if done["depthwise"] else 2 * dim // 3
    depths = (3, 3, 9, 3) if done["stage_ratio"] else (3, 4, 6, 3)
    norm: Any = partial(nn.LayerNorm, eps=1e-6) if done["layer_norm"] else BatchNorm
    act = nn.GELU if done["gelu"] else nn.ReLU
    # A bottleneck is narrow inside; inverted, it is four times as wide inside as the stage.
    dims = [(1 if done["inverted"] else 4) * width * 2**i for i in range(len(depths))]
    before = width
    stages = []
    for i, (out, depth) in enumerate(zip(dims, depths, strict=True)):
        blocks = []
        for j in range(depth):
            hidden = 4 * out if done["inverted"] else out // 4
            blocks.append(
                RoadBlock(
                    before,
                    out,
                    hidden,
                    stride=2 if i and not j else 1,
                    kernel=7 if done["kernel7"] else 3,
                    groups=None if done["depthwise"] else 1,
                    first=done["depthwise_first"],
                    act=act,
                    norm=norm,
                    busy=(not done["one_activation"], not done["one_norm"]),
                )
            )
            before = out
        stages.append(blocks)
    stem = RoadStem(in_chans, width, patches=done["patchify"], act=not done["one_activation"], norm=norm)
    merges = [nn.Identity() for _ in dims[1:]]
    return Pyramid(stem, stages, merges, norm=None, head=Classifier(before, num_classes))
