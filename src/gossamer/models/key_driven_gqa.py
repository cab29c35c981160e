"""Vision transformers with grouped queries whose groups follow the keys: GQA, KDGQA, DGQA and PGQA.

Source: Khan et al. 2024, "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention".

- a ViT (class token, learned positions, pre-norm) with another attention; the mechanisms and what differs from the
  authors' code are in `mixers/key_driven.py`
- `load_official` takes the authors' files, and multi-head ViT files with one `qkv` product: keys and values become the
  mean of each group's heads, as training starts in the paper. A head for other classes then stays as it was made; the
  authors leave the last norm behind as well, here it is loaded
- position tables of another resolution are resized (bicubic)
- `dgqa` keeps its allocation and count of steps in the weights; files without them start from equal shares
- the paper's gains need its up-training; no accuracy is claimed here
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.layers import Block, Classifier, Mlp, PatchEmbed, TokenStem, resize_positions
from gossamer.layers.blocks import drop_path_rates
from gossamer.layers.embed import pair
from gossamer.layers.init import init_transformer
from gossamer.mixers import create_mixer
from gossamer.mixers.grouped_query import GroupedMixer, group_heads
from gossamer.models.registry import State, register_system, system
from gossamer.models.vit import PaddedPatches
from gossamer.trunks import Isotropic

SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa": ("gqa", {}),
    "kdgqa": ("kdgqa", {}),
    "dgqa_ema": ("dgqa", {"kind": "ema"}),
    "dgqa_diff": ("dgqa", {"kind": "diff"}),
    "pgqa": ("pgqa", {}),
}


def _convert(model: Any, state: State) -> State:
    own = model.state_dict()
    table = state.get("stem.positions")
    if table is not None and table.shape != own["stem.positions"].shape:
        side = round((table.shape[1] - 1) ** 0.5)
        state["stem.positions"] = resize_positions(table, (side, side), model.stem.grid, prefix=1)
    multi_head = False
    for name, mixer in model.named_modules():
        if not isinstance(mixer, GroupedMixer):
            continue
        for kind in ("weight", "bias"):
            parts = [state.pop(f"{name}.{p}.{kind}", None) for p in "qkv"]
            if all(isinstance(part, Tensor) for part in parts):
                state[f"{name}.qkv.{kind}"] = torch.cat([part for part in parts if part is not None])
            elif f"{name}.qkv.{kind}" in state and mixer.kv_heads < mixer.heads:
                rows = state[f"{name}.qkv.{kind}"]
                if rows.shape[0] == 3 * mixer.heads * mixer.head_dim:
                    state[f"{name}.qkv.{kind}"] = group_heads(rows, mixer.heads, mixer.kv_heads)
                    multi_head = True
        for key in ("cache", "allocation", "steps"):
            if f"{name}.{key}" in own:
                state.setdefault(f"{name}.{key}", own[f"{name}.{key}"])
    if multi_head:
        for key in ("head.fc.weight", "head.fc.bias"):
            if key in own and (key not in state or state[key].shape != own[key].shape):
                state[key] = own[key]
            elif key not in own:
                state.pop(key, None)
    return state


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]] | None:
    scale = system("deit").scale
    found = scale(spec, size) if scale else None
    if found is None:
        return None
    settings = found[1]
    heads = settings["heads"]
    kv_heads = max(g for g in range(1, max(2, heads // 2 + 1)) if heads % g == 0)
    return "vit_s16_dgqa_ema", {**settings, "kv_heads": kv_heads}


_SMALL: dict[str, Any] = dict(dim=384, depth=12, heads=6, kv_heads=3)
_BASE: dict[str, Any] = dict(dim=768, depth=12, heads=12, kv_heads=3)
_LARGE: dict[str, Any] = dict(dim=1024, depth=24, heads=16, kv_heads=4)
_SIZES: dict[str, dict[str, Any]] = {"s16": _SMALL, "b16": _BASE, "l16": _LARGE}


@register_system(
    "key-driven-gqa",
    tasks=("image-classification",),
    scale=_scale,
    variants={
        "vit_l_dgqa": {**_LARGE, "scheme": "dgqa_ema"},
        **{f"vit_{size}_{scheme}": {**kw, "scheme": scheme} for size, kw in _SIZES.items() for scheme in SCHEMES},
        # Multi-head attention: a key head for each query head.
        **{f"vit_{size}_mhsa": {**kw, "scheme": "gqa", "kv_heads": kw["heads"]} for size, kw in _SIZES.items()},
    },
    rules=[
        (r"^patch_embed\.proj\.", "stem.embed.proj."),
        (r"^cls_token$", "stem.tokens"),
        (r"^pos_embed$", "stem.positions"),
        (r"\.attn\.", ".mixer."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ],
    convert=_convert,
)
def key_driven_gqa(
    *,
    dim: int = 384,
    depth: int = 12,
    heads: int = 6,
    kv_heads: int | None = None,
    scheme: str = "gqa",
    patch: int = 16,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.0,
    pad: bool = False,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 10,
    mixer_options: dict[str, Any] | None = None,
) -> nn.Module:
    """A vision transformer with grouped queries.

    Args:
        kv_heads: key and value heads, half of `heads` by default.
        scheme: `gqa`, `kdgqa`, `dgqa_ema`, `dgqa_diff` or `pgqa`.
        pad: fill an image that `patch` does not divide up with zeros.
        mixer_options: further keywords of the scheme's mixer (`window`, `freeze_allocation`, `over`, `sampling`).

    Raises:
        ValueError: no such scheme, or `patch` does not divide the image and `pad` is False.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}; got {scheme!r}")
    height, width = pair(img_size)
    if not pad and (height % patch or width % patch):
        raise ValueError(f"patch must divide the image; got patch={patch}, img_size={height}x{width}; or give pad=True")
    embed = (PaddedPatches if pad else PatchEmbed)(in_chans, dim, patch)
    stem = TokenStem(embed, dim, (-(-height // patch), -(-width // patch)))
    norm = partial(nn.LayerNorm, eps=1e-6)
    name, kind = SCHEMES[scheme]
    options = {"heads": heads, "kv_heads": kv_heads, **kind, **(mixer_options or {})}
    blocks = []
    for rate in drop_path_rates(drop_path, depth):
        mix = create_mixer(name, dim, **options)
        blocks.append(Block(dim, mix, Mlp(dim, int(dim * mlp_ratio)), norm=norm, drop_path=rate))
    model = Isotropic(stem, blocks, norm=norm(dim), head=Classifier(dim, num_classes, pool="token"))
    init_transformer(model)
    return model
