"""Convolutional tokenisers: an image or a text becomes overlapping tokens instead of cut patches or single words.

Source: Hassani et al. 2021, "Escaping the Big Data Paradigm with Compact Transformers", section 3.3.

- `x <- relu(maxpool(conv(x)))`: the authors pool after the ReLU; both orders give the same numbers and gradients,
  and this one runs the ReLU on a quarter of the map
- without pooling and with stride = kernel it is the plain patch embedding of ViT-Lite and CVT
- a text tokeniser carries the padding mask along: a token is real when its window holds a real word
"""

from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gossamer.layers.conv import Conv, Conv2d, channels_last


class ConvTokenizer(nn.Module):
    """Repeats of convolution, max-pooling 3x3 by stride 2 and ReLU; or one strided convolution alone.

    Args:
        in_chans: image channels.
        dim: token channels.
        kernel: side of the convolutions in pixels.
        convs: number of repeats.
        hidden: channels between repeats.
        pool: False gives one convolution with stride `kernel` and a bias, no pooling and no ReLU.

    Raises:
        ValueError: `convs` is not 1 where `pool` is False, or below 1.
    """

    def __init__(
        self, in_chans: int, dim: int, kernel: int, *, convs: int = 1, hidden: int = 64, pool: bool = True
    ) -> None:
        super().__init__()
        if convs < 1 or (convs > 1 and not pool):
            raise ValueError(f"convs must be 1{' or more' if pool else ' where pool is False'}, got {convs}")
        self.pool = pool
        self.kernel = kernel
        self.stride = max(1, kernel // 2 - 1) if pool else kernel
        self.padding = max(1, kernel // 2) if pool else 0
        widths = [in_chans, *[hidden] * (convs - 1), dim]
        self.convs = nn.ModuleList(
            Conv2d(a, b, kernel, self.stride, self.padding, bias=not pool) for a, b in pairwise(widths)
        )
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            nn.init.kaiming_normal_(conv.weight)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens for an image of `size`."""
        height, width = size
        for _ in self.convs:
            height, width = ((n + 2 * self.padding - self.kernel) // self.stride + 1 for n in (height, width))
            if self.pool:
                height, width = (height - 1) // 2 + 1, (width - 1) // 2 + 1
        return height, width

    def forward(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b h w c"]:
        x = channels_last(image)
        for conv in self.convs:
            x = conv(x)
            if self.pool:
                x = F.relu(F.max_pool2d(x, 3, 2, 1))
        return x.movedim(1, -1)


class TextTokenizer(nn.Module):
    """A convolution over word vectors, then max-pooling 2 by stride 2 and ReLU; or one strided convolution alone.

    Whatever padding follows a text, its real tokens are the same: words that are padding read as zeros, and a text
    is lengthened (to `max_len` at most) until every window that holds its last word exists.

    Args:
        word_dim: channels of a word vector.
        dim: token channels.
        kernel: words in a window.
        max_len: longest text in words.
        pool: False gives stride `kernel`, no pooling and no ReLU.
    """

    def __init__(self, word_dim: int, dim: int, kernel: int, max_len: int, *, pool: bool = True) -> None:
        super().__init__()
        self.pool = pool
        self.kernel = kernel
        self.max_len = max_len
        self.stride = max(1, kernel // 2 - 1) if pool else kernel
        self.padding = max(1, kernel // 2) if pool else 0
        self.conv = Conv(word_dim, dim, kernel, stride=self.stride, padding=self.padding, bias=False, axes=1)
        # Gain and fan as for the authors' two-axis convolution over (words, channels of a word).
        assert isinstance(self.conv, nn.Conv1d)
        nn.init.kaiming_normal_(self.conv.weight)

    def length(self, words: int) -> int:
        """Tokens of a text of `words` words."""
        tokens = (words + 2 * self.padding - self.kernel) // self.stride + 1
        return tokens // 2 + 1 if self.pool else tokens

    def forward(
        self, x: Float[Tensor, "b n e"], mask: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b m c"], Bool[Tensor, "b m"] | None]:
        if mask is not None:
            x = x * mask[..., None].to(x.dtype)
            missing = max(0, min(self.kernel - 1 - self.padding, self.max_len - x.shape[1]))
            if missing:
                x, mask = F.pad(x, (0, 0, 0, missing)), F.pad(mask, (0, missing))
        x = self.conv(x)
        if self.pool:
            x = F.relu(F.max_pool1d(x.movedim(-1, 1), 2, 2, 1)).movedim(1, -1)
        return x, None if mask is None else self._valid(mask)

    def _valid(self, mask: Tensor) -> Tensor:
        seen = F.pad(mask[:, None].float(), (self.padding, self.padding))
        seen = F.max_pool1d(seen, self.kernel, self.stride)
        if self.pool:
            seen = F.max_pool1d(seen, 2, 2, 1)
        return seen[:, 0] > 0
