"""SReT: every block runs several times with the same weights, and sliced attention pays for the extra passes.

Source: Shen et al. 2021, "Sliced Recursive Transformer".

- three stages at strides 8, 16, 32; `loops` passes through each block, each followed by a small MLP of its own
- residual sums have learned coefficients; no merging but a depth-wise convolution that doubles the channels
- attention is inside `groups` runs of tokens in the first pass, in `second_groups` drawn ones in the later passes; one
  group is ordinary attention. The authors draw anew in eval mode too (`fresh=True`); here eval mode has a fixed order
- the authors tell passes by their place in a list, which is right for two loops only; here by the loop's index
- their files hold shared tensors under each pass's name; the loader checks that they agree
- their two factories of T and LT without slices fail as written; these are what their distilled twins are
- position maps of another resolution are resized (bicubic); `pad=True` takes token counts that groups do not divide
- distilled variants differ in their weights only. Mixed-depth training and the 1000-layer models are not here
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import Classifier, Conv, GridPositions, Mlp
from gossamer.layers.blocks import DropPath
from gossamer.layers.embed import pair
from gossamer.layers.init import init_by_width
from gossamer.layers.positions import resize_positions
from gossamer.layers.stem import ConvStem
from gossamer.mixers import create_mixer, options_for
from gossamer.mixers.sliced import SlicedAttention
from gossamer.models.registry import State, register_system
from gossamer.trunks import Pyramid

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class WeighedBlock(nn.Module):
    """`x = a1 x + a2 mixer(norm x)`, `x = a3 x + a4 mlp(norm x)`, four learned numbers that start at 1.

    Args:
        dim: channels.
        mixer: token mixer.
        mlp: channel mixer.
        second_groups: groups of the later passes, where the mixer is sliced attention.
        drop_path: probability of dropping a branch for a sample.
    """

    def __init__(
        self, dim: int, mixer: nn.Module, mlp: nn.Module, *, second_groups: int = 1, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.mixer = mixer
        self.norm2 = LayerNorm(dim)
        self.mlp = mlp
        self.second_groups = second_groups
        self.drop_path = DropPath(drop_path)
        self.coefficients = nn.Parameter(torch.ones(4))

    def forward(self, x: Float[Tensor, "b *grid c"], *, again: bool = False) -> Float[Tensor, "b *grid c"]:
        """The block; `again` in every pass but the first."""
        a1, a2, a3, a4 = self.coefficients.unbind()
        y = self.norm1(x)
        if again and isinstance(self.mixer, SlicedAttention):
            y = self.mixer.attend(y, self.second_groups, True)
        else:
            y = self.mixer(y)
        x = torch.addcmul(x * a1, self.drop_path(y), a2)
        return torch.addcmul(x * a3, self.drop_path(self.mlp(self.norm2(x))), a4)


class Projection(nn.Module):
    """`x = b1 x + b2 mlp(norm x)`, two learned numbers that start at 1: what follows one pass and is not shared."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.mlp = Mlp(dim, hidden)
        self.coefficients = nn.Parameter(torch.ones(2))

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        b1, b2 = self.coefficients.unbind()
        return torch.addcmul(x * b1, self.mlp(self.norm(x)), b2)


class Recursion(nn.Module):
    """`x = p_l(block(x))` for each pass l: one block, one projection a pass.

    Args:
        block: `(x, again=…) -> x`, shared by the passes.
        projections: one for each pass.
    """

    def __init__(self, block: nn.Module, projections: Sequence[nn.Module]) -> None:
        super().__init__()
        self.block = block
        self.projections = nn.ModuleList(projections)

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        for loop, projection in enumerate(self.projections):
            x = projection(self.block(x, again=loop > 0))
        return x


def _grid(size: tuple[int, int], step: int) -> tuple[int, int]:
    # A 3x3 convolution with padding 1 and stride s leaves ceil(n / s) of n; ceilings of quotients compose.
    return -(-size[0] // step), -(-size[1] // step)


def _convert(model: Any, state: State) -> State:
    """Names shared tensors once, gathers coefficients, and fits the position map."""
    named: State = {}
    coefficients: dict[str, dict[int, Tensor]] = {}
    for key, value in state.items():
        if key.startswith("transformers."):
            _, stage, _, place, rest = key.split(".", 4)
            loops = len(model.stages[int(stage)][0].projections)
            application, kind = divmod(int(place), 2)
            block, loop = divmod(application, loops)
            part = f"projections.{loop}" if kind else "block"
            rest = rest.replace("norm1.", "norm.") if kind else rest.replace("attn.", "mixer.")
            key = f"stages.{stage}.{block}.{part}.{rest}"
        name, _, number = key.removesuffix(".bias").rpartition(".coefficient")
        if name:
            # The second name of a shared block is checked here, that of its other tensors below.
            known = coefficients.setdefault(f"{name}.coefficients", {})
            _agrees(key, known.get(int(number)), value)
            known[int(number)] = value
            continue
        _agrees(key, named.get(key), value)
        named[key] = value
    named.update({key: torch.cat([found[i] for i in sorted(found)]) for key, found in coefficients.items()})
    table = named.get("stem.1.table")
    if table is not None:
        old, new = (table.shape[2], table.shape[3]), tuple(model.stem[1].table.shape[1:3])
        named["stem.1.table"] = resize_positions(table.flatten(2).transpose(1, 2), old, new).unflatten(1, new)
    return named


def _agrees(key: str, one: Tensor | None, two: Tensor) -> None:
    if one is None or one.is_meta or two.is_meta:
        return
    if not torch.equal(one, two):
        raise ValueError(f"the checkpoint holds two values for the shared tensor {key}; its passes must agree")


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    target, distinct, side = {
        "xs": (5, (1, 1), 10),
        "s": (28, (1, 2), 16),
        "m": (95, (1, 2), 20),
        "l": (320, (1, 3), 20),
    }[size]
    height, width = pair(spec["img_size"])
    # Steps of two until the first map is at most `side` tokens wide.
    halvings = 0
    while max(height, width) / 2**halvings > side and min(height, width) >> halvings > 4:
        halvings += 1
    strides = (2,) * halvings + (1,) * max(0, 2 - halvings)
    # Slices pay where the map is large.
    large = prod(_grid((height, width), 2**halvings)) >= 144
    groups, second = ((4, 1), (2, 1)) if large else ((1, 1), (1, 1))

    def macs(dim: int) -> float:
        total, before, step = 0.0, spec["in_chans"], 1
        for i, stride in enumerate(strides):
            step *= stride
            out = dim // 2 if i == 0 else dim
            total += 9 * before * out * prod(_grid((height, width), step))
            before = out
        for i, blocks in enumerate(distinct):
            tokens = prod(_grid((height, width), step * 2**i))
            # Each pass: the block's products, 10 c^2, and the projection's, 2 c^2; attention inside its groups.
            channels = dim * 2**i
            seen = tokens * (1 / groups[i] + 1 / second[i])
            total += 2 * blocks * tokens * (12 * channels**2 + seen * channels)
        return total

    dim = min(range(16, 257, 16), key=lambda d: abs(macs(d) - target * 1e6))
    base = 16 if dim % 32 else 32
    settings = {
        "base_dim": base,
        "heads": (dim // base, 2 * dim // base),
        "depths": tuple(2 * m for m in distinct),
        "groups": groups,
        "second_groups": second,
        "mlp_ratio": 3.0,
        "stem_strides": strides,
        "drop_path": 0.0,
        "init_by_fan": True,
    }
    return "sret_t", {**settings, **spec}


_T: dict[str, Any] = dict(mlp_ratio=3.6)
_LT: dict[str, Any] = dict(mlp_ratio=4.0)
_S: dict[str, Any] = dict(base_dim=42, heads=(3, 6, 12), mlp_ratio=3.0, projection_ratio=2)
_WHOLE: dict[str, Any] = dict(groups=(1, 1, 1), second_groups=(1, 1, 1), drop_path=0.0)
_384: dict[str, Any] = dict(img_size=384)


@register_system(
    "sret",
    tasks=("image-classification",),
    scale=_scale,
    variants={
        "sret_t": _T,
        "sret_lt": _LT,
        "sret_s": _S,
        "sret_t_noslice": {**_T, **_WHOLE},
        "sret_lt_noslice": {**_LT, **_WHOLE},
        "sret_s_noslice": {**_S, **_WHOLE},
        # the authors' own names, in small letters
        "sret_t_distill": _T,
        "sret_lt_distill": _LT,
        "sret_s_distill": _S,
        "sret_t_wo_slice": {**_T, **_WHOLE},
        "sret_lt_wo_slice": {**_LT, **_WHOLE},
        "sret_s_wo_slice": {**_S, **_WHOLE},
        "sret_lt_wo_slice_distill": {**_LT, **_WHOLE},
        "sret_s_wo_slice_finetune_384": {**_S, **_WHOLE, **_384},
    },
    rules=[
        (r"^pos_embed$", "stem.1.table"),
        *((rf"^patch_embed\.conv{i + 1}\.", f"stem.0.convs.{i}.conv.") for i in range(3)),
        *((rf"^patch_embed\.bn{i + 1}\.", f"stem.0.convs.{i}.norm.") for i in range(3)),
        (r"^pools\.(\d+)\.conv\.", r"merges.\1."),
        (r"^norm\.", "head.norm."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ],
    convert=_convert,
)
def sret(
    *,
    base_dim: int = 32,
    heads: Sequence[int] = (2, 4, 8),
    depths: Sequence[int] = (4, 10, 6),
    loops: int = 2,
    groups: Sequence[int] = (8, 4, 1),
    second_groups: Sequence[int] = (2, 1, 1),
    mlp_ratio: float = 3.6,
    projection_ratio: float = 1.0,
    stem_strides: Sequence[int] = (2, 2, 2),
    drop_path: float = 0.1,
    fresh: bool = False,
    pad: bool = True,
    init_by_fan: bool = False,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    mixer: str = "sliced",
    mixer_options: dict[str, Any] | None = None,
) -> nn.Module:
    """A sliced recursive transformer.

    Args:
        base_dim: channels of a head; a stage has `base_dim * heads` channels.
        depths: passes of each stage, all loops counted.
        loops: passes through each block; `depths / loops` blocks have weights of their own.
        groups, second_groups: groups of tokens in the first pass through a block, and in later ones.
        mlp_ratio: of the blocks; `projection_ratio` of the MLPs between passes.
        stem_strides: steps of the stem's convolutions.
        fresh: draw the order of tokens anew in eval mode too, as the authors do.
        pad: take token counts that groups do not divide; False refuses them, as the authors' code fails.
        init_by_fan: first weights of deviation `fan_in ** -0.5`, in place of PyTorch's own.
        mixer: what mixes tokens; any but `sliced` does the same in every pass.

    Raises:
        ValueError: settings of the stages differ in length, or `loops` does not divide the depths.
    """
    lengths = {len(heads), len(depths), len(groups), len(second_groups)}
    if len(lengths) > 1:
        raise ValueError(
            f"heads, depths, groups and second_groups must be of one length, got {tuple(heads)}, {tuple(depths)}, "
            f"{tuple(groups)} and {tuple(second_groups)}"
        )
    if loops < 1 or any(depth % loops for depth in depths):
        raise ValueError(f"loops must divide depths, got loops={loops}, depths={tuple(depths)}")
    if any(b % a for a, b in pairwise(heads)):
        raise ValueError(f"heads must be multiples of those of the stage before (merging), got {tuple(heads)}")
    size, step = pair(img_size), prod(stem_strides)
    dims = [base_dim * count for count in heads]
    stages: list[list[nn.Module]] = []
    for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        stage: list[nn.Module] = []
        for block in range(depth // loops):
            own = options_for(mixer, {"heads": heads[i], "groups": groups[i], "fresh": fresh, "pad": pad})
            mix = create_mixer(mixer, dim, grid=_grid(size, step * 2**i), **{**own, **(mixer_options or {})})
            # A shared block has one rate, that of its number in the stage, though it stands for several passes.
            rate = drop_path * (sum(depths[:i]) + block) / sum(depths)
            shared = WeighedBlock(
                dim, mix, Mlp(dim, int(dim * mlp_ratio)), second_groups=second_groups[i], drop_path=rate
            )
            hidden = int(dim * projection_ratio)
            stage.append(Recursion(shared, [Projection(dim, hidden) for _ in range(loops)]))
        stages.append(stage)
    before = len(stem_strides) - 1
    stem_widths = [dims[0] // 2] * min(1, before) + [dims[0]] * max(1, before)
    positions = GridPositions(dims[0], _grid(size, step), resize=True)
    nn.init.trunc_normal_(positions.table, std=0.02)
    model = Pyramid(
        nn.Sequential(ConvStem(in_chans, stem_widths, stem_strides), positions),
        stages,
        [Conv(a, b, 3, stride=2, groups=a) for a, b in pairwise(dims)],
        norm=None,
        head=Classifier(dims[-1], num_classes, norm=LayerNorm),
    )
    if init_by_fan:
        init_by_width(model)
    return model
