"""Attention patterns: one definition of who sees whom, run dense, as a FlexAttention block mask, or gathered.

Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers" (strided, fixed); Beltagy et al.
2020, "Longformer" (band, global tokens); Zaheer et al. 2020, "Big Bird" (random blocks); Dong et al. 2024, "Flex
Attention" (block masks).

- a pattern is a predicate on (batch, head, query, key) indices; `&`, `|` and `~` combine patterns
- `dense_mask` and `block_mask` are made from the same predicate, so they cannot differ
- blocks and bands also have gathered forms (`local_attention`, `band_attention`, `block_attention`) whose memory
  grows with tokens times neighbourhood, with gradients on every device
- a query that sees no key gets 0
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pattern:
    """`rule(b, h, q, k)` is True where query `q` of head `h` in sample `b` may see key `k`.

    Args:
        rule: predicate on index tensors that broadcast; it must be elementwise.
        batch: samples the rule tells apart (1: all alike).
        heads: heads the rule tells apart (1: all alike).
    """

    rule: Rule
    batch: int = 1
    heads: int = 1

    def __and__(self, other: "Pattern") -> "Pattern":
        left, right = self.rule, other.rule
        return Pattern(lambda b, h, q, k: left(b, h, q, k) & right(b, h, q, k), *_joint(self, other))

    def __or__(self, other: "Pattern") -> "Pattern":
        left, right = self.rule, other.rule
        return Pattern(lambda b, h, q, k: left(b, h, q, k) | right(b, h, q, k), *_joint(self, other))

    def __invert__(self) -> "Pattern":
        rule = self.rule
        return Pattern(lambda b, h, q, k: ~rule(b, h, q, k), self.batch, self.heads)

    def shift(self, q: int = 0, k: int = 0) -> "Pattern":
        """The pattern read at `(q index + q, k index + k)`: a decoding step, or tokens put in front."""
        rule = self.rule
        return Pattern(lambda b, h, i, j: rule(b, h, i + q, j + k), self.batch, self.heads)


def _joint(one: Pattern, two: Pattern) -> tuple[int, int]:
    sizes = []
    for name, a, b in (("batch", one.batch, two.batch), ("heads", one.heads, two.heads)):
        if a != b and 1 not in (a, b):
            raise ValueError(f"patterns to combine must agree in {name} or have 1; got {a} and {b}")
        sizes.append(max(a, b))
    return sizes[0], sizes[1]


def _blocks(n: int, size: int) -> int:
    """`n / size` rounded up, without a negative operand: ONNX rounds the quotient of a symbolic size to zero."""
    return (n + size - 1) // size


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


# ---- patterns ------------------------------------------------------------------------------------------------


def causal() -> Pattern:
    """`k <= q`."""
    return Pattern(lambda b, h, q, k: k <= q)


def window(size: int) -> Pattern:
    """Non-overlapping blocks: `q // size == k // size` (the first of the Sparse Transformer's fixed patterns)."""
    _positive(size=size)
    return Pattern(lambda b, h, q, k: q // size == k // size)


def band(back: int, ahead: int) -> Pattern:
    """A sliding window: `q - back <= k <= q + ahead`."""
    _band(back, ahead)
    return Pattern(lambda b, h, q, k: (k >= q - back) & (k <= q + ahead))


def strided(stride: int) -> Pattern:
    """Every `stride`-th key, counted from the query: `(q - k) mod stride == 0`."""
    _positive(stride=stride)
    return Pattern(lambda b, h, q, k: (q - k) % stride == 0)


def summary(block: int, last: int, first: int = 0) -> Pattern:
    """Columns that speak for their block: `k mod block >= block - last` or `k mod block < first`.

    The second of the Sparse Transformer's fixed patterns; Long Range Arena also counts the first column
    (`first=1`).
    """
    _positive(block=block)
    if not 0 <= last <= block or not 0 <= first <= block:
        raise ValueError(f"last and first must be in 0..block={block}, got last={last}, first={first}")
    return Pattern(lambda b, h, q, k: (k % block >= block - last) | (k % block < first))


def fixed(block: int, last: int, first: int = 0) -> Pattern:
    """The Sparse Transformer's fixed pattern: own block, and the summary columns of every block.

    Not causal by itself; write `fixed(50, 10) & causal()`.
    """
    return window(block) | summary(block, last, first)


def global_tokens(count: int) -> Pattern:
    """The first `count` tokens see everything and are seen by everyone."""
    return Pattern(lambda b, h, q, k: (q < count) | (k < count))


def marked_tokens(flags: Bool[Tensor, "b n"]) -> Pattern:
    """Global tokens by name: a marked token sees everything and is seen by everyone."""
    return Pattern(lambda b, h, q, k: flags[b, q] | flags[b, k], batch=flags.shape[0])


def valid_keys(mask: Bool[Tensor, "b n"]) -> Pattern:
    """Padding: only keys whose mask is True are seen."""
    return Pattern(lambda b, h, q, k: mask[b, k], batch=mask.shape[0])


def documents(index: Int[Tensor, "b n"]) -> Pattern:
    """Packed sequences: a token sees the tokens that carry its own number."""
    return Pattern(lambda b, h, q, k: index[b, q] == index[b, k], batch=index.shape[0])


def spans(back: Sequence[int], ahead: Sequence[int] | None = None, *, device: torch.device | None = None) -> Pattern:
    """Mixed span: head `h` sees `q - back[h] <= k <= q + ahead[h]`; without `ahead` it looks back only."""
    ahead = [0] * len(back) if ahead is None else ahead
    if len(ahead) != len(back) or not back or min(*back, *ahead, 0) < 0:
        raise ValueError(f"back and ahead must be equally long and not negative, got {back} and {ahead}")
    behind, front = torch.tensor(list(back), device=device), torch.tensor(list(ahead), device=device)
    return Pattern(lambda b, h, q, k: (k >= q - behind[h]) & (k <= q + front[h]), heads=max(len(back), len(ahead)))


def selected(index: Int[Tensor, "b h rows m"], n_k: int, *, q_block: int = 1, k_block: int = 1) -> Pattern:
    """Block-selected: queries of block row `i` see the key blocks listed in `index[:, :, i]` (-1: none).

    Args:
        index: key blocks per block row; batch and heads may be 1.
        n_k: number of keys.
        q_block: queries per block row.
        k_block: keys per block.

    Raises:
        ValueError: a listed block does not exist.
    """
    _positive(n_k=n_k, q_block=q_block, k_block=k_block)
    columns = _blocks(n_k, k_block)
    if index.numel() and (int(index.max()) >= columns or int(index.min()) < -1):
        raise ValueError(f"index must name blocks in -1..{columns - 1}, got {int(index.min())}..{int(index.max())}")
    seen = torch.zeros(*index.shape[:3], columns + 1, dtype=torch.bool, device=index.device)
    seen.scatter_(-1, index.long() + 1, True)  # column 0 collects the -1
    batch, heads = index.shape[:2]
    return Pattern(lambda b, h, q, k: seen[b % batch, h % heads, q // q_block, k // k_block + 1], batch, heads)


def bigbird_blocks(
    n_blocks: int,
    *,
    random: int = 3,
    heads: int = 1,
    reach: int | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "1 heads n_blocks m"]:
    """The key blocks of every BigBird block row: first, last, itself, two neighbours, `random` others.

    Args:
        n_blocks: blocks in the sequence.
        random: random blocks per row and head, drawn from those the row does not see yet.
        heads: heads that draw for themselves.
        reach: random blocks come from the first `reach` blocks (Long Range Arena: 1024 positions); None: all.
        generator: on the CPU.

    Returns:
        Indices, -1 where a row has fewer. The first and last row, which see everything, list the same as others;
        see `bigbird` and `block_attention(dense_rows=...)`.
    """
    _positive(n_blocks=n_blocks, heads=heads)
    if random < 0:
        raise ValueError(f"random must not be negative, got {random}")
    last = n_blocks - 1
    table = torch.full((1, heads, n_blocks, 5 + random), -1, dtype=torch.long)
    for row in range(n_blocks):
        near = sorted({0, last, *range(max(row - 1, 0), min(row + 1, last) + 1)})
        table[0, :, row, : len(near)] = torch.tensor(near)
        free = torch.tensor([i for i in range(min(reach or n_blocks, n_blocks)) if i not in near])
        for head in range(heads):
            drawn = free[torch.randperm(len(free), generator=generator)[:random]]
            table[0, head, row, 5 : 5 + len(drawn)] = drawn
    return table


def bigbird(index: Int[Tensor, "b h rows m"], n: int, block: int) -> Pattern:
    """BigBird over `n` tokens: the blocks of `index`; the first and last block row see everything."""
    last = index.shape[2] - 1
    ends = Pattern(lambda b, h, q, k: (q // block == 0) | (q // block == last))
    return selected(index, n, q_block=block, k_block=block) | ends


# ---- the two dense readings of a pattern ---------------------------------------------------------------------


def dense_mask(
    pattern: Pattern, n_q: int, n_k: int, *, device: torch.device | None = None
) -> Bool[Tensor, "b h {n_q} {n_k}"]:
    """The pattern written out; batch and heads are 1 where the pattern does not tell them apart."""
    b = torch.arange(pattern.batch, device=device)[:, None, None, None]
    h = torch.arange(pattern.heads, device=device)[:, None, None]
    q = torch.arange(n_q, device=device)[:, None]
    k = torch.arange(n_k, device=device)
    return pattern.rule(b, h, q, k).expand(pattern.batch, pattern.heads, n_q, n_k)


def block_mask(
    pattern: Pattern, n_q: int, n_k: int, *, block: int = 128, device: torch.device | None = None
) -> BlockMask:
    """The pattern as FlexAttention's block mask: blocks without a visible pair are skipped."""
    batch = pattern.batch if pattern.batch > 1 else None
    heads = pattern.heads if pattern.heads > 1 else None
    place = device or torch.get_default_device()
    return create_block_mask(pattern.rule, batch, heads, n_q, n_k, device=place, BLOCK_SIZE=block)


def pattern_reference(
    q: Float[Tensor, "b h n_q d"],
    k: Float[Tensor, "b h n_k d"],
    v: Float[Tensor, "b h n_k e"],
    mask: Bool[Tensor, "#b #h n_q n_k"],
    scale: float | None = None,
) -> Float[Tensor, "b h n_q e"]:
    """`softmax(scale q k^T where mask) v`, and 0 in a row without a visible key."""
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
    return weights.masked_fill(~mask.any(-1, keepdim=True), 0.0) @ v


# ---- FlexAttention -------------------------------------------------------------------------------------------


@cache
def _compiled() -> Callable:
    return torch.compile(flex_attention)


@cache
def _no_compiler(device: str) -> bool:
    """Whether compiled FlexAttention fails on this kind of device (tried once, on a few tokens)."""
    q = torch.zeros(1, 1, 16, 16, device=device)
    try:
        with torch.no_grad():
            _compiled()(q, q, q)
    except Exception as error:  # a missing compiler surfaces as any of a dozen exceptions
        warnings.warn(f"FlexAttention does not compile on {device}, dense masks are used: {error}", stacklevel=3)
        return True
    return False


def flex(
    q: Float[Tensor, "b h n_q d"],
    k: Float[Tensor, "b h n_k d"],
    v: Float[Tensor, "b h n_k e"],
    pattern: Pattern | BlockMask,
    *,
    scale: float | None = None,
) -> Float[Tensor, "b h n_q e"]:
    """Attention under a pattern: compiled FlexAttention where it works, dense masked attention elsewhere.

    Dense is used where nothing compiles, under export, and for gradients on the CPU, which FlexAttention lacks.
    The first call on a device compiles (seconds). Pass a `block_mask` built once where the pattern stays.
    """
    n_q, n_k = q.shape[-2], k.shape[-2]
    wants_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    dense = torch.compiler.is_exporting() or (q.device.type == "cpu" and wants_grad)
    if not dense and not _no_compiler(q.device.type):
        if isinstance(pattern, Pattern):
            pattern = block_mask(pattern, n_q, n_k, device=q.device)
        return _compiled()(q, k, v, block_mask=pattern, scale=scale)
    if isinstance(pattern, BlockMask):
        pattern = Pattern(pattern.mask_mod, q.shape[0], q.shape[1])
    mask = dense_mask(pattern, n_q, n_k, device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


# ---- gathered forms ------------------------------------------------------------------------------------------


def local_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    window: int,
    *,
    causal: bool = False,
    mask: Bool[Tensor, "b n"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h n e"]:
    """Attention inside non-overlapping blocks of `window` tokens; equals the dense form under `window(size)`.

    Args:
        window: tokens per block; a last, shorter block is padded and masked.
        causal: within the block a token sees itself and what came before.
        mask: True for keys that exist.
        scale: of the logits; None: `d ** -0.5`.
    """
    _positive(window=window)
    b, h, n, _ = q.shape
    blocks = _blocks(n, window)
    pad = blocks * window - n
    if not isinstance(pad, int) or pad:  # a symbolic pad may be any, so a graph traced with 0 must pad as well
        mask = q.new_ones(b, n, dtype=torch.bool) if mask is None else mask
        q, k, v = (F.pad(t, (0, 0, 0, pad)) for t in (q, k, v))
    q, k, v = (t.reshape(b * h, blocks, window, t.shape[-1]) for t in (q, k, v))
    seen = None
    if causal:
        seen = torch.ones(window, window, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        keys = F.pad(mask, (0, pad)).view(b, 1, blocks, 1, window).expand(b, h, blocks, window, window)
        seen = (keys if seen is None else keys & seen).reshape(b * h, blocks, window, window)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    return y.reshape(b, h, blocks * window, -1)[:, :, :n]


def _band(back: int, ahead: int) -> None:
    if back < 0 or ahead < 0:
        raise ValueError(f"back and ahead must not be negative, got back={back}, ahead={ahead}")


def band_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    back: int,
    ahead: int,
    *,
    mask: Bool[Tensor, "b n"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h n e"]:
    """Sliding-window attention, gathered; equals the dense form under `band(back, ahead)`.

    Queries go in chunks as wide as the band; each chunk meets the `chunk + back + ahead` keys within reach, so
    memory is about `2 n (back + ahead)` logits.

    Args:
        back: tokens seen behind the query.
        ahead: tokens seen in front of it.
        mask: True for keys that exist.
        scale: of the logits; None: `d ** -0.5`.
    """
    _band(back, ahead)
    b, h, n, _ = q.shape
    chunk = min(max(back + ahead + 1, 32), n)
    chunks = _blocks(n, chunk)
    pad = chunks * chunk - n
    reach = chunk + back + ahead
    q = F.pad(q, (0, 0, 0, pad)).reshape(b * h, chunks, chunk, -1)
    # (b, h, chunks, d, reach): the keys of a chunk start `back` before its first query
    k, v = (F.pad(t, (0, 0, back, ahead + pad)).unfold(2, reach, chunk).mT for t in (k, v))
    k, v = (t.reshape(b * h, chunks, reach, -1) for t in (k, v))
    offset = torch.arange(reach, device=q.device) - torch.arange(chunk, device=q.device)[:, None]
    near = (offset >= 0) & (offset <= back + ahead)
    if mask is None:
        exists = q.new_ones(1, n, dtype=torch.bool)
    else:
        exists = mask
    exists = F.pad(exists, (back, ahead + pad)).unfold(1, reach, chunk)
    seen = exists[:, None, :, None] & near  # (1 or b, 1, chunks, chunk, reach)
    seen = seen[0] if mask is None else seen.expand(b, h, -1, -1, -1).reshape(b * h, chunks, chunk, reach)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    return y.reshape(b, h, chunks * chunk, -1)[:, :, :n]


def block_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    index: Int[Tensor, "#b #h rows m"],
    block: int,
    *,
    dense_rows: Sequence[int] = (),
    mask: Bool[Tensor, "b n"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h n e"]:
    """Block-sparse attention, gathered; equals the dense form under `selected(index, n, ...)`.

    Args:
        index: the key blocks each query block sees, each at most once, -1 for none.
        block: tokens per block; a last, shorter block is padded and masked.
        dense_rows: query blocks that see every key instead (BigBird: `(0, -1)`).
        mask: True for keys that exist.
        scale: of the logits; None: `d ** -0.5`.

    Raises:
        ValueError: `index` does not have one row per query block.
    """
    _positive(block=block)
    b, h, n, _ = q.shape
    rows, m = index.shape[-2:]
    if rows != _blocks(n, block):
        raise ValueError(f"index must have {_blocks(n, block)} rows for n={n}, block={block}, got {rows}")
    pad = rows * block - n
    if mask is None:
        mask = q.new_ones(1, n, dtype=torch.bool)
    mask = F.pad(mask, (0, pad)).view(-1, 1, rows, block)
    q, k, v = (F.pad(t, (0, 0, 0, pad)).reshape(b, h, rows, block, -1) for t in (q, k, v))
    sample = torch.arange(b, device=q.device)[:, None, None, None]
    head = torch.arange(h, device=q.device)[:, None, None]
    there = index.clamp(min=0)
    near_k, near_v = (t[sample, head, there].flatten(0, 1).flatten(2, 3) for t in (k, v))  # (b h, rows, m block, d)
    exists = mask.expand(b, h, rows, block)[sample, head, there] & (index >= 0)[..., None]
    seen = exists.reshape(b * h, rows, 1, m * block)  # one row for all queries of a block
    y = F.scaled_dot_product_attention(q.flatten(0, 1), near_k, near_v, attn_mask=seen, scale=scale)
    y = y.unflatten(0, (b, h))
    if dense_rows:
        # a set: with one block, 0 and -1 are the same row
        which = torch.tensor(sorted({r % rows for r in dense_rows}), device=q.device)
        full = F.scaled_dot_product_attention(
            q[:, :, which].flatten(2, 3),
            k.flatten(2, 3),
            v.flatten(2, 3),
            attn_mask=mask.flatten(2)[:, :, None],
            scale=scale,
        )
        y = y.index_copy(2, which, full.unflatten(2, (-1, block)).to(y.dtype))
    return y.flatten(2, 3)[:, :, :n]
