"""Hashed linear attention: queries and keys become the same short binary code, so that large products only add.

Source: Liu et al. 2022, "EcoFormer: Energy-Saving Attention with Linear Complexity", section 4.

- one projection is query and key. Its codes come from a kernel against a few anchors and one sign a bit; the inner
  product of two codes is `bits - 2 Hamming distance`, which a constant makes positive
- the hash is trained by itself, without labels: bit by bit, so that codes agree where attention is strongest and
  disagree where it is weakest. This happens in the first training step that meets untrained anchors; `retrain()` asks
  for it again (the authors do so once, before a fine-tuning of 30 epochs)
- of patches of photographs its codes find the strongest pairs better than as many random hyperplanes; of tokens that
  fall into clear groups, hyperplanes find them as well
- gradients pass the sign as if it were the identity inside (-1, 1)
- `bias="paper"` adds the constant to every pair, so that rows are convex combinations; `bias="official"` is the
  authors' code, whose numerator adds it to the token's own value alone, and which released weights expect
- any number of grid axes: the mechanism knows no order
- prunable: heads
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gossamer.layers.linear import linear
from gossamer.layers.prune import check_axis, expand_heads, slice_linear
from gossamer.mixers.base import Mixer, register_mixer
from gossamer.ops.attention import join_heads, split_heads

Bias = Literal["paper", "official"]

ROUNDS, RATE, MOMENTUM = 100, 5e-4, 0.9


@register_mixer("hashed_linear", grids=(1, 2, 3))
class HashedLinear(Mixer):
    """`y_i = W_o sum_j phi_ij v_j / sum_j phi_ij`, `phi_ij = H(x_i) . H(x_j) + bits + 1`.

    `H(x) = sign(A (kappa(x) - mu))`, `kappa_m(x) = exp(-|x - a_m|^2 / 2 sigma)` of the normalised projection `x`, `a_m`
    the anchors, `sigma` the mean squared distance of a sample's tokens to them.

    Args:
        dim: channels.
        heads: attention heads.
        bits: length of the code.
        anchors: tokens that others are compared with.
        top: how many of the strongest and of the weakest pairs of each token train the hash.
        samples: samples of a batch that train the hash, None for all.
        bias: see the head of this file.

    Raises:
        ValueError: `heads` does not divide `dim`, or `bits`, `anchors` or `top` is below 1.
    """

    weights: Tensor
    means: Tensor
    anchors: Tensor

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        bits: int = 16,
        anchors: int = 25,
        top: int = 10,
        samples: int | None = None,
        bias: Bias = "paper",
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim)
        if dim % heads:
            raise ValueError(f"heads must divide dim; got heads={heads}, dim={dim}")
        if min(bits, anchors, top) < 1:
            raise ValueError(f"bits, anchors and top must be at least 1, got {bits}, {anchors} and {top}")
        self.heads = heads
        self.head_dim = dim // heads
        self.bits = bits
        self.top = top
        self.samples = samples
        self.bias = bias
        self.qk = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.register_buffer("weights", torch.randn(heads, bits, anchors))
        self.register_buffer("means", torch.zeros(1, heads, 1, anchors))
        self.register_buffer("anchors", torch.zeros(1, heads, anchors, self.head_dim))
        self._trained = False

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        flat = x.flatten(1, -2)
        qk = F.normalize(split_heads(linear(self.qk, flat), self.heads), dim=-1)
        if self.training and not self.trained():
            self.train_hash(qk.detach()[: self.samples])
        v = split_heads(linear(self.v, flat), self.heads)
        y = code_attention(self.codes(qk), v, own=self.bias == "official")
        return linear(self.proj, join_heads(y)).view(x.shape)

    def codes(self, qk: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n bits"]:
        """`H` of normalised tokens, of -1 and 1."""
        return sign((_kernel(qk, self.anchors) - self.means) @ self.weights.transpose(-2, -1))

    def trained(self) -> bool:
        """Whether there are anchors, trained or loaded."""
        self._trained = self._trained or bool(self.anchors.any())
        return self._trained

    def retrain(self) -> None:
        """Has the next training step train the hash again, from the weights it has."""
        self.anchors.zero_()
        self._trained = False

    @torch.no_grad()
    def train_hash(
        self, qk: Float[Tensor, "b h n d"], anchors: Float[Tensor, "1 h m d"] | None = None
    ) -> list[tuple[float, float]]:
        """Finds anchors and bits, so that codes agree with the strongest and weakest pairs of the tokens.

        `S_ij = bits` for the `top` largest `x_i . x_j` of a row, `-bits` for the smallest, 0 between. Bit after bit
        maximises `y^T S y` by gradient, `y = 2 sigmoid(K a) - 1`, keeps the result if the signs do better than before,
        and leaves `S - y y^T` to those that follow.

        Args:
            qk: normalised tokens.
            anchors: anchors to take; random tokens of the first sample otherwise.

        Returns:
            For each bit, `-y^T S y / (n bits)` of its signs before and after.

        Raises:
            ValueError: there are fewer tokens than anchors, or than twice `top`.
        """
        n, count = qk.shape[2], self.anchors.shape[2]
        if count > n or 2 * self.top > n:
            raise ValueError(f"anchors and 2 * top must be at most {n} (tokens), got {count} and {2 * self.top}")
        pairs = qk @ qk.transpose(-2, -1)
        target = torch.zeros_like(pairs)
        target.scatter_(-1, pairs.topk(self.top).indices, float(self.bits))
        target.scatter_(-1, pairs.topk(self.top, largest=False).indices, -float(self.bits))
        if anchors is None:
            anchors = qk[:1, :, torch.randperm(n, device=qk.device)[:count]]
        self.anchors.copy_(anchors)
        kernel = _kernel(qk, self.anchors)
        self.means.copy_(kernel.mean((0, 2), keepdim=True))
        kernel = kernel - self.means
        report = []
        for bit in range(self.bits):
            old = self.weights[:, bit].to(kernel)
            new = _ascend(kernel, target + target.transpose(-2, -1), old, self.bits)
            before, after = (_signs(kernel, a) for a in (old, new))
            losses = [-_agreement(y, target) / (n * self.bits) for y in (before, after)]
            report.append((losses[0], min(losses)))
            y = before
            if losses[1] < losses[0]:
                self.weights[:, bit] = new
                y = after
            target -= y[..., None] * y[..., None, :]
        self._trained = True
        return report

    def operations(self, tokens: int) -> tuple[int, int]:
        """Multiplications and additions of one sample's attention, its three linear layers apart."""
        h, d, m, bits = self.heads, self.head_dim, self.anchors.shape[2], self.bits
        multiplications = 2 * m + m * bits + bits + 1 + d
        additions = 2 * m * d + m * bits + 2 * bits + 2 * bits * d + d
        return h * tokens * multiplications, h * tokens * additions

    def widths(self) -> dict[str, int]:
        return {"heads": self.heads}

    def importance(self, axis: str) -> Float[Tensor, " h"]:
        check_axis(self, axis)
        values = self.v.weight.detach().view(self.heads, -1).norm(dim=1)
        return values * self.proj.weight.detach().view(-1, self.heads, self.head_dim).norm(dim=(0, 2))

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        check_axis(self, axis)
        channels = expand_heads(index, self.head_dim)
        slice_linear(self.qk, channels, inputs=False)
        slice_linear(self.v, channels, inputs=False)
        slice_linear(self.proj, channels, inputs=True)
        self.weights = self.weights[index]
        self.means, self.anchors = self.means[:, index], self.anchors[:, index]
        self.heads = len(index)


def code_attention(
    codes: Float[Tensor, "b h n bits"], v: Float[Tensor, "b h n d"], *, own: bool = False
) -> Float[Tensor, "b h n d"]:
    """`y_i = sum_j phi_ij v_j / sum_j phi_ij`, `phi_ij = c_i . c_j + bits + 1`, in time linear in n.

    Args:
        own: the authors' code: the constant multiplies the token's own value in place of the sum of all.
    """
    n, constant = codes.shape[2], codes.shape[3] + 1
    bias = v if own else v.sum(2, keepdim=True)
    total = codes @ codes.sum(2)[..., None] + n * constant
    return (codes @ (codes.transpose(-2, -1) @ v) + constant * bias) / total


def sign(x: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """The sign, whose gradient is that of the identity inside (-1, 1) and 0 outside."""
    if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
        return _Sign.apply(x)
    return x.sign()


class _Sign(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return dy * (x.abs() < 1)


def _kernel(x: Tensor, anchors: Tensor) -> Float[Tensor, "b h n m"]:
    squares = (
        x.square().sum(-1, keepdim=True) + anchors.square().sum(-1)[..., None, :] - 2 * x @ anchors.transpose(-2, -1)
    )
    return (squares / (-2 * squares.mean((2, 3), keepdim=True))).exp()


def _signs(kernel: Tensor, a: Tensor) -> Float[Tensor, "b h n"]:
    return torch.where(_apply(kernel, a) > 0, 1.0, -1.0).to(kernel)


def _apply(kernel: Tensor, a: Tensor) -> Float[Tensor, "b h n"]:
    return (kernel @ a[..., None])[..., 0]


def _agreement(y: Tensor, target: Tensor) -> float:
    return float((y * (target @ y[..., None])[..., 0]).sum(-1).mean())


def _ascend(kernel: Tensor, both: Tensor, a: Tensor, bits: int) -> Float[Tensor, "h m"]:
    """Gradient ascent on the mean of `y^T S y / (n bits)` with Nesterov momentum; `both = S + S^T`."""
    speed = torch.zeros_like(a)
    size = kernel.shape[0] * kernel.shape[1] * kernel.shape[2] * bits
    for _ in range(ROUNDS):
        y = 2 * torch.sigmoid(_apply(kernel, a)) - 1
        slope = (both @ y[..., None])[..., 0] * (1 - y.square()) / 2
        gradient = (kernel.transpose(-2, -1) @ slope[..., None])[..., 0].sum(0) / size
        speed = MOMENTUM * speed + gradient
        a = a + RATE * (gradient + MOMENTUM * speed)
    return a
