"""NDDR-CNN: networks of several dense tasks, side by side, that hear each other after every stage.

Source: Gao et al. 2019, "NDDR-CNN: Layerwise Feature Fusing in Multi-Task CNNs by Neural Discriminative Dimensionality
Reduction".

- each task has a VGG-16-DeepLab-LargeFOV of its own (output stride 8); `gossamer.layers.nddr.Nddr` fuses their
  features after the pooling of each of the five stages
- `shortcut`: all five fused features, brought to one size, are what the answer is made from; the gradient then
  reaches every fusion directly
- `nddr_vit_*` is the same for transformers: the fusion works on tokens, with LayerNorm, without an activation, gated;
  the paper names the form, the sizes are ours
- `fused=False` gives the single-task networks, which the authors train first; their weights are those of `branches.k`
- the authors' fusion ends in ReLU, by the defaults of their code; the paper does not say whether it should
- two related tasks with 40 images gain from the fusion a little, by the authors' protocol (`benchmarks/multi_task.py`,
  five seeds): normals are 15.9 degrees off, 17.0 without it and 16.4 before the second training; the mean overlap of
  kinds is 23.7 %, 23.4 without it, higher in three seeds
- released in TensorFlow without weights and without a licence: built from the description, with a layout of its own
- there is no task of several dense answers among ours: `loss` and `parameter_groups` are what its training takes
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gossamer.layers.conv import channels_last
from gossamer.layers.init import init_transformer
from gossamer.layers.nddr import Nddr, Start
from gossamer.models.registry import register_system
from gossamer.models.vit import vit
from gossamer.ops.grid import pad_same

IGNORED = 255
NORMAL_WEIGHT = 20.0
# Learning rates, in multiples of the base: fusion, last weights, last biases.
FUSION_RATE, LAST_RATE, LAST_BIAS_RATE = 100, 10, 20
WEIGHT_DECAY = 5e-4

_WIDTHS = (64, 128, 256, 512, 512)


class ConvUnit(nn.Module):
    """`relu(norm(conv(x)))` on maps, channels last in memory."""

    norm_pairs = (("conv", "norm"),)

    def __init__(self, dim: int, out: int, kernel: int, *, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, kernel, padding=kernel // 2 * dilation, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o h w"]:
        return F.relu(self.norm(self.conv(x)))


class VggStage(nn.Module):
    """Convolutions, max-pooling of 3 with TensorFlow's SAME padding, and in the last stage the mean of 3 as well."""

    def __init__(self, dim: int, out: int, depth: int, *, stride: int, dilation: int = 1, mean: bool = False) -> None:
        super().__init__()
        self.convs = nn.Sequential(*(ConvUnit(dim if i == 0 else out, out, 3, dilation=dilation) for i in range(depth)))
        self.stride, self.mean = stride, mean

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j o"]:
        x = self.convs(x.movedim(-1, 1)).movedim(1, -1)
        x = F.max_pool2d(pad_same(x, 3, self.stride, float("-inf")).movedim(-1, 1), 3, self.stride)
        if self.mean:
            # The border's mean counts only what exists.
            x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return x.movedim(1, -1)


class LargeFov(nn.Module):
    """A wide view and an answer for each place: dilated 3x3, two 1x1, of which the last has no norm."""

    def __init__(self, dim: int, hidden: int, out: int, *, dilation: int = 12, drop: float = 0.5) -> None:
        super().__init__()
        self.fc6 = ConvUnit(dim, hidden, 3, dilation=dilation)
        self.fc7 = ConvUnit(hidden, hidden, 1)
        self.drop = nn.Dropout(drop)
        self.last = nn.Conv2d(hidden, out, 1)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b k h w"]:
        x = self.drop(self.fc6(x.movedim(-1, 1)))
        return self.last(self.drop(self.fc7(x)))


class VggBranch(nn.Module):
    """One task's VGG-16-DeepLab-LargeFOV, in stages.

    Args:
        out: channels of the answer.
        reduce: join the features of all stages into this many channels first.
    """

    def __init__(
        self,
        out: int,
        *,
        in_chans: int,
        widths: Sequence[int],
        depths: Sequence[int],
        hidden: int,
        drop: float,
        reduce: int | None,
    ) -> None:
        super().__init__()
        last = len(widths) - 1
        self.stages = nn.ModuleList(
            VggStage(dim, width, depth, stride=2 if i < last - 1 else 1, dilation=2 if i == last else 1, mean=i == last)
            for i, ((dim, width), depth) in enumerate(zip(pairwise((in_chans, *widths)), depths, strict=True))
        )
        self.reduce = ConvUnit(sum(widths), reduce, 1) if reduce else None
        self.head = LargeFov(reduce or widths[-1], hidden, out, drop=drop)

    def start(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b height width i"]:
        return channels_last(image).movedim(1, -1)

    def finish(
        self, stages: Sequence[Float[Tensor, "b _ _ _"]], size: tuple[int, int]
    ) -> Float[Tensor, "b k height width"]:
        x = stages[-1]
        if self.reduce is not None:
            shape = x.shape[1:3]
            x = torch.cat([resized(s.movedim(-1, 1), shape) for s in stages], 1)
            x = self.reduce(x).movedim(1, -1)
        return resized(self.head(x), size)


class VitBranch(nn.Module):
    """One task's ViT, in stages of several blocks; every patch token is answered for."""

    def __init__(self, out: int, *, depths: Sequence[int], **sizes: Any) -> None:
        super().__init__()
        backbone: Any = vit(depth=sum(depths), num_classes=0, **sizes)
        self.stem = backbone.stem
        starts = [sum(depths[:i]) for i in range(len(depths))]
        self.stages = nn.ModuleList(
            nn.Sequential(*backbone.blocks[start : start + depth]) for start, depth in zip(starts, depths, strict=True)
        )
        self.norm = backbone.norm
        self.last = nn.Linear(sizes["dim"], out)

    def start(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b n c"]:
        return self.stem(image)[0]

    def finish(
        self, stages: Sequence[Float[Tensor, "b n c"]], size: tuple[int, int]
    ) -> Float[Tensor, "b k height width"]:
        h, w = self.stem.grid
        tokens = self.last(self.norm(stages[-1]))[:, -h * w :]
        return resized(tokens.unflatten(1, (h, w)).movedim(-1, 1), size)


class NddrNetwork(nn.Module):
    """Branches that run stage by stage, fused after each.

    Args:
        branches: one a task: `start(image)`, `stages`, `finish(features of all stages, size)`.
        nddr: the fusion after each stage, or None for networks that do not hear each other.
    """

    def __init__(self, branches: Sequence[nn.Module], nddr: Sequence[nn.Module] | None) -> None:
        super().__init__()
        self.branches: Any = nn.ModuleList(branches)
        self.nddr = nn.ModuleList(nddr) if nddr is not None else None

    def forward(self, image: Float[Tensor, "b i height width"]) -> tuple[Float[Tensor, "b _ height width"], ...]:
        """An answer `(b, channels, height, width)` for each task."""
        features = [branch.start(image) for branch in self.branches]
        seen: list[list[Tensor]] = [[] for _ in self.branches]
        for i in range(len(self.branches[0].stages)):
            features = [branch.stages[i](x) for branch, x in zip(self.branches, features, strict=True)]
            if self.nddr is not None:
                features = self.nddr[i](features)
            for own, x in zip(seen, features, strict=True):
                own.append(x)
        size = (int(image.shape[2]), int(image.shape[3]))
        return tuple(branch.finish(own, size) for branch, own in zip(self.branches, seen, strict=True))


def resized(x: Float[Tensor, "b c h w"], size: Sequence[int]) -> Float[Tensor, "b c i j"]:
    return x if tuple(x.shape[2:]) == tuple(size) else F.interpolate(x, tuple(size), mode="bilinear")


def segmentation_loss(
    scores: Float[Tensor, "b k h w"], labels: Int[Tensor, "b h w"], ignored: int = IGNORED
) -> Float[Tensor, ""]:
    """Mean cross entropy over the pixels whose label is not `ignored`; 0 where there are none."""
    total = F.cross_entropy(scores, labels.long(), ignore_index=ignored, reduction="sum")
    return total / (labels != ignored).sum().clamp(min=1)


def normal_loss(
    vectors: Float[Tensor, "b 3 h w"], target: Float[Tensor, "b 3 h w"], valid: Bool[Tensor, "b h w"]
) -> Float[Tensor, ""]:
    """`mean(1 - cos(v, t))` over the valid pixels: 0 for parallel vectors, 2 for opposite ones."""
    off = 1 - (F.normalize(vectors, dim=1) * F.normalize(target, dim=1)).sum(1)
    return torch.where(valid, off, 0).sum() / valid.sum().clamp(min=1)


def loss(
    answers: Sequence[Float[Tensor, "b _ h w"]],
    labels: Int[Tensor, "b h w"],
    normals: Float[Tensor, "b 3 h w"],
    valid: Bool[Tensor, "b h w"],
) -> Float[Tensor, ""]:
    """`segmentation + 20 normals`, the paper's pair of tasks; its third term, `|W|^2`, is the groups' weight decay."""
    return segmentation_loss(answers[0], labels) + NORMAL_WEIGHT * normal_loss(answers[1], normals, valid)


def parameter_groups(model: NddrNetwork, lr: float = 1e-3) -> list[dict[str, Any]]:
    """Groups for an optimiser, each parameter in one: the networks, the last weights, the last biases, the fusion.

    The authors take SGD with momentum 0.9 and a rate that falls as `(1 - t / T)^0.9`.
    """
    rates = {"network": 1, "last weight": LAST_RATE, "last bias": LAST_BIAS_RATE, "fusion": FUSION_RATE}
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        if name.startswith("nddr."):
            groups["fusion"].append(parameter)
        elif name.endswith(("last.weight", "last.bias")):
            groups[f"last {name.rpartition('.')[2]}"].append(parameter)
        else:
            groups["network"].append(parameter)
    return [
        {"name": name, "params": found, "lr": lr * rates[name], "weight_decay": WEIGHT_DECAY}
        for name, found in groups.items()
        if found
    ]


_VIT_TINY: dict[str, Any] = dict(backbone="vit", dim=192, depths=(3, 3, 3, 3), heads=3)


@register_system(
    "nddr-cnn",
    variants={
        "nddr_cnn_vgg16": {},
        "nddr_cnn_vgg16_shortcut": {"shortcut": True},
        "nddr_vit_tiny": _VIT_TINY,
    },
)
def nddr_cnn(
    *,
    backbone: Literal["vgg", "vit"] = "vgg",
    outputs: Sequence[int] = (40, 3),
    fused: bool = True,
    shortcut: bool = False,
    alpha: float = 0.9,
    beta: float | None = None,
    start: Start = "constant",
    plain: bool = False,
    widths: Sequence[int] = _WIDTHS,
    depths: Sequence[int] = (2, 2, 3, 3, 3),
    hidden: int = 1024,
    reduce: int = 512,
    drop: float = 0.5,
    dim: int = 192,
    heads: int = 3,
    patch: int = 16,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
) -> nn.Module:
    """Networks of several dense tasks with NDDR between them.

    Args:
        backbone: `vgg` (`widths`, `hidden`, `reduce`, `drop`) or `vit` (`dim`, `heads`, `patch`, `img_size`); both take
            `depths`, blocks in each stage.
        outputs: channels of each task's answer.
        fused: False gives networks that do not hear each other; one task is allowed then.
        shortcut: of VGG: answer from the features of all stages.
        alpha, beta, start: of the fusion, see `Nddr`.
        plain: fusion without norm and activation, as in cross-stitch units.

    Raises:
        ValueError: fewer than two tasks to fuse, or a shortcut for transformers.
    """
    if backbone not in ("vgg", "vit"):
        raise ValueError(f"backbone must be vgg or vit, got {backbone!r}")
    if shortcut and backbone == "vit":
        raise ValueError("shortcut joins the stages of a VGG, whose sizes differ; got backbone='vit'")
    if backbone == "vgg" and len(widths) != len(depths):
        raise ValueError(f"widths and depths must be of one length, got {tuple(widths)} and {tuple(depths)}")
    if not outputs:
        raise ValueError("outputs must name at least one task")
    branches: list[nn.Module] = []
    for out in outputs:
        if backbone == "vgg":
            branches.append(
                VggBranch(
                    out,
                    in_chans=in_chans,
                    widths=widths,
                    depths=depths,
                    hidden=hidden,
                    drop=drop,
                    reduce=reduce if shortcut else None,
                )
            )
        else:
            sizes = dict(dim=dim, heads=heads, patch=patch, img_size=img_size, in_chans=in_chans, pad=True)
            branches.append(VitBranch(out, depths=depths, **sizes))
            init_transformer(branches[-1])
    fusion = None
    if fused:
        make: Any = partial(Nddr, tasks=len(outputs), alpha=alpha, beta=beta, start=start)
        if backbone == "vit":
            make = partial(make, norm=nn.LayerNorm, act=nn.Identity, gated=True)
        if plain:
            make = partial(make, norm=None, act=nn.Identity, gated=False)
        fusion = [make(width) for width in (widths if backbone == "vgg" else [dim] * len(depths))]
    return NddrNetwork(branches, fusion)
