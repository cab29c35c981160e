"""Text classification: token ids to batches, class scores to words and pictures.

- a batch is int64 `(b, n)`, padded with `pad_id`; in training it is cut at its longest text (a multiple of 8), else it
  has the full length, so that every measured cost is that of the exported model
- augmentation is word dropout: each token becomes unknown with probability `0.3 * strength`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from gossamer.data import DataError, Split
from gossamer.tasks.base import Figure, check_strength, new_plot, to_svg
from gossamer.tasks.classification import Classification


class TextClassification(Classification):
    name = "text-classification"

    def __init__(self, spec: dict[str, Any], meta: dict[str, Any]) -> None:
        super().__init__(spec, meta)
        self.coder: Any = None

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
        check_strength(strength)
        ids, target = split.inputs[0][index], split.targets[index]
        if not train:
            return (ids,), target
        pad = self.spec["pad_id"]
        used = (ids != pad).any(0).nonzero()
        longest = int(used[-1]) + 1 if len(used) else 1
        ids = ids[:, : min(ids.shape[1], -(-longest // 8) * 8)]
        unknown = self.meta.get("unk_id")
        if strength > 0 and unknown is not None:
            dropped = torch.rand(ids.shape, generator=generator) < 0.3 * strength
            ids = ids.masked_fill(dropped & (ids != pad), unknown)
        return (ids.contiguous(),), target

    def read(self, inputs: list[str]) -> tuple[Int[Tensor, "b n"]]:
        """Texts as they stand, `.txt` files (a text a line), or tables with the run's text column."""
        from gossamer.data.tables import TABLES
        from gossamer.data.text import encode

        texts: list[str] = []
        for given in inputs:
            path = Path(given) if len(given) < 1000 and "\n" not in given else Path()
            if path.suffix.lower() in (".txt", *TABLES) and " " not in path.suffix:
                texts += self.from_file(path)
            else:
                texts.append(given)
        if not texts:
            raise DataError("no input: give texts, a .txt file with one text a line, or a table")
        if self.coder is None:
            from tokenizers import Tokenizer

            self.coder = Tokenizer.from_str(self.meta["tokenizer"])
        self.names = texts
        return (encode(self.coder, texts, self.spec["max_len"], self.spec["pad_id"]),)

    def from_file(self, path: Path) -> list[str]:
        from gossamer.data.tables import read_table, read_text
        from gossamer.data.text import text_cells

        if not path.is_file():
            raise DataError(f"{path}: no such file")
        if path.suffix.lower() == ".txt":
            return [line.strip() for line in read_text(path).splitlines() if line.strip()]
        column = self.meta["text"]
        # A file without header stays without: its first row may be a text that looks like a name.
        table = read_table(path, header=False if column.startswith("column ") else None)
        if len(table.frame.columns) == 1:
            column = str(table.frame.columns[0])
        return text_cells(table, table.column(column))

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
