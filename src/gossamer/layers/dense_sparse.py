"""A matrix as sparse coefficients over small dense bases: each row mixes a few vectors, other rows mix others.

`y = W x + b`, the inputs in G groups of q channels, `W_g (out, q) = S_g D_g`, `D_g (k, q)` dense, `S_g (out, k)` with s
numbers in every row. Low rank is the special case s = k of one group.

Source: Chand et al. 2023, "DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight Factorization".

- stored are the bases, the numbers of S and which of the k each belongs to, in as many bits as that takes
- computed as `S (D x)` with S written out: `G k (q + out)` multiply-adds a token, whatever s is. Fewer would take a
  sparse kernel
- `StraightThroughLinear` is the form it learns in: all of S is there, each row's s largest are used, and all get the
  gradient, so that others may come in
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn


class DenseSparseLinear(nn.Module):
    """`y = sum_g S_g D_g x_g + b`, S stored as values and places.

    Args:
        in_features, out_features: channels in and out; inputs are filled up with zeros to whole groups.
        group: input channels of a group (q).
        basis: vectors of a basis (k).
        nonzeros: numbers in a row of S (s).

    Raises:
        ValueError: `group` is above `in_features`, `basis` below 1, or `nonzeros` not in 1 … `basis`.
    """

    columns: Tensor

    def __init__(
        self, in_features: int, out_features: int, *, group: int, basis: int, nonzeros: int, bias: bool = True
    ) -> None:
        super().__init__()
        check_sizes(in_features, group, basis, nonzeros)
        self.in_features = in_features
        self.out_features = out_features
        self.nonzeros = nonzeros
        groups = -(-in_features // group)
        self.basis = nn.Parameter(torch.randn(groups, basis, group) / group**0.5)
        self.values = nn.Parameter(torch.randn(groups, out_features, nonzeros) / (groups * nonzeros) ** 0.5)
        places = torch.arange(nonzeros, dtype=torch.int16).expand(groups, out_features, nonzeros)
        self.register_buffer("columns", places.clone(), persistent=False)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        return _apply(x, self.basis, self.coefficients(), self.bias)

    def coefficients(self) -> Float[Tensor, "g o k"]:
        """S with its zeros."""
        groups, basis, _ = self.basis.shape
        empty = self.values.new_zeros(groups, self.out_features, basis)
        return empty.scatter(2, self.columns.long(), self.values)

    def to_dense(self) -> Float[Tensor, "o i"]:
        """The matrix this is."""
        return _dense(self.basis, self.coefficients(), self.in_features)

    def stored_bits(self) -> int:
        """Bits of bases, values and places."""
        groups, basis, group = self.basis.shape
        return groups * stored_bits(self.out_features, group, basis, self.nonzeros)

    @torch.no_grad()
    def set_factors(self, basis: Float[Tensor, "g k q"], coefficients: Float[Tensor, "g o k"]) -> None:
        """Takes over the bases, and the `nonzeros` largest coefficients of each row."""
        columns = largest(coefficients, self.nonzeros).sort(-1).values
        self.basis.copy_(basis)
        self.values.copy_(coefficients.gather(2, columns))
        self.columns.copy_(columns)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "index"] = pack_bits(self.columns.flatten(), index_bits(self.basis.shape[1]))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        packed = state_dict.pop(prefix + "index", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        missing, errors = rest[2], rest[4]
        if packed is None:
            missing.append(prefix + "index")
            return
        bits = index_bits(self.basis.shape[1])
        if packed.shape != (packed_bytes(self.columns.numel(), bits),):
            errors.append(f"{prefix}index holds {tuple(packed.shape)} bytes, not those of {self.extra_repr()}")
            return
        self.columns.copy_(unpack_bits(packed, bits, self.columns.numel()).view_as(self.columns))

    def extra_repr(self) -> str:
        groups, basis, group = self.basis.shape
        sizes = f"groups={groups}, group={group}, basis={basis}, nonzeros={self.nonzeros}"
        return f"{self.in_features}, {self.out_features}, {sizes}"


class StraightThroughLinear(nn.Module):
    """`y = sum_g top_s(Z_g) D_g x_g + b` with `dL/dZ := dL/dtop_s(Z)`.

    Args:
        in_features: channels in.
        basis, coefficients: where training starts: D, and Z, of which each row's `nonzeros` largest are used.
        nonzeros: numbers in a row that are used.
        bias: of the layer this stands for.
    """

    def __init__(
        self,
        in_features: int,
        basis: Float[Tensor, "g k q"],
        coefficients: Float[Tensor, "g o k"],
        nonzeros: int,
        bias: nn.Parameter | None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = coefficients.shape[1]
        self.nonzeros = nonzeros
        self.basis = nn.Parameter(basis.clone())
        self.latent = nn.Parameter(coefficients.clone())
        self.bias = bias

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        return _apply(x, self.basis, self.coefficients(), self.bias)

    def coefficients(self) -> Float[Tensor, "g o k"]:
        """`top_s(Z)`, with the gradient of the identity."""
        chosen = torch.zeros_like(self.latent).scatter(2, largest(self.latent, self.nonzeros), 1.0)
        return self.latent + (self.latent * chosen - self.latent).detach()

    def stored(self) -> DenseSparseLinear:
        """The form that is kept."""
        _, basis, group = self.basis.shape
        sizes = {"group": group, "basis": basis, "nonzeros": self.nonzeros}
        new = DenseSparseLinear(self.in_features, self.out_features, bias=self.bias is not None, **sizes)
        new.to(self.basis)
        new.set_factors(self.basis.detach(), self.latent.detach())
        new.bias = self.bias
        return new.train(self.training)


def _apply(x: Tensor, basis: Tensor, coefficients: Tensor, bias: Tensor | None) -> Tensor:
    groups, _, group = basis.shape
    rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
    if groups * group > x.shape[-1]:
        rows = F.pad(rows, (0, groups * group - x.shape[-1]))
    mixed = rows.unflatten(1, (groups, group)).transpose(0, 1) @ basis.transpose(1, 2)
    y = F.linear(mixed.transpose(0, 1).flatten(1), coefficients.transpose(0, 1).flatten(1), bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def _dense(basis: Tensor, coefficients: Tensor, in_features: int) -> Tensor:
    return (coefficients @ basis).transpose(0, 1).flatten(1)[:, :in_features]


def largest(coefficients: Float[Tensor, "g o k"], count: int) -> Int[Tensor, "g o s"]:
    """Which `count` of each row are largest in size."""
    return coefficients.detach().abs().topk(count, dim=-1).indices


def check_sizes(in_features: int, group: int, basis: int, nonzeros: int) -> None:
    """Raises a ValueError that names the size that does not fit."""
    if not 1 <= group <= in_features:
        raise ValueError(f"group must be in 1 … {in_features} (in_features), got {group}")
    if basis < 1:
        raise ValueError(f"basis must be at least 1, got {basis}")
    if not 1 <= nonzeros <= basis:
        raise ValueError(f"nonzeros must be in 1 … {basis} (basis), got {nonzeros}")


# --- storage ------------------------------------------------------------------------------------------------------


def index_bits(basis: int) -> int:
    """Bits that tell `basis` places apart."""
    return max(1, math.ceil(math.log2(basis)))


def stored_bits(out: int, group: int, basis: int, nonzeros: int) -> int:
    """Bits of one group: `32 k q` of the basis, and `32 + ceil(log2 k)` for each number of S."""
    return 32 * basis * group + out * nonzeros * (32 + index_bits(basis))


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` numbers of `bits` bits."""
    return -(-count * bits // 8)


def pack_bits(numbers: Int[Tensor, " n"], bits: int) -> UInt8[Tensor, " m"]:
    """Numbers below `2^bits`, one behind the other without gaps, lowest bit first."""
    places = torch.arange(bits, device=numbers.device)
    stream = ((numbers.long()[:, None] >> places) & 1).flatten()
    stream = F.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
    return (stream << torch.arange(8, device=numbers.device)).sum(1).to(torch.uint8)


def unpack_bits(packed: UInt8[Tensor, " m"], bits: int, count: int) -> Int[Tensor, " n"]:
    """The `count` numbers that `pack_bits` packed."""
    stream = ((packed.long()[:, None] >> torch.arange(8, device=packed.device)) & 1).flatten()[: count * bits]
    return (stream.view(count, bits) << torch.arange(bits, device=packed.device)).sum(1)


# --- solving ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def solve(
    weight: Float[Tensor, "o i"],
    *,
    group: int,
    basis: int,
    nonzeros: int,
    rounds: int = 10,
    seed: int = 0,
    end: float = math.inf,
) -> tuple[Float[Tensor, "g k q"], Float[Tensor, "g o k"]]:
    """Bases and coefficients whose product is near `weight`, each group by itself.

    `nonzeros = basis` has a closed form, the singular value decomposition. Else by turns S is found by orthogonal
    matching pursuit and D by least squares, from `basis` random rows on; the best pair seen is kept.

    Args:
        rounds: turns.
        end: value of `time.perf_counter` after which no further round begins.

    Raises:
        ValueError: a size does not fit.
    """
    check_sizes(weight.shape[1], group, basis, nonzeros)
    generator = torch.Generator().manual_seed(seed)
    padded = F.pad(weight.detach().float(), (0, -weight.shape[1] % group))
    solved = []
    for part in padded.split(group, 1):
        if nonzeros == basis:
            solved.append(_low_rank(part, basis))
        else:
            solved.append(_alternate(part, basis, nonzeros, rounds, generator, end))
    bases, coefficients = zip(*solved, strict=True)
    return torch.stack(bases).to(weight), torch.stack(coefficients).to(weight)


def _low_rank(w: Tensor, basis: int) -> tuple[Tensor, Tensor]:
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    coefficients = w.new_zeros(w.shape[0], basis)
    vectors = w.new_zeros(basis, w.shape[1])
    rank = min(basis, len(s))
    coefficients[:, :rank], vectors[:rank] = u[:, :rank] * s[:rank], v[:rank]
    return vectors, coefficients


def _alternate(
    w: Tensor, basis: int, nonzeros: int, rounds: int, generator: torch.Generator, end: float
) -> tuple[Tensor, Tensor]:
    best, best_error = None, math.inf
    for vectors, coefficients in turns(w, basis, nonzeros, rounds, generator):
        error = float((w - coefficients @ vectors).square().sum())
        if error < best_error:
            best, best_error = (vectors, coefficients), error
        if time.perf_counter() > end:
            break
    assert best is not None
    return best


def turns(
    w: Float[Tensor, "o q"], basis: int, nonzeros: int, rounds: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields `(D, S)` after each half of each round: first S, then D, is the new one."""
    rows = torch.randperm(len(w), generator=generator)[:basis]
    vectors = F.normalize(w[rows] + 1e-12, dim=1)
    if len(rows) < basis:
        more = torch.randn(basis - len(rows), w.shape[1], generator=generator).to(w)
        vectors = torch.cat((vectors, F.normalize(more, dim=1)))
    for _ in range(rounds):
        coefficients = pursue(w, vectors, nonzeros)
        yield vectors, coefficients
        vectors = _fit(w, coefficients, vectors)
        yield vectors, coefficients
        used = coefficients.abs().sum(0) > 0
        if not used.all():
            # A vector nobody uses becomes the row that is fitted worst.
            worst = (w - coefficients @ vectors).norm(dim=1).argsort(descending=True)
            dead = (~used).nonzero().flatten()[: len(worst)]
            vectors = vectors.clone()
            vectors[dead] = F.normalize(w[worst[: len(dead)]] + 1e-12, dim=1)


def _fit(w: Tensor, coefficients: Tensor, vectors: Tensor) -> Tensor:
    """Least squares for D, near the old one where S does not say."""
    s = coefficients.double()
    gram = s.T @ s
    ridge = 1e-9 * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(len(gram), dtype=gram.dtype, device=w.device)
    wanted = s.T @ w.double() + ridge @ vectors.double()
    return torch.linalg.solve(gram + ridge, wanted).to(w)


def pursue(w: Float[Tensor, "o q"], vectors: Float[Tensor, "k q"], nonzeros: int) -> Float[Tensor, "o k"]:
    """Orthogonal matching pursuit: row by row, the vector most like what is left comes in, and all are fitted anew.

    Source: Pati et al. 1993, "Orthogonal Matching Pursuit".
    """
    gram = vectors @ vectors.T
    size = gram.diagonal().sqrt().clamp(min=1e-12)
    target = w @ vectors.T
    left, coefficients = target, torch.zeros_like(target)
    taken = torch.zeros_like(target, dtype=torch.bool)
    chosen = target.new_zeros(len(w), 0, dtype=torch.long)
    for count in range(1, nonzeros + 1):
        best = (left.abs() / size).masked_fill(taken, -1.0).argmax(1, keepdim=True)
        chosen = torch.cat((chosen, best), 1)
        taken.scatter_(1, best, True)
        inner = gram[chosen[:, :, None], chosen[:, None, :]]
        ridge = 1e-6 * inner.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
        inner = inner + ridge[:, None, None] * torch.eye(count, dtype=w.dtype, device=w.device)
        fitted = torch.linalg.solve(inner, target.gather(1, chosen))
        coefficients = torch.zeros_like(target).scatter(1, chosen, fitted)
        left = target - coefficients @ gram
    return coefficients


def solve_config(
    weight: Float[Tensor, "o i"], ratio: float, *, rounds: int = 3, seed: int = 0
) -> dict[str, int] | None:
    """`group`, `basis` and `nonzeros` with the least error of those that store `weight` in `1 / ratio` of its bits.

    Groups of 64, 128 and 256 channels and of all of them, bases of a quarter, half and all of a group's channels, and
    as many nonzeros as fit; each is tried on one group. None: nothing fits.

    Raises:
        ValueError: `ratio` is not above 1.
    """
    if ratio <= 1:
        raise ValueError(f"ratio must be above 1, got {ratio}")
    out, inputs = weight.shape
    best, least = None, math.inf
    for group in sorted({g for g in (64, 128, 256) if g <= inputs} | {inputs}):
        groups = -(-inputs // group)
        for basis in sorted({max(1, group // 4), max(1, group // 2), group}):
            left = 32 * out * inputs / ratio / groups - 32 * basis * group
            nonzeros = min(basis, int(left // (out * (32 + index_bits(basis)))))
            if nonzeros < 1:
                continue
            part = weight[:, :group]
            vectors, coefficients = solve(part, group=group, basis=basis, nonzeros=nonzeros, rounds=rounds, seed=seed)
            error = float((part - _dense(vectors, coefficients, group)).square().sum() / part.square().sum())
            if error < least:
                best, least = {"group": group, "basis": basis, "nonzeros": nonzeros}, error
    return best
