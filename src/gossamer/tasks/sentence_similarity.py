"""Sentence similarity: a model turns each sentence into a vector, and two sentences are as alike as their vectors.

- a batch of b pairs is `(2b, n)` token ids, the sentences of a pair one behind the other; the model answers `(2b, d)`
- the likeness of a pair is the cosine of its two vectors; it is judged by Spearman's rank correlation with the scores
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from gossamer.data import Split
from gossamer.tasks.base import Figure, Task, new_plot, to_svg
from gossamer.tasks.text_inputs import TextInputs


class SentenceSimilarity(TextInputs, Task):
    """`loss = mean((cos(u, v) - score)^2)`."""

    name = "sentence-similarity"
    metric = "spearman"
    maximise = True

    def batch(
        self,
        split: Split,
        index: Int[Tensor, " b"],
        *,
        train: bool = False,
        strength: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[tuple[Int[Tensor, "b2 n"]], Float[Tensor, " b"]]:
        """Token ids `(2b, n)` and scores `(b,)` in 0 … 1."""
        ids, target = split.inputs[0][index].flatten(0, 1), split.targets[index]
        return (self.augmented(ids, strength, generator) if train else ids,), target

    def answer_shape(self, inputs: tuple[Tensor, ...], target: Tensor) -> tuple[int | None, ...]:
        """A vector for each sentence."""
        return len(inputs[0]), None

    def example(self, split: Split, count: int = 1) -> tuple[Int[Tensor, "b n"]]:
        return (split.inputs[0].flatten(0, 1)[:count],)

    def likeness(self, output: Float[Tensor, "b2 d"]) -> Float[Tensor, " b"]:
        """The cosine of each pair's vectors."""
        return F.cosine_similarity(output[::2], output[1::2])

    def loss(self, output: Float[Tensor, "b2 d"], target: Tensor, smoothing: float = 0.0) -> Float[Tensor, ""]:
        """Squared difference of the cosine and the score."""
        return F.mse_loss(self.likeness(output.float()), target)

    def teaching(self, student: Float[Tensor, "b2 d"], teacher: Float[Tensor, "b2 e"]) -> Float[Tensor, ""]:
        """Squared difference of all cosines within the batch: what the vectors are used for, whatever their width."""
        own, taught = (F.normalize(x, dim=-1) for x in (student, teacher))
        return F.mse_loss(own @ own.T, taught @ taught.T)

    def metrics(self, output: Float[Tensor, "n2 d"], target: Float[Tensor, " n"]) -> dict[str, float]:
        """Spearman's and Pearson's correlation of cosines and scores, in percent; 0 where one of them is constant."""
        import numpy as np
        from scipy import stats

        said, true = self.likeness(output.float()).numpy(), target.numpy()
        if len(said) < 2 or np.ptp(said) == 0 or np.ptp(true) == 0:
            return {"spearman": 0.0, "pearson": 0.0}
        return {
            "spearman": 100 * float(stats.spearmanr(said, true).statistic),
            "pearson": 100 * float(stats.pearsonr(said, true).statistic),
        }

    def details(self, output: Float[Tensor, "n2 d"], target: Float[Tensor, " n"]) -> dict[str, Any]:
        """Mean cosine of the pairs in each fifth of the scores."""
        said = self.likeness(output.float())
        bins = (target * 5).long().clamp(max=4)
        means = [float(said[bins == k].mean()) if (bins == k).any() else None for k in range(5)]
        return {"mean_cosine_by_fifth": means}

    def baseline(self, train: Split, split: Split) -> dict[str, float]:
        """The share of tokens two sentences have in common (Jaccard)."""
        a, b = split.inputs[0].unbind(1)
        pad = self.spec["pad_id"]
        said = []
        for left, right in zip(a.tolist(), b.tolist(), strict=True):
            one, two = set(left) - {pad}, set(right) - {pad}
            said.append(len(one & two) / max(1, len(one | two)))
        angle = torch.tensor(said).arccos()
        # Vectors of the plane whose cosines are these shares.
        first = torch.stack((torch.ones_like(angle), torch.zeros_like(angle)), -1)
        pairs = torch.stack((first, torch.stack((angle.cos(), angle.sin()), -1)), 1)
        return self.metrics(pairs.flatten(0, 1), split.targets)

    def describe(self, output: Float[Tensor, "n d"]) -> list[dict[str, Any]]:
        """For each text, the vector, and the cosine with the text before it."""
        rows = []
        unit = F.normalize(output.float(), dim=-1)
        for i, vector in enumerate(output.tolist()):
            row: dict[str, Any] = {"input": self.names[i] if i < len(self.names) else str(i)}
            if i:
                row["cosine_with_previous"] = round(float(unit[i] @ unit[i - 1]), 6)
            rows.append({**row, "vector": vector})
        return rows

    def figures(self, output: Tensor, target: Tensor, split: Split) -> list[Figure]:
        """Cosine against score."""
        plot, axes = new_plot(5.0, 4.0)
        axis = axes[0, 0]
        low, high = self.meta["range"]
        axis.plot(low + target.numpy() * (high - low), self.likeness(output.float()).numpy(), ".", ms=3, alpha=0.4)
        axis.set_xlabel("score of the data")
        axis.set_ylabel("cosine of the two vectors")
        axis.grid(alpha=0.25)
        return [Figure("Likeness", to_svg(plot), "Each point is a pair of the test data.")]
