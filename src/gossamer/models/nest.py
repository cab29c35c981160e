"""NesT: plain transformers inside blocks of an image, whose neighbours are merged by convolution until one is left.

Source: Zhang et al. 2021, "Nested Hierarchical Transformer: Towards Accurate, Data-Efficient and Interpretable Visual
Understanding".

- blocks form a tree: 16, 4 and 1 of 14x14 tokens at 224 pixels; only the aggregation between levels crosses borders
- the tree can be walked: `gradcat` descends from the image to the block that a class score owes most to
- reversed, the tree draws images from vectors: `Decoder`. Its layers are not in the authors' repository and follow the
  paper's description, with products and pixel shuffles between levels
- the models for CIFAR share one key and value head among all query heads
- the authors' code is JAX, with GELU by tanh; here it is exact, as in timm's `nest_*_jx`, whose weights load. That port
  merges heads with their channels outermost, so the columns of its output products are put back in order
- bound to `img_size`; weights of another size have their position tables resized (bicubic), which timm's own filter
  means to do and does not. Square images that the tree divides, as released, or any with `pad=True`
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from math import isqrt, prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gossamer.layers import Block, Classifier, Conv, Mlp, PatchEmbed, resize_positions
from gossamer.layers.embed import pair
from gossamer.mixers import create_mixer, options_for
from gossamer.models._pyramids import small_pyramid, stage_rates
from gossamer.models.registry import State, register_system
from gossamer.ops import grid as g
from gossamer.trunks import Pyramid

Norm = partial(nn.LayerNorm, eps=1e-6)
Side = tuple[int, int]


class Stem(PatchEmbed):
    """Patches of an image of `img_size`, padded at the end to `full`."""

    def __init__(self, in_chans: int, dim: int, patch: int, *, img_size: Side, full: Side) -> None:
        super().__init__(in_chans, dim, patch)
        self.img_size = img_size
        self.full = full

    def forward(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b h w c"]:
        size = (image.shape[2], image.shape[3])
        if size != self.img_size:
            raise ValueError(
                f"the position tables are for images of {self.img_size[0]}x{self.img_size[1]}, got "
                f"{size[0]}x{size[1]}; build the model with img_size={size}"
            )
        bottom, right = self.full[0] - size[0], self.full[1] - size[1]
        return super().forward(F.pad(image, (0, right, 0, bottom)) if bottom or right else image)


class Inside(nn.Module):
    """A mixer that sees one block at a time: `(b, blocks, tokens, c)`, each block a grid of `side` tokens."""

    def __init__(self, mixer: nn.Module, side: Side) -> None:
        super().__init__()
        self.mixer = mixer
        self.side = side

    def forward(self, x: Float[Tensor, "b t n c"]) -> Float[Tensor, "b t n c"]:
        return self.mixer(x.reshape(-1, *self.side, x.shape[-1])).reshape(x.shape)


class Level(nn.Module):
    """The map cut into blocks, a learned position for every token, transformer layers inside each block.

    Args:
        side: tokens of a block along each axis.
        count: blocks along each axis.
        layers: on `(b, blocks, tokens, dim)`.
    """

    def __init__(self, dim: int, side: Side, count: Side, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.side = side
        self.count = count
        self.positions = nn.Parameter(torch.zeros(1, prod(count), prod(side), dim))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        blocks = g.windows(x, self.side).unflatten(0, (-1, prod(self.count)))
        blocks = self.layers(blocks + self.positions)
        return g.unwindows(blocks.flatten(0, 1), self.side, x.shape[1:3])


class Aggregate(nn.Module):
    """`y = max_pool(norm(conv(x)))`: 2x2 blocks become one, and what lies at their borders meets.

    The convolution is 3x3; so is the pooling, at step 2, over what exists (TensorFlow's SAME).
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.conv = Conv(dim, out, 3)
        self.norm = Norm(out)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j o"]:
        # Even sides: windows at 0, 2, 4, …, the last one token short, are what SAME means.
        return F.max_pool2d(self.norm(self.conv(x)).movedim(-1, 1), 3, 2, ceil_mode=True).movedim(1, -1)


class Spread(nn.Module):
    """`y = pixel_shuffle(W x)`: every token becomes 2x2, every block becomes 2x2 blocks."""

    def __init__(self, dim: int, out: int, factor: int = 2) -> None:
        super().__init__()
        self.factor = factor
        self.fc = nn.Linear(dim, factor * factor * out)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j o"]:
        return F.pixel_shuffle(self.fc(x).movedim(-1, 1), self.factor).movedim(1, -1)


class Decoder(nn.Module):
    """The tree reversed: `image = spread(norm(level_L(… spread(level_1(W z)))))`, 1, 4, 16, … blocks.

    Args:
        latent: channels of the vector an image is drawn from.
        dims, depths, heads: channels, layers and heads of each level, coarsest first.
        side: tokens of a block along each axis.
        patch: pixels of a token along each axis; images have `side * 2^(levels - 1) * patch` on a side.
        out_chans: channels of the image.
    """

    def __init__(
        self,
        latent: int,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        *,
        side: int = 8,
        patch: int = 1,
        out_chans: int = 3,
    ) -> None:
        super().__init__()
        if not len(dims) == len(depths) == len(heads):
            raise ValueError(f"dims, depths and heads must be of one length, got {dims}, {depths} and {heads}")
        self.side = side
        self.fc = nn.Linear(latent, side * side * dims[0])
        self.levels = nn.ModuleList(
            _level(dim, (side, side), (2**i, 2**i), heads=count, rates=[0.0] * depth)
            for i, (dim, depth, count) in enumerate(zip(dims, depths, heads, strict=True))
        )
        self.spreads = nn.ModuleList(Spread(dim, out) for dim, out in pairwise(dims))
        self.norm = Norm(dims[-1])
        self.paint = Spread(dims[-1], out_chans, patch)
        _init(self, 0.02)

    def forward(self, z: Float[Tensor, "b l"]) -> Float[Tensor, "b i height width"]:
        x = self.fc(z).view(z.shape[0], self.side, self.side, -1)
        x = self.levels[0](x)
        for spread, level in zip(self.spreads, list(self.levels)[1:], strict=True):
            x = level(spread(x))
        return self.paint(self.norm(x)).movedim(-1, 1)


def gradcat(
    model: nn.Module, image: Float[Tensor, "b i height width"], label: Int[Tensor, " b"] | None = None
) -> Int[Tensor, "b levels"]:
    """The path through the tree of blocks that a class score owes most to (after the paper's algorithm 1).

    At each node, `argmax_children mean(sum_c max(A d score / d A, 0))` over the map `A` that the children gave to their
    aggregation. The paper sums the products themselves. A norm follows the aggregation's convolution, and no score
    depends on the length of what a norm reads, so that the products cancel just where the evidence lies; their positive
    part does not. A class that a model answers for want of evidence has none to be found.

    Args:
        model: a NesT.
        image: a batch of images.
        label: the classes asked for, the model's own answers if None.

    Returns:
        The child taken at each level, coarsest first: 0 and 1 above, 2 and 3 below, left before right.
    """
    trunk = cast(Pyramid, model)
    with torch.enable_grad():
        maps = trunk.features(image.detach().requires_grad_())
        assert trunk.norm is not None
        scores = trunk.head(trunk.norm(maps[-1]))
        if label is None:
            label = scores.argmax(-1)
        gradients = torch.autograd.grad(scores.gather(1, label[:, None]).sum(), maps[:-1])
    batch = torch.arange(image.shape[0], device=image.device)
    row = column = torch.zeros_like(batch)
    path = []
    for depth, (x, gradient) in enumerate(zip(reversed(maps[:-1]), reversed(gradients), strict=True)):
        cells = 2 ** (depth + 1)
        owed = F.adaptive_avg_pool2d((x * gradient).clamp(min=0).sum(-1)[:, None], cells)[:, 0].detach()
        children = owed.view(-1, cells // 2, 2, cells // 2, 2)[batch, row, :, column].flatten(1)
        child = children.argmax(1)
        row, column = 2 * row + child // 2, 2 * column + child % 2
        path.append(child)
    return torch.stack(path, 1)


def _level(
    dim: int,
    side: Side,
    count: Side,
    *,
    heads: int,
    rates: Sequence[float],
    mixer: str = "attention",
    mixer_options: dict[str, Any] | None = None,
    mlp_ratio: float = 4.0,
) -> Level:
    options = {**options_for(mixer, {"heads": heads}), **(mixer_options or {})}
    layers = [
        Block(
            dim,
            Inside(create_mixer(mixer, dim, grid=side, **options), side),
            Mlp(dim, int(dim * mlp_ratio)),
            norm=Norm,
            drop_path=rate,
        )
        for rate in rates
    ]
    return Level(dim, side, count, layers)


def _init(model: nn.Module, std: float | None) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=std or module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Level):
            nn.init.trunc_normal_(module.positions, std=0.02)


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    found = small_pyramid(spec, size, block=16, step=16, least_patch=2)
    settings = {
        "patch": found["patch"],
        "dims": found["dims"],
        "depths": found["depths"],
        "heads": tuple(dim // 16 if dim % 32 else dim // 32 for dim in found["dims"]),
        "pad": True,
        "init_std": None,
    }
    return "nest_t_224", {**settings, **spec}


def _convert(model: Any, state: State) -> State:
    own = model.state_dict()
    for name, module in model.named_modules():
        table, product = f"{name}.positions", f"{name}.mixer.proj.weight"
        if isinstance(module, Level) and table in state and state[table].shape != own[table].shape:
            state[table] = _resize(state[table], module)
        elif isinstance(module, Inside) and product in state:
            weight, heads = state[product], cast(Any, module.mixer).heads
            state[product] = weight.unflatten(1, (-1, heads)).transpose(1, 2).flatten(1)
    return state


def _resize(table: Tensor, level: Level) -> Tensor:
    """Square blocks of positions joined to a map, resized, and cut into the blocks of `level`."""
    count, side = isqrt(table.shape[1]), isqrt(table.shape[2])
    if (count, count) != level.count:
        return table
    plane = g.unwindows(table[0], (side, side), (count * side, count * side))
    new = (level.count[0] * level.side[0], level.count[1] * level.side[1])
    plane = resize_positions(plane.flatten(1, 2), plane.shape[1:3], new).unflatten(1, new)
    return g.windows(plane, level.side)[None]


_T: dict[str, Any] = dict(dims=(96, 192, 384), depths=(2, 2, 8), heads=(3, 6, 12))
_S: dict[str, Any] = dict(dims=(96, 192, 384), depths=(2, 2, 20), heads=(3, 6, 12))
_B: dict[str, Any] = dict(dims=(128, 256, 512), depths=(2, 2, 20), heads=(4, 8, 16))
_ONE_KEY: dict[str, Any] = dict(mixer="gqa", mixer_options={"kv_heads": 1})
_CIFAR: dict[str, Any] = dict(depths=(3, 3, 3, 3), patch=1, img_size=32, num_classes=10, **_ONE_KEY)


@register_system(
    "nest",
    tasks=("image-classification",),
    scale=_scale,
    variants={
        "nest_t_224": _T,
        "nest_s_224": _S,
        "nest_b_224": _B,
        "nest_t_cifar": dict(dims=(192,) * 4, heads=(3,) * 4, **_CIFAR),
        "nest_s_cifar": dict(dims=(384,) * 4, heads=(6,) * 4, **_CIFAR),
        "nest_b_cifar": dict(dims=(768,) * 4, heads=(12,) * 4, **_CIFAR),
        # timm's names
        "nest_tiny_jx": _T,
        "nest_small_jx": _S,
        "nest_base_jx": _B,
    },
    rules=[
        (r"^patch_embed\.proj\.", "stem.proj."),
        *((rf"^levels\.{i + 1}\.pool\.", f"merges.{i}.") for i in range(3)),
        (r"^levels\.(\d+)\.pos_embed$", r"stages.\1.0.positions"),
        (r"^levels\.(\d+)\.transformer_encoder\.", r"stages.\1.0.layers."),
        (r"\.attn\.", ".mixer.mixer."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ],
    convert=_convert,
)
def nest(
    *,
    dims: Sequence[int] = (96, 192, 384),
    depths: Sequence[int] = (2, 2, 8),
    heads: Sequence[int] = (3, 6, 12),
    patch: int = 4,
    mlp_ratio: float = 4.0,
    drop: float = 0.0,
    drop_path: float = 0.0,
    mixer: str = "attention",
    mixer_options: dict[str, Any] | None = None,
    init_std: float | None = 0.02,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    pad: bool = False,
) -> nn.Module:
    """A NesT.

    Args:
        dims, depths, heads: channels, layers and heads of each level, finest first.
        drop: dropout before the classifier.
        mixer: what mixes the tokens of a block: `attention`, `gqa`, or what else stands in for them.
        init_std: deviation of the first weights, None for `fan_in ** -0.5`.
        pad: take images that are not square, or that the tree does not divide, padded at the end.

    Raises:
        ValueError: `dims`, `depths` and `heads` differ in length, or the image does not fit without `pad`.
    """
    if not len(dims) == len(depths) == len(heads):
        raise ValueError(
            f"dims, depths and heads must be of one length, got {tuple(dims)}, {tuple(depths)} and {tuple(heads)}"
        )
    levels = len(dims)
    size, multiple = pair(img_size), patch * 2 ** (levels - 1)
    if not pad and (size[0] != size[1] or size[0] % multiple):
        raise ValueError(
            f"img_size must be square and a multiple of {multiple} (patch {patch}, {levels} levels), got "
            f"{size[0]}x{size[1]}; build with pad=True for any size"
        )
    side = (-(-size[0] // multiple), -(-size[1] // multiple))
    rates = stage_rates(drop_path, depths)
    model = Pyramid(
        Stem(in_chans, dims[0], patch, img_size=size, full=(side[0] * multiple, side[1] * multiple)),
        [
            [
                _level(
                    dims[i],
                    side,
                    (2 ** (levels - 1 - i),) * 2,
                    heads=heads[i],
                    rates=rates[i],
                    mixer=mixer,
                    mixer_options=mixer_options,
                    mlp_ratio=mlp_ratio,
                )
            ]
            for i in range(levels)
        ],
        [Aggregate(dim, out) for dim, out in pairwise(dims)],
        norm=Norm(dims[-1]),
        head=Classifier(dims[-1], num_classes, drop=drop),
    )
    _init(model, init_std)
    return model
