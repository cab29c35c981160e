"""GPUSQ-ViT: two of every four weights, then few bits, both learned from the model as it was.

Source: Yu et al. 2023, "Boost Vision Transformer with GPU-Friendly Sparsity and Quantization". A reconstruction: there
is no public code and the paper was read second-hand; the layers are in `gossamer.layers.sparse_quant`.

1. of every four inputs of a row, the two largest weights stay; the others are zero from then on. Fine-tuned
2. weights (a scale for each output) and inputs (one scale) are rounded to 8 or 4 bits, straight through; scales are
   learned too. Fine-tuned again

`L = hard * task + soft * teaching + features * sum_i w_i |f_i - t_i|^2 / |t_i|^2`, teacher the dense model, `f_i` and
`t_i` the outputs of block i. In stage 1 `w_i = 1`; in stage 2 `w_i = e_i / mean_j e_j`, `e_i` the same distance over
the last epoch: blocks that rounding hurts most are pulled hardest.

- distances relative to the teacher's, so that one setting serves pre-norm and post-norm networks; the soft loss is the
  task's own (for classes Hinton's, temperature included). Weights of the losses and `w_i` are reconstructions
- in floats exactly two of every four are not zero; of those, rounding may take some to zero, so then it is two at most
- embeddings, norms, the first product, the head and what four does not divide stay as they are; so do convolutions
- `inputs="float"`: the kept model does not round its inputs, since the int8 form of an exported file
  (`gossamer.io.quantize_onnx`) brings a rounding of its own; `inputs="int"` keeps the learned one
- stored are codes and places: 5 bits a weight at 8 bits, 2.5 at 4. Computed is the dense product: only hardware that
  reads the pattern is faster, and none is promised
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import Block
from gossamer.layers.exchange import exchange, exchange_linear
from gossamer.layers.sparse_quant import SparseQuantLinear, SparseTrainingLinear, check_bits, group_width
from gossamer.shrink.base import Calibration, Step, Unsupported, register_pass
from gossamer.shrink.products import products
from gossamer.shrink.recipe import note, register_step
from gossamer.shrink.recovery import check_steps

# Numbers of each layer's input that its scale is chosen by.
SAMPLED = 8192


@register_pass("gpusq_vit", family="quantisation", paper="gpusq-vit", saves=("size",), default={"bits": 8})
def gpusq_vit(
    model: nn.Module,
    calibration: Calibration,
    *,
    bits: int = 8,
    paired: bool | None = None,
    inputs: Literal["float", "int"] = "float",
    steps: int | None = None,
    lr: float = 1e-4,
    hard: float = 1.0,
    soft: float = 10.0,
    features: float = 5.0,
    samples: int = 64,
) -> list[Step]:
    """Prunes the linear layers to 2:4 and rounds them to `bits`, learning from the dense model in both stages.

    Args:
        bits: 8 or 4; 32 prunes alone.
        paired: keep two of four pairs in place of two of four weights; by default for 4 bits.
        inputs: whether the kept model rounds the inputs of these layers.
        steps: of each stage, two epochs by default, and never longer than half the calibration's time.
        lr: learning rate.
        hard, soft, features: weights of the losses; `hard=0` needs no labels.
        samples: training items by which the inputs' scales are chosen.

    Raises:
        Unsupported: no linear layer has inputs that the groups divide.
        ValueError: a setting is out of range.
    """
    check_bits(bits)
    for name, value in (("hard", hard), ("soft", soft), ("features", features)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    if inputs not in ("float", "int"):
        raise ValueError(f"inputs must be float or int, got {inputs!r}")
    check_steps(steps)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    pairs = bits == 4 if paired is None else paired
    layers = sparse_layers(model, calibration, paired=pairs)
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    learning: dict[str, SparseTrainingLinear] = {}
    for name, layer in layers.items():
        learning[name] = SparseTrainingLinear(layer, paired=pairs).train(layer.training)
        exchange(model, name, learning[name])
    start = time.perf_counter()
    stages = 1 if bits == 32 else 2
    for stage in range(stages):
        if stage:
            samplings = _inputs(model, learning, calibration, samples)
            for name, part in learning.items():
                part.quantise(bits, samplings[name])
        objective = Distillation(
            model, teacher, calibration, hard=hard, soft=soft, features=features, weighted=bool(stage)
        )
        with objective.watching():
            trainer = calibration.trainer(model, objective=objective, lr=lr, ema=0.0)
            objective.period = trainer.steps_per_epoch
            total = 2 * trainer.steps_per_epoch if steps is None else steps
            end = calibration.seconds * (stage + 1) / stages - (time.perf_counter() - start)
            trainer.train(steps=total, seconds=end, schedule="linear")
    taken: list[Step] = []
    rounded = bits if inputs == "int" else 32
    for name, part in learning.items():
        exchange(model, name, part.stored(input_bits=rounded))
        step: Step = {"step": "gpusq_vit.sparse", "part": name, "bits": bits, "paired": pairs, "input_bits": rounded}
        note(model, step)
        taken.append(step)
    model.eval()
    return taken


@register_step("gpusq_vit.sparse")
def _sparse(model: nn.Module, step: Step) -> None:
    exchange_linear(model, step["part"], SparseQuantLinear, **{n: step[n] for n in ("bits", "paired", "input_bits")})


def sparse_layers(model: nn.Module, calibration: Calibration, *, paired: bool = False) -> dict[str, nn.Linear]:
    """The linear layers that can be pruned, by name: neither stem nor head, inputs in whole groups.

    Raises:
        Unsupported: there are none.
    """
    width = group_width(paired)
    found = products(model, calibration.example(), wanted=lambda layer: type(layer) is nn.Linear)
    ours = any(isinstance(part, Block) for part in model.modules())
    chosen = {
        p.name: p.layer
        for p in found
        if isinstance(p.layer, nn.Linear)
        and p.layer.in_features % width == 0
        and not (ours and p.name.startswith(("stem.", "head.")))
    }
    if not chosen:
        raise Unsupported(f"no linear layer of {type(model).__name__} has a multiple of {width} inputs")
    return chosen


def importance(errors: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """`w_i = e_i / mean_j e_j`: how hard each block is pulled; all alike where there is no error."""
    mean = errors.mean()
    return errors / mean if mean > 0 else torch.ones_like(errors)


class Distillation:
    """The loss of the head of this file, `(model, inputs, target) -> loss`, within `watching`.

    Args:
        model: the student; its blocks are watched, and the teacher's of the same names.
        weighted: weigh blocks by their errors over the last `period` calls.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        calibration: Calibration,
        *,
        hard: float,
        soft: float,
        features: float,
        weighted: bool,
    ) -> None:
        self.teacher = teacher
        self.task = calibration.task
        self.hard, self.soft, self.features = hard, soft, features
        self.weighted = weighted
        names = [name for name, part in model.named_modules() if isinstance(part, Block)]
        self.pairs = [(model.get_submodule(name), teacher.get_submodule(name)) for name in names]
        self.weights: Tensor | None = None
        self.period = 1
        self._seen: dict[nn.Module, Tensor] = {}
        self._errors: list[Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        def note(part: nn.Module, _: object, output: Tensor | tuple[Tensor, ...]) -> None:
            self._seen[part] = output[0] if isinstance(output, tuple) else output

        with ExitStack() as hooks:
            for pair in self.pairs:
                for part in pair:
                    hooks.callback(part.register_forward_hook(note).remove)
            yield
        self._seen.clear()

    def __call__(self, model: nn.Module, inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        device = inputs[0].device
        with torch.no_grad():
            taught = self.teacher.to(device)(*inputs)
        taught = (taught[0] if isinstance(taught, tuple) else taught).float()
        output = model(*inputs)
        answers = output if isinstance(output, tuple) else (output,)
        loss = taught.new_zeros(())
        if self.hard:
            loss = loss + self.hard * torch.stack([self.task.loss(a.float(), target) for a in answers]).mean()
        if self.soft:
            loss = loss + self.soft * torch.stack([self.task.teaching(a.float(), taught) for a in answers]).mean()
        if self.features and self.pairs:
            errors = self.errors()
            loss = loss + self.features * (self._weigh(errors) * errors).sum()
        return loss

    def errors(self) -> Float[Tensor, " n"]:
        """Squared distance of each block's output from the teacher's, relative to the size of that."""
        distances = []
        for own, other in self.pairs:
            wanted = self._seen[other].float()
            distance = (self._seen[own].float() - wanted).square().mean()
            distances.append(distance / wanted.square().mean().clamp(min=1e-12))
        return torch.stack(distances)

    def _weigh(self, errors: Tensor) -> Tensor:
        if not self.weighted:
            return torch.ones_like(errors)
        self._errors.append(errors.detach())
        if self.weights is None or len(self._errors) >= self.period:
            self.weights = importance(torch.stack(self._errors).mean(0))
            self._errors.clear()
        return self.weights


@torch.no_grad()
def _inputs(
    model: nn.Module, layers: dict[str, SparseTrainingLinear], calibration: Calibration, samples: int
) -> dict[str, Tensor]:
    """Numbers that each layer's input has on training items."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str, x: Tensor) -> None:
        flat = x.detach().flatten()
        seen[name].append(flat[:: max(1, -(-len(flat) // SAMPLED))])

    device = next(model.parameters()).device
    with ExitStack() as hooks:
        for name, part in layers.items():
            handle = part.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
            hooks.callback(handle.remove)
        for given, _ in calibration.batches(samples):
            model.eval()(*(x.to(device) for x in given))
    return {name: torch.cat(parts).float() for name, parts in seen.items()}
