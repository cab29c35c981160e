"""Bag of embeddings: the text classifier without attention, the baseline every claim on text is held against.

Source: Joulin, Grave, Bojanowski, Mikolov 2016, "Bag of Tricks for Efficient Text Classification" (fastText).

- the mean of word vectors and of the vectors of hashed word pairs; a linear layer, or one hidden layer, on top
- order is seen in pairs of neighbours only
- pairs are hashed into `buckets` rows inside the model, so it takes the same ids as every text classifier
- `pool="both"` puts the largest value of each channel beside the mean (ours, not fastText's)
- whole words can be dropped while training (word dropout, Iyyer et al. 2015, "Deep Averaging Networks")
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gossamer.layers import mean_pool
from gossamer.models.registry import register_system

# A prime below 2^31: the products of ids stay exact in int64.
_PRIME = 1_000_003


def pair_rows(ids: Int[Tensor, "b n"], buckets: int) -> Int[Tensor, "b m"]:
    """The row of each pair of neighbours: `(P id_t + id_(t+1)) mod buckets`."""
    return (ids[:, :-1] * _PRIME + ids[:, 1:]) % buckets


class BagOfEmbeddings(nn.Module):
    """`logits = head(drop((sum_t w[id_t] + sum_t p[pair_t]) / (words + pairs)))` over the valid words and pairs.

    Args: see `bag_of_embeddings`.
    """

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        *,
        dim: int,
        buckets: int,
        hidden: int | None,
        pool: str,
        drop: float,
        word_drop: float,
        pad_id: int,
    ) -> None:
        super().__init__()
        if pool not in ("mean", "both"):
            raise ValueError(f"pool must be mean or both, got {pool!r}")
        if not 0 <= word_drop < 1:
            raise ValueError(f"word_drop must be in [0, 1), got {word_drop}")
        self.pad_id, self.buckets, self.word_drop = pad_id, buckets, word_drop
        self.words = nn.Embedding(vocab_size, dim, padding_idx=pad_id)
        self.pairs = nn.Embedding(buckets, dim) if buckets else None
        for table in (self.words, self.pairs):
            if table is not None:
                nn.init.uniform_(table.weight, -(dim**-0.5), dim**-0.5)
        self.max = pool == "both"
        width = dim * (1 + self.max)
        self.drop = nn.Dropout(drop)
        self.hidden = nn.Linear(width, hidden) if hidden else None
        self.logits = nn.Linear(hidden or width, num_classes)

    def forward(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b k"]:
        mask = ids != self.pad_id
        if self.training and self.word_drop:
            mask = mask & (torch.rand(ids.shape, device=ids.device) >= self.word_drop)
        words = self.words(ids)
        x, seen = words, mask
        if self.pairs is not None:
            x = torch.cat((x, self.pairs(pair_rows(ids, self.buckets))), 1)
            seen = torch.cat((seen, mask[:, :-1] & mask[:, 1:]), 1)
        x = mean_pool(x, seen)
        if self.max:
            x = torch.cat((x, max_pool(words, mask)), -1)
        x = self.drop(x)
        if self.hidden is not None:
            x = self.drop(self.hidden(x).relu())
        return self.logits(x)


def max_pool(x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b c"]:
    """The largest value of each channel among the valid tokens; 0 where there is none."""
    low = torch.finfo(x.dtype).min
    top = x.masked_fill(~mask[..., None], low).amax(1)
    return top.masked_fill(~mask.any(1, keepdim=True), 0.0)


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    dim = {"xs": 64, "s": 128, "m": 192, "l": 256}[size]
    return "bag_of_words", {"dim": dim, "pool": "both", "drop": 0.5, "word_drop": 0.4, **spec}


@register_system(
    "bag-of-embeddings",
    tasks=("text-classification",),
    scale=_scale,
    variants={"bag_of_words": {}, "bag_of_pairs": dict(buckets=2**15)},
)
def bag_of_embeddings(
    *,
    dim: int = 64,
    buckets: int = 0,
    hidden: int | None = None,
    pool: str = "mean",
    drop: float = 0.3,
    word_drop: float = 0.0,
    vocab_size: int = 8192,
    max_len: int = 256,
    num_classes: int = 2,
    pad_id: int = 0,
) -> nn.Module:
    """A bag-of-embeddings classifier.

    Args:
        dim: channels of a word vector.
        buckets: rows for hashed pairs of neighbours, 0 for words alone.
        hidden: units of the one hidden layer, None for a linear classifier.
        pool: the `mean`, or `both` mean and maximum.
        drop: dropout of the pooled vector and of the hidden layer.
        word_drop: probability of leaving out a word in training.
        max_len: taken for the sake of the common interface; any length works.

    Raises:
        ValueError: unknown `pool`, or `word_drop` not in [0, 1).
    """
    return BagOfEmbeddings(
        vocab_size,
        num_classes,
        dim=dim,
        buckets=buckets,
        hidden=hidden,
        pool=pool,
        drop=drop,
        word_drop=word_drop,
        pad_id=pad_id,
    )
