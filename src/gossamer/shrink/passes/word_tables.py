"""Word tables: a wide table of words becomes a narrow one and a product that widens its rows.

`W (v, c) ~ Z U^T + 1 m^T`, rank r: `r (v + c)` numbers in place of `v c`. Of all such forms it is the one with the
least error on the words as often as they come:

`m = sum_i p_i w_i`, `U` = the first r eigenvectors of `sum_i p_i (w_i - m)(w_i - m)^T`, `z_i = U^T (w_i - m)`

with `p_i` the share of word i in the calibration texts, every word counted once more than it comes, so that words that
were not seen are kept as well as there is room for.

Source: ours in how it is fitted; the form is Lan et al. 2020, "ALBERT", section 3.1, which trains it from nothing.

- a table that is the output product too (GPT-2, small Llamas) stays tied: scores are `Z (U^T x) + m . x`, which is
  cheaper by the same share; a separate output product is left to `greenformers`
- everything else in the model stays; time grows by one small product where the table is not tied
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from gossamer.layers.exchange import exchange
from gossamer.layers.language import WordHead
from gossamer.layers.words import LowRankWordHead, LowRankWords
from gossamer.shrink.base import Calibration, Step, Unsupported, check_share, register_pass
from gossamer.shrink.recipe import apply, register_step

# Ranks are multiples of this where that rounds them by little.
MULTIPLE = 8
# Rows whose products are made at once.
ROWS = 8192


@register_pass("word_tables", family="factorisation", saves=("macs", "params", "size"), default={"keep": 0.5})
def word_tables(model: nn.Module, calibration: Calibration, *, keep: float = 0.5, samples: int = 1000) -> list[Step]:
    """Factorises the tables of words, `keep` of their numbers being left.

    Args:
        keep: share of the numbers of each table.
        samples: training items whose words are counted.

    Raises:
        Unsupported: there is no table of words that would be smaller, or one that is read in another way as well.
    """
    check_share("keep", keep)
    if keep == 1:
        return []
    chosen = {}
    for name, counts in _counts(model, calibration, samples).items():
        table = cast(nn.Embedding, model.get_submodule(name))
        heads = _tied(model, name, table)
        rank = _rank(table, keep)
        if rank is not None:
            chosen[name] = (table.weight.detach(), counts, rank, heads)
    if not chosen:
        raise Unsupported(f"no table of words of {type(model).__name__} would be smaller at keep {keep:g}")
    steps = []
    for name, (weight, counts, rank, heads) in chosen.items():
        step = {"step": "word_tables.low_rank", "part": name, "rank": rank, "heads": heads}
        apply(model, step)
        steps.append(step)
        _fill(cast(LowRankWords, model.get_submodule(name)), weight, counts)
    return steps


@register_step("word_tables.low_rank")
def _low_rank(model: nn.Module, step: Step) -> None:
    table = model.get_submodule(step["part"])
    if not isinstance(table, nn.Embedding):
        raise ValueError(f"{step['part']} ({type(table).__name__}) is no table of words")
    new = LowRankWords(table.num_embeddings, step["rank"], table.embedding_dim).to(table.weight).train(table.training)
    exchange(model, step["part"], new)
    for head in step["heads"]:
        exchange(model, head, LowRankWordHead(new).train(table.training))


def _counts(model: nn.Module, calibration: Calibration, samples: int) -> dict[str, Tensor]:
    """How often each row of each table is read, by the table's name; padding does not count."""
    tables = {name: part for name, part in model.named_modules() if isinstance(part, nn.Embedding)}
    found = {name: torch.zeros(part.num_embeddings, dtype=torch.float64) for name, part in tables.items()}
    read = set()

    def hook(name: str) -> Any:
        def count(table: nn.Embedding, given: tuple[Tensor, ...]) -> None:
            read.add(name)
            seen = torch.bincount(given[0].flatten().cpu(), minlength=table.num_embeddings).double()
            if table.padding_idx is not None:
                seen[table.padding_idx] = 0
            found[name] += seen

        return count

    hooks = [part.register_forward_pre_hook(hook(name)) for name, part in tables.items()]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for inputs, _ in calibration.batches(samples):
                model(*inputs)
    finally:
        model.train(training)
        for handle in hooks:
            handle.remove()
    if not read:
        raise Unsupported(f"{type(model).__name__} reads no table of words (torch.nn.Embedding)")
    return {name: counts for name, counts in found.items() if name in read}


def _tied(model: nn.Module, name: str, table: nn.Embedding) -> list[str]:
    """Names of the heads that score by `table`."""
    heads = []
    for other, part in model.named_modules():
        if part is table or not any(p is table.weight for p in part._parameters.values()):
            continue
        above = other.rpartition(".")[0]
        head = model.get_submodule(above)
        if not isinstance(head, WordHead):
            raise Unsupported(f"{other} ({type(part).__name__}) reads the table of words {name} too, in its own way")
        heads.append(above)
    return heads


def _rank(table: nn.Embedding, keep: float) -> int | None:
    """The rank of that share of numbers, None where two factors would not be smaller."""
    size, (rows, width) = table.weight.numel(), table.weight.shape
    rank = int((keep * size - width) / (rows + width))
    if rank >= 8 * MULTIPLE:
        rank -= rank % MULTIPLE
    return rank if 1 <= rank < width else None


@torch.no_grad()
def _fill(new: LowRankWords, weight: Tensor, counts: Tensor) -> None:
    share = ((counts + 1) / (counts + 1).sum()).to(weight.device)
    parts = list(zip(weight.split(ROWS), share.split(ROWS), strict=True))
    mean = torch.stack([p @ w.double() for w, p in parts]).sum(0)
    around = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=weight.device)
    for w, p in parts:
        centred = w.double() - mean
        around += centred.T @ (centred * p[:, None])
    # Eigenvalues come in ascending order.
    basis = torch.linalg.eigh(around)[1].flip(1)[:, : new.up.in_features]
    new.up.weight.copy_(basis)
    new.up.bias.copy_(mean)
    new.table.weight.copy_(torch.cat([(w.double() - mean) @ basis for w, _ in parts]))
