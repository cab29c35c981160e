"""DSFormer: every matrix of the blocks becomes sparse coefficients over small dense bases, trained for the task.

Source: Chand et al. 2023, "DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight Factorization".
A reconstruction: there is no public code, and its abstract and a summary are what could be read. The layer and the
solvers are in `gossamer.layers.dense_sparse`.

1. sizes of groups, bases and rows for the wanted share of the bits, by the least error on one layer of each shape
2. bases and coefficients of every matrix by matching pursuit and least squares
3. the Straight-Through Factorizer: all coefficients are kept and trained, each row's largest are used, and the
   gradient passes to all of them; the loss is the task's and the teacher's, the model as it was
4. values and places are stored, packed

- `keep` is the share of the bits of the matrices, places included, biases not; embeddings, norms and head stay dense,
  so the share of the whole file is higher
- what is saved is storage: multiply-adds fall with the size of the bases alone, and no speed is promised
- group over inputs and coefficients for each output row, the loss, and how sizes are chosen are ours to guess; the
  paper's loss on hidden states is left out
"""

from __future__ import annotations

import copy
import time

from torch import nn

from gossamer.layers import Block
from gossamer.layers.dense_sparse import DenseSparseLinear, StraightThroughLinear, solve, solve_config
from gossamer.layers.exchange import exchange, exchange_linear
from gossamer.shrink.base import Calibration, Step, Unsupported, check_share, register_pass
from gossamer.shrink.products import Product, products
from gossamer.shrink.recipe import note, register_step
from gossamer.shrink.recovery import check_steps, recover

# Of the time, what choosing sizes and solving may take.
SOLVING = 0.4


@register_pass("dsformer", family="factorisation", paper="dsformer", saves=("size", "params"), default={"keep": 0.5})
def dsformer(
    model: nn.Module,
    calibration: Calibration,
    *,
    keep: float = 0.5,
    group: int | None = None,
    basis: int | None = None,
    nonzeros: int | None = None,
    rounds: int = 10,
    steps: int | None = None,
    lr: float = 1e-4,
) -> list[Step]:
    """Writes the matrices of the blocks as sparse over dense, in `keep` of their bits.

    Args:
        keep: share of the bits of all matrices that are factorised.
        group, basis, nonzeros: sizes in place of `keep`, all three; matrices with fewer inputs than `group` take all
            of theirs as one.
        rounds: of the solver.
        steps: of training, three epochs by default, and never longer than the calibration's time.
        lr: learning rate.

    Raises:
        Unsupported: no linear layer would be smaller.
        ValueError: a setting is out of range, or some of the three sizes are given and some not.
    """
    check_share("keep", keep)
    given = {"group": group, "basis": basis, "nonzeros": nonzeros}
    sizes = {name: size for name, size in given.items() if size is not None}
    if sizes and len(sizes) < 3:
        raise ValueError(f"group, basis and nonzeros must be given together, got {', '.join(sizes)} alone")
    if any(size < 1 for size in sizes.values()) or (sizes and sizes["nonzeros"] > sizes["basis"]):
        raise ValueError(f"group and basis must be at least 1, nonzeros in 1 … basis; got {sizes}")
    check_steps(steps)
    if keep == 1 and not sizes:
        return []
    start = time.perf_counter()
    found = block_layers(model, calibration)
    chosen = _sizes(found, keep, sizes, calibration.seed)
    teacher = copy.deepcopy(model).eval() if steps != 0 else None
    learning: dict[str, StraightThroughLinear] = {}
    for number, product in enumerate(found):
        size = chosen[product.name]
        if size is None:
            continue
        share = SOLVING * calibration.seconds * (number + 1) / len(found)
        layer = product.layer
        assert isinstance(layer, nn.Linear)
        vectors, coefficients = solve(
            layer.weight,
            rounds=rounds,
            seed=calibration.seed,
            end=start + share,
            **size,
        )
        new = StraightThroughLinear(layer.in_features, vectors, coefficients, size["nonzeros"], layer.bias)
        exchange(model, product.name, new.train(layer.training))
        learning[product.name] = new
    recover(model, calibration, steps=steps, lr=lr, began=start, teacher=teacher)
    taken: list[Step] = []
    for name, trained in learning.items():
        exchange(model, name, trained.stored())
        step = {"step": "dsformer.dense_sparse", "part": name, **(chosen[name] or {})}
        note(model, step)
        taken.append(step)
    model.eval()
    return taken


@register_step("dsformer.dense_sparse")
def _dense_sparse(model: nn.Module, step: Step) -> None:
    exchange_linear(model, step["part"], DenseSparseLinear, **{n: step[n] for n in ("group", "basis", "nonzeros")})


def block_layers(model: nn.Module, calibration: Calibration) -> list[Product]:
    """The linear layers of the residual blocks; of a module that has none of ours, all but the first and the last.

    Raises:
        Unsupported: there is none.
    """
    found = products(model, calibration.example(), wanted=lambda layer: type(layer) is nn.Linear)
    blocks = [name + "." for name, part in model.named_modules() if isinstance(part, Block)]
    inside = [p for p in found if not blocks or p.name.startswith(tuple(blocks))]
    if not inside:
        raise Unsupported(f"the residual blocks of {type(model).__name__} have no linear layers")
    return inside


def _sizes(found: list[Product], keep: float, given: dict[str, int], seed: int) -> dict[str, dict[str, int] | None]:
    """Sizes by name; one layer of each shape says them for all of that shape.

    Raises:
        Unsupported: none would be smaller.
    """
    by_shape: dict[tuple[int, ...], dict[str, int] | None] = {}
    chosen: dict[str, dict[str, int] | None] = {}
    for product in found:
        layer = product.layer
        assert isinstance(layer, nn.Linear)
        shape = tuple(layer.weight.shape)
        if shape not in by_shape:
            if given:
                sizes = {**given, "group": min(given["group"], layer.in_features)}
                trial = DenseSparseLinear(layer.in_features, layer.out_features, bias=False, **sizes)
                by_shape[shape] = sizes if trial.stored_bits() < 32 * layer.weight.numel() else None
            else:
                by_shape[shape] = solve_config(layer.weight.detach(), 1 / keep, seed=seed)
        chosen[product.name] = by_shape[shape]
    if not any(chosen.values()):
        raise Unsupported(f"no linear layer of {found[0].name} … {found[-1].name} would be smaller")
    return chosen
