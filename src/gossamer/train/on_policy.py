"""Teaching an encoder-decoder by a decoder: the student writes, the teacher says what it would have written.

Source: Elfeki, Liu, Voegele 2025, "Return of the Encoder: Maximizing Parameter Efficiency for SLMs"; on-policy
distillation is of Agarwal et al. 2023, "On-Policy Distillation of Language Models".

    y ~ student(. | s),   L = alpha KL(teacher(. | s, y_<t) || student(. | s, y_<t)) + (1 - alpha) CE(gold)

- the teacher reads source and target as one text; its scores at the last token of the source and behind foretell the
  target. Sources are put right before their targets, as padding on the left does, but padding then ends the text and
  a causal teacher needs no mask
- tokens behind the end of a drawn target are not counted; the released code counts them, and draws with dropout on
- of two vocabularies the part that both have is compared
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

ALPHA, TEMPERATURE, TOP_K = 0.9, 0.9, 128


def teacher_scores(
    teacher: nn.Module, source: Int[Tensor, "b m"], target: Int[Tensor, "b n"], pad_id: int
) -> Float[Tensor, "b n v"]:
    """What a decoder-only `teacher` foretells for each target token, from the source and the target before it.

    Args:
        teacher: `ids (b, n)` to scores of each next token.
        source: padded behind with `pad_id`; no row is padding alone.
    """
    real = source != pad_id
    behind = torch.cat((~real, torch.zeros_like(target, dtype=torch.bool)), 1)
    order = behind.int().argsort(dim=1, stable=True)
    text = torch.cat((source, target), 1).gather(1, order)
    at = real.sum(1, keepdim=True) - 1 + torch.arange(target.shape[1], device=source.device)
    with torch.no_grad():
        scores = teacher(text)
    return scores.gather(1, at[..., None].expand(-1, -1, scores.shape[-1]))


def divergence(
    student: Float[Tensor, "b n v"], teacher: Float[Tensor, "b n w"], counts: Bool[Tensor, "b n"] | None = None
) -> Float[Tensor, ""]:
    """`KL(softmax(teacher) || softmax(student))`, the mean over tokens, those of `counts` if given."""
    both = min(student.shape[-1], teacher.shape[-1])
    own, soft = (x[..., :both].float().log_softmax(-1) for x in (student, teacher))
    each = F.kl_div(own, soft, reduction="none", log_target=True).sum(-1)
    return each.mean() if counts is None else (each * counts).sum() / counts.sum().clamp(min=1)


def on_policy_divergence(
    student: nn.Module,
    teacher: nn.Module,
    source: Int[Tensor, "b m"],
    *,
    bos_id: int | Int[Tensor, " b"],
    eos_id: int | None = None,
    length: int,
    temperature: float = TEMPERATURE,
    top_k: int | None = TOP_K,
) -> Float[Tensor, ""]:
    """`KL(teacher || student)` along targets that the student draws.

    Args:
        student: an encoder-decoder of `gossamer.models.mu`, perhaps wrapped for several devices.
        teacher: `ids (b, n)` to scores of each next token.
        bos_id: what targets start from, one for all or one each; `eos_id` ends them.
        length: tokens drawn.
        temperature, top_k: of the draw.
    """
    writer: Any = getattr(student, "module", student)
    drawn = writer.generate(source, bos_id=bos_id, eos_id=eos_id, max_new=length, temperature=temperature, top_k=top_k)
    inputs, target = drawn[:, :-1], drawn[:, 1:]
    counts = None
    if eos_id is not None:
        ends = target == eos_id
        counts = ends.cumsum(1) - ends.int() == 0  # up to the first end, and with it
    return divergence(student(source, inputs), teacher_scores(teacher, source, target, writer.pad_id), counts)


def distil_from_decoder(
    student: nn.Module,
    teacher: nn.Module,
    source: Int[Tensor, "b m"],
    target: Int[Tensor, "b n"],
    *,
    bos_id: int,
    eos_id: int | None = None,
    alpha: float = ALPHA,
    temperature: float = TEMPERATURE,
    top_k: int | None = TOP_K,
) -> Float[Tensor, ""]:
    """The loss `L` of a batch of pairs: what a training step of the student goes down.

    Args:
        student: an encoder-decoder of `gossamer.models.mu`.
        teacher: a decoder-only model over the same tokens.
        source, target: padded behind with the student's `pad_id`; targets end with `eos_id` where there is one.
        bos_id: what targets start from.
        alpha: share of the teacher.

    Raises:
        ValueError: `alpha` is not in [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    writer: Any = getattr(student, "module", student)
    first = torch.full_like(target[:, :1], bos_id)
    scores = student(source, torch.cat((first, target[:, :-1]), 1))
    gold = F.cross_entropy(scores.float().flatten(0, 1), target.flatten(), ignore_index=writer.pad_id)
    if alpha == 0:
        return gold
    taught = on_policy_divergence(
        student,
        teacher,
        source,
        bos_id=bos_id,
        eos_id=eos_id,
        length=target.shape[1],
        temperature=temperature,
        top_k=top_k,
    )
    return alpha * taught + (1 - alpha) * gold
