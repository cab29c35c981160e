"""EcoFormer: PVTv2 whose large maps are attended to by binary codes, in which products are additions.

Source: Liu et al. 2022, "EcoFormer: Energy-Saving Attention with Linear Complexity".

- all stages but the last have hashed linear attention on the whole map, the last plain softmax attention; nothing is
  shrunken any more
- made from softmax weights: `load_official` takes those of a PVTv2 as well (the query projection becomes query and key,
  the convolutions of the reduction go), and the first training step trains the hash
- `operations` counts multiplications and additions apart, which is what the paper's energy table is made of
- weights of the authors' own want `bias="official"`, the default of the variants; see `mixers/hashed_linear.py`
- the authors' Twins form is not built
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gossamer import measure
from gossamer.mixers.attention import Attention
from gossamer.mixers.hashed_linear import Bias, HashedLinear
from gossamer.models import pvt as _pvt
from gossamer.models._pyramids import small_pyramid, token_grid
from gossamer.models.registry import State, register_system

# pJ of a single-precision multiplication and addition, 45 nm (Horowitz 2014), as the paper takes them.
MULTIPLY, ADD = 3.7, 0.9


def operations(model: nn.Module, image: Float[Tensor, "1 i height width"]) -> tuple[int, int]:
    """Multiplications and additions for one image: of linear layers and convolutions one each a MAC.

    Attention is counted by the authors' rules: a code times a value is an addition, softmax costs a multiplication a
    pair for the scale and nothing for the exponentials.
    """
    counts = [0, 0]

    def add(module: Any, inputs: tuple[Tensor, ...]) -> None:
        n = inputs[0].shape[1:-1].numel()
        if isinstance(module, HashedLinear):
            found = module.operations(n)
        else:
            products = 2 * n * n * module.heads * module.head_dim
            found = products + module.heads * n * n, products
        for i, count in enumerate(found):
            counts[i] += count

    mixers = [m for m in model.modules() if isinstance(m, HashedLinear | Attention)]
    hooks = [m.register_forward_pre_hook(add) for m in mixers]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    by_op = measure.macs(model, (image,)).by_op
    macs = sum(count for op, count in by_op.items() if op in ("addmm", "mm", "convolution"))
    return counts[0] + macs, counts[1] + macs


def energy(multiplications: int, additions: int) -> float:
    """`3.7 pJ * multiplications + 0.9 pJ * additions` in mJ: an estimate, arithmetic alone."""
    return (MULTIPLY * multiplications + ADD * additions) * 1e-9


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    found = small_pyramid(spec, size, block=15, step=16, least_patch=2)
    stages = len(found["dims"])
    grids = token_grid(spec["img_size"], found["patch"], stages, up=True)
    # Tokens of the smallest map that is hashed.
    rows, columns = grids[max(0, stages - 2)]
    settings = {
        "patch": found["patch"],
        "dims": found["dims"],
        "depths": found["depths"],
        "heads": tuple(d // 16 if d % 32 else d // 32 for d in found["dims"]),
        "mlp_ratios": (4,) * stages,
        "anchors": max(1, min(25, rows * columns // 2)),
        "top": max(1, min(10, rows * columns // 4)),
        "samples": 8,
        "bias": "paper",
        "init_std": None,
    }
    return "pvtv2_b0_ecoformer", {**settings, **spec}


def _convert(model: Any, state: State) -> State:
    own = model.state_dict()
    taken: State = {}
    for key, value in state.items():
        stem, _, name = key.rpartition(".mixer.")
        part, _, kind = name.partition(".")
        if not stem or (part in ("qk", "v", "qkv") and f"{stem}.mixer.q.{kind}" not in state):
            taken[key] = value
        elif part == "q" and f"{stem}.mixer.qkv.{kind}" in own:
            taken[f"{stem}.mixer.qkv.{kind}"] = torch.cat((value, state[f"{stem}.mixer.kv.{kind}"]))
        elif part == "q":
            # From softmax weights; the hash is still to be trained.
            taken[f"{stem}.mixer.qk.{kind}"] = value
            taken[f"{stem}.mixer.v.{kind}"] = state[f"{stem}.mixer.kv.{kind}"].chunk(2)[1]
            taken.update({f"{stem}.mixer.{b}": own[f"{stem}.mixer.{b}"] for b in ("weights", "means", "anchors")})
        elif part not in ("kv", "conv", "norm"):
            taken[key] = value
    return _pvt.convert(model, taken)


_T: dict[str, Any] = dict(depths=(2, 2, 2, 2), bias="official")
_S: dict[str, Any] = dict(depths=(3, 4, 6, 3), bias="official")


@register_system(
    "ecoformer",
    tasks=("image-classification",),
    scale=_scale,
    variants={
        "pvtv2_b0_ecoformer": {**_T, "dims": (32, 64, 160, 256)},
        "pvtv2_b1_ecoformer": _T,
        "pvtv2_b2_ecoformer": _S,
        "pvtv2_b3_ecoformer": {**_S, "depths": (3, 4, 18, 3)},
        "pvtv2_b4_ecoformer": {**_S, "depths": (3, 8, 27, 3)},
    },
    rules=[
        # Made with the Performer's features in mind, read by nothing.
        (r"\.projection_matrix$", None),
        (r"\.attn\.to_(qk|v)\.", r".mixer.\1."),
        (r"\.attn\.fast_attention\.ksh\.A$", ".mixer.weights"),
        (r"\.attn\.fast_attention\.ksh\.mvec$", ".mixer.means"),
        (r"\.attn\.fast_attention\.ksh\.anchor$", ".mixer.anchors"),
        *_pvt.RULES,
    ],
    convert=_convert,
)
def ecoformer(
    *,
    dims: Sequence[int] = (64, 128, 320, 512),
    depths: Sequence[int] = (3, 4, 6, 3),
    heads: Sequence[int] = (1, 2, 5, 8),
    mlp_ratios: Sequence[int] = (8, 8, 4, 4),
    patch: int = 4,
    bits: int = 16,
    anchors: int = 25,
    top: int = 10,
    samples: int | None = None,
    bias: Bias = "paper",
    drop_path: float = 0.0,
    init_std: float | None = 0.02,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    dense: bool = False,
) -> nn.Module:
    """A PVTv2 with hashed linear attention.

    Args:
        dims: channels of each stage; `depths`, `heads` and `mlp_ratios` likewise.
        bits: length of the code; `anchors`, `top`, `samples` and `bias` as in `HashedLinear`.
        init_std: deviation of the first weights, None for `fan_in ** -0.5`.
        dense: no classifier.
    """
    stages = len(dims)
    options = {"bits": bits, "anchors": anchors, "top": top, "samples": samples, "bias": bias}
    return _pvt.pvt(
        dims=dims,
        depths=depths,
        heads=heads,
        mlp_ratios=mlp_ratios,
        ratios=(1,) * stages,
        patch=patch,
        v2=True,
        drop_path=drop_path,
        init_std=init_std,
        img_size=img_size,
        in_chans=in_chans,
        num_classes=num_classes,
        dense=dense,
        mixer=["hashed_linear"] * (stages - 1) + ["attention"],
        mixer_options=[options] * (stages - 1) + [{}],
    )
