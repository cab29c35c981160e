"""From an input to tokens: patches, class tokens and positions, words.

A stem returns `(tokens, mask)`; the mask is None where every token is real.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gossamer.layers.conv import Conv2d, channels_last
from gossamer.layers.positions import sinusoid

Positions = Literal["learned", "sinusoid"]


def pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """A side as `(height, width)`."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


class PatchEmbed(nn.Module):
    """A strided convolution turns an image into a map of tokens, normalised if wanted.

    Args:
        in_chans: image channels.
        dim: token channels.
        patch: kernel side in pixels.
        stride: step in pixels, `patch` by default.
        padding: zero rows and columns around the image.
        norm: factory of a norm over `dim` channels, or None.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch: int,
        *,
        stride: int | None = None,
        padding: int = 0,
        norm: Callable[[int], nn.Module] | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.proj = Conv2d(in_chans, dim, patch, stride or patch, padding, bias=bias)
        self.norm = norm(dim) if norm else None

    def forward(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b h w c"]:
        x = self.proj(channels_last(image)).movedim(1, -1)
        return x if self.norm is None else self.norm(x)


class TokenStem(nn.Module):
    """An image as a sequence: patches, learned tokens in front, positions, dropout.

    `x = drop([tokens; flatten(embed(image))] + positions)`

    Args:
        embed: image to map `(b, h, w, dim)`.
        dim: channels.
        grid: rows and columns of the map `embed` gives.
        tokens: learned tokens in front (class, distillation, registers).
        positions: kind of position table, or None.
        position_tokens: whether the table has rows for the learned tokens.
        flat: give a sequence; False keeps the map (then `tokens` must be 0).
    """

    def __init__(
        self,
        embed: nn.Module,
        dim: int,
        grid: tuple[int, int],
        *,
        tokens: int = 1,
        positions: Positions | None = "learned",
        position_tokens: bool = True,
        position_std: float = 0.02,
        drop: float = 0.0,
        flat: bool = True,
    ) -> None:
        super().__init__()
        if tokens and not flat:
            raise ValueError(f"tokens must be 0 where the map is kept, got {tokens}")
        self.embed = embed
        self.grid = grid
        self.flat = flat
        self.position_tokens = position_tokens
        self.tokens = nn.Parameter(torch.zeros(1, tokens, dim)) if tokens else None
        self.positions: nn.Parameter | Tensor | None = None
        rows = grid[0] * grid[1] + (tokens if position_tokens else 0)
        if positions == "learned":
            self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, rows, dim), std=position_std))
        elif positions == "sinusoid":
            del self.positions
            self.register_buffer("positions", sinusoid(rows, dim)[None], persistent=False)
        self.drop = nn.Dropout(drop)

    def forward(self, image: Float[Tensor, "b i height width"]) -> tuple[Float[Tensor, "b *n c"], None]:
        x = self.embed(image)
        if self.positions is not None and tuple(x.shape[1:3]) != tuple(self.grid):
            raise ValueError(
                f"the position table is for a {self.grid[0]}x{self.grid[1]} grid, the image gives "
                f"{x.shape[1]}x{x.shape[2]}; build the model with img_size= of the image"
            )
        if not self.flat:
            if self.positions is not None:
                x = x + self.positions.view(1, *self.grid, -1)
            return self.drop(x), None
        x = x.flatten(1, 2)
        if self.positions is not None and not self.position_tokens:
            x = x + self.positions
        if self.tokens is not None:
            x = torch.cat((self.tokens.expand(x.shape[0], -1, -1), x), 1)
        if self.positions is not None and self.position_tokens:
            x = x + self.positions
        return self.drop(x), None


class TextStem(nn.Module):
    """Words as a sequence: embeddings, a class token if wanted, positions, dropout; padding is masked.

    Args:
        vocab_size: rows of the embedding table.
        dim: channels.
        max_len: longest text in tokens.
        pad_id: the id that stands for no word.
        token: put a learned class token in front.
        norm: factory of a norm on what leaves the stem, or None.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        max_len: int,
        *,
        pad_id: int = 0,
        token: bool = False,
        positions: Positions | None = "learned",
        norm: Callable[[int], nn.Module] | None = None,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.pad_id = pad_id
        self.max_len = max_len
        self.words = nn.Embedding(vocab_size, dim, padding_idx=pad_id)
        nn.init.normal_(self.words.weight, std=0.02)
        with torch.no_grad():
            self.words.weight[pad_id] = 0
        self.token = nn.Parameter(torch.zeros(1, 1, dim)) if token else None
        self.positions: nn.Parameter | Tensor | None = None
        rows = max_len + bool(token)
        if positions == "learned":
            self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, rows, dim), std=0.02))
        elif positions == "sinusoid":
            del self.positions
            self.register_buffer("positions", sinusoid(rows, dim)[None], persistent=False)
        self.norm = norm(dim) if norm else None
        self.drop = nn.Dropout(drop)

    def forward(self, ids: Int[Tensor, "b n"]) -> tuple[Float[Tensor, "b t c"], Bool[Tensor, "b t"]]:
        if ids.shape[1] > self.max_len:
            raise ValueError(f"text is {ids.shape[1]} tokens long, the model takes {self.max_len} (max_len)")
        x, mask = self.words(ids), ids != self.pad_id
        if self.token is not None:
            x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1)
            mask = torch.cat((torch.ones_like(mask[:, :1]), mask), 1)
        if self.positions is not None:
            x = x + self.positions[:, : x.shape[1]]
        return self.drop(x if self.norm is None else self.norm(x)), mask
