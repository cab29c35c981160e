"""EET: patches with little content leave after three blocks; a dense teacher shows what to learn and what to hide.

Source: "Rethinking Vision Transformer for Large-Scale Fine-Grained Image Retrieval", 2025, arXiv 2504.16691. Built from
the paper's equations; the authors' code has no licence and was only run beside it.

- content map (`gossamer.layers.class_attention`): the class token's attention, heads weighed by the norm of what they
  give. After blocks 4, 8 and 10 of 12 the best 1/2, 1/4, 1/16 of the patches stay; for other depths at the same places,
  for other shares t, t^2, t^4, with t solved so that the share `keep` of all tokens is worked on in the mean
- knowledge transfer: `1 - cos(answer, teacher's answer)`
- region guidance, images only: the `hidden` cells that the teacher's last content map ranks first are erased, and the
  answer must still be right
- the authors leave tokens in order of score, here they keep theirs: attention reads no order
- texts: their first word stands for the class token, padding leaves first, and there is nothing to erase
- the paper's retrieval is `HashHead` here, with `gossamer.ops.hashing` for codes; the pass works on any answer
- the authors erase the cell mirrored at the main diagonal (`official=True` of `erase`)
"""

from __future__ import annotations

import copy
import time
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gossamer.layers.class_attention import ContentBlock, attend, content_map
from gossamer.layers.reduce import second_branch
from gossamer.shrink.base import Calibration, Step, Unsupported, check_share, register_pass
from gossamer.shrink.recipe import apply, register_step
from gossamer.shrink.recovery import check_steps, recover
from gossamer.shrink.sequences import need_class_token, sequence_of, wrap

# Where tokens leave, in twelfths of the depth, and which power of t stays of the first ones.
PLACES = ((4, 1), (8, 2), (10, 4))


@register_pass("eet", family="token reduction", paper="eet", saves=("macs",), default={"keep": 0.6})
def eet(
    model: nn.Module,
    calibration: Calibration,
    *,
    keep: float = 0.55,
    hidden: int = 4,
    steps: int | None = None,
    lr: float = 1e-4,
) -> list[Step]:
    """Drops patches with little content after three blocks, so that the share `keep` of all tokens is worked on.

    Args:
        hidden: cells of an image that are erased for region guidance, 0 for none.
        steps: of training, three epochs by default, and never longer than the calibration's time.
        lr: learning rate.

    Raises:
        Unsupported: the model has no class token, is too shallow for `keep`, or its tokens cannot be dropped.
        ValueError: `keep` is not in (0, 1], `hidden` exceeds the patches, or negative `steps`.
    """
    began = time.perf_counter()
    check_share("keep", keep)
    check_steps(steps)
    found = sequence_of(model, calibration, "eet")
    need_class_token(found, model, "eet")
    if not 0 <= hidden <= found.tokens - found.protect:
        raise ValueError(f"hidden must be in 0..{found.tokens - found.protect} (patches), got {hidden}")
    left = shares(len(found.blocks), keep)
    if all(share == 1 for share in left):
        return []
    teacher = copy.deepcopy(model).eval()
    step: Step = {"step": "eet", "keep": left, "protect": found.protect}
    apply(model, step)
    guide = _Guide(teacher, calibration, hidden if found.learned else 0, found.protect)
    recover(model, calibration, steps=steps, lr=lr, began=began, objective=guide)
    return [step]


@register_step("eet")
def _prune_tokens(model: Any, step: Step) -> None:
    if len(step["keep"]) != len(model.blocks):
        raise ValueError(
            f"keep must have one share for each of the {len(model.blocks)} blocks, got {len(step['keep'])}"
        )
    for i, share in enumerate(step["keep"]):
        if share < 1:
            wrap(model, i, partial(ContentBlock, keep=share, protect=step["protect"]))


def shares(depth: int, keep: float) -> list[float]:
    """What each block leaves of the tokens that come into it, so that the mean over blocks of what comes in is `keep`.

    Raises:
        Unsupported: the blocks before the first place alone are more than that.
    """
    places = {round(depth * twelfth / 12) - 1: power for twelfth, power in reversed(PLACES)}
    places = {place: power for place, power in sorted(places.items()) if 0 <= place < depth - 1}
    if keep == 1 or not places:
        if keep < 1:
            raise Unsupported(f"eet: {depth} block(s) have no place between them where tokens could leave")
        return [1.0] * depth
    least = (min(places) + 1) / depth

    def there(t: float) -> list[float]:
        now, all_ = 1.0, []
        for i in range(depth):
            all_.append(now)
            if i in places:
                now = t ** places[i]
        return all_

    low, high = 0.0, 1.0
    for _ in range(60):
        t = (low + high) / 2
        low, high = (t, high) if sum(there(t)) <= keep * depth else (low, t)
    if low < 0.02:
        raise Unsupported(f"eet: tokens leave after block {min(places)} at first, so keep must exceed {least:.2f}")
    come = there(low)
    return [round(come[i + 1] / come[i], 6) if i in places else 1.0 for i in range(depth)]


class _Guide:
    """The loss of a student: right, right without what the teacher looks at, and as the teacher says."""

    def __init__(self, teacher: Any, calibration: Calibration, hidden: int, protect: int) -> None:
        self.teacher = teacher
        self.task = calibration.task
        self.hidden = hidden
        self.protect = protect

    def __call__(self, model: nn.Module, inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        with torch.no_grad():
            taught, seen = last_map(self.teacher, *inputs)
        loss = self._right(model(*inputs), target, taught)
        if self.hidden:
            cells = seen[:, self.protect :].topk(self.hidden, dim=1).indices
            loss = loss + self._right(model(erase(inputs[0], cells, self.teacher.stem.grid)), target, None)
        return loss

    def _right(self, answers: Tensor | tuple[Tensor, ...], target: Tensor, taught: Tensor | None) -> Tensor:
        answers = answers if isinstance(answers, tuple) else (answers,)
        losses = [self.task.loss(y.float(), target) for y in answers]
        if taught is not None:
            losses += [(1 - torch.cosine_similarity(y.float(), taught.float(), dim=-1)).mean() for y in answers]
        return torch.stack(losses).sum() / len(answers)


def last_map(model: Any, x: Tensor) -> tuple[Any, Float[Tensor, "b n"]]:
    """What a dense model of plain blocks answers, as its head gives it, and the content map of its last block."""
    x, mask = model.stem(x)
    given = {} if mask is None else {"mask": mask}
    for block in model.blocks[:-1]:
        x = block(x, **given)
    x, heads = attend(model.blocks[-1], x, mask, None)
    x = second_branch(model.blocks[-1], x)
    return model.head(x if model.norm is None else model.norm(x), mask), content_map(heads)


def erase(
    images: Float[Tensor, "b c height width"],
    cells: Int[Tensor, "b w"],
    grid: tuple[int, int],
    *,
    official: bool = False,
) -> Float[Tensor, "b c height width"]:
    """Images with the `cells` of a grid, counted row by row, set to zero.

    Args:
        official: the authors' form, which takes the rest of the number for the row and so erases the mirrored cell.

    Raises:
        ValueError: a cell is outside of the grid.
    """
    rows, columns = grid
    if cells.numel() and not 0 <= int(cells.min()) <= int(cells.max()) < rows * columns:
        raise ValueError(f"cells must be in 0..{rows * columns - 1}, got {int(cells.min())}..{int(cells.max())}")
    kept = torch.ones(len(images), rows * columns, dtype=images.dtype, device=images.device).scatter(1, cells, 0.0)
    kept = kept.view(-1, 1, rows, columns)
    if official:
        kept = kept.transpose(-1, -2)
    height, width = (-(-images.shape[2] // rows), -(-images.shape[3] // columns))
    kept = kept.repeat_interleave(height, 2).repeat_interleave(width, 3)
    return images * kept[..., : images.shape[2], : images.shape[3]]


class HashHead(nn.Module):
    """`h = W y + b` of the class scores y: `bits` numbers whose signs are the code.

    Args:
        head: gives the class scores.
        classes: how many there are.
    """

    def __init__(self, head: nn.Module, classes: int, bits: int) -> None:
        super().__init__()
        self.head = head
        self.fc = nn.Linear(classes, bits)

    def forward(
        self, x: Float[Tensor, "b n c"], mask: Tensor | None = None, sizes: Tensor | None = None
    ) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b bits"]]:
        scores = self.head(x, mask) if sizes is None else self.head(x, mask, sizes=sizes)
        return scores, self.fc(scores)
