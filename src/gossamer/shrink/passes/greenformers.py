"""Greenformers: every product becomes two thin ones.

Source: Cahyawijaya 2021, "Greenformers: Improving Computation and Memory Efficiency in Transformer Models via Low-Rank
Approximation", and its code (SamuelCahyawijaya/greenformer, MIT). The layers are `gossamer.layers.low_rank`.

`W (out, in) ~ B A`, rank r. Both forms cost the same at `r_max = in * out / (in + out)`; a share of `r_max` is that
share of the multiply-adds. A layer is factorised only where that is cheaper.

- `svd`: the nearest matrix of rank r; the singular values go to the first factor, as in the code, which has them from
  a randomised decomposition (ours is exact, so equal to it up to the signs of factors where that has converged)
- `snmf`: semi-nonnegative, the second factor has no negative entry; `nmf`: neither has; `random`: not trained at all
- `whitened` (ours): the best on the inputs the layer really gets. With outputs' covariance `C = W cov(x) W^T` and its
  first r eigenvectors U, `B = U`, `A = U^T W`, and the bias takes up what the mean output loses. Plain `svd` is the
  special case of white inputs, which those of a transformer are far from
- `ranks="even"`: every layer keeps the same share. `ranks="threshold"` (ours): one threshold for the whole network on
  what a rank adds (to the outputs' squared size, relative to the layer's) for its multiply-adds; a layer that would
  keep `r_max` or more stays as it is
- `factorise` has the code's own rules for ranks; it leaves layers standing right below the root as they are, as the
  code does. For convolutions its `r_max` forgets the kernel, so that it leaves some that would be cheaper; `keep`
  counts the kernel
- a grouped convolution is factorised group by group. The code factorises it as a whole, and then its first factor
  does not see the channels it needs, so that even full rank gives something else
- query, key and value are one product here, so their first factors are one: `13824 r` parameters a layer of BERT-base
  are `12288 r`
- batch norms that can be folded into products are folded first: later their scale could not reach the weight
"""

from __future__ import annotations

import copy as copies
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gossamer.layers.exchange import exchange
from gossamer.layers.fold import norm_pairs, norm_readers, settled
from gossamer.layers.low_rank import (
    LowRankConv,
    LowRankLinear,
    best_factors,
    break_even,
    groups_of,
    low_rank,
    matrices,
    nonnegative,
    semi_nonnegative,
    set_factors,
)
from gossamer.shrink.base import Calibration, Step, Unsupported, check_share, register_pass
from gossamer.shrink.products import Product, is_product, product_layers, products
from gossamer.shrink.recipe import apply, register_step

Solver = Literal["svd", "whitened", "snmf", "nmf", "random"]
SOLVERS = ("svd", "whitened", "snmf", "nmf", "random")
# Ranks are multiples of this where they are larger: narrower steps are not faster in vector units.
MULTIPLE = 8


@register_pass(
    "greenformers",
    family="factorisation",
    paper="greenformers",
    saves=("macs", "params", "size"),
    default={"keep": 0.6, "solver": "whitened"},
)
def greenformers(
    model: nn.Module,
    calibration: Calibration,
    *,
    keep: float = 0.6,
    rank: float | None = None,
    solver: Solver = "svd",
    ranks: Literal["even", "threshold"] = "threshold",
    iterations: int = 10,
    submodules: Sequence[str] | None = None,
    samples: int = 256,
) -> list[Step]:
    """Replaces products by two thin ones, `keep` of their multiply-adds being left.

    Args:
        keep: share of the multiply-adds of all products that may be factorised.
        rank: in place of `keep`, the rank of every layer, or (below 1) its share of the break-even rank.
        solver: how the factors come from the weight; see the head of this file.
        ranks: the same share for every layer, or one threshold for all (`svd` and `whitened` alone).
        iterations: of `snmf` and `nmf`.
        submodules: names of modules; only products in them. None: all but the layers that read the input itself or
            give the answer.
        samples: training items that `whitened` sees.

    Raises:
        Unsupported: no product would be cheaper.
        ValueError: a setting is out of range.
    """
    check_share("keep", keep)
    _check(solver, 1 if rank is None else rank)
    if ranks not in ("even", "threshold"):
        raise ValueError(f"ranks must be even or threshold, got {ranks!r}")
    if keep == 1 and rank is None:
        return []
    found = products(model, calibration.example(), within=submodules)
    if all(_size(p.layer, keep, rank) is None for p in found):
        raise Unsupported(f"no product of {type(model).__name__} has fewer multiply-adds at that rank")
    if solver == "nmf":
        chosen_ones = (p for p in found if _size(p.layer, keep, rank) is not None)
        negative = [p.name for p in chosen_ones if bool((matrices(p.layer) < 0).any())]
        if negative:
            raise ValueError(f"solver nmf needs weights with no negative entry; {', '.join(negative)} has some")
    steps = _fold(model)
    if steps:
        found = products(model, calibration.example(), within=submodules)
    moments: dict[str, _Moments] = {}
    if solver == "whitened":
        moments = _observe(model, found, calibration, samples)
    wide: dict[str, _Factors] = {}
    if solver in ("svd", "whitened"):
        wide = {p.name: _decompose(p.layer, moments.get(p.name)) for p in found}
    if rank is None and ranks == "threshold" and wide:
        chosen = _by_threshold(found, wide, keep)
    else:
        sizes = {p.name: _size(p.layer, keep, rank) for p in found}
        chosen = {name: size for name, size in sizes.items() if size is not None}
    generator = torch.Generator().manual_seed(calibration.seed)
    for product in found:
        size = chosen.get(product.name)
        if size is None:
            continue
        factors = wide.get(product.name) or _solve(product.layer, size, solver, iterations, generator)
        step = {"step": "greenformers.low_rank", "part": product.name, "rank": size}
        apply(model, step)
        steps.append(step)
        if factors is not None:
            _fill(model.get_submodule(product.name), product.layer, factors, size, moments.get(product.name))
    return steps


@register_step("greenformers.low_rank")
def _low_rank(model: nn.Module, step: Step) -> None:
    layer = model.get_submodule(step["part"])
    if not is_product(layer):
        raise ValueError(f"{step['part']} ({type(layer).__name__}) is no product that can be factorised")
    exchange(model, step["part"], low_rank(layer, step["rank"]).train(layer.training))


def factorise(
    module: nn.Module,
    rank: float,
    *,
    solver: str = "random",
    iterations: int = 10,
    submodules: Sequence[nn.Module] | None = None,
    copy: bool = False,
    seed: int = 0,
) -> nn.Module:
    """`module` with its linear layers and convolutions factorised, by the rules of the authors' `auto_fact`.

    Args:
        rank: of every layer, or (below 1) the share of the break-even rank.
        submodules: only these modules and what is in them; None: all but those right below `module`.
        copy: leave `module` as it is.

    Raises:
        ValueError: an unknown solver, or a rank not above 0.
    """
    _check(solver, rank)
    if solver == "whitened":
        raise ValueError("solver 'whitened' needs data: it is for the pass")
    if copy and submodules is not None:
        named = {id(part): name for name, part in module.named_modules()}
        names = [named[id(part)] for part in submodules if id(part) in named]
        module = copies.deepcopy(module)
        submodules = [module.get_submodule(name) for name in names]
    elif copy:
        module = copies.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    if is_product(module):
        return _factorised(module, rank, solver, iterations, generator, "module") or module
    # Weights are taken as they were before, whichever is exchanged first.
    inside = None if submodules is None else {id(part) for root in submodules for part in root.modules()}
    for name, layer in list(product_layers(module).items()):
        if ("." not in name) if inside is None else id(layer) not in inside:
            continue
        new = _factorised(layer, rank, solver, iterations, generator, name)
        if new is not None:
            exchange(module, name, new)
    return module


def _factorised(
    layer: nn.Module, rank: float, solver: str, iterations: int, generator: torch.Generator, name: str
) -> nn.Module | None:
    size, limit = _size_by_code(layer, rank)
    if size is None:
        if limit is not None:
            words = f"{name} stays as it is: rank {limit[0]} is not below {limit[1]}, from where on it does not pay"
            warnings.warn(words, stacklevel=3)
        return None
    new = low_rank(layer, size).train(layer.training)
    factors = _decompose(layer, None) if solver == "svd" else _solve(layer, size, solver, iterations, generator)
    if factors is not None:
        _fill(new, layer, factors, size, None)
    return new


# --- ranks --------------------------------------------------------------------------------------------------------


def _size(layer: nn.Module, keep: float, rank: float | None) -> int | None:
    """The rank of one layer, None where it stays as it is."""
    if rank is not None:
        return _size_by_code(layer, rank)[0]
    return _whole(break_even(layer) * keep, layer)


def _whole(rank: float, layer: nn.Module) -> int | None:
    """`rank` in whole vectors and whole groups, None where that would not be cheaper."""
    groups = groups_of(layer)
    multiple = math.lcm(groups, MULTIPLE if rank >= 2 * MULTIPLE else 1)
    size = max(groups, int(rank / multiple + 1e-9) * multiple)
    return size if size < break_even(layer) else None


def _size_by_code(layer: nn.Module, rank: float) -> tuple[int | None, tuple[int, int] | None]:
    """The rank by the authors' rule, or None and, where it would not pay, the rank and its limit."""
    groups = groups_of(layer)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        inputs, out = layer.in_channels, layer.out_channels // groups
    else:
        _, out, inputs = matrices(layer).shape
    limit = inputs * out // (inputs + out)
    size = int(limit * rank) if rank < 1 else int(rank)
    if size == 0:
        return None, None
    size = -(-size // groups) * groups
    return (size, None) if size < limit else (None, (size, limit))


def _by_threshold(found: list[Product], wide: dict[str, _Factors], keep: float) -> dict[str, int]:
    """Ranks such that the least useful of all ranks kept is worth more than the most useful left out.

    Worth is the share of a layer's squared output size, for the multiply-adds of one more rank.
    """
    budget = keep * sum(p.macs for p in found)
    worth = {p.name: wide[p.name].share / (p.places * sum(matrices(p.layer).shape[1:])) for p in found}

    def sizes(threshold: float) -> dict[str, int | None]:
        # At least one rank each.
        return {p.name: _whole(max(1, int((worth[p.name] > threshold).sum())), p.layer) for p in found}

    def cost(chosen: dict[str, int | None]) -> float:
        total = 0.0
        for p in found:
            size = chosen[p.name]
            total += p.macs if size is None else p.macs * size / break_even(p.layer)
        return total

    low, high = -60.0, math.log10(max(float(w.max()) for w in worth.values()))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(sizes(10**middle)) <= budget else (middle, high)
    return {name: size for name, size in sizes(10**high).items() if size is not None}


# --- factors ------------------------------------------------------------------------------------------------------


class _Factors:
    """All factors of a layer, a group each, the most useful first.

    Args:
        share: what each rank of all groups together adds to the squared size of the outputs, as a share of it.
    """

    def __init__(self, down: list[Tensor], up: list[Tensor], energy: list[Tensor] | None = None) -> None:
        self.down = down
        self.up = up
        if energy is not None:
            each = torch.stack(energy)
            # Ranks of a grouped convolution come for all groups at once.
            shared = each.mean(0, keepdim=True).expand_as(each).T.flatten()
            self.share = shared / shared.sum().clamp(min=1e-30)


def _decompose(layer: nn.Module, moments: _Moments | None) -> _Factors:
    found = []
    for group, weight in enumerate(matrices(layer)):
        given = {} if moments is None else moments.of(group)
        found.append(best_factors(weight, **given))
    down, up, energy = zip(*found, strict=True)
    return _Factors(list(down), list(up), list(energy))


def _solve(layer: nn.Module, size: int, solver: str, iterations: int, generator: torch.Generator) -> _Factors | None:
    """Factors of that very rank; None for a random start."""
    if solver == "random":
        return None
    down, up = [], []
    for weight in matrices(layer):
        rank = size // groups_of(layer)
        start = torch.rand(weight.shape[0], rank, generator=generator).to(weight)
        if solver == "snmf":
            first, second = semi_nonnegative(weight, start, iterations)
        else:
            other = torch.rand(rank, weight.shape[1], generator=generator).to(weight)
            first, second = nonnegative(weight, start, other, iterations)
        down.append(first)
        up.append(second)
    return _Factors(down, up)


@torch.no_grad()
def _fill(new: nn.Module, layer: nn.Module, factors: _Factors, size: int, moments: _Moments | None) -> None:
    assert isinstance(new, LowRankLinear | LowRankConv)
    rank = size // len(factors.down)
    down = torch.stack([f[:rank] for f in factors.down])
    up = torch.stack([f[:, :rank] for f in factors.up])
    bias: Any = layer.bias
    if bias is not None:
        bias = bias.detach().double()
        if moments is not None and moments.centred:
            lost = [moments.mean_output(g) for g in range(len(up))]
            bias = bias + torch.cat([m - u @ (u.T @ m) for m, u in zip(lost, up, strict=True)])
    set_factors(new, down, up, bias)


# --- what the layers see ------------------------------------------------------------------------------------------


class _Moments:
    """Running first and second moments of a layer's inputs or outputs, whichever are fewer.

    The covariance is used where the layer has a bias that can take up the mean, else the second moments.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.weights = matrices(layer)
        groups, out, inputs = self.weights.shape
        self.by_input = not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and inputs < out
        self.centred = layer.bias is not None
        width = inputs if self.by_input else out
        self.count = 0
        self.first = torch.zeros(groups, width, dtype=torch.float64)
        self.second = torch.zeros(groups, width, width, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor, mask: Bool[Tensor, "b n"] | None) -> None:
        """Notes one call of the layer."""
        seen = x if self.by_input else y
        if isinstance(self.layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            if type(self.layer).__module__ != "gossamer.layers.conv":
                seen = seen.movedim(-len(self.layer.kernel_size) - 1, -1)
        elif mask is not None and seen.shape[:-1] == mask.shape:
            seen = seen[mask]
        if not self.by_input and self.layer.bias is not None:
            bias: Any = self.layer.bias
            seen = seen - bias
        rows = seen.detach().reshape(-1, len(self.first), self.first.shape[1]).transpose(0, 1).float()
        self.count += rows.shape[1]
        self.first += rows.sum(1).double().cpu()
        self.second += (rows.transpose(1, 2) @ rows).double().cpu()

    def of(self, group: int) -> dict[str, Tensor]:
        """The moments of a group, as `best_factors` takes them."""
        mean = self.first[group] / self.count
        second = self.second[group] / self.count
        if self.centred:
            second = second - mean[:, None] * mean
        return {"inputs" if self.by_input else "outputs": second.to(self.weights.device)}

    def mean_output(self, group: int) -> Float[Tensor, " o"]:
        """The mean of the group's outputs, less the bias."""
        mean = (self.first[group] / self.count).to(self.weights.device)
        return self.weights[group].double() @ mean if self.by_input else mean


@torch.no_grad()
def _observe(model: nn.Module, found: list[Product], calibration: Calibration, samples: int) -> dict[str, _Moments]:
    """What each product sees of `samples` training items; padding is not counted where the mask is plain."""
    device = next(model.parameters()).device
    noted = {p.name: _Moments(p.layer) for p in found}
    pad = calibration.task.spec.get("pad_id")
    mask: Tensor | None = None
    end = time.perf_counter() + calibration.seconds / 2
    with ExitStack() as hooks:
        for p in found:
            note = noted[p.name]
            handle = p.layer.register_forward_hook(lambda _, args, y, note=note: note.add(args[0], y, mask))
            hooks.callback(handle.remove)
        for inputs, _ in _in_time(calibration.batches(samples), end):
            ids = inputs[0].to(device)
            mask = ids != pad if pad is not None and not ids.is_floating_point() and ids.ndim == 2 else None
            model.eval()(ids, *(x.to(device) for x in inputs[1:]))
    return noted


def _in_time(batches: Iterator[Any], end: float) -> Iterator[Any]:
    for batch in batches:
        yield batch
        if time.perf_counter() > end:
            return


def _fold(model: nn.Module) -> list[Step]:
    pairs = [(part, norm) for part in model.modules() for _, norm in norm_pairs(part)]
    pairs += [(part, norm) for part in model.modules() for norm, readers in norm_readers(part) if readers]
    if all(settled(getattr(part, norm, None)) is None for part, norm in pairs):
        return []
    step: Step = {"step": "fold_batch_norm"}
    apply(model, step)
    return [step]


def _check(solver: str, rank: float) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; got {solver!r}")
    if rank <= 0:
        raise ValueError(f"rank must be above 0, got {rank}")
