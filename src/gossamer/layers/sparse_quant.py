"""Two numbers of every four, in few bits: the weights that sparse tensor cores read.

Source: Yu et al. 2023, "Boost Vision Transformer with GPU-Friendly Sparsity and Quantization"; Mishra et al. 2021,
"Accelerating Sparse Deep Neural Networks" (2:4); Esser et al. 2020, "Learned Step Size Quantization" (scales).

- of four inputs in a row, the two largest weights stay; in pairs, of four pairs in a row those two of largest norm
- `SparseQuantLinear` computes with the dense matrix, zeros in place, and is saved as kept values and 2-bit places
- `SparseTrainingLinear` is the form it learns in: masked, rounded straight through, scales learned as logarithms
- zero is always a point of the grid, so that rounding keeps the pattern
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from gossamer.layers.dense_sparse import pack_bits, unpack_bits

BITS = (4, 8, 32)


def check_bits(bits: int) -> None:
    """Raises a ValueError where `bits` is none of 4, 8, 32."""
    if bits not in BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}; got {bits}")


def group_width(paired: bool) -> int:
    """Inputs that form a group: four, or four pairs."""
    return 8 if paired else 4


def best_places(weight: Shaped[Tensor, "o i"], *, paired: bool = False) -> Int[Tensor, "o g 2"]:
    """Which two of every four inputs (or pairs of inputs) are largest, of equals the first; in order of place.

    Raises:
        ValueError: the groups do not divide the inputs.
    """
    width = group_width(paired)
    if weight.shape[1] % width:
        raise ValueError(f"inputs must be a multiple of {width}, got {weight.shape[1]}")
    units = weight.detach().double().unflatten(1, (-1, 4, width // 4)).square().sum(-1)
    return units.sort(dim=-1, descending=True, stable=True).indices[..., :2].sort(-1).values


def two_of_four(weight: Float[Tensor, "o i"], *, paired: bool = False) -> Bool[Tensor, "o i"]:
    """True for the weights that stay.

    Raises:
        ValueError: the groups do not divide the inputs.
    """
    places = best_places(weight, paired=paired)
    units = torch.zeros(*places.shape[:2], 4, dtype=torch.bool, device=weight.device).scatter(2, places, True)
    return units.repeat_interleave(group_width(paired) // 4, -1).flatten(1)


def is_two_of_four(weight: Shaped[Tensor, "o i"], *, paired: bool = False) -> bool:
    """Whether no group of `weight` has more than two numbers (or pairs) that are not zero."""
    width = group_width(paired)
    if weight.shape[1] % width:
        return False
    units = (weight != 0).unflatten(1, (-1, 4, width // 4)).any(-1)
    return bool((units.sum(-1) <= 2).all())


def pack(codes: Shaped[Tensor, "o i"], *, paired: bool = False) -> tuple[Shaped[Tensor, "o j"], Shaped[Tensor, " m"]]:
    """The kept half of a matrix and the packed places of it.

    Raises:
        ValueError: more than two of a group are not zero.
    """
    if not is_two_of_four(codes, paired=paired):
        raise ValueError("codes must have at most two of every four that are not zero")
    places = best_places(codes, paired=paired)
    units = codes.unflatten(1, (-1, 4, group_width(paired) // 4))
    kept = units.gather(2, places[..., None].expand(*places.shape, units.shape[-1]))
    return kept.flatten(1), pack_bits(places.flatten(), 2)


def unpack(
    values: Shaped[Tensor, "o j"], places: Shaped[Tensor, " m"], *, paired: bool = False
) -> Shaped[Tensor, "o i"]:
    """The matrix that `pack` packed."""
    unit = group_width(paired) // 4
    kept = values.unflatten(1, (-1, 2, unit))
    where = unpack_bits(places, 2, kept.shape[0] * kept.shape[1] * 2).view(kept.shape[:3])
    empty = values.new_zeros(kept.shape[0], kept.shape[1], 4, unit)
    return empty.scatter(2, where[..., None].expand_as(kept), kept).flatten(1)


def levels(bits: int) -> int:
    """Largest integer of a symmetric grid: `2^(bits - 1) - 1`."""
    return 2 ** (bits - 1) - 1


def fake_quantise(x: Float[Tensor, "*b"], scale: Float[Tensor, "*s"], bits: int) -> Float[Tensor, "*b"]:
    """`scale * clamp(round(x / scale))`, symmetric; the gradient of x is 1 within the range and 0 outside.

    32 bits give x itself.
    """
    if bits == 32:
        return x
    near = (x / scale).clamp(-levels(bits), levels(bits))
    return (near + (near.round() - near).detach()) * scale


def weight_scale(weight: Float[Tensor, "o i"], bits: int) -> Float[Tensor, " o"]:
    """`max |w| / (2^(bits - 1) - 1)` of each row."""
    return weight.detach().abs().amax(1).clamp(min=1e-8) / levels(bits)


def input_scale(sample: Float[Tensor, " n"], bits: int) -> Float[Tensor, ""]:
    """The scale with the least squared error on `sample`, of 40 between that of its largest number and a 20th of it."""
    top = sample.abs().max().clamp(min=1e-8) / levels(bits)
    tried = top * torch.linspace(1.0, 0.05, 40, device=sample.device)
    errors = torch.stack([(fake_quantise(sample, s, bits) - sample).square().mean() for s in tried])
    return tried[errors.argmin()]


class SparseTrainingLinear(nn.Module):
    """`y = q(w * mask) q(x) + b`, the roundings q absent until `quantise` is called.

    Args:
        layer: whose weight and bias are trained on.
        paired: whether the mask is of pairs.
    """

    mask: Tensor

    def __init__(self, layer: nn.Linear, *, paired: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.paired = paired
        self.weight = layer.weight
        self.bias = layer.bias
        self.register_buffer("mask", two_of_four(layer.weight, paired=paired), persistent=False)
        self.bits = 32
        self.log_weight_scale: nn.Parameter | None = None
        self.log_input_scale: nn.Parameter | None = None

    def quantise(self, bits: int, sample: Float[Tensor, " n"]) -> None:
        """From here on weights and inputs are rounded; `sample` are inputs the layer gets."""
        check_bits(bits)
        self.bits = bits
        if bits < 32:
            self.log_weight_scale = nn.Parameter(weight_scale(self.weight * self.mask, bits).log())
            self.log_input_scale = nn.Parameter(input_scale(sample, bits).log())

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        weight = self.weight * self.mask
        if self.log_weight_scale is not None and self.log_input_scale is not None:
            weight = fake_quantise(weight, self.log_weight_scale.exp()[:, None], self.bits)
            x = fake_quantise(x, self.log_input_scale.exp(), self.bits)
        return F.linear(x, weight, self.bias)

    @torch.no_grad()
    def stored(self, *, input_bits: int = 32) -> SparseQuantLinear:
        """The form that is kept."""
        new = SparseQuantLinear(
            self.in_features,
            self.out_features,
            bits=self.bits,
            paired=self.paired,
            input_bits=input_bits,
            bias=self.bias is not None,
        )
        new.to(self.weight)
        weight = self.weight * self.mask
        if self.log_weight_scale is None or self.log_input_scale is None:
            new.weight.copy_(weight)
        else:
            scale = self.log_weight_scale.exp()
            codes = (weight / scale[:, None]).round().clamp(-levels(self.bits), levels(self.bits))
            new.weight.copy_(codes * scale[:, None])
            new.weight_scale.copy_(scale)
            new.input_scale.copy_(self.log_input_scale.exp())
        new.bias = self.bias
        return new.train(self.training)


class SparseQuantLinear(nn.Module):
    """`y = W x + b`, `W = scale * codes` with two codes of every four; saved packed, computed dense.

    Args:
        in_features, out_features: channels in and out.
        bits: of a code; 32 are floats.
        paired: whether pairs are kept.
        input_bits: round the inputs too; 32 leaves them.

    Raises:
        ValueError: other bits, or the groups do not divide the inputs.
    """

    weight_scale: Tensor
    input_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int = 8,
        paired: bool = False,
        input_bits: int = 32,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_bits(bits)
        check_bits(input_bits)
        if in_features % group_width(paired):
            raise ValueError(f"in_features must be a multiple of {group_width(paired)}, got {in_features}")
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.paired, self.input_bits = bits, paired, input_bits
        # No later training may move it off its grid.
        self.weight = nn.Parameter(torch.zeros(out_features, in_features), requires_grad=False)
        self.register_buffer("weight_scale", torch.ones(out_features if bits < 32 else 0))
        self.register_buffer("input_scale", torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        if self.input_bits < 32:
            x = fake_quantise(x, self.input_scale, self.input_bits)
        return F.linear(x, self.weight, self.bias)

    def codes(self) -> Shaped[Tensor, "o i"]:
        """The integers, or for 32 bits the weight itself.

        Raises:
            ValueError: the weight is not what these make.
        """
        if self.bits == 32:
            return self.weight.detach()
        codes = (self.weight.detach() / self.weight_scale[:, None]).round()
        if codes.abs().max() > levels(self.bits) or not torch.equal(codes * self.weight_scale[:, None], self.weight):
            raise ValueError(f"the weight of {self} was changed and is no longer on its grid of {self.bits} bits")
        return codes.to(torch.int8)

    def stored_bits(self) -> int:
        """Bits of codes and places, scales and bias not counted."""
        return stored_bits(self.out_features * self.in_features, self.bits, self.paired)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "weight"]
        values, places = pack(self.codes(), paired=self.paired)
        if self.bits == 4:
            values = pack_bits(values.flatten().long() + 8, 4)
        destination[prefix + "values"], destination[prefix + "places"] = values, places

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        values, places = state_dict.pop(prefix + "values", None), state_dict.pop(prefix + "places", None)
        scale = state_dict.get(prefix + "weight_scale")
        if values is not None and places is not None and scale is not None:
            if self.bits == 4:
                values = unpack_bits(values, 4, self.out_features * self.in_features // 2) - 8
                values = values.view(self.out_features, -1)
            weight = unpack(values, places, paired=self.paired).to(scale.dtype)
            state_dict[prefix + "weight"] = weight if self.bits == 32 else weight * scale[:, None]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        pattern = "4:8 in pairs" if self.paired else "2:4"
        return f"{self.in_features}, {self.out_features}, {pattern}, bits={self.bits}, input_bits={self.input_bits}"


def stored_bits(weights: int, bits: int, paired: bool = False) -> int:
    """Bits of a packed matrix: half its numbers, and two bits for each kept one or pair."""
    return weights // 2 * bits + (weights // 4 if paired else weights // 2) * 2


def weighted_macs(macs: int, bits: int, factors: dict[int, float] | None = None) -> float:
    """Multiply-adds by what they cost beside single precision, if the hardware reads the pattern: half, by bits.

    Args:
        factors: how many times cheaper than in single precision one multiply-add is, by bits.
    """
    table = {32: 1.0, 16: 2.0, 8: 16.0, 4: 32.0} if factors is None else factors
    if bits not in table:
        raise ValueError(f"factors must say what {bits} bits are worth; they have {sorted(table)}")
    return macs / 2 / table[bits]
