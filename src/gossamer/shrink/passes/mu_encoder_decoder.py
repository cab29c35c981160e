"""mu: a decoder language model is replaced by a cheaper encoder-decoder that it teaches on the student's own texts.

Source: Elfeki, Liu, Voegele 2025, "Return of the Encoder: Maximizing Parameter Efficiency for SLMs".

    L = 0.9 KL(teacher(. | s, y_<t) || student(. | s, y_<t)) + 0.1 CE(text),   y ~ student(. | s)

The student answers as every language model does, `ids (b, n)` to scores of each next token, none of which sees a later
one: the first half of a window is the source `s`. Its own tokens are foretold by the decoder alone; all that follows by
the decoder that starts from the last token of the source and reads the encoder's memory of it
(`gossamer.models.mu.EncoderDecoder.forward`). What it saves is depth behind the split: the encoder reads the source
only, and the decoder, which reads everything, has a third of the layers.

- vocabulary, width and table of words are the teacher's; two thirds of the layers are the encoder's, and attention is
  three eighths as wide as the stream with two query heads to a key head, as in the paper
- layers, then hidden units, are as many as `keep` of the teacher's multiply-adds allows
- the paper's student was trained before it is taught, and reads pairs of source and target; ours starts from the
  teacher's words alone and reads plain text. So the first part of the steps (`warm`) learns from the teacher's answers
  to the text itself, and only the rest, on top of the text, from what the student draws
- of plain text no target has an end, so all drawn tokens count
- for pairs of source and target: `gossamer.train.on_policy.distil_from_decoder`
"""

from __future__ import annotations

import copy
import time
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.layers.language import WordStem
from gossamer.measure import macs
from gossamer.models import create_model
from gossamer.models.mu import EncoderDecoder
from gossamer.shrink.base import Calibration, Step, Unsupported, check_share, register_pass
from gossamer.shrink.passes.snnet import become
from gossamer.shrink.recipe import apply, register_step
from gossamer.train.on_policy import ALPHA, TEMPERATURE, TOP_K, on_policy_divergence
from gossamer.trunks import Isotropic

SYSTEM = "mu-encoder-decoder-slm"
STEP = "mu_encoder_decoder.student"
HIDDEN = (0.75, 0.5, 0.25)
BOTTLENECK = 3 / 8


@register_pass(
    "mu_encoder_decoder",
    family="teaching",
    paper=SYSTEM,
    saves=("macs", "params", "size"),
    default={"keep": 0.6},
)
def mu_encoder_decoder(
    model: nn.Module,
    calibration: Calibration,
    *,
    keep: float = 0.6,
    epochs: float = 1.0,
    lr: float = 1e-3,
    warm: float = 0.7,
    alpha: float = ALPHA,
    temperature: float = TEMPERATURE,
    top_k: int = TOP_K,
) -> list[Step]:
    """Replaces a decoder language model by an encoder-decoder taught by it.

    Args:
        keep: share of the model's multiply-adds on a window that the student may cost.
        epochs: of teaching, as far as the time goes; 0 for none.
        warm: share of the steps before the student draws texts of its own.
        alpha: share of the teacher in the loss.
        temperature, top_k: of the drawing.

    Raises:
        Unsupported: no decoder language model of ours, or no student is so cheap.
        ValueError: a setting is out of its range.
    """
    check_share("keep", keep)
    if not 0 <= warm <= 1 or not 0 <= alpha <= 1:
        raise ValueError(f"warm and alpha must be in [0, 1], got {warm} and {alpha}")
    if epochs < 0:
        raise ValueError(f"epochs must not be negative, got {epochs}")
    begun = time.perf_counter()
    settings = student_settings(model, calibration, keep)
    teacher = copy.deepcopy(model).eval()
    step = {"step": STEP, "settings": settings}
    apply(model, step)
    words: Any = teacher
    student: Any = model
    with torch.no_grad():
        student.stem.words.weight.copy_(words.stem.words.weight)
    _teach(model, teacher, calibration, begun, epochs=epochs, lr=lr, warm=warm, alpha=alpha, draw=(temperature, top_k))
    return [step]


def student_settings(model: nn.Module, calibration: Calibration, keep: float) -> dict[str, Any]:
    """Keywords of the deepest student that costs at most `keep` of the model.

    Raises:
        Unsupported: the model is no decoder language model of ours, or no student is so cheap.
    """
    name = type(model).__name__
    if calibration.task.name != "language-modelling":
        raise Unsupported(f"{name} is for {calibration.task.name}; only language models are made encoder-decoders")
    if not isinstance(model, Isotropic) or not isinstance(model.stem, WordStem) or len(model.blocks) < 2:
        raise Unsupported(f"{name} is no decoder language model of two blocks or more of ours (WordStem, blocks)")
    window = int(calibration.task.spec["max_len"])
    if window < 4:
        raise Unsupported(f"windows of {window} tokens are too short to be split into source and target")
    first: Any = model.blocks[0]
    dim = model.stem.words.embedding_dim
    width = getattr(first.mixer, "head_dim", 64)
    width = max(4, width + width % 2)
    groups = max(1, round(dim * BOTTLENECK / width / 2))
    hidden = first.mlp.fc1.out_features if hasattr(first.mlp, "fc1") else 4 * dim
    if hasattr(first.mlp, "gate"):  # three products a unit, where the student has two
        hidden = 3 * hidden // 2
    fixed = dict(
        dim=dim,
        qkv=2 * groups * width,
        heads=2 * groups,
        kv_heads=groups,
        vocab_size=model.stem.words.num_embeddings,
        max_len=max(window, model.stem.max_len),
        pad_id=int(calibration.task.spec["pad_id"]),
        drop=0.0,
        split=window // 2,
    )
    ids = calibration.example()
    whole = macs(model, ids).total
    # As deep as can be; where two layers are too many already, narrower ones.
    shapes = [(depth, 1.0) for depth in range(len(model.blocks), 1, -1)] + [(2, share) for share in HIDDEN]
    cost = whole
    for depth, share in shapes:
        decoder = max(1, round(depth / 3))
        settings = dict(
            **fixed, encoder_depth=depth - decoder, decoder_depth=decoder, hidden=max(1, int(hidden * share))
        )
        with torch.device("meta"):
            cost = macs(create_model(SYSTEM, **settings), ids).total
        if cost <= keep * whole:
            return settings
    raise Unsupported(f"the cheapest student of {name} costs {cost / whole:.2f} of its multiply-adds; keep={keep}")


def _teach(
    model: nn.Module,
    teacher: nn.Module,
    calibration: Calibration,
    begun: float,
    *,
    epochs: float,
    lr: float,
    warm: float,
    alpha: float,
    draw: tuple[float, int],
) -> None:
    assert isinstance(model, EncoderDecoder)
    task, split = calibration.task, model.split
    progress = 0.0

    def objective(student: nn.Module, inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        ids = inputs[0]
        answer = student(ids).float()
        gold = task.loss(answer, target)
        if alpha == 0:
            return gold
        source = ids[:, :split]
        # Windows at the end of a text may hold less than a source.
        full = source[(source != model.pad_id).all(1)]
        if progress < warm or not len(full) or ids.shape[1] <= split:
            with torch.no_grad():
                soft = teacher(ids).float()
            read = target >= 0
            taught = task.teaching(answer[read][None], soft[read][None])
        else:
            taught = on_policy_divergence(
                student,
                teacher,
                full,
                bos_id=full[:, -1],
                length=ids.shape[1] - split,
                temperature=draw[0],
                top_k=draw[1],
            )
        return alpha * taught + (1 - alpha) * gold

    trainer = calibration.trainer(model, objective=objective, lr=lr, ema=0.0)
    teacher.to(trainer.accelerator.device)
    left = calibration.seconds * 0.9 - (time.perf_counter() - begun)
    steps = ceil(epochs * trainer.steps_per_epoch)

    def on_step(_: float) -> None:
        nonlocal progress
        progress = max(trainer.phase_steps / steps, trainer.phase_seconds / left)

    if steps and left > 0:
        trainer.train(steps=steps, seconds=left, schedule="cosine", on_step=on_step)
    model.eval()


@register_step(STEP)
def _student(model: nn.Module, step: Step) -> None:
    become(model, create_model(SYSTEM, **step["settings"]).train(model.training))
