"""SN-Net: a family of trained models in one, dozens of networks between the smallest and the largest.

Source: Pan, Cai, Zhuang 2023, "Stitchable Neural Networks"; Pan, Liu, He, Cai, Zhuang 2023, "Stitched ViTs are
Flexible Vision Backbones" (SN-Netv2: `ways=2`).

- anchors are named like any model; their weights and those of the stitching layers load from the authors' files
- `model.path = i` chooses the network that runs, `model(x, latency_ms=5)` the best that is fast enough here, once
  `model.measure(inputs)` has timed them
- released code leaves the last norm out on stitched paths of DeiT: `final_norm=False`; ours keeps it
- released code shifts the layer numbers of unequal depths by one place; ours does too, so that its files fit
- files of SN-Netv2 must have been saved in training mode: in eval mode the low-rank product is in the weights already
- the last stitch of SN-Netv2 from the small to the large anchor leaves no block behind it. The released code leaves it
  out of training where the small anchor has 12 blocks; ours does at any depth
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from gossamer import catalogue
from gossamer.models.registry import State, create_model, register_system, rename, system
from gossamer.trunks.anchors import check_anchors, depths_of
from gossamer.trunks.paths import one_way, two_way
from gossamer.trunks.stitched import Stitched


def join(
    anchors: Sequence[nn.Module],
    *,
    ways: int = 1,
    kernel: int = 2,
    stride: int = 1,
    nearest: bool = True,
    rank: int = 0,
    final_norm: bool = True,
) -> Stitched:
    """`stitched` of models that exist already.

    Raises:
        ValueError: the anchors cannot be joined so.
    """
    if ways not in (1, 2):
        raise ValueError(f"ways must be 1 or 2, got {ways}")
    check_anchors(anchors)
    depths = [depths_of(anchor) for anchor in anchors]
    if ways == 1:
        plan = one_way(depths, kernel=kernel, stride=stride, nearest=nearest)
    elif len(anchors) != 2 or len(depths[0]) > 1:
        raise ValueError(f"ways=2 joins two anchors of one stage, got {len(anchors)} of {len(depths[0])} stages")
    else:
        plan = two_way(depths[0][0], depths[1][0])
    if not plan.groups or not any(layers for *_, layers in plan.groups):
        raise ValueError(f"anchors of depths {depths} leave no place for a stitch")
    return Stitched(anchors, plan, rank=rank, final_norm=final_norm)


def _convert(model: Any, state: State) -> State:
    own = model.state_dict()
    renamed: State = {key: own[key] for key in ("latencies", "scores", "_extra_state")}
    for number, anchor in enumerate(model.anchors):
        prefix = f"anchors.{number}."
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        entry = system(catalogue.find(anchor.config["name"]).slug)
        part = rename(part, entry.rules)
        if entry.convert is not None:
            part = entry.convert(anchor, part)
        renamed |= {prefix + key: value for key, value in part.items()}
    pairs = len(model.anchors) - 1
    for key, value in state.items():
        if found := re.fullmatch(r"stitch_layers\.(?:(\d+)\.)?(\d+)\.(\d+)\.transform\.(.+)", key):
            # In pyramids the stage stands before the pair of anchors.
            group = int(found[1]) * pairs + int(found[2]) if found[1] else int(found[2])
            name = {"lora_A": "down", "lora_B": "up"}.get(found[4], found[4])
            renamed[f"stitches.{group}.{found[3]}.{name}"] = value
        elif not key.startswith("anchors."):
            renamed[key] = value
    return renamed


def _named(*names: str) -> tuple[dict[str, Any], ...]:
    return tuple({"name": name} for name in names)


_V2: dict[str, Any] = dict(ways=2, rank=64)
_TASKS = ("image-classification", "text-classification", "sentence-similarity", "language-modelling")


@register_system(
    "snnet-v2",
    tasks=_TASKS,
    variants={
        "snnetv2_s_b": dict(anchors=_named("deit3_small_patch16_224", "deit3_base_patch16_224"), **_V2),
        "snnetv2_s_l": dict(anchors=_named("deit3_small_patch16_224", "deit3_large_patch16_224"), **_V2),
        "snnetv2_b_l": dict(anchors=_named("deit3_base_patch16_224", "deit3_large_patch16_224"), **_V2),
    },
    convert=_convert,
)
@register_system(
    "snnet",
    tasks=_TASKS,
    variants={
        "stitched": {},
        "snnet_deit_ti_s_b": dict(
            anchors=_named("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")
        ),
        "snnet_swin_ti_s_b": dict(anchors=_named("swin_t", "swin_s", "swin_b")),
    },
    convert=_convert,
)
def stitched(
    *,
    anchors: Sequence[Mapping[str, Any]] = (),
    ways: int = 1,
    kernel: int = 2,
    stride: int = 1,
    nearest: bool = True,
    rank: int = 0,
    final_norm: bool = True,
) -> nn.Module:
    """Several models of one task, joined.

    Args:
        anchors: their configs (`name` and what else `create_model` is given), smallest first.
        ways: 1 leads from smaller to larger anchors; 2 both ways between two.
        kernel, stride: window of blocks within which two anchors of one depth are joined (`ways=1`).
        nearest: join only neighbours in size (`ways=1`).
        rank: of what the stitching layers learn, 0 for all of their weights.
        final_norm: whether stitched paths have the norm behind the last block.

    Raises:
        ValueError: the anchors cannot be joined so; the message says why.
    """
    models = [create_model(**anchor) for anchor in anchors]
    return join(models, ways=ways, kernel=kernel, stride=stride, nearest=nearest, rank=rank, final_norm=final_norm)
