"""Swin Transformer: a pyramid of attention inside windows that shift from block to block.

Source: Liu et al. 2021, "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows".

- windows of 7x7 tokens (12x12 at 384 pixels), shifted by half in every second block; cost linear in pixels
- merging joins 2x2 tokens; strides 4, 8, 16, 32
- three forms of one code path. Strict, as released for classification: the image must fit the windows, and a map no
  larger than a window is one window, unshifted. `pad=True`: any image, maps padded. `dense=True`, the authors' form for
  detection and segmentation: any image, small maps padded and shifted all the same, a norm for each map, no classifier
- Swin-MLP (`mixer="window_mlp"`) has a learned map over a window's tokens in place of attention
- index tables and masks are rebuilt, never loaded; a bias table of another window is resized (bicubic)
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import lcm
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import Block, Classifier, GridPositions, LayerNorm, Mlp, PatchEmbed, resize_positions
from gossamer.layers.embed import pair
from gossamer.layers.init import init_transformer
from gossamer.layers.positions import table_layout
from gossamer.mixers import create_mixer, options_for
from gossamer.mixers.window import window_side
from gossamer.models._pyramids import keep_backbone, small_pyramid, stage_rates, token_grid
from gossamer.models.registry import State, register_system
from gossamer.ops.grid import pad_to_multiple
from gossamer.trunks import Pyramid


class PatchMerging(nn.Module):
    """`y = W norm([x_00; x_10; x_01; x_11])`, `x_rc` the token in row r and column c of each 2x2 square.

    Odd maps are zero-padded at the end.
    """

    norm_readers = (("norm", "reduction"),)

    def __init__(self, dim: int, out: int, *, norm: Callable[[int], nn.Module] = LayerNorm) -> None:
        super().__init__()
        self.norm = norm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out, bias=False)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j o"]:
        x = pad_to_multiple(x, (2, 2))
        b, h, w, c = x.shape
        squares = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(squares.reshape(b, h // 2, w // 2, 4 * c)))


class Stem(PatchEmbed):
    """Patches; an image that does not fit is padded at the end, or refused where `multiple` says what fits."""

    def __init__(
        self, in_chans: int, dim: int, patch: int, *, multiple: int | None, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__(in_chans, dim, patch, norm=norm)
        self.patch = patch
        self.multiple = multiple

    def forward(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b h w c"]:
        height, width = image.shape[2:]
        if self.multiple is not None:
            _refuse_misfit(height, width, self.multiple)
        bottom, right = -height % self.patch, -width % self.patch
        return super().forward(F.pad(image, (0, right, 0, bottom)) if bottom or right else image)


def _refuse_misfit(height: int, width: int, multiple: int) -> None:
    if height % multiple or width % multiple:
        raise ValueError(
            f"image sides must be a multiple of {multiple} (patch, merging and window), got {height}x{width}; "
            "build with pad=True or dense=True for any size"
        )


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    found = small_pyramid(spec, size, block=12, step=16, least_patch=2)
    rows, columns = token_grid(spec["img_size"], found["patch"], 1, up=True)[0]
    # The window that pads least; of equals the largest.
    window = min((8, 7, 6, 5, 4), key=lambda w: (-rows % w / rows + -columns % w / columns, -w))
    dim = found["dims"][0]
    settings = {
        "patch": found["patch"],
        "embed_dim": dim,
        "depths": found["depths"],
        "heads": tuple(d // 16 if dim % 32 else d // 32 for d in found["dims"]),
        "window": window,
        "pad": True,
        # Small data cannot wait for relative positions alone to be learned.
        "ape": True,
        "init_std": None,
    }
    return "swin_t", {**settings, **spec}


def _convert(model: Any, state: State) -> State:
    own = model.state_dict()
    for key, value in state.items():
        if key not in own or own[key].shape == value.shape:
            continue
        if key.endswith(".bias_table") and own[key].shape[1] == value.shape[1]:
            old, new = (round(t.shape[0] ** 0.5) for t in (value, own[key]))
            state[key] = resize_positions(value[None], (old, old), (new, new))[0]
        elif key.endswith((".mixer.weight", ".mixer.bias")) and own[key].numel() == value.numel():
            # A grouped convolution (heads * tokens, tokens, 1) is one matrix a head.
            state[key] = value.view(own[key].shape)
        elif key == "stem.1.table":
            # One row a token in the classification form, a map (1, c, h, w) in the dense one.
            table = value if value.ndim == 3 else value.flatten(2).transpose(1, 2)
            new_grid = (own[key].shape[1], own[key].shape[2])
            old_grid = table_layout(table.shape[1], new_grid)[1] if value.ndim == 3 else value.shape[2:]
            state[key] = resize_positions(table, old_grid, new_grid).unflatten(1, new_grid)
    return keep_backbone(model, state, "norm.", "head.")


_T: dict[str, Any] = dict(embed_dim=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24))
_S: dict[str, Any] = dict(embed_dim=96, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24))
_B: dict[str, Any] = dict(embed_dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32))
_L: dict[str, Any] = dict(embed_dim=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48))
_384: dict[str, Any] = dict(img_size=384, window=12)
_22K: dict[str, Any] = dict(num_classes=21841)
_256: dict[str, Any] = dict(embed_dim=96, depths=(2, 2, 6, 2), img_size=256, window=8)
_MLP: dict[str, Any] = dict(mixer="window_mlp")
_C24: dict[str, Any] = dict(heads=(4, 8, 16, 32), **_256)
_C12: dict[str, Any] = dict(heads=(8, 16, 32, 64), **_256)
_C6: dict[str, Any] = dict(heads=(16, 32, 64, 128), **_256)


@register_system(
    "swin",
    tasks=("image-classification",),
    scale=_scale,
    variants={
        "swin_t": _T,
        "swin_s": _S,
        "swin_b": _B,
        "swin_b_384": {**_B, **_384},
        "swin_l": _L,
        "swin_l_384": {**_L, **_384},
        "swin_mlp_t_c24": {**_C24, **_MLP},
        # the authors' own names
        "swin_tiny_patch4_window7_224": _T,
        "swin_tiny_patch4_window7_224_22k": {**_T, **_22K},
        "swin_tiny_patch4_window7_224_22kto1k_finetune": _T,
        "swin_tiny_c24_patch4_window8_256": _C24,
        "swin_small_patch4_window7_224": _S,
        "swin_small_patch4_window7_224_22k": {**_S, **_22K},
        "swin_small_patch4_window7_224_22kto1k_finetune": _S,
        "swin_base_patch4_window7_224": _B,
        "swin_base_patch4_window7_224_22k": {**_B, **_22K},
        "swin_base_patch4_window7_224_22kto1k_finetune": _B,
        "swin_base_patch4_window12_384_finetune": {**_B, **_384},
        "swin_base_patch4_window12_384_22kto1k_finetune": {**_B, **_384},
        "swin_large_patch4_window7_224_22k": {**_L, **_22K},
        "swin_large_patch4_window7_224_22kto1k_finetune": _L,
        "swin_large_patch4_window12_384_22kto1k_finetune": {**_L, **_384},
        "swin_mlp_tiny_c24_patch4_window8_256": {**_C24, **_MLP},
        "swin_mlp_tiny_c12_patch4_window8_256": {**_C12, **_MLP},
        "swin_mlp_tiny_c6_patch4_window8_256": {**_C6, **_MLP},
        "swin_mlp_base_patch4_window7_224": {**_B, **_MLP},
    },
    rules=[
        (r"relative_position_index$", None),
        (r"attn_mask$", None),
        (r"^absolute_pos_embed$", "stem.1.table"),
        (r"^patch_embed\.", "stem.0."),
        (r"^layers\.(\d+)\.blocks\.", r"stages.\1."),
        (r"^layers\.(\d+)\.downsample\.", r"merges.\1."),
        (r"\.attn\.relative_position_bias_table$", ".mixer.bias_table"),
        (r"\.attn\.", ".mixer."),
        (r"\.spatial_mlp\.", ".mixer."),
        (r"^norm([0-3])\.", r"out_norms.\1."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ],
    convert=_convert,
)
def swin(
    *,
    embed_dim: int = 96,
    depths: Sequence[int] = (2, 2, 6, 2),
    heads: Sequence[int] = (3, 6, 12, 24),
    window: int = 7,
    patch: int = 4,
    mlp_ratio: float = 4.0,
    ape: bool = False,
    drop: float = 0.0,
    drop_path: float = 0.0,
    init_std: float | None = 0.02,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    pad: bool = False,
    dense: bool = False,
    norm: Callable[[int], nn.Module] = LayerNorm,
    mixer: str | Sequence[str] = "window",
    mixer_options: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
) -> nn.Module:
    """A Swin Transformer.

    Args:
        heads: heads of each stage.
        window: window side in tokens.
        ape: add a learned absolute position to each token after the stem.
        init_std: deviation of the first weights, None for `fan_in ** -0.5`.
        pad: take any image, by padding maps to whole windows.
        dense: any image, a norm for each map that `features` gives, and no classifier.
        norm: factory of every norm.
        mixer: `window`, `window_mlp`, or what else stands in for them; or one name a stage.
        mixer_options: its keywords, or those of each stage.

    Raises:
        ValueError: `depths`, `heads` and mixers differ in length, or the image does not fit without `pad` or `dense`.
    """
    if len(depths) != len(heads):
        raise ValueError(f"depths and heads must be of one length, got {tuple(depths)} and {tuple(heads)}")
    names = [mixer] * len(depths) if isinstance(mixer, str) else list(mixer)
    if isinstance(mixer_options, dict) or mixer_options is None:
        mixer_options = [mixer_options or {}] * len(depths)
    if {len(names), len(mixer_options)} != {len(depths)}:
        raise ValueError(f"mixers must be one name or {len(depths)} names (stages), got {len(names)}")
    dims = [embed_dim * 2**i for i in range(len(depths))]
    small = "pad" if dense else "shrink"
    grids = token_grid(img_size, patch, len(depths), up=pad or dense)
    # Window sides by which maps are cut, 1 where they are not.
    sides = [
        {**options_for(name, {"window": window}), **given}.get("window")
        for name, given in zip(names, mixer_options, strict=True)
    ]
    windows = [side if isinstance(side, int) else 1 for side in sides]
    multiple = None if pad or dense else _multiple(img_size, patch, grids, windows)
    stem = nn.Sequential(Stem(in_chans, embed_dim, patch, multiple=multiple, norm=norm))
    if ape:
        stem.append(GridPositions(embed_dim, grids[0], resize=pad or dense))
    stages = []
    for s, rates in enumerate(stage_rates(drop_path, depths)):
        dim = dims[s]
        blocks = []
        for i, rate in enumerate(rates):
            options = {"heads": heads[s], "window": window, "shifted": i % 2 == 1, "small": small}
            options = {**options_for(names[s], options), **mixer_options[s]}
            mix = create_mixer(names[s], dim, grid=grids[s], **options)
            blocks.append(Block(dim, mix, Mlp(dim, int(dim * mlp_ratio), drop=drop), norm=norm, drop_path=rate))
        stages.append(blocks)
    model = Pyramid(
        stem,
        stages,
        [PatchMerging(dim, out, norm=norm) for dim, out in pairwise(dims)],
        norm=None if dense else norm(dims[-1]),
        head=nn.Identity() if dense else Classifier(dims[-1], num_classes),
        out_norms=[norm(dim) for dim in dims] if dense else None,
    )
    init_transformer(model, init_std)
    return model


def _multiple(
    img_size: int | tuple[int, int], patch: int, grids: Sequence[tuple[int, int]], windows: Sequence[int]
) -> int:
    """What image sides must be a multiple of, so that every map is even before merging and whole in windows."""
    strides = [patch * 2**i for i in range(len(grids))]
    _refuse_misfit(*pair(img_size), strides[-1])
    sides = (window_side(window, grid, "shrink") for window, grid in zip(windows, grids, strict=True))
    multiple = lcm(*(stride * side for stride, side in zip(strides, sides, strict=True)))
    _refuse_misfit(*pair(img_size), multiple)
    return multiple
