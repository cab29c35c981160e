"""Products of low rank: two thin ones in the place of a wide one.

`y = B (A x) + b`, `A (r, in)`, `B (out, r)`: `r (in + out)` multiply-adds a token in place of `in * out`. A convolution
becomes one to `r` channels, with the kernel and step of the original, and one of kernel 1 behind it.

Source: Cahyawijaya 2021, "Greenformers", the LED and CED units.

- `break_even` is the rank at which both forms cost the same
- a grouped convolution stays grouped in both halves, `r / groups` channels each
- `best_factors` are the best for the outputs: of all weights of rank r, those nearest to `W` (Eckart and Young 1936),
  or nearest on inputs of known second moments
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers.linear import linear


class LowRankLinear(nn.Module):
    """`y = B (A x) + b`.

    Args:
        in_features, out_features: channels in and out.
        rank: channels between.

    Raises:
        ValueError: `rank` is below 1.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool = True) -> None:
        super().__init__()
        _check_rank(rank)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        return linear(self.up, linear(self.down, x))

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """The one matrix this is: `B A`."""
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> Float[Tensor, " o"] | None:
        return self.up.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"


class LowRankConv(nn.Module):
    """`y = up(down(x))`: a convolution to `rank` channels, and one of kernel 1 from there.

    Args:
        conv: the convolution whose shape this takes: of PyTorch, channels first, or of `gossamer.layers`, channels
            last. Its weights are not taken.
        rank: channels between, a multiple of the groups.

    Raises:
        ValueError: `rank` is below 1 or no multiple of the groups.
    """

    def __init__(self, conv: nn.Module, rank: int) -> None:
        super().__init__()
        _check_rank(rank)
        c: Any = conv
        if rank % c.groups:
            raise ValueError(f"rank must be a multiple of the {c.groups} groups, got {rank}")
        self.rank = rank
        step = {"stride": c.stride, "padding": c.padding, "dilation": c.dilation, "padding_mode": c.padding_mode}
        self.down = type(c)(c.in_channels, rank, c.kernel_size, groups=c.groups, bias=False, **step)
        self.up = type(c)(rank, c.out_channels, 1, groups=c.groups, bias=c.bias is not None)

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        return self.up(self.down(x))

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


def low_rank(layer: nn.Module, rank: int) -> LowRankLinear | LowRankConv:
    """An untrained module of that rank for the place of `layer`, on its device and of its type.

    Raises:
        ValueError: `layer` is neither a linear layer nor a convolution, or the rank does not fit it.
    """
    new: LowRankLinear | LowRankConv
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        new = LowRankConv(layer, rank)
    elif isinstance(layer, nn.Linear):
        new = LowRankLinear(layer.in_features, layer.out_features, rank, bias=layer.bias is not None)
    elif is_turned(layer):
        _, out, inputs = matrices(layer).shape
        new = LowRankLinear(inputs, out, rank)
    else:
        raise ValueError(f"layer must be linear or a convolution, got {type(layer).__name__}")
    given: Any = layer.weight
    return new.to(device=given.device, dtype=given.dtype)


def is_turned(layer: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2 in transformers, whose weight is `(in, out)`."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"


def groups_of(layer: nn.Module) -> int:
    """Groups of a convolution, 1 for a linear layer."""
    return int(getattr(layer, "groups", 1))


def matrices(layer: nn.Module) -> Float[Tensor, "g o i"]:
    """The weight as one matrix a group, whose columns are all the numbers a place of the output is made from."""
    weight: Any = layer.weight
    weight = weight.detach()
    if is_turned(layer):
        return weight.t()[None]
    return weight.flatten(1).unflatten(0, (groups_of(layer), -1))


def break_even(layer: nn.Module) -> float:
    """The rank at which two thin products cost as much as the one."""
    groups, out, inputs = matrices(layer).shape
    return groups * out * inputs / (out + inputs)


@torch.no_grad()
def set_factors(
    new: LowRankLinear | LowRankConv,
    down: Float[Tensor, "g r i"],
    up: Float[Tensor, "g o r"],
    bias: Float[Tensor, " o"] | None,
) -> None:
    """Fills in the two thin weights, given a group each, and the bias."""
    first: Any = new.down.weight
    second: Any = new.up.weight
    first.copy_(down.flatten(0, 1).reshape(first.shape))
    second.copy_(up.flatten(0, 1).reshape(second.shape))
    if bias is not None:
        own: Any = new.up.bias
        own.copy_(bias)


def best_factors(
    weight: Float[Tensor, "o i"],
    *,
    inputs: Float[Tensor, "i i"] | None = None,
    outputs: Float[Tensor, "o o"] | None = None,
) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"], Float[Tensor, " r"]]:
    """All factors of `W = up down`, the most useful first, and what each adds to the squared size of the outputs.

    `up` are the principal directions of the outputs, orthonormal, and `down = up^T W`; the first r of both give the
    least mean squared error of the outputs. With no moments given the inputs count as white: then it is the singular
    value decomposition, the singular values with `down`.

    Args:
        inputs: second moments of the inputs, `E[x x^T]`.
        outputs: second moments of the outputs; one of the two is enough.
    """
    w = weight.double()
    if outputs is not None:
        energy, directions = _leading(outputs.double())
        count = min(w.shape)
        return _factors(w, directions[:, :count], energy[:count])
    if inputs is None and w.shape[0] < w.shape[1]:
        energy, directions = _leading(w @ w.T)
        return _factors(w, directions, energy)
    seen = w
    if inputs is not None:
        moments, basis = _leading(inputs.double())
        seen = w @ (basis * moments.sqrt())
    energy, directions = _leading(seen.T @ seen)
    # The outputs' directions are those of `seen @ directions`; QR makes them orthonormal to rounding.
    up, _ = torch.linalg.qr(seen @ directions)
    return _factors(w, up, energy[: up.shape[1]])


def _factors(w: Tensor, up: Tensor, energy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return up.T @ w, up, energy


def _leading(moments: Float[Tensor, "n n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """Eigenvalues of a symmetric matrix, largest first and not negative, and its eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(moments)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def semi_nonnegative(
    weight: Float[Tensor, "o i"], start: Float[Tensor, "o r"], iterations: int
) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
    """`W ~ G F^T` with `G >= 0` from `start` on: least squares for `F` and multiplicative steps for `G`, by turns.

    `F = W^T G (G^T G)^-1`, `G <- G sqrt(([W F]+ + G [F^T F]-) / ([W F]- + G [F^T F]+))`

    Source: Ding et al. 2010, "Convex and Semi-Nonnegative Matrix Factorizations", section 3.
    """
    w, g = weight.double(), start.double()
    for _ in range(iterations):
        f = _least_squares(w, g)
        wf, ff = w @ f, f.T @ f
        g = g * ((wf.clamp(min=0) + g @ (-ff).clamp(min=0)) / (_above(wf, g, ff))).sqrt()
    return _least_squares(w, g).T, g


def _above(wf: Tensor, g: Tensor, ff: Tensor) -> Tensor:
    return ((-wf).clamp(min=0) + g @ ff.clamp(min=0)).clamp(min=1e-12)


def _least_squares(w: Tensor, g: Tensor) -> Tensor:
    return w.T @ g @ torch.linalg.pinv(g.T @ g, hermitian=True)


def nonnegative(
    weight: Float[Tensor, "o i"], start: Float[Tensor, "o r"], other: Float[Tensor, "r i"], iterations: int
) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
    """`W ~ G H`, nothing negative anywhere, by multiplicative steps from `start` and `other` on.

    Source: Lee and Seung 2000, "Algorithms for Non-negative Matrix Factorization".

    Raises:
        ValueError: an entry of `weight` is negative.
    """
    if weight.min() < 0:
        raise ValueError(f"weight must have no negative entry for solver 'nmf', the least is {float(weight.min()):.3g}")
    w, g, h = weight.double(), start.double(), other.double()
    for _ in range(iterations):
        h = h * (g.T @ w) / (g.T @ g @ h).clamp(min=1e-12)
        g = g * (w @ h.T) / (g @ h @ h.T).clamp(min=1e-12)
    return h, g


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
