"""The inverted residual: wide inside, narrow between, mixed by a depth-wise convolution.

Source: Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", section 3.
"""

from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers.conv import ConvNorm


class InvertedResidual(nn.Module):
    """`y = norm(W2 relu6(norm(D relu6(norm(W1 x)))))`, plus x where shapes allow; D depth-wise 3x3.

    Args:
        dim: channels in.
        out: channels out.
        ratio: inner width relative to `dim`; with 1 there is no W1.
        stride: of D.
    """

    def __init__(self, dim: int, out: int, *, ratio: int = 6, stride: int = 1) -> None:
        super().__init__()
        hidden = dim * ratio
        self.expand = ConvNorm(dim, hidden, 1, bias=False, act=nn.ReLU6) if ratio != 1 else None
        self.depthwise = ConvNorm(hidden, hidden, 3, stride=stride, groups=hidden, bias=False, act=nn.ReLU6)
        self.project = ConvNorm(hidden, out, 1, bias=False)
        self.residual = stride == 1 and dim == out

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j o"]:
        y = self.project(self.depthwise(x if self.expand is None else self.expand(x)))
        return x + y if self.residual else y
