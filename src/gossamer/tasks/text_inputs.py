"""What tasks on texts share: reading the user's texts, and cutting and corrupting token ids while training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from gossamer.data import DataError
from gossamer.tasks.base import check_strength


class TextInputs:
    """Texts to token ids `(b, n)`; beside a `Task`, whose `spec` and `meta` it reads."""

    spec: dict[str, Any]
    meta: dict[str, Any]
    names: list[str]

    def __init__(self, spec: dict[str, Any], meta: dict[str, Any]) -> None:
        super().__init__(spec, meta)  # type: ignore[call-arg]
        self.names = []
        self.coder: Any = None

    def augmented(
        self, ids: Int[Tensor, "b n"], strength: float, generator: torch.Generator | None
    ) -> Int[Tensor, "b m"]:
        """`ids` cut at the longest text of the batch (a multiple of 8), words dropped with chance `0.3 * strength`."""
        check_strength(strength)
        pad = self.spec["pad_id"]
        used = (ids != pad).any(0).nonzero()
        longest = int(used[-1]) + 1 if len(used) else 1
        ids = ids[:, : min(ids.shape[1], -(-longest // 8) * 8)]
        unknown = self.meta.get("unk_id")
        if strength > 0 and unknown is not None:
            dropped = torch.rand(ids.shape, generator=generator) < 0.3 * strength
            ids = ids.masked_fill(dropped & (ids != pad), unknown)
        return ids.contiguous()

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
            return [line.strip() for line in read_text(path).split("\n") if line.strip()]
        columns = [self.meta["text"]] if "text" in self.meta else self.meta["columns"][:2]
        # A file without header stays without: its first row may be a text that looks like a name.
        table = read_table(path, header=False if columns[0].startswith("column ") else None)
        if len(table.frame.columns) == 1:
            columns = [str(table.frame.columns[0])]
        # Of pairs one sentence stands behind the other.
        cells = [text_cells(table, table.column(column)) for column in columns]
        return [text for row in zip(*cells, strict=True) for text in row]
