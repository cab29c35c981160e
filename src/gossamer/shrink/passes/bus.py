"""BUS: after some block key patches stay and the others become one token; a small decoder may sum them up at the end.

Source: Jiang et al. 2023, "BUS: Efficient and Effective Vision-language Pre-training with Bottom-Up Patch
Summarization". A reconstruction: no code is public, and neither the layer, the shares nor the decoder's form could be
read in the paper. The parts are in `gossamer.layers.summary`.

- our models read an image or a text alone, so patches are ranked by the class token's attention, as is done without a
  text. With one, `gossamer.layers.summary` has the selector, its training by boxes (`matching_loss`) and `summarise`
- not here: text tower, fusion layers, and the losses that need them (contrast, matching, masked and prefix words)
- `decoder` layers of abstraction save where layers of fusion follow. In a single tower only the head does, so there are
  none by default
- `keep` is the share of all tokens that is worked on in the mean of the blocks. Patches leave in the middle, or as much
  earlier as it takes for a share alpha of at least 0.3 to stay
- trained on the task with the dense model for a teacher
"""

from __future__ import annotations

import copy
import time
from typing import Any

from torch import nn

from gossamer.layers.ranking import share_up
from gossamer.layers.summary import PatchAbstraction, SummaryBlock
from gossamer.shrink.base import Calibration, Step, Unsupported, check_share, register_pass
from gossamer.shrink.recipe import apply, register_step
from gossamer.shrink.recovery import check_steps, recover
from gossamer.shrink.sequences import need_class_token, sequence_of, wrap

LEAST_ALPHA = 0.3


@register_pass("bus", family="token reduction", paper="bus", saves=("macs",), default={"keep": 0.6})
def bus(
    model: nn.Module,
    calibration: Calibration,
    *,
    keep: float = 0.6,
    layer: int | None = None,
    decoder: int = 0,
    beta: float = 0.3,
    steps: int | None = None,
    lr: float = 1e-4,
) -> list[Step]:
    """Keeps key patches and one for the rest, so that the share `keep` of all tokens is worked on.

    Args:
        layer: blocks before patches leave; None chooses.
        decoder: layers of abstraction after the blocks; `beta`: share of the kept patches they leave.
        steps: of training, three epochs by default, and never longer than the calibration's time.
        lr: learning rate.

    Raises:
        Unsupported: the model has no class token, is too shallow for `keep`, or its tokens cannot be dropped.
        ValueError: `keep` or `beta` is not in (0, 1], no such layer, negative `steps` or `decoder`.
    """
    began = time.perf_counter()
    check_share("keep", keep)
    check_share("beta", beta)
    check_steps(steps)
    if decoder < 0:
        raise ValueError(f"decoder must be at least 0, got {decoder}")
    found = sequence_of(model, calibration, "bus")
    need_class_token(found, model, "bus")
    depth = len(found.blocks)
    if layer is not None and not 1 <= layer < depth:
        raise ValueError(f"layer must be in 1..{depth - 1} (blocks), got {layer}")
    if keep == 1:
        return []
    layer, alpha = place(depth, keep, layer)
    patches = found.tokens - found.protect
    if share_up(alpha)(patches) >= patches:
        raise Unsupported(f"bus: of {patches} patches the share {alpha:.2f} is all of them")
    teacher = copy.deepcopy(model).eval()
    step: Step = {"step": "bus", "layer": layer, "alpha": alpha, "protect": found.protect}
    if decoder:
        step |= {"decoder": decoder, "beta": beta, "patches": share_up(alpha)(patches)}
    apply(model, step)
    recover(model, calibration, steps=steps, lr=lr, began=began, teacher=teacher)
    return [step]


@register_step("bus")
def _summarise(model: Any, step: Step) -> None:
    protect = step["protect"]
    wrap(model, step["layer"] - 1, lambda block: SummaryBlock(block, step["alpha"], protect=protect))
    if step.get("decoder"):
        mixer = model.blocks[-1].mixer
        made = PatchAbstraction(
            mixer.dim, mixer.dim // mixer.head_dim, step["patches"],
            beta=step["beta"], protect=protect, depth=step["decoder"],
        )  # fmt: skip
        weight = next(model.blocks[-1].parameters())
        model.blocks.append(made.to(weight.device, weight.dtype).train(model.training))


def place(depth: int, keep: float, layer: int | None = None) -> tuple[int, float]:
    """Blocks before patches leave and the share alpha of them that stays: `(k + (L - k) alpha) / L = keep`.

    Raises:
        Unsupported: the blocks before alone are more.
    """

    def alpha(k: int) -> float:
        return (keep * depth - k) / (depth - k)

    if layer is None:
        layer = max(1, depth // 2)
        while layer > 1 and alpha(layer) < LEAST_ALPHA:
            layer -= 1
    if layer >= depth or alpha(layer) <= 0.01:
        raise Unsupported(f"bus: patches leave after block {layer} of {depth}, so keep must exceed {layer / depth:.2f}")
    return layer, round(alpha(layer), 6)
