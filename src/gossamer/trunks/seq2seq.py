"""An encoder reads the source, a decoder writes the target while reading what the encoder made of it.

`head(decoder(target(…), encoder(source(…))))`

- `Forecaster` is the form for time series: the decoder starts from the last known steps and writes the whole horizon
  in one pass
- what passes between decoder blocks may be one stream of tokens or several (Autoformer: season and trend)
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn


class Encoder(nn.Module):
    """`norm(block_L(… merge_1(block_1(x))))`.

    Args:
        blocks: tokens to tokens.
        merges: what stands after each block but the last, or nothing.
        norm: on the tokens after the last block, or None.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], *, merges: Sequence[nn.Module] = (), norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        if merges and len(merges) != len(blocks) - 1:
            raise ValueError(f"merges must be one fewer than blocks; got {len(merges)} for {len(blocks)} blocks")
        self.blocks = nn.ModuleList(blocks)
        self.merges = nn.ModuleList(merges)
        self.norm = norm

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b m c"]:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i < len(self.merges):
                x = self.merges[i](x)
        return x if self.norm is None else self.norm(x)


class Decoder(nn.Module):
    """`norm(block_L(… block_1(x, memory) …, memory))`."""

    def __init__(self, blocks: Sequence[nn.Module], *, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def forward(self, x: Any, memory: Float[Tensor, "b m c"]) -> Any:
        for block in self.blocks:
            x = block(x, memory)
        return x if self.norm is None else self.norm(x)


class DecoderBlock(nn.Module):
    """`x = norm1(x + mixer(x))`, `x = norm2(x + cross(x, memory))`, `x = norm3(x + mlp(x))` (Vaswani et al. 2017).

    Args:
        dim: channels.
        mixer: token mixer of the target.
        cross: token mixer that reads the memory as its context.
        mlp: channel mixer.
        norm: factory of a norm over `dim` channels.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        cross: nn.Module,
        mlp: nn.Module,
        *,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.mixer = mixer
        self.cross = cross
        self.mlp = mlp
        self.norm1, self.norm2, self.norm3 = norm(dim), norm(dim), norm(dim)

    def forward(self, x: Float[Tensor, "b n c"], memory: Float[Tensor, "b m c"]) -> Float[Tensor, "b n c"]:
        x = self.norm1(x + self.mixer(x))
        x = self.norm2(x + self.cross(x, context=memory))
        return self.norm3(x + self.mlp(x))


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

    def decode(self, memory: Any, *target: Any) -> Any:
        """The answer for a target, or a target prefix, given the memory."""
        return self.head(self.decoder(self.target(*target), memory))


class Forecaster(Seq2Seq):
    """Forecasts `pred_len` steps from `seq_len` known ones in one pass.

    Args:
        start: the known series to what the decoder starts from: `label_len` known steps and `pred_len` empty ones.
        seq_len: steps the encoder reads.
        label_len: known steps the decoder starts with.
        pred_len: steps to forecast.

    Raises:
        ValueError: `label_len` is not in 0..seq_len, or a length is below 1.
    """

    def __init__(
        self,
        source: nn.Module,
        encoder: nn.Module,
        target: nn.Module,
        decoder: nn.Module,
        head: nn.Module,
        *,
        start: nn.Module,
        seq_len: int,
        label_len: int,
        pred_len: int,
    ) -> None:
        super().__init__(source, encoder, target, decoder, head)
        self.start = start
        self.seq_len = seq_len
        self.label_len = label_len
        self.pred_len = pred_len

    def forward(self, x: Float[Tensor, "b n c"], marks: Float[Tensor, "b m f"]) -> Float[Tensor, "b t c"]:
        """The forecast.

        Args:
            x: `seq_len` known steps.
            marks: calendar features of those and of the `pred_len` steps to come.

        Raises:
            ValueError: `x` or `marks` has another number of steps.
        """
        n = self.seq_len
        if x.shape[1] != n or marks.shape[1] != n + self.pred_len:
            raise ValueError(
                f"x must have {n} steps and marks {n + self.pred_len} (seq_len + pred_len); "
                f"got {x.shape[1]} and {marks.shape[1]}"
            )
        return self.forecast(x, marks[:, :n], self.start(x), marks[:, n - self.label_len :])

    def forecast(
        self, x: Float[Tensor, "b n c"], marks: Float[Tensor, "b n f"], start: Any, start_marks: Float[Tensor, "b m f"]
    ) -> Float[Tensor, "b t c"]:
        """The forecast from an explicit decoder start, the form of the official code."""
        return self.decode(self.encode(x, marks), start, start_marks)


def check_lengths(seq_len: int, label_len: int | None, pred_len: int) -> int:
    """`label_len`, half of `seq_len` where it is None.

    Raises:
        ValueError: `label_len` is not in 0..seq_len, or another length is below 1.
    """
    label_len = seq_len // 2 if label_len is None else label_len
    if seq_len < 1 or pred_len < 1:
        raise ValueError(f"seq_len and pred_len must be at least 1; got {seq_len} and {pred_len}")
    if not 0 <= label_len <= seq_len:
        raise ValueError(f"label_len must be in 0..{seq_len} (seq_len); got {label_len}")
    return label_len


def fuse_projections(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of separate query, key and value products as rows of one, and 1x1 convolutions as linear maps."""
    fused = {}
    for key, value in state.items():
        if ".query." in key:
            parts = [state[key.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
            fused[key.replace(".query.", ".qkv.")] = torch.cat(parts)
        elif ".fc" in key and value.ndim == 3:
            fused[key] = value[..., 0]
        elif ".key." not in key and ".value." not in key:
            fused[key] = value
    return fused
