"""An encoder reads the source, a decoder writes the target while reading what the encoder made of it.

`head(decoder(embed_target(target), encoder(embed_source(source))))`
"""

from typing import Any

from jaxtyping import Shaped
from torch import Tensor, nn


class Seq2Seq(nn.Module):
    """Encoder and decoder.

    Args:
        source: source inputs to encoder tokens.
        encoder: tokens to memory `(b, m, c)`.
        target: target inputs to decoder tokens.
        decoder: `(tokens, memory) -> tokens`.
        head: decoder tokens to answer.
    """

    def __init__(
        self, source: nn.Module, encoder: nn.Module, target: nn.Module, decoder: nn.Module, head: nn.Module
    ) -> None:
        super().__init__()
        self.source = source
        self.encoder = encoder
        self.target = target
        self.decoder = decoder
        self.head = head

    def encode(self, *source: Shaped[Tensor, "b ..."]) -> Any:
        """The encoder's memory of the source."""
        return self.encoder(self.source(*source))

    def decode(self, memory: Any, *target: Shaped[Tensor, "b ..."]) -> Any:
        """The answer for a target prefix, given the memory."""
        return self.head(self.decoder(self.target(*target), memory))
