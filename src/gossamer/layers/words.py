"""Tables of words in two factors: a narrow table and one product that widens its rows.

Source: Lan et al. 2020, "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations", section 3.1.
"""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gossamer.layers.linear import linear


class LowRankWords(nn.Module):
    """`x = U z_id + m`.

    Args:
        vocab_size: rows of the table.
        rank: channels of a row.
        dim: channels of what comes out.
    """

    def __init__(self, vocab_size: int, rank: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, rank)
        self.up = nn.Linear(rank, dim)

    def forward(self, ids: Int[Tensor, "*b"]) -> Float[Tensor, "*b c"]:
        return linear(self.up, self.table(ids))

    @property
    def weight(self) -> Float[Tensor, "v c"]:
        """The whole table, for those who read it as one."""
        return self.up(self.table.weight)


class LowRankWordHead(nn.Module):
    """`y_t = Z U^T x_t + m . x_t`: scores of all words by the table they are read from.

    Args:
        words: the table of the stem.
    """

    def __init__(self, words: LowRankWords) -> None:
        super().__init__()
        self.words = words

    def forward(self, x: Float[Tensor, "b n c"], mask: None = None) -> Float[Tensor, "b n v"]:
        up = self.words.up
        return F.linear(x @ up.weight, self.words.table.weight) + (x @ up.bias)[..., None]
