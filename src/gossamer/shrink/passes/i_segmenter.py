"""I-Segmenter's arithmetic: a transformer that calculates with integers alone, from its input to its answer.

Source: "I-Segmenter: Integer-Only Vision Transformer for Efficient Semantic Segmentation", 2025 (arXiv 2509.10334), on
the arithmetic of Li and Gu 2022, "I-ViT: Integer-only Quantization for Efficient Vision Transformer Inference".

    x = scale * int;   weights and tokens int8, residual stream and attention weights int16, sums int32
    another scale: out = (int * m + 2^(e-1)) >> e,   scale_in / scale_out = m 2^-e
    softmax, GELU, tanh, norms: shifts, sums and integer divisions (`gossamer.ops.integer`)

1. every part is replaced by its simulation, which rounds as the integers will (`gossamer.layers.integer`)
2. ranges are the maxima over calibration data, of which one sample is enough; in training, moving averages of them
3. optionally the simulation is trained for some steps, its gradients straight through the roundings
4. ranges are fixed; what is left in the model are integers

- neither paper text nor code of I-Segmenter could be had: this is a reconstruction from second-hand facts. λ-ShiftGELU
  is read as a range ahead of ShiftGELU that ends at λ deviations; its segmentation decoder is not here, because there
  are no segmentation models yet: encoders with the heads of `gossamer.layers.heads` are what can be had
- other than I-ViT: logits enter Shiftmax with 64 steps in one, reciprocals have 46 bits, the weight and bias of a norm
  are part of the requantisation behind it, words have one scale a row
- the file is written by `write_onnx`: only `MatMulInteger` and integer operators between `QuantizeLinear` (or the ids)
  and `DequantizeLinear`, with the same integers as the module to the bit
- in ONNX Runtime, which has no fused form of such integer chains, it saves size, not time
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from gossamer.io.integer_graph import IntegerGraph
from gossamer.layers import Block, Classifier, Mlp
from gossamer.layers.distilled import DistilledClassifier
from gossamer.layers.heads import DenseClassifier, SentenceVector
from gossamer.layers.integer import STREAM, Range, fix, norm_cell
from gossamer.layers.integer_blocks import IntegerBlock
from gossamer.layers.integer_ends import Answer, ImageStem, WordStem, integer_stem
from gossamer.mixers.attention import Attention
from gossamer.shrink.base import Calibration, Step, Unsupported, register_pass
from gossamer.shrink.recipe import note, register_step
from gossamer.trunks import Isotropic

HEADS = (Classifier, DenseClassifier, DistilledClassifier, SentenceVector)


class IntegerIsotropic(Isotropic):
    """A trunk whose parts calculate with integers, or simulate it: `(x, scale)` passes between them."""

    @property
    def fixed(self) -> bool:
        """Whether it calculates with integers."""
        head: Any = self.head
        return head.fixed

    def forward(self, x: Shaped[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        if not self.fixed:
            return self.integers(x)
        stem, head = self._ends()
        x = stem.quantised(x) if isinstance(stem, ImageStem) else x
        return self.integers(x).to(torch.int32).to(torch.float32) * head.quantum

    def integers(self, x: Any) -> Any:
        """The answers, in steps of `head.quantum`, for quantised pixels or ids (or a symbol of them)."""
        stem, head = self._ends()
        mask = x != stem.pad_id if isinstance(stem, WordStem) else None
        tokens = stem(x)
        for block in self.blocks:
            tokens = block(tokens, mask)
        return head(tokens if self.norm is None else self.norm(*tokens), mask)

    def write_onnx(self, inputs: Tensor | tuple[Tensor, ...], path: str | Path, *, input_name: str = "input") -> Path:
        """Writes the file; its batch is free, other sizes are those of `inputs`.

        Raises:
            ValueError: ranges are not fixed yet, or `inputs` do not fit the model.
        """
        if not self.fixed:
            raise ValueError("ranges are not fixed yet, so there are no integers to write")
        x = inputs if isinstance(inputs, Tensor) else inputs[0]
        stem, head = self._ends()
        graph = IntegerGraph()
        words = isinstance(stem, WordStem)
        symbol = graph.input(input_name, torch.int64 if words else torch.float32, ("batch", *x.shape[1:]))
        answer = self.integers(symbol if words else graph.quantise(symbol, stem.quantum))
        graph.save(path, answer, head.quantum)
        return Path(path)

    def encode(self, x: Shaped[Tensor, "b ..."]) -> tuple[Tensor, Tensor | None]:
        raise ValueError("tokens of an integer model have no real values; ask for its answers")

    def features(self, x: Float[Tensor, "b i height width"]) -> list[Float[Tensor, "b h w c"]]:
        raise ValueError("tokens of an integer model have no real values; ask for its answers")

    def _ends(self) -> tuple[Any, Any]:
        return self.stem, self.head


def check(model: nn.Module, lam: float | None) -> None:
    """Raises Unsupported where a part of `model` has no integer form, naming it."""
    if type(model) is not Isotropic:
        raise Unsupported(f"{type(model).__name__} is no stack of layers of one width and one head (Isotropic)")
    name = ""
    module: nn.Module | None = model
    try:
        name, module = "stem", model.stem
        integer_stem(module)
        for number, block in enumerate(model.blocks):
            name, module = f"blocks.{number}", block
            if type(block) is not Block or block.residual not in ("pre", "post") or block.norm2 is None:
                raise ValueError("only pre-norm and post-norm blocks of a mixer and an MLP have an integer form")
            name, module = f"blocks.{number}.mixer", block.mixer
            if type(block.mixer) is not Attention or block.mixer.causal:
                raise ValueError("only plain attention that is not causal has an integer form")
            name, module = f"blocks.{number}.mlp", block.mlp
            if type(block.mlp) is not Mlp or block.mlp.norm1 is not None or block.mlp.norm2 is not None:
                raise ValueError("only an MLP of two products and an activation has an integer form")
            IntegerBlock(block, lam)
        name, module = "norm", model.norm
        norm_cell(model.norm, STREAM)
        name, module = "head", model.head
        if type(model.head) not in HEADS or getattr(model.head, "kind", "") == "sequence":
            raise ValueError(f"only {', '.join(kind.__name__ for kind in HEADS)} without sequence pooling can be had")
        Answer(model.head)
    except ValueError as error:
        raise Unsupported(f"{name} ({type(module).__name__}): {error}") from error


def simulate(model: nn.Module, lam: float | None) -> None:
    """Replaces the parts of `model`, in place, by their simulations."""
    check(model, lam)
    assert isinstance(model, Isotropic)
    stem, norm, head = model.stem, model.norm, model.head
    blocks: list[Any] = list(model.blocks)
    model.stem = integer_stem(stem)
    model.blocks = nn.ModuleList([IntegerBlock(block, lam) for block in blocks])
    model.norm = norm_cell(norm, STREAM)
    model.head = Answer(head)
    model.__class__ = IntegerIsotropic


@register_pass("i_segmenter", family="quantisation", paper="i-segmenter", saves=("size",))
def i_segmenter(
    model: nn.Module,
    calibration: Calibration,
    *,
    samples: int = 64,
    lam: float | None = 5.0,
    steps: int = 0,
    lr: float = 1e-5,
) -> list[Step]:
    """Makes the model calculate with integers alone: 8-bit weights and tokens, 16-bit residual stream.

    Args:
        samples: of the training data, for the ranges.
        lam: λ of λ-ShiftGELU, deviations at which the range ahead of GELU ends; None for ShiftGELU.
        steps: training steps of the simulation, the model as it was being its teacher; as far as the time goes.
        lr: learning rate of that training.

    Raises:
        Unsupported: a part of the model has no integer form; the message names it.
        ValueError: `samples` is below 1, or `lam` is not positive.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if lam is not None and not lam > 0:
        raise ValueError(f"lam must be positive, or None, got {lam}")
    check(model, lam)
    teacher = copy.deepcopy(model) if steps > 0 else None
    simulate(model, lam)
    batches = [inputs for inputs, _ in calibration.batches(samples, batch_size=16)]
    watch(model, batches)
    if steps > 0 and calibration.seconds > 0:
        for module in model.modules():
            if isinstance(module, Range):
                module.moving = True  # weights change, and the ranges with them
        trainer = calibration.trainer(model, teacher=teacher, lr=lr, ema=0.0)
        trainer.train(steps=steps, seconds=0.7 * calibration.seconds, schedule="linear")
    settle(model, batches[0])
    step: Step = {"step": "i_segmenter.integers"}
    note(model, step)
    return [step]


@torch.no_grad()
def watch(model: nn.Module, batches: list[tuple[Tensor, ...]]) -> None:
    """Lets the ranges of a simulation follow `batches`."""
    model.train()
    for inputs in batches:
        model(*inputs)
    model.eval()


@torch.no_grad()
def settle(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Fixes a simulation: integers from here on. `inputs` are run once, so that each part knows its final scales."""
    model.eval()
    model(*inputs)
    fix(model)


@register_step("i_segmenter.integers")
def _integers(model: nn.Module, step: Step) -> None:
    simulate(model, None)
    for module in model.modules():
        # The constants come from the file; here only their shapes matter.
        if isinstance(module, Range):
            module.top.fill_(1.0)
    fix(model.eval())
