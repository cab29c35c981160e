"""Tokens: choose some, merge alike ones, pack the valid ones, and put them back.

Source: Bolya et al. 2023, "Token Merging: Your ViT But Faster" (bipartite soft matching); top-k selection as in
Rao et al. 2021, "DynamicViT".

- tokens that stay keep their order, in selection and in merging
- a merged token is the mean of its tokens weighted by size; `source` tells where each original token went
- packed tokens of all samples lie behind each other, with offsets, as variable-length attention takes them
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# ---- select --------------------------------------------------------------------------------------------------


def take(x: Float[Tensor, "b n c"], index: Int[Tensor, "b k"]) -> Float[Tensor, "b k c"]:
    """The tokens at `index`."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def put(x: Float[Tensor, "b n c"], index: Int[Tensor, "b k"], tokens: Float[Tensor, "b k c"]) -> Float[Tensor, "b n c"]:
    """`x` with its tokens at `index` replaced: the way back from `select`."""
    return x.scatter(1, index[..., None].expand(-1, -1, x.shape[-1]), tokens)


def select(
    x: Float[Tensor, "b n c"], scores: Float[Tensor, "b n"], k: int
) -> tuple[Float[Tensor, "b {k} c"], Int[Tensor, "b {k}"]]:
    """The `k` tokens of highest score in their old order, and their indices.

    Raises:
        ValueError: `k` is not in 1..n.
    """
    if not 1 <= k <= x.shape[1]:
        raise ValueError(f"k must be in 1..{x.shape[1]} (tokens), got {k}")
    index = scores.topk(k, dim=1).indices.sort(dim=1).values
    return take(x, index), index


# ---- merge ---------------------------------------------------------------------------------------------------


class Merged(NamedTuple):
    """Tokens after merging: how many original tokens each holds, and where each original token went."""

    x: Float[Tensor, "b m c"]
    size: Float[Tensor, "b m"]
    source: Int[Tensor, "b n"]


def merge(
    x: Float[Tensor, "b n c"],
    r: int,
    *,
    metric: Float[Tensor, "b n d"] | None = None,
    size: Float[Tensor, "b n"] | None = None,
    source: Int[Tensor, "b n0"] | None = None,
    protect: int = 0,
) -> Merged:
    """Bipartite soft matching: `r` tokens go into the token most like them.

    Tokens are dealt into two sets, even and odd positions. Every even token finds its most similar (cosine) odd
    token; the `r` best pairs merge into the place of the odd one.

    Args:
        r: tokens to remove.
        metric: what similarity is measured on, in ToMe the mean of the keys over heads; None: `x`.
        size: original tokens per token; None: one each.
        source: of an earlier merge, to be carried on; None: this is the first.
        protect: leading tokens (class token) that are never merged, neither way.

    Raises:
        ValueError: `r` is negative or exceeds the even tokens that may go.
    """
    b, n, _ = x.shape
    size = x.new_ones(b, n) if size is None else size
    even = torch.arange(0, n, 2, device=x.device)
    odd = torch.arange(1, n, 2, device=x.device)
    partners = n // 2 - protect // 2
    free = (n + 1) // 2 - (protect + 1) // 2 if partners > 0 else 0
    if not 0 <= r <= free:
        raise ValueError(f"r must be in 0..{free} for n={n}, protect={protect}, got {r}")
    goes = torch.arange(n, device=x.device).expand(b, n)  # the position each token's content moves to
    if r:
        unit = torch.nn.functional.normalize((x if metric is None else metric).detach(), dim=-1)
        likeness = unit[:, even] @ unit[:, odd].mT
        likeness = likeness.masked_fill((even < protect)[:, None] | (odd < protect), float("-inf"))
        best, partner = likeness.max(-1)
        gone = best.topk(r, dim=-1).indices
        goes = goes.scatter(1, even[gone], odd[partner.gather(1, gone)])
    stays = goes == torch.arange(n, device=x.device)
    place = (stays.cumsum(1) - 1).gather(1, goes)  # positions among those that stay
    heavy = size.new_zeros(b, n - r).scatter_add(1, place, size)
    total = x.new_zeros(b, n - r, x.shape[-1]).scatter_add(1, place[..., None].expand_as(x), x * size[..., None])
    if r == 0:
        total = x * 1  # keep-all is the identity to the last bit, which x * size / size is not
    else:
        total = total / heavy[..., None]
    return Merged(total, heavy, place if source is None else place.gather(1, source))


class Matching(NamedTuple):
    """Who goes into whom: positions of the tokens that stay, in their new order, and of those that go.

    `into` is the place of the partner among those that stay. Padding is dropped, not merged: its `real` is False;
    None where nothing is padding.
    """

    stay: Int[Tensor, "b m"]
    gone: Int[Tensor, "b r"]
    into: Int[Tensor, "b r"]
    real: Bool[Tensor, "b r"] | None


def match(
    metric: Float[Tensor, "b n d"], r: int, *, protect: int = 0, mask: Bool[Tensor, "b n"] | None = None
) -> Matching:
    """The matching of `merge` with padding, and in the order of the authors' code, on which their next match depends.

    Those that stay are ordered: protected ones, even positions, odd positions. Padding goes first, the last of it
    before the rest, and is nobody's partner.

    Args:
        metric: what similarity is measured on.
        r: tokens to remove.
        protect: leading tokens that neither go nor are gone into.
        mask: True for real tokens; None: all are.

    Raises:
        ValueError: `r` is negative or exceeds half of the tokens that are not protected.
    """
    b, n, _ = metric.shape
    if not 0 <= r <= max(0, (n - protect) // 2):
        raise ValueError(f"r must be in 0..{max(0, (n - protect) // 2)} for n={n}, protect={protect}, got {r}")
    position = torch.arange(n, device=metric.device)
    order = torch.cat((position[:protect], *(position[protect + (protect + turn) % 2 :: 2] for turn in (0, 1))))
    if not r:
        none = position[:0].expand(b, 0)
        return Matching(order.expand(b, n), none, none, None)
    even, odd = position[::2], position[1::2]
    unit = torch.nn.functional.normalize(metric.detach(), dim=-1)
    barred = (even < protect)[:, None] | (odd < protect)
    if mask is not None:
        barred = barred | ~mask[:, ::2, None] | ~mask[:, None, 1::2]
    best, partner = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).masked_fill(barred, -2.0).max(-1)
    # An odd position is given what its neighbour has, and never goes, unless it is padding.
    leave, goal = (t[..., None].expand(-1, -1, 2).flatten(1)[:, :n] for t in (best, 2 * partner + 1))
    leave = leave.masked_fill(position % 2 == 1, -2.0)
    if mask is not None:
        leave = torch.where(mask, leave, 2.0 + position.to(leave.dtype) / n)
    ranked = leave.masked_fill(position < protect, -3.0).topk(n, dim=1).indices
    gone, stay = ranked[:, :r], ranked[:, r:]
    rank = torch.empty_like(order).scatter(0, order, position)
    stay = order[rank[stay].sort(dim=1).values]
    # Padding may have no partner that stays; it is given place 0, with no weight. (Products with 0 keep the batch free
    # where a tracer takes `zeros_like` and `expand(b, -1)` for constants.)
    place = (ranked * 0).scatter(1, stay, stay * 0 + position[: n - r])
    real = None if mask is None else mask.gather(1, gone)
    return Matching(stay, gone, place.gather(1, goal.gather(1, gone)), real)


def combine(
    x: Float[Tensor, "b n c"], size: Float[Tensor, "b n"], found: Matching, moved: Float[Tensor, "b r c"] | None = None
) -> tuple[Float[Tensor, "b m c"], Float[Tensor, "b m"]]:
    """Tokens merged as `found` says, each the mean of its tokens weighted by `size`, and their sizes.

    Args:
        moved: `size * x` of the tokens that go, where it was changed on the way.
    """
    weighted = x * size[..., None]
    moved = take(weighted, found.gone) if moved is None else moved
    lost = size.gather(1, found.gone)
    if found.real is not None:
        moved, lost = moved * found.real[..., None], lost * found.real
    heavy = size.gather(1, found.stay).scatter_add(1, found.into, lost)
    total = take(weighted, found.stay).scatter_add(1, found.into[..., None].expand_as(moved), moved)
    return total / heavy[..., None], heavy


def unmerge(y: Float[Tensor, "b m c"], source: Int[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
    """Every original token gets the value of the token it went into."""
    return take(y, source)


def merge_reference(
    x: Float[Tensor, "b n c"],
    r: int,
    *,
    metric: Float[Tensor, "b n d"] | None = None,
    size: Float[Tensor, "b n"] | None = None,
    protect: int = 0,
) -> Merged:
    """`merge`, one token after the other."""
    metric = (x if metric is None else metric).detach()
    size = torch.ones_like(x[..., 0]) if size is None else size
    n = x.shape[1]
    results = []
    for tokens, units, weights in zip(x, metric, size, strict=True):
        pairs = []
        for i in range(0, n, 2):
            cosines = {
                j: float(torch.cosine_similarity(units[i], units[j], dim=0)) for j in range(1, n, 2) if j >= protect
            }
            if i >= protect and cosines:
                j = max(cosines, key=lambda key: cosines[key])
                pairs.append((cosines[j], i, j))
        target = dict(sorted(((i, j) for _, i, j in sorted(pairs, reverse=True)[:r])))
        kept = [i for i in range(n) if i not in target]
        groups = [[i, *(j for j in target if target[j] == i)] for i in kept]
        mass = torch.stack([sum(weights[i] for i in group) for group in groups])
        mean = torch.stack([sum(weights[i] * tokens[i] for i in group) for group in groups])
        source = [kept.index(target.get(i, i)) for i in range(n)]
        results.append((mean / mass[:, None], mass, torch.tensor(source, device=x.device)))
    means, masses, sources = zip(*results, strict=True)
    return Merged(torch.stack(means), torch.stack(masses), torch.stack(sources))


# ---- pack ----------------------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """The valid tokens of all samples behind each other; sample `i` is `values[offsets[i]:offsets[i + 1]]`."""

    values: Float[Tensor, "total c"]
    offsets: Int[Tensor, "b_plus_1"]
    mask: Bool[Tensor, "b n"]


def pack(x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"]) -> Packed:
    """Drop the tokens whose mask is False."""
    lengths = mask.sum(1)
    return Packed(x[mask], torch.nn.functional.pad(lengths.cumsum(0), (1, 0)), mask)


def documents(packed: Packed) -> Int[Tensor, "total"]:
    """The sample each packed token belongs to: what `patterns.documents` keeps apart."""
    b = packed.mask.shape[0]
    return torch.arange(b, device=packed.mask.device)[:, None].expand_as(packed.mask)[packed.mask]


def restore(packed: Packed, values: Float[Tensor, "total c"] | None = None, fill: float = 0.0) -> Tensor:
    """Packed values (by default the packed tokens themselves) back in `(b, n, c)`, `fill` where nothing was."""
    values = packed.values if values is None else values
    empty = values.new_full((*packed.mask.shape, values.shape[-1]), fill)
    return empty.masked_scatter(packed.mask[..., None], values)
