"""SLAB: DeiT, PVT, Swin, CSWin and LLaMA whose norms fade into batch norms, the first four with a linear attention.

Source: Guo et al. 2024, "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive
Re-parameterized Batch Normalization".

- every norm is PRepBN: a layer norm at the first step, a batch norm beside a scaled copy of its input after `steps`.
  `gossamer.layers.fold.fold_batch_norm` then makes all of them part of the products around them, exactly, without the
  official slip in the patch embedding (it forgets `alpha` times the convolution's bias)
- do not judge a model before its norms have faded: evaluation uses the batch norm, whose weights are poor until then
- a network of ten blocks learns sooner with norms that fade than with batch norms in their place at once; one of four
  blocks and large steps learns sooner with the latter, whose input is not added to their answer
- linear attention where `kinds` says L, the base's own softmax attention where it says S: all of DeiT (no class token,
  mean of the map), all of PVT (no class token, no reduction, no last norm), the first two stages of Swin (windows of 56
  tokens, which is the whole map at 224 pixels) and of CSWin (the whole map, with its own position from the values).
  LLaMA keeps its attention, its root-mean-square norms alone are exchanged. PVT with reduction has no published size
  and is not built
- written from the paper's description: the authors' code has no licence
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from gossamer.layers import LayerNorm, resize_positions
from gossamer.layers.init import init_transformer
from gossamer.layers.language import RMSNorm
from gossamer.layers.norms import ProgressiveRepBatchNorm, RepBatchNorm
from gossamer.mixers import create_mixer
from gossamer.models import cswin as _cswin
from gossamer.models import llama as _llama
from gossamer.models import pvt as _pvt
from gossamer.models import swin as _swin
from gossamer.models import vit as _vit
from gossamer.models._pyramids import small_pyramid, token_grid
from gossamer.models.registry import State, register_system, rename, system
from gossamer.models.transformers import ARCHITECTURES, fuse_qkv

Base = Literal["deit", "pvt", "swin", "cswin", "llama"]
LINEAR = "simplified_linear"
SOFTMAX = {
    "deit": "attention",
    "pvt": "spatial_reduction",
    "swin": "window",
    "cswin": "cross_shaped",
    "llama": "rotary_gqa",
}


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]] | None:
    if "img_size" not in spec:
        return None
    found = small_pyramid(spec, size, block=12, step=16, least_patch=2)
    stages = len(found["dims"])
    settings = {
        "patch": found["patch"],
        "dims": found["dims"],
        "depths": found["depths"],
        "heads": tuple(d // 16 if d % 32 else d // 32 for d in found["dims"]),
        "mlp_ratios": (4,) * stages,
        "kinds": "L" * stages,
        # A run of minutes may end before any schedule does. First weights stay small: the input that the norm adds to
        # its answer makes every branch stronger.
        "norm": "rep",
    }
    return "slab_pvt_t", {**settings, **spec}


_NORMS = (
    (r"(^|\.)(norm\d?)\.norm2\.(bn\.)?", r"\1\2.rep."),
    (r"(^|\.)(norm\d?)\.norm1\.(weight|bias)$", r"\1\2.layer.\3"),
    (r"(^|\.)(norm\d?)\.iter$", r"\1\2.left"),
    (r"(^|\.)(norm\d?)\.total_step$", r"\1\2.steps"),
    (r"(^|\.)(norm\d?)\.bn\.", r"\1\2."),
)


def _convert(model: Any, state: State) -> State:
    if model.base == "llama":
        return fuse_qkv(rename(state, [*ARCHITECTURES["llama"].rules, *_NORMS]))
    base = system(model.base)
    if model.base == "deit" and model.stem.tokens is None:
        # The authors keep a class token that nothing reads.
        state = {key: value for key, value in state.items() if key != "cls_token"}
    state = rename(state, [*base.rules, *_NORMS])
    own = model.state_dict()
    for key in list(state):
        if ".lepe.0." in key and (whole := key.replace(".lepe.0.", ".lepe.")) in own:
            # A linear stage has no stripes, and so no list of two.
            state[whole] = state.pop(key)
        elif ".mixer.q." in key and (fused := key.replace(".q.", ".qkv.")) in own:
            state[fused] = torch.cat((state.pop(key), state.pop(key.replace(".q.", ".kv."))))
        elif key.endswith(".mixer.positions") and state[key].shape != own[key].shape:
            old = round(state[key].shape[1] ** 0.5)
            new = model.get_submodule(key.rpartition(".")[0]).size
            state[key] = resize_positions(state[key], (old, old), new, mode="bilinear")
    return base.convert(model, state) if base.convert else state


_TINY: dict[str, Any] = dict(base="deit", dims=(192,), depths=(12,), heads=(3,), mlp_ratios=(4,), patch=16)
_SMALL: dict[str, Any] = {**_TINY, "dims": (384,), "heads": (6,)}
_PVT: dict[str, Any] = dict(
    base="pvt", kinds="LLLL", dims=(64, 128, 320, 512), heads=(1, 2, 5, 8), mlp_ratios=(8, 8, 4, 4), steps=300_000
)
_SWIN: dict[str, Any] = dict(
    base="swin", kinds="LLSS", dims=(96, 192, 384, 768), heads=(3, 6, 12, 24), mlp_ratios=(4, 4, 4, 4)
)
_CSWIN: dict[str, Any] = dict(
    base="cswin", kinds="LLSS", dims=(64, 128, 256, 512), heads=(2, 4, 8, 16), mlp_ratios=(4, 4, 4, 4), steps=120_000
)
_LLAMA: dict[str, Any] = dict(
    base="llama", kinds="S", dims=(1024,), depths=(18,), heads=(8,), mlp_ratios=(4,), warm=10_000, steps=18_000
)


def _exchange(model: nn.Module, kind: type[nn.Module], make: Any) -> None:
    """Every norm of this kind becomes one that `make` makes."""
    for part in list(model.modules()):
        for name, child in part.named_children():
            if isinstance(child, kind):
                norm: Any = child
                setattr(part, name, make(norm.normalized_shape[0]))


@register_system(
    "slab",
    tasks=("image-classification", "language-modelling"),
    scale=_scale,
    variants={
        "slab_deit_t": {**_TINY, "kinds": "L"},
        "slab_deit_s": {**_SMALL, "kinds": "L"},
        # Released with the batch norm alone.
        "deit_t_prepbn": {**_TINY, "kinds": "S", "norm": "rep"},
        "deit_s_prepbn": {**_SMALL, "kinds": "S"},
        "slab_pvt_t": {**_PVT, "depths": (2, 2, 2, 2)},
        "slab_pvt_s": {**_PVT, "depths": (3, 4, 6, 3)},
        "slab_pvt_m": {**_PVT, "depths": (3, 4, 18, 3)},
        "slab_swin_t": {**_SWIN, "depths": (2, 2, 6, 2)},
        "slab_swin_s": {**_SWIN, "depths": (2, 2, 18, 2)},
        "slab_cswin_t": {**_CSWIN, "depths": (2, 4, 18, 1)},
        "llama_350m_prepbn": _LLAMA,
    },
    rules=[
        *_NORMS,
        # Read by nothing, or made anew.
        (r"\.attns\.0\.scale$|\.num_step$|\.inv_freq$", None),
        (r"\.attns?(\.0)?\.dwc\.", ".mixer.conv."),
        (r"\.attns?(\.0)?\.positional_encoding$", ".mixer.positions"),
    ],
    convert=_convert,
)
def slab(
    *,
    base: Base = "swin",
    kinds: str = "LLSS",
    dims: Sequence[int] = (96, 192, 384, 768),
    depths: Sequence[int] = (2, 2, 6, 2),
    heads: Sequence[int] = (3, 6, 12, 24),
    mlp_ratios: Sequence[int] = (4, 4, 4, 4),
    patch: int = 4,
    window: int = 7,
    linear_window: int = 56,
    stripes: Sequence[int] = (1, 2, 7, 7),
    norm: Literal["progressive", "rep"] = "progressive",
    steps: int = 60_000,
    warm: int = 0,
    pad: bool = False,
    drop_path: float = 0.0,
    init_std: float | None = 0.02,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    vocab_size: int = 32000,
    max_len: int = 2048,
    pad_id: int = 0,
) -> nn.Module:
    """A SLAB form of DeiT (one stage), PVT, Swin, CSWin or LLaMA (one stage, a language model).

    Args:
        base: the network whose parts are exchanged.
        kinds: a letter for each stage, L for linear attention and S for the base's own.
        dims: channels of each stage; `depths`, `heads` and `mlp_ratios` likewise.
        window: window side of Swin's softmax stages in tokens; `linear_window` that of its linear ones.
        stripes: width of the stripes of CSWin's softmax stages; its linear ones have none.
        norm: `progressive`, or `rep` for the batch norm from the first step on.
        steps: training steps until a progressive norm has lost its layer norm; `warm` steps of that alone before.
        pad: take any image where the base (DeiT, Swin, CSWin) would refuse one that does not fit.
        init_std: deviation of the first weights, None for `fan_in ** -0.5`.
        vocab_size, max_len, pad_id: of LLaMA, which reads ids in place of images.

    Raises:
        ValueError: settings differ in length, `kinds` has another letter, or the base refuses them.
    """
    count = len(dims)
    if {len(kinds), len(depths), len(heads), len(mlp_ratios)} != {count}:
        raise ValueError(
            f"kinds, dims, depths, heads and mlp_ratios must be of one length, got {kinds!r}, {tuple(dims)}, "
            f"{tuple(depths)}, {tuple(heads)} and {tuple(mlp_ratios)}"
        )
    if set(kinds) - set("LS"):
        raise ValueError(f"kinds must be made of L and S, got {kinds!r}")
    if base not in SOFTMAX:
        raise ValueError(f"base must be one of {sorted(SOFTMAX)}, got {base!r}")
    if base in ("deit", "llama") and count != 1:
        raise ValueError(f"{base} has one stage, got {count}")
    if base == "llama" and kinds != "S":
        raise ValueError(f"llama keeps its attention (kinds='S'), got {kinds!r}")
    if base in ("swin", "cswin") and (
        [d // dims[0] for d in dims] != [2**i for i in range(count)] or len(set(mlp_ratios)) != 1
    ):
        raise ValueError(f"{base} doubles its channels and has one MLP ratio, got {tuple(dims)}, {tuple(mlp_ratios)}")
    layer: Any = partial(LayerNorm, eps=1e-5 if base in ("swin", "cswin") else 1e-6)
    if base == "llama":
        layer = partial(RMSNorm, eps=1e-6)
    make = RepBatchNorm if norm == "rep" else partial(ProgressiveRepBatchNorm, steps=steps, warm=warm, layer=layer)
    mixers = [LINEAR if kind == "L" else SOFTMAX[base] for kind in kinds]
    common: dict[str, Any] = dict(
        patch=patch, drop_path=drop_path, img_size=img_size, in_chans=in_chans, num_classes=num_classes, norm=make
    )
    model: Any
    sizes: dict[str, Any]
    if base == "deit":
        sizes = dict(dim=dims[0], depth=depths[0], heads=heads[0], mlp_ratio=mlp_ratios[0])
        model = _vit.vit(**common, **sizes, pad=pad, mixer=mixers[0])
    elif base == "pvt":
        sizes = dict(dims=dims, depths=depths, heads=heads, mlp_ratios=mlp_ratios, ratios=(8, 4, 2, 1)[-count:])
        model = _pvt.pvt(**common, **sizes, token=False, mixer=mixers)
        model.norm = None
    elif base == "llama":
        sizes = dict(dim=dims[0], depth=depths[0], heads=heads[0], hidden=dims[0] * mlp_ratios[0])
        model = _llama.llama(**sizes, vocab_size=vocab_size, max_len=max_len, pad_id=pad_id)
        _exchange(model, RMSNorm, make)
    elif base == "cswin":
        del common["norm"]
        sizes = dict(embed_dim=dims[0], depths=depths, mlp_ratio=mlp_ratios[0], pad=pad)
        # What linear stages are given here is exchanged below.
        sizes["heads"] = [h if kind == "S" else 2 for h, kind in zip(heads, kinds, strict=True)]
        sizes["stripes"] = [s if kind == "S" else 1 for s, kind in zip(stripes[-count:], kinds, strict=True)]
        model = _cswin.cswin(**common, **sizes)
        _exchange(model, LayerNorm, make)
        for i, grid in enumerate(token_grid(img_size, patch, count, up=True)):
            for block in model.stages[i] if kinds[i] == "L" else ():
                block.mixer = create_mixer(LINEAR, dims[i], heads=heads[i], lepe=True, grid=grid)
                init_transformer(block.mixer)
    else:
        options = [{"window": linear_window} if kind == "L" else {} for kind in kinds]
        sizes = dict(embed_dim=dims[0], depths=depths, heads=heads, mlp_ratio=mlp_ratios[0], window=window)
        model = _swin.swin(**common, **sizes, pad=pad, mixer=mixers, mixer_options=options)
    if init_std != 0.02:
        init_transformer(model, init_std)
    model.base = base
    if base != "swin" or not pad:
        # Nothing is padded between a norm and the product that reads it, so that fold_batch_norm may join them.
        for module in model.modules():
            if hasattr(module, "qkv"):
                module.input_products = ("qkv",)
    return model
