"""FMViT, reconstructed: attention for low frequencies beside convolutions for high ones, branches that merge.

Source: Tan et al. 2023, "FMViT: A multiple-frequency mixing Vision Transformer".

- a reconstruction: no code was ever published and no full text could be read. The claims of the abstract are built on
  the skeleton of Next-ViT (Li et al. 2022), whose sizes the variants have; they are not the paper's models, and no
  accuracy is claimed for them
- sure is the re-parameterised convolution (`gossamer.layers.reparam`): `merge(model.eval())` is exact; merged, S takes
  229 ms where its branches take 389 (one image of 224 pixels, one thread of a CPU)
- ours: two convolution paths (kernels 3 and 5) as the high frequencies; a dense branch and one of two groups in every
  product; keys and values are one product, so the grouped half of keys reads other channels than that of values
- rows that fill no whole cell of the pooled map are not read as keys, as in Next-ViT
- pruning applies to the merged form
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.layers import BatchNorm, Block, Classifier
from gossamer.layers.blocks import drop_path_rates
from gossamer.layers.reparam import MultiBranchConv, MultiBranchMlp, merge
from gossamer.layers.stem import ConvStem
from gossamer.mixers.spatial_reduction import SpatialReduction
from gossamer.models._pyramids import BUDGETS, small_pyramid
from gossamer.models.registry import register_system
from gossamer.trunks import Pyramid

__all__ = ["fmvit", "merge"]


class PooledAttention(SpatialReduction):
    """Spatial-reduction attention by means, its products made of branches (RLMHSA).

    Args:
        dim: channels.
        head_dim: channels of a head.
        ratio: side of the cells that become one key each.
    """

    def __init__(self, dim: int, *, head_dim: int = 32, ratio: int = 1) -> None:
        super().__init__(dim, heads=dim // head_dim, ratio=ratio, reduce="pool", norm=BatchNorm)
        self.q = MultiBranchConv(dim, dim, 1, groups=(1, 2))  # type: ignore[assignment]
        self.kv = MultiBranchConv(dim, 2 * dim, 1, groups=(1, 2))  # type: ignore[assignment]
        self.proj = MultiBranchConv(dim, dim, 1, groups=(1, 2))  # type: ignore[assignment]

    @property
    def norm_readers(self) -> tuple[tuple[str, str], ...]:
        return (("norm", "kv"),) if isinstance(self.kv, nn.Linear) else ()

    @property
    def input_products(self) -> tuple[str, ...]:
        # A mean over whole cells commutes with a scale and a shift; another norm does not.
        return ("q", "kv") if isinstance(self.q, nn.Linear) and not isinstance(self.norm, _BatchNorm) else ()

    def widths(self) -> dict[str, int]:
        """Heads, once the branches are merged."""
        return super().widths() if isinstance(self.q, nn.Linear) else {}


class ConvMixer(nn.Module):
    """`y = W relu(K * x)`, K of a grouped kernel, a grouped point and the identity while training.

    Args:
        dim: channels.
        kernel: side of the kernel.
        head_dim: channels of a group.
    """

    def __init__(self, dim: int, kernel: int, *, head_dim: int = 32) -> None:
        super().__init__()
        self.conv = MultiBranchConv(dim, dim, kernel, groups=(dim // head_dim,), pointwise=True, identity=True)
        self.fc = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        return self.fc(F.relu(self.conv(x)))


class Project(nn.Module):
    """`norm(W mean_2x2(x))`, or `norm(W x)` at stride 1; a mean at the border counts only the tokens that exist."""

    norm_pairs = (("proj", "norm"),)

    def __init__(self, dim: int, out: int, *, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.proj = nn.Linear(dim, out, bias=False)
        self.norm = BatchNorm(out)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j o"]:
        if self.stride > 1:
            image = x.movedim(-1, 1)
            x = F.avg_pool2d(image, self.stride, ceil_mode=True, count_include_pad=False).movedim(1, -1)
        return self.norm(self.proj(x))


def conv_block(dim: int, *, ratio: float, head_dim: int, drop_path: float) -> nn.Module:
    """`x = x + mixer(x)`, `x = x + mlp(norm(x))` (CFB)."""
    return nn.Sequential(
        Block(dim, ConvMixer(dim, 3, head_dim=head_dim), None, norm=None, drop_path=drop_path),
        Block(dim, MultiBranchMlp(dim, int(dim * ratio)), None, norm=BatchNorm, drop_path=drop_path),
    )


class MixBlock(nn.Module):
    """`l = x + attn(norm(x))`, `h_k = P_k l + mixer_k(P_k l)`, `z = [l; h_1; …]`, `y = z + mlp(norm(z))` (FMB).

    Args:
        dim: channels in.
        out: channels out.
        share: of the output channels that are low frequencies, rounded to whole heads; 0 leaves the attention out,
            1 the convolutions.
        kernels: sides of the convolutions; the other channels are dealt out to them in whole groups.
        ratio: hidden channels of the MLP to `out`.
        reduction: side of the cells that become one key each.
        head_dim: channels of a head and of a group.
        drop_path: of the block; the low path has `share` of it and the high ones the rest.

    Raises:
        ValueError: `head_dim` does not divide `out`, or `share` is not in 0..1.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        *,
        share: float = 0.75,
        kernels: Sequence[int] = (3, 5),
        ratio: float = 2.0,
        reduction: int = 1,
        head_dim: int = 32,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if out % head_dim or not 0 <= share <= 1:
            raise ValueError(f"out must be whole heads and share in 0..1; got {out}, {head_dim} a head, share={share}")
        low = min(out, round(share * out / head_dim) * head_dim)
        groups = (out - low) // head_dim
        # The first kernels get one group more where they do not share evenly.
        parts = [(groups // len(kernels) + (i < groups % len(kernels))) * head_dim for i in range(len(kernels))]
        first = low or out
        self.project = Project(dim, first) if dim != first else nn.Identity()
        self.low: nn.Module | None = None
        if low:
            attend = PooledAttention(low, head_dim=head_dim, ratio=reduction)
            self.low = Block(low, attend, None, norm=BatchNorm, drop_path=share * drop_path)
        self.spread = nn.ModuleList()
        self.high = nn.ModuleList()
        for part, kernel in zip(parts, kernels, strict=True):
            if part:
                mix = ConvMixer(part, kernel, head_dim=head_dim)
                self.spread.append(Project(first, part))
                self.high.append(Block(part, mix, None, norm=None, drop_path=(1 - share) * drop_path))
        self.mlp = Block(out, MultiBranchMlp(out, int(out * ratio)), None, norm=BatchNorm, drop_path=drop_path)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w o"]:
        x = self.project(x)
        paths = []
        if self.low is not None:
            x = self.low(x)
            paths.append(x)
        paths += [high(spread(x)) for spread, high in zip(self.spread, self.high, strict=True)]
        return self.mlp(torch.cat(paths, -1) if len(paths) > 1 else paths[0])


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    found = small_pyramid(spec, size, block=12, step=8, least_patch=2)
    patch, depths = found["patch"], found["depths"]
    tokens = -(-spec["img_size"][0] // patch) * -(-spec["img_size"][1] // patch)
    groups = {dim: 8 if dim % 16 else 16 for dim in range(8, found["dims"][0] + 33, 8)}
    # Products grow with the square of the width, grouped convolutions with the width.
    costs = {dim: tokens * sum(depths) * dim * (10.5 * dim + 7 * inner) for dim, inner in groups.items()}
    first = min(costs, key=lambda dim: abs(costs[dim] - BUDGETS[size]))
    dims = tuple(first * 2**i for i in range(len(depths)))
    stem = [2] * (patch.bit_length() - 1) or [1]
    settings = {
        "stem_widths": (first,) * len(stem),
        "stem_strides": tuple(stem),
        "dims": dims,
        # The last stage of every scaled model mixes frequencies, the first one only where it is the last.
        "mixed": (first if len(dims) == 1 else 0, *dims[1:]),
        "depths": depths,
        "reductions": (8, 4, 2, 1)[-len(dims) :],
        "head_dim": groups[first],
        "init_std": None,
    }
    return "fmvit_r_s", {**settings, **spec}


@register_system(
    "fmvit",
    tasks=("image-classification",),
    scale=_scale,
    variants={
        "fmvit_r_s": dict(depths=(3, 4, 10, 3)),
        "fmvit_r_b": dict(depths=(3, 4, 20, 3)),
        "fmvit_r_l": dict(depths=(3, 4, 30, 3)),
        "fmvit_r_nano": dict(
            depths=(1, 2, 5, 1),
            dims=(24, 48, 96, 192),
            mixed=(0, 64, 128, 256),
            stem_widths=(16, 8, 16, 16),
            head_dim=8,
        ),
    },
)
def fmvit(
    *,
    depths: Sequence[int] = (3, 4, 10, 3),
    dims: Sequence[int] = (96, 192, 384, 768),
    mixed: Sequence[int] = (0, 256, 512, 1024),
    reductions: Sequence[int] = (8, 4, 2, 1),
    stem_widths: Sequence[int] = (64, 32, 64, 64),
    stem_strides: Sequence[int] = (2, 1, 1, 2),
    period: int = 5,
    share: float = 0.75,
    kernels: Sequence[int] = (3, 5),
    head_dim: int = 32,
    drop_path: float = 0.0,
    init_std: float | None = 0.02,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
) -> nn.Module:
    """A reconstruction of FMViT.

    Args:
        dims: channels of each stage's convolutional blocks.
        mixed: channels its mixing blocks give, 0 for a stage without them; they are every `period`-th and the last.
        reductions: side of the cells that become one key each, by stage.
        share, kernels, head_dim: of the mixing blocks.
        init_std: deviation of the first weights, None for `fan_in ** -0.5`.
        img_size: not needed; the model takes any image no smaller than its deepest stride.

    Raises:
        ValueError: lists differ in length, `head_dim` does not divide the channels, or an image is too small.
    """
    if not len(depths) == len(dims) == len(mixed) == len(reductions):
        raise ValueError(
            f"depths, dims, mixed and reductions must be of one length, got {tuple(depths)}, {tuple(dims)}, "
            f"{tuple(mixed)} and {tuple(reductions)}"
        )
    if any(dim % head_dim for dim in dims):
        raise ValueError(f"head_dim must divide dims; got head_dim={head_dim}, dims={tuple(dims)}")
    rates = iter(drop_path_rates(drop_path, sum(depths)))
    width = stem_widths[-1]
    stages: list[list[nn.Module]] = []
    merges: list[nn.Module] = []
    for index, (depth, dim, wide, reduction) in enumerate(zip(depths, dims, mixed, reductions, strict=True)):
        blocks: list[nn.Module] = []
        if index:
            merges.append(Project(width, dim, stride=2))
            width = dim
        for i in range(depth):
            rate = next(rates)
            if wide and ((i + 1) % period == 0 or i + 1 == depth):
                options: dict[str, Any] = dict(
                    share=share, kernels=kernels, reduction=reduction, head_dim=head_dim, drop_path=rate
                )
                blocks.append(MixBlock(width, wide, **options))
                width = wide
                continue
            if width != dim:
                blocks.append(Project(width, dim))
                width = dim
            blocks.append(conv_block(dim, ratio=3, head_dim=head_dim, drop_path=rate))
        stages.append(blocks)
    least = 2 ** (len(dims) - 1)
    for stride in stem_strides:
        least *= stride
    model = Pyramid(
        ConvStem(in_chans, stem_widths, stem_strides, bias=False, least=least),
        stages,
        merges,
        norm=BatchNorm(width),
        head=Classifier(width, num_classes),
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=init_std or module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
