"""From tokens to an answer. Where tokens were merged, `sizes` says how many each stands for."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


def mean_pool(
    x: Float[Tensor, "b *grid c"],
    mask: Bool[Tensor, "b *grid"] | None = None,
    sizes: Float[Tensor, "b *grid"] | None = None,
) -> Float[Tensor, "b c"]:
    """Mean over the (valid) tokens, weighted by their sizes; a sample with none gives zeros."""
    x = x.flatten(1, -2)
    if mask is None and sizes is None:
        return x.mean(1)
    weight = x.new_ones(()) if sizes is None else sizes.flatten(1)[..., None]
    if mask is not None:
        weight = weight * mask.flatten(1)[..., None].to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


class SequencePool(nn.Module):
    """`z = sum_n softmax_n(w . x_n + b) x_n`; a token of size s counts as s alike ones.

    Source: Hassani et al. 2021, "Escaping the Big Data Paradigm with Compact Transformers", section 3.2.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Linear(dim, 1)

    def forward(
        self,
        x: Float[Tensor, "b *grid c"],
        mask: Bool[Tensor, "b *grid"] | None = None,
        sizes: Float[Tensor, "b *grid"] | None = None,
    ) -> Float[Tensor, "b c"]:
        x = x.flatten(1, -2)
        score = self.score(x)
        if sizes is not None:
            score = score + sizes.flatten(1)[..., None].log()
        if mask is not None:
            score = score.masked_fill(~mask.flatten(1)[..., None], torch.finfo(score.dtype).min)
        return (score.softmax(1).transpose(1, 2) @ x)[:, 0]


class Classifier(nn.Module):
    """Pool the tokens, normalise, drop, and score the classes: `linear(drop(norm(pool(x))))`.

    Args:
        pool: `mean` of the tokens, the first `token`, or `sequence` pooling.
        norm: factory of a norm on the pooled vector, or None.
        num_classes: 0 gives the pooled vector itself.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        pool: Literal["mean", "token", "sequence"] = "mean",
        norm: Callable[[int], nn.Module] | None = None,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.kind = pool
        self.pool = SequencePool(dim) if pool == "sequence" else None
        self.norm = norm(dim) if norm else None
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(dim, num_classes) if num_classes else None

    def forward(
        self,
        x: Float[Tensor, "b *grid c"],
        mask: Bool[Tensor, "b *grid"] | None = None,
        sizes: Float[Tensor, "b *grid"] | None = None,
    ) -> Float[Tensor, "b k"]:
        if self.pool is not None:
            x = self.pool(x, mask, sizes)
        else:
            x = x[:, 0] if self.kind == "token" else mean_pool(x, mask, sizes)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.fc is None else self.fc(self.drop(x))


class DenseClassifier(nn.Module):
    """`y = W2 drop(act(W1 x_0))`, `x_0` the first token: the classifier of BERT and its kin.

    Args:
        act: activation factory between the products.
    """

    def __init__(
        self, dim: int, num_classes: int, *, act: Callable[[], nn.Module] = nn.Tanh, drop: float = 0.0
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.act = act()
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(dim, num_classes)

    def forward(
        self,
        x: Float[Tensor, "b *grid c"],
        mask: Bool[Tensor, "b *grid"] | None = None,
        sizes: Float[Tensor, "b *grid"] | None = None,
    ) -> Float[Tensor, "b k"]:
        return self.fc(self.drop(self.act(self.dense(x.flatten(1, -2)[:, 0]))))


class SentenceVector(nn.Module):
    """All tokens as one vector: their mean, their maximum or the first; of length 1 if asked for.

    Source: Reimers and Gurevych 2019, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks", section 3.
    """

    def __init__(self, pool: Literal["mean", "max", "token"] = "mean", *, normalize: bool = True) -> None:
        super().__init__()
        if pool not in ("mean", "max", "token"):
            raise ValueError(f"pool must be mean, max or token, got {pool!r}")
        self.pool = pool
        self.normalize = normalize

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        mask: Bool[Tensor, "b n"] | None = None,
        sizes: Float[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b c"]:
        if self.pool == "mean":
            x = mean_pool(x, mask, sizes)
        elif self.pool == "token":
            x = x[:, 0]
        else:
            x = (x if mask is None else x.masked_fill(~mask[..., None], torch.finfo(x.dtype).min)).amax(1)
        return nn.functional.normalize(x, dim=-1) if self.normalize else x
