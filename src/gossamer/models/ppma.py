"""PPMA-ViT: a pyramid whose attention knows the grid by the learned length of the way between two tokens.

Source: Zhao et al. 2025, "Polyline Path Masked Attention for Vision Transformer".

- separable attention where maps are large, full attention where they are small; convolutions for stem and merging
- every block begins with a position by convolution, and its MLP has a depth-wise convolution with a residual of its own
- any image: nothing is bound to a size. `dense=True` is the authors' form for detection and segmentation
- the authors' tables of angles are rebuilt, and their three products for queries, keys and values are one
- the first weights are those the authors end with: their initialisation of all linear layers runs after the special one
  of the attention, and undoes it
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import BatchNorm, Block, Classifier, ConvNorm, LayerNorm
from gossamer.layers.init import init_transformer
from gossamer.layers.linear import linear
from gossamer.layers.mlp import ConvMlp
from gossamer.layers.positions import ConvPositions
from gossamer.layers.stem import ConvStem
from gossamer.mixers import create_mixer, options_for
from gossamer.models._pyramids import keep_backbone, small_pyramid, stage_rates, token_grid
from gossamer.models.registry import State, register_system
from gossamer.trunks import Pyramid


class ProjectedClassifier(nn.Module):
    """`y = W mean(silu(norm(P x)))`."""

    norm_pairs = (("proj", "norm"),)

    def __init__(self, dim: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)
        self.norm = BatchNorm(hidden)
        self.act = nn.SiLU()
        self.classifier = Classifier(hidden, num_classes)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b k"]:
        return self.classifier(self.act(self.norm(linear(self.proj, x))))


_STRIDES = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (4, 2), 16: (4, 4)}


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    found = small_pyramid(spec, size, block=12, step=8)
    # Stem and merging are convolutions, and cost as much as some blocks.
    depth, stages = sum(found["depths"]), len(found["dims"])
    found = small_pyramid(spec, size, block=12 + round((20 + 4.5 * (stages - 1)) / depth), step=8)
    while found["patch"] not in _STRIDES:
        found["patch"] -= 1
    dims = found["dims"]
    grids = token_grid(spec["img_size"], found["patch"], stages, up=True)
    settings = {
        "dims": dims,
        "depths": found["depths"],
        "heads": tuple(d // next(w for w in (32 if d >= 128 else 16, 16, 8) if d % w == 0) for d in dims),
        "mlp_ratios": (3,) * stages,
        "separable": tuple(h * w > 256 for h, w in grids),
        "layer_scale": (None,) * stages,
        "stem_strides": _STRIDES[found["patch"]],
        "projection": 2 * dims[-1],
        "init_std": None,
    }
    return "ppma_t", {**settings, **spec}


def _convert(model: Any, state: State) -> State:
    named: State = {}
    for key, value in state.items():
        head, found, kind = key.rpartition(".mixer.q_proj.")
        if found:
            parts = [state[f"{head}.mixer.{name}_proj.{kind}"] for name in "qkv"]
            named[f"{head}.mixer.qkv.{kind}"] = torch.cat(parts)
        elif ".mixer.k_proj." not in key and ".mixer.v_proj." not in key:
            named[key] = value.flatten() if key.endswith((".scale1", ".scale2")) else value
    return keep_backbone(model, named, "head.")


_T: dict[str, Any] = dict(
    dims=(64, 128, 256, 512),
    depths=(2, 2, 8, 2),
    heads=(4, 4, 8, 16),
    mlp_ratios=(3, 3, 3, 3),
    separable=(True, True, False, False),
)
_S: dict[str, Any] = dict(
    dims=(64, 128, 256, 512),
    depths=(3, 4, 18, 4),
    heads=(4, 4, 8, 16),
    mlp_ratios=(4, 4, 3, 3),
    separable=(True, True, True, False),
)
_B: dict[str, Any] = dict(
    dims=(80, 160, 320, 512),
    depths=(4, 8, 25, 8),
    heads=(5, 5, 10, 16),
    mlp_ratios=(4, 4, 3, 3),
    separable=(True, True, True, False),
    layer_scale=(None, None, 1e-6, 1e-6),
)


@register_system(
    "ppma",
    tasks=("image-classification",),
    scale=_scale,
    variants={
        "ppma_t": _T,
        "ppma_s": _S,
        "ppma_b": _B,
        # the authors' own names
        "PPMAViT_T": _T,
        "PPMAViT_S": _S,
        "PPMAViT_B": _B,
    },
    rules=[
        (r"\.Relpos\.angle$", None),
        *((rf"^patch_embed\.proj\.{3 * i}\.", f"stem.convs.{i}.conv.") for i in range(4)),
        *((rf"^patch_embed\.proj\.{3 * i + 1}\.", f"stem.convs.{i}.norm.") for i in range(4)),
        (r"^layers\.(\d+)\.downsample\.reduction\.", r"merges.\1.conv."),
        (r"^layers\.(\d+)\.downsample\.norm\.", r"merges.\1.norm."),
        (r"^layers\.(\d+)\.blocks\.(\d+)\.pos\.", r"stages.\1.\2.0."),
        (r"^layers\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.\2.1."),
        (r"\.retention_layer_norm\.", ".norm1."),
        (r"\.final_layer_norm\.", ".norm2."),
        (r"\.gamma_([12])$", r".scale\1"),
        (r"\.retention\.path_embed\.dt_linear\.", ".mixer.step_weight."),
        (r"\.retention\.path_embed\.dt_bias$", ".mixer.step_bias"),
        (r"\.retention\.path_embed\.A_log$", ".mixer.log_rate"),
        (r"\.retention\.lepe\.conv\.", ".mixer.near."),
        (r"\.retention\.out_proj\.", ".mixer.proj."),
        (r"\.retention\.", ".mixer."),
        (r"\.ffn\.dwconv\.conv\.", ".mlp.dw."),
        (r"\.ffn\.", ".mlp."),
        (r"^outnorm([0-3])\.", r"out_norms.\1."),
        (r"^head\.", "head.classifier.fc."),
        (r"^(proj|norm)\.", r"head.\1."),
    ],
    convert=_convert,
)
def ppma(
    *,
    dims: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (2, 2, 8, 2),
    heads: Sequence[int] = (4, 4, 8, 16),
    mlp_ratios: Sequence[float] = (3, 3, 3, 3),
    separable: Sequence[bool] = (True, True, False, False),
    layer_scale: Sequence[float | None] = (None, None, None, None),
    stem_strides: tuple[int, int] = (2, 2),
    projection: int = 1024,
    drop: float = 0.0,
    drop_path: float = 0.0,
    init_std: float | None = 0.02,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    dense: bool = False,
    mixer: str = "polyline",
    mixer_options: dict[str, Any] | None = None,
) -> nn.Module:
    """A PPMA-ViT.

    Args:
        separable: for each stage, attention along rows and columns in turn instead of over all tokens.
        layer_scale: for each stage, the initial value of the branches' scales, None for none.
        stem_strides: steps of the stem's first and third convolution.
        projection: channels that are pooled for the classifier.
        init_std: deviation of the first weights, None for `fan_in ** -0.5`.
        img_size: only mixers bound to a grid need it; the model takes any image.
        dense: a norm for each map that `features` gives, and no classifier.
        mixer: what stands in for polyline-masked attention.

    Raises:
        ValueError: the settings of the stages differ in length.
    """
    each = {
        "dims": dims,
        "depths": depths,
        "heads": heads,
        "mlp_ratios": mlp_ratios,
        "separable": separable,
        "layer_scale": layer_scale,
    }
    if len({len(setting) for setting in each.values()}) > 1:
        raise ValueError(f"settings of the stages must be of one length, got {each}")
    grids = token_grid(img_size, stem_strides[0] * stem_strides[1], len(dims), up=True)
    norm = partial(nn.LayerNorm, eps=1e-6)
    stages = []
    for i, rates in enumerate(stage_rates(drop_path, depths)):
        dim = dims[i]
        own = options_for(mixer, {"heads": heads[i], "separable": separable[i]})
        blocks = []
        for rate in rates:
            mix = create_mixer(mixer, dim, grid=grids[i], **{**own, **(mixer_options or {})})
            mlp = ConvMlp(dim, int(dim * mlp_ratios[i]), before=nn.GELU, act=nn.Identity, residual=True, drop=drop)
            block = Block(dim, mix, mlp, norm=norm, layer_scale=layer_scale[i], drop_path=rate)
            blocks.append(nn.Sequential(ConvPositions(dim), block))
        stages.append(blocks)
    stem_widths, steps = (dims[0] // 2, dims[0] // 2, dims[0], dims[0]), (stem_strides[0], 1, stem_strides[1], 1)
    model = Pyramid(
        ConvStem(in_chans, stem_widths, steps, act=nn.GELU, last_act=False),
        stages,
        [ConvNorm(dim, out, 3, stride=2) for dim, out in pairwise(dims)],
        norm=None,
        head=nn.Identity() if dense else ProjectedClassifier(dims[-1], projection, num_classes),
        out_norms=[LayerNorm(dim) for dim in dims] if dense else None,
    )
    init_transformer(model, init_std)
    return model
