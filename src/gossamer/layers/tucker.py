"""Convolutions as chains of small ones: Tucker-2, CP, and depth-wise separable.

A kernel `W (o, i, *k)` of S places:

- Tucker-2: `W ~ U_o core U_i^T`, core `(r_o, r_i, *k)`: a convolution of kernel 1 to `r_i` channels, the core's, and
  one of kernel 1 from `r_o`; `i r_i + r_i r_o S + r_o o` multiply-adds a place
- CP: `W ~ sum_r a_r b_r c_r` over outputs, inputs and places: kernel 1 to r channels, depth-wise with the kernel, and
  kernel 1 from there; `r (i + S + o)`. The places stay one axis (Lebedev et al. split them further)
- separable: depth-wise with the kernel, then kernel 1: `i S + i o`, of `i o S` the share `1 / o + 1 / S`. It is the CP
  of rank i in which each component reads one channel; the nearest such is the first singular pair of each `W[:, i]`

Source: Tucker 1966; Kim et al. 2016, "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
Applications" (Tucker-2); Lebedev et al. 2015, "Speeding-up Convolutional Neural Networks Using Fine-tuned
CP-Decomposition"; Howard et al. 2017, "MobileNets".

- Tucker's subspaces are those of the higher-order singular value decomposition: nested, so that the error never rises
  with a rank; CP is found by alternating least squares, doubling its components: each doubling starts from the last
- with all ranks both give the kernel itself
- what channels the first and last part have is what they had; the bias is the last part's
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Rounds of least squares after each doubling of the components, and the ridge they are solved with.
ROUNDS, RIDGE = 25, 1e-9


class TuckerConv(nn.Module):
    """`y = last(core(first(x)))`: kernel 1, the kernel between the ranks, kernel 1.

    Args:
        conv: the convolution whose shape this takes; its weights are not taken.
        rank_in, rank_out: channels in front of and behind the core.

    Raises:
        ValueError: `conv` has groups, or a rank is out of range.
    """

    def __init__(self, conv: nn.Module, rank_in: int, rank_out: int) -> None:
        super().__init__()
        c: Any = conv
        check_conv(conv)
        for name, rank, most in (("rank_in", rank_in, c.in_channels), ("rank_out", rank_out, c.out_channels)):
            if not 1 <= rank <= most:
                raise ValueError(f"{name} must be in 1 … {most}, got {rank}")
        self.rank_in, self.rank_out = rank_in, rank_out
        self.first = type(c)(c.in_channels, rank_in, 1, bias=False)
        self.core = type(c)(rank_in, rank_out, c.kernel_size, bias=False, **_step(c))
        self.last = type(c)(rank_out, c.out_channels, 1, bias=c.bias is not None)

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        return self.last(self.core(self.first(x)))

    def extra_repr(self) -> str:
        return f"rank_in={self.rank_in}, rank_out={self.rank_out}"


class CpConv(nn.Module):
    """`y = last(core(first(x)))`: kernel 1 to `rank` channels, depth-wise, kernel 1.

    Args:
        conv: the convolution whose shape this takes; its weights are not taken.
        rank: channels between; None makes it separable: depth-wise on the channels there are, and no first part.

    Raises:
        ValueError: `conv` has groups, or `rank` is below 1.
    """

    def __init__(self, conv: nn.Module, rank: int | None) -> None:
        super().__init__()
        c: Any = conv
        check_conv(conv)
        if rank is not None and rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.rank = rank
        inner = c.in_channels if rank is None else rank
        self.first = nn.Identity() if rank is None else type(c)(c.in_channels, inner, 1, bias=False)
        self.core = type(c)(inner, inner, c.kernel_size, groups=inner, bias=False, **_step(c))
        self.last = type(c)(inner, c.out_channels, 1, bias=c.bias is not None)

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        return self.last(self.core(self.first(x)))

    def extra_repr(self) -> str:
        return "separable" if self.rank is None else f"rank={self.rank}"


def check_conv(conv: nn.Module) -> None:
    """Raises a ValueError where `conv` is no convolution without groups."""
    c: Any = conv
    if not isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d) or c.groups != 1:
        raise ValueError(f"conv must be a convolution without groups, got {conv}")


def _step(c: Any) -> dict[str, Any]:
    return {"stride": c.stride, "padding": c.padding, "dilation": c.dilation, "padding_mode": c.padding_mode}


def separable_share(conv: nn.Module) -> float:
    """`1 / o + 1 / S`."""
    out, _, places = kernel(conv).shape
    return 1 / out + 1 / places


def kernel(conv: nn.Module) -> Float[Tensor, "o i s"]:
    """The weight with its places as one axis."""
    weight: Any = conv.weight
    return weight.detach().flatten(2)


# --- solving ------------------------------------------------------------------------------------------------------


class Spaces:
    """The principal directions of a kernel's outputs and inputs, and the energy of each.

    Args:
        weight: the kernel, in any precision.
    """

    def __init__(self, weight: Float[Tensor, "o i s"]) -> None:
        self.weight = weight.double()
        self.out, self.out_energy = _principal(self.weight.flatten(1))
        self.inputs, self.in_energy = _principal(self.weight.transpose(0, 1).flatten(1))

    def ranks(self, energy: float) -> tuple[int, int]:
        """The least ranks `(in, out)` whose directions hold that share of the squared weights."""
        return _least(self.in_energy, energy), _least(self.out_energy, energy)

    def factors(self, rank_in: int, rank_out: int) -> tuple[Tensor, Tensor, Tensor]:
        """`(r_in, i)`, core `(r_out, r_in, s)`, `(o, r_out)`."""
        out, inputs = self.out[:, :rank_out], self.inputs[:, :rank_in]
        return inputs.T, torch.einsum("ois,or,iq->rqs", self.weight, out, inputs), out


def _principal(rows: Float[Tensor, "n m"]) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    return vectors.flip(1), values.flip(0).clamp(min=0)


def _least(energy: Float[Tensor, " n"], share: float) -> int:
    held = energy.cumsum(0) / energy.sum().clamp(min=1e-300)
    return min(len(energy), int((held < share - 1e-12).sum()) + 1)


def separable_factors(weight: Float[Tensor, "o i s"]) -> tuple[Float[Tensor, "i s"], Float[Tensor, "o i"]]:
    """Depth-wise kernels and mixing: of each input channel the nearest matrix of rank 1."""
    u, sizes, v = torch.linalg.svd(weight.double().transpose(0, 1), full_matrices=False)
    root = sizes[:, 0].sqrt()
    return v[:, 0] * root[:, None], (u[:, :, 0] * root[:, None]).T


def cp_factors(weight: Float[Tensor, "o i s"], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """`a (o, r)`, `b (i, r)`, `c (s, r)` with `W ~ sum_r a_r b_r c_r`, by alternating least squares.

    From `min(o i, o s, i s)` components on it is exact, and written down.
    """
    w = weight.double()
    sizes = w.shape
    axis = max(range(3), key=lambda i: sizes[i])
    if rank >= prod(sizes) // sizes[axis]:
        return _exact(w, axis, rank)
    factors = [w.new_zeros(size, 0) for size in sizes]
    best, least = factors, float("inf")
    count = 1
    while True:
        count = min(count, rank)
        left = w - torch.einsum("or,ir,sr->ois", *factors)
        factors = [torch.cat(pair, 1) for pair in zip(factors, _start(left, count - factors[0].shape[1]), strict=True)]
        for _ in range(ROUNDS):
            for mode in range(3):
                factors[mode] = _solve(w, factors, mode)
        error = float((w - torch.einsum("or,ir,sr->ois", *factors)).square().sum())
        if error <= least:
            best, least = [f.clone() for f in factors], error
        else:
            # The ridge let it drift: what was found before, and components of zero, are no worse.
            factors = [torch.cat((f, f.new_zeros(len(f), count - f.shape[1])), 1) for f in best]
            best = factors
        if count == rank:
            return best[0], best[1], best[2]
        count *= 2


def _start(left: Tensor, count: int) -> list[Tensor]:
    """Components to begin with: what the inputs' first directions see of what is left, each at rank 1."""
    basis, _ = _principal(left.transpose(0, 1).flatten(1))
    found: list[list[Tensor]] = [[], [], []]
    for i in range(count):
        direction = basis[:, i % basis.shape[1]]
        seen = torch.einsum("ois,i->os", left, direction)
        u, size, v = torch.linalg.svd(seen, full_matrices=False)
        at = (i // basis.shape[1]) % len(size)
        for factor, value in zip(found, (u[:, at] * size[at], direction, v[at]), strict=True):
            factor.append(value)
    return [torch.stack(values, 1) for values in found]


def _solve(w: Tensor, factors: list[Tensor], mode: int) -> Tensor:
    """Least squares for one factor, the others held."""
    names = "ois"
    one, two = (i for i in range(3) if i != mode)
    gram = (factors[one].T @ factors[one]) * (factors[two].T @ factors[two])
    wanted = torch.einsum(f"ois,{names[one]}r,{names[two]}r->{names[mode]}r", w, factors[one], factors[two])
    ridge = RIDGE * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(len(gram), dtype=gram.dtype, device=w.device)
    return torch.linalg.solve(gram + ridge, wanted.T).T


def _exact(w: Tensor, axis: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A component for each pair of places on the two other axes."""
    one, two = (i for i in range(3) if i != axis)
    pairs = torch.cartesian_prod(torch.arange(w.shape[one]), torch.arange(w.shape[two]))
    factors: list[Tensor] = [w.new_zeros(size, rank) for size in w.shape]
    columns = torch.arange(len(pairs))
    factors[axis][:, : len(pairs)] = w.movedim(axis, 0).flatten(1)
    factors[one][pairs[:, 0], columns] = 1.0
    factors[two][pairs[:, 1], columns] = 1.0
    return factors[0], factors[1], factors[2]


@torch.no_grad()
def fill(
    new: TuckerConv | CpConv,
    conv: nn.Module,
    first: Tensor | None,
    core: Tensor,
    last: Tensor,
) -> None:
    """Fills the parts in: `first (r, i)`, `core` in the core's own order, `last (o, r)`; the bias is `conv`'s."""
    parts: Any = new
    if first is not None:
        parts.first.weight.copy_(first.reshape(parts.first.weight.shape))
    parts.core.weight.copy_(core.reshape(parts.core.weight.shape))
    parts.last.weight.copy_(last.reshape(parts.last.weight.shape))
    if parts.last.bias is not None:
        given: Any = conv.bias
        parts.last.bias.copy_(given)
