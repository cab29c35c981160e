"""CrossViT: two vision transformers on one image, small and large patches, whose class tokens visit the other branch.

Source: Chen et al. 2021, "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification".

- fusion is attention with a single query, so its cost is linear in tokens; it replaces the class token and leaves the
  patches as they are, and both directions read what the encoders gave
- each branch resizes the image (bicubic) to whole patches of its own: 240 pixels are 240 and 224, 408 are 408 and 384.
  The released code compares heights alone and resizes to squares; here each axis has its own size
- `conv_stem` (the dagger variants) has three convolutions in place of each patch embedding, for patches of 12 and 16
- the fusion's three input products are one here; position tables of another resolution are resized (bicubic)
- released configurations have one cross-attention a fusion; the code's option for several is not here
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import Block, Classifier, DropPath, Mlp, PatchEmbed, TokenStem, resize_positions
from gossamer.layers.blocks import drop_path_rates
from gossamer.layers.conv import Conv2d, channels_last
from gossamer.layers.embed import pair
from gossamer.layers.init import init_transformer
from gossamer.mixers import create_mixer
from gossamer.models._pyramids import BUDGETS
from gossamer.models.registry import State, register_system

# Kernel, stride and padding of the stem's three convolutions, by patch side.
_CONVS = {12: ((7, 4, 3), (3, 3, 0), (3, 1, 1)), 16: ((7, 4, 3), (3, 2, 1), (3, 2, 1))}

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class ConvStem(nn.Module):
    """Patches by three convolutions with ReLU between, `dim / 4`, `dim / 2` and `dim` channels wide.

    Args:
        patch: side of a patch in pixels, 12 or 16.
    """

    def __init__(self, in_chans: int, dim: int, patch: int) -> None:
        super().__init__()
        if patch not in _CONVS:
            raise ValueError(f"conv_stem has patches of {' or '.join(map(str, _CONVS))} pixels, got patch={patch}")
        widths = (in_chans, dim // 4, dim // 2, dim)
        self.convs = nn.ModuleList(
            Conv2d(a, b, *sizes) for a, b, sizes in zip(widths, widths[1:], _CONVS[patch], strict=False)
        )

    def forward(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b h w c"]:
        x = self.convs[0](channels_last(image))
        for conv in self.convs[1:]:
            x = conv(F.relu(x))
        return x.movedim(1, -1)


class Fusion(nn.Module):
    """The class token of one branch reads the patches of the other, in the other's width, and comes back.

    `p = E gelu(norm(c))`, `y = p + attend(norm(p), norm([p; patches]))`, `c' = L gelu(norm(y))`

    Args:
        dim: channels of the class token.
        other: channels of the patches.
        heads: attention heads.
        drop_path: probability of dropping the attention for a sample.
    """

    def __init__(self, dim: int, other: int, heads: int, *, drop: float = 0.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.enter = nn.Sequential(LayerNorm(dim), nn.GELU(), nn.Linear(dim, other))
        self.norm = LayerNorm(other)
        self.mixer = create_mixer("attention", other, heads=heads, drop=drop)
        self.drop_path = DropPath(drop_path)
        self.leave = nn.Sequential(LayerNorm(other), nn.GELU(), nn.Linear(other, dim))

    def forward(self, token: Float[Tensor, "b 1 c"], patches: Float[Tensor, "b n e"]) -> Float[Tensor, "b 1 c"]:
        visitor = self.enter(token)
        seen = self.norm(torch.cat((visitor, patches), 1))
        visitor = visitor + self.drop_path(self.mixer(seen[:, :1], context=seen))
        return self.leave(visitor)


class MultiScaleBlock(nn.Module):
    """Encoder blocks in each branch, then both class tokens visit the other branch.

    Args:
        encoders: the blocks of each branch.
        fusions: of each branch's class token.
    """

    def __init__(self, encoders: Sequence[Sequence[nn.Module]], fusions: Sequence[Fusion]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Sequential(*blocks) for blocks in encoders)
        self.fusions = nn.ModuleList(fusions)

    def forward(
        self, small: Float[Tensor, "b n c"], large: Float[Tensor, "b m e"]
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b m e"]]:
        small, large = self.encoders[0](small), self.encoders[1](large)
        tokens = self.fusions[0](small[:, :1], large[:, 1:]), self.fusions[1](large[:, :1], small[:, 1:])
        return torch.cat((tokens[0], small[:, 1:]), 1), torch.cat((tokens[1], large[:, 1:]), 1)


class CrossVit(nn.Module):
    """Stems, multi-scale blocks, and the mean of two classifiers.

    Args:
        in_chans: image channels.
        sizes: height and width of the image each branch reads.
        stems: image to tokens, by branch.
        heads: tokens to logits, by branch, each with a norm.
    """

    def __init__(
        self,
        in_chans: int,
        sizes: Sequence[tuple[int, int]],
        stems: Sequence[TokenStem],
        blocks: Sequence[MultiScaleBlock],
        heads: Sequence[Classifier],
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.sizes = tuple(sizes)
        self.stems = nn.ModuleList(stems)
        self.blocks = nn.ModuleList(blocks)
        self.heads = nn.ModuleList(heads)

    def encode(self, image: Float[Tensor, "b i height width"]) -> tuple[Tensor, Tensor]:
        """The tokens of both branches after the last block, not normalised."""
        if image.shape[1] != self.in_chans:
            raise ValueError(f"the image must have {self.in_chans} channels (in_chans), got {image.shape[1]}")
        branches = []
        for size, stem in zip(self.sizes, self.stems, strict=True):
            fits = tuple(image.shape[2:]) == size
            branches.append(stem(image if fits else F.interpolate(image, size, mode="bicubic"))[0])
        small, large = branches
        for block in self.blocks:
            small, large = block(small, large)
        return small, large

    def forward(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b k"]:
        one, two = (head(x) for head, x in zip(self.heads, self.encode(image), strict=True))
        # Without classes: both class tokens, side by side.
        return torch.cat((one, two), -1) if self.heads[0].fc is None else (one + two) / 2

    def features(self, image: Float[Tensor, "b i height width"]) -> list[Float[Tensor, "b h w c"]]:
        """The normalised map of each branch, small patches first."""
        maps = []
        for x, stem, head in zip(self.encode(image), self.stems, self.heads, strict=True):
            maps.append(cast(Any, head).norm(x[:, 1:]).unflatten(1, stem.grid))
        return maps


def _sizes(img_size: int | tuple[int, int], patches: Sequence[int]) -> list[tuple[int, int]]:
    """Whole small patches, and whole large patches over 14/15 of that: 240 and 224, 408 and 384."""

    def whole(side: float, patch: int) -> int:
        return max(1, round(side / patch)) * patch

    small = [whole(side, patches[0]) for side in pair(img_size)]
    large = [whole(side * 14 / 15, patches[1]) for side in small]
    return [(small[0], small[1]), (large[0], large[1])]


def _convert(model: Any, state: State) -> State:
    for key in [key for key in state if ".mixer.wq." in key]:
        parts = [state.pop(key.replace(".wq.", f".{name}.")) for name in ("wq", "wk", "wv")]
        state[key.replace(".wq.", ".qkv.")] = torch.cat(parts)
    for i, stem in enumerate(model.stems):
        key = f"stems.{i}.positions"
        if key in state and state[key].shape != stem.positions.shape:
            side = round((state[key].shape[1] - 1) ** 0.5)
            state[key] = resize_positions(state[key], (side, side), stem.grid, prefix=1)
    return state


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    most, widest, depths, blocks = {
        "xs": (192, 48, (1, 2), 1),
        "s": (224, 80, (1, 3), 2),
        "m": (288, 112, (1, 4), 3),
        "l": (384, 192, (1, 4), 3),
    }[size]
    # A branch resizes what it reads, so a large image need not cost more than the model.
    height, width = spec["img_size"]
    side, chans = min(max(height, width), most), spec["in_chans"]
    img_size = (round(height * side / max(height, width)), round(width * side / max(height, width)))
    # Some eight and five patches a side: two to one where the image is small, as in the paper where it is large.
    small = max(1, round(side / 8))
    patches = (12, 16) if 80 <= side <= 120 else (small, 2 * small if side < 80 else round(small * 4 / 3))
    sizes = _sizes(img_size, patches)
    grids = [(h // p, w // p) for (h, w), p in zip(sizes, patches, strict=True)]

    def macs(dim: int) -> float:
        total = 0.0
        for d, e, p, (h, w), depth in zip((dim, 2 * dim), (2 * dim, dim), patches, grids, depths, strict=True):
            n = h * w + 1
            total += n * d * p * p * chans + blocks * (depth * n * d * (10 * d + 2 * n) + 2 * n * d * d + 4 * d * e)
        return total

    dim = min(range(16, widest + 1, 16), key=lambda d: abs(macs(d) - BUDGETS[size]))
    options = dict(dims=(dim, 2 * dim), heads=(dim // 16, dim // 16), patches=patches, depths=depths, blocks=blocks)
    return "crossvit_9", {**options, **spec, "img_size": img_size}


def _variants() -> dict[str, dict[str, Any]]:
    wide: dict[str, Any] = dict(depths=(1, 4), mlp_ratio=4.0)
    sizes: dict[str, dict[str, Any]] = {
        "tiny": dict(dims=(96, 192), heads=(3, 3), **wide),
        "small": dict(dims=(192, 384), heads=(6, 6), **wide),
        "base": dict(dims=(384, 768), heads=(12, 12), **wide),
        "9": dict(dims=(128, 256), heads=(4, 4), depths=(1, 3)),
        "15": dict(dims=(192, 384), heads=(6, 6), depths=(1, 5)),
        "18": dict(dims=(224, 448), heads=(7, 7), depths=(1, 6)),
    }
    dagger = {f"{name}_dagger": {**sizes[name], "conv_stem": True} for name in ("9", "15", "18")}
    found = {f"crossvit_{name}{end}": s for name, s in chain(sizes.items(), dagger.items()) for end in ("", "_224")}
    # Called by the side that the large branch reads.
    return found | {f"crossvit_{name}_384": {**dagger[name], "img_size": 408} for name in ("15_dagger", "18_dagger")}


@register_system(
    "crossvit",
    tasks=("image-classification",),
    scale=_scale,
    variants=_variants(),
    rules=[
        # timm's names of the same tensors.
        (r"^(pos_embed|cls_token)_(\d)$", r"\1.\2"),
        (r"^patch_embed\.(\d)\.proj\.0\.", r"stems.\1.embed.convs.0."),
        (r"^patch_embed\.(\d)\.proj\.2\.", r"stems.\1.embed.convs.1."),
        (r"^patch_embed\.(\d)\.proj\.4\.", r"stems.\1.embed.convs.2."),
        (r"^patch_embed\.(\d)\.", r"stems.\1.embed."),
        (r"^pos_embed\.(\d)$", r"stems.\1.positions"),
        (r"^cls_token\.(\d)$", r"stems.\1.tokens"),
        (r"\.attn\.", ".mixer."),
        (r"^(blocks\.\d+)\.blocks\.", r"\1.encoders."),
        (r"^(blocks\.\d+)\.projs\.(\d)\.", r"\1.fusions.\2.enter."),
        (r"^(blocks\.\d+)\.revert_projs\.(\d)\.", r"\1.fusions.\2.leave."),
        (r"^(blocks\.\d+)\.fusion\.(\d)\.norm1\.", r"\1.fusions.\2.norm."),
        (r"^(blocks\.\d+)\.fusion\.", r"\1.fusions."),
        (r"^norm\.(\d)\.", r"heads.\1.norm."),
        (r"^head\.(\d)\.", r"heads.\1.fc."),
    ],
    convert=_convert,
)
def crossvit(
    *,
    dims: Sequence[int] = (128, 256),
    heads: Sequence[int] = (4, 4),
    depths: Sequence[int] = (1, 3),
    blocks: int = 3,
    patches: Sequence[int] = (12, 16),
    mlp_ratio: float = 3.0,
    conv_stem: bool = False,
    drop: float = 0.0,
    drop_path: float = 0.0,
    img_size: int | tuple[int, int] = 240,
    in_chans: int = 3,
    num_classes: int = 1000,
) -> nn.Module:
    """A CrossViT.

    Args:
        dims: channels of the branch of small patches and of that of large ones; likewise `heads`, `depths` and
            `patches` (sides in pixels).
        depths: encoder blocks of each branch in a multi-scale block.
        blocks: multi-scale blocks.
        conv_stem: three convolutions in place of each patch embedding.
        img_size: what the small branch reads, rounded to whole patches; the large one reads 14/15 of it. Images of
            any size are resized to these.

    Raises:
        ValueError: not two branches, heads that do not divide their width, or no convolutional stem for a patch.
    """
    for name, value in (("dims", dims), ("heads", heads), ("depths", depths), ("patches", patches)):
        if len(value) != 2:
            raise ValueError(f"{name} must have one entry for each of the two branches, got {tuple(value)}")
    if not any(depths):
        raise ValueError(f"depths must have an encoder block in one branch at least, got {tuple(depths)}")
    sizes = _sizes(img_size, patches)
    stems = []
    for dim, patch, (height, width) in zip(dims, patches, sizes, strict=True):
        embed = (ConvStem if conv_stem else PatchEmbed)(in_chans, dim, patch)
        stems.append(TokenStem(embed, dim, (height // patch, width // patch), drop=drop))
    # A slice of rates for each multi-scale block: encoder block i takes rate i, fusion the last.
    longest = max(depths)
    rates = drop_path_rates(drop_path, blocks * longest)
    stages = []
    for start in range(0, blocks * longest, longest):
        mine = rates[start : start + longest]
        encoders = [
            [
                Block(
                    dim,
                    create_mixer("attention", dim, heads=count, drop=drop),
                    Mlp(dim, int(dim * mlp_ratio), drop=drop),
                    norm=LayerNorm,
                    drop_path=rate,
                )
                for rate in mine[:depth]
            ]
            for dim, count, depth in zip(dims, heads, depths, strict=True)
        ]
        fusions = [
            Fusion(dims[i], dims[1 - i], heads[1 - i], drop=drop, drop_path=mine[-1] if mine else 0.0) for i in (0, 1)
        ]
        stages.append(MultiScaleBlock(encoders, fusions))
    classifiers = [Classifier(dim, num_classes, pool="token", norm=LayerNorm) for dim in dims]
    model = CrossVit(in_chans, sizes, stems, stages, classifiers)
    init_transformer(model)
    return model
