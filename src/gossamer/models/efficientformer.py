"""EfficientFormer: convolutional blocks with a pooling mixer, attention only where the map is smallest.

Source: Li et al. 2022, "EfficientFormer: Vision Transformers at MobileNet Speed".

- 4-D blocks have no norm before a branch and batch norms inside their MLP; they fold away for deployment
  (`gossamer.layers.fold.fold_batch_norm`)
- the authors flatten the map once, before attention; maps are channels last here, so there is nothing to flatten, and
  the blocks behind their parameter-free flatten are numbered one lower
- attention is bound to the grid of `img_size`; weights of another size have their bias table resized bicubically
- `dense=16` (segmentation) or `dense=25` (detection) is the authors' backbone for maps of any size: a bias table for
  that side, resized to the map, one-group norms on each map, no classifier
- the latency-driven slimming that found the published sizes is `gossamer.search.slimming`
"""

from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import BatchNorm, Block, Classifier, ConvNorm, GroupNorm1, Mlp
from gossamer.layers.blocks import drop_path_rates
from gossamer.layers.distilled import DistilledClassifier
from gossamer.layers.embed import pair
from gossamer.layers.init import init_transformer
from gossamer.layers.positions import table_layout
from gossamer.layers.stem import ConvStem
from gossamer.mixers import create_mixer
from gossamer.mixers.offset_bias_attention import OffsetBiasAttention
from gossamer.models.registry import State, register_system
from gossamer.trunks import Pyramid


class BoundStem(ConvStem):
    """A stem of two convolutions for images whose last map has the size that the attention is bound to.

    Args:
        img_size: the image side the attention behind it is built for, None for any.
        reduction: by how much the whole trunk lowers the resolution.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        strides: tuple[int, int],
        *,
        img_size: tuple[int, int] | None = None,
        reduction: int = 32,
    ) -> None:
        super().__init__(in_chans, (dim // 2, dim), strides)
        self.img_size = img_size
        self.reduction = reduction

    def forward(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b h w c"]:
        if self.img_size is not None:
            size = tuple(image.shape[2:])
            if _grid(size, self.reduction) != _grid(self.img_size, self.reduction):
                raise ValueError(
                    f"the attention biases are for images of {self.img_size[0]}x{self.img_size[1]}, got "
                    f"{size[0]}x{size[1]}; build the model with img_size={size}"
                )
        return super().forward(image)


def _grid(size: tuple[int, ...], reduction: int) -> tuple[int, ...]:
    # A 3x3 convolution with padding 1 and stride s leaves ceil(n / s) of n; ceilings of quotients compose.
    return tuple(-(-n // reduction) for n in size)


def _convert(model: Any, state: State) -> State:
    last = len(model.stages) - 1
    prefix = f"stages.{last}."
    # Blocks behind the flatten carry its index too: renumber what is there.
    present = sorted({int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix)})
    place = {old: new for new, old in enumerate(present)}
    renamed: State = {}
    for key, value in state.items():
        if key.startswith(prefix):
            index, _, rest = key[len(prefix) :].partition(".")
            key = f"{prefix}{place[int(index)]}.{rest}"
        renamed[key] = value
    for key in [key for key in renamed if key.endswith(".attention_biases")]:
        table = renamed.pop(key)
        # The dense files keep the classifier's table as an unused buffer.
        renamed.setdefault(key.replace("attention_biases", "bias_table"), table)
    for name, module in model.named_modules():
        if isinstance(module, Mlp) and f"{name}.fc1.weight" in renamed:
            for fc in ("fc1", "fc2"):
                # 1x1 convolutions.
                renamed[f"{name}.{fc}.weight"] = renamed[f"{name}.{fc}.weight"].flatten(1)
        elif isinstance(module, OffsetBiasAttention) and f"{name}.bias_table" in renamed:
            renamed[f"{name}.bias_table"] = _resize_biases(renamed[f"{name}.bias_table"], module.grid)
    return renamed


def _resize_biases(table: Tensor, grid: tuple[int, ...]) -> Tensor:
    """A bias table over offsets `0 .. side - 1` on both axes, resized to another grid; offset 0 stays offset 0."""
    old = table_layout(table.shape[1], grid)[1]
    if old == grid:
        return table
    image = table.float().view(1, -1, *old)
    image = F.interpolate(image, grid, mode="bicubic", align_corners=True)
    return image.flatten(2)[0].to(table.dtype)


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    target, depths, attention_blocks, widest = {
        "xs": (5, (0, 0, 1, 1, 2), 1, 128),
        "s": (25, (0, 1, 1, 2, 3), 2, 256),
        "m": (95, (0, 1, 1, 2, 3), 2, 384),
        "l": (320, (0, 1, 2, 3, 4), 2, 512),
    }[size]
    height, width = spec["img_size"]
    side = max(height, width)
    strides = (1, 1) if side < 20 else (1, 2) if side < 56 else (2, 2)
    # Stages until the last map is some four to eight tokens wide.
    stages = 1
    while stages < 5 and side / (strides[0] * strides[1] * 2 ** (stages - 1)) > 6:
        stages += 1
    kept = depths[-stages:]
    first = [w for w in range(8, 257, 8) if w * 2 ** (stages - 1) <= widest]
    best = min(first, key=lambda w: abs(_macs(spec, w, kept, strides) - target * 1e6))
    widths = tuple(best * 2**i for i in range(stages))
    options = dict(
        widths=widths,
        depths=kept,
        attention_blocks=attention_blocks,
        heads=max(1, widths[-1] // 32),
        key_dim=16,
        value_dim=32,
        stem_strides=strides,
        # The authors' 1e-5 keeps a block shut for longer than a short training lasts.
        layer_scale=0.1,
        distillation=False,
    )
    return "efficientformer_l1", {**options, **spec}


def _macs(spec: dict[str, Any], first: int, depths: tuple[int, ...], strides: tuple[int, int]) -> float:
    """Multiply-adds of an EfficientFormer whose widths double from `first`; attention counts as a 4-D block."""
    height, width = spec["img_size"]
    total, before, step = 0.0, spec["in_chans"], 1
    stem = [(first // 2, strides[0]), (first, strides[1])]
    for dim, stride in stem + [(first * 2**i, 2) for i in range(1, len(depths))]:
        step *= stride
        rows, columns = _grid((height, width), step)
        total += 9 * before * dim * rows * columns
        before = dim
        if dim >= first:
            total += depths[(dim // first).bit_length() - 1] * 8 * dim * dim * rows * columns
    return total


@register_system(
    "efficientformer",
    tasks=("image-classification",),
    scale=_scale,
    variants={
        "efficientformer_l1": dict(depths=(3, 2, 6, 4), widths=(48, 96, 224, 448), attention_blocks=1),
        "efficientformer_l3": dict(depths=(4, 4, 12, 6), widths=(64, 128, 320, 512), attention_blocks=4),
        "efficientformer_l7": dict(depths=(6, 6, 18, 8), widths=(96, 192, 384, 768), attention_blocks=8),
    },
    rules=[
        (r"attention_bias_idxs(_seg)?$", None),
        (r"attention_biases_seg$", "bias_table"),
        (r"^patch_embed\.0\.", "stem.convs.0.conv."),
        (r"^patch_embed\.1\.", "stem.convs.0.norm."),
        (r"^patch_embed\.3\.", "stem.convs.1.conv."),
        (r"^patch_embed\.4\.", "stem.convs.1.norm."),
        *((rf"^network\.{2 * i}\.", f"stages.{i}.") for i in range(4)),
        *((rf"^network\.{2 * i + 1}\.proj\.", f"merges.{i}.conv.") for i in range(3)),
        *((rf"^network\.{2 * i + 1}\.norm\.", f"merges.{i}.norm.") for i in range(3)),
        *((rf"^norm{2 * i}\.", f"out_norms.{i}.") for i in range(4)),
        (r"\.token_mixer\.", ".mixer."),
        (r"\.layer_scale_([12])$", r".scale\1"),
        (r"^head\.", "head.fc."),
        (r"^dist_head\.", "head.distilled."),
    ],
    convert=_convert,
)
def efficientformer(
    *,
    widths: tuple[int, ...] = (48, 96, 224, 448),
    depths: tuple[int, ...] = (3, 2, 6, 4),
    attention_blocks: int = 1,
    mlp_ratio: float = 4.0,
    heads: int = 8,
    key_dim: int = 32,
    value_dim: int = 128,
    stem_strides: tuple[int, int] = (2, 2),
    layer_scale: float | None = 1e-5,
    drop: float = 0.0,
    drop_path: float = 0.0,
    mixer: str = "pool",
    mixer_options: dict[str, Any] | None = None,
    distillation: bool = True,
    dense: int | None = None,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
) -> nn.Module:
    """An EfficientFormer.

    Args:
        widths, depths: channels and blocks of each stage.
        attention_blocks: how many blocks attend, counted from the end (the authors' `vit_num`); those of the last two
            stages can.
        heads, key_dim, value_dim: of the attention; values are wider than keys.
        stem_strides: steps of the stem's two convolutions; (1, 1) or (1, 2) for small images.
        mixer: name of the mixer of the 4-D blocks.
        distillation: a second head for the teacher's answer.
        dense: side of the bias table of the dense form, which takes images of any size; `img_size` is then unused.

    Raises:
        ValueError: `widths` and `depths` differ in length, or more attention blocks than the last two stages have.
    """
    if len(widths) != len(depths):
        raise ValueError(f"widths and depths must be equally long, got {widths} and {depths}")
    most = sum(depths[-2:])
    if not 0 <= attention_blocks <= most:
        raise ValueError(
            f"attention_blocks must be in 0..{most} (blocks of the last two stages), got {attention_blocks}"
        )
    size = pair(img_size)
    rates = iter(drop_path_rates(drop_path, sum(depths)))
    reduction = stem_strides[0] * stem_strides[1]
    stages: list[list[nn.Module]] = []
    for index, (dim, depth) in enumerate(zip(widths, depths, strict=True)):
        grid = _grid(size, reduction)
        blocks: list[nn.Module] = []
        for place in range(depth):
            shared: dict[str, Any] = dict(layer_scale=layer_scale, drop_path=next(rates))
            if sum(depths[index:]) - place <= attention_blocks:
                attend = OffsetBiasAttention(
                    dim,
                    grid=(dense, dense) if dense else grid,
                    heads=heads,
                    key_dim=key_dim,
                    value_dim=value_dim,
                    resize=dense is not None,
                )
                blocks.append(Block(dim, attend, Mlp(dim, int(dim * mlp_ratio), drop=drop), **shared))
            else:
                mix = create_mixer(mixer, dim, grid=grid, **(mixer_options or {}))
                mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop, norm=BatchNorm)
                blocks.append(Block(dim, mix, mlp, norm=None, **shared))
        stages.append(blocks)
        reduction *= 2
    bound = attention_blocks > 0 and dense is None
    stem = BoundStem(in_chans, widths[0], stem_strides, img_size=size if bound else None, reduction=reduction // 2)
    merges = [ConvNorm(a, b, 3, stride=2) for a, b in pairwise(widths)]
    head: nn.Module = nn.Identity()
    if dense is None:
        head = (DistilledClassifier if distillation else Classifier)(widths[-1], num_classes)
    model = Pyramid(
        stem,
        stages,
        merges,
        norm=nn.LayerNorm(widths[-1]) if dense is None else None,
        head=head,
        out_norms=None if dense is None else [GroupNorm1(dim) for dim in widths],
    )
    init_transformer(model)
    return model
