"""Text classification: token ids to batches, class scores to words and pictures.

- a batch is int64 `(b, n)`, padded with `pad_id`; in training it is cut at its longest text (a multiple of 8), else it
  has the full length, so that every measured cost is that of the exported model
- augmentation is word dropout: each token becomes unknown with probability `0.3 * strength`
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from gossamer.data import Split
from gossamer.tasks.base import Figure, new_plot, to_svg
from gossamer.tasks.classification import Classification
from gossamer.tasks.text_inputs import TextInputs


class TextClassification(TextInputs, Classification):
    name = "text-classification"

    def batch(
        self,
        split: Split,
        index: Int[Tensor, " b"],
        *,
        train: bool = False,
        strength: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[tuple[Int[Tensor, "b n"]], Int[Tensor, " b"]]:
        """Token ids `(b, n)` and class numbers `(b,)`."""
        ids, target = split.inputs[0][index], split.targets[index]
        if not train:
            return (ids,), target
        return (self.augmented(ids, strength, generator),), target

    def figures(self, output: Tensor, target: Tensor, split: Split) -> list[Figure]:
        """The confusion matrix, and texts told right and wrong."""
        figures = [self.confusion_figure(output, target)]
        right, wrong = self.some(output, target, 8)
        for title, rows in (("Told right", right), ("Told wrong", wrong)):
            if rows:
                caption = "Predicted class and its probability" + (
                    "; the true class in brackets. The surest errors first." if title == "Told wrong" else "."
                )
                figures.append(Figure(title, self.quotes(rows, output, target, split), caption))
        return figures

    def quotes(self, rows: list[int], output: Tensor, target: Tensor, split: Split) -> bytes:
        import textwrap

        chance = output.float().softmax(1).max(1).values
        blocks = []
        for i in rows:
            text = split.names[i] if split.names else " ".join(map(str, split.inputs[0][i].tolist()))
            guess, truth = self.classes[int(output[i].argmax())], self.classes[int(target[i])]
            words = f"{guess[:20]} {float(chance[i]):.0%}" + ("" if guess == truth else f" ({truth[:20]})")
            blocks.append((words, textwrap.wrap(textwrap.shorten(text, 260, placeholder=" …") or " ", 90)))
        lines = sum(len(block) + 0.6 for _, block in blocks)
        plot, axes = new_plot(8.6, 0.19 * lines + 0.2)
        axis = axes[0, 0]
        axis.set_axis_off()
        axis.set_xlim(0, 1)
        axis.set_ylim(lines, 0)
        y = 0.5
        for words, block in blocks:
            axis.text(0, y, words, fontsize=8, weight="bold", va="center", parse_math=False)
            for line in block:
                axis.text(0.22, y, line, fontsize=8, va="center", parse_math=False)
                y += 1
            y += 0.6
        return to_svg(plot)
