"""Parts of language models: words in, scores of the next word out, the root-mean-square norm and the gated MLP.

- no mask: in a causal model nothing looks ahead, so padding behind a text is never read by it
- prunable: hidden units of the gated MLP
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gossamer.layers.linear import linear
from gossamer.layers.prune import check_axis, slice_linear


class WordStem(nn.Module):
    """`x_t = drop(W[id_t] + P_t)`; without `P` where positions are the mixers' business.

    Args:
        max_len: longest text in tokens.
        learned: whether there is a table of positions.
    """

    positions: Any

    def __init__(self, vocab_size: int, dim: int, max_len: int, *, learned: bool = True, drop: float = 0.0) -> None:
        super().__init__()
        self.max_len = max_len
        self.words = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.words.weight, std=0.02)
        self.positions = nn.Parameter(nn.init.normal_(torch.empty(1, max_len, dim), std=0.02)) if learned else None
        self.drop = nn.Dropout(drop)

    def forward(self, ids: Int[Tensor, "b n"]) -> tuple[Float[Tensor, "b n c"], None]:
        if ids.shape[1] > self.max_len:
            raise ValueError(f"text is {ids.shape[1]} tokens long, the model takes {self.max_len} (max_len)")
        x = self.words(ids)
        return self.drop(x if self.positions is None else x + self.positions[:, : ids.shape[1]]), None


class WordHead(nn.Module):
    """`y_t = W x_t`, the scores of all words to follow token t.

    Args:
        tied: the stem whose words are this `W` (Press and Wolf 2016, "Using the Output Embedding to Improve Language
            Models"), or None for a `W` of its own.
    """

    def __init__(self, vocab_size: int, dim: int, *, tied: WordStem | None = None) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, vocab_size, bias=False)
        self.tied = tied is not None
        if tied is not None:
            self.fc.weight = tied.words.weight

    def forward(self, x: Float[Tensor, "b n c"], mask: None = None) -> Float[Tensor, "b n v"]:
        return linear(self.fc, x)


class RMSNorm(nn.RMSNorm):
    """`y = w x / sqrt(mean(x^2) + eps)`.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """

    eps: Any

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        if not torch.jit.is_tracing():
            return super().forward(x)
        # Written out, because the tracer that exports has no name for the whole.
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class GatedMlp(nn.Module):
    """`y = W2 (act(Wg x) * W1 x)`; with SiLU it is SwiGLU.

    Source: Shazeer 2020, "GLU Variants Improve Transformer".

    Args:
        dim: channels in and out.
        hidden: channels between.
        act: activation factory of the gate.
        bias: whether the products add one.
    """

    input_products = ("gate", "fc1")

    def __init__(self, dim: int, hidden: int, *, act: Callable[[], nn.Module] = nn.SiLU, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias)
        self.fc1 = nn.Linear(dim, hidden, bias)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim, bias)

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        return linear(self.fc2, self.act(linear(self.gate, x)) * linear(self.fc1, x))

    def widths(self) -> dict[str, int]:
        return {"hidden": self.fc1.out_features}

    def importance(self, axis: str) -> Float[Tensor, " n"]:
        check_axis(self, axis)
        inner = self.gate.weight.detach().norm(dim=1) * self.fc1.weight.detach().norm(dim=1)
        return inner * self.fc2.weight.detach().norm(dim=0)

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        check_axis(self, axis)
        with torch.no_grad():
            slice_linear(self.gate, index, inputs=False)
            slice_linear(self.fc1, index, inputs=False)
            slice_linear(self.fc2, index, inputs=True)
