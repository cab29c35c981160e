"""What image and text classification share: cross entropy, counts of right and wrong, and their pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from gossamer.data import Split
from gossamer.tasks.base import Figure, Task, new_plot, to_svg

TEMPERATURE = 2.0  # at which answers are taught
MOST_NAMED = 30  # classes whose names fit beside a confusion matrix


class Classification(Task):
    """`loss = -sum_k target_k log softmax(output)_k`, judged by accuracy."""

    metric = "accuracy"
    maximise = True

    def __init__(self, spec: dict[str, Any], meta: dict[str, Any]) -> None:
        super().__init__(spec, meta)
        self.classes: list[str] = list(meta["classes"])
        self.names: list[str] = []

    def answer_shape(self, inputs: tuple[Tensor, ...], target: Tensor) -> tuple[int | None, ...]:
        """A score for each class."""
        return len(target), len(self.classes)

    def loss(self, output: Float[Tensor, "b k"], target: Tensor, smoothing: float = 0.0) -> Float[Tensor, ""]:
        """Cross entropy with class numbers `(b,)` or probabilities `(b, k)`; in float32 whatever the output."""
        return F.cross_entropy(output.float(), target, label_smoothing=smoothing)

    def teaching(self, student: Float[Tensor, "b k"], teacher: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
        """`T^2 KL(softmax(teacher / T) || softmax(student / T))`.

        Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network".
        """
        soft, own = (F.log_softmax(scores / TEMPERATURE, -1) for scores in (teacher, student))
        return F.kl_div(own, soft, reduction="batchmean", log_target=True) * TEMPERATURE**2

    def confusion(self, output: Float[Tensor, "n k"], target: Int[Tensor, " n"]) -> Int[Tensor, "k k"]:
        """Counts: row the true class, column the predicted one."""
        k = output.shape[1]
        return torch.bincount(target * k + output.argmax(1), minlength=k * k).view(k, k)

    def metrics(self, output: Float[Tensor, "n k"], target: Int[Tensor, " n"]) -> dict[str, float]:
        """Accuracy; F1, the mean over the classes that occur or are predicted; mean negative log-likelihood."""
        counts = self.confusion(output, target).double()
        right, true, said = counts.diagonal(), counts.sum(1), counts.sum(0)
        f1 = 2 * right / (true + said).clamp(min=1)
        return {
            "accuracy": float(right.sum() / counts.sum().clamp(min=1)),
            "macro_f1": float(f1[true + said > 0].mean()),
            "nll": float(F.cross_entropy(output.float(), target)),
        }

    def details(self, output: Float[Tensor, "n k"], target: Int[Tensor, " n"]) -> dict[str, Any]:
        """Confusion counts, and recall, precision and number of each class (null where a class does not occur)."""
        counts = self.confusion(output, target)
        right, true, said = counts.diagonal().tolist(), counts.sum(1).tolist(), counts.sum(0).tolist()
        per_class = [
            {"class": name, "count": n, "recall": r / n if n else None, "precision": r / s if s else None}
            for name, r, n, s in zip(self.classes, right, true, said, strict=True)
        ]
        return {"classes": self.classes, "confusion": counts.tolist(), "per_class": per_class}

    def baseline(self, train: Split, split: Split) -> dict[str, float]:
        """Always the class most frequent in training, with the training frequencies as probabilities."""
        k = len(self.classes)
        share = (torch.bincount(train.targets, minlength=k).float() + 1).log()
        return self.metrics(share.expand(len(split), k), split.targets)

    def describe(self, output: Float[Tensor, "n k"]) -> list[dict[str, Any]]:
        """The likeliest class of each input, its probability, and the next ones."""
        chances = output.float().softmax(1)
        top = chances.topk(min(5, chances.shape[1]), dim=1)
        rows = []
        for i, (values, numbers) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True)):
            best = {self.classes[k]: round(value, 6) for k, value in zip(numbers, values, strict=True)}
            name = self.names[i] if i < len(self.names) else str(i)
            label, chance = next(iter(best.items()))
            rows.append({"input": name, "class": label, "probability": chance, "top": best})
        return rows

    def confusion_figure(self, output: Tensor, target: Tensor) -> Figure:
        counts = self.confusion(output, target).numpy().astype(float)
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        k = len(self.classes)
        side = min(8.0, 2.2 + 0.42 * k) if k <= MOST_NAMED else 6.5
        plot, axes = new_plot(side + 0.6, side)
        axis = axes[0, 0]
        image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axis.set_xlabel("predicted")
        axis.set_ylabel("true")
        if k <= MOST_NAMED:
            short = [name if len(name) <= 16 else name[:15] + "…" for name in self.classes]
            axis.set_xticks(range(k), short, rotation=45, ha="right", parse_math=False)
            axis.set_yticks(range(k), short, parse_math=False)
        if k <= 20:
            for row in range(k):
                for column in np.flatnonzero(counts[row]):
                    colour = "white" if share[row, column] > 0.5 else "black"
                    text = f"{int(counts[row, column])}"
                    axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
        plot.colorbar(image, ax=axis, shrink=0.8, label="share of the true class")
        return Figure("Confusion matrix", to_svg(plot), "Counts on test data; colour is the share of the true class.")

    def some(self, output: Tensor, target: Tensor, count: int) -> tuple[list[int], list[int]]:
        """Positions to show: right answers spread over the split, and the wrong ones the model was surest of."""
        chance = output.float().softmax(1).max(1).values
        hit = output.argmax(1) == target
        right, wrong = hit.nonzero().flatten(), (~hit).nonzero().flatten()
        spread = torch.linspace(0, max(0, len(right) - 1), min(count, len(right))).long()
        worst = wrong[chance[wrong].argsort(descending=True, stable=True)][:count]
        return right[spread].tolist(), worst.tolist()
