"""Language modelling: at every token of a text, the scores of the token that follows.

- a batch is windows of token ids `(b, n)` and the ids that follow them; filled-up places count nowhere
- over a split only two sums a window are kept, of log-likelihood and of right guesses: whole scores are far too large
- judged by perplexity, `exp` of the mean negative log-likelihood of a token; it compares models of one tokenizer only
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from gossamer.data import DataError, Split
from gossamer.data.language import NOTHING
from gossamer.tasks.base import Figure, Task, check_strength, new_plot, to_svg
from gossamer.tasks.text_inputs import TextInputs

MOST_SCORES = 1 << 26


class LanguageModelling(TextInputs, Task):
    """`loss = -mean_t log softmax(output_t)[target_t]`."""

    name = "language-modelling"
    metric = "perplexity"
    maximise = False

    def batch(
        self,
        split: Split,
        index: Int[Tensor, " b"],
        *,
        train: bool = False,
        strength: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[tuple[Int[Tensor, "b n"]], Int[Tensor, "b n"]]:
        """Token ids and the ids that follow; text is not augmented."""
        check_strength(strength)
        return (split.inputs[0][index],), split.targets[index]

    def answer_shape(self, inputs: tuple[Tensor, ...], target: Tensor) -> tuple[int | None, ...]:
        """A score for each token, at every place; a model may know more tokens than its tokenizer has."""
        return *inputs[0].shape, None

    def loss(
        self, output: Float[Tensor, "b n v"], target: Int[Tensor, "b n"], smoothing: float = 0.0
    ) -> Float[Tensor, ""]:
        """Cross entropy of a token; in float32 whatever the output."""
        return F.cross_entropy(
            output.float().flatten(0, 1), target.flatten(), ignore_index=NOTHING, label_smoothing=smoothing
        )

    def teaching(self, student: Float[Tensor, "b n v"], teacher: Float[Tensor, "b n v"]) -> Float[Tensor, ""]:
        """`KL(softmax(teacher) || softmax(student))`, the mean over all tokens."""
        soft, own = (F.log_softmax(scores.flatten(0, 1), -1) for scores in (teacher, student))
        return F.kl_div(own, soft, reduction="batchmean", log_target=True)

    def reduce(
        self, output: Float[Tensor, "b n v"], target: Int[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b 2"], Int[Tensor, " b"]]:
        """For each window the sums of log-likelihood and of right guesses, and how many tokens were foretold."""
        counts = target != NOTHING
        lost = F.cross_entropy(output.float().transpose(1, 2), target, ignore_index=NOTHING, reduction="none")
        right = (output.argmax(-1) == target) & counts
        return torch.stack((-lost.sum(1), right.sum(1).float()), 1), counts.sum(1)

    @property
    def most_at_once(self) -> int:
        return max(1, MOST_SCORES // (self.spec["max_len"] * self.spec["vocab_size"]))

    def metrics(self, output: Float[Tensor, "n ..."], target: Int[Tensor, "n ..."]) -> dict[str, float]:
        """Perplexity, mean negative log-likelihood (nats a token) and share of right guesses, of sums or scores."""
        sums, counts = (output, target) if output.ndim == 2 else self.reduce(output, target)
        tokens = max(1, int(counts.sum()))
        likelihood, right = (sums.double().sum(0) / tokens).tolist()
        return {"perplexity": _perplexity(-likelihood), "nll": -likelihood, "accuracy": right}

    def details(self, output: Float[Tensor, "n ..."], target: Int[Tensor, "n ..."]) -> dict[str, Any]:
        """Tokens foretold, and the perplexity of the easiest tenth of windows, of the middle and of the hardest."""
        sums, counts = (output, target) if output.ndim == 2 else self.reduce(output, target)
        each = -sums[:, 0] / counts.clamp(min=1)
        found = torch.quantile(each.float(), torch.tensor([0.1, 0.5, 0.9])).tolist()
        names = ("easiest_tenth", "middle", "hardest_tenth")
        return {
            "tokens": int(counts.sum()),
            "window_perplexity": {name: _perplexity(value) for name, value in zip(names, found, strict=True)},
        }

    def baseline(self, train: Split, split: Split) -> dict[str, float]:
        """The frequencies of tokens in training, whatever came before."""
        seen = train.targets[train.targets != NOTHING]
        share = torch.bincount(seen, minlength=self.spec["vocab_size"]).double() + 1
        chance = (share / share.sum()).log()
        counts = split.targets != NOTHING
        likelihood = chance[split.targets.clamp(min=0)].masked_fill(~counts, 0).sum(1)
        right = ((split.targets == int(share.argmax())) & counts).sum(1)
        return self.metrics(torch.stack((likelihood, right.double()), 1).float(), counts.sum(1))

    def read(self, inputs: list[str]) -> tuple[Int[Tensor, "b n"]]:
        """Texts as they stand, or `.txt` files with a text a line; of long ones the end is read."""
        texts: list[str] = []
        for given in inputs:
            is_file = len(given) < 1000 and "\n" not in given and given.lower().endswith(".txt")
            texts += self.from_file(Path(given)) if is_file else [given]
        if not texts:
            raise DataError("no input: give texts, or a .txt file with one text a line")
        if self.coder is None:
            from tokenizers import Tokenizer

            self.coder = Tokenizer.from_str(self.meta["tokenizer"])
        longest = self.spec["max_len"]
        rows = [e.ids[-longest:] for e in self.coder.encode_batch(texts, add_special_tokens=False)]
        if short := [text for text, row in zip(texts, rows, strict=True) if not row]:
            raise DataError(f"no token in the text {short[0]!r}")
        ids = torch.full((len(rows), longest), self.spec["pad_id"])
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        self.names, self.rows = texts, rows
        return (ids,)

    def describe(self, output: Float[Tensor, "b n v"]) -> list[dict[str, Any]]:
        """For each text its perplexity (null for a single token), and the likeliest tokens to follow it."""
        described = []
        for name, row, scores in zip(self.names, self.rows, output.float(), strict=True):
            chances = scores[: len(row)].log_softmax(-1)
            top = chances[-1].exp().topk(min(5, chances.shape[1]))
            said: dict[str, Any] = {"input": name, "tokens": len(row), "perplexity": None}
            if len(row) > 1:
                own = chances[:-1].gather(1, torch.tensor(row[1:])[:, None])
                said["perplexity"] = round(_perplexity(-float(own.mean())), 4)
            words = [self.coder.decode([i], skip_special_tokens=False) for i in top.indices.tolist()]
            said["next"] = [[word, round(p, 6)] for word, p in zip(words, top.values.tolist(), strict=True)]
            described.append(said)
        return described

    def figures(self, output: Float[Tensor, "n ..."], target: Int[Tensor, "n ..."], split: Split) -> list[Figure]:
        """How hard the windows were."""
        sums, counts = (output, target) if output.ndim == 2 else self.reduce(output, target)
        plot, axes = new_plot(5.6, 3.2)
        axis = axes[0, 0]
        axis.hist((-sums[:, 0] / counts.clamp(min=1)).numpy(), bins=30)
        axis.set_xlabel("negative log-likelihood of a token (nats)")
        axis.set_ylabel("windows")
        axis.grid(alpha=0.25)
        return [Figure("Windows", to_svg(plot), "Mean over each window of the test text; lower is better foretold.")]


def _perplexity(nll: float) -> float:
    # Beyond this a number says nothing, and its exponential would not be one.
    return math.exp(min(nll, 100.0))
